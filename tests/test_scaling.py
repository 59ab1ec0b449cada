"""Laws, crossovers and forecasts against planted parameters, pooled formulas, brute force and textbook formulas."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ctxlm.analysis.estimates import Coefficients, Moments
from ctxlm.analysis.scaling import (
    MAX_LOG_TOKENS,
    Crossover,
    crossing_share,
    crossing_shares,
    crossovers,
    fieller,
    forecasts,
    laws,
    saturating,
)
from ctxlm.files import ROOT
from tests.planted import MEETS, MIDDLE, SIZES, Planted, inside

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
    assert len(forecasts(missing)) == 2
    alone = laws(judged({"A": (-0.3, 6.0)}, SIZES[:2], replicates=1).runs)
    assert (alone[0].low, alone[0].over) == (None, ()) and alone[0].value == pytest.approx(-0.3)


# Where two laws meet


@settings(max_examples=60, deadline=None)
@example(0.0, 0.5, 0.234, 0.0156, 0.0, 0.469, 1, 3.0, 7.0)  # of two gaps
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


def textbook(b, d, cov, dof, middle) -> Crossover:
    """Fieller's quadratic, of a covariance of so many degrees of freedom everywhere, from 1 to 10¹⁵ tokens."""
    t2 = stats.t.ppf(0.975, dof) ** 2
    square, half, rest = d**2 - t2 * cov[1, 1], b * d - t2 * cov[0, 1], b**2 - t2 * cov[0, 0]
    root = half**2 - square * rest
    if square < 0 and root < 0:
        return Crossover(None, "unbounded", None, None)
    low, high = (middle + end for end in sorted((-half + sign * math.sqrt(root)) / square for sign in (-1, 1)))
    kind, beyond = ("bounded", "nowhere") if square > 0 else ("outside", "unbounded")
    if high < 0 or low > MAX_LOG_TOKENS:
        return Crossover(None, beyond, None, None)
    if low < 0 and high > MAX_LOG_TOKENS:
        return Crossover(None, {"nowhere": "unbounded", "unbounded": "nowhere"}[beyond], None, None)
    return Crossover(None, kind, *(math.exp(end) if 0 <= end <= MAX_LOG_TOKENS else None for end in (low, high)))


PLACES = {
    "bounded": (0.02, -0.1, 0.01, 0.01),
    "bounded, without a low end": (0.9, 0.1, 0.03, 0.01),
    "bounded, without a high end": (-1.9, 0.1, 0.05, 0.015),
    "outside": (0.1, 0.01, 0.02, 0.02),
    "outside, without a high end": (0.1, 0.006, 0.02, 0.0031),
    "unbounded": (0.01, 0.01, 0.1, 0.1),
    "unbounded, on the range": (0.5, 0.05, 1.0, 0.01),
    "nowhere": (3.0, 0.1, 0.01, 0.01),
    "nowhere, of slopes alike": (1.0, 0.001, 0.01, 0.002),
}


@pytest.mark.parametrize("r", [-0.5, 0.0, 0.4])
def test_with_one_source_of_chance_the_set_is_the_textbooks(r):
    for place, (b, d, sb, sd) in PLACES.items():
        cov = np.array([[sb**2, r * sb * sd], [r * sb * sd, sd**2]])
        result = fieller(Moments(np.array([b, d]), [(cov, 7.0)], 8, 8, ()), MIDDLE)
        expected = textbook(b, d, cov, 7, MIDDLE)
        assert result.kind == expected.kind, place
        for end, wanted in ((result.low, expected.low), (result.high, expected.high)):
            assert (end is None) == (wanted is None) and (end is None or end == pytest.approx(wanted, rel=1e-6)), place
        if r == 0:
            assert result.kind == place.partition(",")[0]
            assert (result.low is None) >= ("low end" in place) and (result.high is None) >= ("high end" in place)


def test_without_error_there_is_no_set():
    for parts in ([], [(np.zeros((2, 2)), 3.0)]):
        result = fieller(Moments(np.array([0.03, -0.1]), parts, 4, 1, ()), MIDDLE)
        assert (result.kind, result.low, result.high) == ("no error", None, None)
        assert result.tokens == pytest.approx(math.exp(MIDDLE + 0.3))
    parallel = fieller(Moments(np.array([0.03, 0.0]), [(np.eye(2), 3.0)], 4, 4, ()), MIDDLE)
    assert (parallel.tokens, parallel.kind) == (None, "unbounded")


def test_no_text_has_fewer_than_one_token_or_more_than_ten_to_the_fifteenth():
    for power in (-1, 1, 14, 16):
        gap = 0.1 * (MIDDLE - power * math.log(10))
        result = fieller(Moments(np.array([gap, 0.1]), [(np.diag([1e-6, 1e-8]), 7.0)], 8, 8, ()), MIDDLE)
        if power in (1, 14):
            assert result.kind == "bounded" and result.low < 10**power < result.high
            assert result.tokens == pytest.approx(10**power)
        else:
            assert (result.kind, result.tokens) == ("nowhere", None)


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
    assert slopes.verdict == "lower" and row["p"] < 0.001 and (slopes.n, slopes.replicates) == (20, 4)


def test_the_slopes_differ_by_the_interaction_of_the_pooled_formula(judged):
    runs = judged(**CHANCE).runs
    (row,) = crossovers(runs).to_dict("records")
    formula = "log_ppl ~ log_tokens * configuration"
    fit = smf.ols(formula, runs).fit()
    shift, slope = (fit.params[name] for name in ("configuration[T.B]", "log_tokens:configuration[T.B]"))
    assert row["slopes"].value == pytest.approx(slope) and row["tokens"] == pytest.approx(math.exp(-shift / slope))
    whole = Coefficients(formula, runs)
    one, other = row["slopes"], whole.estimate("log_tokens:configuration[T.B]")
    assert (one.low, one.high, one.dof) == pytest.approx((other.low, other.high, other.dof), rel=1e-6)
    variance, dof = whole.moments.variance(np.array([0, 0, 0, 1]))
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(slope) / math.sqrt(variance), dof), rel=1e-6)
    two = [whole.terms.index("configuration[T.B]"), 3]  # not centred: the same set
    parts = [(part[np.ix_(two, two)], dof) for part, dof in whole.moments.parts]
    raw = fieller(replace(whole.moments, mean=whole.moments.mean[two], parts=parts))
    assert raw.kind == row["kind"]
    places = ["tokens", "low", "high"]
    ends = [math.nan if end is None else end for end in (raw.tokens, raw.low, raw.high)]
    assert ends == pytest.approx([row[name] for name in places], rel=1e-5, nan_ok=True)
    swapped = runs.assign(configuration=runs["configuration"].map({"A": "B", "B": "A"}))
    (turned,) = crossovers(swapped).to_dict("records")
    assert turned["slopes"].value == pytest.approx(-slope)
    for name in (*places, "p"):
        assert turned[name] == pytest.approx(row[name], nan_ok=True)


def test_the_verdict_is_where_the_laws_meet(judged):
    for alpha, level, verdict in ((-0.36, 6.6, "beyond the sizes"), (-0.30, 6.35, "none established")):
        row = crossovers(judged({"A": (-0.30, 6.3), "B": (alpha, level)}, **NARROW).runs).iloc[0]
        assert row["verdict"] == verdict
    row = crossovers(judged({"A": (-0.30, 6.3), "B": (-0.36, 10.0)}, **NARROW).runs).iloc[0]
    assert (row["kind"], row["verdict"]) == ("nowhere", "none established")
    assert row["tokens"] is None and row["p"] < 0.01


def test_every_two_configurations_are_compared(judged):
    runs = judged({"A": (-0.3, 6.3), "B": (-0.36, 6.32), "C": (-0.4, 6.2)}, **NARROW).runs
    result = crossovers(runs)
    assert [*zip(result["a"], result["b"], strict=True)] == [*itertools.combinations("ABC", 2)]
    assert [e.value for e in result["slopes"]] == pytest.approx([-0.06, -0.1, -0.04], abs=0.005)
    few = crossovers(runs[(runs["configuration"] != "C") | (runs["train_tokens"] == 10_000)])
    assert few["a"].tolist() == ["A"] and len(crossovers(runs[runs["configuration"] == "A"])) == 0


# Laws that bend


@pytest.mark.parametrize("floor", [3.2, 0.0])
@pytest.mark.parametrize("beta", [0.3, 1.2])
def test_planted_saturating_law_is_recovered(floor, beta):
    sizes = np.geomspace(10_000, 1_000_000, 8)
    planted = floor + 40 * (sizes / 1000) ** -beta
    fitted, scale, exponent = saturating(sizes, planted)
    assert (fitted, exponent) == pytest.approx((floor, beta), rel=1e-3, abs=1e-3)
    assert scale == pytest.approx(40 * 1000**beta, rel=1e-2)
    assert fitted + scale * sizes**-exponent == pytest.approx(planted, rel=1e-4)


def test_a_saturating_law_neither_rises_nor_falls_below_zero():
    sizes = np.array([10_000, 20_000, 40_000, 80_000])
    assert saturating(sizes, [5.0, 5.1, 5.2, 5.3])[:2] == (pytest.approx(5.15), 0)
    assert saturating(sizes, 400 * sizes**-0.5 - 0.5)[0] == 0
    for wrong in ([0, *sizes[1:]], [math.nan, *sizes[1:]]):
        with np.errstate(divide="ignore"), pytest.raises(ValueError, match="infs or NaNs"):
            saturating(wrong, [5.0, 4.9, 4.8, 4.7])
    with pytest.raises(ValueError, match="four sizes"):
        saturating([*sizes[:3]] * 2, [5.0, 4.5, 4.2] * 2)


def test_the_law_that_was_planted_predicts_the_largest_size():
    runs = Planted(sizes=(*SIZES, 80_000)).runs
    straight = {e.contrast: e for e in forecasts(runs)}
    assert len(straight) == 4 and all(e.at == "80,000 tokens" for e in straight.values())
    for label in "AB":
        e = straight[f"power law of {label}"]
        assert (e.value, e.low, e.high) == pytest.approx((0, 0, 0), abs=1e-9) and (e.n, e.replicates) == (24, 4)
    curved = runs[runs["configuration"] == "A"]
    curved = curved.assign(log_ppl=4 + 400 * curved["train_tokens"] ** -0.6 + 0.1 * curved["replicate"])
    power, saturated = forecasts(curved)
    assert saturated.value == pytest.approx(0, abs=1e-4) and power.value < -0.02 and power.verdict == "lower"
    rest = curved[curved["train_tokens"] < 80_000]
    law = np.polyfit(rest["log_tokens"], rest["log_ppl"], 1)
    largest = curved.loc[curved["train_tokens"] == 80_000, "log_ppl"].mean()
    assert power.value == pytest.approx(np.polyval(law, math.log(80_000)) - largest)


def test_a_law_that_the_other_sizes_cannot_fix_predicts_nothing():
    runs = Planted().runs
    assert [e.contrast for e in forecasts(runs[runs["train_tokens"] > 10_000])] == ["power law of A", "power law of B"]
    assert len(forecasts(runs[runs["train_tokens"] > 20_000])) == 0
    lacking = runs[(runs["replicate"] > 0) | (runs["train_tokens"] < 40_000)]  # a replicate without the largest size
    assert {e.replicates for e in forecasts(lacking)} == {3}
    unjudged = runs.assign(log_ppl=runs["log_ppl"].where(runs["train_tokens"] != 14_000))
    assert all(e.value == pytest.approx(0, abs=1e-9) for e in forecasts(unjudged))


# The published runs


def test_the_published_exponents_and_crossover_come_back():
    published = pd.read_csv(ROOT / "data/reference/l4-2025-11-28/results.csv")
    runs = published.assign(log_ppl=np.log(published["val_ppl"]), log_tokens=np.log(published["train_tokens"]))
    runs = runs.assign(configuration=runs["experiment"], seed=42, data_seed=0, embedding_seed=0, replicate=0)
    runs = runs.assign(grid="published", run=runs["experiment"] + runs["train_tokens"].astype(str))
    runs = runs.assign(id="published/" + runs["run"])
    a, b = laws(runs)
    assert (a.value, b.value) == pytest.approx((-0.287, -0.385), abs=1e-3) and a.low is None and b.low is None
    (row,) = crossovers(runs).to_dict("records")
    assert row["slopes"].value == pytest.approx(b.value - a.value) and row["slopes"].low is row["p"] is None
    assert row["kind"] == "no error" and row["tokens"] > 0 and row["verdict"] == "none established"


def test_curves_side_by_side_cross_by_chance_as_often_as_two_coins_fall():
    alike = crossing_share([0, 1], np.eye(2), None)
    both = stats.norm.cdf(1) * stats.norm.sf(1)  # the leader ahead at the smaller size, behind at the larger
    assert alike == pytest.approx([1 / 4, both], abs=0.004)
    assert crossing_share([1], np.eye(2), None, replicates=4)[0] == pytest.approx(
        stats.norm.cdf(2) * stats.norm.sf(2), abs=0.002
    )
    assert crossing_share([1], np.eye(2), dof=2)[0] > both  # a covariance of three replicates
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
    (given,) = crossing_shares(runs, lead=0.02).itertuples()
    assert given.estimates[0].at == "with a lead of 2 %"
    assert given.estimates[0].value == crossing_share([0.02], row.covariance, 3)[0] != shares[0]
    (as_far,) = crossing_shares(runs, lead=0.02, swing=0.03).itertuples()
    assert as_far.estimates[0].at == "with a lead of 2 %, a swing of 3 %"
    assert 0 < as_far.estimates[0].value < given.estimates[0].value
    for e in [*row.estimates, *given.estimates, *as_far.estimates]:
        assert e.low <= e.value <= e.high and e.over == ("covariance",) and e.dof == 3
    assert crossing_shares(runs[runs["replicate"] < 2]).empty and crossing_shares(runs[:0]).empty


@pytest.mark.night
def test_the_interval_of_crossings_by_chance_holds_the_true_share_as_often_as_it_says():
    """Covariances of five pairs scatter widely: a bootstrap about the one observed leaves the truth out too often."""
    covariance, lead, left_out = 0.03**2 * np.array([[1.0, 0.5], [0.5, 0.8]]), 0.02, 0
    (truth,) = crossing_share([lead], covariance, None)
    runs = Planted(sizes=SIZES[:2], replicates=5).runs
    place = runs["replicate"].to_numpy(), (runs["train_tokens"] == SIZES[1]).to_numpy(int)
    for gaps in np.random.default_rng(0).multivariate_normal([lead, lead], covariance, (60, 5)):
        drawn = runs.assign(log_ppl=np.where(runs["experiment"] == "B", gaps[place], 0))
        e = crossing_shares(drawn, lead).loc[0, "estimates"][0]
        left_out += not e.low < truth < e.high
    assert left_out <= 8  # of 60: 5 % and three standard errors
