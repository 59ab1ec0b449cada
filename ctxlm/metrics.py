"""Effective rank, perplexity, losses by sample and where text repeats, and one shape of judging for all models."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctxlm.config import ConfigError
from ctxlm.corpus import VOCABULARY, Stream, positions_in_samples, token_bytes
from ctxlm.device import generator

MAX_ROWS = 10_000
"""The effective rank of a longer context matrix is that of so many of its rows, always the same ones."""
REPEATED = (0, 2, 3, 5, 8)
"""Where classes of targets begin, by how many of the tokens right before them stand together in the training text."""


class NonFiniteLoss(ArithmeticError):
    """A loss became infinite or not a number; the message says which, and what may help."""

    _render_traceback_ = ConfigError._render_traceback_


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of [rows, C], largest first, float64 [C], from the Gram matrix.

    The C x C Gram matrix in float64 costs a fraction of the SVD; values under about 1e-8 of the largest are noise,
    and weigh nothing in the effective rank.
    """
    if len(matrix) > MAX_ROWS:
        rows = torch.randperm(len(matrix), generator=generator(0, "effective_rank"))[:MAX_ROWS]
        matrix = matrix[rows.sort().values.to(matrix.device)]
    matrix = matrix.double()
    return torch.linalg.eigvalsh(matrix.T @ matrix).flip(0).clamp(min=0).sqrt().cpu()


def effective_rank_pct(values: Tensor) -> float:
    """exp of the entropy of the normalised singular `values` [C] (Roy & Vetterli, 2007), per cent of their number."""
    p = values / values.sum()
    return 100 * math.exp(-torch.special.xlogy(p, p).sum().item()) / len(values)


def perplexity(mean_loss: float) -> float:
    """exp of a mean cross-entropy in nats; infinite where that overflows."""
    return math.inf if mean_loss > 700 else math.exp(mean_loss)


def loss_summary(name: str, losses: Tensor, accuracy: float) -> dict[str, float]:
    """Of a stream's losses, nats [T - 1]: `<name>_loss`, their mean, and `<name>_ppl`; with its `<name>_accuracy`."""
    loss = losses.double().mean().item()
    return {f"{name}_loss": loss, f"{name}_ppl": perplexity(loss), f"{name}_accuracy": accuracy}


def losses_by_sample(losses: np.ndarray, stream: Stream) -> pd.DataFrame:
    """What was predicted of each sample: columns sample, loss_sum (nats), tokens, bytes (of text).

    Args:
        losses: of every predicted token, nats [T - 1]: all of the stream but its first.
        stream: of T tokens.
    """
    columns = {
        "sample": stream.samples[1:],
        "loss": losses.astype(np.float64),
        "bytes": token_bytes()[stream.tokens[1:]],
    }
    by_sample = pd.DataFrame(columns).groupby("sample")
    return by_sample.agg(loss_sum=("loss", "sum"), tokens=("loss", "count"), bytes=("bytes", "sum")).reset_index()


def losses_by_repeat(losses: np.ndarray, stream: Stream, train: Stream) -> list[dict]:
    """The mean loss where what was just read is new, or repeats the training text, in classes that begin at `REPEATED`.

    Args:
        losses: as `losses_by_sample`.
        stream: of T tokens.
        train: the training text.

    Returns:
        Rows of history.csv: phase `repeated`, step (tokens, at least), metrics `targets` and `nats`.
    """
    kinds = np.searchsorted(REPEATED, repeated(stream, train), side="right") - 1
    rows = []
    for kind, least in enumerate(REPEATED):
        nats = losses[kinds == kind].astype(np.float64)
        values = {"targets": len(nats)} | ({"nats": nats.mean()} if len(nats) else {})
        rows += [{"phase": "repeated", "step": least, "metric": m, "value": v} for m, v in values.items()]
    return rows


def repeated(stream: Stream, train: Stream) -> np.ndarray:
    """Of every target [T - 1], how many of the tokens right before it, in its sample, stand together in `train`.

    At most the last of `REPEATED`; of a sample's first token 0.
    """
    tokens, trained = np.concatenate([train.tokens, stream.tokens]).astype(np.int64), len(train)
    place, length, runs = positions_in_samples(stream.samples), np.zeros(len(stream), int), tokens
    for k in range(1, REPEATED[-1] + 1):
        if k > 1:  # a number for every run of k tokens, where it ends: of the run of k - 1 before, and the token
            _, runs = np.unique(np.roll(runs, 1) * VOCABULARY + tokens, return_inverse=True)
        known = np.isin(runs[trained:], runs[k - 1 : trained])
        length[known & (place >= k - 1) & (length == k - 1)] = k
    return np.where(place > 0, np.roll(length, 1), 0)[1:]


def bits_per_byte(table: pd.DataFrame) -> float:
    """Bits for each byte of the text, from `losses_by_sample`: what tokenisers of any vocabulary can be compared by."""
    return table["loss_sum"].sum() / math.log(2) / table["bytes"].sum()


@dataclass(frozen=True)
class Baseline:
    """A model to set beside the context model, counted or trained: how it is judged, and what its run writes."""

    judge: Callable[[np.ndarray], tuple[np.ndarray, float]]
    """Tokens [T] → every target's loss, nats, float32 [T - 1], and the accuracy (top-1, a fraction)."""
    columns: dict[str, Any]
    """Of metrics.json."""
    history: list[dict]
    """Rows phase, step, metric, value."""
    weights: dict[str, Tensor]
