"""Two laws at once: does the slope differ, and where do they meet? Three answers with their errors.

The pooled model log PPL = a + b·[second] + α·log tokens + δ·[second]·log tokens (Chow, 1960) gives the difference of
the slopes, δ, and the crossover −b / δ, with its interval by the delta method and by Fieller's theorem (Fieller, 1954),
which also says when the data bound it on one side only, or not at all. Both take the errors of runs as independent and
of equal size. The bootstrap does not: it draws runs within configuration and size, and validation samples for all at
once.
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from ctxlm.analysis.scaling import (
    CONFIDENCE,
    MOST_TOKENS,
    draw_runs,
    draw_samples,
    extrapolate,
    fit_saturating,
    percentile_interval,
    robust_interval,
)

MOST_LOG = math.log(MOST_TOKENS)


@dataclass(frozen=True)
class Pooled:
    """The pooled model of two configurations; intervals are 95 % and Student's with `residual_dof`, or None."""

    a: str
    b: str
    n: int
    residual_dof: int
    slope_difference: float
    """α of b minus α of a."""
    slope_interval: tuple[float, float] | None
    slope_interval_robust: tuple[float, float] | None
    """With HC3 errors (MacKinnon & White, 1985), for errors of unequal size."""
    p_value: float | None
    """Of the hypothesis that the slopes are equal (t test)."""
    crossover_tokens: float | None
    delta_interval: tuple[float, float] | None
    """Of the crossover, by the delta method on its logarithm."""
    fieller: str
    """bounded: it lies in the interval; outside: beyond either end of it; unbounded: the data say nothing."""
    fieller_interval: tuple[float, float] | None
    reason: str | None


def pooled(runs: pd.DataFrame, a: str, b: str) -> Pooled:
    """The pooled model of the configurations `a` and `b`; `runs` has experiment, train_tokens and val_loss.

    Raises:
        ValueError: a configuration has runs of fewer than two sizes, or a loss is not a finite number.
    """
    part = runs[runs["experiment"].isin([a, b])]
    sizes = part.groupby("experiment")["train_tokens"].nunique().reindex([a, b], fill_value=0)
    if sizes.min() < 2:
        raise ValueError(f"{sizes.idxmin()} has runs of {sizes.min()} size(s): a slope needs two")
    if not np.isfinite(part["val_loss"]).all():
        raise ValueError(f"run {part['run'][~np.isfinite(part['val_loss'])].iloc[0]} has no finite loss: drop it")
    second = (part["experiment"] == b).to_numpy(float)
    log_tokens = np.log(part["train_tokens"].to_numpy(float))
    middle = log_tokens.mean()  # centred, so that the products are not nearly collinear
    x = np.column_stack([np.ones_like(second), second, log_tokens - middle, second * (log_tokens - middle)])
    fit = sm.OLS(part["val_loss"].to_numpy(float), x).fit()
    dof, (_, shift, _, slope) = int(fit.df_resid), fit.params
    exact = dof < 1 or fit.scale < 1e-20  # no error can be estimated
    found = {"a": a, "b": b, "n": len(part), "residual_dof": dof, "slope_difference": float(slope)}
    log_tokens = middle - shift / slope if abs(slope) > 1e-9 else math.inf
    meets = 0 <= log_tokens <= MOST_LOG
    found |= {
        "crossover_tokens": math.exp(log_tokens) if meets else None,
        "reason": None if meets else "the slopes hardly differ",
    }
    if exact:
        none = dict.fromkeys(("slope_interval", "slope_interval_robust", "p_value", "delta_interval"))
        return Pooled(**found, **none, fieller="unbounded", fieller_interval=None)
    t = stats.t.ppf((1 + CONFIDENCE) / 2, dof)
    cov = fit.cov_params()[np.ix_([1, 3], [1, 3])]
    gradient = np.array([-1 / slope, shift / slope**2])
    spread = t * math.sqrt(gradient @ cov @ gradient)
    kind, ends = _fieller(shift, slope, cov, t)
    return Pooled(
        **found,
        slope_interval=(float(slope - t * fit.bse[3]), float(slope + t * fit.bse[3])),
        slope_interval_robust=robust_interval(fit, 3),
        p_value=float(fit.pvalues[3]),
        delta_interval=_tokens(log_tokens - spread, log_tokens + spread) if meets else None,
        fieller=kind,
        fieller_interval=ends and _tokens(middle + ends[0], middle + ends[1]),
    )


def _fieller(shift: float, slope: float, cov: np.ndarray, t: float) -> tuple[str, tuple[float, float] | None]:
    """The x for which shift + slope·x is not significantly different from 0: a quadratic inequality."""
    square = slope**2 - t**2 * cov[1, 1]
    half = shift * slope - t**2 * cov[0, 1]
    rest = shift**2 - t**2 * cov[0, 0]
    discriminant = half**2 - square * rest
    if square == 0 or (square < 0 and discriminant <= 0):
        return "unbounded", None
    low, high = sorted((-half + sign * math.sqrt(max(discriminant, 0))) / square for sign in (-1, 1))
    return ("bounded" if square > 0 else "outside"), (low, high)


def _tokens(low: float, high: float) -> tuple[float, float]:
    """exp of both, kept within what can be a number of tokens."""
    return tuple(math.exp(min(max(x, 0.0), MOST_LOG)) for x in (low, high))


@dataclass(frozen=True)
class Bootstrap:
    """Laws of every configuration in `draws` draws of runs and validation samples."""

    alpha: dict[str, np.ndarray]
    log_a: dict[str, np.ndarray]
    runs_drawn: bool
    """False where every size has a single run: then only the validation samples are drawn."""
    dof: int
    """Of the spread between runs, or between samples where those alone are drawn."""

    def interval(self, label: str) -> tuple[float, float]:
        """95 % interval of a configuration's exponent, as all here from percentiles, expanded for few runs."""
        return percentile_interval(self.alpha[label], self.dof)

    def slope_difference(self, a: str, b: str) -> tuple[float, float]:
        """95 % interval of α of b minus α of a."""
        return percentile_interval(self.alpha[b] - self.alpha[a], self.dof)

    def crossover(self, a: str, b: str) -> tuple[float, tuple[float, float] | None]:
        """Share of draws whose laws meet nowhere between one token and 10¹⁵, and the 95 % interval over the others."""
        slope = self.alpha[a] - self.alpha[b]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_tokens = (self.log_a[b] - self.log_a[a]) / slope
        meets = np.isfinite(log_tokens) & (log_tokens >= 0) & (log_tokens <= MOST_LOG)
        interval = tuple(math.exp(x) for x in percentile_interval(log_tokens[meets], self.dof)) if meets.any() else None
        return 1 - float(meets.mean()), interval


def bootstrap(runs: pd.DataFrame, val_by_sample: pd.DataFrame, draws: int = 2000, seed: int = 0) -> Bootstrap:
    """Draw runs within configuration and size, crossed with validation samples, and fit every law anew.

    One draw of samples serves all runs, as they were judged on the same ones.

    Args:
        runs: columns run, experiment, train_tokens, val_loss.
        val_by_sample: columns run, sample, loss_sum (nats), tokens; of the same samples for every run.

    Raises:
        ValueError: the runs were not judged on the same samples, or a configuration has fewer than two sizes.
    """
    sums = val_by_sample.pivot(index="run", columns="sample", values="loss_sum").reindex(runs["run"])
    counts = val_by_sample.pivot(index="run", columns="sample", values="tokens").reindex(runs["run"])
    if sums.isna().any(axis=None) or (counts.nunique() > 1).any():
        raise ValueError("the runs were judged on different validation tokens: compare runs of one grid")
    few = runs.groupby("experiment")["train_tokens"].nunique()
    if few.min() < 2:
        raise ValueError(f"{few.idxmin()} has runs of a single size: a slope needs two")
    rng = np.random.default_rng(seed)
    losses = draw_samples(sums.to_numpy(float), counts.iloc[0].to_numpy(float), draws, rng)
    alpha, log_a = {}, {}
    cells = runs.reset_index(drop=True).groupby(["experiment", "train_tokens"]).indices
    for label in few.index:
        own = {tokens: members for (experiment, tokens), members in cells.items() if experiment == label}
        weights = np.array([len(members) for members in own.values()])  # a cell weighs as many runs as it has
        x = np.log(list(own))
        y = np.column_stack([draw_runs(losses[:, members], rng) for members in own.values()])
        centred = x - np.average(x, weights=weights)
        alpha[label] = y @ (weights * centred) / (weights @ centred**2)
        log_a[label] = np.average(y, axis=1, weights=weights) - alpha[label] * np.average(x, weights=weights)
    spare = len(runs) - len(cells)
    return Bootstrap(alpha, log_a, runs_drawn=spare > 0, dof=spare or max(sums.shape[1] - 1, 1))


def errors(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> dict[str, Any]:
    """What analysis.json holds about forms and errors, beside `scaling.summarise`: each entry with a `reason` or None.

    `forms`: by configuration, the saturating form and what both forms foretell of held-out sizes; `pooled`: by pair of
    configurations, the pooled model and the bootstrap's intervals and share of draws without a crossover.
    """
    if runs.empty:
        return {"forms": {}, "pooled": []}
    forms, pairs = {}, []
    for label, group in runs.groupby("experiment"):
        form: dict[str, Any] = {"reason": None, "saturating": None, "extrapolated": []}
        try:
            form["extrapolated"] = extrapolate(group["train_tokens"], group["val_ppl"])
            form["saturating"] = asdict(fit_saturating(group["train_tokens"], group["val_ppl"]))
        except ValueError as error:
            form["reason"] = str(error)
        forms[label] = form
    for a, b in itertools.combinations(forms, 2):
        both = runs[runs["experiment"].isin([a, b])]
        try:
            found = asdict(pooled(both, a, b))
            drawn = bootstrap(both, val_by_sample[val_by_sample["run"].isin(both["run"])])
            share, interval = drawn.crossover(a, b)
            found |= {"bootstrap_slope": drawn.slope_difference(a, b), "bootstrap_runs": drawn.runs_drawn}
            found |= {"bootstrap_crossover": interval, "bootstrap_without": share}
        except ValueError as error:
            found = {"a": a, "b": b, "reason": str(error), "residual_dof": None}
        pairs.append(found)
    return {"forms": forms, "pooled": pairs}
