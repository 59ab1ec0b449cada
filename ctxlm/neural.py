"""An LSTM and a Transformer that read the embedding, and predict through it, as the context model does.

Both take the normalised embeddings of a stream's tokens and are trained by Phase 2's own loop (`phase2.fit`), with its
optimiser, early stop and accounts. Shapes: R rows read side by side, W positions of each, d embed_dim, H hidden_dim.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxlm.config import Experiment
from ctxlm.loss import Score, autocast
from ctxlm.model import SlowContext, generator, sent, token_inputs
from ctxlm.phase2 import Phase2, fit, set_frequencies
from ctxlm.recurrence import SlowReader

LSTM_PART, LSTM_WARMUP = 1024, 256
"""An LSTM is judged on parts of a stream side by side, each read on from so many tokens before it."""


class LSTM(nn.Module):
    """A layer or more of `nn.LSTM` (Hochreiter & Schmidhuber, 1997) and a Linear back to the embedding's width.

    The cells stay out of autocast: CPUs without AVX-512 refuse them in bfloat16, and a GPU would run them in float16.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_layers: int):
        super().__init__()
        self.cells = nn.LSTM(embed_dim, hidden_dim, num_layers, batch_first=True)
        self.out = nn.Linear(hidden_dim, embed_dim)

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
        """h [R, W, d] from inputs [R, W, d], and the state to go on from."""
        with torch.autocast(inputs.device.type, enabled=False):
            h, state = self.cells(inputs, state)
        return self.out(h), state


class Transformer(nn.Module):
    """Pre-norm decoder layers with causal self-attention and learned positions (Radford et al., 2019)."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_layers: int, num_heads: int, window: int):
        super().__init__()
        self.into, self.out = nn.Linear(embed_dim, hidden_dim), nn.Linear(hidden_dim, embed_dim)
        self.positions = nn.Parameter(torch.empty(window, hidden_dim))
        nn.init.normal_(self.positions, std=0.02)
        layer = partial(nn.TransformerEncoderLayer, hidden_dim, num_heads, 4 * hidden_dim, dropout=0.0)
        options = {"activation": F.gelu, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(layer(**options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
        """h [R, W, d] from inputs [R, W, d], each position from those up to it."""
        width = inputs.shape[1]
        hidden = torch.full((width, width), -math.inf, device=inputs.device).triu(1)
        x = self.into(inputs) + self.positions[:width]
        for layer in self.layers:
            x = layer(x, src_mask=hidden, is_causal=True)
        return self.out(self.norm(x)), None


class NeuralLM(nn.Module):
    """One of the two with the embedding, which is the head too, and frozen unless `phase2_freeze_embedding` says no."""

    def __init__(self, experiment: Experiment, embedding: Tensor):
        """`embedding` is float32 [V, d]; weights are drawn from the experiment's seed, on the CPU."""
        super().__init__()
        e = experiment
        own = embedding if e.phase2_freeze_embedding else embedding.clone()  # training must not change the caller's
        self.embedding = nn.Parameter(own, requires_grad=not e.phase2_freeze_embedding)
        with torch.random.fork_rng([]):  # torch's own initialisation draws from its global generator
            torch.default_generator.manual_seed(generator(e.seed, "init", e.model).initial_seed())
            if e.model == "lstm":
                self.body: nn.Module = LSTM(e.embed_dim, e.hidden_dim, e.num_layers)
            else:
                self.body = Transformer(e.embed_dim, e.hidden_dim, e.num_layers, e.num_heads, e.window)
        self.output_bias = nn.Parameter(torch.zeros(len(embedding))) if e.output_bias == "unigram" else None
        self.slow = SlowContext(e.slow_decay, e.logit_scale, *embedding.shape) if e.slow_decay else None
        # what the slow context is made from: as it was before training
        self.register_buffer("read_embedding", embedding if self.slow else None, persistent=False)
        self.logit_scale, self.window = e.logit_scale, e.window

    @property
    def recurrent(self) -> bool:
        """Whether a state is carried from window to window."""
        return isinstance(self.body, LSTM)

    def inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The normalised embeddings at `positions` [...] of the stream `tokens` [T], [..., d]."""
        return token_inputs(self.embedding, tokens, positions, 1)

    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class Reader:
    """Batches of windows of a stream, and the loss on them; an LSTM's state goes on from one batch to the next."""

    def __init__(self, model: NeuralLM, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.score = Score(model.embedding, model.output_bias, model.logit_scale, dtype)
        self.with_slow = SlowReader(model.slow, model.read_embedding)
        self.state: Any = None

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        scored: Tensor,
        drop: Callable[[Tensor], Tensor] = lambda x: x,
        blank: Callable[[Tensor], Tensor] = lambda x: x,
        smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of predicting the tokens after `positions` [R, W] (mean, per token, correct), where `scored` [R, W].

        Both lie on the CPU, so that a GPU need not be waited for. `drop` is applied to what is read and to what is
        predicted from, `blank` to the tokens read.
        """
        which = scored.flatten().nonzero()[:, 0]
        after = sent(positions.flatten()[which] + 1, tokens.device)
        with autocast(tokens.device, self.dtype):
            read = drop(blank(self.model.inputs(tokens, sent(positions, tokens.device))))
            h, state = self.model.body(read, self.state)
            h = drop(h.flatten(0, 1)[sent(which, tokens.device)])
        self.state = state and tuple(x.detach() for x in state)  # gradients end at the window (Williams & Peng, 1990)
        return self.score(self.with_slow(h, tokens, after - 1), tokens[after], smoothing)

    def batches(self, targets: int, e: Experiment, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's windows, `phase2_batch_size` positions at a time: positions and which are scored, both [R, W].

        An LSTM reads as many stretches of the stream side by side, from their first window to their last. A
        Transformer reads windows in random order, from a random first position, so that their joints move.
        """
        w, rows = self.model.window, e.phase2_batch_size // self.model.window
        if self.model.recurrent:
            self.state, length = None, -(-targets // rows)  # of a stretch
            first = torch.arange(rows)[:, None] * length
            for start in range(0, length, w):
                positions = first + torch.arange(start, min(start + w, length))
                yield positions.clamp(max=targets - 1), positions < targets
            return
        draws = generator(e.seed, "phase2_order", epoch)
        shift = int(torch.randint(w, (1,), generator=draws))
        starts = torch.arange(-shift, targets, w)
        starts = starts[torch.randperm(len(starts), generator=draws)]
        for some in starts.split(rows):
            positions = some[:, None] + torch.arange(w)
            # a window that hangs over the stream's start is read from the start on, so that it sees no other text
            positions = positions - positions[:, :1].clamp(max=0)
            end = torch.where(some < 0, some + w, targets)[:, None]
            yield positions.clamp(max=targets - 1), positions < end.clamp(max=targets)


def parts(targets: int, part: int, warmup: int) -> tuple[Tensor, Tensor]:
    """Stretches that score every one of `targets` positions once, each read on from `warmup` positions before it.

    Returns:
        Positions and which are scored, both [R, part + warmup] or, of a short stream, fewer columns; near the stream's
        start they are read from there on.
    """
    start = torch.arange(0, targets, part)[:, None]
    positions = (start - warmup).clamp(min=0) + torch.arange(min(part + warmup, targets))
    scored = (positions >= start) & (positions < (start + part).clamp(max=targets))
    return positions.clamp(max=targets - 1), scored


@torch.no_grad()
def evaluate(reader: Reader, tokens: Tensor, lstm_warmup: int = LSTM_WARMUP) -> tuple[Tensor, float]:
    """Every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction).

    A Transformer sees half a window or more before every token but the stream's first ones; an LSTM is read on from
    `lstm_warmup` tokens or more. A slow context has read the stream from its start.
    """
    half = reader.model.window // 2
    part, warmup = (LSTM_PART, lstm_warmup) if reader.model.recurrent else (reader.model.window - half, half)
    positions, scored = parts(len(tokens) - 1, part, warmup)
    losses = torch.empty(len(tokens) - 1, device=tokens.device)
    correct = torch.empty(len(tokens) - 1, dtype=torch.bool, device=tokens.device)
    before, rows, columns = reader.state, max(1, 4096 // reader.model.window), reader.model.window
    for some, which in zip(positions.split(rows), scored.split(rows), strict=True):
        reader.state = None
        for at, counted in zip(some.split(columns, 1), which.split(columns, 1), strict=True):
            _, found, hits = reader(tokens, at, counted)
            place = sent(at[counted], tokens.device)
            losses[place], correct[place] = found, hits
    reader.state = before  # training may be in the middle of an epoch
    return losses, correct.double().mean().item()


def train_network(
    model: NeuralLM, train: Tensor, val: Tensor, experiment: Experiment, dtype: torch.dtype = torch.float32
) -> Phase2:
    """Train `model` in place on the stream `train` [T] until `val` gets no better; the best epoch's weights are kept.

    Raises:
        NonFiniteLoss, ConfigError: as `phase2.fit`.
    """
    e, targets = experiment, len(train) - 1
    set_frequencies(train, len(model.embedding), model.output_bias, model.slow)
    reader = Reader(model, dtype)
    length = -(-targets // (e.phase2_batch_size // e.window)) if model.recurrent else targets + e.window
    updates = -(-length // (e.window if model.recurrent else e.phase2_batch_size))
    batches = partial(reader.batches, targets, e)
    return fit(
        model.trained(),
        lambda batch, **training: reader(train, *batch, **training),
        partial(evaluate, reader),
        batches,
        updates,
        train,
        val,
        e,
    )
