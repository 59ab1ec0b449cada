"""How far back a context reaches: how soon a disturbance is forgotten, and what the last k tokens alone are worth."""

import itertools
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxlm.loss import Losses
from ctxlm.metrics import perplexity
from ctxlm.model import ContextBlock, ContextLM, look_up
from ctxlm.recurrence import Contexts

FORGOTTEN = 0.01
"""A disturbance counts as forgotten once so small a share of it is left."""
RECENT = (1, 2, 4, 8, 16, 32, 64)
"""Tokens that a context is built from, in `recent_tokens`."""


@torch.no_grad()
def forgetting(
    block: ContextBlock, contexts: Contexts, phase: str = "forgetting", steps: int = 64, starts: int = 256
) -> list[dict]:
    """The share of a disturbance that is left after 0 .. `steps` tokens.

    At evenly spaced positions the context is exchanged for that of another position, and both the true and the false
    one read the same tokens from there on. The share is the root mean square of their difference, over positions
    and dimensions, by its value at the start.

    Args:
        block: the one that made the contexts.
        phase: what the rows are called.
        steps: tokens read after the exchange; fewer on a short stream.
        starts: positions, at most.

    Returns:
        rows of history.csv: phase, step (tokens), metric (`share_left`), value.
    """
    total = len(contexts.tokens)
    steps = min(steps, total // 2)
    positions = _spaced(0, total - steps, starts, contexts.tokens.device)
    true, tables = contexts.values[positions], contexts.distinct.tables(block)
    false = true.roll(len(true) // 2, 0)
    differences = [(true - false).square().mean()]
    for step in range(1, steps + 1):
        inputs = look_up(tables, contexts.distinct.table_rows(positions + step))
        true, false = block(true, inputs)[-1], block(false, inputs)[-1]
        differences.append((true - false).square().mean())
    left = torch.stack(differences).sqrt()
    shares = (left / left[0].clamp(min=torch.finfo(left.dtype).tiny)).tolist()  # a single position disturbs nothing
    return [{"phase": phase, "step": k, "metric": "share_left", "value": share} for k, share in enumerate(shares)]


def reach(block: ContextBlock, contexts: Contexts) -> tuple[dict[str, float | None], list[dict]]:
    """How soon the contexts that `block` made forget: `horizon` and `lyapunov` of a run, and `forgetting`'s rows."""
    rows = forgetting(block, contexts)
    return {"horizon": horizon([row["value"] for row in rows]), "lyapunov": lyapunov(block, contexts)}, rows


def horizon(left: list[float]) -> float | None:
    """Tokens until `FORGOTTEN` of a disturbance is left, interpolated on a logarithmic scale; None: never."""
    for step, (before, after) in enumerate(itertools.pairwise(left)):
        if after <= FORGOTTEN < before:
            return step + 1.0 if after == 0 else step + math.log(before / FORGOTTEN) / math.log(before / after)
    return None


@torch.no_grad()
def lyapunov(block: ContextBlock, contexts: Contexts, steps: int = 64, starts: int = 64) -> float | None:
    """The largest Lyapunov exponent of the contexts, nats a token: below 0, a small disturbance fades as exp(λ t).

    Mean growth of the length of a tangent vector, which is taken along by the block's Jacobian and made unit length
    again after every token: over `steps` tokens from each of the `starts`, after as many in which it turns into the
    direction that grows fastest (Benettin et al. 1980; of recurrent networks: Engelken, Wolf & Abbott 2023).

    Args:
        block: the one that made the contexts.
        steps: tokens averaged over; fewer on a short stream, and None where it has less than four.
        starts: positions, at most.
    """
    total = len(contexts.tokens)
    steps = min(steps, total // 4)
    if not steps:
        return None
    positions = _spaced(0, total - 2 * steps, starts, contexts.tokens.device)
    context, tables = contexts.values[positions], contexts.distinct.tables(block)
    tangent = F.normalize(context.roll(1, 1) - context)  # any but a constant, which a LayerNorm removes
    grown = torch.zeros((), dtype=torch.float64, device=context.device)
    for step in range(1, 2 * steps + 1):
        inputs = look_up(tables, contexts.distinct.table_rows(positions + step))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's `jvp` itself calls it
            context, moved = torch.func.jvp(lambda c, inputs=inputs: block(c, inputs)[-1], (context,), (tangent,))
        length = moved.norm(dim=1).clamp(min=torch.finfo(moved.dtype).tiny)
        tangent = moved / length[:, None]
        if step > steps:
            grown += length.log().double().mean()
    return (grown / steps).item()


@torch.no_grad()
def recent_tokens(
    model: ContextLM, losses: Callable[..., Losses], contexts: Contexts, positions: int = 1024
) -> list[dict]:
    """PPL at evenly spaced positions when the context, from zero, has read the last k tokens only.

    The TokenBlock reads its own input tokens as ever. `losses` is a `Predictor`'s `from_layers`. Rows of history.csv:
    phase `recent_tokens`, step k (0: the whole stream), metrics `val_loss` and `val_ppl`. A k that the stream does not
    hold is left out.
    """
    tokens, distinct = contexts.tokens, contexts.distinct
    block, lengths = model.context_block, [k for k in RECENT if k < len(tokens) - 1]
    if not lengths:
        return []
    at = _spaced(max(lengths), len(tokens) - 1, positions, tokens.device)
    offsets = torch.arange(1 - distinct.n, 1, device=tokens.device)
    nothing = torch.arange(distinct.n, device=tokens.device) * len(distinct.rows)  # as before the stream's start
    tables, rows = distinct.tables(block), []

    def record(k: int, layers: list[Tensor]) -> None:
        loss = losses(tokens, at, layers)[1].double().mean().item()
        values = {"val_loss": loss, "val_ppl": perplexity(loss)}
        rows.extend({"phase": "recent_tokens", "step": k, "metric": m, "value": v} for m, v in values.items())

    record(0, block(contexts.values[at - 1], look_up(tables, distinct.table_rows(at))))
    for k in lengths:
        layers = [torch.zeros(len(at), block.context_dim, device=tokens.device)]
        for back in range(k - 1, -1, -1):
            places = torch.where(offsets - back > -k, distinct.table_rows(at - back), nothing)
            layers = block(layers[-1], look_up(tables, places))
        record(k, layers)
    return rows


def _spaced(first: int, end: int, count: int, device: torch.device) -> Tensor:
    """At most `count` evenly spaced whole numbers from `first` to `end` - 1."""
    return torch.linspace(first, end - 1, min(count, end - first)).round().long().to(device)
