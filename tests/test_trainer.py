"""The one trainer: stopped and gone on with to the same bits, best weights kept, its schedule and averages, faults."""

import copy
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ctxlm.config import ConfigError, Experiment
from ctxlm.files import ROOT
from ctxlm.metrics import NonFiniteLoss
from ctxlm.model import Blanking, ContextLM, load_own_weights, own_weights
from ctxlm.networks import NeuralLM, Windows
from ctxlm.phase2 import Phase2, Predictor, evaluate
from ctxlm.recurrence import sequential
from ctxlm.trainer import Trainer
from tests.conftest import stream

VOCABULARY = 40
COMMON = {"embed_dim": 8, "num_layers": 2, "phase2_batch_size": 32, "phase2_epochs": 4, "phase2_patience": 4}
RECIPE = {
    "output_bias": "unigram",
    "phase2_warmup_updates": 4,
    "phase2_final_rate": 0.1,
    "phase2_token_dropout": 0.2,
    "phase2_weight_average": 0.9,
    "slow_decay": 0.9,
    "phase2_freeze_embedding": False,
}
KINDS = {
    "study": {"context_dim": 12},
    "windows": {"context_dim": 12, "phase2_context_window": 8, "phase2_shuffle": True, "phase2_weight_average": 0.9},
    "tuned": RECIPE
    | {
        "context_dim": 12,
        "num_input_tokens": 1,
        "logit_scale": 0.5,
        "phase2_context_window": 1,
        "phase2_shuffle": True,
    },
    "lstm": RECIPE | {"model": "lstm", "hidden_dim": 12, "window": 8},
    "transformer": RECIPE | {"model": "transformer", "hidden_dim": 16, "num_heads": 4, "window": 8},
}


def trainer(kind, **parameters):
    """A new trainer of a new model of one of `KINDS`."""
    e = Experiment.from_mapping(COMMON, KINDS[kind], parameters)
    embedding = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(3))
    train, val = stream(200, VOCABULARY), stream(80, VOCABULARY, seed=1)
    if e.model != "context":
        return Trainer(Windows(NeuralLM(e, embedding), train, val, e, torch.float32), e)
    model = ContextLM(e, embedding)
    return Trainer(Phase2(model, sequential(model, train), sequential(model, val), e, torch.float32), e)


def values(found, metric, phase="phase2"):
    return [row["value"] for row in found.history if (row["phase"], row["metric"]) == (phase, metric)]


def rows(history, *without):
    """All but what differs from run to run, and what is left out on purpose."""
    left_out = {"seconds", *without}
    return [row for row in history if row["metric"] not in left_out and row["phase"] not in left_out]


def assert_same(one, found, other, expected, *without):
    """Two trainings have left the same bits, in history, losses and weights."""
    assert rows(found.history, *without) == rows(expected.history, *without) != []
    assert torch.equal(found.val_losses, expected.val_losses)
    for name in ("best_epoch", "epochs_run", "val_accuracy", "last_val_loss"):
        assert getattr(found, name) == getattr(expected, name)
    weights, others = one.task.model.state_dict(), other.task.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# Stopped, and gone on with


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["copy", "file"])
def test_training_goes_on_from_any_epoch_to_the_same_bits(kind, by, one_thread, tmp_path):
    def carried(state):
        if by == "copy":
            return copy.deepcopy(state)
        torch.save(state, tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt")

    whole = trainer(kind)
    states = [carried(whole.state_dict())]
    while not whole.done:
        whole.run_epoch()
        states.append(carried(whole.state_dict()))
    expected = whole.finish()
    assert len(states) == expected.epochs_run + 1 == 5
    for epoch, state in enumerate(states):
        torch.manual_seed(epoch)  # torch's own generator has no part in it
        fresh = trainer(kind)
        fresh.load_state_dict(state)
        assert (fresh.epoch, fresh.done) == (epoch, epoch == 4)
        found = fresh.run()
        assert_same(fresh, found, whole, expected)
        assert fresh.update == whole.update and len(values(found, "seconds")) == 4


@pytest.mark.parametrize("kind", ["study", "tuned"])
def test_training_may_be_stopped_by_patience_after_it_went_on(kind, one_thread):
    settings = {"phase2_patience": 1, "phase2_learning_rate": 0.3, "phase2_warmup_updates": 0, "phase2_epochs": 9}
    whole = trainer(kind, **settings)
    expected = whole.run()
    assert expected.best_epoch + 1 == expected.epochs_run < 9
    stopped = trainer(kind, **settings)
    for _ in range(expected.best_epoch):
        stopped.run_epoch()
    fresh = trainer(kind, **settings)
    fresh.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert_same(fresh, fresh.run(), whole, expected)


GO_ON = """
import sys
import torch
torch.set_num_threads(1)
from tests.test_trainer import trainer
fresh = trainer("tuned")
fresh.load_state_dict(torch.load(sys.argv[1]))
found = fresh.run()
torch.save([found.val_losses, fresh.task.model.state_dict()], sys.argv[1])
"""


@pytest.mark.slow
def test_training_goes_on_in_another_process(one_thread, tmp_path):
    whole = trainer("tuned")
    whole.run_epoch()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = whole.run()
    subprocess.run([sys.executable, "-c", GO_ON, tmp_path / "state.pt"], cwd=ROOT, check=True, capture_output=True)
    losses, weights = torch.load(tmp_path / "state.pt")
    assert torch.equal(losses, expected.val_losses)
    assert all(torch.equal(weights[name], w) for name, w in whole.task.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_seed_and_state_decides(kind, one_thread):
    one, other, changed = trainer(kind), trainer(kind), trainer(kind, seed=43)
    torch.manual_seed(1)
    first = one.run()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert_same(one, first, other, other.run())
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first.val_losses, changed.run().val_losses)


# What is kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_epochs_weights_and_losses_are_kept(kind, one_thread):
    # Random tokens cannot be learnt, so validation soon gets worse.
    own = trainer(kind, phase2_learning_rate=0.05, phase2_patience=2, phase2_epochs=8)
    found = own.run()
    losses = values(found, "val_loss")
    assert found.best_epoch == 1 + losses.index(min(losses)) < found.epochs_run == len(losses)
    assert found.epochs_run == min(found.best_epoch + 2, 8)
    again, accuracy = own.task.evaluate("val")
    assert torch.equal(again, found.val_losses) and accuracy == found.val_accuracy
    assert again.double().mean().item() == min(losses) and not own.task.model.training
    assert found.last_val_loss == losses[-1]
    summary = found.summary()
    assert (summary["best_epoch"], summary["epochs_run"]) == (found.best_epoch, found.epochs_run)
    assert summary["val_loss"] == min(losses) and summary["val_ppl"] == pytest.approx(math.exp(min(losses)))
    assert summary["last_val_ppl"] == pytest.approx(math.exp(losses[-1]))
    assert summary["overfit_rate"] == pytest.approx(math.exp(losses[-1] - min(losses)) - 1)


@pytest.mark.parametrize("kind", ["windows", "tuned", "lstm", "transformer"])
def test_averaged_weights_are_those_that_are_judged_and_kept(kind, one_thread):
    own = trainer(kind, phase2_epochs=1)
    own.run_epoch()
    raw = [weight.detach().clone() for weight in own.average.weights]
    means = [mean.clone() for mean in own.average.means]
    found = own.finish()
    for weight, mean, trained in zip(own.task.weights.values(), means, raw, strict=True):
        assert torch.equal(weight, mean)
        assert not torch.equal(mean, trained)
    assert torch.equal(own.task.evaluate("val")[0], found.val_losses)
    if kind in ("windows", "tuned"):  # and what is judged has contexts of the weights that are judged
        model = own.task.model
        losses, _ = evaluate(Predictor(model, torch.float32), sequential(model, own.task.val.tokens))
        torch.testing.assert_close(losses, found.val_losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_loaded_is_judged_as_the_trained_one(kind, one_thread):
    own, fresh = trainer(kind), trainer(kind)  # of the second nobody has said that it is not in training
    found = own.run()
    load_own_weights(fresh.task.model, own_weights(own.task.model))
    for _ in range(2):
        losses, accuracy = fresh.task.evaluate("val")
        assert torch.equal(losses, found.val_losses) and accuracy == found.val_accuracy


# What changes nothing else


@pytest.mark.parametrize("kind", KINDS)
def test_validating_between_epochs_changes_nothing_else(kind, one_thread):
    plain, often = trainer(kind), trainer(kind, val_every_steps=3)
    expected, watched = plain.run(), often.run()
    assert_same(often, watched, plain, expected, "phase2_updates")
    steps = [row["step"] for row in watched.history if row["phase"] == "phase2_updates"]
    assert steps == list(range(3, often.update + 1, 3)) and len(steps) > 4
    assert not [row for row in expected.history if row["phase"] == "phase2_updates"]
    updates, losses = values(watched, "updates"), values(watched, "val_loss")
    between = dict(zip(steps, values(watched, "val_loss", "phase2_updates"), strict=True))
    assert {update: between[update] for update in updates if update in between} == {
        update: loss for update, loss in zip(updates, losses, strict=True) if update in between
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loss_after_an_epoch_is_that_of_its_weights_and_changes_nothing_else(kind, one_thread):
    plain, also = (trainer(kind, phase2_epochs=1, train_loss_after_epoch=after) for after in (False, True))
    expected, measured = plain.run(), also.run()
    assert_same(also, measured, plain, expected, "train_loss_after", "train_ppl_after")
    losses = also.task.evaluate("train")[0].double()  # one epoch: its weights are the best
    if kind in ("study", "windows", "tuned"):
        model = also.task.model
        anew, _ = evaluate(Predictor(model, torch.float32), sequential(model, also.task.train.tokens))
        torch.testing.assert_close(anew.double(), losses)
    assert values(measured, "train_loss_after") == [losses.mean().item()]
    assert values(measured, "train_ppl_after") == pytest.approx([losses.mean().exp().item()])
    assert values(expected, "train_loss_after") == []


# A task whose losses are known


class Scripted:
    """Fits the weight w to targets that go round, and is judged by the losses it is given, epoch by epoch."""

    TARGETS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.25], [-1.0, 1.0, 4.0], [0.5, 0.5, -3.0]])

    def __init__(self, e, judged, batches=3, updates=None, losses=None):
        self.model = nn.Module()
        self.model.blank, self.model.w = Blanking(e), nn.Parameter(torch.tensor([0.3, 0.2, 0.1]))
        self.weights = {"w": self.model.w}
        self.count, self.updates = batches, batches if updates is None else updates
        self.judged, self.losses = judged, losses
        self.trained, self.seen, self.asked, self.trainer = [], [], [], None

    def batches(self, epoch):
        assert epoch == self.trainer.epoch
        return range(self.count)

    def loss(self, batch):
        assert self.model.training
        self.trained.append((self.trainer.optimiser.param_groups[0]["lr"], self.model.w.detach().clone()))
        mean = (self.model.w - self.TARGETS[(len(self.trained) - 1) % 4]).square().mean()
        losses = [len(self.trained), 1.0] if self.losses is None else [self.losses[len(self.trained) - 1]]
        return mean, torch.tensor(losses), torch.tensor([True, False][: len(losses)])

    def evaluate(self, part):
        assert not self.model.training
        self.asked.append(part)
        self.seen.append(self.model.w.detach().clone())
        return torch.tensor([self.judged[self.trainer.epoch - 1]]), 0.25


def scripted(judged=(1.0,) * 99, batches=3, updates=None, losses=None, **parameters):
    e = Experiment.from_mapping({"phase2_patience": 99, "phase2_epochs": 3}, parameters)
    task = Scripted(e, judged, batches, updates, losses)
    task.trainer = Trainer(task, e)
    return task, task.trainer


@settings(max_examples=100, deadline=None)
@given(
    judged=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    patience=st.integers(1, 5),
    average=st.sampled_from([0.0, 0.9]),
)
def test_training_ends_once_patience_is_out_and_keeps_the_first_best(judged, patience, average):
    task, own = scripted(
        [0.125 * loss for loss in judged],
        phase2_patience=patience,
        phase2_epochs=len(judged),
        phase2_weight_average=average,
    )
    best = run = 0
    for run, loss in enumerate(judged, start=1):
        if best == 0 or loss < judged[best - 1]:
            best = run
        if run - best >= patience:
            break
    found = own.run()
    assert (found.best_epoch, found.epochs_run, len(task.seen)) == (best, run, run)
    assert found.val_losses.tolist() == [0.125 * judged[best - 1]] and found.val_accuracy == 0.25
    assert found.last_val_loss == 0.125 * judged[run - 1]
    assert torch.equal(task.model.w.detach(), task.seen[best - 1])
    assert own.done and not task.model.training


@settings(max_examples=100, deadline=None)
@given(
    epochs=st.integers(1, 5),
    batches=st.integers(1, 6),
    rise=st.integers(0, 29),
    final=st.floats(0.01, 1),
    more=st.integers(0, 1),
)
def test_the_learning_rate_is_the_formulas(epochs, batches, rise, final, more):
    total, peak = epochs * batches, 0.003
    rise %= total
    parameters = {"phase2_epochs": epochs, "phase2_warmup_updates": rise, "phase2_final_rate": final}
    task, own = scripted(batches=batches + more, updates=batches, phase2_learning_rate=peak, **parameters)
    own.run()
    expected = []
    for update in range(epochs * (batches + more)):
        share = min(max(update - rise, 0) / max(total - rise, 1), 1)
        cosine = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))
        expected.append(peak * min(1, (update + 1) / (rise + 1)) * cosine)
    assert [rate for rate, _ in task.trained] == pytest.approx(expected, rel=1e-9)


def test_the_learning_rate_rises_in_a_line_and_falls_to_its_end():
    task, own = scripted(phase2_learning_rate=0.1)
    own.run()
    assert {rate for rate, _ in task.trained} == {0.1}  # by default it stays where it is
    task, own = scripted(
        batches=10, phase2_epochs=2, phase2_learning_rate=0.1, phase2_warmup_updates=4, phase2_final_rate=0.2
    )
    own.run()
    rates = [rate for rate, _ in task.trained]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[12] == pytest.approx(0.06)  # half way between 0.1 and 0.02
    assert all(later < rate for rate, later in pairwise(rates[4:])) and rates[-1] > 0.02


def test_a_warm_up_that_outlasts_the_training_is_refused():
    with pytest.raises(ConfigError, match="phase2_warmup_updates = 21 is not over within phase2_epochs = 3 of 7"):
        trainer("study", phase2_epochs=3, phase2_warmup_updates=21)
    with pytest.raises(ConfigError, match="phase2_warmup_updates = 9 is not over within phase2_epochs = 3 of 3"):
        scripted(phase2_warmup_updates=9)
    assert scripted(phase2_warmup_updates=8)[1].run().epochs_run == 3


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_averages_are_those_of_a_literal_loop(decay, clip):
    own = {"phase2_learning_rate": 0.1, "phase2_gradient_clip": clip, "phase2_weight_average": decay}
    task, trained = scripted(batches=7, phase2_epochs=3, val_every_steps=1, **own)
    trained.run()
    w = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    mean, first, second, means = w.clone(), torch.zeros(3).double(), torch.zeros(3).double(), []
    for update in range(1, 22):
        assert task.trained[update - 1][1].tolist() == pytest.approx(w.tolist(), abs=1e-5)  # its own, not the average
        gradient = 2 / 3 * (w - Scripted.TARGETS[(update - 1) % 4].double())
        gradient *= min(1.0, clip / (gradient.norm().item() + 1e-6))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**update) / ((second / (1 - 0.999**update)).sqrt() + 1e-8)
        w = w - 0.1 * step
        share = min(decay, (1 + update) / (10 + update))
        mean = share * mean + (1 - share) * w
        means += [mean] * (1 + (update % 7 == 0))  # judged after every update, and after every epoch
    assert len(task.seen) == len(means)
    for seen, expected in zip(task.seen, means, strict=True):
        assert seen.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_epochs_rows_are_known():
    task, own = scripted([0.5, 0.25], phase2_epochs=2, train_loss_after_epoch=True, val_every_steps=2)
    found = own.run()
    first = {row["metric"]: row["value"] for row in found.history if (row["phase"], row["step"]) == ("phase2", 1)}
    assert first.pop("seconds") > 0
    assert first == {
        "train_loss": (1 + 1 + 2 + 1 + 3 + 1) / 6,  # of every target, before its update
        "train_ppl": pytest.approx(math.exp(1.5)),
        "train_accuracy": 0.5,
        "val_loss": 0.5,
        "val_ppl": pytest.approx(math.exp(0.5)),
        "val_accuracy": 0.25,
        "updates": 3,
        "train_loss_after": 0.5,
        "train_ppl_after": pytest.approx(math.exp(0.5)),
    }
    assert values(found, "updates") == [3, 6] and values(found, "train_loss") == [1.5, (4 + 5 + 6 + 3) / 6]
    between = [(row["step"], row["value"]) for row in found.history if row["phase"] == "phase2_updates"]
    assert between == [(2, 0.5), (4, 0.25), (6, 0.25)]
    assert task.asked == ["val", "val", "train", "val", "val", "val", "train"]


# Faults


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3000.0])  # e to the last is no number either
@pytest.mark.parametrize("update", [2, 3, 5])
def test_a_loss_that_is_not_finite_stops_training_at_once(loss, update):
    task, own = scripted(losses=[1.0] * (update - 1) + [loss], phase2_learning_rate=0.5)
    epoch = (update + 2) // 3
    with pytest.raises(
        NonFiniteLoss, match=rf"in epoch {epoch} by update {update}: lower phase2_learning_rate = 0\.5$"
    ):
        own.run()
    assert len(task.trained) == update


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ("context", r"logit_scale = 1\.0 or phase2_init_std = 0\.1 or phase2_learning_rate = 0\.002"),
        ("lstm", r"logit_scale = 1\.0 or phase2_learning_rate = 0\.002"),
    ],
)
def test_a_loss_that_is_not_finite_from_the_start_names_what_it_starts_from(model, remedy):
    task, own = scripted(losses=[math.nan], model=model)
    with pytest.raises(NonFiniteLoss, match=rf"loss is nan in epoch 1 by update 1: lower {remedy}$"):
        own.run()
    assert len(task.trained) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3000.0])
def test_a_validation_loss_that_is_not_finite_stops_training(loss):
    task, own = scripted([1.0, loss])
    with pytest.raises(NonFiniteLoss, match=r"in epoch 2 by update 6: lower phase2_learning_rate = 0\.002$"):
        own.run()
    assert len(task.seen) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_models_loss_that_is_not_finite_stops_training_at_once():
    with pytest.raises(NonFiniteLoss, match=r"in epoch 1 by update [2-9]: lower phase2_learning_rate = 1e\+30"):
        trainer("study", phase2_learning_rate=1.0e30).run()
    own = trainer("study")
    with torch.no_grad():
        own.task.model.token_block.norms[-1].weight[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"in epoch 1 by update 1: lower logit_scale = 1\.0 or phase2_init_std = "):
        own.run()
