"""Cross-entropy against a large vocabulary without the logits of a whole batch.

The vocabulary is walked over in tiles, as flash attention walks over keys (Dao et al., 2022): a tile's logits stay in
the cache while they become the softmax over this tile and are multiplied back. A tile's share of the whole softmax
follows from its log-sum-exp. A gradient of the head or the bias needs the final shares: for it alone tiles are kept.
"""

import threading
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 2**20
"""Logits of a tile on a CPU, 4 MiB in float32: 2,048 tokens for 512 rows. Elsewhere the vocabulary is one tile."""
MIN_TILE = 512
"""Tokens of a tile at least, however many the rows: every tile costs a pass over the gradient of h."""

Losses = tuple[Tensor, Tensor, Tensor]
"""Of a batch: the mean loss (nats, differentiable), every target's [B], and whether it was predicted first [B]."""

_kept = threading.local()  # two trainings in one process do not write over each other


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, targets, dtype, backward):
        rows, vocabulary, device = h.shape[0], weight.shape[0], h.device
        for_h, for_weight, for_bias = (backward and needed for needed in ctx.needs_input_grad[:3])
        keep = for_weight or for_bias
        tile = min(max(TILE // max(rows, 1), MIN_TILE), vocabulary) if device.type == "cpu" else vocabulary
        tiles = [slice(first, min(first + tile, vocabulary)) for first in range(0, vocabulary, tile)]
        # Rows in the order of their targets, so that those whose target lies in a tile are a slice. With one tile
        # nothing is asked of the device, and nothing waits for it.
        targets, order = targets.sort()
        starts = [part.start for part in tiles[1:]]
        inner = torch.searchsorted(targets, torch.tensor(starts, device=device)).tolist() if starts else []
        of_tiles = [slice(*pair) for pair in pairwise([0, *inner, rows])]
        head, hidden = weight.to(dtype), h[order].to(dtype)
        room = _scratch("logits", rows * (vocabulary if keep else tile), device, dtype)
        largest, peaks = torch.empty(2, len(tiles), rows, device=device)
        target, lse = torch.empty(rows, 1, device=device), torch.full((rows,), -torch.inf, device=device)
        correct = torch.empty(rows, dtype=torch.bool, device=device)
        grad_h = torch.zeros(h.shape, device=device) if for_h else None
        back = _scratch("back", h.numel(), device, dtype).view(h.shape)
        softmaxes = []
        for part, here, top, peak in zip(tiles, of_tiles, largest, peaks, strict=True):
            wide = part.stop - part.start
            start, size = rows * part.start if keep else 0, rows * wide
            product = room[start : start + size].view(rows, wide)
            torch.mm(hidden, head[part].T, out=product)
            logits = product
            if dtype != torch.float32:
                logits = _scratch("tile", size, device, torch.float32).view(rows, wide).copy_(product)
            if bias is not None:
                logits += bias[part]
            inside = targets[here, None] - part.start
            target[here] = logits[here].gather(1, inside)
            # Equal logits are common in bfloat16: the first of the largest is the prediction, as argmax has it. It
            # costs 15 times amax on a CPU: there it looks only at rows whose target lies in the tile.
            correct[here] = logits[here].argmax(1) == inside[:, 0]
            torch.amax(logits, 1, out=top)
            # One fused pass: exp alone takes longer on some CPUs. The sum of the exponentials follows from the largest
            # probability, which never underflows: it is at least 1/V.
            torch.softmax(logits, 1, out=logits)
            torch.amax(logits, 1, out=peak)
            if logits is not product and (for_h or keep):
                product.copy_(logits)
            if for_h:
                torch.mm(product, head[part], out=back)
                lse_here = top - peak.log()
                lse = torch.logaddexp(lse, lse_here)
                grad_h.lerp_(back.float(), (lse_here - lse).exp_()[:, None])
            softmaxes.append(product)
        # The first of the largest logits lies in the first of the tiles that reach it.
        correct &= largest.argmax(0) == targets // tile
        top = largest.amax(0)
        shares = (largest - top).exp_() / peaks
        total = shares.sum(0)
        losses = top - target[:, 0] + total.log()
        # The gradient of a row's loss is p - onehot(target), where p is a tile's softmax times its share. Gradients
        # are the losses' sum's, until backward divides them: every pass over a [V, d] counts.
        shares /= total
        grad_weight = torch.empty_like(weight) if for_weight else None
        grad_bias = torch.empty_like(bias) if for_bias else None
        for part, softmax, share in zip(tiles, softmaxes, shares, strict=True):
            if for_weight:
                weighted = (hidden * share[:, None]).to(dtype)
                if dtype == torch.float32:
                    torch.mm(softmax.T, weighted, out=grad_weight[part])
                else:
                    grad_weight[part] = softmax.T @ weighted
            if for_bias:
                torch.mv(softmax.T.float(), share, out=grad_bias[part])
        order = order.argsort()
        if for_h:
            grad_h = grad_h.sub_(head[targets])[order]
        if for_weight:
            grad_weight.index_add_(0, targets, hidden.float(), alpha=-1)
        if for_bias:
            grad_bias.index_add_(0, targets, torch.ones_like(losses), alpha=-1)
        ctx.rows, ctx.gradients = rows, (grad_h, grad_weight, grad_bias)
        losses, correct = losses[order], correct[order]
        ctx.mark_non_differentiable(losses, correct)
        return losses.mean(), losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, _losses, _correct):
        gradients, ctx.gradients = ctx.gradients, None  # used up, as autograd's own buffers are
        return *(None if g is None else g.mul_(grad_mean / ctx.rows) for g in gradients), None, None, None


def _scratch(name: str, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An uninitialised [size]. A CPU's is kept from call to call: fresh pages cost a quarter of a product."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    kept = vars(_kept).get((name, dtype))
    if kept is None or kept.numel() < size:
        kept = vars(_kept)[name, dtype] = torch.empty(size, dtype=dtype)
    return kept[:size]


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Losses:
    """Cross-entropy of softmax(h · weightᵀ + bias), like `F.cross_entropy` over `F.linear`.

    Args:
        h: float32 [B, d].
        weight: float32 [V, d], or a copy in `dtype` that saves the conversion when it is frozen.
        targets: int64 [B].
        bias: float32 [V] or None.
        dtype: of the matrix products; reductions and results are float32.

    Returns:
        The mean loss in nats (differentiable), every row's loss [B], and whether its target had the largest logit [B].
    """
    # Inside a Function gradients are always off, so an argument says whether they are wanted.
    return _LinearCrossEntropy.apply(h, weight, bias, targets, dtype, torch.is_grad_enabled())


class HeadLoss:
    """The next-token loss through the tied head, which, if frozen, is converted to the type of the products once."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """`model`: a ContextLM or a NeuralLM."""
        weight = model.embedding
        self.weight = weight if weight.requires_grad else weight.detach().to(dtype)
        self.bias, self.scale, self.dtype = model.output_bias, model.logit_scale, dtype

    def __call__(self, h: Tensor, tokens: Tensor, positions: Tensor) -> Losses:
        """Losses of predicting what follows `positions` [B] of the stream `tokens` [T] from h [B, d] there."""
        return linear_cross_entropy(h.float() * self.scale, self.weight, tokens[positions + 1], self.bias, self.dtype)
