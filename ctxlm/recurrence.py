"""Contexts of a token stream: c_t = ContextBlock(c_{t-1}, u_t), c_{-1} = 0.

`sequential` is the definition. `chunked` computes the same contexts many tokens at a time: the ContextBlock
forgets where it started after some tens of tokens (it contracts; with small initial weights after hundreds), so chunks
of the stream can be run side by side and then joined.
"""

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctxlm.config import Experiment
from ctxlm.device import generator
from ctxlm.model import ContextBlock, ContextLM, DistinctTokens, look_up
from ctxlm.progress import track

TOLERANCE = 1e-5
"""Largest absolute difference of a context's entry at the joints of chunks."""
ROUNDING = 1e-4
"""The same where a block forgets slowly: rounding errors of float32 live on, and two runs come no nearer than some 1e-5
(B at full width, one token read at a time; in double precision they do)."""
CHUNKS = {"cpu": (256, 1024), "cuda": (128, 8192)}
"""Tokens of a chunk, at least, and chunks side by side, at most: enough to fill the products' rows, few enough that the
joints' runs stay a small share."""
INNER_KEPT = 2 * 2**30
"""Bytes that the inner layers' contexts of a stream may take; beyond, they are computed again when they are read."""


@dataclass(frozen=True)
class Contexts:
    """The contexts of a stream, and how they were certified.

    The last layer's are held; the others of a batch are kept where they fit a budget, and computed again otherwise.
    """

    tokens: Tensor
    """The stream, int64 [T]."""
    values: Tensor
    """The last layer's context after every token, float32 [T, C]."""
    distinct: DistinctTokens
    residual: float
    """Largest difference at a joint between a chunk as run and as continued from its predecessor (0: sequential)."""
    warmup: int
    """Tokens after a chunk's start until both agreed to the tolerance (0: sequential)."""
    tables: list[Tensor] | None = None
    """What the distinct tokens add to each layer of the ContextBlock as it was, where `inner` is not kept."""
    inner: list[Tensor] | None = None
    """The other layers' contexts, L - 1 tensors [T, width], in the type of the products that read them; or None."""

    @torch.no_grad()
    def layers(self, block: ContextBlock, at: Tensor) -> list[Tensor]:
        """Every layer's contexts at the positions `at`, int64 [B]: L tensors [B, width]."""
        if self.inner is not None:
            return [layer[at] for layer in (*self.inner, self.values)]
        before = self.values[(at - 1).clamp(min=0)] * (at > 0).unsqueeze(1)  # zero before the stream
        return block(before, look_up(self.tables, self.distinct.table_rows(at)))

    def unrolled(self, model: ContextLM, at: Tensor, window: int) -> list[Tensor]:
        """Every layer's contexts at consecutive positions `at`, computed anew with gradients: L tensors [B, width].

        Each window of so many tokens goes on from the context held before it: back-propagation through time, truncated
        at the windows' starts (Williams & Peng, 1990). The last layer's contexts take the place of those in `values`,
        as Phase 1's do: windows of later calls read them.
        """
        block, starts = model.context_block, at[::window, None]
        positions = (starts + torch.arange(window, device=at.device)).clamp(max=at[-1])  # the excess is cut off below
        projections = block.projections(model.context_inputs(self.tokens, positions))
        context = self.values[(starts[:, 0] - 1).clamp(min=0)] * (starts > 0)  # zero before the stream
        steps = []
        for offset in range(window):
            steps.append(block(context, [projected[:, offset] for projected in projections]))
            context = steps[-1][-1]
        layers = [torch.stack(layer, 1).flatten(0, 1)[: len(at)] for layer in zip(*steps, strict=True)]
        self.values[at] = layers[-1].detach()
        return layers


@torch.no_grad()
def sequential(model: ContextLM, tokens: Tensor) -> Contexts:
    """Token by token, as defined. `tokens` is int64 [T]."""
    block, distinct = model.context_block, DistinctTokens(model, tokens)
    context = torch.zeros(1, block.context_dim, device=tokens.device)
    values = torch.empty(len(tokens), block.context_dim, device=tokens.device)
    for t in track(range(len(tokens)), "contexts, token by token"):
        inputs = model.context_inputs(tokens, torch.tensor([t], device=tokens.device))
        context = block(context, block.projections(inputs))[-1]
        values[t] = context[0]
    return Contexts(tokens, values, distinct, residual=0.0, warmup=0, tables=distinct.tables(block))


@torch.no_grad()
def chunked(model: ContextLM, tokens: Tensor, keep: torch.dtype | None = None) -> Contexts:
    """The same contexts from chunks run side by side, certified at every joint.

    First every chunk runs from a zero context. Then every chunk but the first is run again from its
    predecessor's last context until it meets its first run: until both have agreed within `TOLERANCE` for as many
    tokens as they took to agree (a map that only seems to forget drifts off again). From there on the first run
    stands. The warm-up is thus as long as it needs to be, token by token. Inside a chunk the recurrence holds by
    construction, and at the joint it holds to `TOLERANCE` times the block's own contraction. Where the runs have only
    agreed within `ROUNDING`, for half of the chunk, and come no nearer, the second one stands. Else the chunks are made
    four times longer, as long as that brings the runs nearer to each other; if it does not, or a single chunk is
    left, the sequential form is taken.

    Args:
        model: the model, on the device of `tokens`.
        tokens: int64 [T].
        keep: keep the inner layers' contexts too, in this type, if that takes no more than `INNER_KEPT`.
    """
    total = len(tokens)
    shortest, rows = CHUNKS[tokens.device.type]
    length = max(shortest, -(-total // rows))
    difference = math.inf
    while length < total:
        before = difference
        contexts, difference = _chunks(model, tokens, length, keep)
        if contexts is not None:
            return contexts
        if difference > before / 2 or 4 * length >= total:  # longer ones would be work for nothing
            if difference > TOLERANCE:
                warnings.warn(
                    f"the ContextBlock does not forget for certain within {length} tokens (two runs still differ by "
                    f"{difference:.1e}): its contexts are computed token by token",
                    stacklevel=3,  # above no_grad
                )
            break
        length *= 4
    return sequential(model, tokens)


def _chunks(model: ContextLM, tokens: Tensor, length: int, keep: torch.dtype | None) -> tuple[Contexts | None, float]:
    """`chunked` with chunks of this length: the contexts, to either tolerance, or None, and the last difference."""
    total, block, device = len(tokens), model.context_block, tokens.device
    count = -(-total // length)
    distinct = DistinctTokens(model, tokens)
    tables = distinct.tables(block)
    starts = torch.arange(count, device=device) * length
    values, inner = torch.empty(count, length, block.context_dim, device=device), None
    if keep is not None and count * length * sum(block.widths[:-1]) * keep.itemsize <= INNER_KEPT:
        inner = [torch.empty(count, length, width, device=device, dtype=keep) for width in block.widths[:-1]]

    def step(context: Tensor, first: int, offset: int) -> Tensor:
        positions = (starts[first:] + offset).clamp(max=total - 1)  # the last chunk's tail is cut off below
        *before, context = block(context, look_up(tables, distinct.table_rows(positions)))
        if inner is not None:
            for layer, output in zip(inner, before, strict=True):
                layer[first:, offset] = output
        return context

    context = torch.zeros(count, block.context_dim, device=device)
    for offset in track(range(length), f"contexts, {count} chunks"):
        context = step(context, 0, offset)
        values[:, offset] = context
    context, differences = values[:-1, -1].clone(), []
    agreed = dict.fromkeys((TOLERANCE, ROUNDING), 1)  # tokens after which the two runs have agreed to it
    for offset in range(length):
        context = step(context, 1, offset)
        inside = starts[1:, None] + offset < total  # the last chunk's tail, which repeats a token, does not count
        differences.append(((context - values[1:, offset]).abs() * inside).max().item())
        values[1:, offset] = context
        agreed |= {tolerance: offset + 2 for tolerance in agreed if not differences[-1] <= tolerance}
        warmup = agreed[TOLERANCE]
        if offset + 1 >= 2 * warmup:
            residual = max(differences[warmup - 1 :])
            break
    else:
        # Not within TOLERANCE, but perhaps as near as rounding lets them come: within ROUNDING over half the chunk, and
        # no nearer by its last quarter.
        warmup, residual = agreed[ROUNDING], differences[-1]
        if length < 2 * warmup or residual < max(TOLERANCE, differences[3 * length // 4] / 2):
            return None, residual
    kept = inner and [layer.flatten(0, 1)[:total] for layer in inner]
    last = values.flatten(0, 1)[:total]
    return Contexts(tokens, last, distinct, residual, warmup, None if kept else tables, kept), differences[-1]


class Ablation:
    """What the TokenBlock is to read instead of a stream's contexts, by `context_ablation` and `context_rank`.

    `zero`: zeros; `random_tokens`: the contexts of the same tokens in random order, which tell nothing of the text
    before but look like contexts. Tokens, and what is to be predicted, stay. With a rank r every layer's contexts are
    projected on their r principal dimensions (those of the training stream) about their mean.
    """

    def __init__(self, model: ContextLM, train: Contexts, experiment: Experiment):
        """`train`: the contexts of the training stream, which the principal dimensions are of."""
        self.model, self.e = model, experiment
        self.principal = None
        if experiment.context_rank:
            layers = train.layers(model.context_block, torch.arange(len(train.tokens), device=train.tokens.device))
            self.principal = [_principal(layer, experiment.context_rank) for layer in layers]

    @torch.no_grad()
    def __call__(self, contexts: Contexts) -> Contexts:
        """The contexts of any stream as the TokenBlock is to read them; themselves if nothing is taken from them."""
        total, device = len(contexts.tokens), contexts.tokens.device
        if self.e.context_ablation == "zero":
            widths = self.model.context_block.widths
            *inner, last = (contexts.values.new_zeros(1, width).expand(total, -1) for width in widths)
            return replace(contexts, values=last, inner=inner)
        if self.e.context_ablation == "random_tokens":
            draws = generator(self.e.seed, "context_ablation", device=device)
            order = torch.randperm(total, generator=draws, device=device)
            return replace(chunked(self.model, contexts.tokens[order]), tokens=contexts.tokens)
        if self.principal is None:
            return contexts
        layers = contexts.layers(self.model.context_block, torch.arange(total, device=device))
        *inner, last = (
            (mean + (layer.float() - mean) @ axes @ axes.T).to(layer.dtype)
            for layer, (mean, axes) in zip(layers, self.principal, strict=True)
        )
        return replace(contexts, values=last, inner=inner)


def _principal(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The mean [width] of `rows` [T, width], and their `rank` principal dimensions [width, rank] (at most all)."""
    mean = rows.float().mean(0)
    width = rows.shape[1]
    scatter = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for part in rows.split(8192):  # double precision, a part at a time
        centred = (part.float() - mean).double()
        scatter.addmm_(centred.T, centred)
    return mean, torch.linalg.eigh(scatter).eigenvectors[:, -rank:].float()
