"""Phase 1: shape the ContextBlock so that contexts reach a fixed point and stay diverse."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxlm.config import Experiment
from ctxlm.device import autocast, generator
from ctxlm.metrics import NonFiniteLoss, singular_values
from ctxlm.model import ContextLM, DistinctTokens, look_up
from ctxlm.progress import say, track
from ctxlm.recurrence import chunked


@dataclass(frozen=True)
class Phase1:
    """What Phase 1 leaves behind, beside the ContextBlock's weights."""

    history: list[dict]
    """Rows phase, step (iteration), metric, value."""
    spectra: dict[str, Tensor]
    """Singular values, float64 [C], of the contexts before Phase 1 (`init_er`) and in its last, noisy iteration
    (`train_er`)."""

    @property
    def iterations(self) -> int:
        """Of which the first one, the recurrence, has no history."""
        return self.history[-1]["step"] if self.history else 1

    def summary(self) -> dict[str, float]:
        """The columns of metrics.json that Phase 1 gives."""
        last = {row["metric"]: row["value"] for row in self.history}
        return {
            "phase1_iterations": self.iterations,
            "phase1_converged_tokens": last.get("converged_tokens", 0),
            "phase1_converged_ratio": last.get("converged_ratio", 0.0),
        }


def shape_contexts(
    model: ContextLM, tokens: Tensor, experiment: Experiment, dtype: torch.dtype = torch.float32
) -> Phase1:
    """Iteration 1 (the recurrence) and `train_context_block`, which trains `model.context_block` in place.

    Args:
        tokens: int64 [T].

    Raises:
        NonFiniteLoss: the loss is no longer finite.
    """
    contexts = chunked(model, tokens).values
    before = singular_values(contexts)
    history = train_context_block(model, tokens, contexts, experiment, dtype)
    return Phase1(history, {"init_er": before, "train_er": singular_values(contexts)})


def train_context_block(
    model: ContextLM, tokens: Tensor, contexts: Tensor, experiment: Experiment, dtype: torch.dtype = torch.float32
) -> list[dict]:
    """Train `model.context_block` in place; returns its history.

    Iteration 1 is the recurrence, which `contexts` brings. Every further iteration is one Adam step over the whole
    stream: each token's context is computed from its predecessor's context of the iteration before (plus noise),
    and is pulled towards its own of the iteration before while all are pushed apart. Training stops early, but not
    before `phase1_min_iterations`, once `phase1_min_converged_ratio` of the tokens moved less than
    `phase1_convergence_threshold`. In the gradient every block of `phase1_batch_size` tokens weighs the same, a short
    last one too.

    Args:
        model: on the device of `tokens`.
        tokens: int64 [T].
        contexts: float32 [T, C], the recurrence's; overwritten in place, iteration by iteration, so that it ends as
            the last iteration's noisy contexts, which give the published train ER.
        experiment: supplies the `phase1_*` parameters, `dist_reg_weight` and `seed`.
        dtype: of the matrix products; everything else is float32.

    Raises:
        NonFiniteLoss: the loss is no longer finite.
    """
    e, block, total, device = experiment, model.context_block, len(tokens), tokens.device
    products = autocast(device, dtype, cache=False)
    optimiser = torch.optim.Adam(block.parameters(), lr=e.phase1_learning_rate, fused=True)
    distinct = DistinctTokens(model, tokens)
    bounds = [(start, min(start + e.phase1_batch_size, total)) for start in range(0, total, e.phase1_batch_size)]
    # The rows of the tables that each block of tokens reads, and where in those it finds its own.
    read_rows = [
        distinct.table_rows(torch.arange(start, stop, device=device)).unique(return_inverse=True)
        for start, stop in bounds
    ]
    history: list[dict] = []
    for iteration in range(2, e.phase1_max_iterations + 1):
        began = time.perf_counter()
        optimiser.zero_grad()
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # fixed point, diversity, MSE over tokens
        converged_sum = torch.zeros((), dtype=torch.int64, device=device)
        # The weights stand still until the step at the end: every distinct token is projected once, the blocks'
        # gradients of its projections are summed, and one backward pass takes them on to the weights.
        with products:
            tables = distinct.tables(block)
        gradients = [torch.zeros_like(table, dtype=torch.float32) for table in tables]
        carried = contexts[-1:].clone()  # position 0 reads the last context, as in the study
        for index, (start, stop) in enumerate(track(bounds, f"iteration {iteration}")):
            previous = contexts[start:stop].clone()
            read = torch.cat([carried, previous[:-1]])
            if e.phase1_context_noise:
                draws = generator(e.seed, "phase1_noise", iteration, index, device=device)
                noise = torch.randn(read.shape, generator=draws, device=device)
                read = read.add_(noise, alpha=e.phase1_context_noise)
            rows, places = read_rows[index]
            # float32, because a frequent token's gradient is a sum of hundreds
            read_tables = [table.detach()[rows].float().requires_grad_() for table in tables]
            with products:
                out = block(read, look_up(read_tables, places))[-1]
            moved = (out - previous).square().mean(1)  # every token's
            fixed_point, diversity = moved.mean(), -torch.linalg.norm(out - out.mean(0)) / len(out)
            loss = (1 - e.dist_reg_weight) * fixed_point + e.dist_reg_weight * diversity
            (loss / len(bounds)).backward()
            for gradient, table in zip(gradients, read_tables, strict=True):
                gradient.index_add_(0, rows, table.grad)
            contexts[start:stop] = out.detach()
            carried = previous[-1:]  # the next block reads this block's end as it was before
            sums += torch.stack([fixed_point / len(bounds), diversity / len(bounds), moved.sum() / total]).detach()
            converged_sum += (moved < e.phase1_convergence_threshold).sum()
        torch.autograd.backward(tables, [g.to(t.dtype) for g, t in zip(gradients, tables, strict=True)])
        del tables, gradients, read_tables
        fixed_point, diversity, mse = sums.tolist()
        if not math.isfinite(fixed_point + diversity):
            raise NonFiniteLoss(
                f"Phase 1's loss is {fixed_point + diversity} at iteration {iteration}: "
                f"lower phase1_learning_rate = {e.phase1_learning_rate}"
            )
        torch.nn.utils.clip_grad_norm_(block.parameters(), e.phase1_gradient_clip)
        optimiser.step()
        converged = int(converged_sum)
        values = {
            "fixed_point_loss": fixed_point,
            "diversity_loss": diversity,
            "mse": mse,
            "converged_tokens": converged,
            "converged_ratio": converged / total,
            "seconds": time.perf_counter() - began,
        }
        history += [{"phase": "phase1", "step": iteration, "metric": k, "value": v} for k, v in values.items()]
        say(f"iteration {iteration}: {converged / total:.1%} of the tokens converged")
        if iteration >= e.phase1_min_iterations and converged / total >= e.phase1_min_converged_ratio:
            break
    optimiser.zero_grad(set_to_none=True)
    return history
