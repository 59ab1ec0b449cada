"""Cross-entropy against a large vocabulary without the logits of a whole batch in float32.

The logits of a block of rows exist once, in the type of the matrix products, and are overwritten by their softmax,
which is all the gradient needs; reductions run in float32 over a few rows at a time, which stay in the cache.
"""

import torch
from torch import Tensor, nn

LOGIT_BYTES = 128 * 2**20
"""Memory for the logits of one block of rows: a batch of 512 in float32, so that the head is read once."""
ROWS_IN_CACHE = 16
"""Rows reduced at a time on a CPU: 16 x 50,257 float32 stay in the cache."""
ALIGNED = 64
"""Rows of logits begin a multiple of so many entries apart: without AVX-512 a product into them is a third faster."""

Losses = tuple[Tensor, Tensor, Tensor]
"""Of a batch: the mean loss (nats, differentiable), every target's [B], and whether it was predicted first [B]."""

_kept: dict[tuple[str, torch.dtype], Tensor] = {}


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, targets, dtype, transposed, backward):
        rows, device = h.shape[0], h.device
        products, frozen = weight.to(dtype), not weight.requires_grad
        back = products if transposed is None else transposed.T
        losses = torch.empty(rows, device=device)
        correct = torch.empty(rows, dtype=torch.bool, device=device)
        needs_gradient = backward and any(ctx.needs_input_grad[:3])
        grad_h = torch.empty(rows, h.shape[1], device=device) if needs_gradient and ctx.needs_input_grad[0] else None
        # gradients of the losses' sum, until backward divides them: every pass over a [V, d] counts
        grad_weight = None
        grad_bias = torch.zeros_like(bias) if needs_gradient and bias is not None and bias.requires_grad else None
        apart = -(-weight.shape[0] // ALIGNED) * ALIGNED
        size = max(1, LOGIT_BYTES // (weight.shape[0] * products.element_size()))
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            h_block, t_block = h[start:stop].to(dtype), targets[start:stop]
            logits = _scratch("logits", stop - start, apart, weight, dtype)[:, : weight.shape[0]]
            torch.mm(h_block, products.T, out=logits)
            _reduce(logits, bias, t_block, losses[start:stop], correct[start:stop], needs_gradient)
            if not needs_gradient:
                continue
            # logits now hold the softmax p; the gradient of a row's loss is p - onehot(target)
            if grad_h is not None:
                grad_h[start:stop] = (logits @ back).float() - products[t_block].float()
            if not frozen:
                of_block = (logits.T @ h_block).float()
                grad_weight = of_block if grad_weight is None else grad_weight.add_(of_block)
                grad_weight.index_add_(0, t_block, h_block.float(), alpha=-1)
            if grad_bias is not None:
                grad_bias += logits.float().sum(0)
                grad_bias.index_add_(0, t_block, grad_bias.new_full((stop - start,), -1))
        ctx.rows, ctx.gradients = rows, (grad_h, grad_weight, grad_bias)
        ctx.mark_non_differentiable(losses, correct)
        return losses.mean(), losses, correct

    @staticmethod
    def backward(ctx, grad_mean, _losses, _correct):
        gradients, ctx.gradients = ctx.gradients, None  # used up, as autograd's own buffers are
        if gradients is None:
            raise RuntimeError("linear_cross_entropy was differentiated before: compute the loss again")
        return *(None if g is None else g.mul_(grad_mean / ctx.rows) for g in gradients), None, None, None, None


def _scratch(name: str, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised [rows, columns]. A CPU's is kept from call to call: fresh pages cost a quarter of a product."""
    if like.device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=like.device)
    kept, size = _kept.get((name, dtype)), rows * columns
    if kept is None or kept.numel() < size:
        kept = _kept[name, dtype] = torch.empty(size, dtype=dtype)
    return kept[:size].view(rows, columns)


def _reduce(
    logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, correct: Tensor, softmax: bool
) -> None:
    """Fill `losses` and `correct` from `logits` [R, V], to which `bias` is added in float32.

    The logits are lost; with `softmax`, they hold it afterwards.
    """
    # torch copies what is not contiguous for its softmax: here a few rows at a time
    aside = logits.dtype != torch.float32 or not logits.is_contiguous()
    step = ROWS_IN_CACHE if logits.device.type == "cpu" else logits.shape[0]
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        block = logits[rows]
        if aside:
            block = _scratch("block", *block.shape, logits, torch.float32).copy_(block)
        if bias is not None:
            block += bias
        target = block.gather(1, targets[rows, None])
        largest = block.amax(1, keepdim=True)
        # Equal logits are common in bfloat16: the first of the largest is the prediction, as argmax has it. On a
        # CPU argmax costs 15 times amax, so it looks only at rows whose target is among the largest.
        hits = correct[rows]
        hits.copy_((target == largest)[:, 0])
        if logits.device.type == "cpu":
            hits[hits.clone()] = block[hits].argmax(1) == targets[rows][hits]
        else:
            hits &= block.argmax(1) == targets[rows]
        # One fused pass; log-sum-exp follows from the largest probability, which never underflows (it is at least 1/V).
        torch.softmax(block, 1, out=block)
        losses[rows] = (largest - block.amax(1, keepdim=True).log() - target)[:, 0]
        if aside and softmax:
            logits[rows] = block


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    transposed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of softmax(h · weightᵀ + bias), like `F.cross_entropy` over `F.linear`.

    Args:
        h: float32 [B, d].
        weight: float32 [V, d], or a copy in `dtype` that saves the conversion when it is frozen.
        targets: int64 [B].
        bias: float32 [V] or None.
        dtype: of the matrix products; reductions and results are float32.
        transposed: weightᵀ laid out as [d, V], in `dtype`: a CPU multiplies back through it a tenth faster.

    Returns:
        The mean loss in nats (differentiable), every row's loss [B], and whether its target had the largest logit [B].
    """
    # Inside a Function gradients are always off, so it is told whether they are wanted.
    return _LinearCrossEntropy.apply(h, weight, bias, targets, dtype, transposed, torch.is_grad_enabled())


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = True) -> torch.autocast:
    """Matrix products in `dtype`; nothing is rounded where that is float32. `cache` keeps rounded weights."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)


class Score:
    """The loss of what a model predicts, through a head that is kept ready in the type of the products."""

    def __init__(self, weight: nn.Parameter, bias: Tensor | None, scale: float, dtype: torch.dtype):
        """`weight` [V, d], `bias` [V] or None; `scale` is a factor of the logits, bias apart."""
        frozen = not weight.requires_grad
        self.weight = weight.detach().to(dtype) if frozen else weight
        self.transposed = self.weight.T.contiguous() if frozen and weight.device.type == "cpu" else None
        self.bias, self.scale, self.dtype = bias, scale, dtype

    def __call__(self, h: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of predicting `targets` [B] from `h` [B, d] (mean, per token, correct), as `linear_cross_entropy`.

        `smoothing` is the share of the target that is spread over the vocabulary (Szegedy et al., 2016), in the mean
        alone.
        """
        h = h.float() * self.scale
        mean, losses, correct = linear_cross_entropy(h, self.weight, targets, self.bias, self.dtype, self.transposed)
        if smoothing:
            # Averaged over the vocabulary, -log p exceeds the target's by how far its logit lies above the average one.
            above = (h * (self.weight[targets].float() - self.weight.mean(0, dtype=torch.float32))).sum(1)
            if self.bias is not None:
                above = above + self.bias[targets] - self.bias.mean()
            mean = mean + smoothing * above.mean()
        return mean, losses, correct
