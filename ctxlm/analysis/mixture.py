"""A model and an n-gram mixed: p = (p_model + p_n-gram) / 2, from what both runs left of every validation token.

Language models of different kinds err on different tokens, so that a mixture is better than either (Jelinek & Mercer,
1980, for n-grams; Mikolov et al., 2010, for networks with n-grams). Equal shares are set, not searched: no text is
needed to choose them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from ctxlm.analysis.scaling import Grid
from ctxlm.results import load_val_losses, losses_by_sample

UNKNOWN = ("val_accuracy", "test_loss", "test_ppl", "test_accuracy")
UNKNOWN += ("best_epoch", "epochs_run", "last_val_ppl", "overfit_rate")
"""What the losses of the best epoch's validation tokens do not say of a mixture."""

MIXED_ORDER = "mixed_order"
"""The column that holds the order of a mixture's n-gram."""


def mixtures(grids: Sequence[tuple[str, Grid]], ngrams: tuple[str, Grid], labels: Sequence[str]) -> Grid:
    """Every run of `grids` in equal shares with each n-gram of these `labels` that counted the same training tokens.

    A mixture's row is its model's, but for label, loss, PPL and seconds, for what the n-gram reads, and for `UNKNOWN`.
    Pairs without both runs' `val_losses.npz`, or judged on other tokens, are left out.

    Args:
        grids: name and tables (`scaling.read_grid`) of the models' grids.
        ngrams: the same of the n-grams' grid.
        labels: which of its n-grams.

    Returns:
        Runs, an empty history, and losses by validation sample, as `scaling.read_grid` gives them.
    """
    runs, tables = [], []
    for grid, model, ngram in _pairs(grids, ngrams[1][0], labels):
        ours, theirs = load_val_losses(grid, model["run"]), load_val_losses(ngrams[0], ngram["run"])
        if ours is None or theirs is None or not np.array_equal(ours["sample"], theirs["sample"]):
            continue
        loss = np.log(2) - np.logaddexp(-ours["loss"].astype(float), -theirs["loss"].astype(float))
        label = f"{model['experiment']} + {ngram['experiment']}"
        mixed = model.to_dict() | dict.fromkeys(UNKNOWN, np.nan)
        mixed |= {"experiment": label, "configuration": label, "run": f"{grid}: {model['run']} + {ngram['run']}"}
        mixed |= {"val_loss": loss.mean(), "val_ppl": np.exp(loss.mean())}
        mixed |= {MIXED_ORDER: ngram["ngram_order"], "ngram_second_half": ngram["ngram_second_half"]}
        mixed["total_seconds"] += ngram["total_seconds"]
        runs.append(mixed)
        own = {name: mixed[name] for name in ("run", "experiment", "train_tokens", "seed", "replicate")}
        tables.append(losses_by_sample(loss, ours["sample"]).assign(**own))
    if not runs:
        return pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    return pd.DataFrame(runs), pd.DataFrame(columns=["run"]), pd.concat(tables, ignore_index=True)


def _pairs(
    grids: Sequence[tuple[str, Grid]], ngrams: pd.DataFrame, labels: Sequence[str]
) -> Iterator[tuple[str, pd.Series, pd.Series]]:
    """Grid, run of a model and run of an n-gram, which were given the same training tokens."""
    for grid, (models, *_) in grids:
        for _, model in models.iterrows():
            for _, ngram in ngrams.iterrows():
                same = all(model[name] == ngram[name] for name in ("corpus", "train_tokens", "data_seed"))
                if same and ngram["experiment"] in labels:
                    yield grid, model, ngram
