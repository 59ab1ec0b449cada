"""Contexts of a token stream: c_t = ContextBlock(c_{t-1}, u_t), c_{-1} = 0.

`sequential` is the definition. `chunked` computes the same contexts many tokens at a time: the ContextBlock
forgets where it started after some tens of tokens (it contracts), so chunks of the stream can be run side by side
and then joined.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import trange

from ctxlm.model import ContextLM


@dataclass(frozen=True)
class Contexts:
    """The last layer's context after every token, float32 [T, C], and how it was certified."""

    values: Tensor
    residual: float
    """Largest difference at a joint between a chunk as run and as continued from its predecessor (0: sequential)."""
    warmup: int
    """Tokens after a chunk's start until both agreed to the tolerance (0: sequential)."""


@torch.no_grad()
def sequential(model: ContextLM, tokens: Tensor, progress: bool = False) -> Contexts:
    """Token by token, as defined. `tokens` is int64 [T]."""
    context = torch.zeros(1, model.context_block.context_dim, device=tokens.device)
    values = torch.empty(len(tokens), context.shape[1], device=tokens.device)
    for t in trange(len(tokens), desc="contexts", unit="token", disable=not progress):
        context = model.context_block(context, model.context_inputs(tokens, torch.tensor([t], device=tokens.device)))[
            -1
        ]
        values[t] = context[0]
    return Contexts(values, residual=0.0, warmup=0)


@torch.no_grad()
def chunked(
    model: ContextLM, tokens: Tensor, tolerance: float = 1e-5, chunk_length: int | None = None, progress: bool = False
) -> Contexts:
    """The same contexts from chunks run side by side, certified at every joint.

    First every chunk runs from a zero context. Then every chunk but the first is run again from its
    predecessor's last context until it meets its first run: until both have agreed within `tolerance` for as many
    tokens as they took to agree (a map that only seems to forget drifts off again). From there on the first run
    stands. The warm-up is thus as long as it needs to be, token by token. Inside a chunk the recurrence holds by
    construction, and at the joint it holds to `tolerance` times the block's own contraction. If the runs have not
    met by the chunks' end, the chunks are made four times longer; a single chunk is the sequential form.

    Args:
        model: the model, on the device of `tokens`.
        tokens: int64 [T].
        tolerance: largest absolute difference of a context entry at the joints.
        chunk_length: tokens a chunk; the default suits matrix products on a CPU and the usual warm-up.
        progress: show a bar.
    """
    total, width = len(tokens), model.context_block.context_dim
    length = chunk_length or max(256, -(-total // 1024))
    if total <= length:
        return sequential(model, tokens, progress)
    count = -(-total // length)
    starts = torch.arange(count, device=tokens.device) * length
    values = torch.empty(count, length, width, device=tokens.device)

    def step(context: Tensor, first: int, offset: int) -> Tensor:
        positions = (starts[first:] + offset).clamp(max=total - 1)  # the last chunk's tail is cut off below
        return model.context_block(context, model.context_inputs(tokens, positions))[-1]

    context = torch.zeros(count, width, device=tokens.device)
    for offset in trange(length, desc=f"contexts, {count} chunks", disable=not progress):
        context = step(context, 0, offset)
        values[:, offset] = context
    context, warmup, residual = values[:-1, -1].clone(), 0, 0.0
    for offset in range(length):
        context = step(context, 1, offset)
        difference = (context - values[1:, offset]).abs().max().item()
        values[1:, offset] = context
        if difference <= tolerance:
            warmup, residual = warmup or offset + 1, max(residual, difference)
        else:
            warmup, residual = 0, 0.0
        if warmup and offset + 1 >= 2 * warmup:
            return Contexts(values.flatten(0, 1)[:total], residual, warmup)
    if 4 * length >= total:
        warnings.warn(
            f"the ContextBlock does not forget within {length} tokens (residual {difference:.1e}): "
            "its contexts are computed token by token",
            stacklevel=2,
        )
        return sequential(model, tokens, progress)
    return chunked(model, tokens, tolerance, 4 * length, progress)
