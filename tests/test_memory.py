"""How far back contexts reach, against contexts made token by token; and what stands in for them in ablations."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from ctxlm.config import Experiment
from ctxlm.memory import RECENT, forgetting, horizon, lyapunov, recent_tokens
from ctxlm.phase2 import Predictor, train_token_block
from ctxlm.recurrence import Ablation, sequential
from tests.conftest import stream, tiny


def test_forgetting_is_that_of_two_contexts_run_side_by_side():
    model, tokens = tiny(), stream(120)
    contexts, block = sequential(model, tokens), model.context_block
    found = forgetting(block, contexts, steps=20, starts=5)
    positions = [0, 25, 50, 74, 99]  # evenly spaced over 0 .. 99, from where 20 tokens can be read
    differences = torch.zeros(21)
    with torch.no_grad():
        for true_at, false_at in zip(positions, positions[-2:] + positions[:-2], strict=True):
            true, false = contexts.values[true_at], contexts.values[false_at]
            for step in range(21):
                if step:
                    shares = block.shares(model.context_inputs(tokens, torch.tensor([true_at + step])))
                    true, false = (block(c.view(1, -1), shares)[-1][0] for c in (true, false))
                differences[step] += (true - false).square().sum()
    assert found == pytest.approx((differences / differences[0]).sqrt().tolist(), rel=1e-3, abs=1e-6)
    assert found[0] == 1 and found[20] < found[1] < 1


def test_the_horizon_lies_between_two_tokens_on_a_logarithmic_scale():
    halving = [0.5**step for step in range(10)]
    assert horizon(halving) == pytest.approx(math.log2(100))
    assert horizon(halving, share=0.25) == pytest.approx(2)
    assert horizon([1, 0.5, 0.4]) is None
    assert horizon([1.0, 0.0]) == 1
    assert horizon([1, 0.005, 0.02, 0.002]) == pytest.approx(math.log(100) / math.log(200))  # the first time counts


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_contexts_of_the_last_tokens_are_those_of_a_stream_that_begins_there(n, decay):
    model, tokens = tiny(num_input_tokens=n, slow_decay=decay), stream(90)
    contexts = sequential(model, tokens)
    predict = Predictor(model, torch.float32)
    rows = recent_tokens(model, predict.from_layers, contexts, positions=4)
    found = {(row["step"], row["metric"]): row["value"] for row in rows}
    assert {step for step, _ in found} == {0, *RECENT}
    positions = [64, 72, 80, 88]
    for k in RECENT:
        losses = []
        for t in positions:
            own = sequential(model, tokens[t - k + 1 : t + 1])
            layers = own.layers(model.context_block, slice(k - 1, k))
            slow = predict.with_slow.contexts(own.tokens)[-1:] if decay else None
            losses.append(predict.from_layers(tokens, torch.tensor([t]), layers, slow)[0].item())
        assert found[k, "val_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
        assert found[k, "val_ppl"] == pytest.approx(math.exp(found[k, "val_loss"]))
    whole = [predict(contexts, slice(t, t + 1))[0].item() for t in positions]
    assert found[0, "val_loss"] == pytest.approx(sum(whole) / 4, rel=1e-5)


def test_the_largest_lyapunov_exponent_is_that_of_the_jacobians_multiplied_out():
    model = tiny()
    block, contexts, steps = model.context_block, sequential(model, stream(60)), 6
    found = []
    for start in (0, 24, 47):
        tangent = torch.nn.functional.normalize(
            (contexts.values[start].roll(1) - contexts.values[start]).double(), dim=0
        )
        for step in range(1, 2 * steps + 1):
            inputs = model.context_inputs(contexts.tokens, torch.tensor([start + step]))
            before = contexts.values[start + step - 1][None]
            last = partial(lambda shares, context: block(context, shares)[-1], block.shares(inputs))
            jacobian = torch.autograd.functional.jacobian(last, before)[0, :, 0].double()
            tangent = jacobian @ tangent
            found += [tangent.norm().log().item()] * (step > steps)
            tangent = tangent / tangent.norm()
    assert lyapunov(block, contexts, steps=steps, starts=3) == pytest.approx(np.mean(found), abs=1e-4)


@pytest.mark.parametrize("length", [2, 3, 9])
def test_a_short_stream_shows_what_it_holds(length):
    model = tiny()
    contexts = sequential(model, stream(length))
    rows = recent_tokens(model, Predictor(model, torch.float32).from_layers, contexts)
    assert {row["step"] for row in rows} == ({0} if length > 2 else set()) | {k for k in RECENT if k < length - 1}
    assert len(forgetting(model.context_block, contexts)) == length // 2 + 1
    found = lyapunov(model.context_block, contexts)
    assert found is None if length < 4 else math.isfinite(found)


def experiment(ablation, **parameters):
    return Experiment.from_mapping(
        {"num_layers": 3, "context_dim": 12, "embed_dim": 8, "context_ablation": ablation}, parameters
    )


def test_without_an_ablation_the_contexts_are_the_real_ones():
    model = tiny()
    contexts = sequential(model, stream(50))
    assert Ablation(model, contexts, experiment("none"))(contexts) is contexts


def test_zeroed_contexts_leave_a_model_of_its_input_tokens():
    model, tokens = tiny(), stream(50)
    contexts = sequential(model, tokens)
    zero = Ablation(model, contexts, experiment("zero"))
    zeroed = zero(contexts)
    layers = zeroed.layers(model.context_block, slice(10, 20))
    assert len(layers) == 3 and all(layer.shape == (10, 12) and not layer.any() for layer in layers)
    # Equal input tokens, whatever stood before them, then give equal predictions.
    again = torch.cat([stream(7, seed=5), tokens])
    other = zero(sequential(model, again))
    predict = Predictor(model, torch.float32)
    torch.testing.assert_close(predict(other, slice(17, 27))[1], predict(zeroed, slice(10, 20))[1])


def test_contexts_of_shuffled_tokens_go_with_the_real_tokens():
    model, tokens = tiny(), stream(60)
    contexts = sequential(model, tokens)
    shuffled = Ablation(model, contexts, experiment("random_tokens"))(contexts)
    assert torch.equal(shuffled.tokens, tokens)
    order = [(shuffled.values[i] - contexts.values[i]).abs().max().item() for i in range(60)]
    assert min(order[5:]) > 0.1
    # They are the contexts of some order of the same tokens: every layer follows from the one before.
    places = shuffled.distinct.places(torch.arange(60))[:, -1]
    assert sorted(places.tolist()) == sorted(contexts.distinct.places(torch.arange(60))[:, -1].tolist())
    again = Ablation(model, contexts, experiment("random_tokens"))(contexts)
    other = Ablation(model, contexts, experiment("random_tokens", seed=43))(contexts)
    assert torch.equal(again.values, shuffled.values) and not torch.equal(other.values, shuffled.values)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_a_rank_keeps_the_principal_dimensions_of_the_training_contexts(rank):
    model = tiny()
    train, other = (sequential(model, stream(n, seed=n)) for n in (300, 90))
    keep = Ablation(model, train, experiment("none", context_rank=rank))
    whole = slice(0, 90)
    for layer, basis, found in zip(
        other.layers(model.context_block, whole),
        train.layers(model.context_block, slice(0, 300)),
        keep(other).layers(model.context_block, whole),
        strict=True,
    ):
        mean = basis.double().mean(0)
        axes = np.linalg.svd((basis.double() - mean).numpy(), full_matrices=False)[2][:rank]
        expected = mean.numpy() + (layer.double() - mean).numpy() @ axes.T @ axes
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
        assert np.linalg.matrix_rank(found.double().numpy() - mean.numpy(), tol=1e-3) <= rank
    if rank == 12:
        torch.testing.assert_close(keep(other).values, other.values, atol=1e-5, rtol=0)


def test_an_ablated_model_can_be_trained():
    settings = experiment("zero", phase2_epochs=1, phase2_batch_size=32)
    model = tiny()
    train, val = (sequential(model, stream(n, seed=n)) for n in (200, 80))
    train, val = (Ablation(model, train, settings)(contexts) for contexts in (train, val))
    before = [p.clone() for p in model.token_block.from_context.parameters()]
    train_token_block(model, train, val, settings)
    for old, new in zip(before, model.token_block.from_context.parameters(), strict=True):
        assert torch.equal(old, new)  # a context of zeros teaches its weights nothing
