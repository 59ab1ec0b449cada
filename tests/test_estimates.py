"""Estimates and their intervals against closed forms, SciPy's and statsmodels' own, planted runs and simulation."""

import itertools
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.anova import anova_lm

from ctxlm.analysis import estimates as estimates_module
from ctxlm.analysis.estimates import (
    MIME,
    UNITS,
    Coefficients,
    Estimate,
    Estimates,
    Moments,
    combined,
    components,
    crossed,
    from_fit,
    mean,
    paired,
    pairs,
    shifted,
)
from ctxlm.analysis.scaling import fieller
from ctxlm.files import ROOT
from tests.planted import LAWS, MIDDLE, Planted, inside

A, B = {"configuration": "A"}, {"configuration": "B"}
ALL = {"text": 0.05, "own": 0.02, "tilt": 0.03, "hard": 0.04, "liked": 0.01, "noise": 0.01}
fixed = partial(pytest.approx, rel=1e-9, abs=1e-12)


def moments(sums, tokens=None) -> Moments:
    drawn = pd.DataFrame({name: range(len(sums)) for name in ("seed", "data_seed", "embedding_seed")})
    sums = np.asarray(sums, float)
    return crossed(sums[:, None] if tokens is None else sums, drawn, np.ones(1) if tokens is None else tokens)


def ends(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def all_of(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


# Errors: what closed forms say


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_over_replicates_alone_the_interval_is_students(values):
    result = moments(np.array(values)[:, None]).estimate([1.0], "x")
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert ends(result) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert result.value == pytest.approx(np.mean(values), abs=1e-9) and result.dof == fixed(len(values) - 1)


def test_over_samples_alone_the_error_is_that_of_a_ratio():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 129, 60).astype(float)
    sums = rng.normal(0.1, 0.3, 60) * tokens
    result = moments(sums[None, :, None], tokens).estimate([1.0], "x")
    ratio = sums.sum() / tokens.sum()  # Cochran (1977), without the finite population's correction
    s2 = np.square(sums - ratio * tokens).sum() / 59
    error = math.sqrt(s2 / 60) / tokens.mean()
    dof = tokens.sum() ** 2 / (tokens**2).sum() - 1
    half = stats.t.ppf(0.975, dof) * error
    assert result.value == fixed(ratio) and ends(result) == fixed((ratio - half, ratio + half))
    assert result.dof == fixed(dof) and dof < 59
    equal = moments(sums[None, :, None], np.full(60, 80.0)).estimate([1.0], "x")
    expected = stats.ttest_1samp(sums / 80, 0).confidence_interval()
    assert ends(equal) == fixed((expected.low, expected.high))


def parts_of(result: Moments) -> list[float]:
    """Variances over replicates, over samples, and of what both do together."""
    return [part.item() for part, _ in result.parts]


def test_what_both_do_together_counts_once():
    rng, m, n = np.random.default_rng(2), 4, 25
    table = rng.normal(0, 0.1, (m, 1)) + rng.normal(0, 0.6, n) + rng.normal(0, 0.4, (m, n))
    long = pd.DataFrame([(r, s, table[r, s]) for r in range(m) for s in range(n)], columns=["r", "s", "y"])
    squares = anova_lm(smf.ols("y ~ C(r) + C(s)", long).fit())
    between = squares["sum_sq"] / squares["df"]  # mean squares of replicates, samples, and the rest
    result = moments(7 * table[..., None], np.full(n, 7.0))
    expected = (between["C(r)"] + between["C(s)"] - between["Residual"]) / (m * n)
    over_replicates, over_samples, both = parts_of(result)
    assert over_replicates + over_samples - both == fixed(expected)
    variance, dof = result.variance(np.ones(1))
    assert variance == fixed(expected) and result.mean == fixed(table.mean())
    rest = over_samples - both
    assert dof == fixed(variance**2 / (over_replicates**2 / (m - 1) + rest**2 / (n - 1)))  # Satterthwaite (1946)


def test_replicates_that_lie_closer_than_chance_take_nothing_off():
    """Where their mean square is below the rest's, their own variance is estimated as none: samples alone count."""
    rng, m, n = np.random.default_rng(4), 4, 200
    rest = rng.normal(0, 0.4, (m, n))
    table = 0.9 * (rng.normal(0, 0.6, n) + rest - rest.mean(1, keepdims=True))  # all replicates have one mean
    result = moments(7 * table[..., None], np.full(n, 7.0))
    over_replicates, over_samples, both = parts_of(result)
    assert over_replicates < both < over_samples
    variance, dof = result.variance(np.ones(1))
    assert variance == fixed(over_samples)
    assert dof == fixed(variance**2 / (both**2 / (m - 1) + (over_samples - both) ** 2 / (n - 1)))


def test_of_samples_of_unequal_length_each_source_is_kept_to_itself():
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 500, 30).astype(float)
    replicates, samples = rng.normal(0, 0.3, (4, 1)), rng.normal(0, 0.5, 30)
    first, second, both = parts_of(moments(((samples + replicates) * tokens)[..., None], tokens))
    alone = moments((samples * tokens)[None, :, None], tokens)
    assert first == fixed(np.var(replicates, ddof=1) / 4) and [second] == fixed(parts_of(alone))
    assert both == pytest.approx(0, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_an_interval_is_never_narrower_than_over_replicates_alone(seed, m, by_replicate, by_sample, noise):
    rng, n = np.random.default_rng(seed), 12
    tokens = rng.integers(10, 129, n).astype(float)
    values = by_replicate * rng.standard_normal((m, 1)) + by_sample * rng.standard_normal(n)
    sums = ((values + noise * rng.standard_normal((m, n))) * tokens)[..., None]
    whole, alone = moments(sums, tokens), moments(sums.sum(1) / tokens.sum())
    both, one = (result.estimate([1.0], "x") for result in (whole, alone))
    assert both.low <= one.low + 1e-12 and one.high - 1e-12 <= both.high
    assert both.value == pytest.approx(one.value) and both.dof >= one.dof - 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_an_estimate_does_not_depend_on_how_the_quantities_are_written(seed, m):
    rng, tokens = np.random.default_rng(seed), np.random.default_rng(seed).integers(10, 129, 15).astype(float)
    sums = rng.standard_normal((m, 15, 3)) + rng.standard_normal((m, 1, 3)) * tokens[:, None] / 50
    mixed = rng.standard_normal((3, 3)) + 3 * np.eye(3)
    weights = rng.standard_normal(3)
    plain = moments(sums, tokens).estimate(weights, "x")
    turned = moments(sums @ mixed.T, tokens).estimate(np.linalg.solve(mixed.T, weights), "x")
    assert all_of(turned) == pytest.approx(all_of(plain), rel=1e-6, abs=1e-9)
    several, _ = moments(sums, tokens).variance(np.stack([weights, np.eye(3)[1]]))
    assert several == fixed([moments(sums, tokens).variance(w)[0] for w in (weights, np.eye(3)[1])])


def test_no_spread_no_error_and_nothing_to_see_no_interval():
    exact = moments(np.full((3, 4, 1), 50.0), np.full(4, 10.0)).estimate([1.0], "x", unit="nats")
    assert ends(exact) == fixed((5.0, 5.0)) and exact.verdict == "higher"
    for nothing in (moments([[2.0]]), moments([[[20.0]]], np.array([10.0]))):
        result = nothing.estimate([1.0], "x")
        assert (result.value, result.low, result.high, result.dof, result.over) == (2.0, None, None, None, ())
        assert result.verdict == "no interval" and result.text()[1] == "" and result.p is None


# Means and pairs


def test_a_mean_is_of_replicates():
    runs = Planted(replicates=5, own=0.1, text=0.2).runs
    rows = runs[runs["configuration"] == "A"].assign(horizon=lambda x: x["log_ppl"])
    rows = rows.assign(horizon=rows["horizon"].where(rows["seed"] != 42))
    result = mean(rows, "horizon", "horizon of A")
    values = rows.dropna().groupby("replicate")["horizon"].mean()
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert ends(result) == fixed((expected.low, expected.high)) and result.value == fixed(values.mean())
    assert (result.n, result.replicates, result.dof, result.over) == (20, 4, 3, ("seed", "training text", "signs"))
    with pytest.raises(ValueError, match="horizon"):
        mean(rows.assign(horizon=np.nan), "horizon", "")


def test_planted_differences_come_back(judged):
    planted = judged(own=1e-4, text=0.5, hard=0.5, liked=1e-4, noise=1e-5)  # what a pair shares is no error
    result = paired(planted.runs, A, B)
    sizes = sorted(planted.runs["train_tokens"].unique())
    assert [e.at for e in result] == [f"{size:,} tokens" for size in sizes]
    for e, size in zip(result, sizes, strict=True):
        truth = LAWS["A"][1] - LAWS["B"][1] + 0.06 * (math.log(size) - MIDDLE)
        assert e.low < e.value < e.high and e.value == pytest.approx(truth, abs=2e-3) and e.high - e.low < 2e-3
        assert (e.n, e.replicates, e.over) == (4, 4, ("seed", "training text", "signs", "samples"))
        assert (e.contrast, e.unit) == ("A − B", "% of PPL")
    swapped = paired(planted.runs, B, A)
    assert [ends(e) for e in swapped] == [fixed((-e.high, -e.low)) for e in result]
    with pytest.raises(ValueError, match=r"configuration = .C."):
        paired(planted.runs, A, {"configuration": "C"})
    with pytest.raises(ValueError, match=r"no column .tset_loss."):
        paired(planted.runs, A, A, column="tset_loss")


def test_any_column_can_be_compared_in_its_unit_and_losses_sample_by_sample(judged):
    runs = judged(**ALL).runs
    runs = runs.assign(test_loss=runs["log_ppl"], test_ppl=np.exp(runs["log_ppl"]))
    assert paired(runs, A, B, "train_tokens", "test_loss") == paired(runs, A, B)
    (e,) = paired(runs, A, B, [], "test_ppl", unit="", over="train_tokens")
    by_replicate = runs.pivot_table(index="replicate", columns="configuration", values="test_ppl").eval("A - B")
    expected = stats.ttest_1samp(by_replicate, 0).confidence_interval()
    assert (e.unit, ends(e)) == ("", fixed((expected.low, expected.high)))
    for column in ("test_ppl", "best_epoch"):
        with pytest.raises(ValueError, match=f"column = '{column}' is no logarithm"):
            paired(runs, A, B, column=column)


def test_a_shift_is_one_difference_less_another_over_samples_too(judged):
    runs = judged(**ALL).runs.assign(place="here")
    first, *_, last = sorted(set(runs["train_tokens"]))
    sizes = {"train_tokens": last}, {"train_tokens": first}
    (e,) = shifted(runs, A, B, *sizes, ["place"])
    apart = {one.at: one.value for one in paired(runs, A, B)}
    assert e.value == pytest.approx(apart[f"{last:,} tokens"] - apart[f"{first:,} tokens"]) and e.at == "here"
    assert [e] == shifted(runs, A, B, *sizes, "place") and e.value == shifted(runs, A, B, *sizes, [])[0].value
    assert "samples" in e.over and e.replicates == runs["replicate"].nunique() and e.low < e.value < e.high
    (back,) = shifted(runs, B, A, *sizes, ["place"])
    assert (back.low, back.high) == pytest.approx((-e.high, -e.low))
    lacking = (runs["replicate"] > 0) & (runs["train_tokens"] == last)
    assert not shifted(runs[~lacking], A, B, *({"train_tokens": n} for n in (first, last)), ["place"])
    with pytest.raises(ValueError, match="of one replicate: name in `at`"):
        shifted(pd.concat([runs, runs.assign(seed=99)]), A, B, *sizes, ["place"])


def test_seeds_of_one_text_count_once_and_a_single_replicate_covers_samples_alone(judged):
    planted = judged(replicates=6, **ALL)
    runs = planted.runs.assign(replicate=planted.runs["replicate"] // 2)
    runs = runs[runs["train_tokens"] == 10_000]
    (e,) = paired(runs, A, B)
    assert (e.n, e.replicates) == (6, 3) and e.dof >= 2
    a, b = (planted.sums[runs.index[runs["configuration"] == label]] for label in "AB")
    expected = moments((a - b).reshape(3, 2, -1).mean(1)[..., None], planted.tokens).estimate([1.0], "")
    assert all_of(e) == fixed(all_of(expected))
    lone = planted.runs[planted.runs["seed"] == 42]
    for e in paired(lone, A, B):
        assert (e.n, e.replicates, e.over) == (1, 1, ("samples",)) and e.dof == fixed(39)
    result = paired(lone, A, B, column="val_loss")
    assert {(e.low, e.over, e.verdict) for e in result} == {(None, (), "no interval")}


def test_a_frame_of_ones_own_needs_what_the_docstring_says():
    values = {"deep": [4.1, 4.0, 4.2], "wide": [4.2, 4.2, 4.25]}
    runs = pd.DataFrame(values).rename_axis("seed").reset_index().melt("seed", var_name="model", value_name="loss")
    names = {"runs": runs, "paired": paired}
    code = estimates_module.__doc__.rpartition("nothing else drawn:")[2]
    exec(textwrap.dedent(code).replace(".table()", "").replace("paired(runs", "(result,) = paired(runs"), names)
    alone = stats.ttest_rel(*values.values()).confidence_interval()
    assert (names["result"].low, names["result"].high) == pytest.approx((alone.low, alone.high))


def test_a_mean_over_places_weighs_each_alike(judged):
    runs = judged(**ALL).runs
    (one,) = paired(runs, A, B, [], over="train_tokens")
    apart = fixed(np.mean([e.value for e in paired(runs, A, B)]))
    assert one.value == apart and (one.n, one.at) == (20, "")
    more = runs[runs["train_tokens"] == 10_000].assign(data_seed=lambda rows: rows["data_seed"] + 1)
    doubled = pd.concat([runs, more])  # two pairs of that size in every replicate
    assert paired(doubled, A, B, [], over="train_tokens")[0].value == apart
    halves = pd.concat([runs.assign(half="first"), doubled.assign(half="second")])
    at_halves = paired(halves, A, B, "half", over="train_tokens")
    assert [(e.at, e.value) for e in at_halves] == [("first", apart), ("second", apart)]
    lacking = runs[(runs["seed"] != 42) | (runs["train_tokens"] > 10_000)]
    (one,) = paired(lacking, A, B, [], over="train_tokens")  # the replicate that lacks a size would shift the mean
    whole = paired(runs[runs["seed"] > 42], A, B)
    assert one.value == fixed(np.mean([e.value for e in whole])) and one.replicates == 3
    assert len(paired(lacking[lacking["seed"] == 42], A, B)) == 4  # at every place that it has


def test_places_may_be_any_columns(judged):
    runs = judged(**ALL).runs
    runs["half"] = np.where(runs["log_tokens"] < MIDDLE, None, 0.5)
    result = paired(runs, A, B, at=["half", "train_tokens"])
    assert len(result) == 5 and sum("0.5, " in e.at for e in result) == 3
    (lone,) = paired(runs[runs["train_tokens"] == 10_000], A, B, at=[])
    (same,) = [e for e in result if "10,000" in e.at]
    assert lone.at == "" and lone.value == fixed(same.value)


def matched(runs, a=A, b=B, at=("train_tokens",), column="log_ppl"):
    return pairs(runs, a, b, at, column)


def test_a_pair_needs_one_run_on_each_side():
    runs = Planted().runs
    assert len(matched(runs)) == 20
    twice = pd.concat([runs, runs[runs["configuration"] == "B"].iloc[[7]].assign(id="other/again")])
    with pytest.raises(ValueError, match=f"{twice['id'].iloc[27]} and other/again are equal in"):
        matched(twice)
    apart = pd.concat([runs.assign(rate=1), runs.assign(rate=2)])
    assert len(matched(apart, at=["rate", "train_tokens"])) == 40
    assert len(matched(apart, A | {"rate": 1}, B | {"rate": 2})) == 20


def test_a_pair_has_seed_text_signs_and_what_it_is_judged_on_in_common():
    runs = Planted().runs
    for name in ("seed", "data_seed", "embedding_seed"):
        assert matched(runs.assign(**{name: runs[name] + 100 * (runs["configuration"] == "B")})).empty
    read_apart = runs.assign(replicate=runs["replicate"] + (runs["configuration"] == "B"))
    assert matched(read_apart)["difference"].tolist() == matched(runs)["difference"].tolist()
    lacking = runs[(runs["configuration"] == "A") | (runs["seed"] != 43)]
    assert sorted(matched(lacking)["seed"].unique()) == [42, 44, 45]
    longer = (runs["configuration"] == "B") & (runs["train_tokens"] == 10_000)
    moved = runs.assign(test_tokens=runs["test_tokens"] + longer, val_loss=runs["val_loss"].where(runs["seed"] > 42))
    counts = {column: len(matched(moved, column=column)) for column in ("log_ppl", "val_loss", "log_tokens")}
    assert counts == {"log_ppl": 16, "val_loss": 15, "log_tokens": 20}  # the last is of no text
    for name in ("corpus", "judged_corpus", "shuffle_samples", "max_sample_tokens"):  # nor are these of one text
        judged = runs.assign(**{name: np.where(longer, "other", "text")})
        assert (len(matched(judged)), len(matched(judged, column="log_tokens"))) == (16, 20), name


# Coefficients


def test_coefficients_and_their_sums_are_those_of_every_replicate_by_itself():
    runs = Planted(**ALL).runs
    formula = "val_loss ~ log_tokens * configuration"
    fits = Coefficients(formula, runs)
    for replicate, rows in runs.groupby("replicate"):
        assert fits.by_replicate.loc[replicate].to_dict() == fixed(smf.ols(formula, rows).fit().params.to_dict())
    pooled = smf.ols(formula, runs).fit().params  # of balanced runs the mean is the fit of all
    for term in fits.terms:
        result = fits.estimate(term)
        expected = stats.ttest_1samp(fits.by_replicate[term], 0).confidence_interval()
        assert all_of(result) == fixed((pooled[term], expected.low, expected.high))
        assert (result.n, result.replicates, result.dof) == (len(runs), 4, 3)
    slope_b = fits.estimate({"log_tokens": 1, "log_tokens:configuration[T.B]": 1})
    alone = Coefficients("val_loss ~ log_tokens", runs[runs["configuration"] == "B"]).estimate("log_tokens")
    assert all_of(slope_b) == fixed(all_of(alone))
    assert all_of(fits.estimate({"log_tokens": 2})) == fixed([2 * end for end in all_of(fits.estimate("log_tokens"))])


def test_coefficients_of_losses_cover_samples(judged):
    planted = judged(**ALL)
    rows = planted.runs[planted.runs["configuration"] == "A"]
    fits = Coefficients("log_ppl ~ log_tokens", rows)
    result = fits.estimate("log_tokens", "α", unit="exponent")
    assert result.value == fixed(fits.by_replicate["log_tokens"].mean()) and result.over[-1] == "samples"
    x = rows["log_tokens"].unique() - MIDDLE
    slopes = [x @ planted.sums[rows.index[rows["replicate"] == r]] / (x @ x) for r in range(4)]
    expected = moments(np.array(slopes)[..., None], planted.tokens).estimate([1.0], "")
    assert all_of(result) == fixed(all_of(expected))
    centred = Coefficients("log_ppl ~ I(log_tokens - 10)", rows).estimate("I(log_tokens - 10)")
    assert ends(centred) == pytest.approx(ends(result), rel=1e-6)


def test_rows_without_a_value_go_with_the_sums_that_stand_for_the_left_side(judged):
    planted = judged(replicates=3, **ALL)
    kept = (planted.runs["seed"] != 43).to_numpy()
    gaps = planted.runs.assign(gap=planted.runs["log_ppl"].where(kept))
    result = Coefficients("gap ~ log_tokens", gaps, (planted.sums, planted.tokens)).estimate("log_tokens")
    expected = Coefficients("gap ~ log_tokens", gaps[kept], (planted.sums[kept], planted.tokens)).estimate("log_tokens")
    assert all_of(result) == fixed(all_of(expected)) and result.over[-1] == "samples"


def test_a_single_replicate_has_the_error_of_its_residuals(judged):
    planted = judged(replicates=1, noise=0.1)
    runs = planted.runs[planted.runs["configuration"] == "A"]
    result = Coefficients("log_ppl ~ log_tokens", runs).estimate("log_tokens")
    expected = smf.ols("log_ppl ~ log_tokens", runs).fit().conf_int().loc["log_tokens"]
    assert ends(result) == fixed(tuple(expected)) and (result.over, result.dof) == (("residuals",), 3)
    two = Coefficients("log_ppl ~ log_tokens", runs.iloc[:2]).estimate("log_tokens")  # no residual is left
    assert (two.low, two.dof, two.over) == (None, None, ()) and math.isfinite(two.value)


def test_rows_without_a_value_and_replicates_that_cannot_be_fitted_are_left_out(judged):
    runs = judged(**ALL).runs
    lone = runs[(runs["seed"] != 43) | (runs["configuration"] == "A")]  # of a replicate without B all its columns are 0
    expected = Coefficients("log_ppl ~ log_tokens * configuration", runs[runs["seed"] != 43])
    result = Coefficients("log_ppl ~ log_tokens * configuration", lone)
    assert result.by_replicate.equals(expected.by_replicate) and result.moments.n == 30
    assert all_of(result.estimate("log_tokens")) == fixed(all_of(expected.estimate("log_tokens")))
    gaps = runs.assign(x=runs["log_tokens"].where(runs["train_tokens"] != 20_000)).sample(frac=1, random_state=1)
    expected = Coefficients("log_ppl ~ log_tokens", runs[runs["train_tokens"] != 20_000])
    result = Coefficients("log_ppl ~ x", gaps)
    assert result.moments.n == 32 and ends(result.estimate("x")) == fixed(ends(expected.estimate("log_tokens")))
    nothing, one_size = runs.assign(log_ppl=np.nan), runs[runs["train_tokens"] == 10_000]
    for some, words in ((one_size, "by itself"), (runs.iloc[:0], "no run has"), (nothing, "no run has")):
        with pytest.raises(ValueError, match=words):
            Coefficients("log_ppl ~ log_tokens", some)
    with pytest.raises(KeyError, match="log_token"):
        expected.estimate("log_token")


def test_a_libraries_fit_keeps_its_own_interval():
    runs = Planted(replicates=2, noise=0.2).runs
    fit = smf.ols("log_ppl ~ log_tokens * configuration", runs[runs["seed"] == 42]).fit(cov_type="HC3", use_t=True)
    sum_of_two = "log_tokens + log_tokens:configuration[T.B]"
    result, test = from_fit(fit, sum_of_two), fit.t_test(f"{sum_of_two} = 0")
    assert all_of(result) == fixed((test.effect.item(), *test.conf_int()[0]))
    assert (result.dof, result.n, result.over, result.contrast) == (6, 10, ("residuals",), sum_of_two)
    with np.errstate(all="ignore"):
        exact = from_fit(smf.ols("log_ppl ~ log_tokens", runs.iloc[:2]).fit(), "log_tokens")
    assert (exact.low, exact.high) == (None, None)


# How estimates are shown


def one(value=-0.05, low=-0.08, high=-0.02, **fields) -> Estimate:
    given = {"contrast": "A − B", "at": "28,000 tokens", "n": 8, "replicates": 4, "dof": 3.2}
    return Estimate(value=value, low=low, high=high, **given | {"over": ("seed", "samples")} | fields)


@pytest.mark.parametrize(
    ("low", "high", "unit", "verdict"),
    [
        (-0.08, -0.02, "% of PPL", "lower"),
        (0.02, 0.08, "nats", "higher"),
        (-0.02, 0.08, "difference of exponents", "not significant"),
        (0.0, 0.08, "nats", "not significant"),
        (None, None, "nats", "no interval"),
        (0.02, 0.08, "exponent", ""),
        (None, None, "PPL", ""),
    ],
)
def test_the_verdict_is_whether_the_interval_holds_zero(low, high, unit, verdict):
    assert one(0.03, low, high, unit=unit).verdict == verdict


def test_a_single_replicate_knows_nothing_of_the_chance_of_training():
    assert one(over=("residuals",), replicates=1).verdict == (alone := one(over=("samples",), replicates=1)).verdict
    assert alone.verdict.startswith("one replicate") and not Estimates([alone, alone]).adjusted()


def test_values_are_shown_as_what_they_are_logarithms_of():
    ppl = one(math.log(500), math.log(450), math.log(550), unit="PPL")
    assert ppl.in_unit == fixed((500, 450, 550)) and ppl.text() == ("500.0", "450.0 to 550.0")
    tokens = one(math.log(36_000), None, None, unit="tokens")
    assert tokens.text() == ("36,000", "")
    share = one(math.log(1.1), math.log(1.05), math.log(1.2), unit="% of PPL")
    assert share.in_unit == fixed((10, 5, 20)) and share.text() == ("+10.0 %", "+5.0 to +20.0 %")
    assert one(-1e-5).text()[0] == "+0.0 %" and one(-0.01, unit="nats").text()[0] == "−0.010"
    assert one(unit="exponent").in_unit == fixed((-0.05, -0.08, -0.02))
    for unit in UNITS:
        assert all(isinstance(text, str) and "-" not in text for text in one(unit=unit).text())


HOSTILE = one(0.0, None, None, contrast="<script>alert(1)</script> &", at="<b>", dof=None, over=(), replicates=0)


def test_a_table_carries_its_data_and_is_escaped():
    result = Estimates([one(), HOSTILE, one(0.1, 0.0, 0.2, unit="exponent")])
    bundle, table = result._repr_mimebundle_(), result.table()
    assert table.data.shape == (3, 8)
    data, html = json.loads(json.dumps(bundle[MIME], allow_nan=False)), bundle["text/html"]
    for row, e in zip(data, result, strict=True):
        assert (row["value"], row["low"], row["high"], row["dof"]) == (e.value, e.low, e.high, e.dof)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in html and "<script>" not in html and "<b>" not in html
    shown = result.frame()[["value", "low", "high"]].astype(float)
    np.testing.assert_array_equal(shown, np.array([e.in_unit for e in result], float))
    nothing = Estimates()._repr_mimebundle_()
    assert nothing[MIME] == [] and nothing["text/html"] and [*Estimates().frame()] == [*result.frame()]


def test_what_all_rows_have_in_common_stands_above_the_table():
    alike, apart = Estimates([one(), one(0.1)]).table(), Estimates([one(), HOSTILE]).table()
    assert {"covers", "replicates"}.isdisjoint(alike.data) and "seed, samples" in alike.caption
    assert {"covers", "replicates"} < {*apart.data} and "replicates" not in apart.caption


def test_differences_that_stand_together_have_p_by_benjamini_and_hochberg_or_by_holm():
    """Of five p, sorted, the k-th times 5 / k, and none above a later one's: worked out by hand."""
    plain = [0.001, 0.02, 0.03, 0.031, 0.5]
    dofs = [3.0, 200.0, None, 7.0, 1.42]
    t = [stats.norm.isf(p / 2) if dof is None else stats.t.isf(p / 2, dof) for p, dof in zip(plain, dofs, strict=True)]
    reach = [stats.norm.isf(0.025) if dof is None else stats.t.isf(0.025, dof) for dof in dofs]
    tested = [one(-x, -x - r, -x + r, dof=dof) for x, r, dof in zip(t, reach, dofs, strict=True)]
    others = [one(0.1, None, None, dof=None), one(1.0, 0.5, 1.5, unit="PPL")]  # no interval, no difference
    table = Estimates([*tested, *others]).table().data
    p = [verdict.partition(", p ")[2] for verdict in table["verdict"]]
    assert p == ["0.005", "0.039", "0.039", "0.039", "0.500", "", ""]
    assert not Estimates([tested[0], *others]).adjusted()  # alone it is its own
    family = Estimates([*tested, *others]).holm()  # the k-th times 6 - k, none below an earlier one's
    assert [*family.adjusted().values()] == pytest.approx([0.005, 0.08, 0.09, 0.09, 0.5])
    carried = [row["in_unit"][0] for row in family._repr_mimebundle_()[MIME] if row["contrast"].startswith("p by Holm")]
    assert carried == [*family.adjusted().values()]
    assert [verdict.partition(",")[0] for verdict in table["verdict"][:5]] == ["lower"] * 4 + [one(0, -1, 1).verdict]
    lucky = Estimates([tested[3], *[tested[4]] * 9])  # one of ten: its interval says lower
    assert tested[3].verdict == "lower"
    assert lucky.table().data["verdict"][0].startswith("not significant, p 0.3")
    points = [line for line in lucky.forest().axes[0].lines if line.get_marker() == "o"]
    shown = [*lucky.frame()["verdict"], *(row["verdict"] for row in lucky._repr_mimebundle_()[MIME])]
    assert {*shown} == {"not significant"} and {point.get_markerfacecolor() for point in points} == {"white"}


def test_a_forest_is_hollow_where_the_interval_holds_zero_and_names_what_differs():
    result = Estimates([one(), one(0.1, -0.1, 0.3, at="there"), one(0.1, None, None, at="elsewhere")])
    figure = result.forest()
    lines = figure.axes[0].lines
    hollow = [line.get_markerfacecolor() == "white" for line in lines if line.get_marker() == "o"]
    assert hollow == [False, True, True] and not plt.fignum_exists(figure.number)
    bars = [tuple(line.get_xdata()) for line in lines if line.get_marker() != "o" and len(line.get_xdata()) == 2]
    assert bars[:2] == [fixed(e.in_unit[1:]) for e in result[:2]]
    places = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert figure.axes[0].get_ylim() == (2.5, -0.5)  # the first row stands at the top, all rows within
    assert places == ["28,000 tokens", "there", "elsewhere"] and figure.get_suptitle() == "A − B"
    both = Estimates([*result, one(contrast="C", at="")]).forest("title")
    assert [label.get_text() for label in both.axes[0].get_yticklabels()] == [*(f"A − B, {at}" for at in places), "C"]
    assert both.get_suptitle() == "title" and Estimates().forest() is None


# Coverage


# standard deviations, nats, of level and of slope
LIKE_RUNS = {"replicate": (0.053, 0.035), "sample": (0.005, 0.0016), "both": (0.0085, 0.019)}  # of B − A in `variance`
APART = {"replicate": (0.03, 0.0005), "sample": (0.001, 0.008), "both": (0.0085, 0.001)}
"""Chance of the level is between replicates, and of the slope between samples."""


def lengths() -> np.ndarray:
    samples = pd.read_parquet(ROOT / "data" / "results" / "variance" / "samples.parquet")
    first = samples[(samples["run"] == samples["run"].iloc[0]) & (samples["part"] == "test")]
    return first["tokens"].to_numpy(float)


def draws(rng, replicates: int, spread, truth, tokens) -> np.ndarray:
    """Sums of a level's and a slope's losses, [replicates, samples, 2]."""
    k = tokens.sum() / math.sqrt(np.square(tokens).sum())
    replicate, sample, both = (np.array(spread[name]) for name in ("replicate", "sample", "both"))
    values = truth + replicate * rng.standard_normal((replicates, 1, 2))
    values = values + k * sample * rng.standard_normal((len(tokens), 2))
    values += k * both * rng.standard_normal((replicates, len(tokens), 2))
    return values * tokens[:, None]


@pytest.mark.parametrize(
    ("spread", "replicates", "count"), [(LIKE_RUNS, 4, 2000), pytest.param(APART, 8, 2000, marks=pytest.mark.night)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(spread, replicates, count):
    rng, tokens, truth = np.random.default_rng(12), lengths(), np.array([0.03, -0.1])
    meet, hits = MIDDLE + 0.3, []
    for _ in range(count):
        result = moments(draws(rng, replicates, spread, truth, tokens), tokens)
        level, slope = (result.estimate(weights, "") for weights in ([1, 0], [0, 1]))
        crossing = inside(fieller(result, MIDDLE), meet)
        hits.append((level.low < truth[0] < level.high, slope.low < truth[1] < slope.high, crossing))
    covered = np.mean(hits, axis=0)
    most = 0.97 if replicates > 4 else 0.975  # wide where few replicates scatter less than samples explain
    assert ((covered > 0.93) & (covered < most)).all(), covered


# Components of chance


def crossed_runs(rng, sd: Mapping[str, float], levels: int = 3, rest: float = 0.01) -> pd.DataFrame:
    """A run of every combination of the sources' levels, each source's effects drawn anew."""
    names = list(sd)
    runs = pd.DataFrame(list(itertools.product(range(levels), repeat=len(sd))), columns=names)
    effects = sum(spread * rng.standard_normal(levels)[runs[name]] for name, spread in sd.items())
    return runs.assign(log_ppl=6 + effects + rest * rng.standard_normal(len(runs)))


SOURCES = {"seed": "seed", "text": "data_seed", "signs": "embedding_seed"}


def test_components_are_those_of_a_mixed_model():
    """Of a balanced design, where no variance is estimated as negative, REML's are the analysis of variance's."""
    runs = crossed_runs(np.random.default_rng(5), {"seed": 0.05, "data_seed": 0.1, "embedding_seed": 0.2})
    parts = {name: f"0 + C({column})" for name, column in SOURCES.items()}
    fitted = smf.mixedlm("log_ppl ~ 1", runs, groups=np.ones(len(runs)), vc_formula=parts).fit()
    for name, result in zip(SOURCES, components(runs, SOURCES, "here"), strict=True):
        variance = fitted.vcomp[fitted.model.exog_vc.names.index(name)]
        assert result.value == pytest.approx(math.sqrt(variance), rel=0.01)
        assert result.low < result.value < result.high
        assert (result.replicates, result.n) == (runs[SOURCES[name]].nunique(), len(runs))
    with pytest.raises(ValueError, match="every combination of seed, text, signs"):
        components(runs.iloc[1:], SOURCES, "here")


def test_components_cover_what_was_planted(monkeypatch):
    """Of the mean squares that normal effects make, independent χ²: a hundred evenly likely ones of each, shuffled."""
    rng, planted, rest = np.random.default_rng(6), np.array([0.02, 0.06, 0.2]), 0.01
    runs = crossed_runs(rng, dict.fromkeys(SOURCES.values(), 0.1))  # of each level 9
    table = pd.DataFrame({"df": [2.0, 2, 2, 20]}, [*(f"C({name})" for name in SOURCES.values()), "Residual"])
    expected, dofs = np.append(9 * planted**2 + rest**2, rest**2), table["df"].to_numpy()
    squares = rng.permuted(expected * stats.chi2.ppf((np.arange(100)[:, None] + 0.5) / 100, dofs) / dofs, axis=0)
    hits = []
    monkeypatch.setattr(smf, "ols", Mock())
    for each in squares:
        monkeypatch.setattr(estimates_module, "anova_lm", Mock(return_value=table.assign(mean_sq=each)))
        result = components(runs, SOURCES, "here")
        hits.append([one.low <= sd <= one.high for one, sd in zip(result, planted, strict=True)])
    covered = np.mean(hits, axis=0)
    assert ((covered > 0.93) & (covered < 0.985)).all(), covered


# Sites together


def site(value, error, at, dof=4.0):
    half = stats.t.ppf(0.975, dof) * error
    return Estimate("A − B", at, value, value - half, value + half, 5, 5, dof, ("samples",))


def test_sites_that_agree_are_combined_by_their_precision_and_have_no_spread():
    sites = [site(-0.03, error, f"site {error}") for error in (0.01, 0.02, 0.04)]
    mean, spread, new = combined(sites, "A − B")
    assert mean.error == pytest.approx(1 / math.sqrt(sum(site.error**-2 for site in sites)))  # no less than they know
    assert new.verdict == ""  # what is predicted is not tested
    assert [each.error for each in sites] == pytest.approx([0.01, 0.02, 0.04])
    assert mean.value == pytest.approx(-0.03) and spread.value == 0
    assert mean.dof == 2 and mean.over == ("sites",) and mean.n == 15
    for bare in (one(-0.03, None, None), replace(sites[2], replicates=1)):
        assert len(combined([*sites[:2], bare], "A − B")) == 0
        assert combined([*sites, bare], "A − B", "mean of {n} texts")[0].at == "mean of 3 texts"


def test_the_spread_between_sites_is_paule_and_mandels():
    values, variances = np.array([-0.06, -0.03, 0.02, 0.05]), np.array([1e-4, 4e-4, 1e-4, 2e-4])
    sites = [site(v, math.sqrt(s), f"site {v}") for v, s in zip(values, variances, strict=True)]
    mean, spread, new = combined(sites, "A − B")

    tau2 = spread.value**2
    w = 1 / (variances + tau2)
    centre = (w * values).sum() / w.sum()
    excess = (w * (values - centre) ** 2).sum()
    assert excess == pytest.approx(3, rel=1e-3)  # its degrees of freedom: so the spread is defined
    error = math.sqrt(excess / 3 / w.sum())  # Hartung & Knapp
    assert mean.value == pytest.approx(centre, abs=1e-6)
    assert mean.high - mean.value == pytest.approx(stats.t.ppf(0.975, 3) * error, rel=1e-3)
    assert new.high - new.value == pytest.approx(stats.t.ppf(0.975, 2) * math.hypot(error, math.sqrt(tau2)), rel=1e-3)
