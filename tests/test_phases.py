"""What the phases promise beyond the twin: what they change and what they leave, and rounding."""

from copy import deepcopy

import pytest
import torch

from ctxlm.config import Experiment
from ctxlm.metrics import NonFiniteLoss, singular_values
from ctxlm.model import ContextLM
from ctxlm.phase1 import shape_contexts, train_context_block
from ctxlm.recurrence import sequential
from tests.conftest import stream, tiny, train_token_block

SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8}


def prepared(train=200, val=80, **parameters):
    """An experiment, its model, and the contexts of a training and a validation stream."""
    settings = Experiment.from_mapping(SHAPE, {"phase2_batch_size": 32, "phase2_epochs": 4}, parameters)
    model = tiny(
        **SHAPE,
        **{k: v for k, v in parameters.items() if k in ("slow_decay", "output_bias", "phase2_freeze_embedding")},
    )
    return settings, model, *(sequential(model, stream(length, seed=seed)) for seed, length in enumerate((train, val)))


# What changes


def test_a_trained_embedding_is_the_models_own_and_contexts_keep_theirs():
    settings, _, train, val = prepared(phase2_freeze_embedding=False)
    given = 0.1 * torch.randn(60, 8)
    before, model = given.clone(), ContextLM(settings, given)
    for _ in range(2):  # also where a cell is run a second time
        train_token_block(model, train, val, settings)
        assert torch.equal(given, before) and not torch.equal(model.embedding, before)
        assert torch.equal(model.read_embedding, before)


def test_dropout_takes_its_share_of_new_activations_in_training_alone():
    model, draws = tiny(dropout=0.3, **SHAPE), torch.Generator().manual_seed(0)
    block, (u, context) = model.token_block, (torch.randn(4000, width, generator=draws) for width in (16, 12))

    def h(seed, training):
        torch.manual_seed(seed)
        model.train(training)
        with torch.no_grad():
            contexts = model.context_block(context, model.context_block.projections(u))
            return contexts[-1], block(u, contexts)

    (read, one), (again, same), (_, other), (_, plain) = h(1, True), h(1, True), h(2, True), h(1, False)
    assert torch.equal(one, same) and torch.equal(plain, h(2, False)[1])
    assert not torch.equal(one, other) and not torch.equal(one, plain)
    assert torch.equal(read, again)  # the ContextBlock has none
    block.norms[0] = torch.nn.Identity()  # a layer's new activations without residual and norm
    share, nothing = block.from_other[0](u), torch.zeros(4000, 8)
    new, left = (block.train(training).layer(0, context, share, nothing) for training in (False, True))
    assert ((left == 0) | torch.isclose(left, new / 0.7)).all()
    assert (left[new > 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert left.mean().item() == pytest.approx(new.mean().item(), rel=0.02)


def test_the_least_that_can_be_done():
    settings, model, train, val = prepared(train=2, val=2, phase2_epochs=1)
    assert len(train_token_block(model, train, val, settings).val_losses) == 1  # two tokens have one target
    settings, model, train, _ = prepared(phase1_max_iterations=1, phase1_min_iterations=1)
    before = train.values.clone()
    assert train_context_block(model, train.tokens, train.values, settings) == []  # the recurrence alone
    assert torch.equal(train.values, before)


# Rounding


@pytest.mark.parametrize("design", ["constant", "arithmetic"])
def test_phase1_in_bfloat16_rounds_products_only(design):
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4, "design": design})
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(**SHAPE, design=design)
        contexts, before = sequential(model, stream(200)).values, deepcopy(model.context_block.state_dict())
        history = train_context_block(model, stream(200), contexts, settings, dtype)
        moved = torch.cat([(p - before[name]).flatten() for name, p in model.context_block.state_dict().items()])
        losses = [row["value"] for row in history if row["metric"] in ("fixed_point_loss", "diversity_loss")]
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            inputs = model.context_inputs(stream(200), torch.arange(9))
            layers = model.context_block(contexts[:9], model.context_block.projections(inputs))
        assert all(layer.dtype == torch.float32 for layer in layers)
        runs.append((losses, moved))
    (exact, exact_moves), (rounded, rounded_moves) = runs
    assert rounded == pytest.approx(exact, rel=0.05, abs=2e-3) and rounded != exact
    assert (exact_moves - rounded_moves).norm() < 0.4 * exact_moves.norm()  # Adam's steps are of either sign


@pytest.mark.parametrize(("window", "slow"), [(0, 0.0), (8, 0.9)])
def test_bfloat16_products_follow_float32(window, slow):
    means = []
    for dtype in (torch.float32, torch.bfloat16):
        settings, model, train, val = prepared(phase2_epochs=2, phase2_context_window=window, slow_decay=slow)
        means.append(train_token_block(model, train, val, settings, dtype).val_losses.mean().item())
        assert train.values.dtype == torch.float32
    assert means[0] == pytest.approx(means[1], abs=0.02) and means[0] != means[1]


# Phase 1, whole


def test_phase1_is_the_recurrence_and_its_training():
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4})
    model, plain = tiny(**SHAPE), tiny(**SHAPE)
    phase1, contexts = shape_contexts(model, stream(200), settings), sequential(plain, stream(200)).values
    before = contexts.clone()
    expected = train_context_block(plain, stream(200), contexts, settings)
    timeless = [[row for row in history if row["metric"] != "seconds"] for history in (phase1.history, expected)]
    assert timeless[0] == timeless[1] and phase1.iterations == expected[-1]["step"] > 1
    for name, values in {"init_er": before, "train_er": contexts}.items():  # the latter noisy, of the last iteration
        torch.testing.assert_close(phase1.spectra[name], singular_values(values), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_phase1_that_is_no_longer_finite_is_stopped():
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4, "phase1_learning_rate": 1e30})
    with pytest.raises(NonFiniteLoss, match=r"iteration [34]: .*phase1_learning_rate = 1e\+30"):
        shape_contexts(tiny(**SHAPE), stream(200), settings)
