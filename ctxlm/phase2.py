"""Phase 2: freeze the contexts (or train them on) and train the TokenBlock to predict the next token."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ctxlm.config import Experiment
from ctxlm.loss import Score, autocast
from ctxlm.metrics import loss_summary, overfit_rate, perplexity
from ctxlm.model import ContextLM, SlowContext, generator, sent
from ctxlm.phase1 import NonFiniteLoss
from ctxlm.recurrence import Contexts, SlowReader, chunked


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
    """The model's next-token loss on a stream, from contexts that are there, batch by batch."""

    def __init__(self, model: ContextLM, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        weight, bias = model.embedding, model.output_bias
        if model.head is not None:
            weight, bias = model.head.weight, model.head.bias
        self.score = Score(weight, bias, model.logit_scale, dtype)
        self.with_slow = SlowReader(model.slow, model.read_embedding)

    def __call__(self, stream: Contexts, at: slice | Tensor, **training: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of predicting the tokens after the positions `at` (mean, per token, correct), as `linear_cross_entropy`.

        Args:
            stream: T tokens and their contexts.
            at: a slice without a step, or int64 [B], of 0 .. T - 2.
            training: `drop`, `blank` and `smoothing`, as `from_layers` explains them.
        """
        with autocast(stream.tokens.device, self.dtype):
            layers = stream.layers(self.model.context_block, at)
        positions = torch.arange(at.start, at.stop, device=stream.tokens.device) if isinstance(at, slice) else at
        return self.from_layers(stream.tokens, positions, layers, **training)

    def from_layers(
        self,
        tokens: Tensor,
        positions: Tensor,
        layers: list[Tensor],
        slow: Tensor | None = None,
        drop: Callable[[Tensor], Tensor] = lambda x: x,
        blank: Callable[[Tensor], Tensor] = lambda x: x,
        smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same after `positions` [B] of `tokens`, from every layer's contexts there, L tensors [B, width].

        Args:
            tokens, positions, layers: what is read.
            slow: the slow contexts there, [B, d], where the model has them; None: those of the stream.
            drop: applied to the contexts and the input tokens.
            blank: applied to the input tokens before, [B, n, d].
            smoothing: of the targets, as `Score` explains it.
        """
        with autocast(tokens.device, self.dtype):
            u = self.model.inputs(tokens, positions).unflatten(-1, (self.model.num_input_tokens, -1))
            h = self.model.token_block(drop(blank(u).flatten(-2)), [drop(c) for c in layers])
        return self.score(self.with_slow(h, tokens, positions, slow), tokens[positions + 1], smoothing)


@torch.no_grad()
def evaluate(predict: Predictor, stream: Contexts, batch_size: int = 2048) -> tuple[Tensor, float]:
    """Every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction)."""
    targets = len(stream.tokens) - 1
    batches = (slice(start, min(start + batch_size, targets)) for start in range(0, targets, batch_size))
    parts = [predict(stream, batch)[1:] for batch in batches]
    losses, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return losses, correct.double().mean().item()


def train_token_block(
    model: ContextLM,
    train: Contexts,
    val: Contexts,
    experiment: Experiment,
    dtype: torch.dtype = torch.float32,
) -> Phase2:
    """Train `model.token_block` in place, and with it what else the model has to train.

    That is the untied head, the output's bias, the slow context's gain, and the embedding unless frozen.

    Batches are consecutive tokens in stream order, or with `phase2_shuffle` random ones, every token once an epoch; N
    tokens give N - 1 targets, the short last batch included. The epoch's train loss is the mean of the losses before
    each update. Training stops after `phase2_patience` epochs without a better validation loss; the best epoch's
    weights are kept.

    With `phase2_context_window` the ContextBlock is trained too: batches are windows of so many consecutive tokens, in
    stream order or shuffled as windows, and gradients go back through each (`Contexts.unrolled`). Every epoch begins
    with contexts made anew, in `train.values`, and what is judged has contexts of the weights that are judged. Once it
    is over, the streams' contexts are no longer the model's.

    Args:
        model: on the device of the streams.
        train, val: the streams with their contexts.
        experiment: supplies the `phase2_*` parameters, `output_bias`, `val_every_steps`, `train_loss_after_epoch` and
            `seed`.
        dtype: of the matrix products.

    Raises:
        NonFiniteLoss: the loss, or its exponential, is no longer finite.
    """
    e, device, targets = experiment, train.tokens.device, len(train.tokens) - 1
    trained = _trained(model, train.tokens, e)
    predict, window = Predictor(model, dtype), e.phase2_context_window

    def order(epoch: int, count: int) -> Tensor:
        return torch.randperm(count, generator=generator(e.seed, "phase2_order", epoch))

    def batches(epoch: int) -> Iterator[slice | Tensor]:
        shuffled = sent(order(epoch, targets), device) if e.phase2_shuffle else None
        for start in range(0, targets, e.phase2_batch_size):
            stop = min(start + e.phase2_batch_size, targets)
            yield slice(start, stop) if shuffled is None else shuffled[start:stop]

    def windows(epoch: int) -> Iterator[Tensor]:
        # untrained contexts of small weights may reach back thousands of tokens, which takes minutes
        train.values.copy_(chunked(model, train.tokens, progress=epoch == 1).values)
        starts = torch.arange(0, targets, window)
        if e.phase2_shuffle:
            starts = starts[order(epoch, len(starts))]
        for rows in starts.split(e.phase2_batch_size // window):
            yield rows[:, None] + torch.arange(window)

    def unrolled(batch: Tensor, **training: Any) -> tuple[Tensor, Tensor, Tensor]:
        with autocast(device, dtype):
            positions, layers = train.unrolled(model, batch)
        return predict.from_layers(train.tokens, positions, layers, **training)

    def judge(stream: Contexts) -> tuple[Tensor, float]:
        return evaluate(predict, chunked(model, stream.tokens, keep=dtype) if window else stream)

    read, learn = (windows, unrolled) if window else (batches, partial(predict, train))
    return fit(trained, learn, judge, read, -(-targets // e.phase2_batch_size), train, val, e)


def fit(
    trained: dict[str, Tensor],
    predict: Callable[..., tuple[Tensor, Tensor, Tensor]],
    judge: Callable[[Any], tuple[Tensor, float]],
    batches: Callable[[int], Iterable[Any]],
    updates: int,
    train: Any,
    val: Any,
    experiment: Experiment,
) -> Phase2:
    """Train `trained`, weights by name, epoch by epoch in place; the best epoch's are what is left in them.

    Args:
        trained: the weights, on one device.
        predict: batch, `drop`, `blank`, `smoothing` → the loss (mean, per token, correct) before an update.
        judge: a stream → every target's loss, nats, and the accuracy.
        batches: an epoch, from 1 → its batches.
        updates: of an epoch, or nearly: the learning rate's schedule and the progress bar go by it.
        train, val: streams for `judge`; the first is judged only if `train_loss_after_epoch`.
        experiment: supplies the `phase2_*` parameters, `val_every_steps`, `train_loss_after_epoch` and `seed`.

    Raises:
        NonFiniteLoss: the loss, or its exponential, is no longer finite.
        ConfigError: the warm-up would outlast the training.
    """
    e, device = experiment, next(iter(trained.values())).device
    optimiser, schedule = _optimiser(trained, e, updates)
    average = _Average(trained, e.phase2_weight_average)
    history: list[dict] = []

    def record(phase: str, step: int, values: dict[str, float]) -> None:
        history.extend({"phase": phase, "step": step, "metric": k, "value": v} for k, v in values.items())

    def judged(stream: Any) -> tuple[Tensor, float, float]:
        with average.in_place():
            losses, accuracy = judge(stream)
        return losses, accuracy, losses.double().mean().item()

    best_loss, best, best_weights = math.inf, None, None
    epoch = update = 0
    for epoch in range(1, e.phase2_epochs + 1):
        began, targets = time.perf_counter(), 0
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        correct_sum = torch.zeros((), dtype=torch.int64, device=device)
        training = {
            "drop": _dropout(e.phase2_dropout, generator(e.seed, "phase2_dropout", epoch)),
            "blank": _blanking(e.phase2_token_dropout, generator(e.seed, "phase2_token_dropout", epoch)),
            "smoothing": e.phase2_label_smoothing,
        }
        with tqdm(batches(epoch), desc=f"Phase 2, epoch {epoch}", total=updates, unit="update", leave=False) as bar:
            for batch in bar:
                optimiser.zero_grad()
                loss, losses, correct = predict(batch, **training)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), e.phase2_gradient_clip)
                optimiser.step()
                schedule.step()
                update += 1
                average.update(update)
                loss_sum += losses.sum()
                correct_sum += correct.sum()
                targets += len(losses)
                if device.type == "cpu":  # reading a loss off a GPU makes the host wait for it
                    _finite(loss_sum.item() / targets, e, epoch, update)
                if e.val_every_steps and update % e.val_every_steps == 0:
                    record("phase2_updates", update, {"val_loss": judged(val)[2]})
        train_loss = loss_sum.item() / targets
        _finite(train_loss, e, epoch, update)
        val_losses, val_accuracy, val_loss = judged(val)
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
            after = judged(train)[2]
            record("phase2", epoch, {"train_loss_after": after, "train_ppl_after": perplexity(after)})
        tqdm.write(
            f"epoch {epoch}: train PPL {perplexity(train_loss):,.1f}, validation PPL {perplexity(val_loss):,.1f}"
        )
        if val_loss < best_loss:
            best_loss, best = val_loss, (epoch, val_losses, val_accuracy)
            best_weights = average.copies()
        elif epoch - best[0] >= e.phase2_patience:
            break
    with torch.no_grad():
        for p, kept in zip(trained.values(), best_weights, strict=True):
            p.copy_(kept)
    return Phase2(best[0], epoch, best[1], best[2], val_loss, history)


def _trained(model: ContextLM, tokens: Tensor, e: Experiment) -> dict[str, Tensor]:
    """What Phase 2 trains, by name; the output's bias is started, and tokens get their weights in the slow context."""
    if not e.phase2_freeze_embedding:
        if model.context_embedding is None:  # else training goes on
            # contexts keep reading Phase 1's, which may be the caller's too: what is trained is a copy
            model.context_embedding = model.embedding.detach()
            model.embedding.data = model.embedding.detach().clone()
        model.embedding.requires_grad_(True)
    bias = model.output_bias if model.head is None else model.head.bias
    set_frequencies(tokens, len(model.embedding), bias if e.output_bias == "unigram" else None, model.slow)
    kept = () if e.phase2_context_window else ("context_block.",)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(kept)}


@torch.no_grad()
def set_frequencies(tokens: Tensor, vocabulary: int, bias: Tensor | None, slow: SlowContext | None) -> None:
    """Start what goes by the frequencies of the training `tokens` [T]: an output bias [V], a slow context's weights.

    Every token counts once more than it occurs, so that none is impossible.
    """
    counts = torch.bincount(tokens, minlength=vocabulary) + 1.0
    log_frequencies = (counts / counts.sum()).log()
    if bias is not None:
        bias.copy_(log_frequencies)
    if slow is not None:
        slow.weigh(log_frequencies.exp())


def _optimiser(trained: dict[str, Tensor], e: Experiment, updates: int) -> tuple[Optimizer, LambdaLR]:
    """Adam, or AdamW where weights decay (Loshchilov & Hutter, 2019), and the schedule of its learning rate.

    The rate rises linearly over the warm-up, and falls by half a cosine to `phase2_final_rate` of its peak by the last
    of `phase2_epochs` epochs of so many `updates`. Biases and norms do not decay.

    Raises:
        ConfigError: the warm-up would outlast the training.
    """
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": e.phase2_weight_decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if e.phase2_weight_decay else torch.optim.Adam
    optimiser = kind(groups, lr=e.phase2_learning_rate, fused=True)
    e.check_warmup(updates)
    rise, total = e.phase2_warmup_updates, e.phase2_epochs * updates

    def share(update: int) -> float:
        gone = min(max(update - rise, 0) / max(total - rise, 1), 1)
        fall = e.phase2_final_rate + (1 - e.phase2_final_rate) * (1 + math.cos(math.pi * gone)) / 2
        return min(1.0, (update + 1) / (rise + 1)) * fall

    return optimiser, LambdaLR(optimiser, share)


def _dropout(share: float, draws: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Sets a share of entries to zero and scales up the others (Srivastava et al., 2014); none: leaves all alone."""

    def drop(x: Tensor) -> Tensor:
        kept = torch.empty(x.shape).bernoulli_(1 - share, generator=draws)
        return x * sent(kept, x.device) / (1 - share)

    return drop if share else lambda x: x


def _blanking(share: float, draws: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Sets a share of rows, [..., d], to zero, as before the stream's start; none: leaves all alone."""

    def blank(x: Tensor) -> Tensor:
        kept = torch.empty(*x.shape[:-1], 1).bernoulli_(1 - share, generator=draws)
        return x * sent(kept, x.device)

    return blank if share else lambda x: x


class _Average:
    """An exponential moving average of weights (Polyak & Juditsky, 1992), or with decay 0 the weights themselves."""

    def __init__(self, trained: dict[str, Tensor], decay: float):
        self.weights, self.decay = list(trained.values()), decay
        self.means = self.weights
        if decay:
            self.means = self.copies()

    @torch.no_grad()
    def update(self, update: int) -> None:
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

    def copies(self) -> list[Tensor]:
        """The averages as they are now."""
        return [mean.detach().clone() for mean in self.means]

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.decay:
            own = [p.clone() for p in self.weights]
            torch._foreach_copy_(self.weights, self.means)
            torch._foreach_copy_(self.means, own)


def _finite(loss: float, e: Experiment, epoch: int, update: int) -> None:
    if not math.isfinite(perplexity(loss)):  # also where the loss is a number, but no longer one of a language model
        remedy = f"lower phase2_learning_rate = {e.phase2_learning_rate}"
        if update == 1:  # most likely of a loss from before the first update
            start = f", phase2_init_std = {e.phase2_init_std}" if e.model == "context" else ""
            remedy = f"lower logit_scale = {e.logit_scale}{start} or phase2_learning_rate = {e.phase2_learning_rate}"
        raise NonFiniteLoss(f"Phase 2's loss is {loss} in epoch {epoch} by update {update}: {remedy}")
