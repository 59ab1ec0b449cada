"""Both phases step by step against the literal, token-by-token twin."""

import pytest
import torch

import ctxlm.loss
from ctxlm.config import Experiment
from ctxlm.device import generator
from ctxlm.phase1 import train_context_block
from ctxlm.recurrence import sequential
from tests import literal
from tests.conftest import stream, tiny, train_token_block

SHAPES = [
    {"num_layers": 3, "context_dim": 12, "num_input_tokens": 2},
    {"num_layers": 1, "context_dim": 20, "num_input_tokens": 1, "phase1_gradient_clip": 1e-2},
    {"num_layers": 2, "context_dim": 8, "num_input_tokens": 3, "phase2_gradient_clip": 1e-2},
    {"num_layers": 3, "context_dim": 12, "num_input_tokens": 2, "design": "arithmetic"},
    {"num_layers": 2, "context_dim": 9, "num_input_tokens": 1, "design": "arithmetic"},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_contexts_are_the_twins(shape):
    model, tokens = tiny(**shape), stream(50)
    twin = literal.run_contexts(literal.copied(model), tokens.tolist(), shape["num_input_tokens"])
    ours = sequential(model, tokens)
    torch.testing.assert_close(ours.values, torch.stack([outputs[-1] for outputs in twin]), atol=5e-5, rtol=0)
    for layer, expected in zip(ours.layers(model.context_block, torch.arange(7, 8)), twin[7], strict=True):
        torch.testing.assert_close(layer[0], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_phase1_is_the_twins(shape, noise):
    settings = Experiment.from_mapping(
        {"embed_dim": 8, "phase1_batch_size": 32, "phase1_max_iterations": 6, "phase1_min_converged_ratio": 1.0},
        {"phase1_context_noise": noise, "phase1_convergence_threshold": 0.2},
        shape,
    )
    model, tokens = tiny(**shape), stream(70)
    weights = literal.copied(model)

    def draws(iteration, block, shape):
        return torch.randn(shape, generator=generator(settings.seed, "phase1_noise", iteration, block))

    values = settings.model_dump()
    twin, twin_contexts = literal.phase1(weights, tokens.tolist(), shape["num_input_tokens"], values, draws)
    contexts = sequential(model, tokens).values
    history = train_context_block(model, tokens, contexts, settings)
    assert history[-1]["step"] == twin[-1]["iteration"]
    for record in twin:
        values = {row["metric"]: row["value"] for row in history if row["step"] == record["iteration"]}
        for name in ("fixed_point_loss", "diversity_loss", "converged_tokens", "converged_ratio"):
            assert values[name] == pytest.approx(record[name], rel=1e-4, abs=1e-6), (name, record["iteration"])
    torch.testing.assert_close(contexts, twin_contexts, atol=2e-4, rtol=0)
    for layer, expected in zip(literal.copied(model).context_layers, weights.context_layers, strict=True):
        torch.testing.assert_close(layer, expected, atol=2e-4, rtol=0)


def test_phase1_stops_as_soon_as_enough_tokens_converged():
    def ratios(**parameters):
        settings = Experiment.from_mapping({"embed_dim": 8, "context_dim": 12, "num_layers": 3}, parameters)
        model, tokens = tiny(), stream(300)
        history = train_context_block(model, tokens, sequential(model, tokens).values, settings)
        return {row["step"]: row["value"] for row in history if row["metric"] == "converged_ratio"}

    whole = ratios(phase1_min_converged_ratio=1.0)
    for least in (3, 7):
        for wanted in (whole[5], whole[9], 1.0):
            last = min([step for step in whole if step >= least and whole[step] >= wanted], default=10)
            parameters = {"phase1_min_iterations": least, "phase1_min_converged_ratio": wanted}
            assert ratios(**parameters) == {step: ratio for step, ratio in whole.items() if step <= last}


BEYOND = {"output_bias": "unigram", "logit_scale": 0.5, "weight_decay": 2.0}
"""What the study does not have."""


FROZEN, TRAINED, RECURRENT, WINDOWED = (True, 0), (False, 0), (False, 1), (True, 8)
"""Whether the embedding is frozen, and the tokens that contexts are trained through."""


@pytest.mark.parametrize(
    ("shape", "trains"),
    [
        *((SHAPES[0], trains) for trains in (FROZEN, RECURRENT)),
        *((SHAPES[1], trains) for trains in (TRAINED, WINDOWED)),
        *((SHAPES[2], trains) for trains in (FROZEN, WINDOWED)),
        *((SHAPES[3], trains) for trains in (TRAINED, WINDOWED)),
        *((SHAPES[4], trains) for trains in (FROZEN, RECURRENT)),
        *((SHAPES[0] | BEYOND, trains) for trains in (TRAINED, RECURRENT)),
        *((SHAPES[0] | {"phase2_shuffle": True}, trains) for trains in (FROZEN, TRAINED)),
    ],
)
def test_phase2_is_the_twins(shape, trains):
    """Every update, epoch and weight."""
    frozen, window = trains
    # through a ContextBlock that trains, 0.01 makes rounding grow until the twin's float32 and float64 part ways
    settings = Experiment.from_mapping(
        {"embed_dim": 8, "phase2_batch_size": 16, "phase2_epochs": 3, "phase2_patience": 1},
        {"phase2_freeze_embedding": frozen, "phase2_context_window": window},
        {"phase2_learning_rate": 0.003 if window else 0.01},
        shape,
    )
    model = tiny(**shape, phase2_freeze_embedding=frozen)
    train, val = stream(70), stream(40, seed=1)
    weights = literal.copied(model)
    n, values = shape["num_input_tokens"], settings.model_dump()

    def order(epoch):
        return torch.randperm(69, generator=generator(42, "phase2_order", epoch)).tolist()

    twin = literal.phase2(weights, train.tolist(), val.tolist(), n, values, order)

    steps, ours_loss = [], ctxlm.loss.linear_cross_entropy

    def spy(*arguments):
        result = ours_loss(*arguments)
        if torch.is_grad_enabled():
            steps.append(result[0].item())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctxlm.loss, "linear_cross_entropy", spy)
        ours = train_token_block(model, sequential(model, train), sequential(model, val), settings)
    assert steps == pytest.approx(twin["steps"], rel=1e-4)
    assert (ours.best_epoch, ours.epochs_run) == (twin["best_epoch"], len(twin["epochs"]))
    torch.testing.assert_close(ours.val_losses, twin["val_losses"], atol=1e-3, rtol=1e-4)
    for epoch, record in enumerate(twin["epochs"], start=1):
        values = {row["metric"]: row["value"] for row in ours.history if row["step"] == epoch}
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert values[name] == pytest.approx(record[name], rel=1e-4), (name, epoch)
    copied = literal.copied(model)
    pairs = [*zip(copied.token_layers, weights.token_layers, strict=True)]
    for layer, expected in [*pairs, *zip(copied.context_layers, weights.context_layers, strict=True)]:
        torch.testing.assert_close(layer, expected, atol=1e-3, rtol=0)
