"""What the phases promise beyond the twin: what they change and what they leave, rounding, and Phase 1's cache."""

import pytest
import torch
import torch.nn.functional as F

from ctxlm.config import Experiment
from ctxlm.metrics import NonFiniteLoss
from ctxlm.model import ContextLM, load_own_weights, own_weights
from ctxlm.phase1 import shape_contexts, train_context_block
from ctxlm.phase2 import Predictor, evaluate, train_token_block
from ctxlm.recurrence import chunked, sequential
from tests.conftest import stream, tiny

SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8}


def prepared(train=200, val=80, **parameters):
    settings = Experiment.from_mapping(SHAPE, {"phase2_batch_size": 32, "phase2_epochs": 4}, parameters)
    model = tiny(**SHAPE, **{k: v for k, v in parameters.items() if k.startswith(("use_", "slow_"))})
    tokens, val_tokens = stream(train), stream(val, seed=1)
    return (
        settings,
        model,
        sequential(model, tokens),
        sequential(model, val_tokens),
    )


def values(phase, metric):
    return [row["value"] for row in phase.history if row["phase"] == "phase2" and row["metric"] == metric]


def test_evaluation_reads_every_target_whatever_the_batch():
    _, model, _, val = prepared(val=83)
    predict = Predictor(model, torch.float32)
    whole, accuracy = evaluate(predict, val)
    parts, again = evaluate(predict, val, batch_size=7)
    assert len(whole) == len(parts) == 82 and again == accuracy
    torch.testing.assert_close(parts, whole)


def test_phase2_learns_from_kept_layers_as_from_recomputed_ones():
    def losses(keep):
        settings, model, _, val = prepared()
        with torch.no_grad():  # strong inputs: the block forgets within a chunk
            for linear in model.context_block.from_other:
                linear.weight *= 5
        train = chunked(model, stream(400), chunk_length=80, keep=keep)
        assert (train.inner is None) == (keep is None)
        return values(train_token_block(model, train, sequential(model, val.tokens), settings), "val_loss")

    assert losses(torch.float32) == pytest.approx(losses(None), rel=1e-4)


def test_a_trained_embedding_is_the_models_own():
    settings, _, train, val = prepared(phase2_freeze_embedding=False)
    given = 0.1 * torch.randn(60, 8)
    before = given.clone()
    model = ContextLM(settings, given)
    train_token_block(model, train, val, settings)
    assert torch.equal(given, before) and not torch.equal(model.embedding, before)


def test_training_on_keeps_the_embedding_that_contexts_read():
    settings, model, train, val = prepared(phase2_freeze_embedding=False)
    before = model.embedding.detach().clone()
    for _ in range(2):
        train_token_block(model, train, val, settings)
    assert torch.equal(model.context_embedding, before)


@pytest.mark.parametrize("design", ["constant", "arithmetic"])
def test_phase1_in_bfloat16_rounds_products_only(design):
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4, "design": design})
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(**SHAPE, design=design)
        contexts = sequential(model, stream(200)).values
        start = {name: p.clone() for name, p in model.context_block.state_dict().items()}
        phase1 = train_context_block(model, stream(200), contexts, settings, dtype)
        moved = {name: p - start[name] for name, p in model.context_block.state_dict().items()}
        losses = [row["value"] for row in phase1.history if row["metric"] in ("fixed_point_loss", "diversity_loss")]
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            inputs = model.context_inputs(stream(200), torch.arange(9))
            layers = model.context_block(contexts[:9], model.context_block.shares(inputs))
        assert all(layer.dtype == torch.float32 for layer in layers)
        found[dtype] = losses, moved
    (exact, exact_moves), (rounded, rounded_moves) = found.values()
    assert rounded == pytest.approx(exact, rel=0.05, abs=2e-3)
    exact, rounded = (torch.cat([m.flatten() for m in moves.values()]) for moves in (exact_moves, rounded_moves))
    assert (exact - rounded).norm() < 0.4 * exact.norm()  # Adam takes full steps on gradients of either sign


@pytest.mark.parametrize("window", [8, 256])  # the second holds the whole stream
def test_contexts_that_are_out_of_date_or_in_a_file_are_made_anew(window, monkeypatch):
    """Training goes on where it ended, whatever the stream still holds."""

    def losses(spoil):
        settings, model, train, val = prepared(phase2_context_window=window, phase2_batch_size=256)
        for _ in range(2):
            if spoil:
                train.values.fill_(9)
            phase2 = train_token_block(model, train, val, settings)
        return phase2.val_losses

    expected = losses(spoil=False)
    monkeypatch.setattr("ctxlm.recurrence.IN_MEMORY", 0)
    torch.testing.assert_close(losses(spoil=True), expected)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("window", "slow"), [(0, 0.0), (8, 0.0), (0, 0.9)])
def test_contexts_made_after_phase2_are_those_it_was_trained_on(frozen, window, slow):
    own = {"phase2_freeze_embedding": frozen, "phase2_context_window": window, "slow_decay": slow}
    settings, model, train, val = prepared(**own)
    before = model.embedding.clone()
    phase2 = train_token_block(model, train, val, settings)
    assert torch.equal(model.embedding, before) == frozen
    new = ContextLM(settings, before.clone())
    load_own_weights(new, own_weights(model))
    for again, expected in zip(new.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(again, expected)
    if slow:  # made from the embedding before training, whatever became of it
        s, rows = torch.zeros(before.shape[1]), []
        for token in val.tokens:
            row = F.layer_norm(before[token], before.shape[1:])
            s = slow * s + model.slow.weights[token] * row
            rows.append(s)
        found = Predictor(new, torch.float32).with_slow.contexts(val.tokens)
        torch.testing.assert_close(found, torch.stack(rows))
    losses, _ = evaluate(Predictor(new, torch.float32), sequential(new, val.tokens))
    torch.testing.assert_close(losses, phase2.val_losses)
    again, _ = evaluate(Predictor(model, torch.float32), sequential(model, val.tokens))
    torch.testing.assert_close(again, phase2.val_losses)
    assert ("context_embedding" in own_weights(model)) == (not frozen)


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


def test_a_loss_that_is_not_finite_stops_phase1():
    settings, model, train, _ = prepared()
    with torch.no_grad():
        model.context_block.norms[-1].weight[0] = float("inf")
    with pytest.raises(NonFiniteLoss, match=r"at iteration 2: lower phase1_learning_rate = 0\.002"):
        train_context_block(model, train.tokens, train.values, settings)


@pytest.mark.parametrize(("window", "slow"), [(0, 0.0), (8, 0.9)])
def test_bfloat16_products_follow_float32(window, slow):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        settings, model, train, val = prepared(phase2_epochs=2, phase2_context_window=window, slow_decay=slow)
        results.append(train_token_block(model, train, val, settings, dtype))
        assert train.values.dtype == torch.float32
    exact, rounded = (phase2.val_losses.mean().item() for phase2 in results)
    assert rounded == pytest.approx(exact, abs=0.02)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shaped(tokens=None, embedding_scale=1.0, dtype=torch.float32, **parameters):
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4}, parameters)
    model = tiny(**SHAPE, **{k: v for k, v in parameters.items() if k == "seed"})
    with torch.no_grad():  # scaled and bent, since a mere scale is lost in LayerNorm
        model.embedding.copy_(model.embedding * embedding_scale + (embedding_scale - 1) * model.embedding**2)
    return model, shape_contexts(model, stream(200) if tokens is None else tokens, settings, dtype)


def test_phase1_is_computed_once_for_runs_that_differ_in_phase2(empty_cache):
    model, first = shaped()
    plain, contexts = tiny(**SHAPE), sequential(tiny(**SHAPE), stream(200)).values
    expected = train_context_block(
        plain, stream(200), contexts, Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4})
    )
    again, second = shaped(phase2_learning_rate=0.5, phase2_batch_size=7, val_samples=3, experiment="other")
    assert (first.cached, second.cached) == (False, True)
    timeless = [[row for row in phase1.history if row["metric"] != "seconds"] for phase1 in (first.phase1, expected)]
    assert timeless[0] == timeless[1] and first.phase1.iterations == expected.iterations
    assert second.phase1 == first.phase1 and second.computed_seconds == first.computed_seconds
    assert second.summary() == first.summary() | {"phase1_cached": True}
    for name in ("init_er", "train_er"):
        assert torch.equal(first.spectra[name], second.spectra[name])
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
        assert torch.equal(weight, plain.state_dict()[name]), name


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 7},
        {"phase1_learning_rate": 0.01},
        {"phase1_context_noise": 0.2},
        {"dist_reg_weight": 0.4},
        {"tokens": stream(200, seed=5)},
        {"tokens": stream(199)},
        {"embedding_scale": 1.5},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_another_phase1_is_not_taken_from_the_cache(empty_cache, other):
    shaped()
    assert not shaped(**other)[1].cached


def test_a_damaged_phase1_is_computed_again(empty_cache):
    model, first = shaped()
    (path,) = empty_cache.iterdir()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(byte ^ 1 for byte in content[middle : middle + 200])
    path.write_bytes(content)
    again, second = shaped()
    assert not second.cached and second.phase1.iterations == first.phase1.iterations
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    assert shaped()[1].cached


def test_a_block_that_was_already_shaped_is_another_phase1(empty_cache):
    model, _ = shaped()
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4, "phase1_learning_rate": 0.01})
    assert not shape_contexts(model, stream(200), settings).cached  # goes on from trained weights
    fresh, found = shaped(phase1_learning_rate=0.01)
    assert not found.cached and not torch.equal(
        fresh.context_block.from_context[0].weight, model.context_block.from_context[0].weight
    )


def test_a_phase1_that_failed_is_not_kept(empty_cache, monkeypatch):
    def fail(*_):
        raise NonFiniteLoss("no")

    monkeypatch.setattr("ctxlm.phase1.train_context_block", fail)
    with pytest.raises(NonFiniteLoss):
        shaped()
    assert not any(empty_cache.iterdir())
