"""Phase 1: shape the ContextBlock so that contexts reach a fixed point and stay diverse."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ctxlm.config import Experiment
from ctxlm.model import ContextLM, generator


class NonFiniteLoss(ArithmeticError):
    """A loss became infinite or not a number; the message names the step and the remedy."""


@dataclass(frozen=True)
class Phase1:
    """What Phase 1 leaves behind."""

    tokens: int
    iterations: int
    converged_tokens: int
    history: list[dict]
    """Rows phase, step (iteration), metric, value."""

    def summary(self) -> dict[str, float]:
        """The columns of metrics.json that Phase 1 gives."""
        return {
            "phase1_iterations": self.iterations,
            "phase1_converged_tokens": self.converged_tokens,
            "phase1_converged_ratio": self.converged_tokens / self.tokens,
        }


def _context_loss(out: Tensor, previous: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, fixed-point loss, diversity loss, every token's MSE to its previous context [B])."""
    moved = (out - previous).square().mean(1)
    diversity = -torch.linalg.norm(out - out.mean(0)) / len(out)
    fixed_point = moved.mean()
    return (1 - weight) * fixed_point + weight * diversity, fixed_point, diversity, moved.detach()


def train_context_block(model: ContextLM, tokens: Tensor, contexts: Tensor, experiment: Experiment) -> Phase1:
    """Train `model.context_block` in place.

    Iteration 1 is the recurrence, which `contexts` brings. Every further iteration is one Adam step over the whole
    stream: each token's context is computed from its predecessor's context of the iteration before (plus noise),
    and is pulled towards its own of the iteration before while all are pushed apart. Training stops early once
    `phase1_min_converged_ratio` of the tokens moved less than `phase1_convergence_threshold`.

    Args:
        model: on the device of `tokens`.
        tokens: int64 [T].
        contexts: float32 [T, C], the recurrence's; overwritten in place, iteration by iteration, so that it ends as
            the last iteration's noisy contexts, which give the published train ER.
        experiment: supplies the `phase1_*` parameters, `dist_reg_weight` and `seed`.

    Raises:
        NonFiniteLoss: the loss is no longer finite.
    """
    e, block, total = experiment, model.context_block, len(tokens)
    optimiser = torch.optim.Adam(block.parameters(), lr=e.phase1_learning_rate)
    starts = range(0, total, e.phase1_batch_size)
    history: list[dict] = []
    converged, iteration = 0, 1
    for iteration in range(2, e.phase1_max_iterations + 1):
        began = time.perf_counter()
        optimiser.zero_grad()
        sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)  # fixed point, diversity, MSE over tokens
        converged_sum = torch.zeros((), dtype=torch.int64, device=tokens.device)
        carried = contexts[-1:].clone()  # position 0 reads the last context
        for index, start in enumerate(tqdm(starts, desc=f"Phase 1, iteration {iteration}", unit="block", leave=False)):
            stop = min(start + e.phase1_batch_size, total)
            previous = contexts[start:stop].clone()
            read = torch.cat([carried, previous[:-1]])
            if e.phase1_context_noise:
                noise = torch.randn(read.shape, generator=generator(e.seed, "phase1_noise", iteration, index))
                read = read + e.phase1_context_noise * noise.to(read.device)
            inputs = model.context_inputs(tokens, torch.arange(start, stop, device=tokens.device))
            out = block(read, inputs)[-1]
            loss, fixed_point, diversity, moved = _context_loss(out, previous, e.dist_reg_weight)
            (loss / len(starts)).backward()
            contexts[start:stop] = out.detach()
            carried = previous[-1:]  # the next block reads this block's end as it was before
            sums += torch.stack([fixed_point / len(starts), diversity / len(starts), moved.sum() / total]).detach()
            converged_sum += (moved < e.phase1_convergence_threshold).sum()
        fixed_point, diversity, mse = sums.tolist()
        if not abs(fixed_point + diversity) < float("inf"):
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
        tqdm.write(f"iteration {iteration}: {converged / total:.1%} of the tokens converged")
        if iteration >= e.phase1_min_iterations and converged / total >= e.phase1_min_converged_ratio:
            break
    optimiser.zero_grad(set_to_none=True)
    return Phase1(total, iteration, converged, history)
