"""What the trainers promise beyond the twin: best weights kept, faults named, side results independent."""

import math

import pytest
import torch

from ctxlm.config import Experiment
from ctxlm.phase1 import NonFiniteLoss, train_context_block
from ctxlm.phase2 import Predictor, evaluate, train_token_block
from ctxlm.recurrence import sequential
from tests.conftest import stream, tiny

SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8}


def prepared(train=200, val=80, **parameters):
    settings = Experiment.from_mapping(SHAPE, {"phase2_batch_size": 32, "phase2_epochs": 4}, parameters)
    model = tiny(**SHAPE, **{k: v for k, v in parameters.items() if k.startswith("use_")})
    tokens, val_tokens = stream(train), stream(val, seed=1)
    return (
        settings,
        model,
        sequential(model, tokens),
        sequential(model, val_tokens),
    )


def values(phase, metric):
    return [row["value"] for row in phase.history if row["phase"] == "phase2" and row["metric"] == metric]


def test_the_best_epochs_weights_and_losses_are_kept():
    # Random tokens cannot be learnt, so validation gets worse from the first epoch on.
    settings, model, train, val = prepared(phase2_learning_rate=0.05)
    phase2 = train_token_block(model, train, val, settings)
    losses = values(phase2, "val_loss")
    assert phase2.best_epoch == 1 + losses.index(min(losses)) < phase2.epochs_run
    assert phase2.epochs_run == min(phase2.best_epoch + settings.phase2_patience, settings.phase2_epochs)
    again, accuracy = evaluate(Predictor(model, torch.float32), val)
    torch.testing.assert_close(again, phase2.val_losses)
    assert again.double().mean().item() == pytest.approx(min(losses)) and accuracy == phase2.val_accuracy
    summary = phase2.summary()
    assert summary["last_val_ppl"] == pytest.approx(math.exp(losses[-1]))
    assert summary["overfit_rate"] == pytest.approx(math.exp(losses[-1] - min(losses)) - 1)


def test_validating_between_epochs_changes_nothing_else():
    settings, model, train, val = prepared()
    often = Experiment.from_mapping(settings.model_dump(), {"val_every_steps": 3})
    plain = train_token_block(model, train, val, settings)
    _, model, train, val = prepared()
    watched = train_token_block(model, train, val, often)
    updates = [row for row in watched.history if row["phase"] == "phase2_updates"]
    assert [row["step"] for row in updates[:3]] == [3, 6, 9]
    per_epoch = math.ceil(199 / 32)
    assert len(updates) == watched.epochs_run * per_epoch // 3
    for metric in ("train_loss", "val_loss"):
        assert values(watched, metric) == pytest.approx(values(plain, metric), rel=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_contexts_made_after_phase2_are_those_it_was_trained_on(frozen):
    settings, model, train, val = prepared(phase2_freeze_embedding=frozen)
    before = model.embedding.clone()
    phase2 = train_token_block(model, train, val, settings)
    assert torch.equal(model.embedding, before) == frozen
    again, _ = evaluate(Predictor(model, torch.float32), sequential(model, val.tokens))
    torch.testing.assert_close(again, phase2.val_losses)
    assert ("context_embedding" in model.weights()) == (not frozen)


def test_the_context_block_and_a_frozen_embedding_do_not_change_in_phase2():
    settings, model, train, val = prepared()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    train_token_block(model, train, val, settings)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("token_block") for name in changed)


def test_phase1_changes_the_context_block_alone():
    settings, model, train, _ = prepared()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    train_context_block(model, train.tokens, train.values, settings)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("context_block") for name in changed)


def test_one_iteration_of_phase1_is_the_recurrence_alone():
    settings, model, train, _ = prepared(phase1_max_iterations=1, phase1_min_iterations=1)
    before = train.values.clone()
    phase1 = train_context_block(model, train.tokens, train.values, settings)
    assert (phase1.iterations, phase1.converged_tokens, phase1.history) == (1, 0, [])
    assert torch.equal(train.values, before)


def test_a_stream_of_two_tokens_has_one_target():
    settings, model, train, val = prepared(train=2, val=2, phase2_epochs=1)
    assert len(train_token_block(model, train, val, settings).val_losses) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_phase2_at_once():
    settings, model, train, val = prepared()
    with torch.no_grad():
        model.token_block.norms[-1].weight[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"in epoch 1 by update 1: lower phase2_learning_rate = 0\.002"):
        train_token_block(model, train, val, settings)


def test_a_loss_that_is_not_finite_stops_phase1():
    settings, model, train, _ = prepared()
    with torch.no_grad():
        model.context_block.norms[-1].weight[0] = float("inf")
    with pytest.raises(NonFiniteLoss, match=r"at iteration 2: lower phase1_learning_rate = 0\.002"):
        train_context_block(model, train.tokens, train.values, settings)


def test_bfloat16_products_follow_float32():
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        settings, model, train, val = prepared(phase2_epochs=2)
        results.append(train_token_block(model, train, val, settings, dtype))
    exact, rounded = (phase2.val_losses.mean().item() for phase2 in results)
    assert rounded == pytest.approx(exact, abs=0.02)
