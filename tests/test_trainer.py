"""The one trainer: the best state kept, validated when asked, stopped and gone on with to the same bits, faults."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ctxlm.config import Experiment
from ctxlm.metrics import NonFiniteLoss
from ctxlm.model import ContextLM
from ctxlm.networks import NeuralLM, Windows
from ctxlm.phase2 import Phase2
from ctxlm.recurrence import sequential
from ctxlm.trainer import Trainer
from tests.conftest import stream

VOCABULARY = 40
COMMON = {"embed_dim": 8, "num_layers": 2, "phase2_batch_size": 32, "phase2_epochs": 4, "phase2_patience": 4}
EVERYTHING = {"output_bias": "unigram", "phase2_freeze_embedding": False}
EVERYTHING |= {"dropout": 0.2, "weight_decay": 0.3}
KINDS = {
    "study": {"context_dim": 12},
    "windows": {"context_dim": 12, "phase2_context_window": 8, "validations_per_epoch": 2},
    "tuned": EVERYTHING | {"context_dim": 12, "num_input_tokens": 1, "phase2_context_window": 1},
    "lstm": EVERYTHING | {"model": "lstm", "hidden_dim": 12, "window": 8, "validations_per_epoch": 3},
    "transformer": EVERYTHING | {"model": "transformer", "hidden_dim": 16, "num_heads": 4, "window": 8},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def trainer(kind, **parameters):
    """A new trainer of a new model of one of `KINDS`."""
    e = Experiment.from_mapping(COMMON, KINDS[kind], parameters)
    embedding = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(3))
    train, val = stream(200, VOCABULARY), stream(80, VOCABULARY, seed=1)
    if e.model != "context":
        return Trainer(Windows(NeuralLM(e, embedding), train, val, e, torch.float32), e)
    model = ContextLM(e, embedding)
    return Trainer(Phase2(model, sequential(model, train), sequential(model, val), e, torch.float32), e)


@cache
def whole(kind):
    """A trainer of one of `KINDS`, and what it gives when nothing comes between."""
    one = trainer(kind)
    return one, one.run()


def values(trained, metric):
    return [row["value"] for row in trained.history if row["metric"] == metric]


def assert_same(one, trained, other, expected):
    """Two trainings have left the same bits, in history, losses and weights."""
    rows, others = ([row for row in t.history if row["metric"] != "seconds"] for t in (trained, expected))
    assert rows == others != []
    assert torch.equal(trained.val_losses, expected.val_losses)
    for name in ("best_epoch", "epochs_run", "val_accuracy", "last_val_loss"):
        assert getattr(trained, name) == getattr(expected, name)
    weights, others = one.task.model.state_dict(), other.task.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# Stopped, and gone on with


@each_kind
def test_a_killed_training_goes_on_from_its_file_to_the_same_bits(kind, tmp_path):
    """Nothing but the seed and what is in the file decides."""
    (one, expected), checkpoint = whole(kind), tmp_path / "checkpoint.pt"

    def killed_in_epoch(epoch):
        def on_epoch(history):
            if history[-1]["step"] == epoch * one.e.validations_per_epoch:
                raise KeyboardInterrupt

        return on_epoch

    for epoch in (1, 2, 4):  # each process does less or more than the one before
        with pytest.raises(KeyboardInterrupt):
            trainer(kind).run(killed_in_epoch(epoch), checkpoint, "key")
        assert checkpoint.exists() == (epoch > 1) and len([*tmp_path.iterdir()]) == (epoch > 1)
    fresh = trainer(kind)
    torch.manual_seed(9)  # torch's own generator has no part in it
    before = torch.random.get_rng_state()
    trained = fresh.run(None, checkpoint, "key")
    assert torch.equal(before, torch.random.get_rng_state())  # nor is a draw of another's shifted
    assert fresh.updates == one.updates
    assert_same(fresh, trained, one, expected)
    assert trained.resumed == trained.summary()["resumed_after_epoch"] == 3
    assert expected.resumed == 0 and "resumed_after_epoch" not in expected.summary()


def test_a_state_of_another_key_is_begun_anew_and_replaced(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    for key, resumed in (("key", 0), ("another key", 0), ("another key", 4)):
        one = trainer("study")
        trained = one.run(None, checkpoint, key)
        assert trained.resumed == resumed
        assert_same(one, trained, *whole("study"))


def test_a_training_that_is_stopped_within_an_epoch_is_not_gone_on_with_from_there(tmp_path):
    checkpoint, one = tmp_path / "checkpoint.pt", trainer("windows")
    assert trainer("windows").run(lambda history: True, checkpoint, "key").epochs_run == 0.5
    assert_same(one, one.run(None, checkpoint, "key"), *whole("windows"))


# What is kept


@each_kind
def test_the_best_states_weights_and_losses_are_kept(kind):
    # Random tokens cannot be learnt, so validation soon gets worse.
    one = trainer(kind, phase2_learning_rate=0.05, phase2_patience=2, phase2_epochs=8)
    trained, parts = one.run(), one.e.validations_per_epoch
    losses = values(trained, "val_loss")
    assert trained.best_epoch == (1 + losses.index(min(losses))) / parts < trained.epochs_run == len(losses) / parts
    assert trained.epochs_run == pytest.approx(min(trained.best_epoch + 2, 8))
    again, accuracy = one.task.evaluate()
    assert torch.equal(again, trained.val_losses) and accuracy == trained.val_accuracy
    assert again.double().mean().item() == min(losses) and not one.task.model.training
    summary = trained.summary()
    assert (summary["best_epoch"], summary["epochs_run"]) == (trained.best_epoch, trained.epochs_run)
    assert summary["val_loss"] == min(losses) and summary["val_ppl"] == pytest.approx(math.exp(min(losses)))
    assert summary["last_val_ppl"] == pytest.approx(math.exp(losses[-1]))
    assert summary["overfit_rate"] == pytest.approx(math.exp(losses[-1] - min(losses)) - 1)


@each_kind
def test_validating_more_often_changes_nothing_but_the_best_state(kind):
    plain, expected = whole(kind)
    often = trainer(kind, validations_per_epoch=2 * plain.e.validations_per_epoch)
    trained = often.run()
    assert expected.epochs_run == trained.epochs_run == 4
    assert values(trained, "val_loss")[1::2] == values(expected, "val_loss")
    assert values(trained, "updates")[1::2] == values(expected, "updates")
    assert trained.last_val_loss == expected.last_val_loss
    assert trained.summary()["val_loss"] == min(values(trained, "val_loss")) <= expected.summary()["val_loss"]
    states = plain.optimiser.state_dict()["state"], often.optimiser.state_dict()["state"]
    assert all(torch.equal(one[k], states[1][i][k]) for i, one in states[0].items() for k in one)


# A task whose losses are known


class Scripted:
    """Moves a weight; what it is judged by is given, validation by validation."""

    def __init__(self, judged, batches, losses):
        self.model = nn.Linear(1, 1)
        self.weights, self.count = dict(self.model.named_parameters()), batches
        self.judged, self.losses = judged, losses
        self.epochs, self.trained, self.seen = [], 0, []

    def batches(self, epoch):
        self.epochs.append(epoch)
        return range(self.count)

    def loss(self, batch):
        assert self.model.training
        self.trained += 1
        mean = self.model(torch.ones(1)).square().mean()
        losses = [self.trained, 1.0] if self.losses is None else [self.losses[self.trained - 1]]
        return mean, torch.tensor(losses), torch.tensor([True, False][: len(losses)])

    def evaluate(self):
        assert not self.model.training
        self.seen.append([w.detach().clone() for w in self.weights.values()])
        return torch.tensor([self.judged[len(self.seen) - 1]]), 0.25


def scripted(judged=(1.0,) * 99, batches=3, losses=None, **parameters):
    e = Experiment.from_mapping({"phase2_patience": 99, "phase2_epochs": 3}, parameters)
    task = Scripted(judged, batches, losses)
    return task, Trainer(task, e)


@given(data=st.data(), parts=st.integers(1, 4), epochs=st.integers(1, 6), patience=st.integers(1, 4))
def test_training_ends_once_patience_is_out_or_who_sees_it_wants_it_and_keeps_the_first_best(
    data, parts, epochs, patience
):
    judged = data.draw(st.lists(st.integers(0, 6), min_size=parts * epochs, max_size=parts * epochs))
    batches, enough = data.draw(st.integers(2 * parts, 12)), data.draw(st.integers(1, 2 * parts * epochs))
    changed = {"phase2_patience": patience, "phase2_epochs": epochs, "validations_per_epoch": parts}
    task, whole = scripted([0.125 * loss for loss in judged], batches, **changed)
    best = run = 0
    for run, loss in enumerate(judged, start=1):
        if best == 0 or loss < judged[best - 1]:
            best = run
        if run - best >= patience * parts or run == enough:  # patience is of epochs
            break
    shown = []

    def on_epoch(history):
        shown.append([row["value"] for row in history if row["metric"] == "val_loss"])
        return len(shown) == enough

    trained = whole.run(on_epoch)
    assert (trained.best_epoch, trained.epochs_run, len(task.seen)) == (best / parts, run / parts, run)
    assert task.epochs == [*range(1, math.ceil(run / parts) + 1)]
    ends = [epoch * batches + math.ceil(k * batches / parts) for epoch in range(epochs) for k in range(1, parts + 1)]
    assert values(trained, "updates") == ends[:run]
    assert trained.val_losses.tolist() == [0.125 * judged[best - 1]] and trained.val_accuracy == 0.25
    assert trained.last_val_loss == 0.125 * judged[run - 1]
    assert all(torch.equal(*pair) for pair in zip(task.weights.values(), task.seen[best - 1], strict=True))
    assert (whole.done or run == enough) and not task.model.training
    assert shown == [[0.125 * loss for loss in judged[:step]] for step in range(1, run + 1)]


def test_an_epochs_rows_are_known():
    _, one = scripted([0.5, 0.25], phase2_epochs=2)
    trained = one.run()
    first = {row["metric"]: row["value"] for row in trained.history if (row["phase"], row["step"]) == ("phase2", 1)}
    assert first.pop("seconds") > 0
    assert first == {
        "epoch": 1,
        "train_loss": (1 + 1 + 2 + 1 + 3 + 1) / 6,  # of every target, before its update
        "train_ppl": pytest.approx(math.exp(1.5)),
        "train_accuracy": 0.5,
        "val_loss": 0.5,
        "val_ppl": pytest.approx(math.exp(0.5)),
        "val_accuracy": 0.25,
        "updates": 3,
    }
    assert values(trained, "train_loss") == [1.5, (4 + 5 + 6 + 3) / 6]
    between = scripted(batches=4, phase2_epochs=1, validations_per_epoch=2)[1].run()
    assert values(between, "train_loss") == [(1 + 2 + 2) / 4, (3 + 4 + 2) / 4]  # since the last validation


# Faults


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3000.0])  # e to the last is no number either
def test_a_loss_that_is_not_finite_stops_training_where_it_is_validated(loss):
    task, one = scripted(losses=[1.0, loss, 1.0], phase2_learning_rate=0.5)
    with pytest.raises(NonFiniteLoss, match=r"update 3: .*learning_rate = 0\.5"):
        one.run()
    assert task.trained == 3 and not task.seen
    task, one = scripted([1.0, loss])  # and so does a validation loss
    with pytest.raises(NonFiniteLoss, match=r"update 6.*learning_rate = 0\.002"):
        one.run()
    assert len(task.seen) == 2
