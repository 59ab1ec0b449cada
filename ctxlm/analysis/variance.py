"""How large chance is: what initialisation, training text and validation text each do to the loss.

In a grid with several windows of training text and, in each, several seeds of its own, an analysis of variance nested
within configuration and size gives each one's share by the method of moments (Searle, Casella & McCulloch, 1992).
Sizes share seeds and windows, so their mean squares are averaged and count once.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from ctxlm.analysis.replicates import critical
from ctxlm.analysis.scaling import ratio_error


def components(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation of log PPL by source: columns source, sd, low, high, dof.

    Rows: `seed` (between seeds of one window, with all that only they change), `data_seed` (between windows, beyond
    what the seeds explain; 0 where the estimate is negative), `run` (both together: one run against its kind), and
    `validation` (the error of a run's mean over the validation samples, which all runs share). The interval of `seed`
    is chi-square's; of the others none is given.

    Raises:
        ValueError: not every configuration and size has two windows or more, with the same two seeds or more in each.
    """
    cells = ["experiment", "train_tokens"]
    seeds = runs.groupby([*cells, "data_seed"])["seed"].nunique().unstack()
    count, windows = seeds.iloc[0, 0] if len(seeds) else 0, seeds.shape[1]
    shared = runs.groupby("seed")["data_seed"].nunique().max()
    complete = windows >= 2 and count >= 2 and (seeds == count).all(axis=None) and len(runs) == count * seeds.size
    if not complete or shared > 1:
        raise ValueError("it takes two training windows or more, each with as many seeds of its own, two or more")
    by_window = runs.groupby([*cells, "data_seed"])["val_loss"].agg(["mean", "var"])
    within = float(by_window["var"].mean())
    between = count * float(by_window["mean"].groupby(cells).var().mean())
    configurations = runs["experiment"].nunique()
    dof = configurations * windows * (count - 1)
    low, high = (math.sqrt(dof * within / stats.chi2.ppf(q, dof)) for q in (0.975, 0.025))
    window = math.sqrt(max(between - within, 0) / count)
    errors = [sampling_error(part) for _, part in val_by_sample.groupby("run")]
    samples = val_by_sample.groupby("run")["sample"].nunique().min()
    rows = [
        ("seed", math.sqrt(within), low, high, dof),
        ("data_seed", window, math.nan, math.nan, windows - 1),
        ("run", math.hypot(math.sqrt(within), window), math.nan, math.nan, windows - 1),
        ("validation", float(np.sqrt(np.mean(np.square(errors)))), math.nan, math.nan, int(samples - 1)),
    ]
    return pd.DataFrame(rows, columns=["source", "sd", "low", "high", "dof"])


def sampling_error(val_by_sample: pd.DataFrame) -> float:
    """Standard error of one run's mean loss over the choice of validation samples (ratio estimator; Cochran, 1977)."""
    return ratio_error(val_by_sample["loss_sum"].to_numpy(), val_by_sample["tokens"].to_numpy())


def resolution(val_by_sample_a: pd.DataFrame, val_by_sample_b: pd.DataFrame, samples: int = 50) -> float:
    """The smallest observed difference in log PPL that so many validation samples can tell from 0, compared in pairs.

    The half-width of the 95 % interval (Student's), from the spread of the differences of the two runs at hand, whose
    samples are taken as typical.
    """
    a, b = (table.groupby("sample")[["loss_sum", "tokens"]].mean() for table in (val_by_sample_a, val_by_sample_b))
    error = ratio_error((a["loss_sum"] - b["loss_sum"]).to_numpy(), a["tokens"].to_numpy())
    return error * math.sqrt(len(a) / samples) * critical(samples - 1)


def effective_samples(val_by_sample: pd.DataFrame) -> float:
    """How many samples of equal length would weigh as much as these (Kish, 1965)."""
    tokens = val_by_sample.groupby("sample")["tokens"].first()
    return float(tokens.sum() ** 2 / np.square(tokens).sum())
