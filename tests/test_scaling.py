"""Laws and intervals against planted parameters, closed forms and SciPy's own regression."""

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ctxlm.analysis import findings, plots, scaling, tables
from ctxlm.analysis.runs import load_runs
from ctxlm.analysis.scaling import (
    crossover,
    differences,
    extrapolate,
    fit_power_law,
    fit_saturating,
    mean_loss,
    paired_difference,
    ppl_interval,
    read_grid,
    summarise,
    with_tests,
    write_summary,
)
from ctxlm.analysis.tables import read_published
from ctxlm.config import BASELINES, ConfigError, Experiment
from tests.planted import SHAPES, SIZES, plant


def law(alpha: float, log_a: float, sizes=SIZES):
    return fit_power_law(sizes, [math.exp(log_a + alpha * math.log(size)) for size in sizes])


def by_sample(losses, tokens, replicate=0) -> pd.DataFrame:
    table = pd.DataFrame({"sample": range(len(losses)), "loss_sum": np.asarray(losses) * tokens})
    return table.assign(tokens=tokens, replicate=replicate)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-1, -0.01),
    st.floats(1, 15),
    st.lists(st.integers(1_000, 10_000_000), min_size=2, max_size=9, unique=True),
)
def test_planted_law_is_recovered(alpha, log_a, sizes):
    fitted = law(alpha, log_a, sizes)
    assert fitted.alpha == pytest.approx(alpha, abs=1e-5)
    assert fitted.log_a == pytest.approx(log_a, abs=1e-4)
    assert (fitted.n, fitted.residual_dof) == (len(sizes), len(sizes) - 2)
    assert fitted.ppl(50_000) == pytest.approx(math.exp(log_a + alpha * math.log(50_000)), rel=1e-3)


def test_interval_is_students_as_scipy_computes_it():
    rng = np.random.default_rng(3)
    sizes = np.repeat(SIZES, 2)
    ppl = np.exp(9 - 0.3 * np.log(sizes) + 0.05 * rng.standard_normal(len(sizes)))
    fitted, expected = fit_power_law(sizes, ppl), stats.linregress(np.log(sizes), np.log(ppl))
    half = stats.t.ppf(0.975, len(sizes) - 2) * expected.stderr
    assert fitted.alpha_interval == pytest.approx((expected.slope - half, expected.slope + half))
    assert fitted.log_a == pytest.approx(expected.intercept)
    assert fitted.r2 == pytest.approx(expected.rvalue**2)


def test_interval_covers_the_planted_slope_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        ppl = np.exp(9 - 0.3 * np.log(SIZES) + 0.03 * rng.standard_normal(len(SIZES)))
        low, high = fit_power_law(SIZES, ppl).alpha_interval
        covered += low < -0.3 < high
    assert 0.92 < covered / 400 < 0.98


def test_two_sizes_give_a_point_estimate_and_no_interval():
    published = read_published("results")
    laws = read_published("power_laws").set_index("experiment")
    for label, runs in published.groupby("experiment"):
        fitted = fit_power_law(runs["train_tokens"], runs["val_ppl"])
        assert (fitted.residual_dof, fitted.alpha_interval, fitted.r2) == (0, None, None)
        assert fitted.alpha == pytest.approx(laws.loc[label, "alpha"], abs=1e-3)
        assert fitted.log_a == pytest.approx(laws.loc[label, "log_a"], abs=0.02)


def test_equal_ppl_has_slope_zero_and_no_r2():
    fitted = fit_power_law([1000, 2000, 4000], [300, 300, 300])
    assert fitted.alpha == pytest.approx(0, abs=1e-12)
    assert fitted.r2 is None


@pytest.mark.parametrize(
    ("tokens", "ppl", "words"),
    [
        ([1000], [300], "at least two sizes"),
        ([1000, 1000], [300, 310], "at least two sizes, but there is 1,000"),
        ([], [], "there is none"),
        ([1000, 2000], [300, math.nan], "positive finite PPL, but there is nan"),
        ([1000, 2000], [300, math.inf], "positive finite PPL, but there is inf"),
        ([1000, 0], [300, 200], "positive finite tokens, but there is 0"),
        ([1000, 2000], [300, -1], "positive finite PPL, but there is -1"),
        ([1000, 2000], [300], "one PPL a run"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_sentence(tokens, ppl, words):
    with pytest.raises(ValueError, match=words) as raised:
        fit_power_law(tokens, ppl)
    assert "\n" not in str(raised.value)


def test_crossover_of_the_published_runs_lies_where_their_log_gaps_vanish():
    runs = read_published("results")
    a, b = (group for _, group in runs.groupby("experiment"))
    gaps = np.log(b["val_ppl"].to_numpy() / a["val_ppl"].to_numpy())
    small, large = np.log(a["train_tokens"])
    expected = math.exp(small + (large - small) * gaps[0] / (gaps[0] - gaps[1]))
    found = crossover(*(fit_power_law(g["train_tokens"], g["val_ppl"]) for g in (a, b)))
    assert found.tokens == pytest.approx(expected, rel=1e-6)
    assert found.extrapolated is False


def test_crossover_outside_the_sizes_of_both_is_extrapolated():
    a = law(-0.3, 9)
    meeting_at = lambda tokens: law(-0.4, 9 + 0.1 * math.log(tokens))  # noqa: E731
    inside, beyond = crossover(a, meeting_at(40_000)), crossover(a, meeting_at(90_000))
    assert inside.tokens == pytest.approx(40_000, rel=1e-6)
    assert (inside.extrapolated, beyond.extrapolated) == (False, True)
    for tokens, sizes in ((25_000, (30_000, 67_500)), (50_000, (20_000, 45_000))):  # seen by only one of the two
        assert crossover(a, law(-0.4, 9 + 0.1 * math.log(tokens), sizes)).extrapolated is True


def test_parallel_and_nearly_parallel_laws_have_no_crossover():
    assert crossover(law(-0.3, 9), law(-0.3, 9.1)).reason == "the two laws are parallel"
    far = crossover(law(-0.3, 9), law(-0.3001, 9.1))
    assert far.tokens is None and "10⁴³⁴ tokens" in far.reason
    before = crossover(law(-0.3, 9), law(-0.31, 8.9))
    assert before.tokens is None and before.reason == "the laws would meet below a single token"


def test_paired_difference_is_weighted_by_tokens():
    tokens = np.array([100, 300, 600])
    difference = paired_difference(by_sample([5.0, 6.0, 7.0], tokens), by_sample([5.1, 6.0, 6.9], tokens))
    assert difference.log_ppl == pytest.approx((-0.1 * 100 + 0.1 * 600) / 1000)
    assert (difference.samples, difference.tokens) == (3, 1000)


def test_intervals_agree_with_the_normal_approximation_for_many_equal_samples():
    rng = np.random.default_rng(1)
    tokens = np.full(400, 500)
    base, gap = rng.normal(6, 0.4, 400), rng.normal(-0.02, 0.05, 400)
    a, b = by_sample(base + gap, tokens), by_sample(base, tokens)
    difference, half = paired_difference(a, b), 1.96 * gap.std() / 20
    assert difference.interval == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.1 * half)
    half = 1.96 * base.std() / 20
    assert np.log(ppl_interval(b)) == pytest.approx((base.mean() - half, base.mean() + half), abs=0.1 * half)


def test_samples_of_equal_loss_and_unequal_length_leave_no_uncertainty():
    tokens = np.array([100, 300, 600, 5000])
    a, b = by_sample([5.0] * 4, tokens), by_sample([5.2] * 4, tokens)
    assert ppl_interval(a) == pytest.approx((math.exp(5), math.exp(5)))
    assert paired_difference(a, b).interval == pytest.approx((-0.2, -0.2))


def test_interval_over_few_samples_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 999)
    rng = np.random.default_rng(20)
    covered = 0
    for _ in range(300):
        tokens = rng.integers(100, 2000, 20)
        gap = rng.normal(0, 0.02 + 0.3 / np.sqrt(tokens))
        low, high = paired_difference(by_sample(5 + gap, tokens), by_sample([5.0] * 20, tokens)).interval
        covered += low < 0 < high
    assert 0.92 < covered / 300 < 0.98
    two = np.array([100, 200])
    low, high = paired_difference(by_sample([5.1, 5.2], two), by_sample([5.0, 5.0], two)).interval
    assert (low, high) == pytest.approx((0.1, 0.2))  # no percentile reaches further


def test_pairing_removes_what_samples_share():
    rng = np.random.default_rng(2)
    tokens = rng.integers(300, 1500, 40)
    hard = rng.normal(6, 0.4, 40)
    a, b = (by_sample(hard + gap + 0.01 * rng.standard_normal(40), tokens) for gap in (0, 0.03))
    low, high = paired_difference(a, b).interval
    assert low < high < 0
    alone = np.log(ppl_interval(a))
    assert high - low < 0.2 * (alone[1] - alone[0])


def test_seeds_are_averaged_before_pairing():
    tokens = np.array([200, 400])
    first, second = by_sample([5.0, 6.0], tokens), by_sample([5.2, 6.4], tokens)
    averaged = paired_difference(pd.concat([first, second]), first)
    assert averaged.replicates == 1
    assert averaged.log_ppl == pytest.approx((0.1 * 200 + 0.2 * 400) / 600)
    assert averaged.samples == 2
    other = by_sample([5.2, 6.4], tokens, replicate=1)  # another seed or text, which only one of the two has
    alone = paired_difference(pd.concat([first, other]), first)
    assert (alone.replicates, alone.log_ppl) == (1, 0)


@pytest.mark.parametrize("between", [0.0, 0.01, 0.05])
def test_interval_over_replicates_and_samples_covers_the_truth(between, monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 499)
    rng = np.random.default_rng(21)
    covered, alone = 0, 0
    for _ in range(200):
        tokens, hard = rng.integers(300, 1500, 20), 0.3 * rng.standard_normal(20)
        own = 0.03 * rng.standard_normal(20)  # what a sample does to A alone
        sides = []
        for add in (own, 0):
            runs = [hard + add + 0.01 * rng.standard_normal(20) + between * rng.standard_normal() for _ in range(5)]
            sides.append(pd.concat([by_sample(5 + run, tokens, replicate=r) for r, run in enumerate(runs)]))
        low, high = paired_difference(*sides).interval
        covered += low < 0 < high
        low, high = paired_difference(*(side.assign(replicate=0) for side in sides)).interval
        alone += low < 0 < high
    assert 0.90 < covered / 200 <= 1.0
    if between == 0.05:  # replicates that differ are not covered when their runs are averaged first
        assert covered / 200 < 0.99 and alone / 200 < 0.75


@pytest.mark.parametrize("of_samples", [0.0, 0.05])
@pytest.mark.parametrize("replicates", [2, 3])
def test_two_replicates_are_enough_for_an_interval_that_covers(replicates, of_samples, monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 499)
    rng, tokens, covered = np.random.default_rng(5), np.full(20, 500), 0
    for _ in range(200):
        own = of_samples * rng.standard_normal(20) + 0.03 * rng.standard_normal((replicates, 1))
        found = mean_loss(own * tokens, tokens)
        covered += found.interval[0] < 0 < found.interval[1]
    assert 0.90 < covered / 200 <= 1.0


def test_a_difference_is_that_of_the_replicates_both_have():
    tokens = np.array([200, 400])
    a = pd.concat([by_sample([5.0, 5.0], tokens, r) for r in range(3)])
    b = pd.concat([by_sample([5.1, 5.1], tokens, r) for r in range(2)] + [by_sample([9.0, 9.0], tokens, 7)])
    found = paired_difference(a, b)
    assert (found.replicates, found.log_ppl) == (2, pytest.approx(-0.1))
    assert found.interval == pytest.approx((-0.1, -0.1))


def test_text_that_both_read_does_not_widen_their_difference():
    rng = np.random.default_rng(22)
    tokens = rng.integers(300, 1500, 20)
    shared = 0.2 * rng.standard_normal(5)
    sides = [
        pd.concat(
            [by_sample(5 + gap + text + 0.01 * rng.standard_normal(20), tokens, r) for r, text in enumerate(shared)]
        )
        for gap in (0, 0.05)
    ]
    low, high = paired_difference(*sides).interval
    assert -0.07 < low < high < -0.03


def lasting(rng, sizes=SIZES, replicates=5, alpha=-0.3, sd=0.05, noise=0.005):
    """Runs whose seed shifts and tilts the law at every size: rows train_tokens, ppl, replicate."""
    rows = []
    for r in range(replicates):
        shift, tilt = sd * rng.standard_normal(), 0.3 * sd * rng.standard_normal()
        for size in sizes:
            x = math.log(size / 36_000)
            loss = 6 + shift + (alpha + tilt) * x + noise * rng.standard_normal()
            rows.append((size, math.exp(loss), r))
    return pd.DataFrame(rows, columns=["train_tokens", "ppl", "replicate"])


def test_interval_of_the_slope_covers_effects_that_last_across_sizes():
    rng, covered, naive = np.random.default_rng(23), 0, 0
    for _ in range(300):
        runs = lasting(rng)
        found = fit_power_law(runs["train_tokens"], runs["ppl"], runs["replicate"])
        assert found.interval_dof == 4
        covered += found.alpha_interval[0] < -0.3 < found.alpha_interval[1]
        low, high = fit_power_law(runs["train_tokens"], runs["ppl"]).alpha_interval
        naive += low < -0.3 < high
    assert 0.92 < covered / 300 < 0.98
    uneven = runs[(runs["replicate"] > 0) | (runs["train_tokens"] < 60_000)]
    assert fit_power_law(uneven["train_tokens"], uneven["ppl"], uneven["replicate"]).interval_dof == len(uneven) - 2


def test_one_sample_gives_no_interval_and_equal_runs_a_zero_one():
    one = by_sample([5.0], np.array([100]))
    assert ppl_interval(one) is None
    assert paired_difference(one, one).interval is None
    several = by_sample([5.0, 6.0, 7.0], np.array([100, 200, 300]))
    assert paired_difference(several, several).interval == (0, 0)


def test_other_tokens_cannot_be_paired():
    with pytest.raises(ValueError, match="different tokens"):
        paired_difference(by_sample([5.0], np.array([100])), by_sample([5.0], np.array([101])))
    with pytest.raises(ValueError, match="different tokens"):
        paired_difference(by_sample([5.0, 5.0], np.array([100, 100])), by_sample([5.0], np.array([100])))


def test_the_sample_that_changes_a_difference_most_is_left_out_beside_it():
    tokens = np.array([100, 100, 200])
    found = paired_difference(by_sample([5.0, 5.0, 5.9], tokens), by_sample([5.1, 5.1, 5.0], tokens))
    assert (found.log_ppl, found.without, found.without_tokens) == (pytest.approx(0.4), pytest.approx(-0.1), 200)
    one = by_sample([5.0], np.array([100]))
    assert paired_difference(one, one).without is None


def test_the_test_text_has_its_own_difference(outputs):
    laws, pairs = {"A": (-0.3, 850), "B": (-0.3, 800)}, [(1, 0), (2, 1)]
    tested = []
    for gaps in ({"A": 0.1, "B": 0.2}, None):
        grid = plant(outputs, laws, pairs=pairs, test_gaps=gaps)
        runs, _, val_by_sample = read_grid("planted")
        tested.append(summarise("planted", runs, val_by_sample)["paired_differences"][0]["test"])
        for path in grid.glob("*/test_by_sample.csv"):
            path.unlink()
    interval = pytest.approx((-0.1, -0.1))
    assert tested[0] == {"log_ppl": pytest.approx(-0.1), "interval": interval, "samples": 50}
    assert tested[1] == {"log_ppl": pytest.approx(math.log(850 / 800)), "interval": None, "samples": None}
    paired, _ = differences(val_by_sample)
    assert with_tests(paired, runs.drop(columns="test_loss"))[0]["test"] is None
    runs.loc[runs["experiment"] == "A", "test_tokens"] = 4000
    assert with_tests(paired, runs)[0]["test"] is None


def test_a_run_without_losses_by_test_sample_takes_the_interval_with_it(outputs):
    grid = plant(outputs, {"A": (-0.3, 850), "B": (-0.3, 800)}, test_gaps={"A": 0.1, "B": 0.2})
    next(grid.glob(f"A*{SIZES[0]}*/test_by_sample.csv")).unlink()
    runs, _, val_by_sample = read_grid("planted")
    found = summarise("planted", runs, val_by_sample)["paired_differences"]
    assert [pair["test"]["samples"] for pair in found] == [None, 50, 50, 50]
    said = findings.verdict({"A": "A", "B": "B"}, "A", "B", found)
    assert said.endswith(f"; without intervals: +6.3 % at {SIZES[0]:,} tokens.") and "decided nothing) A **did" in said
    said = findings.verdict({"A": "A", "B": "B"}, "A", "B", found[:1])
    assert said.endswith(f"On the test text, without intervals: +6.3 % at {SIZES[0]:,} tokens.")
    said = findings.verdict({"A": "A", "B": "B"}, "A", "B", found[1:])
    assert said.startswith("B **did better")  # by validation text
    assert "On the test text (50 samples, which decided nothing) A **did better, in single runs, than** B at " in said
    table = tables.gaps_table({"paired_differences": found})
    assert [*table["Test samples"]] == ["–", 50, 50, 50] and table["Test text"][0] == "+6.3 %"
    assert len(plots.plot_paired_differences(runs, {"paired_differences": found[1:]}).axes[0].containers) == 2


def test_summary_of_a_planted_grid(outputs):
    plant(outputs, {"A": (-0.287, 800), "B": (-0.36, 830)})
    runs, _, val_by_sample = read_grid("planted")
    summary = summarise("planted", runs, val_by_sample)
    a = summary["configurations"]["A"]
    assert (a["n"], a["residual_dof"], a["reason"]) == (4, 2, None)
    assert a["alpha"] == pytest.approx(-0.287)
    assert a["log_a"] == pytest.approx(math.log(800) + 0.287 * math.log(20_000))
    assert summary["crossover_tokens"] == pytest.approx(20_000 * (830 / 800) ** (1 / 0.073))
    assert summary["crossover_extrapolated"] is False
    assert [d["train_tokens"] for d in summary["paired_differences"]] == list(SIZES)
    assert summary["paired_differences"][0]["log_ppl"] == pytest.approx(math.log(800 / 830))
    assert {run["source"] for run in summary["runs"]} == {"outputs"} and len(summary["runs"]) == 8
    again = pd.read_json(write_summary(summary, outputs), typ="series")
    assert again["crossover_tokens"] == pytest.approx(summary["crossover_tokens"])


@pytest.mark.parametrize(
    ("laws", "sizes", "reason", "pairs"),
    [
        ({}, (), "fewer than two configurations", 0),
        ({"A": (-0.3, 800)}, SIZES, "fewer than two configurations", 0),
        ({"A": (-0.3, 800), "B": (-0.4, 800)}, (20_000,), "no law for A and B", 1),
        ({"A": (-0.3, 800), "B": (-0.4, 800)}, {"A": (20_000, 30_000), "B": (30_000,)}, "no law for B", 1),
        ({"A": (-0.3, 800), "B": (-0.4, 800), "C": (-0.35, 800)}, SIZES, "3 configurations: see crossovers", 12),
    ],
)
def test_summary_of_incomplete_grids_says_why_there_is_no_crossover(outputs, laws, sizes, reason, pairs):
    plant(outputs, laws, sizes)
    runs, _, val_by_sample = read_grid("planted")
    summary = summarise("planted", runs, val_by_sample)
    assert (summary["crossover_tokens"], summary["crossover_reason"]) == (None, reason)
    assert len(summary["paired_differences"]) == pairs
    assert set(summary["configurations"]) == set(laws)
    write_summary(summary, outputs)


def test_a_run_that_the_grid_no_longer_asks_for_is_not_read(outputs):
    plant(outputs, {"A": (-0.3, 800)}, (20_000, 30_000))
    planted = {"num_layers": 6, "context_dim": 128, "embed_dim": 128}
    plan = {
        f"A_train_tokens-{size}_seed-42": Experiment.from_mapping(planted, {"train_tokens": size})
        for size in (20_000, 45_000)
    }
    for table in read_grid("planted", plan):
        assert set(table["run"]) == {"A_train_tokens-20000_seed-42"}
    assert [len(table) for table in read_grid("planted", {"B": plan.popitem()[1]})] == [0, 0, 0]


@pytest.mark.parametrize(
    "other", [{"embedding": "random"}, {"max_sample_tokens": 128}, {"max_sample_tokens": None}, {"seed": 43}]
)
def test_a_run_of_other_parameters_than_the_grid_files_is_not_read_but_counted(outputs, other):
    plant(outputs, {"A": (-0.3, 800)}, (20_000, 30_000))
    planted = {"num_layers": 6, "context_dim": 128, "embed_dim": 128}
    sizes = {20_000: {}, 30_000: other}
    plan = {
        f"A_train_tokens-{size}_seed-42": Experiment.from_mapping(planted, {"train_tokens": size, "device": "cpu"}, own)
        for size, own in sizes.items()
    }
    runs, _, val_by_sample = read_grid("planted", plan)
    assert runs["train_tokens"].tolist() == [20_000] and val_by_sample["run"].nunique() == 1
    assert "1 more run of other parameters than the grid file's left out." in findings.origin("planted", runs)
    assert "Grid planted: 1 run, of 2 planned, in " in findings.origin("planted", runs)
    designs = pd.concat([runs.assign(configuration=label) for label in ("A", "A-bfloat16")])
    designs = pd.concat([designs, runs.assign(configuration="A-arithmetic", design="arithmetic")])
    said = "A (and 1 more) 6 layers of 128, A-arithmetic 6 layers of widths that fall to 128;"
    assert said in findings.origin("planted", designs)
    assert "left out" not in findings.origin("planted", read_grid("planted")[0])


def test_a_parameter_that_the_grid_file_leaves_open_must_be_open_in_the_run(outputs):
    wanted = {"num_layers": 6, "context_dim": 128, "embed_dim": 128, "train_tokens": 20_000}
    name = "A_train_tokens-20000_seed-42"
    for there, asked in ((None, 256), (256, None)):
        plant(outputs, {"A": (-0.3, 800)}, (20_000,), max_sample_tokens=there)
        assert read_grid("planted", {name: Experiment.from_mapping(wanted, {"max_sample_tokens": asked})})[0].empty
        plan = {name: Experiment.from_mapping(wanted, {"max_sample_tokens": there})}
        assert len(read_grid("planted", plan)[0]) == 1
    plant(outputs, {"A": (-0.3, 800)}, (20_000,), train_samples=25)  # asked for in samples, kept with its tokens
    wanted |= {"train_tokens": None, "train_samples": 25}
    assert len(read_grid("planted", {name: Experiment.from_mapping(wanted)})[0]) == 1


def test_runs_that_differ_in_more_than_size_and_seed_are_configurations_of_their_own(outputs):
    plant(outputs, {"A": (-0.3, 800)}, seeds=(1, 2))
    for run in (outputs / "planted").glob("A_*seed-1"):
        run.rename(run.with_name(run.name + "_slow"))
    plant(outputs, {"A": (-0.2, 900)}, seeds=(1,), phase2_learning_rate=0.0005)
    runs, history, val_by_sample = read_grid("planted")
    labels = {"A, phase2_learning_rate 0.0005", "A, phase2_learning_rate 0.002"}
    assert set(runs["experiment"]) == set(history["experiment"]) == set(val_by_sample["experiment"]) == labels
    laws = summarise("planted", runs, val_by_sample)["configurations"]
    assert laws["A, phase2_learning_rate 0.0005"]["alpha"] == pytest.approx(-0.2)
    assert laws["A, phase2_learning_rate 0.002"]["n"] == 8


def test_robust_interval_is_hc3_or_from_ten_replicates_up_clustered():
    rng = np.random.default_rng(5)
    sizes = np.repeat(SIZES, 10)
    ppl = np.exp(9 - 0.3 * np.log(sizes) + 0.05 * rng.standard_normal(40))
    fit = sm.OLS(np.log(ppl), sm.add_constant(np.log(sizes))).fit()
    hc3 = fit.get_robustcov_results("HC3", use_t=True).conf_int()[1]
    assert fit_power_law(sizes, ppl).alpha_interval_robust == pytest.approx(tuple(hc3))
    nine, ten = np.arange(40) % 9, np.arange(40) % 10
    assert fit_power_law(sizes, ppl, nine).alpha_interval_robust == pytest.approx(tuple(hc3))
    clustered = fit.get_robustcov_results("cluster", groups=ten, use_t=True).conf_int()[1]
    found = fit_power_law(sizes, ppl, ten)
    assert found.alpha_interval_robust == pytest.approx(tuple(clustered))
    assert fit_power_law([1000, 2000], [300, 250]).alpha_interval_robust is None
    # a run that alone determines where the line goes has no residual, and HC3 nothing to work with
    assert fit_power_law([1000, 1000, 2000], [300, 310, 250]).alpha_interval_robust is None


@pytest.mark.parametrize("beta", [0.3, 0.6, 1.2])
def test_planted_saturating_law_is_recovered(beta):
    sizes = np.geomspace(10_000, 1_000_000, 8)
    loss = 3.2 + 40 * (sizes / 1000) ** -beta
    found = fit_saturating(sizes, np.exp(loss))
    assert (found.floor, found.beta) == pytest.approx((3.2, beta), rel=1e-3)
    assert found.scale == pytest.approx(40 * 1000**beta, rel=1e-2)
    assert found.bends and (found.n, found.residual_dof) == (8, 5)
    assert found.ppl(50_000) == pytest.approx(math.exp(3.2 + 40 * 50**-beta), rel=1e-4)


def test_the_criterion_prefers_the_form_that_was_planted():
    rng = np.random.default_rng(6)
    sizes = np.tile(np.geomspace(10_000, 1_000_000, 6), 3)
    noise = 0.01 * rng.standard_normal(len(sizes))
    straight = fit_saturating(sizes, np.exp(9 - 0.3 * np.log(sizes) + noise))
    bent = fit_saturating(sizes, np.exp(4 + 400 * sizes**-0.6 + noise))
    assert straight.aicc > straight.aicc_power_law and not straight.bends
    assert bent.aicc < bent.aicc_power_law - 10 and bent.bends
    n, k = len(sizes), 3
    x = np.log(sizes)
    squares = np.polyfit(x, 9 - 0.3 * x + noise, 1, full=True)[1][0]
    expected = n * math.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    assert straight.aicc_power_law == pytest.approx(expected)


def test_too_few_runs_leave_the_criterion_or_the_form_out():
    four = [10_000, 20_000, 40_000, 80_000]
    found = fit_saturating(four, [500, 410, 350, 310])
    assert found.aicc is None and found.aicc_power_law is None and found.residual_dof == 1
    with pytest.raises(ValueError, match="at least four sizes, but there are 3"):
        fit_saturating(four[:3], [500, 410, 350])
    with pytest.raises(ValueError, match="positive finite PPL"):
        fit_saturating(four, [500, 410, math.nan, 310])
    rising = fit_saturating(four, [310, 350, 410, 500])
    assert not rising.bends and rising.scale == 0


def test_extrapolation_to_held_out_sizes():
    sizes = np.array([10_000, 20_000, 40_000, 80_000, 160_000, 320_000])
    straight = np.exp(9 - 0.3 * np.log(sizes))
    rows = pd.DataFrame(extrapolate(sizes, straight)).set_index(["form", "tokens"])
    assert set(rows.index) == {(form, size) for form in ("power law", "saturating") for size in (160_000, 320_000)}
    assert rows.loc["power law", "error"].abs().max() < 1e-9
    bent = np.exp(4 + 400 * sizes**-0.6)
    rows = pd.DataFrame(extrapolate(sizes, bent)).set_index(["form", "tokens"])
    assert rows.loc["saturating", "error"].abs().max() < 1e-3
    expected = fit_power_law(sizes[:4], bent[:4]).ppl(320_000) / bent[5] - 1
    assert rows.loc[("power law", 320_000), "error"] == pytest.approx(expected) and expected < -0.01
    four = pd.DataFrame(extrapolate(sizes[:4], bent[:4]))
    assert list(four["form"]) == ["power law"] and list(four["tokens"]) == [80_000]  # three sizes: nothing to bend
    assert extrapolate([10_000, 20_000], [300, 250]) == []


def test_runs_of_one_configuration_stay_together_across_machines_and_versions(outputs):
    older, newer = {"dtype": "bfloat16", "val_every_steps": 5}, {"dtype": "float32", "output_bias": "none"}
    laws = {"A": (-0.3, 500.0)}
    grid = "protocol-1/planted"  # of whose runs some multiply in two types
    plant(outputs, laws, sizes=(20_000, 30_000), grid=grid, **older)
    folder = plant(outputs, laws, sizes=(45_000,), grid=grid, **newer)
    runs, history, _ = read_grid(grid)
    assert set(runs["experiment"]) == set(history["experiment"]) == {"A"}
    assert runs["output_bias"].tolist() == ["none"] * 3  # younger than two of the runs, and off when they were made
    assert "bfloat16 in 2 and in float32 in 1 of them" in findings.one_kind(runs)
    # a grid that sweeps the type has the same run in both
    (folder / "A_train_tokens-45000_seed-42").rename(folder / "A_train_tokens-45000_dtype-float32_seed-42")
    plant(outputs, laws, sizes=(45_000,), grid=grid, **newer | {"dtype": "bfloat16"})
    runs, _, _ = read_grid(grid)
    assert set(runs["experiment"]) == {"A, dtype bfloat16", "A, dtype float32"}
    assert findings.one_kind(runs) == ""
    texts = runs.assign(corpus="mine.txt", data_hash=["a", "b", *[None] * (len(runs) - 2)])  # older runs have none
    assert "was another** for some of them" in findings.one_kind(texts)
    assert findings.one_kind(texts.assign(data_hash=["a", *[None] * (len(runs) - 1)])) == ""


def planned(dtypes, sizes=(20_000, 30_000)):
    """The plan of planted runs: label → the type of product that the grid's file gives it."""
    shapes = {label: dict(zip(("num_layers", "context_dim"), SHAPES[label], strict=True)) for label in dtypes}
    return {
        f"{label}_train_tokens-{size}_seed-42": Experiment.from_mapping(
            {"experiment": label, "embed_dim": 128, "dtype": dtype, "train_tokens": size}, shapes[label]
        )
        for label, dtype in dtypes.items()
        for size in sizes
    }


def refused(*arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        read_grid(*arguments, **options)
    return str(caught.value)


A, B = {"A": (-0.3, 800)}, {"B": (-0.3, 850)}


def test_runs_of_another_protocol_are_refused(outputs):
    plant(outputs, A, (20_000, 30_000), protocol=1)
    said = (
        "grid planted has runs that were judged otherwise than by today's protocol 2 and cannot be read ({}): delete "
        "the metrics.json of each, as of A_train_tokens-{}_seed-42, and run `make report GRID=planted` again"
    )
    assert refused("planted") == said.format("2 by protocol 1", 20000)
    plant(outputs, B, (20_000, 30_000))
    assert refused("planted") == said.format("2 by protocol 1 and 2 by protocol 2", 20000)
    plant(outputs, A, (20_000,))
    assert refused("planted") == said.format("1 by protocol 1 and 3 by protocol 2", 30000)
    plant(outputs, A, (30_000,), protocol=3)
    assert refused("planted") == said.format("3 by protocol 2 and 1 by protocol 3", 30000)
    path = outputs / "planted" / "A_train_tokens-30000_seed-42" / "metrics.json"
    path.write_text(path.read_text().replace('"protocol": 3, ', ""))  # as runs were written before there were two
    assert "protocol" not in path.read_text() and load_runs("planted")["protocol"].tolist() == [2, 1, 2, 2]
    assert refused("planted") == said.format("1 by protocol 1 and 3 by protocol 2", 30000)
    plan = planned({"A": "auto", "B": "auto"})
    found = read_grid("planted", plan)[0]  # of whole samples, so that it is not what the plan asks for: it is run anew
    assert len(found) == 3 and "1 more run of other parameters" in findings.origin("planted", found)
    plant(outputs, A, (30_000,), protocol=1)
    assert refused("planted", plan) == said.format("1 by protocol 1 and 3 by protocol 2", 30000)
    # what is not read is in nobody's way: runs that the plan does not ask for, and other models
    assert len(read_grid("planted", planned({"A": "auto", "B": "auto"}, (20_000,)))[0]) == 2
    plant(outputs, A, (30_000,), protocol=1, model="lstm")
    assert len(read_grid("planted", plan)[0]) == len(read_grid("planted")[0]) == 3
    assert refused("planted", models=["lstm"]) == said.format("1 by protocol 1", 30000)


def test_runs_of_two_types_of_product_are_refused_but_where_the_plan_gives_them(outputs):
    plant(outputs, A, (20_000, 30_000), dtype="bfloat16")
    for plan in (None, planned({"A": "auto"}), planned({"A": "bfloat16"})):
        assert len(read_grid("planted", plan)[0]) == 2
    plant(outputs, B, (20_000,), dtype="float32")
    said = (
        "grid planted has runs whose matrix products are of two types (dtype: 2 in bfloat16 and 1 in float32), which "
        "its file does not give them: write `dtype: bfloat16`, or the other one, under `common` in that file and run "
        "`make report GRID=planted` again"
    )
    given = {"A": "bfloat16", "B": "float32"}
    for dtypes in ({"A": "auto", "B": "auto"}, {"A": "float32", "B": "bfloat16"}, given | {"A": "auto"}):
        assert refused("planted", planned(dtypes)) == said
    assert refused("planted") == said
    assert refused("planted", planned(dict.fromkeys("AB", "float32"))) == said  # the grid's file was changed since
    runs, _, _ = read_grid("planted", planned(given))
    assert set(runs["experiment"]) == {"A", "B"}
    assert len(read_grid("planted", planned({"A": "auto"}))[0]) == 2  # B is not asked for
    plant(outputs, B, (20_000,), dtype="float64", model="kneser-ney")  # an n-gram has no products
    plant(outputs, {"C": (-0.3, 850)}, (20_000,), dtype="float32", model="lstm")
    assert len(read_grid("planted", models=BASELINES)[0]) == 2 and len(read_grid("planted")[0]) == 2


def test_runs_of_protocol_1_are_read_as_they_are(outputs):
    committed = outputs.parent / "committed"
    plant(committed, A, (20_000,), "protocol-1/planted", protocol=1, dtype="bfloat16")
    folder = plant(committed, B, (20_000, 30_000), "protocol-1/planted", protocol=1, dtype="float32")
    runs, history, val_by_sample = read_grid("protocol-1/planted")
    assert len(runs) == 3 and set(runs["source"]) == {"committed"} and set(runs["protocol"]) == {1}
    assert set(history["run"]) == set(val_by_sample["run"]) == {path.name for path in folder.iterdir()}
    assert summarise("protocol-1/planted", runs, val_by_sample)["grid"] == "protocol-1/planted"
    assert "Grid protocol-1/planted: 3 runs in " in findings.origin("protocol-1/planted", runs)
    assert read_grid("planted")[0].empty and read_grid("protocol-1")[0].empty
    nothing = "No finished run of grid protocol-1/gone: restore data/results/protocol-1/gone by git."
    assert findings.origin("protocol-1/gone", read_grid("protocol-1/gone")[0]) == nothing
