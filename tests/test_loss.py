"""The large-vocabulary cross-entropy against torch's own."""

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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 80),
    vocabulary=st.integers(2, 90),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    block=st.sampled_from([1, 7, 64]),
)
def test_loss_gradients_and_hits_are_torchs(rows, vocabulary, with_bias, seed, scale, block):
    h, weight, bias, targets = problem(rows, 5, vocabulary, seed, scale)
    bias = bias if with_bias else None
    leaves = [x.requires_grad_() for x in (h, weight, bias) if x is not None]
    with pytest.MonkeyPatch.context() as patch:  # several blocks of rows, whatever the size
        patch.setattr(ctxlm.loss, "LOGIT_BYTES", block * vocabulary * 4)
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


def test_a_transposed_copy_changes_nothing_but_rounding():
    h, weight, _, targets = problem(9, 6, 40)
    h.requires_grad_()
    plain = torch.autograd.grad(linear_cross_entropy(h, weight, targets)[0], h)[0]
    fast = linear_cross_entropy(h, weight, targets, transposed=weight.T.contiguous())[0]
    torch.testing.assert_close(torch.autograd.grad(fast, h)[0], plain)


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


def test_a_frozen_weight_gets_no_gradient_and_evaluation_no_graph():
    h, weight, _, targets = problem(10, 8, 30)
    loss, losses, correct = linear_cross_entropy(h.requires_grad_(), weight, targets)
    assert loss.requires_grad and not losses.requires_grad and not correct.requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, targets)[0].requires_grad


def test_equal_logits_predict_the_first_token():
    _, _, correct = linear_cross_entropy(torch.zeros(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 8]))
    assert correct.tolist() == [True, False, False]


def test_evaluation_makes_no_room_for_gradients():
    h, weight, bias, targets = problem(6, 5, 30)
    context = type("Context", (), {"needs_input_grad": (True,) * 7, "mark_non_differentiable": lambda *_: None})()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "zeros_like", lambda *_: pytest.fail("a gradient is made room for"))
        ctxlm.loss._LinearCrossEntropy.forward(
            context, h, weight.requires_grad_(), bias.requires_grad_(), targets, torch.float32, None, False
        )
    assert context.gradients == (None, None, None)
