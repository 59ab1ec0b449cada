"""Power laws of perplexity against training tokens, their crossover, and differences between runs with intervals."""

import itertools
import json
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import optimize, stats

from ctxlm.analysis.replicates import CONFIDENCE, DRAWN, balanced, each, replicate_of, student
from ctxlm.analysis.runs import load_runs, load_table
from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import PROTOCOL
from ctxlm.files import atomic

DRAWS = 9999
FEWEST_CLUSTERS = 10
"""Cluster-robust errors of fewer clusters are too small."""
MOST_TOKENS = 1e15
"""A crossover beyond this many tokens (or below one) is an artefact of two slopes that hardly differ."""
Grid = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
"""Runs, histories and losses by validation sample, as `read_grid` gives them."""
CELL = ["train_tokens", "seed", "data_seed"]
PROTOCOL_1 = "protocol-1/"
"""Begins the name of every grid of runs that were judged by protocol 1."""
RESOLVED = ("device", "dtype")
"""Parameters of which a run holds what `auto` became."""
TYPES = ("float32", "bfloat16")
"""Types of product that an experiment may have; an n-gram, which has no products, names another."""
LEFT_OUT, PLANNED = "left_out", "planned"
"""Runs of a name that the plan has, but of other parameters."""
MEASURED = {"train_loss_after_epoch", "val_every_steps"}
REPLICATES = {"experiment", "train_samples", "device", *CELL, *DRAWN, *MEASURED}
"""Parameters that may differ between the runs of one configuration: size, replicate, machine, what else is measured."""


@dataclass(frozen=True)
class PowerLaw:
    """PPL = exp(log_a) · tokens^alpha, fitted to n runs of between `tokens_min` and `tokens_max` tokens."""

    n: int
    residual_dof: int
    alpha: float
    alpha_interval: tuple[float, float] | None
    interval_dof: int
    """Of `alpha_interval`: replicates − 1, or where there is a single one, as `residual_dof`."""
    alpha_interval_robust: tuple[float, float] | None
    """With errors robust to unequal spread: HC3, or by replicates where there are ten of them or more."""
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
    replicates: int
    """Replicates that both have; from two up, the interval covers other seeds and texts too."""
    dof: float
    """Satterthwaite's, of samples and replicates together."""
    without: float | None
    """The difference without the one sample that changes it most; None for one sample."""
    without_tokens: int
    """Tokens of that sample."""


def fit_power_law(tokens: Sequence[float], ppl: Sequence[float], replicates: Sequence[int] | None = None) -> PowerLaw:
    """Least squares of log PPL on log tokens (the form of Kaplan et al., 2020), one point a run.

    With replicates that have the same sizes, the interval is Student's over their slopes. Otherwise it takes the runs
    as independent, with n − 2 degrees of freedom; with none left there is no interval and no R², for a line through two
    points fits them whatever their errors. Beside it stands one with HC3 errors (MacKinnon & White, 1985), or, from
    ten replicates up, with errors clustered by them (fewer clusters would make them too small).

    Args:
        tokens, ppl: of every run.
        replicates: of every run, as `replicate_of` gives them.

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
    robust = robust_interval(fit, 1, replicates) if dof > 0 else None
    r2 = float(fit.rsquared) if dof > 0 and np.ptp(values) > 0 else None  # undefined where all PPL are equal
    interval, interval_dof = None if dof == 0 else (float(low), float(high)), dof
    runs = pd.DataFrame({"x": np.log(sizes), "y": np.log(values), "replicate": 0 if replicates is None else replicates})
    if balanced(runs, "x"):
        slopes = each(runs, lambda part: np.polyfit(part["x"], part["y"], 1)[0])
        interval, interval_dof = student(slopes), len(slopes) - 1
        robust = robust if len(slopes) >= FEWEST_CLUSTERS else None  # HC3 would take the runs as independent
    ends = int(sizes.min()), int(sizes.max())
    return PowerLaw(len(sizes), dof, alpha, interval, interval_dof, robust, log_a, r2, *ends)


def robust_interval(
    fit: Any, coefficient: int, clusters: Sequence[Hashable] | None = None
) -> tuple[float, float] | None:
    """A coefficient's 95 % interval with HC3 or cluster-robust errors; None where one run alone determines the fit."""
    if fit.get_influence().hat_matrix_diag.max() > 1 - 1e-9:  # that run has no residual to judge it by
        return None
    groups = None if clusters is None else pd.factorize(pd.Series(clusters))[0]
    if groups is not None and groups.max() + 1 >= FEWEST_CLUSTERS:
        robust = fit.get_robustcov_results("cluster", groups=groups, use_t=True)
    else:
        robust = fit.get_robustcov_results("HC3", use_t=True)
    low, high = robust.conf_int(1 - CONFIDENCE)[coefficient]
    return float(low), float(high)


@dataclass(frozen=True)
class Saturating:
    """loss = floor + scale · tokens^(−beta), in nats, beside the power law, by the corrected Akaike criterion."""

    n: int
    residual_dof: int
    floor: float
    scale: float
    beta: float
    aicc: float | None
    """Lower is better; None with too few runs for the correction."""
    aicc_power_law: float | None
    bends: bool
    """False where the fit ends at a bound, without a floor or at the smallest beta: then the runs show no bend."""

    def ppl(self, tokens: float | np.ndarray) -> float | np.ndarray:
        """The form's perplexity at so many tokens."""
        return np.exp(self.floor + self.scale * np.asarray(tokens, float) ** -self.beta)


BETAS = (0.01, 3.0)
"""The exponents of the saturating form that are tried."""


def fit_saturating(tokens: Sequence[float], ppl: Sequence[float]) -> Saturating:
    """Least squares of the loss (log PPL) on a constant and tokens^(−beta), neither coefficient negative.

    For a given beta the form is linear, so only beta is searched (Golub & Pereyra, 1973).

    Raises:
        ValueError: as `fit_power_law`, or fewer than four distinct sizes.
    """
    law = fit_power_law(tokens, ppl)
    x, y = np.log(np.asarray(tokens, float)), np.log(np.asarray(ppl, float))
    if np.unique(x).size < 4:
        raise ValueError(f"a law that saturates needs runs of at least four sizes, but there are {np.unique(x).size}")
    middle = x.mean()

    def fitted(log_beta: float) -> tuple[np.ndarray, float]:
        shape = np.exp(-math.exp(log_beta) * (x - middle))
        return optimize.nnls(np.column_stack([np.ones_like(x), shape]), y)

    ends = tuple(math.log(beta) for beta in BETAS)
    tried = np.linspace(*ends, 60)
    best = int(np.argmin([fitted(b)[1] for b in tried]))
    around = (tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)])
    found = optimize.minimize_scalar(lambda b: fitted(b)[1], bounds=around, method="bounded", options={"xatol": 1e-6})
    (floor, scale), distance = fitted(found.x)
    beta = math.exp(found.x)
    rest = y - law.log_a - law.alpha * x
    return Saturating(
        len(x),
        len(x) - 3,
        float(floor),
        float(scale * math.exp(beta * middle)),
        beta,
        _aicc(distance**2, len(x), 3),
        _aicc(float(rest @ rest), len(x), 2),
        bends=bool(beta > 1.05 * BETAS[0] and scale > 0 and floor > 0),
    )


def _aicc(squares: float, n: int, coefficients: int) -> float | None:
    """Akaike's criterion of a least-squares fit, corrected for few points (Hurvich & Tsai, 1989)."""
    k = coefficients + 1  # and the variance
    if n - k - 1 < 1 or squares <= 1e-20 * n:
        return None
    return n * math.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def extrapolate(tokens: Sequence[float], ppl: Sequence[float]) -> list[dict[str, Any]]:
    """What each form, fitted without the largest sizes, foretells of them.

    One size is held out, two where there are at least six. Rows: form, tokens, predicted, measured (geometric mean of
    the size's PPL), error (predicted / measured − 1). A form that cannot be fitted to the rest has no rows.
    """
    table = pd.DataFrame({"tokens": tokens, "ppl": ppl})
    sizes = sorted(table["tokens"].unique())
    held = sizes[-2:] if len(sizes) >= 6 else sizes[-1:]
    rest, rows = table[~table["tokens"].isin(held)], []
    for form, fit in (("power law", fit_power_law), ("saturating", fit_saturating)):
        try:
            law = fit(rest["tokens"], rest["ppl"])
        except ValueError:
            continue
        for size in held:
            measured = float(np.exp(np.log(table.loc[table["tokens"] == size, "ppl"]).mean()))
            predicted = float(law.ppl(size))
            row = {"form": form, "tokens": int(size), "predicted": predicted, "measured": measured}
            rows.append(row | {"error": predicted / measured - 1})
    return rows


def crossover(law_a: PowerLaw, law_b: PowerLaw) -> Crossover:
    """The token count at which two laws give the same PPL; the law with the smaller alpha is better above it."""
    slope = law_a.alpha - law_b.alpha
    if abs(slope) < 1e-9:
        return Crossover(None, None, "the two laws are parallel")
    log_tokens = (law_b.log_a - law_a.log_a) / slope
    if not 0 <= log_tokens <= math.log(MOST_TOKENS):
        return Crossover(None, None, beyond(log_tokens))
    tokens = math.exp(log_tokens)
    inside = max(law_a.tokens_min, law_b.tokens_min) <= tokens <= min(law_a.tokens_max, law_b.tokens_max)
    return Crossover(tokens, not inside, None)


def beyond(log_tokens: float) -> str:
    """The reason against a crossover at so many tokens."""
    if log_tokens < 0:
        return "the laws would meet below a single token"
    return f"the laws would meet at {power_of_ten(log_tokens / math.log(10))} tokens, which no text has"


def power_of_ten(exponent: float) -> str:
    """Ten to a whole power, as text."""
    return f"10{f'{exponent:.0f}'.translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def with_phase1(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs whose Phase 1 learnt: of a single iteration, the recurrence alone, it was left out."""
    return runs[runs["phase1_max_iterations"] > 1]


def paired_difference(by_sample_a: pd.DataFrame, by_sample_b: pd.DataFrame) -> PairedDifference:
    """log PPL of A minus B over the same tokens, of validation or of test, with a 95 % bootstrap interval.

    A sample's weight is its number of tokens. Runs are averaged within replicates; where both have two replicates or
    more, these are drawn, as pairs, crossed with the samples, and the interval covers both. Otherwise it covers the
    choice of samples alone.

    Args:
        by_sample_a, by_sample_b: columns sample, loss_sum (nats), tokens, replicate; a row a sample and run.

    Raises:
        ValueError: the two were not judged on the same tokens.
    """
    (a, tokens), (b, others) = (_by_replicate(table) for table in (by_sample_a, by_sample_b))
    if not tokens.equals(others):
        raise ValueError("the two runs were judged on different tokens: compare runs of one grid")
    pairs = (a - b).dropna().to_numpy()
    if not len(pairs):  # no replicates that both have: all that there is on either side
        pairs = (a.mean() - b.mean()).to_numpy()[None]
    counts, sums = tokens.to_numpy(float), pairs.mean(0)
    found, without, most = mean_loss(pairs, counts), None, int(counts[0])
    if len(counts) > 1:
        rest = (sums.sum() - sums) / (counts.sum() - counts)  # without each sample
        at = int(np.argmax(abs(rest - found.value)))
        without, most = float(rest[at]), int(counts[at])
    whole = len(counts), int(counts.sum()), len(pairs)
    return PairedDifference(found.value, found.interval, *whole, found.dof, without, most)


def _by_replicate(by_sample: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Mean loss sums, replicates by samples, and the tokens of each sample."""
    sums = by_sample.pivot_table(index="replicate", columns="sample", values="loss_sum")
    if sums.isna().any(axis=None) or (by_sample.groupby("sample")["tokens"].nunique() > 1).any():
        raise ValueError("runs of one configuration were judged on different tokens")
    return sums, by_sample.groupby("sample")["tokens"].first()


def draw_samples(sums: np.ndarray, tokens: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Mean losses [draws, runs] when the samples of `sums` [runs, samples] are drawn again, the same for all runs."""
    taken = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=draws)  # how often each one
    return (taken @ sums.T) / (taken @ tokens)[:, None]


def draw_replicates(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean [draws, ...] of replicates drawn again from `values` [draws, replicates, ...].

    Drawn replicates vary by (m − 1) / m of what m replicates do: their deviations are widened to make up for it.
    """
    m, mean = values.shape[1], values.mean(1)
    if m == 1:
        return mean
    picked = rng.integers(0, m, size=values.shape[:2]).reshape(*values.shape[:2], *[1] * (values.ndim - 2))
    drawn = np.take_along_axis(values, picked, axis=1).mean(1)
    return mean + math.sqrt(m / (m - 1)) * (drawn - mean)


def percentile_interval(values: np.ndarray, dof: float) -> tuple[float, float]:
    """95 % interval from bootstrap draws: percentiles, expanded for a spread of `dof` degrees of freedom."""
    tail = (1 - expanded_level(dof)) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def satterthwaite(*parts: tuple[float, float]) -> float:
    """Degrees of freedom of a sum of variances, from (variance, degrees of freedom) of each (Satterthwaite, 1946)."""
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / dof for variance, dof in parts)
    return total**2 / spread if spread > 0 else min(dof for _, dof in parts)


def ratio_error(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of Σ sums / Σ tokens over the choice of samples (Cochran, 1977); nan for a single one."""
    n = len(sums)
    if n < 2:
        return math.nan
    residuals = sums - sums.sum() / tokens.sum() * tokens
    return math.sqrt(n / (n - 1) * np.square(residuals).sum()) / tokens.sum()


def ppl_interval(val_by_sample: pd.DataFrame) -> tuple[float, float] | None:
    """95 % bootstrap interval of one run's PPL over validation samples; None for a single sample."""
    sums, tokens = (val_by_sample[name].to_numpy(float) for name in ("loss_sum", "tokens"))
    interval = mean_loss(sums[None], tokens).interval
    return interval and (math.exp(interval[0]), math.exp(interval[1]))


@dataclass(frozen=True)
class MeanLoss:
    """A mean over replicates and validation samples, its interval (None for a single sample) and what that rests on."""

    value: float
    interval: tuple[float, float] | None
    dof: float
    """Satterthwaite's, of samples and replicates together."""


def mean_loss(sums: np.ndarray, tokens: np.ndarray) -> MeanLoss:
    """The mean loss over `sums` [replicates, samples] of samples of so many `tokens`, and its bootstrap interval.

    Samples are drawn again, and replicates where there are several. The percentiles are expanded as Student's t is
    against the normal, with the degrees of freedom of as many samples as these weigh: in simulations with the lengths
    of 50 conversations of chitchat, which weigh as 11, such intervals hold the truth in 95 to 96 % of cases, and with
    49 degrees of freedom in 92 to 94 %. Draws from two or three replicates cannot reach out far enough, whatever the
    percentile, so the interval is never less than Student's over the replicates.
    """
    replicates, samples = sums.shape
    value = float(sums.mean(0).sum() / tokens.sum())
    if samples < 2:
        return MeanLoss(value, None, 0)
    rng = np.random.default_rng(0)
    drawn = draw_replicates(draw_samples(sums, tokens, DRAWS, rng), rng)
    parts = [(ratio_error(sums.mean(0), tokens) ** 2, max(effective(tokens) - 1, 1))]
    if replicates > 1:
        parts.append((np.var(sums.sum(1) / tokens.sum(), ddof=1) / replicates, replicates - 1))
    dof = satterthwaite(*parts)
    low, high = percentile_interval(drawn, dof)
    least = student(sums.sum(1) / tokens.sum()) or (low, high)
    return MeanLoss(value, (min(low, least[0]), max(high, least[1])), dof)


def effective(tokens: np.ndarray) -> float:
    """How many samples of equal length would weigh as much as samples of so many `tokens` (Kish, 1965)."""
    tokens = np.asarray(tokens, float)
    return float(tokens.sum() ** 2 / np.square(tokens).sum())


def loss_sums(val_by_sample: pd.DataFrame, runs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every run's loss sum on each validation sample, [runs, samples], and the samples' tokens.

    Raises:
        ValueError: the runs were not judged on the same samples.
    """
    columns = (val_by_sample.pivot(index="run", columns="sample", values=name) for name in ("loss_sum", "tokens"))
    sums, counts = (table.reindex(runs).dropna(axis=1, how="all") for table in columns)
    if not len(sums) or sums.isna().any(axis=None) or (counts.nunique() > 1).any():
        raise ValueError("the runs were judged on different validation tokens: compare runs of one grid")
    return sums.to_numpy(float), counts.iloc[0].to_numpy(float)


def expanded_level(dof: float) -> float:
    """The level of percentiles that stands for 95 % where a spread has `dof` degrees of freedom (Hesterberg, 2015)."""
    return 1 - 2 * stats.norm.cdf(-math.sqrt((dof + 1) / dof) * stats.t.ppf((1 + CONFIDENCE) / 2, dof))


def read_grid(grid: str, plan: Mapping[str, Experiment] | None = None, models: Collection[str] = ("context",)) -> Grid:
    """Runs, histories and validation losses of a grid, with one label in `experiment` for each configuration.

    Only runs of these `models` are read and, given the grid's `plan` (name → experiment), only those that it asks for
    with the parameters that they have: others are an earlier grid file's; `attrs` counts them under `LEFT_OUT`, and
    under `PLANNED` what the plan asks for, of these models.
    Where runs of one label differ in more than size and seed, what differs is added to the label; `configuration`
    keeps the label as it was, and `replicate` says which runs are independent (`replicates`).
    Of a grid `protocol-1/<name>`, which no grid file describes any more, all runs are read, without a plan.

    Raises:
        ConfigError: runs, of those read, were not judged by the present protocol, or multiply in two types that the
            plan does not give them; grids of protocol 1 are read as they are. Or as `load_runs` and `load_table`.
    """
    tables = load_runs(grid), *(load_table(grid, name) for name in ("history.csv", "val_by_sample.csv"))
    if tables[0].empty:
        return tables
    asked = tables[0]["model"].isin(models)
    if plan is not None:
        asked &= tables[0]["run"].isin(plan)
        same = pd.Series([_as_planned(run, plan) for _, run in tables[0].iterrows()])
        left_out, asked = int((asked & ~same).sum()), asked & same
        tables[0].attrs |= {LEFT_OUT: left_out, PLANNED: sum(run.model in models for run in plan.values())}
    kept = tables[0].loc[asked, "run"]
    tables = tuple(table[table["run"].isin(kept)].reset_index(drop=True) for table in tables)
    runs, history, val_by_sample = tables
    if runs.empty:
        return runs, history, val_by_sample
    if not grid.startswith(PROTOCOL_1):
        _check_alike(grid, runs, plan or {})
    runs["configuration"] = runs["experiment"]
    for name in (name for name in Experiment.model_fields if name in runs and name not in REPLICATES):
        # `auto` takes each machine's faster type: only a grid that sweeps it has one cell in both
        kind = ["experiment", *(CELL if name == "dtype" else [])]
        if runs.groupby(kind)[name].nunique(dropna=False).max() > 1:
            runs["experiment"] = runs["experiment"] + f", {name} " + runs[name].astype(str)
    runs["replicate"] = replicate_of(runs)
    return runs, *(_labelled(table, runs) for table in (history, val_by_sample))


def _check_alike(grid: str, runs: pd.DataFrame, plan: Mapping[str, Experiment]) -> None:
    """Refuse runs that cannot stand beside one another: of another protocol, or in two types that nobody asked for.

    Raises:
        ConfigError: as `read_grid`.
    """
    other = runs.loc[runs["protocol"] != PROTOCOL, "run"]
    if len(other):
        judged = " and ".join(f"{n} by protocol {by}" for by, n in runs["protocol"].value_counts().sort_index().items())
        raise ConfigError(
            f"grid {grid} has runs that were judged otherwise than by today's protocol {PROTOCOL} and cannot be read "
            f"({judged}): delete the metrics.json of each, as of {other.iloc[0]}, and run `make report GRID={grid}` "
            "again"
        )
    typed = runs[runs["dtype"].isin(TYPES)]
    planned = [plan[run].dtype if run in plan else "auto" for run in typed["run"]]
    if typed["dtype"].nunique() > 1 and planned != typed["dtype"].tolist():
        counts = typed["dtype"].value_counts().sort_index()
        types = " and ".join(f"{n} in {kind}" for kind, n in counts.items())
        raise ConfigError(
            f"grid {grid} has runs whose matrix products are of two types (dtype: {types}), which its file does not "
            f"give them: write `dtype: {counts.idxmax()}`, or the other one, under `common` in that file and run `make "
            f"report GRID={grid}` again"
        )


def _labelled(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of these runs, with their labels and replicates."""
    own, table = runs.set_index("run")[["experiment", "replicate"]], table[table["run"].isin(runs["run"])]
    return table.assign(**{name: table["run"].map(own[name]) for name in own})


def _as_planned(run: pd.Series, plan: Mapping[str, Experiment]) -> bool:
    """Whether a run has the parameters that the plan gives to one of its name."""
    if run["run"] not in plan:
        return False
    wanted = plan[run["run"]]
    size = "train_samples" if wanted.train_samples is None else "train_tokens"  # what follows from the other one
    values = wanted.model_dump(exclude={*RESOLVED, size})
    return all(pd.isna(run[name]) if value is None else run[name] == value for name, value in values.items())


def summarise(grid: str, runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> dict[str, Any]:
    """What `analysis.json` holds: a law a configuration, crossovers and differences by pair, and the runs' sources."""
    laws, configurations, crossovers = {}, {}, []
    paired, unpaired = differences(val_by_sample) if len(runs) else ([], [])
    paired = with_tests(paired, runs, load_table(grid, "test_by_sample.csv"))
    for label, group in runs.groupby("experiment") if len(runs) else ():
        try:
            laws[label] = fit_power_law(group["train_tokens"], group["val_ppl"], group["replicate"])
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
    several = f"{len(configurations)} configurations: see crossovers" if crossovers else "fewer than two configurations"
    first = crossovers[0] if len(crossovers) == 1 else asdict(Crossover(None, None, several))
    return {
        "grid": grid,
        "configurations": configurations,
        "crossover_tokens": first["tokens"],
        "crossover_extrapolated": first["extrapolated"],
        "crossover_reason": first["reason"],
        "crossovers": crossovers,
        "paired_differences": paired,
        "unpaired": unpaired,
        "runs": _listed(grid, runs),
    }


def with_tests(
    paired: Sequence[dict[str, Any]], runs: pd.DataFrame, test_by_sample: pd.DataFrame | None = None
) -> list[dict[str, Any]]:
    """Differences, each with what the same runs give on the test text under `test`: log_ppl, interval, samples.

    Interval and samples are None unless all of the pair's runs have losses by test sample; `test` is None where they
    were not judged on one and the same test text.

    Args:
        paired: of `differences`.
        runs: the same runs.
        test_by_sample: as `load_table` gives it, of these and any other runs.
    """
    tests = pd.DataFrame() if test_by_sample is None or test_by_sample.empty else _labelled(test_by_sample, runs)
    found = []
    for pair in paired:
        sides = [runs[(runs["experiment"] == pair[s]) & (runs["train_tokens"] == pair["train_tokens"])] for s in "ab"]
        found.append(pair | {"test": _tested(*sides, tests)})
    return found


def _tested(a: pd.DataFrame, b: pd.DataFrame, tests: pd.DataFrame) -> dict[str, Any] | None:
    known = [tests[tests["run"].isin(side["run"])] if len(tests) else tests for side in (a, b)]
    if all(len(part) and part["run"].nunique() == len(side) for part, side in zip(known, (a, b), strict=True)):
        try:
            whole = asdict(paired_difference(*known))
        except ValueError:
            return None
        return {name: whole[name] for name in ("log_ppl", "interval", "samples")}
    both = pd.concat([a, b])
    if not {"test_loss", "test_tokens"} <= {*both} or both["test_tokens"].nunique(dropna=False) > 1:
        return None
    mean_a, mean_b = (side.groupby("replicate")["test_loss"].mean() for side in (a, b))
    apart = (mean_a - mean_b).mean()
    if math.isnan(apart):  # no replicate that both have
        apart = mean_a.mean() - mean_b.mean()
    return None if math.isnan(apart) else {"log_ppl": float(apart), "interval": None, "samples": None}


def differences(by_sample: pd.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`paired_difference` of every two configurations at every size that both have, and the pairs without, and why."""
    paired, unpaired = [], []
    tables = {label: dict(iter(own.groupby("train_tokens"))) for label, own in by_sample.groupby("experiment")}
    for a, b in itertools.combinations(tables, 2):
        for tokens in sorted(tables[a].keys() & tables[b].keys()):
            pair = {"a": a, "b": b, "train_tokens": int(tokens)}
            try:
                paired.append(pair | asdict(paired_difference(tables[a][tokens], tables[b][tokens])))
            except ValueError as error:  # a grid may sweep the corpus or the validation samples
                unpaired.append(pair | {"reason": str(error)})
    return paired, unpaired


def _listed(grid: str, runs: pd.DataFrame) -> list[dict[str, str]]:
    """Name and source of these runs, and of the grid's runs of other models, which have no law here."""
    everything = load_runs(grid)
    if everything.empty:
        return []
    taken = everything["run"].isin([] if runs.empty else runs["run"]) | (everything["model"] != "context")
    return everything.loc[taken, ["run", "source"]].to_dict("records")


def write_summary(summary: dict[str, Any], folder: Path) -> Path:
    """Write `summary` to `analysis.json` in `folder`, atomically."""
    with atomic(folder / "analysis.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder / "analysis.json"
