"""Perplexity against training tokens: a power law, and where two of them meet."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

from ctxlm.analysis.estimates import (
    UNKNOWN,
    Coefficients,
    Estimate,
    Estimates,
    Moments,
    critical,
    differences,
    pairs,
)

MAX_LOG_TOKENS = math.log(1e15)
"""Laws that meet beyond so many tokens, or below one, have slopes that hardly differ: that is no crossover."""
STUDIES = (1, 3, 5)
"""Replicates of the studies that are simulated."""


def laws(runs: pd.DataFrame) -> Estimates:
    """The exponent α of PPL = a · tokensᵅ (the form of Kaplan et al., 2020), a row a configuration.

    Least squares of log test PPL on log tokens. A configuration without a replicate of two sizes has no row.

    `runs` are as `runs.read_runs` gives them.
    """
    result = Estimates()
    for label, rows in runs.dropna(subset=["log_ppl"]).groupby("configuration"):
        if rows.groupby("replicate")["train_tokens"].nunique().max() > 1:
            fits = Coefficients("log_ppl ~ log_tokens", rows)
            result.append(fits.estimate("log_tokens", f"α of {label}", unit="exponent"))
    return result


@dataclass(frozen=True)
class Crossover:
    """Where the laws of `b` and `a` meet, and what Fieller's theorem says of it; 95 %."""

    tokens: float | None
    """None: the laws meet nowhere between 1 and 10¹⁵ tokens."""
    kind: str
    """From 1 to 10¹⁵ tokens the crossover lies `bounded`: within the ends; `outside`: anywhere but between them;
    `unbounded`: anywhere; `nowhere`; `no error`: none can be estimated."""
    low: float | None
    high: float | None
    """Ends, tokens; None for one below 1 or beyond 10¹⁵."""


def fieller(moments: Moments, middle: float = 0.0) -> Crossover:
    """The tokens for which shift + slope · (log tokens − middle) is not significantly different from 0 (Fieller, 1954).

    Every place is tried with the degrees of freedom that it has there, so that the quadratic of the textbook will not
    do; it is `bounded` where the slopes differ significantly. By hand, since the libraries at hand have no confidence
    set of a ratio that may be unbounded.

    Args:
        moments: of shift and slope of a difference of two losses.
        middle: log tokens at which shift is the difference.
    """
    shift, slope = moments.mean
    log_tokens = middle - shift / slope if abs(slope) > 1e-12 else math.inf
    tokens = math.exp(log_tokens) if 0 <= log_tokens <= MAX_LOG_TOKENS else None
    at_infinity = np.array([0.0, 1.0])
    if not moments.parts or moments.variance(at_infinity)[0] <= 1e-20:
        return Crossover(tokens, "no error", None, None)

    def excess(weights: np.ndarray) -> np.ndarray:
        """By how much the size of a difference exceeds half its interval."""
        variance, dof = moments.variance(weights)
        return abs(weights @ moments.mean) - critical(dof) * np.sqrt(variance) - 1e-12

    def at(x: np.ndarray) -> np.ndarray:
        return excess(np.stack([np.ones_like(x), x - middle], axis=-1))

    tried = np.linspace(0, MAX_LOG_TOKENS, 2000)
    tried = tried if tokens is None else np.union1d(tried, log_tokens)
    significant = at(tried) > 0
    if significant.all() or not significant.any():
        return Crossover(tokens, "nowhere" if significant.all() else "unbounded", None, None)
    bounded = excess(at_infinity) > 0
    # With other degrees of freedom elsewhere there may be several gaps: reported is what holds all of the set.
    runs = np.split(np.arange(len(tried)), np.flatnonzero(significant[1:] != significant[:-1]) + 1)
    span = np.flatnonzero(~significant) if bounded else max((rows for rows in runs if significant[rows[0]]), key=len)
    first, last = span[0], span[-1]
    if bounded and last - first == len(tried) - 1:
        return Crossover(tokens, "unbounded", None, None)
    low = math.exp(optimize.brentq(at, *tried[[first - 1, first]])) if first else None
    high = math.exp(optimize.brentq(at, *tried[[last, last + 1]])) if last < len(tried) - 1 else None
    return Crossover(tokens, "bounded" if bounded else "outside", low, high)


def _compared(runs: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Of every two configurations a and b their pairs, with b − a as `difference`; none of a single size."""
    if runs["train_tokens"].nunique() < 2:
        return
    for a, b in itertools.combinations(sorted(runs["configuration"].unique()), 2):
        yield a, b, pairs(runs, {"configuration": b}, {"configuration": a}, ["train_tokens"], "log_ppl")


def crossovers(runs: pd.DataFrame) -> pd.DataFrame:
    """Of every two configurations: do their slopes differ, and where do their laws meet? A row a pair.

    Fitted to differences of runs of equal size and replicate, so that what a pair shares is no error: for equally many
    runs of each size, that is the interaction of `log_ppl ~ log_tokens * configuration`.

    Columns: a, b, slopes (an `Estimate`, b − a), tokens, kind, low, high (as `Crossover`), verdict.
    """
    rows = []
    for a, b, both in _compared(runs):
        if not both.groupby("replicate")["train_tokens"].nunique().max() > 1:
            continue
        log_tokens = np.log(both["train_tokens"])
        middle = log_tokens.mean()
        both = both.assign(x=log_tokens - middle)
        moments = Coefficients("difference ~ x", both, differences(runs, both, "log_ppl")).moments
        slopes = moments.estimate([0, 1], f"α of {b} − α of {a}", unit="difference of exponents")
        met = fieller(moments, middle)
        verdict = "none established"
        if met.kind == "bounded" and met.tokens is not None and slopes.verdict != UNKNOWN:
            low, high = met.low or 0, met.high or math.inf
            inside = both["train_tokens"].min() <= low and high <= both["train_tokens"].max()
            verdict = "within the sizes" if inside else "not within the sizes"
        rows.append({"a": a, "b": b, "slopes": slopes} | asdict(met) | {"verdict": verdict})
    return pd.DataFrame(rows, columns="a b slopes tokens kind low high verdict".split())


def crossing_share(
    leads: Sequence[float],
    covariance: np.ndarray,
    dof: float | None,
    replicates: int = 1,
    draws: int = 100_000,
    swing: float = 0.0,
) -> np.ndarray:
    """The share of studies that see the leader ahead at the smaller size and behind at the larger: by chance alone.

    Of so many simulated ones, in which its true lead is the same at both. Deviations are normal, or follow the
    predictive law of two that share an estimated covariance, Student's with a degree of freedom less (Gelman et al.
    2013, Bayesian Data Analysis, 3.6).

    Args:
        leads: differences of two losses, nats, of either sign.
        covariance: [2, 2], of that difference at the smaller and the larger size, from replicate to replicate.
        dof: degrees of freedom that it has; None: it is known.
        replicates: of a study, which takes their mean.
        swing: by which the difference moves from one size to the other, at least; nats.
    """
    chance = np.random.default_rng(0)
    off = chance.multivariate_normal(np.zeros(2), covariance / replicates, draws)
    if dof is not None:
        off /= np.sqrt(chance.chisquare(dof - 1, (draws, 1)) / dof)
    far = off[:, 1] - off[:, 0] >= swing
    return np.array([(far & (off[:, 0] < lead) & (off[:, 1] > lead)).mean() for lead in np.abs(leads)])


def crossing_shares(runs: pd.DataFrame, lead: float | None = None, swing: float = 0.0) -> pd.DataFrame:
    """Of every two configurations: how often would a study see their curves cross, if they ran side by side?

    Their difference is taken to be the same at the smallest and the largest size, `lead` (nats) or else the mean over
    both, and to scatter from replicate to replicate as it did. A row a pair that scatters, in three replicates of both.
    With a `swing` (nats) only crossovers count in which the difference moves as far.

    Columns: a, b, lead (nats, b − a), covariance and dof (as in `crossing_share`), and estimates, the share of studies
    of 1, 3 and 5 replicates that see a crossover. Intervals hold 95 % of the covariances that may lie behind the one
    observed (inverse Wishart, the posterior by Jeffreys' prior; Gelman et al. 2013, Bayesian Data Analysis, 3.6).
    """
    rows = []
    for a, b, both in _compared(runs):
        gaps = both.pivot_table(index="replicate", columns="train_tokens", values="difference")
        if gaps.shape[1] < 2:
            continue
        gaps = gaps.iloc[:, [0, -1]].dropna()
        if len(gaps) < 3 or np.linalg.matrix_rank(gaps.cov()) < 2:  # as of runs of equal losses: nothing scatters
            continue
        covariance, dof = gaps.cov().to_numpy(), len(gaps) - 1
        apart = gaps.to_numpy().mean() if lead is None else lead
        conditions = [(lead, "with a lead of"), (swing or None, "a swing of")]
        at = ", ".join(f"{words} {100 * math.expm1(x):.0f} %" for x, words in conditions if x is not None)
        others = stats.invwishart(dof, covariance * dof, seed=0).rvs(500)
        shares = []
        for n in STUDIES:
            (share,) = crossing_share([apart], covariance, dof, n, swing=swing)
            drawn = [crossing_share([apart], other, None, n, 4000, swing) for other in others]
            ends = np.quantile(drawn, [0.025, 0.975])
            contrast = f"{a} and {b} cross by chance, {n} replicate{'s' * (n > 1)}"
            shares.append(
                Estimate(contrast, at, share, *ends, len(gaps), len(gaps), dof, ("covariance",), "% of studies")
            )
        rows.append({"a": a, "b": b, "lead": apart, "covariance": covariance, "dof": dof, "estimates": shares})
    return pd.DataFrame(rows, columns=["a", "b", "lead", "covariance", "dof", "estimates"])
