"""The project's estimates against the same numbers computed by hand (`tests/by_hand.py`), on the committed runs.

Points are the same sums and agree to 1e-6 of the difference of logarithms. Intervals are made in another way, and it is
known where that shows. The project takes Student's interval over replicates alone where that is the wider one, and by
hand this is not done: half-widths are held against the wider one of both, to 3 % of it. That much is left to

- Satterthwaite's degrees of freedom, in which by hand a component that is estimated as none has no part;
- the weights of conversations: by hand jackknife pseudo-values, of which each counts once; in the project sums, that
  weigh as many tokens, and Kish's effective number of conversations.

Where replicates differ by less than the rest alone would make them, by hand they add nothing. The project is more
careful: it takes a part as large as the rest as known from replicates alone, with their few degrees of freedom.
"""

from functools import cache

import numpy as np
import pytest
from scipy import stats

from ctxlm.analysis.estimates import Estimate, paired
from ctxlm.analysis.runs import read_runs
from tests import by_hand

HALF_WIDTH = 0.03
SMALL, LARGE, QUICK = 86_925, 183_620, 20_000


def shapes(grid: str, train_tokens: int, suffix: str = "") -> Estimate:
    return one(read_runs(grid), train_tokens, {"experiment": f"A{suffix}"}, {"experiment": f"B{suffix}"})


def arms(experiment: str) -> Estimate:
    runs = read_runs("sound", "study")
    return one(runs[runs["experiment"] == experiment], SMALL, {"grid": "sound"}, {"grid": "study"})


def zeros(experiment: str, train_tokens: int = QUICK, arm: str = "sound") -> Estimate:
    full = ("sound", "sound-ablations-full") if arm == "sound" else ("study", "ablations-full")
    grids = ("sound-variance", "sound-ablations") if train_tokens == QUICK else full
    return one(read_runs(*grids), train_tokens, {"experiment": f"{experiment}-zero"}, {"experiment": experiment})


def one(runs, train_tokens: int, a: dict, b: dict) -> Estimate:
    (found,) = paired(runs[runs["train_tokens"] == train_tokens], a, b)
    return found


def pooled(column: str, a: int, b: int, over: str, grid: str = "depth", num_input_tokens: int = 2) -> Estimate:
    runs = read_runs(grid)
    runs = runs[runs["num_input_tokens"] == num_input_tokens]
    (found,) = paired(runs, {column: a}, {column: b}, at=(over,), pooled=True)
    return found


PROJECT = {
    "A − B, sound, 86,925": lambda: shapes("sound", SMALL),
    "A − B, study, 86,925": lambda: shapes("study", SMALL),
    "A − B, study, 183,620": lambda: shapes("study", LARGE),
    "A − B, sound, 183,620": lambda: shapes("sound", LARGE),
    "A − B, sound, quick scale": lambda: shapes("sound-variance", QUICK),
    "sound − study, A, 86,925": lambda: arms("A"),
    "sound − study, B, 86,925": lambda: arms("B"),
    "zeros − contexts, A, sound, 86,925": lambda: zeros("A", SMALL),
    "zeros − contexts, B, sound, 86,925": lambda: zeros("B", SMALL),
    "zeros − contexts, A, study, 86,925": lambda: zeros("A", SMALL, "study"),
    "zeros − contexts, B, study, 86,925": lambda: zeros("B", SMALL, "study"),
    "KN-4 − A, sound, 183,620": lambda: one(
        read_runs("sound", "baselines"), LARGE, {"experiment": "KN-4"}, {"experiment": "A"}
    ),
    "zeros − contexts, A, sound, quick scale": lambda: zeros("A"),
    "zeros − contexts, B, sound, quick scale": lambda: zeros("B"),
    "A − B with zeros, sound, quick scale": lambda: shapes("sound-ablations", QUICK, "-zero"),
    "context 256 − 128, sound, quick scale": lambda: pooled("context_dim", 256, 128, over="num_layers"),
    "1 layer − 6 layers, sound, quick scale": lambda: pooled("num_layers", 1, 6, over="context_dim"),
    "context 256 − 128, searched, quick scale": lambda: pooled(
        "context_dim", 256, 128, "num_layers", "searched-depth", 1
    ),
    "2 layers − 6 layers, searched, quick scale": lambda: pooled(
        "num_layers", 2, 6, "context_dim", "searched-depth", 1
    ),
    "A − B, searched, quick scale": lambda: one(
        read_runs("searched-depth"), QUICK, {"experiment": "L6-C128"}, {"experiment": "L3-C256"}
    ),
    "zeros − contexts, searched, quick scale": lambda: one(
        read_runs("searched-ablations"), QUICK, {"experiment": "without-contexts"}, {"experiment": "whole"}
    ),
    "2 layers − 6 layers, one token, quick scale": lambda: pooled(
        "num_layers", 2, 6, "context_dim", num_input_tokens=1
    ),
    "A, sound − searched, 86,925": lambda: one(
        read_runs("sound", "searched"), SMALL, {"experiment": "A"}, {"experiment": "A-searched"}
    ),
}
"""The project's own estimates, by the names that they have by hand."""


@cache
def project(name: str) -> Estimate:
    return PROJECT[name]()


@pytest.fixture(scope="module")
def contrasts():
    return by_hand.contrasts()


@pytest.fixture(autouse=True)
def committed_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(by_hand.RESULTS))


@pytest.mark.slow
def test_nothing_is_left_out(contrasts):
    assert contrasts.keys() == PROJECT.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECT)
def test_points_are_those_computed_by_hand(contrasts, name):
    sums, tokens = by_hand.by_sample(*contrasts[name])
    found = project(name)
    assert found.replicates == len(sums)
    assert found.value == pytest.approx(by_hand.interval(sums, tokens)[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECT)
def test_intervals_are_those_computed_by_hand(contrasts, name):
    sums, tokens = by_hand.by_sample(*contrasts[name])
    mean, low, _ = by_hand.interval(sums, tokens)
    alone = stats.ttest_1samp(sums.sum(1) / tokens.sum(), 0).confidence_interval()
    half = max(mean - low, (alone.high - alone.low) / 2)
    replicate, conversation, rest = by_hand.mean_squares(sums, tokens)
    if replicate < rest:
        m, n = sums.shape
        more = max(conversation - rest, 0)
        dof = (rest + more) ** 2 / (rest**2 / (m - 1) + more**2 / (n - 1))
        half = max(half, stats.t.ppf(0.975, dof) * np.sqrt((rest + more) / m / n))
    found = project(name)
    assert found.value - found.low == pytest.approx(half, rel=HALF_WIDTH)
    assert found.high - found.value == pytest.approx(half, rel=HALF_WIDTH)


@pytest.mark.slow
def test_the_halves_of_the_test_text_make_the_whole():
    sides = [by_hand.shape("sound", name, SMALL) for name in "AB"]
    whole, tokens = by_hand.by_sample(tuple(sides))
    parts = [by_hand.by_sample(pair) for pair in zip(*map(by_hand.halves, sides), strict=True)]
    np.testing.assert_array_equal(np.hstack([sums for sums, _ in parts]), whole)
    np.testing.assert_array_equal(np.hstack([of for _, of in parts]), tokens)


@pytest.mark.slow
def test_attacks_on_the_main_claim_are_the_projects_own_numbers():
    attacks = by_hand.attacks()
    for grid in ("dtype", "random", "rotation"):
        runs = read_runs(grid)
        for arm, prefix in (("sound", "sound-"), ("study", "")):
            (found,) = paired(runs, {"experiment": f"{prefix}A"}, {"experiment": f"{prefix}B"})
            by = attacks[f"A − B, {arm}, quick scale, {grid}"]
            assert (found.replicates, 100 * np.expm1(found.value)) == (by.replicates, pytest.approx(by.value, rel=1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["study", "sound"])
def test_the_spread_over_replicates_is_that_of_the_runs_read(grid):
    runs = read_runs(grid).query(f"experiment == 'A' and train_tokens == {SMALL}")
    found = by_hand.spread(by_hand.shape(grid, "A", SMALL))
    assert found.replicates == len(runs)
    assert np.log1p(found.value / 100) == pytest.approx(runs["log_ppl"].std(), rel=1e-6)
