"""One loop for every model: optimiser, early stop, the best state kept, and a checkpoint after every epoch.

A model brings a `Task`: its weights, its batches, its loss and its evaluation.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ctxlm.config import Experiment
from ctxlm.device import generator
from ctxlm.files import atomic
from ctxlm.loss import Losses
from ctxlm.metrics import NonFiniteLoss, loss_summary, perplexity
from ctxlm.progress import say, track

OnEpoch = Callable[[list[dict]], Any]
"""Is given the history so far after every validation; what it returns, if true, ends the training there."""
PROGRESS = ("validations", "updates", "history", "best", "last_loss")
"""What a checkpoint keeps of a trainer, beside weights and optimiser."""


class Task(Protocol):
    """What a model brings to the trainer."""

    model: nn.Module
    weights: dict[str, nn.Parameter]
    """What is trained, by name, on one device."""

    def batches(self, epoch: int) -> Iterable[Any]:
        """The batches of an epoch, from 1."""

    def loss(self, batch: Any) -> Losses:
        """The losses of a batch before its update."""

    def evaluate(self) -> tuple[Tensor, float]:
        """Every validation target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction)."""


@dataclass(frozen=True)
class Trained:
    """What training leaves behind; the model holds the best state's weights."""

    best_epoch: float
    """Whole but for `validations_per_epoch` above 1."""
    epochs_run: float
    val_losses: Tensor
    """Every validation token's loss at the best epoch, nats, float32 [T_val - 1]."""
    val_accuracy: float
    last_val_loss: float
    history: list[dict]
    """Rows phase, step (validations so far: epochs, unless there are several in one), metric, value."""
    resumed: float = 0
    """The epoch that an earlier process had ended with, if this one went on from there."""

    def summary(self) -> dict[str, float]:
        """The columns of metrics.json that training gives."""
        columns = {"best_epoch": self.best_epoch, "epochs_run": self.epochs_run}
        if self.resumed:  # then the run's seconds are the last process's
            columns["resumed_after_epoch"] = self.resumed
        columns |= loss_summary("val", self.val_losses, self.val_accuracy)
        columns["last_val_ppl"] = perplexity(self.last_val_loss)
        columns["overfit_rate"] = columns["last_val_ppl"] / columns["val_ppl"] - 1
        return columns


class Trainer:
    """Trains a task's weights in place until `phase2_patience` epochs made validation no better, or all are over."""

    def __init__(self, task: Task, experiment: Experiment):
        """The experiment supplies the `phase2_*` parameters, `dropout`, `weight_decay` and `validations_per_epoch`."""
        self.task, self.e = task, experiment
        weights = [*task.weights.values()]
        matrices, others = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim < 2]
        groups = [{"params": matrices, "weight_decay": experiment.weight_decay}, {"params": others, "weight_decay": 0}]
        self.optimiser = torch.optim.AdamW(groups, lr=experiment.phase2_learning_rate, fused=True)
        self.device = weights[0].device
        self.validations = self.updates = self.resumed = 0
        self.history: list[dict] = []
        self.best: dict[str, Any] = {"loss": math.inf, "validation": 0}
        self.last_loss = math.inf

    @property
    def done(self) -> bool:
        """Whether training is over."""
        epochs, waited = self._epochs(self.validations), self._epochs(self.validations - self.best["validation"])
        return epochs >= self.e.phase2_epochs or waited >= self.e.phase2_patience

    def run(self, on_epoch: OnEpoch | None = None, checkpoint: Path | None = None, key: str = "") -> Trained:
        """Train to the end.

        Args:
            on_epoch: as `OnEpoch`.
            checkpoint: the file where an earlier process may have left its state, and where this one leaves its.
            key: of what the state depends on: one of another key is not gone on from.

        Raises:
            NonFiniteLoss: the loss, or its exponential, is no longer finite.
        """
        if checkpoint and checkpoint.exists():
            self._load(checkpoint, key)
        while not self.done:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # dropout seeds it
                stopped = self.run_epoch(on_epoch)
            ended = self.validations % self.e.validations_per_epoch == 0
            if checkpoint and ended:  # batches go on from an epoch's end alone
                self._save(checkpoint, key)
            if stopped:
                break
        best = self.best
        self._restore(best["weights"])
        self.task.model.eval()
        epochs = self._epochs(best["validation"]), self._epochs(self.validations)
        return Trained(*epochs, best["losses"], best["accuracy"], self.last_loss, self.history, self.resumed)

    def run_epoch(self, on_epoch: OnEpoch | None = None) -> bool:
        """One pass over the training stream, validated `validations_per_epoch` times; whether training ends within it.

        Raises:
            NonFiniteLoss: as `run`.
        """
        task, parts = self.task, self.e.validations_per_epoch
        epoch = self.validations // parts + 1
        if self.e.dropout:
            torch.manual_seed(generator(self.e.seed, "dropout", epoch).initial_seed())
        self._begin()
        batches = [*task.batches(epoch)]
        ends = {-(-len(batches) * part // parts) for part in range(1, parts + 1)}
        for count, batch in enumerate(track(batches, f"epoch {epoch}"), 1):
            self.optimiser.zero_grad()
            loss, losses, correct = task.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.weights.values(), self.e.phase2_gradient_clip)
            self.optimiser.step()
            self.updates += 1
            self.loss_sum += losses.sum()
            self.hits += correct.sum()
            self.targets += len(losses)
            if count in ends:
                self._validate()
                if (on_epoch and on_epoch(self.history)) or self.done:
                    return True
                self._begin()
        return False

    def _save(self, checkpoint: Path, key: str) -> None:
        """Leave all that training goes on from; draws go by seed, purpose and epoch."""
        weights = {name: weight.detach() for name, weight in self.task.weights.items()}
        state = {"key": key, "weights": weights, "optimiser": self.optimiser.state_dict()}
        try:
            with atomic(checkpoint) as path:
                torch.save(state | {name: getattr(self, name) for name in PROGRESS}, path)
        except (OSError, RuntimeError) as error:  # a full disk stops nothing yet
            say(f"{checkpoint} cannot be written ({error}): if this run is stopped, it begins anew")

    def _load(self, checkpoint: Path, key: str) -> None:
        """Go on from what `_save` of a trainer of the same task and experiment has left, if its key is the same."""
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        if state["key"] != key:
            return
        self._restore(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.resumed = self._epochs(self.validations)
        say(f"goes on after epoch {self.resumed}, where it was stopped")

    def _restore(self, weights: dict[str, Tensor]) -> None:
        unknown = self.task.model.load_state_dict(weights, strict=False).unexpected_keys  # what is frozen stays
        assert not unknown, unknown

    def _epochs(self, validations: int) -> float:
        """Epochs that so many validations are."""
        parts = self.e.validations_per_epoch
        return validations / parts if validations % parts else validations // parts

    def _begin(self) -> None:
        """Begin to count anew. Sums stay on the device: reading one off a GPU would make the host wait for it."""
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self.targets, self.began = 0, time.perf_counter()
        self.task.model.train()

    def _validate(self) -> None:
        self.validations += 1
        train_loss = self.loss_sum.item() / self.targets
        self._check(train_loss)
        self.task.model.eval()
        losses, accuracy = self.task.evaluate()
        loss = losses.double().mean().item()
        self._check(loss)
        epoch = self._epochs(self.validations)
        values = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_ppl": perplexity(train_loss),
            "train_accuracy": self.hits.item() / self.targets,
            "val_loss": loss,
            "val_ppl": perplexity(loss),
            "val_accuracy": accuracy,
            "updates": self.updates,
            "seconds": time.perf_counter() - self.began,
        }
        row = {"phase": "phase2", "step": self.validations}
        self.history += [row | {"metric": k, "value": v} for k, v in values.items()]
        say(f"epoch {epoch:g}: train PPL {values['train_ppl']:,.1f}, validation PPL {values['val_ppl']:,.1f}")
        self.last_loss = loss
        if loss < self.best["loss"]:
            weights = {name: weight.detach().clone() for name, weight in self.task.weights.items()}
            best = {"losses": losses, "accuracy": accuracy, "weights": weights}
            self.best = best | {"loss": loss, "validation": self.validations}

    def _check(self, loss: float) -> None:
        if not math.isfinite(perplexity(loss)):  # also of a finite loss, above some 700 nats
            raise NonFiniteLoss(
                f"the loss is {loss} by update {self.updates}: lower phase2_learning_rate = "
                f"{self.e.phase2_learning_rate} or logit_scale = {self.e.logit_scale}"
            )
