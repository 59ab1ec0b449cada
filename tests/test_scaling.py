"""Laws and crossovers against planted parameters, pooled formulas and brute force."""

import itertools
import math

import numpy as np
import pytest
import statsmodels.formula.api as smf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ctxlm.analysis.estimates import Coefficients, Moments
from ctxlm.analysis.scaling import MAX_LOG_TOKENS, crossing_share, crossing_shares, crossovers, fieller, laws
from tests.planted import MEETS, MIDDLE, SIZES, inside

CHANCE = {"text": 0.05, "own": 0.01, "tilt": 0.01, "hard": 0.05, "liked": 0.01, "noise": 0.01}
NARROW = {"text": 0.05, "own": 0.001, "tilt": 0.001, "hard": 0.05, "liked": 0.0005, "noise": 0.0005}


# Laws


def test_planted_laws_come_back(judged):
    wanted = {"A": (-0.02, 8.8), "B": (-0.3, 6.3), "C": (-0.95, 3.1)}
    result = laws(judged(wanted, text=0.1, hard=0.3).runs)  # of exact laws, whatever all sizes have in common
    assert [e.contrast for e in result] == ["α of A", "α of B", "α of C"]
    for e, (alpha, _) in zip(result, wanted.values(), strict=True):
        assert (e.value, e.low, e.high) == pytest.approx((alpha,) * 3, abs=1e-9)
        assert (e.n, e.replicates, e.unit) == (20, 4, "exponent")


def test_one_size_or_no_loss_has_no_law(judged):
    runs = judged(**CHANCE).runs
    lone = runs[(runs["configuration"] == "A") | (runs["train_tokens"] == 10_000)]
    assert [e.contrast for e in laws(lone)] == ["α of A"]
    alternating = runs[runs["train_tokens"] == np.array(SIZES)[runs["replicate"]]]  # a size a replicate
    assert len(laws(alternating)) == len(crossovers(alternating)) == 0
    missing = runs.assign(log_ppl=runs["log_ppl"].where(runs["configuration"] == "A"))
    assert len(laws(missing)) == 1 and len(crossovers(missing)) == len(laws(missing.iloc[:0])) == 0
    alone = laws(judged({"A": (-0.3, 6.0)}, SIZES[:2], replicates=1).runs)
    assert (alone[0].low, alone[0].over) == (None, ()) and alone[0].value == pytest.approx(-0.3)


# Where two laws meet


@settings(max_examples=60, deadline=None)
@example(0.0, 0.5, 0.234, 0.0156, 0.0, 0.469, 1, 3.0, 7.0)  # of two gaps
@example(0.02, -0.1, 0.01, 0.01, -0.5, 0.1, 7, 20.0, MIDDLE)  # bounded
@example(0.9, 0.1, 0.03, 0.01, 0.4, 0.05, 7, 20.0, MIDDLE)  # without a low end
@example(-1.9, 0.1, 0.05, 0.015, 0.4, 0.01, 7, 20.0, MIDDLE)  # without a high end
@given(
    *(st.floats(*ends) for ends in ((-2, 2), (-1, 1), (1e-3, 1), (1e-3, 1), (-0.95, 0.95), (0.01, 1))),
    *(st.integers(1, 10), st.floats(3, 40), st.floats(0, MAX_LOG_TOKENS)),
)
def test_the_set_is_where_the_gap_is_not_significant(b, d, sb, sd, r, share, few, many, middle):
    """Against every place tried by itself; samples and replicates have parts of their own."""
    first = np.array([[sb**2, r * sb * sd], [r * sb * sd, sd**2]])
    second = share * np.array([[sd**2, 0], [0, sb**2]])
    moments = Moments(np.array([b, d]), [(first, float(few)), (second, many)], 8, few + 1, ())
    result = fieller(moments, middle)
    x = np.append(np.linspace(0, MAX_LOG_TOKENS, 300), middle - b / d if d else 0)
    x = np.sort(x[(x >= 0) & (x <= MAX_LOG_TOKENS)])
    weights = np.column_stack([np.ones_like(x), x - middle])
    variance, dof = moments.variance(weights)
    within = abs(weights @ moments.mean) <= stats.t.ppf(0.975, dof) * np.sqrt(variance)
    near = [math.log(end) for end in (result.low, result.high) if end is not None]
    for end in near:
        gap = moments.estimate([1, end - middle], "")
        assert min(abs(gap.low), abs(gap.high)) < 1e-9 + 1e-6 * (gap.high - gap.low)
    sure = np.all([abs(x - end) > 1e-6 for end in near], axis=0) if near else np.ones(len(x), bool)
    message, slope = inside(result, x), moments.estimate([0, 1], "")
    assert message[within & sure].all()  # nothing of the set is left out
    if result.kind in ("bounded", "outside"):
        assert (result.kind == "bounded") == (slope.low > 0 or slope.high < 0)
    # Student's intervals, each with its own degrees of freedom, can leave more than one gap: one at most is told
    if result.kind == "unbounded":
        assert within.all() or (within[0] and within[-1] and (slope.low > 0 or slope.high < 0))
    elif np.count_nonzero(within[1:] != within[:-1]) <= 2:
        assert (within == message)[sure].all()


def test_without_error_there_is_no_set():
    for parts in ([], [(np.zeros((2, 2)), 3.0)]):
        result = fieller(Moments(np.array([0.03, -0.1]), parts, 4, 1, ()), MIDDLE)
        assert (result.kind, result.low, result.high) == ("no error", None, None)
        assert result.tokens == pytest.approx(math.exp(MIDDLE + 0.3))
    parallel = fieller(Moments(np.array([0.03, 0.0]), [(np.eye(2), 3.0)], 4, 4, ()), MIDDLE)
    assert (parallel.tokens, parallel.kind) == (None, "unbounded")


def test_planted_crossovers_come_back_and_what_a_pair_shares_does_not_blur_them(judged):
    for replicates in (1, 4):
        shared = {"text": 1.0, "hard": 1.0}
        (row,) = crossovers(judged(replicates=replicates, **NARROW | shared, seed=5).runs).to_dict("records")
        verdict = "within the sizes" if replicates > 1 else "none established"  # a single replicate knows no chance
        assert (row["a"], row["b"], row["kind"], row["verdict"]) == ("A", "B", "bounded", verdict)
        assert 0.9 * MEETS < row["low"] < row["tokens"] < row["high"] < 1.1 * MEETS
    assert row["tokens"] == pytest.approx(MEETS, rel=0.05)
    slopes = row["slopes"]  # a single replicate's interval is of its residuals alone
    assert row["low"] < MEETS < row["high"] and slopes.low < -0.06 < slopes.high < 0
    assert slopes.verdict == "lower" and slopes.p < 0.001 and (slopes.n, slopes.replicates) == (20, 4)


def test_the_slopes_differ_by_the_interaction_of_the_pooled_formula(judged):
    runs = judged(**CHANCE).runs
    (row,) = crossovers(runs).to_dict("records")
    formula = "log_ppl ~ log_tokens * configuration"
    fit = smf.ols(formula, runs).fit()
    shift, slope = (fit.params[name] for name in ("configuration[T.B]", "log_tokens:configuration[T.B]"))
    assert row["slopes"].value == pytest.approx(slope) and row["tokens"] == pytest.approx(math.exp(-shift / slope))
    other = Coefficients(formula, runs).estimate("log_tokens:configuration[T.B]")
    for name in ("low", "high", "dof", "p"):
        assert getattr(row["slopes"], name) == pytest.approx(getattr(other, name), rel=1e-6), name


def test_the_verdict_is_where_the_laws_meet(judged):
    edge = 6.3 + 0.06 * (math.log(1.06 * SIZES[0]) - MIDDLE)  # within the sizes, but not all of its set
    of_b = (-0.36, 6.6), (-0.36, edge), (-0.30, 6.35), (-0.36, 10.0)
    rows = [crossovers(judged({"A": (-0.30, 6.3), "B": b}, **NARROW).runs).iloc[0] for b in of_b]
    assert [row["verdict"] for row in rows] == ["not within the sizes"] * 2 + ["none established"] * 2
    assert (rows[3]["kind"], rows[3]["tokens"]) == ("nowhere", None) and rows[3]["slopes"].p < 0.01


def test_every_two_configurations_are_compared(judged):
    runs = judged({"A": (-0.3, 6.3), "B": (-0.36, 6.32), "C": (-0.4, 6.2)}, **NARROW).runs
    result = crossovers(runs)
    assert [*zip(result["a"], result["b"], strict=True)] == [*itertools.combinations("ABC", 2)]
    assert [e.value for e in result["slopes"]] == pytest.approx([-0.06, -0.1, -0.04], abs=0.005)
    few = crossovers(runs[(runs["configuration"] != "C") | (runs["train_tokens"] == 10_000)])
    assert few["a"].tolist() == ["A"] and len(crossovers(runs[runs["configuration"] == "A"])) == 0


# Crossovers by chance


def test_curves_side_by_side_cross_by_chance_as_often_as_two_coins_fall():
    alike = crossing_share([0, 1], np.eye(2), None)
    both = stats.norm.cdf(1) * stats.norm.sf(1)  # the leader ahead at the smaller size, behind at the larger
    assert alike == pytest.approx([1 / 4, both], abs=0.004)
    assert crossing_share([1], np.eye(2), None, replicates=4)[0] == pytest.approx(
        stats.norm.cdf(2) * stats.norm.sf(2), abs=0.002
    )
    for dof in (2, 4):  # a covariance of three replicates, of five: as if drawn from what may lie behind it
        behind = stats.invwishart(dof, dof * np.eye(2), seed=1).rvs(40_000)
        off = np.linalg.cholesky(behind) @ np.random.default_rng(1).standard_normal((40_000, 2, 20))
        drawn = ((off[:, 0] < 1) & (off[:, 1] > 1)).mean()
        assert crossing_share([1], np.eye(2), dof)[0] == pytest.approx(drawn, abs=0.004)
    far = 1 - (2 * stats.norm.cdf(2 / np.sqrt(2)) - 1) ** 2  # of ties, those that move by two: u > |v|, u > √2
    assert crossing_share([0], np.eye(2), None, swing=2)[0] == pytest.approx(far / 4, abs=0.002)
    never = np.full((2, 2), 1.0)  # what is off at one size is off at the other
    assert crossing_share([0, 1], never, 4).tolist() == [0, 0]


def test_the_lead_and_its_scatter_are_those_of_the_pairs(judged):
    runs = judged(**CHANCE).runs
    ends = runs[runs["train_tokens"].isin([SIZES[0], SIZES[-1]])]
    a, b = (
        rows.pivot(index="replicate", columns="train_tokens", values="log_ppl")
        for _, rows in ends.groupby("experiment")
    )
    (row,) = crossing_shares(runs).itertuples()
    assert row.lead == pytest.approx((b - a).to_numpy().mean()) and row.dof == 3
    assert row.covariance == pytest.approx((a - b).cov().to_numpy())
    shares = [e.value for e in row.estimates]
    assert {(e.n, e.replicates) for e in row.estimates} == {(4, 4)} and shares[0] > shares[1] > shares[2] > 0
    behind = np.linalg.cholesky(stats.invwishart(3, 3 * row.covariance, seed=1).rvs(1000))
    off, lead = behind @ np.random.default_rng(1).standard_normal((2, 4000)), abs(row.lead)
    for n, e in zip((1, 3, 5), row.estimates, strict=True):
        drawn = ((off[:, 0] < lead * math.sqrt(n)) & (off[:, 1] > lead * math.sqrt(n))).mean(1)
        assert (e.low, e.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    (given,) = crossing_shares(runs, lead=0.02).itertuples()
    assert given.estimates[0].at == "with a lead of 2 %"
    assert given.estimates[0].value == crossing_share([0.02], row.covariance, 3)[0] != shares[0]
    (as_far,) = crossing_shares(runs, lead=0.02, swing=0.03).itertuples()
    assert as_far.estimates[0].at == "with a lead of 2 %, a swing of 3 %"
    assert 0 < as_far.estimates[0].value < given.estimates[0].value
    for e in [*row.estimates, *given.estimates, *as_far.estimates]:
        assert e.low <= e.value <= e.high and e.over == ("covariance",) and e.dof == 3
    assert crossing_shares(runs[runs["replicate"] < 2]).empty and crossing_shares(runs[:0]).empty
    for sizes in (SIZES, SIZES[:1]):  # a changed parameter that does not bind, at all sizes or at one
        same = runs.groupby(["train_tokens", "replicate"])["log_ppl"].transform("first")
        alike = runs.assign(log_ppl=same.where(runs["train_tokens"].isin(sizes), runs["log_ppl"]))
        assert crossing_shares(alike).empty
