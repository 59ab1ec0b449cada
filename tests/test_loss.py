"""The large-vocabulary cross-entropy against torch's own."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ctxlm.loss
from ctxlm.loss import linear_cross_entropy


def problem(rows, width, vocabulary, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(rows, width, generator=draw)
    weight, bias = torch.randn(vocabulary, width, generator=draw), torch.randn(vocabulary, generator=draw)
    return h, weight, bias, torch.randint(0, vocabulary, (rows,), generator=draw)


@contextmanager
def tiles_of(tokens):
    """Several tiles, whatever the number of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctxlm.loss, "TILE", 1)
        patch.setattr(ctxlm.loss, "MIN_TILE", tokens)
        yield


@settings(max_examples=40)
@given(
    rows=st.integers(1, 80),
    vocabulary=st.integers(2, 90),
    with_bias=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    tile=st.sampled_from([1, 7, 64]),
)
def test_loss_gradients_and_hits_are_torchs(rows, vocabulary, with_bias, frozen, seed, scale, tile):
    h, weight, bias, targets = problem(rows, 5, vocabulary, seed, scale)
    bias = bias if with_bias else None
    leaves = [x.requires_grad_() for x in (h, None if frozen else weight, bias) if x is not None]
    with tiles_of(tile):
        loss, losses, correct = linear_cross_entropy(h, weight, targets, bias)
    assert not losses.requires_grad and not correct.requires_grad
    gradients = torch.autograd.grad(3 * loss, leaves)
    logits = F.linear(h, weight, bias)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-4, rtol=1e-5)
    assert torch.equal(correct, logits.argmax(1) == targets)
    for ours, torchs in zip(gradients, torch.autograd.grad(3 * expected, leaves), strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)


def test_evaluation_multiplies_once():
    h, weight, bias, targets = problem(9, 6, 40)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, losses, _ = linear_cross_entropy(h, weight.requires_grad_(), targets, bias.requires_grad_())
    assert counter.get_total_flops() == 2 * 9 * 6 * 40 and not loss.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(F.linear(h, weight, bias), targets, reduction="none").detach())


def test_threads_do_not_write_over_each_others_logits():
    def losses(seed):
        h, weight, bias, targets = problem(300, 16, 9000, seed)
        with torch.no_grad():
            return [linear_cross_entropy(h, weight, targets, bias)[0].item() for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        side_by_side = [*pool.map(losses, (1, 2))]
    assert side_by_side == [losses(1), losses(2)]


def test_no_rows_have_no_loss():
    loss, losses, correct = linear_cross_entropy(torch.zeros(0, 4), torch.ones(9, 4), torch.zeros(0, dtype=torch.int64))
    assert loss.isnan() and losses.shape == correct.shape == (0,)


@pytest.mark.parametrize("tile", [40, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand(tile, dtype):
    """Tiles far below the largest weigh nothing, and none divides by zero."""
    weight = torch.eye(40, 8)
    weight[35:] = weight[0]
    h = torch.zeros(3, 8)
    h[0, 0], h[1, 0], h[2, 1] = 1e4, -1e4, 1e4
    targets = torch.tensor([0, 1, 0])
    with tiles_of(tile):
        loss, losses, correct = linear_cross_entropy(h.requires_grad_(), weight.requires_grad_(), targets, dtype=dtype)
    logits = (h @ weight.T).to(dtype).float()
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(correct, logits.argmax(1) == targets)
    for ours, torchs in zip(
        torch.autograd.grad(loss, (h, weight)),
        torch.autograd.grad(F.cross_entropy(h @ weight.T, targets), (h, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("tile", [1, 16, 64])
def test_equal_logits_of_several_tiles_predict_the_first_token(tile):
    """In bfloat16, where small integers are exact, and nearly every row's largest logit is there several times."""
    draw = torch.Generator().manual_seed(0)
    h, weight = (torch.randint(-1, 2, (n, 3), generator=draw).float() for n in (400, 60))
    largest = h @ weight.T
    ties = largest == largest.amax(1, keepdim=True)
    assert (ties.sum(1) > 1).float().mean() > 0.9
    for targets in (largest.argmax(1), ties.float().multinomial(1, generator=draw)[:, 0]):
        with tiles_of(tile):
            correct = linear_cross_entropy(h, weight, targets, dtype=torch.bfloat16)[2]
        assert torch.equal(correct, largest.argmax(1) == targets)
