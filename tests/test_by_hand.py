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

import itertools
from functools import cache

import numpy as np
import pytest
from scipy import stats

from ctxlm.analysis.estimates import Estimate, paired
from ctxlm.analysis.runs import read_runs
from tests import by_hand

pytestmark = pytest.mark.slow
HALF_WIDTH = 0.03
SMALL, LARGE, QUICK = 86_925, 183_620, 20_000
read = cache(read_runs)  # the same committed runs each time


def one(grids: str, train_tokens: int, a: dict, b: dict) -> Estimate:
    """Of grids, separated by spaces, at one size."""
    runs = read(*grids.split())
    (estimate,) = paired(runs[runs["train_tokens"] == train_tokens], a, b)
    return estimate


def labels(grids: str, train_tokens: int, a: str, b: str) -> Estimate:
    return one(grids, train_tokens, {"experiment": a}, {"experiment": b})


def recipes(experiment: str) -> Estimate:
    stabilised, study = ({"experiment": experiment, "grid": grid} for grid in ("stabilised", "study"))
    return one("stabilised study", SMALL, stabilised, study)


def pooled(column: str, a: int, b: int, over: str, grid: str = "depth", num_input_tokens: int = 2) -> Estimate:
    runs = read(grid)
    runs = runs[runs["num_input_tokens"] == num_input_tokens]
    (estimate,) = paired(runs, {column: a}, {column: b}, at=(over,), pooled=True)
    return estimate


STABILISED, STUDY, STABILISED_QUICK = (
    "stabilised stabilised-ablations-full",
    "study ablations-full",
    "stabilised-variance stabilised-ablations",
)
PROJECT = {
    "A − B, stabilised, 86,925": (labels, "stabilised", SMALL, "A", "B"),
    "A − B, study, 86,925": (labels, "study", SMALL, "A", "B"),
    "A − B, study, 183,620": (labels, "study", LARGE, "A", "B"),
    "A − B, stabilised, 183,620": (labels, "stabilised", LARGE, "A", "B"),
    "A − B, stabilised, quick scale": (labels, "stabilised-variance", QUICK, "A", "B"),
    "stabilised − study, A, 86,925": (recipes, "A"),
    "stabilised − study, B, 86,925": (recipes, "B"),
    "zeros − contexts, A, stabilised, 86,925": (labels, STABILISED, SMALL, "A-zero", "A"),
    "zeros − contexts, B, stabilised, 86,925": (labels, STABILISED, SMALL, "B-zero", "B"),
    "zeros − contexts, A, study, 86,925": (labels, STUDY, SMALL, "A-zero", "A"),
    "zeros − contexts, B, study, 86,925": (labels, STUDY, SMALL, "B-zero", "B"),
    "KN-4 − A, stabilised, 183,620": (labels, "stabilised baselines", LARGE, "KN-4", "A"),
    "zeros − contexts, A, stabilised, quick scale": (labels, STABILISED_QUICK, QUICK, "A-zero", "A"),
    "zeros − contexts, B, stabilised, quick scale": (labels, STABILISED_QUICK, QUICK, "B-zero", "B"),
    "A − B with zeros, stabilised, quick scale": (labels, "stabilised-ablations", QUICK, "A-zero", "B-zero"),
    "context 256 − 128, stabilised, quick scale": (pooled, "context_dim", 256, 128, "num_layers"),
    "1 layer − 6 layers, stabilised, quick scale": (pooled, "num_layers", 1, 6, "context_dim"),
    "context 256 − 128, searched, quick scale": (pooled, "context_dim", 256, 128, "num_layers", "searched-depth", 1),
    "2 layers − 6 layers, searched, quick scale": (pooled, "num_layers", 2, 6, "context_dim", "searched-depth", 1),
    "A − B, searched, quick scale": (labels, "searched-depth", QUICK, "L6-C128", "L3-C256"),
    "zeros − contexts, searched, quick scale": (labels, "searched-ablations", QUICK, "without-contexts", "whole"),
    "2 layers − 6 layers, one token, quick scale": (pooled, "num_layers", 2, 6, "context_dim", "depth", 1),
    "A, stabilised − searched, 86,925": (labels, "stabilised searched", SMALL, "A", "A-searched"),
}
"""The project's own estimates, by the names that they have by hand: a function and its arguments."""


@pytest.fixture(scope="module")
def contrasts():
    return by_hand.contrasts()


@pytest.fixture(autouse=True)
def committed_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(by_hand.RESULTS))


def test_nothing_is_left_out(contrasts):
    assert contrasts.keys() == PROJECT.keys()


@pytest.mark.parametrize("name", PROJECT)
def test_points_and_intervals_are_those_computed_by_hand(contrasts, name):
    sums, tokens = by_hand.by_sample(*contrasts[name])
    mean, low, _ = by_hand.interval(sums, tokens)
    estimate, *arguments = PROJECT[name]
    projects = estimate(*arguments)
    assert projects.replicates == len(sums)
    assert projects.value == pytest.approx(mean, rel=1e-6)
    alone = stats.ttest_1samp(sums.sum(1) / tokens.sum(), 0).confidence_interval()
    half = max(mean - low, (alone.high - alone.low) / 2)
    replicate, conversation, rest = by_hand.mean_squares(sums, tokens)
    if replicate < rest:
        m, n = sums.shape
        more = max(conversation - rest, 0)
        dof = (rest + more) ** 2 / (rest**2 / (m - 1) + more**2 / (n - 1))
        half = max(half, stats.t.ppf(0.975, dof) * np.sqrt((rest + more) / m / n))
    assert projects.value - projects.low == pytest.approx(half, rel=HALF_WIDTH)
    assert projects.high - projects.value == pytest.approx(half, rel=HALF_WIDTH)


def test_the_halves_of_the_test_text_make_the_whole():
    sides = [by_hand.shape("stabilised", name, SMALL) for name in "AB"]
    whole, tokens = by_hand.by_sample(tuple(sides))
    parts = [by_hand.by_sample(pair) for pair in zip(*map(by_hand.halves, sides), strict=True)]
    np.testing.assert_array_equal(np.hstack([sums for sums, _ in parts]), whole)
    np.testing.assert_array_equal(np.hstack([of for _, of in parts]), tokens)


def test_attacks_on_the_main_claim_are_the_projects_own_numbers():
    attacks = by_hand.attacks()
    for grid, (recipe, prefix) in itertools.product(
        ("dtype", "random", "rotation"), (("stabilised", "sound-"), ("study", ""))
    ):
        (projects,) = paired(read(grid), {"experiment": f"{prefix}A"}, {"experiment": f"{prefix}B"})
        by = attacks[f"A − B, {recipe}, quick scale, {grid}"]
        assert projects.replicates == by.replicates
        assert 100 * np.expm1(projects.value) == pytest.approx(by.value, rel=1e-6)


def test_the_spread_over_replicates_is_that_of_the_runs_read():
    runs = read("stabilised").query(f"experiment == 'A' and train_tokens == {SMALL}")
    spread = by_hand.spread(by_hand.shape("stabilised", "A", SMALL))
    assert spread.replicates == len(runs)
    assert np.log1p(spread.value / 100) == pytest.approx(runs["log_ppl"].std(), rel=1e-6)
