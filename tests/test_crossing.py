"""Differences of slopes, crossovers and their intervals, against planted laws, closed forms and statsmodels' own."""

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats

from ctxlm.analysis.crossing import MOST_LOG, _within, bootstrap, errors, pooled
from ctxlm.analysis.replicates import critical
from ctxlm.analysis.scaling import (
    crossover,
    draw_samples,
    effective,
    fit_power_law,
    loss_sums,
    mean_loss,
    percentile_interval,
    ratio_error,
    read_grid,
)
from tests.planted import SIZES, plant

ALPHAS, MEETS = {"A": -0.30, "B": -0.40}, 36_000


def table(rng, noise, sizes=SIZES, replicates=3, alphas=ALPHAS, meets=MEETS) -> pd.DataFrame:
    """Runs of two laws that meet at `meets` tokens and PPL 500, with independent errors of the loss."""
    rows = []
    for label, alpha in alphas.items():
        for size in sizes:
            for k in range(replicates):
                loss = math.log(500) + alpha * math.log(size / meets) + noise * rng.standard_normal()
                rows.append((f"{label}-{size}-{k}", label, size, 0, loss))
    return pd.DataFrame(rows, columns=["run", "experiment", "train_tokens", "replicate", "val_loss"])


def lasting(rng, shared=0.0, seed=0.03, tilt=0.01, noise=0.005, replicates=5, sizes=SIZES) -> pd.DataFrame:
    """The two laws of `table` in replicates: text (`shared`) shifts both, seeds shift and tilt each, at all sizes."""
    rows = []
    for r in range(replicates):
        text = shared * rng.standard_normal()
        for label, alpha in ALPHAS.items():
            shift, slope = seed * rng.standard_normal(), tilt * rng.standard_normal()
            for size in sizes:
                x = math.log(size / MEETS)
                loss = math.log(500) + text + shift + (alpha + slope) * x + noise * rng.standard_normal()
                rows.append((f"{label}-{size}-{r}", label, size, r, loss))
    return pd.DataFrame(rows, columns=["run", "experiment", "train_tokens", "replicate", "val_loss"])


def test_pooled_model_is_the_formula_and_its_crossover_that_of_two_fits():
    runs = table(np.random.default_rng(0), 0.02)
    found = pooled(runs, "A", "B")
    expected = smf.ols("val_loss ~ C(experiment) * np.log(train_tokens)", runs).fit()
    name = "C(experiment)[T.B]:np.log(train_tokens)"
    assert found.slope_difference == pytest.approx(expected.params[name])
    assert found.slope_interval == pytest.approx(tuple(expected.conf_int().loc[name]))
    assert found.p_value == pytest.approx(expected.pvalues[name])
    robust = expected.get_robustcov_results("HC3", use_t=True).conf_int()[list(expected.params.index).index(name)]
    assert found.slope_interval_robust == pytest.approx(tuple(robust))
    assert (found.n, found.replicates, found.dof) == (24, 1, 20)
    laws = [fit_power_law(g["train_tokens"], np.exp(g["val_loss"])) for _, g in runs.groupby("experiment")]
    assert found.crossover_tokens == pytest.approx(crossover(*laws).tokens)
    swapped = pooled(runs, "B", "A")
    assert swapped.slope_difference == pytest.approx(-found.slope_difference)
    assert swapped.fieller_interval == pytest.approx(found.fieller_interval)
    assert swapped.delta_interval == pytest.approx(found.delta_interval)


def test_what_runs_of_a_pair_share_is_no_error_of_their_slopes():
    """Of a single replicate: text moves both configurations alike, and the fit of both takes it for chance."""
    rng = np.random.default_rng(4)
    runs = table(rng, 0.003, replicates=1).assign(seed=42, data_seed=0)
    common = dict(zip(SIZES, 0.1 * rng.standard_normal(len(SIZES)), strict=True))
    runs["val_loss"] += runs["train_tokens"].map(common)
    found, apart = pooled(runs, "A", "B"), pooled(runs.drop(columns="seed"), "A", "B")
    assert (found.n, found.pairs, found.dof) == (8, 4, 2) and (apart.pairs, apart.dof) == (None, 4)
    assert found.slope_difference == pytest.approx(apart.slope_difference)
    assert found.crossover_tokens == pytest.approx(apart.crossover_tokens)
    losses = runs.pivot(index="train_tokens", columns="experiment", values="val_loss")
    fit = stats.linregress(np.log(losses.index), losses["B"] - losses["A"])
    assert found.p_value == pytest.approx(fit.pvalue) and found.p_value < 0.01 < 0.2 < apart.p_value
    half = stats.t.ppf(0.975, 2) * fit.stderr
    assert found.slope_interval == pytest.approx((fit.slope - half, fit.slope + half))
    lone = runs[runs["run"] != "A-20000-0"]  # B's run of that size has no partner
    assert pooled(lone, "A", "B").pairs is None


def test_fieller_ends_are_where_the_gap_stops_being_significant():
    runs = table(np.random.default_rng(1), 0.02)
    found = pooled(runs, "A", "B")
    assert found.fieller == "bounded"
    t = stats.t.ppf(0.975, found.dof)
    for end in found.fieller_interval:  # at a token count taken as the origin, the gap is a coefficient of the model
        there = runs.assign(x=np.log(runs["train_tokens"] / end))
        fit = smf.ols("val_loss ~ C(experiment) * x", there).fit()
        assert abs(fit.tvalues["C(experiment)[T.B]"]) == pytest.approx(t, rel=1e-6)


def test_intervals_cover_the_planted_crossover_and_slope_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered = pd.DataFrame(
        [
            {
                "slope": found.slope_interval[0] < -0.1 < found.slope_interval[1],
                "robust": found.slope_interval_robust[0] < -0.1 < found.slope_interval_robust[1],
                "delta": found.delta_interval[0] < MEETS < found.delta_interval[1],
                "fieller": found.fieller_interval[0] < MEETS < found.fieller_interval[1],
            }
            for found in (pooled(table(rng, 0.01), "A", "B") for _ in range(400))
        ]
    )
    assert ((covered.mean() > 0.90) & (covered.mean() < 0.99)).all(), covered.mean()


def test_parallel_laws_leave_the_crossover_open():
    runs = table(np.random.default_rng(3), 0.02, alphas={"A": -0.3, "B": -0.3})
    found = pooled(runs, "A", "B")
    assert found.fieller in ("outside", "unbounded") and found.slope_interval[0] < 0 < found.slope_interval[1]
    exact = pooled(table(np.random.default_rng(3), 0.0, alphas={"A": -0.3, "B": -0.3}), "A", "B")
    assert exact.crossover_tokens is None and exact.reason == "the laws are parallel"


@pytest.mark.parametrize(("gap", "kind"), [(0.1, "outside"), (0.0, "unbounded")])
def test_fieller_says_where_the_crossover_may_be(gap, kind):
    rows = [(label, size, k) for label in "AB" for size in SIZES for k in range(3)]
    runs = pd.DataFrame(rows, columns=["experiment", "train_tokens", "k"]).assign(replicate=0)
    error = 0.02 * (runs["k"] - 1)  # the same at every size: levels and slopes agree exactly, but for `gap`
    runs["val_loss"] = 6 - 0.3 * np.log(runs["train_tokens"] / MEETS) + error + gap * (runs["experiment"] == "B")
    runs.loc[0, "val_loss"] += 1e-3  # not quite: a slope of exactly 0 has no crossover at all
    found = pooled(runs, "A", "B")
    assert found.fieller == kind and found.delta_interval is None
    assert found.slope_interval[0] < 0 < found.slope_interval[1]
    t = stats.t.ppf(0.975, found.dof)

    def statistic(tokens):
        there = runs.assign(x=np.log(runs["train_tokens"] / tokens))
        return abs(smf.ols("val_loss ~ C(experiment) * x", there).fit().tvalues["C(experiment)[T.B]"])

    if kind == "unbounded":
        assert found.fieller_interval is None
        assert all(statistic(tokens) < t for tokens in (1e2, 1e4, 36_000, 1e6, 1e9))
    else:
        low, high = found.fieller_interval
        inside = math.sqrt(low * high) if low and high else 36_000
        assert statistic(inside) > t
        assert all(statistic(end) == pytest.approx(t, rel=1e-6) for end in (low, high) if end)


@pytest.mark.parametrize(
    ("kind", "ends", "expected"),
    [
        ("bounded", (5, 9), ("bounded", (math.exp(5), math.exp(9)))),
        ("bounded", (-5, 9), ("bounded", (None, math.exp(9)))),
        ("outside", (5, 90), ("outside", (math.exp(5), None))),
        ("bounded", (-5, -1), ("nowhere", None)),
        ("outside", (-5, -1), ("unbounded", None)),
        ("bounded", (40, 90), ("nowhere", None)),
        ("outside", (40, 90), ("unbounded", None)),
        ("bounded", (-5, 90), ("unbounded", None)),
        ("outside", (-5, 90), ("nowhere", None)),
        ("unbounded", None, ("unbounded", None)),
    ],
)
def test_fiellers_set_is_told_of_sizes_that_can_be(kind, ends, expected):
    found, interval = _within(2.0, kind, ends and tuple(end - 2 for end in ends))
    assert found == expected[0] and interval == (expected[1] and pytest.approx(expected[1]))


def test_replicates_cover_effects_that_last_across_sizes():
    rng, hits = np.random.default_rng(32), []
    for _ in range(150):
        runs = lasting(rng, shared=0.2)
        found = pooled(runs, "A", "B")
        assert (found.replicates, found.dof, found.slope_interval_robust) == (5, 4, None)
        low, high = found.slope_interval
        if found.fieller == "bounded":
            fieller = (found.fieller_interval[0] or 0) < MEETS < (found.fieller_interval[1] or math.inf)
        else:  # anywhere, nowhere, or outside a gap
            gap = found.fieller_interval
            beside = gap is not None and not (gap[0] or 0) < MEETS < (gap[1] or math.inf)
            fieller = found.fieller == "unbounded" or beside
        left, right = bootstrap(runs, by_sample(runs, rng, 0.3), "B", draws=300)["bootstrap_slope"]
        hits.append((low < -0.1 < high, fieller, left < -0.1 < right))
    assert (np.mean(hits, axis=0) > 0.90).all(), np.mean(hits, axis=0)


def test_text_that_both_read_does_not_blur_the_crossover():
    runs = lasting(np.random.default_rng(33), shared=0.5, seed=0.005, tilt=0.003)
    low, high = pooled(runs, "A", "B").fieller_interval
    assert 30_000 < low < MEETS < high < 43_000


def test_laws_far_apart_are_said_to_be_so():
    runs = table(np.random.default_rng(34), 0.005)
    runs.loc[runs["experiment"] == "B", "val_loss"] += 3
    found = pooled(runs, "A", "B")
    assert found.crossover_tokens is None and found.reason.startswith("the laws would meet at 10¹")
    assert found.p_value < 0.001 and found.fieller == "nowhere"


def test_no_degree_of_freedom_no_interval():
    found = pooled(table(np.random.default_rng(4), 0.02, sizes=SIZES[:2], replicates=1), "A", "B")
    assert found.dof == 0 and found.crossover_tokens > 0
    none = (found.slope_interval, found.slope_interval_robust, found.p_value, found.delta_interval)
    assert (*none, found.fieller, found.fieller_interval) == (None,) * 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda runs: runs[runs["train_tokens"] == SIZES[0]], "runs of 1 size"),
        (lambda runs: runs[runs["experiment"] == "A"], r"B has runs of 0 size"),
        (lambda runs: runs.assign(val_loss=runs["val_loss"].where(runs.index != 5)), "has no finite loss: drop it"),
        (lambda runs: runs.assign(val_loss=runs["val_loss"].where(runs.index != 5, np.inf)), "has no finite loss"),
    ],
)
def test_what_cannot_be_pooled_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        pooled(change(table(np.random.default_rng(5), 0.02)), "A", "B")


def by_sample(runs: pd.DataFrame, rng, between: float, samples: int = 40) -> pd.DataFrame:
    """Validation losses of `runs`: samples that are hard for all, whose weighted mean is the run's own loss."""
    tokens = rng.integers(300, 1500, samples)
    hard = between * rng.standard_normal(samples)
    hard -= np.average(hard, weights=tokens)
    parts = [
        pd.DataFrame({"run": run, "sample": range(samples), "loss_sum": (loss + hard) * tokens, "tokens": tokens})
        for run, loss in zip(runs["run"], runs["val_loss"], strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def test_bootstrap_of_exact_runs_moves_levels_but_no_slopes():
    rng = np.random.default_rng(6)
    runs = table(rng, 0.0)
    val_by_sample = by_sample(runs, rng, 0.3)
    drawn = bootstrap(runs, val_by_sample, "B", draws=200)  # what is hard for both moves the crossover neither
    assert drawn["bootstrap_slope"] == pytest.approx((-0.1, -0.1)) and drawn["bootstrap_without"] == 0
    assert drawn["bootstrap_crossover"] == pytest.approx((MEETS, MEETS))
    tokens = val_by_sample.groupby("sample")["tokens"].first()
    hard = 0.1 * rng.standard_normal(len(tokens))  # for B alone, at every size alike
    hard -= np.average(hard, weights=tokens)
    of_b = val_by_sample["run"].str.startswith("B-") * val_by_sample["sample"].map(dict(enumerate(hard)))
    drawn = bootstrap(runs, val_by_sample.assign(loss_sum=lambda x: x["loss_sum"] + of_b * x["tokens"]), "B")
    assert drawn["bootstrap_slope"] == pytest.approx((-0.1, -0.1)) and drawn["bootstrap_without"] == 0
    low, high = drawn["bootstrap_crossover"]
    half = critical(effective(tokens) - 1) * ratio_error(hard * tokens.to_numpy(), tokens.to_numpy()) / 0.1
    assert low < MEETS < high and math.log(high / low) / 2 == pytest.approx(half, rel=0.1)


def test_bootstrap_is_two_fits_of_every_draw():
    rng = np.random.default_rng(9)
    runs = table(rng, 0.03)  # of a single replicate: samples alone are drawn
    val_by_sample = by_sample(runs, rng, 0.3)
    val_by_sample["loss_sum"] += 0.4 * rng.standard_normal(len(val_by_sample)) * val_by_sample["tokens"]
    sums, tokens = loss_sums(val_by_sample, runs["run"])
    x, own = np.log(runs["train_tokens"].to_numpy()), [runs["experiment"].eq(label).to_numpy() for label in "AB"]
    a, b = (np.polyfit(x[part], sums[part], 1)[0] for part in own)  # [samples]
    slope = mean_loss((b - a)[None], tokens)
    losses = draw_samples(sums, tokens, 300, np.random.default_rng(0))
    (alpha_a, log_a), (alpha_b, log_b) = (np.polyfit(x[part], losses[:, part].T, 1) for part in own)
    meet = (log_b - log_a) / (alpha_a - alpha_b)
    meet = meet[(meet >= 0) & (meet <= MOST_LOG)]
    found = bootstrap(runs, val_by_sample, "B", draws=300)
    assert found["bootstrap_slope"] == pytest.approx(slope.interval)
    assert found["bootstrap_without"] == pytest.approx(1 - len(meet) / 300)
    ends = tuple(np.exp(percentile_interval(meet, slope.dof)))
    assert found["bootstrap_crossover"] == pytest.approx(ends, rel=1e-6)
    swapped, (low, high) = bootstrap(runs, val_by_sample, "A", draws=300), slope.interval
    assert swapped["bootstrap_slope"] == pytest.approx((-high, -low))
    assert swapped["bootstrap_crossover"] == pytest.approx(ends, rel=1e-6)


def test_bootstrap_draws_every_replicates_slopes_on_every_sample():
    rng = np.random.default_rng(10)
    runs = lasting(rng)
    val_by_sample = by_sample(runs, rng, 0.3)
    val_by_sample["loss_sum"] += 0.1 * rng.standard_normal(len(val_by_sample)) * val_by_sample["tokens"]
    sums, tokens = loss_sums(val_by_sample, runs["run"])
    x, slopes = np.log(SIZES), {}
    for key, own in runs.assign(row=range(len(runs))).groupby(["experiment", "replicate"]):
        slopes[key] = np.polyfit(x, sums[own["row"]], 1)[0]
    gaps = np.array([slopes["B", r] - slopes["A", r] for r in range(5)])  # [replicates, samples]
    assert gaps.shape == (5, 40)
    both = bootstrap(runs, val_by_sample, "B")["bootstrap_slope"]
    assert both == pytest.approx(mean_loss(gaps, tokens).interval)
    lone = bootstrap(runs.assign(replicate=0), val_by_sample, "B")["bootstrap_slope"]
    assert lone == pytest.approx(mean_loss(gaps.mean(0)[None], tokens).interval)
    assert both[0] < lone[0] < lone[1] < both[1]


def test_bootstrap_counts_draws_without_a_crossing():
    rng = np.random.default_rng(8)
    runs = lasting(rng, tilt=0.03)
    runs.loc[runs["experiment"] == "B", "val_loss"] += 1 + 0.1 * np.log(runs["train_tokens"] / MEETS)
    assert 0.2 < bootstrap(runs, by_sample(runs, rng, 0.3), "B")["bootstrap_without"] < 1


def test_bootstrap_of_single_runs_draws_samples_only(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.36, 830)})
    runs, _, val_by_sample = read_grid("planted")
    low, high = bootstrap(runs, val_by_sample, "B")["bootstrap_slope"]
    assert pooled(runs, "A", "B").slope_difference == pytest.approx(-0.06) and low < -0.06 < high
    with pytest.raises(ValueError, match="different validation tokens"):
        bootstrap(runs, val_by_sample.iloc[1:], "B")
    (found,) = errors(runs, val_by_sample.iloc[1:])["pooled"]
    assert set(found) == {"a", "b", "refused"} and "different validation tokens" in found["refused"]
    (found,) = errors(runs[runs["train_tokens"] == SIZES[0]], val_by_sample)["pooled"]
    assert "runs of 1 size" in found["refused"]
