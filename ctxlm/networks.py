"""An LSTM, a minGRU and a Transformer that read the embedding, and predict through it, as the context model does.

All take the normalised embeddings of a stream's tokens and are trained by the loop that trains Phase 2. Shapes: R rows
read side by side, W positions of each, d embed_dim, H hidden_dim.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxlm.config import Experiment
from ctxlm.corpus import Split
from ctxlm.device import autocast, generator, resolve_device, resolve_dtype, to_device, tokens_on
from ctxlm.embeddings import load_embedding
from ctxlm.files import digest
from ctxlm.loss import HeadLoss, Losses
from ctxlm.metrics import Baseline
from ctxlm.model import forward_flops, set_frequencies, token_inputs, trained_weights
from ctxlm.trainer import Trainer

State = tuple[Tensor, ...]
"""What a recurrent network hands on from token to token."""
PART, WARMUP = 1024, 256
"""A recurrent network is judged in parts of so many targets, side by side, each begun so many tokens earlier."""


class LSTM(nn.Module):
    """A layer or more of `nn.LSTM` (Hochreiter & Schmidhuber, 1997) and a Linear back to the embedding's width.

    The cells stay out of autocast: CPUs without AVX-512 refuse them in bfloat16, and a GPU would run them in float16.
    Dropout is of what goes from layer to layer and out, not of the state (Zaremba, Sutskever & Vinyals 2014).
    """

    recurrent = True

    def __init__(self, e: Experiment):
        super().__init__()
        between = e.dropout if e.num_layers > 1 else 0.0  # torch warns of one that is not there
        self.cells = nn.LSTM(e.embed_dim, e.hidden_dim, e.num_layers, batch_first=True, dropout=between)
        self.out, self.dropout = nn.Linear(e.hidden_dim, e.embed_dim), nn.Dropout(e.dropout)

    def start(self, rows: int) -> State:
        """The state before the stream: h and c of every layer, [L, R, H] each."""
        zeros = self.out.weight.new_zeros(self.cells.num_layers, rows, self.cells.hidden_size)
        return zeros, zeros

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """h [R, W, d] from inputs [R, W, d], and the state to go on from."""
        with torch.autocast(inputs.device.type, enabled=False):
            h, state = self.cells(inputs, state)
        return self.out(self.dropout(h)), state


class MinGRU(nn.Module):
    """Pre-norm residual layers of minGRU cells (Feng et al., 2024), between a Linear in and a Linear out.

    h_t = (1 - z_t) h_{t-1} + z_t g(h~_t), where z_t = sigmoid(Linear(x_t)), h~_t = Linear(x_t), and g(x) = x + 0.5 for
    x >= 0, else sigmoid(x). States are averages of g, all positive: of plain layers, as an LSTM's, the upper ones would
    read averages of averages. A norm takes their mean out, a residual lets the token itself past them. Dropout is of
    what a layer adds, not of its state.
    """

    recurrent = True

    def __init__(self, e: Experiment):
        super().__init__()
        width, layers = e.hidden_dim, range(e.num_layers)
        self.into, self.out = nn.Linear(e.embed_dim, width), nn.Linear(width, e.embed_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.gates = nn.ModuleList(nn.Linear(width, 2 * width) for _ in layers)  # z, then h~
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(e.dropout)

    def start(self, rows: int) -> State:
        """The state before the stream, every layer's h_0 [L, R, H]: g(0), as the authors have it."""
        return (self.out.weight.new_full((len(self.gates), rows, self.out.in_features), 0.5),)

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """h [R, W, d] from inputs [R, W, d], and the state to go on from."""
        x, last = self.into(inputs).float(), []  # only products are rounded
        for norm, gates, h in zip(self.norms, self.gates, state[0], strict=True):
            h = min_gru(*gates(norm(x)).float().chunk(2, -1), h)
            last.append(h[:, -1])
            x = x + self.dropout(h)
        return self.out(self.norm(x)), (torch.stack(last),)


def min_gru(z: Tensor, candidate: Tensor, before: Tensor) -> Tensor:
    """h_t [R, W, H] of all positions at once, by doubling (Hillis & Steele, 1986): log2(W) passes.

    Not in log space as the authors have it: all factors lie between 0 and 1, and the large logarithms that cancel there
    cost digits (errors of 5e-4 at 512 positions, here 1e-6).

    Args:
        z: before its sigmoid, [R, W, H].
        candidate: h~, [R, W, H].
        before: h_0, [R, H].
    """
    kept = torch.sigmoid(-z)
    added = torch.sigmoid(z) * torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
    reach = 1
    while reach < z.shape[1]:  # h_t = kept_t · h_{t - reach} + added_t
        added = torch.cat([added[:, :reach], added[:, reach:] + kept[:, reach:] * added[:, :-reach]], 1)
        kept = torch.cat([kept[:, :reach], kept[:, reach:] * kept[:, :-reach]], 1)
        reach *= 2
    return added + kept * before.unsqueeze(1)


class Transformer(nn.Module):
    """Pre-norm decoder layers with causal self-attention and learned positions (Radford et al., 2019)."""

    recurrent = False

    def __init__(self, e: Experiment):
        super().__init__()
        width = e.hidden_dim
        self.into, self.out = nn.Linear(e.embed_dim, width), nn.Linear(width, e.embed_dim)
        self.positions = nn.Parameter(torch.empty(e.window, width))
        nn.init.normal_(self.positions, std=0.02)
        layer = partial(nn.TransformerEncoderLayer, width, e.num_heads, 4 * width, dropout=e.dropout)
        options = {"activation": F.gelu, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(layer(**options) for _ in range(e.num_layers))
        self.norm = nn.LayerNorm(width)

    def start(self, rows: int) -> State:
        """It has no state."""
        return ()

    def forward(self, inputs: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """h [R, W, d] from inputs [R, W, d], each position from those up to it."""
        length = inputs.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device)
        x = self.into(inputs) + self.positions[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.out(self.norm(x)), ()


BODIES = {"lstm": LSTM, "mingru": MinGRU, "transformer": Transformer}
"""What `model` names."""


class NeuralLM(nn.Module):
    """One of them with the embedding, which is the head too, and frozen unless `phase2_freeze_embedding` says no."""

    def __init__(self, experiment: Experiment, embedding: Tensor):
        """`embedding` is float32 [V, d]; weights are drawn from the experiment's seed, on the CPU."""
        super().__init__()
        e = experiment
        kept = embedding if e.phase2_freeze_embedding else embedding.clone()  # training must not change the caller's
        self.embedding = nn.Parameter(kept, requires_grad=not e.phase2_freeze_embedding)
        with torch.random.fork_rng([]):  # torch's own initialisation draws from its global generator
            torch.default_generator.manual_seed(generator(e.seed, "init", e.model).initial_seed())
            self.body: LSTM | MinGRU | Transformer = BODIES[e.model](e)
        self.output_bias = nn.Parameter(torch.zeros(len(embedding))) if e.output_bias == "unigram" else None
        self.logit_scale, self.window = e.logit_scale, e.window
        self.recurrent = self.body.recurrent
        """Whether a state is carried from window to window."""

    def inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The normalised embeddings [..., d] at `positions` [...] of the stream `tokens` [T]."""
        return token_inputs(self.embedding, tokens, positions, 1)

    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class Reader:
    """The loss on windows of a stream; a recurrent state goes on from one batch of windows to the next."""

    def __init__(self, model: NeuralLM, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.score = HeadLoss(model, dtype)
        self.state: State | None = None
        """Where the next windows go on from; None: at their beginning."""

    def __call__(self, tokens: Tensor, positions: Tensor, scored: Tensor) -> Losses:
        """Losses of predicting the tokens after `positions` [R, W], where `scored` [R, W].

        Both lie on the CPU: which positions are scored decides shapes, for which a GPU would have to be waited for.
        """
        which = scored.flatten().nonzero()[:, 0]
        predicted_from = to_device(positions.flatten()[which], tokens.device)
        with autocast(tokens.device, self.dtype):
            state = self.model.body.start(len(positions)) if self.state is None else self.state
            h, state = self.model.body(self.model.inputs(tokens, to_device(positions, tokens.device)), state)
            h = h.flatten(0, 1)[to_device(which, tokens.device)]
        self.state = tuple(x.detach() for x in state)  # gradients end at the window (Williams & Peng, 1990)
        return self.score(h, tokens, predicted_from)


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
def evaluate(reader: Reader, tokens: Tensor, warmup: int = WARMUP, part: int = PART) -> tuple[Tensor, float]:
    """Every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction); of tokens int64 [T].

    A recurrent network is judged in parts of `part` targets, each read from `warmup` positions earlier. A Transformer,
    for which neither counts, sees half a window or more before every token but the stream's first ones.
    """
    if not reader.model.recurrent:
        warmup = reader.model.window // 2
        part = reader.model.window - warmup
    positions, scored = parts(len(tokens) - 1, part, warmup)
    losses = torch.empty(len(tokens) - 1, device=tokens.device)
    correct = torch.empty(len(tokens) - 1, dtype=torch.bool, device=tokens.device)
    before, rows, columns = reader.state, max(1, 4096 // reader.model.window), reader.model.window
    for some, which in zip(positions.split(rows), scored.split(rows), strict=True):
        reader.state = None
        for at, counted in zip(some.split(columns, 1), which.split(columns, 1), strict=True):
            _, nats, hits = reader(tokens, at, counted)
            place = to_device(at[counted], tokens.device)
            losses[place], correct[place] = nats, hits
    reader.state = before  # training may be in the middle of an epoch
    return losses, correct.double().mean().item()


class Windows:
    """What training one of the networks is, for the trainer: windows of the stream, each target once an epoch."""

    def __init__(self, model: NeuralLM, train: Tensor, val: Tensor, experiment: Experiment, dtype: torch.dtype):
        """`train` and `val` are int64 [T] on the model's device; `dtype` is of the matrix products."""
        self.model, self.train, self.val, self.e = model, train, val, experiment
        self.weights = model.trained()
        set_frequencies(model, train)
        self.reader, self.targets = Reader(model, dtype), len(train) - 1
        self.rows = experiment.phase2_batch_size // model.window

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows, `phase2_batch_size` positions at a time: positions and which are scored, both [R, W].

        A recurrent network reads `phase2_batch_size / window` stretches of the stream side by side, window by window. A
        Transformer reads windows in random order, from a random first position, so that their joints move.
        """
        w, targets = self.model.window, self.targets
        if self.model.recurrent:
            self.reader.state, length = None, -(-targets // self.rows)  # of a stretch
            first = torch.arange(self.rows)[:, None] * length
            for start in range(0, length, w):
                positions = first + torch.arange(start, min(start + w, length))
                yield positions.clamp(max=targets - 1), positions < targets
            return
        draws = generator(self.e.seed, "phase2_order", epoch)
        shift = int(torch.randint(w, (1,), generator=draws))
        starts = torch.arange(-shift, targets, w)
        starts = starts[torch.randperm(len(starts), generator=draws)]
        for some in starts.split(self.rows):
            positions = some[:, None] + torch.arange(w)
            # a window that would begin before the stream is moved to its start; only its own targets are scored
            positions = positions - positions[:, :1].clamp(max=0)
            end = torch.where(some < 0, some + w, targets)[:, None]
            yield positions.clamp(max=targets - 1), positions < end.clamp(max=targets)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Losses:
        """The losses of one batch of windows."""
        return self.reader(self.train, *batch)

    def evaluate(self) -> tuple[Tensor, float]:
        """Every validation target's loss and the accuracy, as `evaluate`."""
        return evaluate(self.reader, self.val)


def build(experiment: Experiment, streams: Split, **training: Any) -> Baseline:
    """The network of an experiment, trained on its training stream; `training` are arguments of `Trainer.run`.

    Raises:
        NonFiniteLoss: as `Trainer.run`.
    """
    device = resolve_device(experiment)
    dtype = resolve_dtype(experiment, device)
    train, val, *_ = tokens_on(device, streams)
    vectors = load_embedding(experiment)
    model = NeuralLM(experiment, torch.from_numpy(vectors)).to(device)
    trained = Trainer(Windows(model, train, val, experiment, dtype), experiment).run(**training)
    reader = Reader(model, dtype)

    def judge(tokens: np.ndarray) -> tuple[np.ndarray, float]:
        losses, accuracy = evaluate(reader, torch.from_numpy(tokens).long().to(device))
        return losses.cpu().numpy(), accuracy

    forward, head = forward_flops(model), 2 * model.embedding.numel()
    head_step = (3 if model.embedding.requires_grad else 2) * head
    columns = trained.summary() | {
        "trained_params": sum(p.numel() for p in model.trained().values()),
        "flops_per_token": forward,
        "embedding_digest": digest(vectors.tobytes()),
        "training_flops": round(len(streams.train) * trained.epochs_run * (3 * (forward - head) + head_step)),
    }
    return Baseline(judge, columns, trained.history, trained_weights(model))
