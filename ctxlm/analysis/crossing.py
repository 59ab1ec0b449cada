"""Two laws at once: does the slope differ, and where do they meet? Three answers with their errors.

The pooled model log PPL = a + b·[second] + α·log tokens + δ·[second]·log tokens (Chow, 1960) gives the difference of
the slopes, δ, and the crossover −b / δ. It is fitted in every replicate by itself; the spread of (b, δ) over the
replicates gives their errors. A single replicate leaves the residuals, which take runs as independent, or, where every
run of one has a partner of equal size, seed and text, the pairs' differences: what a pair shares is no error then. The
crossover's interval comes from the delta method and from Fieller's theorem (Fieller, 1954), which also says when the
data put it in no single range, and from a bootstrap that draws replicates crossed with validation samples.
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from ctxlm.analysis.replicates import balanced, critical, each
from ctxlm.analysis.scaling import (
    CELL,
    MOST_TOKENS,
    beyond,
    draw_replicates,
    draw_samples,
    extrapolate,
    fit_saturating,
    loss_sums,
    mean_loss,
    percentile_interval,
    robust_interval,
)

MOST_LOG = math.log(MOST_TOKENS)


@dataclass(frozen=True)
class Pooled:
    """The pooled model of two configurations; intervals are 95 % and Student's with `dof`, or None."""

    a: str
    b: str
    n: int
    replicates: int
    dof: int
    """Replicates − 1; with a single one, the fit's residual degrees of freedom."""
    pairs: int | None
    """With a single replicate: of runs of equal size, seed and text, whose differences are fitted; or None."""
    slope_difference: float
    """α of b minus α of a."""
    slope_interval: tuple[float, float] | None
    slope_interval_robust: tuple[float, float] | None
    """With HC3 errors (MacKinnon & White, 1985), for errors of unequal size; with a single replicate only."""
    p_value: float | None
    """Of the hypothesis that the slopes are equal (t test)."""
    crossover_tokens: float | None
    delta_interval: tuple[float | None, float | None] | None
    """Of the crossover, by the delta method on its logarithm; only where Fieller's set is bounded."""
    fieller: str | None
    """From 1 to 10¹⁵ tokens the crossover lies: bounded: in the interval; outside: anywhere but in it; unbounded:
    anywhere; nowhere. None: no error."""
    fieller_interval: tuple[float | None, float | None] | None
    """An end below 1 token or beyond 10¹⁵ is None; there is one within."""
    reason: str | None
    """Why there is no crossover."""


def pooled(runs: pd.DataFrame, a: str, b: str) -> Pooled:
    """The pooled model of the configurations `a` and `b`; `runs` has experiment, train_tokens, val_loss, replicate.

    Raises:
        ValueError: a configuration has runs of fewer than two sizes, or a loss is not a finite number.
    """
    part = runs[runs["experiment"].isin([a, b])]
    sizes = part.groupby("experiment")["train_tokens"].nunique().reindex([a, b], fill_value=0)
    if sizes.min() < 2:
        raise ValueError(f"{sizes.idxmin()} has runs of {sizes.min()} size(s): a slope needs two")
    if not np.isfinite(part["val_loss"]).all():
        raise ValueError(f"run {part['run'][~np.isfinite(part['val_loss'])].iloc[0]} has no finite loss: drop it")
    middle = float(np.log(part["train_tokens"]).mean())

    def fit(some: pd.DataFrame) -> Any:
        return sm.OLS(some["val_loss"].to_numpy(float), _design(some, b, middle)).fit()

    pairs = _pairs(part, a, b)
    if balanced(part, "experiment", "train_tokens"):
        pairs = None
        own = each(part, lambda some: fit(some).params[[1, 3]])
        (shift, slope), count = own.mean(0), len(own)
        cov, dof, robust = np.cov(own.T) / count, count - 1, None
    else:
        whole, own = fit(part), [1, 3]
        if pairs is not None:
            x = np.log(pairs.index.get_level_values("train_tokens").to_numpy(float)) - middle
            whole, own = sm.OLS(pairs.to_numpy(), sm.add_constant(x)).fit(), [0, 1]
        (shift, slope), count, dof = whole.params[own], 1, int(whole.df_resid)
        cov = whole.cov_params()[np.ix_(own, own)] if dof > 0 else None
        robust = robust_interval(whole, own[1]) if dof > 0 else None
    found = {"a": a, "b": b, "n": len(part), "replicates": count, "dof": dof, "slope_difference": float(slope)}
    found["pairs"] = None if pairs is None else len(pairs)
    log_tokens = middle - shift / slope if abs(slope) > 1e-9 else math.inf
    meets = 0 <= log_tokens <= MOST_LOG
    reason = None if meets else "the laws are parallel" if math.isinf(log_tokens) else beyond(log_tokens)
    found |= {"crossover_tokens": math.exp(log_tokens) if meets else None, "reason": reason}
    if cov is None or cov[1, 1] <= 1e-20:  # no error can be estimated
        names = ("slope_interval", "slope_interval_robust", "p_value", "delta_interval", "fieller", "fieller_interval")
        return Pooled(**found, **dict.fromkeys(names))
    t, error = critical(dof), math.sqrt(cov[1, 1])
    kind, ends = _within(middle, *_fieller(shift, slope, cov, t))
    gradient = np.array([-1 / slope, shift / slope**2])
    spread = t * math.sqrt(gradient @ cov @ gradient)
    return Pooled(
        **found,
        slope_interval=(float(slope - t * error), float(slope + t * error)),
        slope_interval_robust=robust,
        p_value=float(2 * stats.t.sf(abs(slope) / error, dof)),
        delta_interval=_tokens(log_tokens - spread, log_tokens + spread) if meets and kind == "bounded" else None,
        fieller=kind,
        fieller_interval=ends,
    )


def _design(runs: pd.DataFrame, b: str, middle: float) -> np.ndarray:
    """The pooled model's columns, log tokens centred, so that they are not nearly collinear."""
    second = (runs["experiment"] == b).to_numpy(float)
    x = np.log(runs["train_tokens"].to_numpy(float)) - middle
    return np.column_stack([np.ones_like(x), second, x, second * x])


def _pairs(runs: pd.DataFrame, a: str, b: str) -> pd.Series | None:
    """log PPL of `b` minus that of `a` by size, seed and text; None unless every run has one partner."""
    if not set(CELL) <= set(runs) or runs.duplicated(["experiment", *CELL]).any():
        return None
    losses = runs.set_index([*CELL, "experiment"])["val_loss"].unstack()
    return None if losses.isna().any(axis=None) else losses[b] - losses[a]


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


def _within(
    middle: float, kind: str, ends: tuple[float, float] | None
) -> tuple[str, tuple[float | None, float | None] | None]:
    """`_fieller`'s set, in log tokens less `middle`, as what of it lies from 1 to 10¹⁵ tokens."""
    if ends is None:
        return kind, None
    low, high = middle + ends[0], middle + ends[1]
    if high < 0 or low > MOST_LOG:  # the interval, or the gap, lies beyond
        return ("nowhere" if kind == "bounded" else "unbounded"), None
    if low < 0 and high > MOST_LOG:  # it is all there is
        return ("unbounded" if kind == "bounded" else "nowhere"), None
    return kind, _tokens(low, high)


def _tokens(low: float, high: float) -> tuple[float | None, float | None]:
    """exp of both; None for an end below 1 or beyond 10¹⁵ tokens."""
    return tuple(math.exp(x) if 0 <= x <= MOST_LOG else None for x in (low, high))


def bootstrap(runs: pd.DataFrame, val_by_sample: pd.DataFrame, b: str, draws: int = 2000) -> dict[str, Any]:
    """95 % intervals of α of `b` minus the other's and of the crossover, and the share of draws whose laws do not meet.

    Both coefficients of the pooled model are weighted sums of losses: replicates are drawn (the same for both
    configurations and all sizes), crossed with validation samples; of a single replicate, samples alone.

    Args:
        runs: of `b` and one other: columns run, experiment, train_tokens, replicate.
        val_by_sample: columns run, sample, loss_sum (nats), tokens; of the same samples for every run.

    Raises:
        ValueError: the runs were not judged on the same samples.
    """
    sums, tokens = loss_sums(val_by_sample, runs["run"])
    middle = float(np.log(runs["train_tokens"]).mean())
    columns = _design(runs, b, middle)
    members = runs["replicate"].to_numpy() if balanced(runs, "experiment", "train_tokens") else np.zeros(len(runs))
    parts = [members == index for index in np.unique(members)]
    found = np.stack([np.linalg.pinv(columns[part])[[1, 3]] @ sums[part] for part in parts], axis=1)
    slope, rng = mean_loss(found[1], tokens), np.random.default_rng(0)
    drawn = draw_samples(found.reshape(-1, len(tokens)), tokens, draws, rng).reshape(draws, 2, len(parts))
    shift, tilt = draw_replicates(drawn.swapaxes(1, 2), rng).T
    with np.errstate(divide="ignore", invalid="ignore"):
        log_tokens = middle - shift / tilt
    meets = np.isfinite(log_tokens) & (log_tokens >= 0) & (log_tokens <= MOST_LOG)
    # it is the slopes' scatter that moves the crossover
    ends = np.exp(percentile_interval(log_tokens[meets], max(slope.dof, 1))).tolist() if meets.any() else None
    return {
        "bootstrap_slope": slope.interval,
        "bootstrap_crossover": ends and tuple(ends),
        "bootstrap_without": 1 - float(meets.mean()),
    }


def errors(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> dict[str, Any]:
    """What analysis.json holds about forms and errors, beside `scaling.summarise`: each entry with a `reason` or None.

    `forms`: by configuration, the saturating form and what both forms foretell of held-out sizes; `pooled`: by pair of
    configurations, the pooled model and the bootstrap's intervals and share of draws without a crossover, or `refused`.
    """
    forms, pairs = {}, []
    for label, group in runs.groupby("experiment") if len(runs) else ():
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
            losses = val_by_sample[val_by_sample["run"].isin(both["run"])]
            found = asdict(pooled(both, a, b)) | bootstrap(both, losses, b) | {"refused": None}
        except ValueError as error:
            found = {"a": a, "b": b, "refused": str(error)}
        pairs.append(found)
    return {"forms": forms, "pooled": pairs}
