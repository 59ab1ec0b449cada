"""How large chance is: what initialisation, training text and validation text each do to the loss.

In a grid whose seeds and training windows are crossed within every configuration and size, a two-way analysis of
variance without interaction, pooled over the cells, gives each one's share (Searle, Casella & McCulloch, 1992). What
the two do together is the residual.
"""

import math

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.anova import anova_lm

from ctxlm.analysis.scaling import CONFIDENCE, ratio_error

SOURCES = {"seed": "initialisation and noise (seed)", "data_seed": "training text (data_seed)"}


def components(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation of log PPL by source: columns source, sd, dof, p_value, with what there is to say in `how`.

    Rows: `seed`, `data_seed` (method of moments; 0 where the estimate is negative; the F test asks whether it is 0),
    `residual`, `validation` (the error of a mean over the validation samples, which all runs share) and
    `configuration` (root mean square of the cells' deviations from their size's mean).

    Raises:
        ValueError: seeds and windows are not crossed: every configuration and size needs the same two or more of each.
    """
    table = runs.assign(cell=runs["experiment"] + " " + runs["train_tokens"].astype(str))
    crossed = table.groupby("cell").apply(lambda g: frozenset(zip(g["seed"], g["data_seed"], strict=True)))
    seeds, windows = table["seed"].nunique(), table["data_seed"].nunique()
    if min(seeds, windows) < 2 or crossed.nunique() > 1 or len(table) != len(crossed) * seeds * windows:
        raise ValueError("seed and data_seed are not crossed: every size needs a run of each pair, two of each or more")
    # Each cell has seeds and windows of its own: a seed means other weights in another width.
    fit = smf.ols("val_loss ~ C(cell) + C(cell):C(seed) + C(cell):C(data_seed)", table).fit()
    found = anova_lm(fit, typ=1)
    mean_square = found["sum_sq"] / found["df"]
    rest = float(mean_square["Residual"])
    rows = []
    for name, others in (("seed", windows), ("data_seed", seeds)):
        term = f"C(cell):C({name})"
        variance = (float(mean_square[term]) - rest) / others
        p_value = float(stats.f.sf(mean_square[term] / rest, found.loc[term, "df"], found.loc["Residual", "df"]))
        rows.append((name, math.sqrt(max(variance, 0)), int(found.loc[term, "df"]), p_value))
    rows.append(("residual", math.sqrt(rest), int(found.loc["Residual", "df"]), None))
    errors = [sampling_error(part) for _, part in val_by_sample.groupby("run")]
    samples = val_by_sample.groupby("run")["sample"].nunique().min()
    rows.append(("validation", float(np.sqrt(np.mean(np.square(errors)))), int(samples - 1), None))
    means = table.groupby(["train_tokens", "experiment"])["val_loss"].mean().unstack()
    spread = means.sub(means.mean(axis=1), axis=0).to_numpy()
    rows.append(("configuration", float(np.sqrt(np.mean(spread**2))), means.shape[1] - 1, None))
    return pd.DataFrame(rows, columns=["source", "sd", "dof", "p_value"])


def sampling_error(val_by_sample: pd.DataFrame) -> float:
    """Standard error of one run's mean loss over the choice of validation samples (ratio estimator; Cochran, 1977)."""
    return ratio_error(val_by_sample["loss_sum"].to_numpy(), val_by_sample["tokens"].to_numpy())


def resolution(val_by_sample_a: pd.DataFrame, val_by_sample_b: pd.DataFrame, samples: int = 50) -> float:
    """The smallest difference in log PPL that so many validation samples can tell from 0, compared in pairs.

    The half-width of the 95 % interval (Student's), from the spread of the differences of the two runs at hand, whose
    samples are taken as typical.
    """
    a, b = (table.groupby("sample")[["loss_sum", "tokens"]].mean() for table in (val_by_sample_a, val_by_sample_b))
    error = ratio_error((a["loss_sum"] - b["loss_sum"]).to_numpy(), a["tokens"].to_numpy())
    return error * math.sqrt(len(a) / samples) * stats.t.ppf((1 + CONFIDENCE) / 2, samples - 1)
