"""Power laws of perplexity against training tokens, their crossover, and differences between runs with intervals."""

import itertools
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from ctxlm.config import Experiment
from ctxlm.files import atomic
from ctxlm.results import load_history, load_runs, load_val_by_sample

CONFIDENCE = 0.95
DRAWS = 9999
MOST_TOKENS = 1e15
"""A crossover beyond this many tokens (or below one) is an artefact of two slopes that hardly differ."""
REPLICATES = {"experiment", "train_tokens", "train_samples", "seed", "data_seed", "device"}
"""Parameters that may differ between the runs of one configuration."""


@dataclass(frozen=True)
class PowerLaw:
    """PPL = exp(log_a) · tokens^alpha, fitted to n runs of between `tokens_min` and `tokens_max` tokens."""

    n: int
    residual_dof: int
    alpha: float
    alpha_interval: tuple[float, float] | None
    log_a: float
    r2: float | None
    tokens_min: int
    tokens_max: int

    def ppl(self, tokens: float | np.ndarray) -> float | np.ndarray:
        """The law's perplexity at so many tokens."""
        return np.exp(self.log_a + self.alpha * np.log(tokens))


@dataclass(frozen=True)
class Crossover:
    """Where two laws meet: `tokens`, or None and the `reason`; `extrapolated` unless both laws were measured there."""

    tokens: float | None
    extrapolated: bool | None
    reason: str | None


@dataclass(frozen=True)
class PairedDifference:
    """log PPL of A minus log PPL of B on the same tokens: below 0, A is better. The interval is None for one sample."""

    log_ppl: float
    interval: tuple[float, float] | None
    samples: int
    tokens: int


def fit_power_law(tokens: Sequence[float], ppl: Sequence[float]) -> PowerLaw:
    """Least squares of log PPL on log tokens (the form of Kaplan et al., 2020), one point a run.

    The interval is Student's, with n − 2 degrees of freedom; with none left there is no interval and no R²,
    for a line through two points fits them whatever their errors.

    Raises:
        ValueError: a value is not a positive finite number, or there are fewer than two distinct sizes.
    """
    sizes, values = np.asarray(tokens, float), np.asarray(ppl, float)
    if sizes.shape != values.shape or sizes.ndim != 1:
        raise ValueError(f"a law needs one PPL a run, but there are {sizes.size} token counts and {values.size} PPL")
    for name, column in (("tokens", sizes), ("PPL", values)):
        wrong = column[~(np.isfinite(column) & (column > 0))]
        if wrong.size:
            raise ValueError(f"a law needs positive finite {name}, but there is {wrong[0]:g}: drop that run")
    if np.unique(sizes).size < 2:
        found = ", ".join(f"{size:,.0f}" for size in np.unique(sizes)) or "none"
        raise ValueError(f"a law needs runs of at least two sizes, but there is {found}: add a value to train_tokens")
    fit = sm.OLS(np.log(values), sm.add_constant(np.log(sizes))).fit()
    log_a, alpha = (float(value) for value in fit.params)
    dof = int(fit.df_resid)
    low, high = fit.conf_int(1 - CONFIDENCE)[1] if dof > 0 else (None, None)
    r2 = float(fit.rsquared) if dof > 0 and np.ptp(values) > 0 else None  # undefined where all PPL are equal
    interval = None if dof == 0 else (float(low), float(high))
    return PowerLaw(len(sizes), dof, alpha, interval, log_a, r2, int(sizes.min()), int(sizes.max()))


def crossover(law_a: PowerLaw, law_b: PowerLaw) -> Crossover:
    """The token count at which two laws give the same PPL; the law with the smaller alpha is better above it."""
    slope = law_a.alpha - law_b.alpha
    if abs(slope) < 1e-9:
        return Crossover(None, None, "the two laws are parallel")
    log_tokens = (law_b.log_a - law_a.log_a) / slope
    if not 0 <= log_tokens <= math.log(MOST_TOKENS):
        where = f"10^{log_tokens / math.log(10):.0f} tokens"
        return Crossover(
            None, None, f"the two slopes hardly differ: the laws would meet at {where}, which means nothing"
        )
    tokens = math.exp(log_tokens)
    inside = max(law_a.tokens_min, law_b.tokens_min) <= tokens <= min(law_a.tokens_max, law_b.tokens_max)
    return Crossover(tokens, not inside, None)


def paired_difference(val_by_sample_a: pd.DataFrame, val_by_sample_b: pd.DataFrame) -> PairedDifference:
    """log PPL of A minus B over the same validation tokens, with a 95 % bootstrap interval over the samples.

    A sample's weight is its number of tokens. Where a frame holds several runs (seeds), the losses of a sample
    are averaged over them first: the interval covers the choice of validation samples, not the seeds.

    Args:
        val_by_sample_a, val_by_sample_b: columns sample, loss_sum (nats), tokens.

    Raises:
        ValueError: the two were not judged on the same tokens.
    """
    a, b = (table.groupby("sample")[["loss_sum", "tokens"]].mean() for table in (val_by_sample_a, val_by_sample_b))
    if not a["tokens"].equals(b["tokens"]):
        raise ValueError("the two runs were judged on different validation tokens: compare runs of one grid")
    difference, interval = _weighted_mean(a["loss_sum"] - b["loss_sum"], a["tokens"])
    return PairedDifference(difference, interval, len(a), int(a["tokens"].sum()))


def ppl_interval(val_by_sample: pd.DataFrame) -> tuple[float, float] | None:
    """95 % bootstrap interval of one run's PPL over validation samples; None for a single sample."""
    _, interval = _weighted_mean(val_by_sample["loss_sum"], val_by_sample["tokens"])
    return interval and (math.exp(interval[0]), math.exp(interval[1]))


def _weighted_mean(sums: pd.Series, tokens: pd.Series) -> tuple[float, tuple[float, float] | None]:
    """Σ sums / Σ tokens, and its interval when the pairs (sum, tokens) are drawn again with replacement.

    The percentiles are expanded as Student's t is against the normal (Hesterberg, 2015): with 20 samples, plain
    percentiles hold the truth in 91 % of cases instead of 95 %, and expanded ones in 94 %.
    """

    def mean(s: np.ndarray, t: np.ndarray, axis: int) -> np.ndarray:
        return s.sum(axis=axis) / t.sum(axis=axis)

    data, n = (sums.to_numpy(float), tokens.to_numpy(float)), len(sums)
    value = float(mean(*data, axis=0))
    if n < 2:
        return value, None
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    options = {"n_resamples": DRAWS, "confidence_level": level, "method": "percentile", "rng": 0}
    interval = stats.bootstrap(data, mean, paired=True, **options).confidence_interval
    return value, (float(interval.low), float(interval.high))


def read_grid(grid: str, names: Collection[str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Runs, histories and validation losses of a grid, with one label in `experiment` for each configuration.

    Only runs called `names` are read, if given: one that the grid file no longer asks for may be of other parameters.
    Where runs of one label differ in more than size and seed, what differs is added to the label.
    """
    tables = load_runs(grid), load_history(grid), load_val_by_sample(grid)
    if tables[0].empty:
        return tables
    if names is not None:
        tables = tuple(table[table["run"].isin(names)].reset_index(drop=True) for table in tables)
    runs, history, val_by_sample = tables
    if runs.empty:
        return runs, history, val_by_sample
    for name in (name for name in Experiment.model_fields if name in runs and name not in REPLICATES):
        if runs.groupby("experiment")[name].nunique(dropna=False).max() > 1:
            runs["experiment"] = runs["experiment"] + f", {name} " + runs[name].astype(str)
    label = runs.set_index("run")["experiment"]
    return runs, *(table.assign(experiment=table["run"].map(label)) for table in (history, val_by_sample))


def summarise(grid: str, runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> dict[str, Any]:
    """What `analysis.json` holds: a law a configuration, crossovers and differences by pair, and the runs' sources."""
    laws, configurations, crossovers, differences, unpaired = {}, {}, [], [], []
    for label, group in runs.groupby("experiment") if len(runs) else ():
        try:
            laws[label] = fit_power_law(group["train_tokens"], group["val_ppl"])
            configurations[label] = asdict(laws[label]) | {"reason": None}
        except ValueError as error:
            fields = dict.fromkeys(PowerLaw.__dataclass_fields__) | {"n": len(group)}
            configurations[label] = fields | {"reason": str(error)}
    for a, b in itertools.combinations(configurations, 2):
        unfitted = [label for label in (a, b) if label not in laws]
        found = (
            Crossover(None, None, f"no law for {' and '.join(unfitted)}") if unfitted else crossover(laws[a], laws[b])
        )
        crossovers.append({"a": a, "b": b} | asdict(found))
        of_a, of_b = (dict(iter(_of(val_by_sample, label))) for label in (a, b))
        for tokens in sorted(of_a.keys() & of_b.keys()):
            pair = {"a": a, "b": b, "train_tokens": int(tokens)}
            try:
                differences.append(pair | asdict(paired_difference(of_a[tokens], of_b[tokens])))
            except ValueError as error:  # a grid may sweep the corpus or the validation samples
                unpaired.append(pair | {"reason": str(error)})
    several = f"{len(configurations)} configurations: see crossovers" if crossovers else "fewer than two configurations"
    first = crossovers[0] if len(crossovers) == 1 else asdict(Crossover(None, None, several))
    return {
        "grid": grid,
        "configurations": configurations,
        "crossover_tokens": first["tokens"],
        "crossover_extrapolated": first["extrapolated"],
        "crossover_reason": first["reason"],
        "crossovers": crossovers,
        "paired_differences": differences,
        "unpaired": unpaired,
        "runs": [] if runs.empty else runs[["run", "source"]].to_dict("records"),
    }


def _of(val_by_sample: pd.DataFrame, label: str) -> Any:
    return val_by_sample[val_by_sample["experiment"] == label].groupby("train_tokens")


def write_summary(summary: dict[str, Any], folder: Path) -> Path:
    """Write `summary` to `analysis.json` in `folder`, atomically."""
    with atomic(folder / "analysis.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder / "analysis.json"
