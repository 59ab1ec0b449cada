"""One kind of estimate: a number, its 95 % interval, and what that interval covers.

An experiment has two sources of chance. *Replicates* each draw seed, training text and signs of the embedding anew;
*samples* are the pieces of text that all runs are judged on. A difference of two configurations or a coefficient of a
regression is computed in every replicate by itself (Frison & Pocock, 1992) and is a weighted sum of the losses of the
samples, so that its variance is that of a mean over two crossed factors (Cameron, Gelbach & Miller, 2011). With one
replicate the interval covers samples alone, and where runs were judged on other texts, replicates alone: `over` says
which.

It works on any frame of runs. With columns model, seed and loss (nats), for example, and nothing else drawn:

    runs = runs.assign(data_seed=0, embedding_seed=0, replicate=runs["seed"], id=runs.index, run=runs.index.map(str))
    paired(runs, {"model": "deep"}, {"model": "wide"}, at=[], column="loss").table()
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
import statsmodels.formula.api as smf
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from scipy import special, stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests

from ctxlm.analysis import runs as tidy
from ctxlm.analysis.run_plots import COLOURS, REFERENCE, WIDTH, new_figure
from ctxlm.files import atomic, resolve

LEVEL = 0.95
MIME = "application/vnd.ctxlm.estimates+json"
"""Under this type a displayed table carries its estimates as data: the tests read them there."""
NOTHING, UNKNOWN = "not significant", "one replicate: chance is not known"
"""Verdicts on a difference, beside lower and higher."""
SAMPLES, SITES = "samples", ("sites",)
RESIDUALS = "residuals"
"""What an interval covers where the regression's residuals are its error, as with a single replicate."""
CORRECTIONS = {"fdr_bh": "Benjamini & Hochberg", "holm": "Holm"}
"""Of p of several differences: statsmodels' name, and who made it."""
LOSSES = {"log_ppl": "test", "test_loss": "test", "development_loss": "development", "val_loss": "val"}
"""Columns that are means of losses, nats, and the text they are of."""


@dataclass(frozen=True)
class Unit:
    """How a value is shown: as `show(value)`, formatted; a `comparison` is a difference that may be of either sign."""

    show: Any
    text: str
    comparison: bool = False


UNITS = {
    "% of PPL": Unit(lambda x: 100 * np.expm1(x), "{:+z.1f} %", comparison=True),
    "% of PPL, predicted": Unit(lambda x: 100 * np.expm1(x), "{:+z.1f} %"),
    "PPL": Unit(np.exp, "{:.1f}"),
    "%": Unit(lambda x: 100 * np.expm1(x), "{:+z.0f} %"),
    "sd, % of PPL": Unit(lambda x: 100 * np.expm1(x), "{:.1f} %"),
    "exponent": Unit(lambda x: x, "{:.3f}"),
    "difference of exponents": Unit(lambda x: x, "{:+z.3f}", comparison=True),
    "tokens": Unit(np.exp, "{:,.0f}"),
    "tokens read": Unit(lambda x: x, "{:.1f}"),
    "nats": Unit(lambda x: x, "{:+z.3f}", comparison=True),
    "nats a token": Unit(lambda x: x, "{:+z.2f}"),
    "% of studies": Unit(lambda x: 100 * x, "{:.1f} %"),
    "": Unit(lambda x: x, "{:,.4g}"),
}
"""What a value is: logarithms of PPL and of tokens, in nats, are shown as what they are logarithms of."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval: the only carrier of one."""

    contrast: str
    """What is estimated, as "A − B"."""
    at: str
    """Where, as "28,000 tokens"."""
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    """Runs, or pairs of runs."""
    replicates: int = 0
    dof: float | None = None
    over: tuple[str, ...] = ()
    """What the interval covers: of seed, training text, signs, samples; or residuals, sites, a covariance."""
    unit: str = "% of PPL"
    """One of `UNITS`."""

    @property
    def verdict(self) -> str:
        """Of a comparison: whether the interval leaves out 0; none by a single replicate, which knows no chance."""
        if not UNITS[self.unit].comparison:
            return ""
        if self.low is None:
            return "no interval"
        if self.replicates == 1:
            return UNKNOWN
        return "lower" if self.high < 0 else "higher" if self.low > 0 else NOTHING

    @property
    def error(self) -> float | None:
        """The standard error of a Student's interval; None without one. Of an asymmetric one it is half its width."""
        return None if self.low is None else (self.high - self.low) / 2 / float(critical(self.dof or math.inf))

    @property
    def p(self) -> float | None:
        """Student's, of the value against 0, two-sided; None without an error."""
        return float(2 * stats.t.sf(abs(self.value / self.error), self.dof or math.inf)) if self.error else None

    @property
    def in_unit(self) -> tuple[float, float | None, float | None]:
        """Value and interval in the unit that is read."""
        ends = (self.value, self.low, self.high)
        return tuple(None if x is None else float(UNITS[self.unit].show(x)) for x in ends)

    def text(self) -> tuple[str, str]:
        """Value and interval as they are printed; of no interval, nothing."""
        unit = UNITS[self.unit]
        value, *ends = (None if x is None else unit.text.format(x).replace("-", "−") for x in self.in_unit)
        return value, "" if None in ends else f"{ends[0].removesuffix(' %')} to {ends[1]}"


class Estimates(list[Estimate]):
    """Estimates that show themselves as a table, and carry themselves with it."""

    correction = "fdr_bh"
    """Of `CORRECTIONS`: how p of several differences are corrected."""

    def holm(self) -> "Estimates":
        """These as one family of planned questions, in which not one is to be wrong by chance (Holm 1979)."""
        family = Estimates(self)
        family.correction = "holm"
        return family

    def frame(self) -> pd.DataFrame:
        """One row an estimate, its own fields, value and interval in its unit, and the verdict."""
        rows = []
        for e, verdict in zip(self, self.verdicts, strict=True):
            value, low, high = e.in_unit
            shown = {"value": value, "low": low, "high": high, "over": ", ".join(e.over), "verdict": verdict}
            rows.append(asdict(e) | shown)
        return pd.DataFrame(rows, columns=[*Estimate.__dataclass_fields__, "verdict"])

    @property
    def verdicts(self) -> list[str]:
        """Of each estimate.

        Where several differences stand together, some intervals leave out 0 by chance: verdicts then go by a p that is
        below 0.05 for those of which, together, one in twenty is expected to be nothing (Benjamini & Hochberg 1995), or
        by that of `holm`.
        """
        adjusted = self.adjusted()
        return [NOTHING if adjusted.get(e, 0) >= 1 - LEVEL else e.verdict for e in self]

    def table(self) -> Styler:
        """What a reader sees, in at most eight columns; what all rows have in common stands above them."""
        rows, adjusted, common = [], self.adjusted(), []
        for e, verdict in zip(self, self.verdicts, strict=True):
            value, interval = e.text()
            if e in adjusted:
                verdict += f", p {adjusted[e]:.3f}" if adjusted[e] >= 0.001 else ", p < 0.001"
            row = {"": e.contrast, "at": e.at, "estimate": value, "95 % interval": interval}
            row |= {"covers": ", ".join(e.over), "replicates": str(e.replicates or "")}
            rows.append(row | {"d.o.f.": "" if e.dof is None else f"{e.dof:.3g}", "verdict": verdict})
        table = pd.DataFrame(rows)
        if adjusted:
            common.append(f"p adjusted ({CORRECTIONS[self.correction]}), intervals not")
        for name, words in (("covers", "intervals cover"), ("replicates", "replicates")):
            if len(table) > 1 and table[name].nunique() == 1 and table[name][0]:
                common.append(f"{words}: {table.pop(name)[0]}")
        filled = [name for name in table if (table[name] != "").any()]
        return table[filled].style.hide(axis="index").format(escape="html").set_caption("; ".join(common))

    def adjusted(self) -> dict[Estimate, float]:
        """The corrected p of the differences with an interval over more than samples, if there are several."""
        tested = [e for e in self if UNITS[e.unit].comparison and e.error and e.verdict != UNKNOWN]
        if len(tested) < 2:
            return {}
        return dict(zip(tested, multipletests([e.p for e in tested], method=self.correction)[1].tolist(), strict=True))

    def forest(self, title: str = "", width: float = WIDTH) -> Figure | None:
        """Every estimate with its interval, means over sites as diamonds; hollow without a verdict. None of none."""
        if not self:
            return None
        unit = UNITS[self[0].unit]
        figure, ((axes,),) = new_figure(height=1.1 + 0.32 * len(self), width=width)
        for row, (e, verdict) in enumerate(zip(self, self.verdicts, strict=True)):
            value, low, high = e.in_unit
            significant = verdict in ("lower", "higher") or not unit.comparison
            colour = COLOURS[0] if significant else "0.45"
            if low is not None:
                axes.plot([low, high], [row, row], color=colour, linewidth=2)
            axes.plot(value, row, "o", color=colour, mfc=colour if significant else "white", markersize=7)
        if unit.comparison:
            axes.axvline(0, **REFERENCE)
        same = len({e.contrast for e in self}) == 1 and all(e.at for e in self)  # then places tell them apart
        labels = [e.at if same else ", ".join(filter(None, (e.contrast, e.at))) for e in self]
        label = "difference of PPL, %" if self[0].unit == "% of PPL" else self[0].unit
        filled = "; filled: significant, corrected" if unit.comparison else ""
        axes.set_ylim(len(self) - 0.5, -0.5)
        figure.supxlabel(f"{label}\n(95 % intervals{filled})", fontsize="medium")
        figure.suptitle(title or (self[0].contrast if same else ""), fontsize="medium")
        axes.set_yticks(range(len(self)), labels)
        axes.grid(axis="y", visible=False)
        return figure

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        verdicts = self.verdicts
        data = [asdict(e) | {"verdict": v, "in_unit": e.in_unit} for e, v in zip(self, verdicts, strict=True)]
        if self.correction == "holm":  # p that prose states, which the verdicts show
            of = self.adjusted().items()
            data += [{"contrast": f"p by Holm, {e.contrast}", "at": e.at, "in_unit": (p, None, None)} for e, p in of]
        html = self.table().to_html() if self else "<p>No estimate: it takes further runs, sizes or replicates.</p>"
        return {"text/html": html, MIME: data}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.frame().to_string())

    def save(self, path: Any) -> None:
        """Write `frame()` as a CSV file, atomically, without verdicts, which go by the table that an estimate is in."""
        with atomic(resolve(path)) as temporary:
            self.frame().drop(columns="verdict").to_csv(temporary, index=False)


def critical(dof: Any) -> Any:
    """Student's t that intervals reach out to."""
    return special.stdtrit(dof, (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Moments:
    """Means [p] of p quantities, and the covariances of their errors: a sum of `parts` ([p, p], degrees of freedom)."""

    mean: np.ndarray
    parts: list[tuple[np.ndarray, float]]
    """Empty where there is no error to be seen. A third one is what the first two, over replicates and over samples,
    both hold: it counts once."""
    n: int
    replicates: int
    over: tuple[str, ...]

    def variance(self, weights: np.ndarray) -> tuple[Any, Any]:
        """Of weighted sums [..., p] of the quantities, and its degrees of freedom: numbers, or arrays [...].

        Of all parts together, with Satterthwaite's (1946) degrees of freedom; or of the first one alone where that
        gives the wider interval, for a few replicates that lie close by chance make the other one too narrow. A part
        whose variance is estimated as negative counts as none.
        """
        w = np.asarray(weights, float)
        parts = np.array([np.clip(np.einsum("...i,ij,...j", w, cov, w), 0, None) for cov, _ in self.parts])
        alone = parts[0]
        if len(parts) == 3:
            by_replicate, by_sample, both = parts
            parts = np.array([np.maximum(by_replicate, both), np.clip(by_sample - both, 0, None)])
        dofs = np.array([dof for _, dof in self.parts[: len(parts)]]).reshape(-1, *[1] * (w.ndim - 1))
        total, few = parts.sum(0), np.broadcast_to(dofs[0], parts.shape[1:])
        spread = (parts**2 / dofs).sum(0)
        dof = np.divide(total**2, spread, out=few.copy(), where=spread > 0)
        wider = critical(few) ** 2 * alone >= critical(dof) ** 2 * total
        return np.where(wider, alone, total)[()], np.where(wider, few, dof)[()]

    def estimate(self, weights: Sequence[float], contrast: str, at: str = "", unit: str = "% of PPL") -> Estimate:
        """A weighted sum of the quantities, with Student's interval."""
        w = np.asarray(weights, float)
        value, low, high, dof = float(w @ self.mean), None, None, None
        if self.parts:
            variance, dof = self.variance(w)
            half = float(critical(dof) * math.sqrt(variance))
            low, high, dof = value - half, value + half, float(dof)
        over = self.over if self.parts else ()
        return Estimate(contrast, at, value, low, high, self.n, self.replicates, dof, over, unit)


def crossed(sums: np.ndarray, runs: pd.DataFrame, tokens: np.ndarray) -> Moments:
    """Means of p quantities that are known in replicates and, perhaps, on samples, with their errors.

    Args:
        sums: [replicates, samples, p], of which the mean over replicates, divided by all tokens, is estimated.
        runs: those that the quantities are of, or pairs of runs.
        tokens: [samples], the samples' weights; a single one is no draw.
    """
    m = len(sums)
    over = tuple(name for column, name in tidy.DRAWN.items() if m > 1 and runs[column].nunique() > 1)
    n, whole = len(tokens), tokens.sum()
    means = sums.sum((0, 1)) / m / whole
    errors = (sums - means * tokens[:, None]) / whole / m  # [m, n, p]
    parts = []
    if m > 1:
        by_replicate = errors.sum(1)
        parts.append((m / (m - 1) * by_replicate.T @ by_replicate, m - 1.0))
    if n > 1:
        over = (*over, SAMPLES)
        by_sample = errors.sum(0)
        effective = whole**2 / np.square(tokens).sum()  # samples of equal length that weigh as much (Kish, 1965)
        dof = max(effective - 1, 1.0)
        parts.append((n / (n - 1) * by_sample.T @ by_sample, dof))
        if m > 1:
            shared = tokens[:, None] / whole * errors.sum(1, keepdims=True)  # what a replicate does to every token
            rest = (errors - by_sample / m - shared).reshape(m * n, -1)
            parts.append((m * n / ((m - 1) * (n - 1)) * rest.T @ rest, (m - 1.0) * dof))
    return Moments(means, parts, len(runs), m, over)


class Coefficients:
    """A formula fitted by least squares in every replicate by itself.

    Args:
        formula: of statsmodels; its left side is a column of `runs`. `log_ppl` (test) and `val_loss` (validation) are
            losses: where they were kept by sample, the interval covers samples, too.
        runs: as `runs.read_runs` gives them, or `pairs`. Replicates in which the formula cannot be fitted are left out.
        judged: in place of the losses that the runs have: of each row its sums over samples, [rows, samples], and the
            samples' tokens.

    Attributes:
        by_replicate: the coefficients, a row a replicate.
        moments: of the coefficients, in that order. Of a single replicate the error is that of its residuals.

    Raises:
        ValueError: no replicate can tell the coefficients apart.
    """

    def __init__(self, formula: str, runs: pd.DataFrame, judged: tuple[np.ndarray, np.ndarray] | None = None):
        left = formula.partition("~")[0].strip()
        runs = runs.reset_index(drop=True)
        known = runs.dropna(subset=[left]) if left in runs else runs  # else a level without a value would be a column
        if known.empty:
            raise ValueError(f"no run has a value of {left}: {formula!r} cannot be fitted")
        model = smf.ols(formula, known)  # of all replicates, so that all have the same columns
        used, terms = known.loc[model.data.row_labels], model.exog.shape[1]
        if judged is not None:
            judged = judged[0][used.index], judged[1]
        elif left in LOSSES:
            judged = tidy.loss_sums(used, LOSSES[left])
        by_replicate = used.groupby("replicate").indices.items()
        members = {name: rows for name, rows in by_replicate if np.linalg.matrix_rank(model.exog[rows]) == terms}
        if not members:
            raise ValueError(
                f"no replicate can tell the {terms} coefficients of {formula!r} apart by itself: leave a term out"
            )
        fits = [sm.OLS(model.endog[rows], model.exog[rows]).fit() for rows in members.values()]
        self.terms = model.exog_names
        self.by_replicate = pd.DataFrame([fit.params for fit in fits], list(members), self.terms)
        used = used.iloc[np.concatenate(list(members.values()))]
        if len(fits) == 1:
            (fit,) = fits
            parts = [(fit.cov_params(), float(fit.df_resid))] if fit.df_resid > 0 else []
            self.moments = Moments(fit.params, parts, len(used), 1, (RESIDUALS,))
        else:
            values, tokens = judged or (model.endog[:, None], np.ones(1))
            sums = [(np.linalg.pinv(model.exog[rows]) @ values[rows]).T for rows in members.values()]  # [samples, p]
            self.moments = crossed(np.stack(sums), used, tokens)

    def estimate(
        self, term: str | Mapping[str, float], contrast: str = "", at: str = "", unit: str = "% of PPL"
    ) -> Estimate:
        """A coefficient, or a sum of several, each times its number."""
        terms = {term: 1.0} if isinstance(term, str) else term
        missing = [name for name in terms if name not in self.terms]
        if missing:
            raise KeyError(f"{missing[0]!r} is not among the coefficients: {', '.join(self.terms)}")
        weights = [terms.get(name, 0.0) for name in self.terms]
        return self.moments.estimate(weights, contrast or " + ".join(terms), at, unit)


def from_fit(result: Any, hypothesis: str, contrast: str = "", unit: str = "% of PPL") -> Estimate:
    """A linear combination of a statsmodels result's coefficients, by its own `t_test`: "x", or "x + 2 * y"."""
    test = result.t_test(hypothesis)
    low, high = (float(x) if math.isfinite(x) else None for x in test.conf_int(1 - LEVEL)[0])
    dof, over = (None, ()) if low is None else (float(test.df_denom), (RESIDUALS,))
    return Estimate(contrast or hypothesis, "", test.effect.item(), low, high, int(result.nobs), 0, dof, over, unit)


def mean(runs: pd.DataFrame, column: str, contrast: str, at: str = "", unit: str = "") -> Estimate:
    """The mean of a column over replicates: Student's interval.

    Raises:
        ValueError: no run has a value of it.
    """
    rows = runs.dropna(subset=[column])
    if rows.empty:
        raise ValueError(f"none of {len(runs)} runs has {column}: there is no mean of it")
    values = rows.groupby("replicate")[column].mean().to_numpy()
    return crossed(values[:, None, None], rows, np.ones(1)).estimate([1.0], contrast, at, unit)


def pairs(
    runs: pd.DataFrame, a: Mapping[str, Any], b: Mapping[str, Any], at: Sequence[str], column: str
) -> pd.DataFrame:
    """Runs with the values `a` beside those with the values `b`: a row a pair, equal in `at`, seed, text and signs.

    Both sides have a value of `column` and, of a loss, were judged on the same text.

    Args:
        runs: as `runs.read_runs` gives them.
        a, b: column → value.
        at: columns in which both are equal.
        column: what is compared.

    Returns:
        columns `at`, seed, data_seed, embedding_seed, replicate; of both sides id_a, id_b, log_ppl_a, …; and
        difference, of `column`, a − b.

    Raises:
        ValueError: a column or a value of it is not there, or a side has two runs of one place.
    """
    keys = [*at, *tidy.DRAWN]
    if missing := [name for name in (column, *a, *b, *at) if name not in runs]:
        raise ValueError(f"the runs have no column {missing[0]!r}")
    sides = []
    for wanted in (a, b):
        if absent := [f"{name} = {value!r}" for name, value in wanted.items() if not (runs[name] == value).any()]:
            raise ValueError(f"no run has {absent[0]}")
        side = runs[np.logical_and.reduce([runs[name] == value for name, value in wanted.items()])]
        alike = side[side.duplicated(keys, keep=False)].sort_values(keys)["id"]
        if len(alike):
            names = " and ".join(map(str, alike[:2]))
            raise ValueError(f"{names} are equal in {', '.join(keys)}: say in `at`, `a` or `b` in what they differ")
        sides.append(side)
    # grids that were read apart may number the same draws otherwise: a pair's replicate is a's
    both = sides[0].merge(sides[1].drop(columns="replicate"), on=keys, suffixes=("_a", "_b")).copy()
    both = both.assign(difference=both[f"{column}_a"] - both[f"{column}_b"])
    comparable = both["difference"].notna()
    if column in LOSSES:
        judged = [f"{LOSSES[column]}_tokens", f"{LOSSES[column]}_samples"]
        for name in (*judged, "corpus", "judged_corpus", "shuffle_samples", "max_sample_tokens"):
            if {f"{name}_a", f"{name}_b"} <= {*both}:
                of_a, of_b = both[f"{name}_a"], both[f"{name}_b"]
                comparable &= (of_a == of_b) | (of_a.isna() & of_b.isna())
    return both[comparable].copy()


def paired(
    runs: pd.DataFrame,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    at: Sequence[str] = ("train_tokens",),
    column: str = "log_ppl",
    contrast: str = "",
    over: Sequence[str] = (),
    unit: str = "% of PPL",
) -> Estimates:
    """The mean difference of a column, runs of `a` minus their partners of `b`, at every place `at` that both have.

    Losses (`log_ppl` on test, others by their text) are compared sample by sample where they were kept so.

    Args:
        runs, a, b, at, column: as `pairs`.
        contrast: its name; by default the values of `a` and `b`.
        over: further columns equal in both, over whose values each estimate is a mean; each value weighs alike, and a
            replicate that lacks one is left out.
        unit: one of `UNITS`; by default that of logarithms of perplexity.

    Raises:
        ValueError: as `pairs`; or perplexities themselves were to be compared in per cent.
    """
    if unit == "% of PPL" and not re.search("^log_|loss$|^difference$", column):
        raise ValueError(f"column = {column!r} is no logarithm of perplexity (log_ppl is test's): name its unit")
    at, over = ([names] if isinstance(names, str) else [*names] for names in (at, over))
    contrast = contrast or f"{' '.join(map(str, a.values()))} − {' '.join(map(str, b.values()))}"
    matched, result = pairs(runs, a, b, [*at, *over], column), Estimates()
    matched["place"] = matched.groupby(over, dropna=False).ngroup() if over else 0
    for key, rows in matched.groupby(at, dropna=False) if at else [((), matched)]:
        rows = rows[rows.groupby("replicate")["place"].transform("nunique") == rows["place"].nunique()]
        if rows.empty:
            continue
        difference = rows["difference"].to_numpy(float)[:, None]
        values, tokens = differences(runs, rows, column) or (difference, np.ones(1))
        by_place = pd.DataFrame(values).groupby([rows["replicate"].to_numpy(), rows["place"].to_numpy()]).mean()
        means = by_place.groupby(level=0).mean().to_numpy()  # [replicates, samples]
        moments = crossed(means[..., None], rows, tokens)
        result.append(moments.estimate([1.0], contrast, _place(at, key), unit))
    return result


def shifted(
    runs: pd.DataFrame,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    to: Mapping[str, Any],
    before: Mapping[str, Any],
    at: Sequence[str],
    column: str = "log_ppl",
    contrast: str = "",
) -> Estimates:
    """By how much `a` − `b` is more where runs have the values `to` than where they have `before`, at every place.

    It is the interaction of a fit in every replicate that has all four runs; of losses, sample by sample.

    Args:
        runs, a, b, at, column, contrast: as `paired`.
        to, before: column → value. Places of fewer than two such replicates are left out.

    Raises:
        ValueError: a replicate has more than the four runs at a place.
    """

    def have(values: Mapping[str, Any]) -> np.ndarray:
        return np.logical_and.reduce([runs[name] == value for name, value in values.items()])

    at = [at] if isinstance(at, str) else [*at]
    rows = runs.assign(first=1.0 * have(a), after=1.0 * have(to))[(have(a) | have(b)) & (have(to) | have(before))]
    kinds = rows.groupby([*at, "replicate"], dropna=False)["id"].transform("size")
    if (kinds > 4).any():
        twice = rows[kinds > 4].sort_values([*at, "replicate"])["id"].iloc[:5]
        raise ValueError(f"{', '.join(twice)} are of one replicate: name in `at` what tells them apart")
    rows = rows[kinds == 4]
    return Estimates(
        Coefficients(f"{column} ~ first * after", four).estimate("first:after", contrast, _place(at, key))
        for key, four in (rows.groupby(at, dropna=False) if at else [((), rows)])
        if four["replicate"].nunique() > 1
    )


def _place(at: Sequence[str], key: Sequence[Any]) -> str:
    """Where an estimate is: the values of the columns `at`, with their unit; nothing for one over all places."""
    shown = (
        f"{value:,} tokens" if name == "train_tokens" else f"{value:g}" if isinstance(value, float) else value
        for name, value in zip(at, key, strict=False)
    )
    return ", ".join(map(str, shown))


def differences(runs: pd.DataFrame, matched: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Of each `matched` pair of `runs` the difference of loss sums, [pairs, samples], and the samples' tokens.

    None where `column` is no loss, or both sides were judged on other text.
    """
    by_id = runs.drop_duplicates("id").set_index("id", drop=False)
    both = by_id.loc[[*matched["id_a"], *matched["id_b"]]]
    judged = tidy.loss_sums(both, LOSSES[column]) if column in LOSSES else None
    return judged and (judged[0][: len(matched)] - judged[0][len(matched) :], judged[1])


def combined(sites: Sequence[Estimate], contrast: str, at: str = "") -> Estimates:
    """One contrast at several sites, taken together by random effects: sites are draws of text, each with an effect.

    The variance between sites is Paule & Mandel's (1982), the interval of their mean Hartung & Knapp's (2001) with as
    many degrees of freedom as sites less one.

    Args:
        sites: those with an interval over replicates are taken together.
        contrast, at: as `Estimate`; {n} in `at` becomes the number of sites that are.

    Returns:
        the mean over sites, in their unit; the standard deviation between them; and the prediction for a new site, with
        Student's prediction interval (Higgins, Thompson & Spiegelhalter 2009). Nothing of fewer than three sites with
        an interval over replicates, which cannot tell their spread.
    """
    sites = [site for site in sites if site.error and site.replicates > 1]
    if len(sites) < 3:
        return Estimates()
    at = at.format(n=len(sites))
    values, variances = np.array([(site.value, site.error**2) for site in sites]).T
    result = combine_effects(values, variances, method_re="iterated")
    mean, spread = result.mean_effect_re, math.sqrt(max(result.tau2, 0))
    error = max(result.sd_eff_w_re_hksj, result.sd_eff_w_re)  # sites that happen to agree know no more than each
    n, replicates, dof = sum(site.n for site in sites), min(site.replicates for site in sites), len(sites) - 1.0
    half = float(critical(dof)) * error
    half_of_new = float(critical(dof - 1)) * math.hypot(spread, error)
    new = mean, mean - half_of_new, mean + half_of_new
    return Estimates(
        [
            Estimate(contrast, at, mean, mean - half, mean + half, n, replicates, dof, SITES, sites[0].unit),
            Estimate(f"{contrast}, sd between sites", at, spread, n=n, replicates=replicates, unit="sd, % of PPL"),
            Estimate(f"{contrast}, a new site", at, *new, n, replicates, dof - 1, SITES, "% of PPL, predicted"),
        ]
    )


def components(runs: pd.DataFrame, sources: Mapping[str, str], at: str) -> list[Estimate]:
    """The standard deviation of `log_ppl` that each of several crossed sources of chance makes.

    Sources are taken as independent and additive. The variance of one is its mean square less the residual's, over the
    runs of each level, and none where that is negative; its interval is Williams's (1962), which holds a little more
    often than it says.

    Args:
        runs: one of every combination of the sources' values.
        sources: what each is called, and its column.

    Raises:
        ValueError: a combination is missing, or there twice.
    """
    counts = runs.groupby(list(sources.values())).size()
    if len(counts) != math.prod(runs[name].nunique() for name in sources.values()) or (counts != 1).any():
        raise ValueError(f"{at}: components need one run of every combination of {', '.join(sources)}")
    table = anova_lm(smf.ols("log_ppl ~ " + " + ".join(f"C({name})" for name in sources.values()), runs).fit())
    rest, rest_dof = table.loc["Residual", ["mean_sq", "df"]]
    estimates = []
    for source, name in sources.items():
        square, dof = table.loc[f"C({name})", ["mean_sq", "df"]]
        each = len(runs) / (dof + 1)
        q = np.array([(1 + LEVEL) / 2, (1 - LEVEL) / 2])
        low, high = (square - stats.f.ppf(q, dof, rest_dof) * rest) / each / (stats.chi2.ppf(q, dof) / dof)
        ends = np.sqrt(np.clip([(square - rest) / each, low, high], 0, None))
        estimates.append(
            Estimate(f"sd by {source}", at, *ends, len(runs), round(dof) + 1, dof, tuple(sources), "sd, % of PPL")
        )
    return estimates


def collect(*groups: Iterable[Estimate]) -> Estimates:
    """Several tables of estimates as one."""
    return Estimates([e for group in groups for e in group])
