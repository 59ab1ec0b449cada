"""Phase 2: freeze the contexts and train the TokenBlock to predict the next token."""

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ctxlm.config import Experiment
from ctxlm.loss import linear_cross_entropy
from ctxlm.metrics import loss_summary, overfit_rate, perplexity
from ctxlm.model import ContextLM
from ctxlm.phase1 import NonFiniteLoss
from ctxlm.recurrence import Contexts


@dataclass(frozen=True)
class Phase2:
    """What Phase 2 leaves behind; the model holds the best epoch's weights."""

    best_epoch: int
    epochs_run: int
    val_losses: Tensor
    """Every validation token's loss at the best epoch, nats, float32 [T_val - 1]."""
    val_accuracy: float
    last_val_loss: float
    history: list[dict]
    """Rows phase, step (epoch; for `phase2_updates` the update), metric, value."""

    def summary(self) -> dict[str, float]:
        """The columns of metrics.json that Phase 2 gives."""
        val = loss_summary("val", self.val_losses, self.val_accuracy)
        last_ppl = perplexity(self.last_val_loss)
        return {
            "best_epoch": self.best_epoch,
            "epochs_run": self.epochs_run,
            **val,
            "last_val_ppl": last_ppl,
            "overfit_rate": overfit_rate(last_ppl, val["val_ppl"]),
        }


class Predictor:
    """The model's next-token loss on a stream with frozen contexts, batch by batch."""

    def __init__(self, model: ContextLM, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        weight = model.embedding if model.head is None else model.head.weight
        frozen = not weight.requires_grad
        self.weight = weight.detach().to(dtype) if frozen else weight
        self.transposed = self.weight.T.contiguous() if frozen and weight.device.type == "cpu" else None
        self.bias = None if model.head is None else model.head.bias

    def __call__(self, stream: Contexts, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of predicting tokens[start+1 .. stop] (mean, per token, correct), as `linear_cross_entropy`.

        Args:
            stream: T tokens and their contexts.
            start: first position read; stop: one past the last one, at most T - 1.
        """
        with self._autocast(stream.tokens):
            layers = stream.layers(self.model.context_block, start, stop)
        return self.at(stream.tokens, torch.arange(start, stop, device=stream.tokens.device), layers)

    def at(self, tokens: Tensor, positions: Tensor, layers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same after `positions` [B] of `tokens`, from every layer's contexts there, L tensors [B, width]."""
        with self._autocast(tokens):
            h = self.model.token_block(self.model.inputs(tokens, positions), layers)
        return linear_cross_entropy(
            h.float(), self.weight, tokens[positions + 1], self.bias, self.dtype, self.transposed
        )

    def _autocast(self, tokens: Tensor) -> torch.autocast:
        return torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32)


@torch.no_grad()
def evaluate(predict: Predictor, stream: Contexts, batch_size: int = 2048) -> tuple[Tensor, float]:
    """Every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction)."""
    targets = len(stream.tokens) - 1
    parts = [predict(stream, start, min(start + batch_size, targets))[1:] for start in range(0, targets, batch_size)]
    losses, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return losses, correct.double().mean().item()


def train_token_block(
    model: ContextLM,
    train: Contexts,
    val: Contexts,
    experiment: Experiment,
    dtype: torch.dtype = torch.float32,
) -> Phase2:
    """Train `model.token_block` (and the untied head, and the embedding unless frozen) in place.

    Batches are consecutive tokens in stream order; N tokens give N - 1 targets, the short last batch included. The
    epoch's train loss is the mean of the losses before each update. Training stops after `phase2_patience` epochs
    without a better validation loss; the best epoch's weights are kept.

    Args:
        model: on the device of the streams.
        train, val: the streams with their contexts.
        experiment: supplies the `phase2_*` parameters and `val_every_steps`.
        dtype: of the matrix products.

    Raises:
        NonFiniteLoss: the loss, or its exponential, is no longer finite.
    """
    e, device, targets = experiment, train.tokens.device, len(train.tokens) - 1
    if not e.phase2_freeze_embedding:
        if model.context_embedding is None:  # training may go on: contexts keep reading Phase 1's
            model.context_embedding = model.embedding.detach().clone()
        model.embedding.requires_grad_(True)
    trained = {f"token_block.{name}": p for name, p in model.token_block.named_parameters()}
    if model.head is not None:
        trained |= {f"head.{name}": p for name, p in model.head.named_parameters()}
    if model.embedding.requires_grad:
        trained["embedding"] = model.embedding
    predict = Predictor(model, dtype)
    optimiser = torch.optim.Adam(trained.values(), lr=e.phase2_learning_rate, fused=True)
    starts = range(0, targets, e.phase2_batch_size)
    check_every = 1 if device.type == "cpu" else len(starts)  # reading a loss off a GPU makes the host wait for it
    history: list[dict] = []

    def record(phase: str, step: int, values: dict[str, float]) -> None:
        history.extend({"phase": phase, "step": step, "metric": k, "value": v} for k, v in values.items())

    best_loss, best, best_weights = math.inf, None, None
    epoch = update = 0
    for epoch in range(1, e.phase2_epochs + 1):
        began = time.perf_counter()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        correct_sum = torch.zeros((), dtype=torch.int64, device=device)
        with tqdm(starts, desc=f"Phase 2, epoch {epoch}", unit="update", leave=False) as bar:
            for start in bar:
                stop = min(start + e.phase2_batch_size, targets)
                optimiser.zero_grad()
                loss, losses, correct = predict(train, start, stop)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), e.phase2_gradient_clip)
                optimiser.step()
                loss_sum += losses.sum()
                correct_sum += correct.sum()
                update += 1
                if update % check_every == 0 or stop == targets:
                    _finite(loss_sum.item() / stop, e, epoch, update)
                if e.val_every_steps and update % e.val_every_steps == 0:
                    record("phase2_updates", update, {"val_loss": evaluate(predict, val)[0].double().mean().item()})
        val_losses, val_accuracy = evaluate(predict, val)
        val_loss, train_loss = val_losses.double().mean().item(), loss_sum.item() / targets
        _finite(val_loss, e, epoch, update)
        record(
            "phase2",
            epoch,
            {
                "train_loss": train_loss,
                "train_ppl": perplexity(train_loss),
                "train_accuracy": correct_sum.item() / targets,
                "val_loss": val_loss,
                "val_ppl": perplexity(val_loss),
                "val_accuracy": val_accuracy,
                "updates": update,
                "seconds": time.perf_counter() - began,
            },
        )
        if e.train_loss_after_epoch:
            after = evaluate(predict, train)[0].double().mean().item()
            record("phase2", epoch, {"train_loss_after": after, "train_ppl_after": perplexity(after)})
        tqdm.write(
            f"epoch {epoch}: train PPL {perplexity(train_loss):,.1f}, validation PPL {perplexity(val_loss):,.1f}"
        )
        if val_loss < best_loss:
            best_loss, best = val_loss, (epoch, val_losses, val_accuracy)
            best_weights = {name: copy.deepcopy(p.detach()) for name, p in trained.items()}
        elif epoch - best[0] >= e.phase2_patience:
            break
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(best_weights[name])
    return Phase2(best[0], epoch, best[1], best[2], val_loss, history)


def _finite(loss: float, e: Experiment, epoch: int, update: int) -> None:
    if not math.isfinite(perplexity(loss)):  # also where the loss is a number, but no longer one of a language model
        raise NonFiniteLoss(
            f"Phase 2's loss is {loss} in epoch {epoch} by update {update}: "
            f"lower phase2_learning_rate = {e.phase2_learning_rate}"
        )
