"""The large-vocabulary cross-entropy against torch's own."""

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
        patch.setattr(ctxlm.loss, "NARROWEST", tokens)
        yield


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 80),
    vocabulary=st.integers(2, 90),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    tile=st.sampled_from([1, 7, 64]),
)
def test_loss_gradients_and_hits_are_torchs(rows, vocabulary, with_bias, seed, scale, tile):
    h, weight, bias, targets = problem(rows, 5, vocabulary, seed, scale)
    bias = bias if with_bias else None
    leaves = [x.requires_grad_() for x in (h, weight, bias) if x is not None]
    with tiles_of(tile):
        loss, losses, correct = linear_cross_entropy(h, weight, targets, bias)
    found = torch.autograd.grad(3 * loss, leaves)
    logits = F.linear(h, weight, bias)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-4, rtol=1e-5)
    assert torch.equal(correct, logits.argmax(1) == targets)
    for ours, torchs in zip(found, torch.autograd.grad(3 * expected, leaves), strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)


class Anew(torch.autograd.Function):
    """The loss of h, weight and bias, made anew whenever it is differentiated: gradcheck does so more than once."""

    @staticmethod
    def forward(ctx, targets, *leaves):
        ctx.save_for_backward(targets, *leaves)
        return linear_cross_entropy(*leaves[:2], targets, *leaves[2:])[0]

    @staticmethod
    def backward(ctx, outer):
        targets, *leaves = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in leaves]
            loss = linear_cross_entropy(*leaves[:2], targets, *leaves[2:])[0]
        return None, *torch.autograd.grad(loss, leaves, outer)


@pytest.mark.filterwarnings("ignore:Input #")  # gradcheck would have double precision; the reductions are float32
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias):
    h, weight, bias, targets = problem(5, 3, 7)
    leaves = [x.requires_grad_() for x in ((h, weight, bias) if with_bias else (h, weight))]

    assert torch.autograd.gradcheck(
        lambda *leaves: Anew.apply(targets, *leaves), leaves, eps=1e-2, atol=1e-3, rtol=1e-2
    )


def test_a_loss_is_differentiated_once():
    h, weight, bias, targets = problem(5, 3, 7)
    loss, _, _ = linear_cross_entropy(h.requires_grad_(), weight, targets, bias)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_evaluation_multiplies_once(monkeypatch):
    h, weight, bias, targets = problem(9, 6, 40)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        losses = linear_cross_entropy(h, weight.requires_grad_(), targets, bias.requires_grad_())[1]
    assert counter.get_total_flops() == 2 * 9 * 6 * 40
    torch.testing.assert_close(losses, F.cross_entropy(F.linear(h, weight, bias), targets, reduction="none").detach())


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("with_bias", [True, False])
def test_float32_is_near_float64(rows, with_bias):
    """A vocabulary that is no multiple of the tile; gradients of h, the head and the bias."""
    h, weight, bias, targets = problem(rows, 32, 5000)
    leaves = [x.requires_grad_() for x in ((h, weight, bias) if with_bias else (h, weight))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss, losses, _ = linear_cross_entropy(*leaves[:2], targets, *leaves[2:])
    logits = F.linear(*exact)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(logits, targets, reduction="none"), rtol=1e-6, atol=1e-5
    )
    found, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact)
    for ours, torchs in zip(found, expected, strict=True):
        assert (ours.double() - torchs).norm() < 3e-6 * torchs.norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_tiles_change_nothing_but_rounding(frozen):
    h, weight, bias, targets = problem(9, 6, 40)
    leaves = [x.requires_grad_() for x in ((h, bias) if frozen else (h, weight, bias))]
    found = []
    for tile in (40, 7):
        with tiles_of(tile):
            loss, losses, correct = linear_cross_entropy(h, weight, targets, bias)
        found.append((losses, correct, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*found)


def test_no_rows_have_no_loss():
    loss, losses, correct = linear_cross_entropy(torch.zeros(0, 4), torch.ones(9, 4), torch.zeros(0, dtype=torch.int64))
    assert loss.isnan() and losses.shape == correct.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_a_device(dtype):
    """Whatever asks for a value, as .item() and nonzero do, fails without data."""
    h, weight, bias, targets = (x.to("meta") for x in problem(9, 6, 40))
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    with tiles_of(7):
        loss, losses, correct = linear_cross_entropy(h, weight, targets, bias, dtype)
    assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [x.shape for x in leaves]
    assert losses.shape == correct.shape == (9,)


def test_bfloat16_products_stay_near_float32():
    h, weight, _, targets = problem(200, 64, 500)
    h = F.layer_norm(h, (64,)).requires_grad_()
    weight = 0.14 * weight
    exact, rounded = (linear_cross_entropy(h, weight, targets, None, t)[0] for t in (torch.float32, torch.bfloat16))
    assert rounded.item() == pytest.approx(exact.item(), abs=5e-3)
    exact_gradient, gradient = (torch.autograd.grad(loss, h)[0] for loss in (exact, rounded))
    assert (gradient - exact_gradient).norm() < 0.02 * exact_gradient.norm()


def test_large_logits_do_not_overflow():
    h, weight, _, targets = problem(10, 8, 30, scale=1e3)
    loss, losses, _ = linear_cross_entropy(h, weight, targets)
    torch.testing.assert_close(losses, F.cross_entropy(h @ weight.T, targets, reduction="none"), rtol=1e-5, atol=1e-2)
    assert torch.isfinite(loss)


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


def test_a_frozen_weight_gets_no_gradient_and_evaluation_no_graph():
    h, weight, _, targets = problem(10, 8, 30)
    loss, losses, correct = linear_cross_entropy(h.requires_grad_(), weight, targets)
    assert loss.requires_grad and not losses.requires_grad and not correct.requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, targets)[0].requires_grad


def test_equal_logits_predict_the_first_token():
    _, _, correct = linear_cross_entropy(torch.zeros(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 8]))
    assert correct.tolist() == [True, False, False]


@pytest.mark.parametrize("tile", [1, 3, 16, 60, 64])
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


def test_evaluation_makes_no_room_for_gradients():
    h, weight, bias, targets = problem(6, 5, 30)
    context = type("Context", (), {"needs_input_grad": (True,) * 7, "mark_non_differentiable": lambda *_: None})()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("empty_like", "zeros_like", "zeros"):
            patch.setattr(torch, name, lambda *_, **__: pytest.fail("a gradient is made room for"))
        ctxlm.loss._LinearCrossEntropy.forward(
            context, h, weight.requires_grad_(), bias.requires_grad_(), targets, torch.float32, False
        )
    assert context.gradients == (None, None, None)
