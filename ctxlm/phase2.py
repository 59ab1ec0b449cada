"""Phase 2: freeze the contexts (or train them on) and train the TokenBlock to predict the next token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxlm.config import Experiment
from ctxlm.device import autocast, generator
from ctxlm.loss import HeadLoss, Losses
from ctxlm.model import ContextLM, set_frequencies
from ctxlm.recurrence import Contexts, chunked

JUDGED = 2048
"""Targets that are judged at a time."""


class Predictor:
    """The model's next-token loss on a stream, from contexts that were made before, batch by batch."""

    def __init__(self, model: ContextLM, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.score = HeadLoss(model, dtype)

    def __call__(self, stream: Contexts, at: Tensor) -> Losses:
        """Losses of predicting the tokens after the positions `at`, int64 [B]."""
        return self.from_layers(stream.tokens, at, stream.layers(self.model.context_block, at))

    def from_layers(self, tokens: Tensor, positions: Tensor, layers: list[Tensor]) -> Losses:
        """The same after `positions` [B] of `tokens`, from every layer's contexts there, L tensors [B, width]."""
        with autocast(tokens.device, self.dtype):
            h = self.model.token_block(self.model.inputs(tokens, positions), layers)
        return self.score(h, tokens, positions)


@torch.no_grad()
def evaluate(predict: Predictor, stream: Contexts) -> tuple[Tensor, float]:
    """Every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction)."""
    positions = torch.arange(len(stream.tokens) - 1, device=stream.tokens.device)
    parts = [predict(stream, at)[1:] for at in positions.split(JUDGED)]
    losses, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return losses, correct.double().mean().item()


class Phase2:
    """What Phase 2 is, for the trainer: N tokens give N - 1 targets, each read once an epoch.

    Trained are the TokenBlock and what else the model has to train: the output's bias, and the embedding unless frozen.
    Batches are consecutive tokens in stream order, the short last one included; with
    `phase2_shuffle` they are drawn anew for every epoch, without replacement: contexts are made before.

    With `phase2_context_window` the ContextBlock is trained too: a batch is cut into windows of so many tokens, and
    gradients go back through each (`Contexts.unrolled`). Every epoch begins with contexts made anew, in `train.values`,
    and what is judged has contexts of the weights that are judged. Once it is over, the streams' contexts are no longer
    the model's.
    """

    def __init__(self, model: ContextLM, train: Contexts, val: Contexts, experiment: Experiment, dtype: torch.dtype):
        """Everything lies on one device; `dtype` is of the matrix products."""
        self.model, self.train, self.val, self.e, self.dtype = model, train, val, experiment, dtype
        set_frequencies(model, train.tokens)
        kept = () if experiment.phase2_context_window else ("context_block.",)
        named = model.named_parameters()
        self.weights = {name: p for name, p in named if p.requires_grad and not name.startswith(kept)}
        self.predict = Predictor(model, dtype)
        self.targets, self.window = len(train.tokens) - 1, experiment.phase2_context_window

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The positions of each batch, int64 [B]."""
        device = self.train.tokens.device
        positions = torch.arange(self.targets, device=device)
        if self.e.phase2_shuffle:
            draws = generator(self.e.seed, "phase2_order", epoch, device=device)
            positions = torch.randperm(self.targets, generator=draws, device=device)
        if self.window:  # the ContextBlock has moved on since; minutes where its contexts have to go token by token
            self.train.values.copy_(chunked(self.model, self.train.tokens).values)
        return positions.split(self.e.phase2_batch_size)

    def loss(self, batch: Tensor) -> Losses:
        """The losses of one batch."""
        tokens = self.train.tokens
        if not self.window:
            return self.predict(self.train, batch)
        with autocast(tokens.device, self.dtype):
            layers = self.train.unrolled(self.model, batch, self.window)
        return self.predict.from_layers(tokens, batch, layers)

    def evaluate(self) -> tuple[Tensor, float]:
        """Every validation target's loss and the accuracy, as `evaluate`, from contexts of the weights as they are."""
        contexts = chunked(self.model, self.val.tokens, keep=self.dtype) if self.window else self.val
        return evaluate(self.predict, contexts)
