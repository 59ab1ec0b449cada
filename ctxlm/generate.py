"""Ask a finished run in words: what comes next, how surprising a text is, what an exchanged token still changes.

A model reads a text token by token into a `State`, which is all that it knows of it, and whose size does not grow with
the text. Everything is on the CPU and in float32. Shapes: V vocabulary, d embed_dim, L num_layers, T tokens of a text.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ctxlm import networks
from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import decode, split, tokenizer
from ctxlm.device import generator
from ctxlm.embeddings import load_embedding
from ctxlm.files import run_folders
from ctxlm.model import ContextLM, load_weights
from ctxlm.networks import NeuralLM, Reader
from ctxlm.ngrams import KneserNey, kneser_ney
from ctxlm.phase2 import Predictor, evaluate
from ctxlm.recurrence import chunked
from ctxlm.run import LOSSES, WEIGHTS

CHECKED, TOLERANCE = 128, 0.2
"""A loaded run gives so many of its validation losses again, to so many nats on average (bfloat16 rounds)."""
REMEDY = "train it anew, with its grid by `make report` or alone by papermill (README.md)"


class State(NamedTuple):
    """All that a model knows of a text."""

    recent: tuple[int, ...] = ()
    """The last tokens, oldest first: those that the model reads as they are."""
    hidden: tuple[Tensor, ...] = ()
    """What it made of all tokens so far; what it remembers them by stands last."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps alive."""
        storages = [tensor.untyped_storage() for tensor in self.hidden]  # an echo's layers are one
        return 8 * len(self.recent) + sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class LanguageModel(Protocol):
    """A model that reads a text token by token."""

    def start(self) -> State:
        """Before the text: as the model starts, though no training has predicted from that."""
        return State()

    def step(self, state: State, token: int) -> State:
        """After one token more; `state` stays as it is."""

    def log_probs(self, state: State) -> Tensor:
        """Log probabilities of the next token, nats, float32 [V]."""

    def losses(self, tokens: Tensor) -> Tensor:
        """The loss of each of `tokens` [T], one or more, given those before it, nats, float32 [T]; all at once."""


class _Neural(LanguageModel):
    """What trained models share: the head. `judge` knows their losses on a stream."""

    def __init__(self, model: ContextLM | NeuralLM, judge: Predictor | Reader):
        self.model, self.judge = model, judge

    def _predict(self, h: Tensor) -> Tensor:
        """Log probabilities [V] from h [1, d]."""
        score = self.judge.score
        return F.linear(h * score.scale, score.weight, score.bias)[0].log_softmax(0)

    def losses(self, tokens: Tensor) -> Tensor:
        first = -self.log_probs(self.start())[tokens[:1]]
        return torch.cat([first, self._later(tokens)]) if len(tokens) > 1 else first

    def _later(self, tokens: Tensor) -> Tensor:
        # a state is read on from the start, where its run was judged from 256 tokens before on
        return networks.evaluate(self.judge, tokens, 0, len(tokens))[0]


class ContextLanguageModel(_Neural):
    """The context model: `recent` are its input tokens, `hidden` the contexts of all layers, L tensors [1, width]."""

    def start(self) -> State:
        return State((), tuple(torch.zeros(1, width) for width in self.model.context_block.widths))

    def step(self, state: State, token: int) -> State:
        recent, block = _append(state.recent, token, self.model.num_input_tokens), self.model.context_block
        contexts = block(state.hidden[-1], block.projections(self.model.context_inputs(*_placed(recent))))
        return State(recent, tuple(contexts))

    def log_probs(self, state: State) -> Tensor:
        return self._predict(self.model.token_block(self.model.inputs(*_placed(state.recent)), state.hidden))

    def _later(self, tokens: Tensor) -> Tensor:
        return evaluate(self.judge, chunked(self.model, tokens))[0]


class RecurrentLanguageModel(_Neural):
    """An LSTM or a minGRU: `hidden` are what it hands out, [1, d], and then its state."""

    def start(self) -> State:
        body = self.model.body
        return State((), (torch.zeros(1, body.out.out_features), *body.start(1)))

    def step(self, state: State, token: int) -> State:
        h, hidden = self.model.body(self.model.inputs(*_placed((token,)))[None], state.hidden[1:])
        return State((), (h[:, 0], *hidden))

    def log_probs(self, state: State) -> Tensor:
        return self._predict(state.hidden[0])


class TransformerLanguageModel(_Neural):
    """A Transformer: `recent` is its window; when it is full, half of it is kept, as when a run is judged."""

    def start(self) -> State:
        return State((-1,) * (self.model.window // 2))  # places without a token

    def step(self, state: State, token: int) -> State:
        window, full = self.model.window, len(state.recent) == self.model.window
        return State((*state.recent[window - window // 2 if full else 0 :], token))

    def log_probs(self, state: State) -> Tensor:
        tokens, last = _placed(tuple(token for token in state.recent if token >= 0))
        positions = torch.arange(min(int(last), 0), int(last) + 1)
        return self._predict(self.model.body(self.model.inputs(tokens, positions)[None])[0][:, -1])


class NGramLanguageModel(LanguageModel):
    """An n-gram: `recent` are the tokens that it predicts from."""

    def __init__(self, ngrams: KneserNey):
        self.ngrams = ngrams

    def step(self, state: State, token: int) -> State:
        return State(_append(state.recent, token, self.ngrams.order - 1))

    def log_probs(self, state: State) -> Tensor:
        return torch.from_numpy(self.ngrams.distribution(np.array(state.recent, np.int64))).log().float()

    def losses(self, tokens: Tensor) -> Tensor:
        return -torch.from_numpy(self.ngrams.probabilities(tokens.numpy())).log().float()


def load_run(grid: str, run: str) -> LanguageModel:
    """A finished run of a grid, by its name.

    An n-gram has no weights: it is counted anew. Whether the model is still the one that was judged is seen by how many
    n-grams it has, or by its first validation losses, where they were kept.

    Raises:
        ConfigError: there is no such run; its weights are not there, or another model's; its contexts were replaced by
            others; or it no longer is what it was.
    """
    folders, name = run_folders(grid), f"run {run} of grid {grid}"
    if run not in folders:
        remedy = f"choose one of {', '.join(folders)}" if folders else f"run `make report GRID={grid}` first"
        raise ConfigError(f"run = {run!r} of grid {grid} has no folder here, and so no weights: {remedy}")
    folder, _ = folders[run]
    metrics = json.loads((folder / "metrics.json").read_bytes())
    e = Experiment.of_run(metrics)
    if e.context_ablation != "none" or e.context_rank:
        replaced = f"context_ablation = {e.context_ablation!r} and context_rank = {e.context_rank}"
        raise ConfigError(f"{name} has {replaced}, not its text's own contexts: ask one without that")
    if e.model == "kneser-ney":
        model = NGramLanguageModel(kneser_ney(e, split(e)))
        same = sum(map(len, model.ngrams.keys)) == metrics.get("ngrams")
    else:
        model, path = _trained(e, folder, name), folder / LOSSES
        losses = model.losses(torch.from_numpy(split(e).val.tokens[: CHECKED + 1]).long())[1:].numpy()
        kept = np.load(path)["loss"][:CHECKED] if path.exists() else losses
        same = len(kept) == len(losses) and np.abs(losses - kept).mean() < TOLERANCE
    if not same:
        raise ConfigError(f"{name} is not what it was, for its text, its embedding or the code has changed: {REMEDY}")
    return model


def next_tokens(model: LanguageModel, prompt: str, top: int = 10) -> pd.DataFrame:
    """The `top` most probable tokens after the prompt, the most probable first: token, text, probability.

    Raises:
        ConfigError: the prompt is no text.
    """
    log_probs = model.log_probs(_read(model, _tokens("prompt", prompt), model.start()))
    values, tokens = log_probs.topk(min(top, len(log_probs)))
    texts = [decode([token]) for token in tokens.tolist()]
    return pd.DataFrame({"token": tokens.numpy(), "text": texts, "probability": values.exp().numpy()})


def generate(
    model: LanguageModel, prompt: str, tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[tuple[int, str, float]]:
    """Go on from the prompt for so many `tokens`, in constant memory.

    Args:
        temperature: what logits are divided by; 0 takes the most probable token.
        top_k: draw from so many most probable tokens; 0: from all.
        seed: of the draws.

    Yields:
        Token, text, and surprise in nats (of temperature 1, among all tokens). The text of a token that ends within a
        character is held back until the character is whole.

    Raises:
        ConfigError: the prompt is no text, or the temperature not possible.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature = {temperature!r} is not possible: give a number from 0 on")
    held, draws = [], generator(seed, "generate")
    state = _read(model, _tokens("prompt", prompt), model.start())
    for end in range(1, tokens + 1):
        log_probs = model.log_probs(state)
        token = _draw(log_probs, temperature, top_k, draws)
        yield token, _text(held, token, end == tokens), -log_probs[token].item()
        state = model.step(state, token)


def surprise(model: LanguageModel, text: str) -> pd.DataFrame:
    """Every token of a text, and its loss given those before it: token, text, nats.

    Raises:
        ConfigError: the text is empty.
    """
    tokens, held = _tokens("text", text, 1), []
    texts = [_text(held, token, end == len(tokens)) for end, token in enumerate(tokens, 1)]
    return pd.DataFrame({"token": tokens, "text": texts, "nats": model.losses(torch.tensor(tokens)).numpy()})


def changed(model: LanguageModel, text: str, token: str, back: int) -> pd.DataFrame:
    """What is still changed after the text if the token k steps before its last one is exchanged for `token`.

    Returns:
        A row for every k from 0 (the last token) to `back`, or as far as the text goes: context_distance, the Euclidean
        distance as a share of the true context's length (nan where the model holds tokens alone); kl, the divergence
        KL(true, exchanged) of the next token's distributions, nats.

    Raises:
        ConfigError: the text is empty, or `token` is not a single one.
    """
    tokens, other = _tokens("text", text, 1), _tokens("token", token, 1)
    if len(other) > 1:
        raise ConfigError(f"token = {token!r} is {len(other)} tokens: give the text of one, as ' the'")
    first = max(len(tokens) - 1 - back, 0)
    states = [_read(model, tokens[:first], model.start())]
    for read in tokens[first:]:
        states.append(model.step(states[-1], read))
    last, true, rows = states[-1], model.log_probs(states[-1]).double(), []
    for k in range(len(tokens) - first):
        exchanged = _read(model, [*other, *tokens[len(tokens) - k :]], states[-2 - k])
        distance = math.nan
        if last.hidden:  # of an LSTM the cells
            distance = ((exchanged.hidden[-1] - last.hidden[-1]).norm() / last.hidden[-1].norm()).item()
        kl = (true.exp() * (true - model.log_probs(exchanged))).sum().clamp(min=0).item()
        rows.append({"context_distance": distance, "kl": kl})
    return pd.DataFrame(rows)


def _trained(e: Experiment, folder: Path, name: str) -> LanguageModel:
    """The model of an experiment, with the weights in its run's folder."""
    path = folder / WEIGHTS
    if not path.exists():
        raise ConfigError(f"{name} has no weights (committed results come without, and {path} is not there): {REMEDY}")
    embedding = torch.from_numpy(load_embedding(e))
    if e.model == "context":
        model, judge, kind = ContextLM(e, embedding), Predictor, ContextLanguageModel
    else:
        model, judge = NeuralLM(e, embedding), Reader
        kind = RecurrentLanguageModel if model.recurrent else TransformerLanguageModel
    try:
        load_weights(model, load_file(path))
    except (RuntimeError, SafetensorError):
        raise ConfigError(f"{name}: {path.name} is damaged, or of another version of the code: {REMEDY}") from None
    model.requires_grad_(False)
    return kind(model, judge(model, torch.float32))


def _append(recent: tuple[int, ...], token: int, count: int) -> tuple[int, ...]:
    """The last `count` of the tokens, with one more at their end."""
    return (*recent, token)[-count:] if count else ()


def _placed(recent: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens as a stream, and its last position, [1]; without any it is -1, which reads as zeros."""
    return torch.tensor(recent or (0,)), torch.tensor([len(recent) - 1])


def _read(model: LanguageModel, tokens: Sequence[int], state: State) -> State:
    """The state after `tokens`, from `state` on."""
    for token in tokens:
        state = model.step(state, token)
    return state


def _draw(log_probs: Tensor, temperature: float, top_k: int, draws: torch.Generator) -> int:
    if temperature == 0:
        return int(log_probs.argmax())
    some, tokens = log_probs.topk(top_k) if 0 < top_k < len(log_probs) else (log_probs, torch.arange(len(log_probs)))
    scaled = (some - some.max()).double() / temperature  # however small it is, the largest stays 0
    return int(tokens[torch.multinomial(scaled.softmax(0), 1, generator=draws)])


def _tokens(name: str, text: str, least: int = 0) -> list[int]:
    """The tokens of the parameter `name`, `least` or more."""
    try:
        tokens = tokenizer().encode(text).ids
    except (TypeError, ValueError):  # no text, or one with half a surrogate pair, which has no bytes
        tokens = None
    if tokens is None or len(tokens) < least:
        raise ConfigError(f"{name} = {text!r} is not possible: give a text{' that is not empty' * least}")
    return tokens


def _text(held: list[int], token: int, last: bool) -> str:
    """The text that ends with `token`, after the tokens `held` back: none yet while it ends within a character."""
    held.append(token)
    text = decode(held)
    if text.endswith("\ufffd") and not last:
        return ""
    held.clear()
    return text
