"""What the phases promise beyond the twin: what they change and what they leave, and rounding."""

import pytest
import torch

from ctxlm.config import Experiment
from ctxlm.device import autocast
from ctxlm.metrics import NonFiniteLoss, singular_values
from ctxlm.model import ContextLM
from ctxlm.phase1 import shape_contexts, train_context_block
from ctxlm.phase2 import Phase2
from ctxlm.recurrence import sequential
from tests.conftest import stream, tiny, train_token_block

SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8}


def prepared(train=200, val=80, **parameters):
    """An experiment, its model, and the contexts of a training and a validation stream."""
    settings = Experiment.from_mapping(SHAPE, {"phase2_batch_size": 32, "phase2_epochs": 4}, parameters)
    model = tiny(**SHAPE, **parameters)
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


# Rounding


@pytest.mark.parametrize("design", ["constant", "arithmetic"])
def test_bfloat16_rounds_products_only(design):
    """In both phases; means would not show what else is rounded, bits do."""
    runs, at = [], torch.arange(32)
    for dtype in (torch.float32, torch.bfloat16):
        settings, model, train, val = prepared(phase1_max_iterations=4, phase2_context_window=8, design=design)
        contexts, task = train.values.clone(), Phase2(model, train, val, settings, dtype)
        judged, losses, values = task.predict(train, at)[1], task.loss(at)[1], train.values[:32].clone()
        train_context_block(model, train.tokens, contexts, settings, dtype)
        with autocast(at.device, dtype):
            layers = train.unrolled(model, at, 8)
        runs.append((judged, losses, values, contexts, *layers))
    for exact, rounded in zip(*runs, strict=True):
        assert not torch.equal(exact, rounded) and not torch.equal(rounded, rounded.bfloat16().float())
        assert (rounded - exact).norm() < 0.05 * exact.norm()


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
