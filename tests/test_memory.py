"""How far back contexts reach, against contexts made token by token; and what stands in for them in ablations."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from ctxlm.config import Experiment
from ctxlm.memory import RECENT, forgetting, horizon, lyapunov, recent_tokens
from ctxlm.phase2 import Predictor
from ctxlm.recurrence import Ablation, sequential
from tests.conftest import stream, tiny, train_token_block
from tests.test_recurrence import in_chunks


def test_forgetting_is_that_of_two_contexts_run_side_by_side():
    model, tokens = tiny(), stream(120)
    contexts, block = sequential(model, tokens), model.context_block
    left = [row["value"] for row in forgetting(block, contexts, steps=20, starts=5)]
    positions = [0, 25, 50, 74, 99]  # evenly spaced over 0 .. 99, from where 20 tokens can be read
    differences = torch.zeros(21)
    with torch.no_grad():
        for true_at, false_at in zip(positions, positions[-2:] + positions[:-2], strict=True):
            true, false = contexts.values[true_at], contexts.values[false_at]
            for step in range(21):
                if step:
                    projected = block.projections(model.context_inputs(tokens, torch.tensor([true_at + step])))
                    true, false = (block(c.view(1, -1), projected)[-1][0] for c in (true, false))
                differences[step] += (true - false).square().sum()
    assert left == pytest.approx((differences / differences[0]).sqrt().tolist(), rel=1e-3, abs=1e-6)
    assert left[0] == 1 and left[20] < left[1] < 1


def test_the_horizon_lies_between_two_tokens_on_a_logarithmic_scale():
    halving = [0.5**step for step in range(10)]
    assert horizon(halving) == pytest.approx(math.log2(100))
    assert horizon([1, 0.5, 0.4]) is None
    assert horizon([1.0, 0.0]) == 1
    assert horizon([1, 0.005, 0.02, 0.002]) == pytest.approx(math.log(100) / math.log(200))  # the first time counts


@pytest.mark.parametrize("n", [1, 3])
def test_contexts_of_the_last_tokens_are_those_of_a_stream_that_begins_there(n):
    model, tokens = tiny(num_input_tokens=n), stream(90)
    contexts = sequential(model, tokens)
    predict = Predictor(model, torch.float32)
    rows = recent_tokens(model, predict.from_layers, contexts, positions=4)
    values = {(row["step"], row["metric"]): row["value"] for row in rows}
    assert {step for step, _ in values} == {0, *RECENT}
    positions = [64, 72, 80, 88]
    for k in RECENT:
        losses = []
        for t in positions:
            last = sequential(model, tokens[t - k + 1 : t + 1])
            layers = last.layers(model.context_block, torch.arange(k - 1, k))
            losses.append(predict.from_layers(tokens, torch.tensor([t]), layers)[0].item())
        assert values[k, "val_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
        assert values[k, "val_ppl"] == pytest.approx(math.exp(values[k, "val_loss"]))
    whole = [predict(contexts, torch.arange(t, t + 1))[0].item() for t in positions]
    assert values[0, "val_loss"] == pytest.approx(sum(whole) / 4, rel=1e-5)


def test_the_largest_lyapunov_exponent_is_that_of_the_jacobians_multiplied_out():
    model = tiny()
    block, contexts, steps = model.context_block, sequential(model, stream(60)), 6
    grown = []
    for start in (0, 24, 47):
        tangent = torch.nn.functional.normalize(
            (contexts.values[start].roll(1) - contexts.values[start]).double(), dim=0
        )
        for step in range(1, 2 * steps + 1):
            inputs = model.context_inputs(contexts.tokens, torch.tensor([start + step]))
            before = contexts.values[start + step - 1][None]
            last = partial(lambda projected, context: block(context, projected)[-1], block.projections(inputs))
            jacobian = torch.autograd.functional.jacobian(last, before)[0, :, 0].double()
            tangent = jacobian @ tangent
            grown += [tangent.norm().log().item()] * (step > steps)
            tangent = tangent / tangent.norm()
    assert lyapunov(block, contexts, steps=steps, starts=3) == pytest.approx(np.mean(grown), abs=1e-4)


# Ablations


def experiment(ablation, **parameters):
    shape = {"num_layers": 3, "context_dim": 12, "embed_dim": 8}
    return Experiment.from_mapping(shape, {"context_ablation": ablation}, parameters)


def test_zeroed_contexts_alone_leave_a_model_of_its_input_tokens():
    model, tokens = tiny(), stream(50)
    contexts = sequential(model, tokens)
    assert Ablation(model, contexts, experiment("none"))(contexts) is contexts
    zero, settings = Ablation(model, contexts, experiment("zero")), experiment("zero", phase2_epochs=1)
    layers = zero(contexts).layers(model.context_block, torch.arange(10, 20))
    assert len(layers) == 3 and all(layer.shape == (10, 12) and not layer.any() for layer in layers)
    # Equal input tokens, whatever stood before them, then give equal predictions.
    again = torch.cat([stream(7, seed=5), tokens])
    other, predict = zero(sequential(model, again)), Predictor(model, torch.float32)
    torch.testing.assert_close(
        predict(other, torch.arange(17, 27))[1], predict(zero(contexts), torch.arange(10, 20))[1]
    )
    before = [p.clone() for p in model.token_block.from_context.parameters()]
    train_token_block(model, zero(contexts), other, settings)
    for old, new in zip(before, model.token_block.from_context.parameters(), strict=True):
        assert torch.equal(old, new)  # a context of zeros teaches its weights nothing


def test_contexts_of_shuffled_tokens_go_with_the_real_tokens():
    model, tokens = tiny(), stream(60)
    contexts = sequential(model, tokens)
    shuffled, again, other = (
        Ablation(model, contexts, experiment("random_tokens", seed=seed))(contexts) for seed in (42, 42, 43)
    )
    assert torch.equal(shuffled.tokens, tokens)
    assert (shuffled.values - contexts.values).abs().amax(1)[5:].min() > 0.1
    # They are the contexts of some order of the same tokens.
    words = tokens.unique()[shuffled.distinct.index]
    assert torch.equal(words.sort().values, tokens.sort().values)
    torch.testing.assert_close(shuffled.values, sequential(model, words).values, atol=1e-4, rtol=0)
    assert torch.equal(again.values, shuffled.values) and not torch.equal(other.values, shuffled.values)


@pytest.mark.parametrize(("rank", "kept_in"), [(3, None), (12, None), (3, torch.bfloat16)])
def test_a_rank_keeps_the_principal_dimensions_of_the_training_contexts(rank, kept_in):
    model = tiny()
    train, other = (in_chunks(60, model, stream(n, seed=n), keep=kept_in) for n in (300, 90))
    assert (train.inner is None) == (kept_in is None)
    keep = Ablation(model, train, experiment("none", context_rank=rank))
    whole = torch.arange(0, 90)
    for layer, basis, kept in zip(
        other.layers(model.context_block, whole),
        train.layers(model.context_block, torch.arange(0, 300)),
        keep(other).layers(model.context_block, whole),
        strict=True,
    ):
        mean = basis.double().mean(0)
        axes = np.linalg.svd((basis.double() - mean).numpy(), full_matrices=False)[2][:rank]
        expected = mean.numpy() + (layer.double() - mean).numpy() @ axes.T @ axes
        rounded = kept.dtype == torch.bfloat16
        np.testing.assert_allclose(kept.double().numpy(), expected, atol=0.02 if rounded else 2e-5)
        assert rounded or np.linalg.matrix_rank(kept.double().numpy() - mean.numpy(), tol=1e-3) <= rank
    if rank == 12:
        torch.testing.assert_close(keep(other).values, other.values, atol=1e-5, rtol=0)
