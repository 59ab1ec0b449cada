"""How large chance is: what initialisation, training text and validation text each do to the loss.

In a grid with several windows of training text and, in each, several seeds of its own, an analysis of variance nested
within configuration and size gives each one's share by the method of moments (Searle, Casella & McCulloch, 1992).
Sizes share seeds and windows, so their mean squares are averaged and count once.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from ctxlm.analysis.replicates import CONFIDENCE, critical
from ctxlm.analysis.scaling import effective, ratio_error, satterthwaite

TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
SOURCES = {
    "seed": "initialisation and noise",
    "data_seed": "training text",
    "run": "both together: a single run",
    "validation": "validation samples (alike for all runs)",
}
"""Of chance, as `components` names them, in words."""


def components(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation of log PPL by source: columns source, sd, low, high, dof.

    Rows: `seed` (between seeds of one window, with all that only they change), `data_seed` (between windows, beyond
    what the seeds explain; 0 where the estimate is negative), `run` (both together: one run against its kind), and
    `validation` (the error of a run's mean over the validation samples, which all runs share). 95 % intervals: of
    `seed` chi-square's, of `data_seed` Williams's (1962), of `run` chi-square's with Satterthwaite's degrees of freedom
    (1946); of `validation` chi-square's, with those of as many samples as these weigh (approximate).

    Raises:
        ValueError: as `mean_squares`.
    """
    within, between, dof, windows, count = mean_squares(runs)
    window = math.sqrt(max(between - within, 0) / count)
    run = math.hypot(math.sqrt(within), window)
    run_dof = satterthwaite((within * (1 - 1 / count), dof), (between / count, windows - 1))
    errors = [sampling_error(part) for _, part in val_by_sample.groupby("run")]
    weigh = min(effective(part["tokens"]) for _, part in val_by_sample.groupby("run"))
    samples, samples_dof = float(np.sqrt(np.mean(np.square(errors)))), max(weigh - 1, 1)
    rows = [
        ("seed", math.sqrt(within), *_chi_square(within, dof), dof),
        ("data_seed", window, *_williams(between, within, windows - 1, dof, count), windows - 1),
        ("run", run, *_chi_square(run**2, run_dof), run_dof),
        ("validation", samples, *_chi_square(samples**2, samples_dof), samples_dof),
    ]
    return pd.DataFrame(rows, columns=["source", "sd", "low", "high", "dof"])


def mean_squares(runs: pd.DataFrame) -> tuple[float, float, int, int, int]:
    """Mean squares of the loss within and between training windows, the first one's degrees of freedom, the windows,
    and the seeds in each.

    Raises:
        ValueError: not every configuration and size has two windows or more, with the same two seeds or more in each,
            or runs of a window do not differ.
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
    if within == 0:
        raise ValueError("all runs of a window are alike: nothing can be said of chance")
    return within, between, runs["experiment"].nunique() * windows * (count - 1), windows, count


def ratio_interval(runs: pd.DataFrame) -> tuple[float, float]:
    """95 % interval of training text's variance over initialisation's, by F (Searle et al., 1992).

    Exact for normal effects of one size and configuration; of several, whose mean squares are averaged, approximate.

    Raises:
        ValueError: as `mean_squares`.
    """
    within, between, dof, windows, count = mean_squares(runs)
    low, high = (between / within / stats.f.ppf(q, windows - 1, dof) for q in TAILS[::-1])
    return max(low - 1, 0) / count, max(high - 1, 0) / count


def _chi_square(variance: float, dof: float) -> tuple[float, float]:
    """95 % interval of a standard deviation from a variance of normal values with `dof` degrees of freedom."""
    low, high = (math.sqrt(dof * variance / stats.chi2.ppf(q, dof)) for q in TAILS[::-1])
    return low, high


def _williams(between: float, within: float, dof_between: int, dof_within: int, count: int) -> tuple[float, float]:
    """95 % interval of the standard deviation between groups of `count`, from both mean squares (Williams, 1962)."""
    low, high = (
        dof_between * (between - stats.f.ppf(q, dof_between, dof_within) * within) / stats.chi2.ppf(q, dof_between)
        for q in TAILS[::-1]
    )
    return math.sqrt(max(low, 0) / count), math.sqrt(max(high, 0) / count)


def sampling_error(val_by_sample: pd.DataFrame) -> float:
    """Standard error of one run's mean loss over the choice of validation samples (ratio estimator; Cochran, 1977)."""
    return ratio_error(val_by_sample["loss_sum"].to_numpy(), val_by_sample["tokens"].to_numpy())


def resolution(val_by_sample_a: pd.DataFrame, val_by_sample_b: pd.DataFrame, samples: int = 50) -> float:
    """The smallest observed difference in log PPL that so many validation samples can tell from 0, compared in pairs.

    The half-width of the 95 % interval (Student's, with the degrees of freedom of as many samples as these weigh), from
    the spread of the differences of the two runs at hand, whose samples are taken as typical.
    """
    a, b = (table.groupby("sample")[["loss_sum", "tokens"]].mean() for table in (val_by_sample_a, val_by_sample_b))
    error = ratio_error((a["loss_sum"] - b["loss_sum"]).to_numpy(), a["tokens"].to_numpy())
    weigh = samples * effective(a["tokens"]) / len(a)
    return error * math.sqrt(len(a) / samples) * critical(max(weigh - 1, 1))
