"""One loop for every model: optimiser, schedule, averages, early stop, and a state that can be saved.

A model brings a `Task`: its weights, its batches, its loss and its evaluation.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ctxlm.checkpoints import Checkpoints
from ctxlm.config import Experiment
from ctxlm.loss import Losses
from ctxlm.metrics import NonFiniteLoss, loss_summary, overfit_rate, perplexity
from ctxlm.progress import say, track


class Task(Protocol):
    """What a model brings to the trainer."""

    model: nn.Module
    """The module that is trained; its `blank` is a `Blanking`."""
    weights: dict[str, nn.Parameter]
    """What is trained, by name, on one device."""
    updates: int
    """Batches of an epoch, or nearly: the learning rate's schedule and the progress shown go by it."""

    def batches(self, epoch: int) -> Iterable[Any]:
        """The batches of an epoch, from 1."""

    def loss(self, batch: Any) -> Losses:
        """The losses of a batch before its update."""

    def evaluate(self, part: Literal["train", "val"]) -> tuple[Tensor, float]:
        """Every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction)."""


@dataclass(frozen=True)
class Trained:
    """What training leaves behind; the model holds the best epoch's weights."""

    best_epoch: int
    epochs_run: int
    val_losses: Tensor
    """Every validation token's loss at the best epoch, nats, float32 [T_val - 1]."""
    val_accuracy: float
    last_val_loss: float
    history: list[dict]
    """Rows phase, step (epoch; for `phase2_updates` the update), metric, value."""
    resumed: int = 0
    """The epoch that an earlier process had ended with, if this one went on from there."""

    def summary(self) -> dict[str, float]:
        """The columns of metrics.json that training gives."""
        val = loss_summary("val", self.val_losses, self.val_accuracy)
        last_ppl = perplexity(self.last_val_loss)
        rate = overfit_rate(last_ppl, val["val_ppl"])
        epochs = {"best_epoch": self.best_epoch, "epochs_run": self.epochs_run}
        if self.resumed:  # then the run's seconds are the last process's
            epochs["resumed_after_epoch"] = self.resumed
        return epochs | val | {"last_val_ppl": last_ppl, "overfit_rate": rate}


class Trainer:
    """Trains a task's weights in place, epoch by epoch, until validation gets no better for `phase2_patience` epochs.

    `run` does it all. By hand: `run_epoch` until `done`, then `finish`; in between, `state_dict` holds all that
    `load_state_dict` needs to go on in another process to the same bits.
    """

    def __init__(self, task: Task, experiment: Experiment):
        """The experiment supplies the `phase2_*` parameters, `val_every_steps` and `train_loss_after_epoch`.

        Raises:
            ConfigError: the warm-up would outlast the training.
        """
        self.task, self.e = task, experiment
        experiment.check_warmup(task.updates)
        self.optimiser = torch.optim.Adam(task.weights.values(), lr=experiment.phase2_learning_rate, fused=True)
        self.schedule = LambdaLR(self.optimiser, self._rate)
        self.average = _Average(list(task.weights.values()), experiment.phase2_weight_average)
        self.epoch = self.update = self.resumed = 0
        self.history: list[dict] = []
        self.best: dict[str, Any] = {"loss": math.inf, "epoch": 0}
        self.last_loss = math.inf

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return self.epoch >= self.e.phase2_epochs or (
            self.epoch > 0 and self.epoch - self.best["epoch"] >= self.e.phase2_patience
        )

    def run(
        self, on_epoch: Callable[[list[dict]], bool | None] | None = None, checkpoints: Checkpoints | None = None
    ) -> Trained:
        """Train to the end.

        Args:
            on_epoch: is given the history so far after every epoch; what it returns, if true, ends the training there.
            checkpoints: where an earlier process may have left a state to go on from, and where this one leaves its.

        Raises:
            NonFiniteLoss: the loss, or its exponential, is no longer finite.
        """
        if checkpoints and (state := checkpoints.load(next(iter(self.task.weights.values())).device)):
            self.load_state_dict(state)
            del state
            self.resumed = self.epoch
            say(f"goes on after epoch {self.epoch}, where it was stopped")
        while not self.done:
            self.run_epoch()
            if checkpoints:
                checkpoints.save(self.epoch, self.state_dict())
            if on_epoch and on_epoch(self.history):
                break
        return self.finish()

    def run_epoch(self) -> None:
        """One pass over the training stream, and one over validation.

        Raises:
            NonFiniteLoss: as `run`.
        """
        task, e, device = self.task, self.e, next(iter(self.task.weights.values())).device
        began, targets = time.perf_counter(), 0
        self.epoch += 1
        # Sums stay on the device: reading one off a GPU would make the host wait for it.
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        task.model.train()
        task.model.blank.begin(self.epoch, device)
        batches = task.batches(self.epoch)
        for batch in track(batches, f"epoch {self.epoch}", task.updates):
            self.optimiser.zero_grad()
            loss, losses, correct = task.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.weights.values(), e.phase2_gradient_clip)
            self.optimiser.step()
            self.schedule.step()
            self.update += 1
            self.average.follow(self.update)
            loss_sum += losses.sum()
            hits += correct.sum()
            targets += len(losses)
            if device.type == "cpu":
                self._check(loss_sum.item() / targets)
            if e.val_every_steps and self.update % e.val_every_steps == 0:
                self._record("phase2_updates", self.update, {"val_loss": self._evaluate("val")[2]})
        train_loss = loss_sum.item() / targets
        self._check(train_loss)
        val_losses, val_accuracy, val_loss = self._evaluate("val")
        self._check(val_loss)
        train = {"train_loss": train_loss, "train_ppl": perplexity(train_loss), "train_accuracy": hits.item() / targets}
        val = {"val_loss": val_loss, "val_ppl": perplexity(val_loss), "val_accuracy": val_accuracy}
        cost = {"updates": self.update, "seconds": time.perf_counter() - began}
        self._record("phase2", self.epoch, train | val | cost)
        if e.train_loss_after_epoch:
            after = self._evaluate("train")[2]
            self._record("phase2", self.epoch, {"train_loss_after": after, "train_ppl_after": perplexity(after)})
        say(f"epoch {self.epoch}: train PPL {perplexity(train_loss):,.1f}, validation PPL {perplexity(val_loss):,.1f}")
        self.last_loss = val_loss
        if val_loss < self.best["loss"]:
            self.best = {"loss": val_loss, "epoch": self.epoch, "losses": val_losses, "accuracy": val_accuracy}
            self.best["weights"] = [mean.detach().clone() for mean in self.average.means]

    def finish(self) -> Trained:
        """Put the best epoch's weights in place."""
        with torch.no_grad():
            torch._foreach_copy_(self.average.weights, self.best["weights"])
        self.task.model.eval()
        best = self.best
        judged = best["losses"], best["accuracy"], self.last_loss
        return Trained(best["epoch"], self.epoch, *judged, self.history, self.resumed)

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from, by reference as torch's: copy it, or write it, before going on.

        Draws go by seed, purpose and epoch, so that no random state is in it.
        """
        return {
            "weights": self.average.weights,
            "means": self.average.means,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            **{name: getattr(self, name) for name in ("epoch", "update", "history", "best", "last_loss")},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` of a trainer of the same task and experiment was taken."""
        torch._foreach_copy_(self.average.weights, state["weights"])
        if self.average.decay:
            torch._foreach_copy_(self.average.means, state["means"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        for name in ("epoch", "update", "history", "best", "last_loss"):
            setattr(self, name, copy.copy(state[name]))

    def _rate(self, update: int) -> float:
        """The learning rate as a share of its peak: a linear warm-up, then half a cosine to `phase2_final_rate`."""
        rise, total = self.e.phase2_warmup_updates, self.e.phase2_epochs * self.task.updates
        gone, final = min(max(update - rise, 0) / max(total - rise, 1), 1), self.e.phase2_final_rate
        return min(1.0, (update + 1) / (rise + 1)) * (final + (1 - final) * (1 + math.cos(math.pi * gone)) / 2)

    def _evaluate(self, part: Literal["train", "val"]) -> tuple[Tensor, float, float]:
        """Losses and accuracy of the averaged weights, and the mean loss."""
        self.task.model.eval()
        with self.average.in_place():
            losses, accuracy = self.task.evaluate(part)
        self.task.model.train()
        return losses, accuracy, losses.double().mean().item()

    def _record(self, phase: str, step: int, values: dict[str, float]) -> None:
        self.history.extend({"phase": phase, "step": step, "metric": k, "value": v} for k, v in values.items())

    def _check(self, loss: float) -> None:
        if not math.isfinite(perplexity(loss)):  # also where it is a number, but no longer a language model's loss
            names = ["phase2_learning_rate"]
            if self.update == 1:  # most likely of a loss from before the first update
                names = ["logit_scale", *(["phase2_init_std"] if self.e.model == "context" else []), *names]
            remedy = " or ".join(f"{name} = {getattr(self.e, name)}" for name in names)
            raise NonFiniteLoss(
                f"Phase 2's loss is {loss} in epoch {self.epoch} by update {self.update}: lower {remedy}"
            )


class _Average:
    """An exponential moving average of weights (Polyak & Juditsky, 1992), or with decay 0 the weights themselves.

    torch's `AveragedModel` would copy, and average, the frozen embedding too, and begins with the first update's
    weights where this one begins with the initial ones.
    """

    def __init__(self, weights: list[Tensor], decay: float):
        self.weights, self.decay = weights, decay
        self.means = [weight.detach().clone() for weight in weights] if decay else weights

    @torch.no_grad()
    def follow(self, update: int) -> None:
        """After update number `update`; the first ones count for more, so that the start is soon forgotten."""
        if self.decay:
            decay = min(self.decay, (1 + update) / (10 + update))
            torch._foreach_lerp_(self.means, self.weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in the weights' place while the block runs."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.decay:
            own = [weight.clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.means)
            torch._foreach_copy_(self.means, own)
