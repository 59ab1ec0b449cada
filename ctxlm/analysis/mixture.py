"""A model and an n-gram, or a cache of the words read, mixed: from what runs left of every validation token.

Language models of different kinds err on different tokens, so that a mixture is better than either (Jelinek & Mercer,
1980, for n-grams; Mikolov et al., 2010, for networks with n-grams; Kuhn & de Mori, 1990, for a cache).
"""

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ctxlm.analysis.runs import load_val_losses
from ctxlm.analysis.scaling import Grid
from ctxlm.corpus import load_corpus
from ctxlm.metrics import losses_by_sample

CACHE_DECAY, CACHE_SHARE = 0.99, 0.05
"""Of `cached`: chosen for the slow recipe on held-out training text (LOG.md)."""
CACHED = " + cache"
"""What `cached` adds to a label."""
UNKNOWN = ("val_accuracy", "test_loss", "test_ppl", "test_accuracy")
UNKNOWN += ("best_epoch", "epochs_run", "last_val_ppl", "overfit_rate")
"""What the losses of the best epoch's validation tokens do not say of a mixture."""


def mixtures(grids: Sequence[tuple[str, Grid]], ngrams: tuple[str, Grid], labels: Sequence[str]) -> Grid:
    """Every run of `grids` in equal shares with each n-gram of these `labels` that counted the same training tokens.

    Equal shares are set, not searched: no text is needed to choose them. A mixture's row is its model's, but for label,
    loss and PPL, and for `UNKNOWN`. Pairs without both runs' `val_losses.npz`, or judged on other tokens, are left out.

    Args:
        grids: name and tables (`scaling.read_grid`) of the models' grids.
        ngrams: the same of the n-grams' grid.
        labels: which of its n-grams.

    Returns:
        Runs, an empty history, and losses by validation sample, as `scaling.read_grid` gives them.
    """
    mixed, (name, (known, *_)) = [], ngrams
    known = known[known["experiment"].isin(labels)] if len(known) else known
    for grid, (models, *_) in grids:
        if models.empty or known.empty:
            continue
        pairs = models.merge(known, on=["corpus", "train_tokens", "data_seed"], suffixes=("", "_ngram"))
        for _, pair in pairs.iterrows():
            ours, theirs = load_val_losses(grid, pair["run"]), load_val_losses(name, pair["run_ngram"])
            if ours is None or theirs is None or not np.array_equal(ours["sample"], theirs["sample"]):
                continue
            loss = np.log(2) - np.logaddexp(-ours["loss"].astype(float), -theirs["loss"].astype(float))
            mixed.append(_mixed(grid, pair, f" + {pair['experiment_ngram']}", loss, ours["sample"]))
    return _grid(mixed)


def cached(grids: Sequence[tuple[str, Grid]], decay: float = CACHE_DECAY, share: float = CACHE_SHARE) -> Grid:
    """Every run of `grids` with a cache: p = (1 − share) · p_model + share · p_cache, as `mixtures` gives its own.

    Runs without `val_losses.npz`, or judged on other tokens than whole samples of their corpus, are left out.

    Args:
        grids: name and tables (`scaling.read_grid`) of the models' grids.
        decay: of the cache, as `cache_probabilities` explains it.
        share: of the cache in every token's probability.
    """
    mixed, corpus = [], functools.cache(load_corpus)  # read once, for many runs
    for grid, (models, *_) in grids:
        for _, model in models.iterrows():
            ours = load_val_losses(grid, model["run"])
            if ours is None:
                continue
            sample = ours["sample"]
            tokens = corpus(model["corpus"]).stream(int(sample[0]), int(sample[-1]) + 1).tokens
            if len(tokens) != len(sample) + 1:
                continue
            with np.errstate(divide="ignore"):  # what has not been read has no share in the cache
                cache = np.log(share * cache_probabilities(tokens, decay))
            loss = -np.logaddexp(np.log1p(-share) - ours["loss"].astype(float), cache)
            mixed.append(_mixed(grid, model, CACHED, loss, sample))
    return _grid(mixed)


def cache_probabilities(tokens: np.ndarray, decay: float) -> np.ndarray:
    """What a cache of the tokens read gives to the next one, float64 [N − 1], for `tokens` [N].

    A token's probability is its share of all that have been read, each weighing `decay` times as much as the one after
    it (Clarkson & Robinson, 1997). The cache is empty before the first token, and goes on from sample to sample.
    """
    last: dict[int, tuple[int, float]] = {}  # of every token its last position, and its weight there
    weights = np.empty(len(tokens))
    for position, token in enumerate(tokens.tolist()):
        before, weight = last.get(token, (position, 0.0))
        weights[position] = weight * decay ** (position - before)
        last[token] = (position, weights[position] + 1.0)
    return weights[1:] / np.cumsum(decay ** np.arange(len(tokens) - 1)) / decay


def _mixed(grid: str, model: pd.Series, added: str, loss: np.ndarray, sample: np.ndarray) -> tuple[dict, pd.DataFrame]:
    """A mixture's row, the model's but for label, loss, PPL and `UNKNOWN`, and its losses by sample."""
    label = model["experiment"] + added
    row = model.to_dict() | dict.fromkeys(UNKNOWN, np.nan)
    row |= {"experiment": label, "configuration": label, "run": f"{grid}: {model['run']}{added}"}
    row |= {"val_loss": loss.mean(), "val_ppl": np.exp(loss.mean())}
    own = {name: row[name] for name in ("run", "experiment", "train_tokens", "seed", "replicate")}
    return row, losses_by_sample(loss, sample).assign(**own)


def _grid(mixed: list[tuple[dict, pd.DataFrame]]) -> Grid:
    if not mixed:
        return pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    rows, tables = zip(*mixed, strict=True)
    return pd.DataFrame(list(rows)), pd.DataFrame(columns=["run"]), pd.concat(tables, ignore_index=True)
