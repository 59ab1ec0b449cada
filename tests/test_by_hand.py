"""The project's estimates against the same numbers computed by hand (`tests/by_hand.py`), on the committed runs.

Points are the same sums and agree to 1e-6 of the difference of logarithms. Intervals are made in another way: by hand
conversations are jackknife pseudo-values, of which each counts once; in the project they are sums, which weigh as many
tokens, and Kish's effective number of conversations. Ends agree to 3 % of the half-width.
"""

from functools import cache

import numpy as np
import pytest

from ctxlm.analysis.estimates import Estimate, combined, paired
from ctxlm.analysis.runs import read_runs
from tests import by_hand

pytestmark = pytest.mark.slow
HALF_WIDTH = 0.03
read = cache(read_runs)  # the same committed runs each time


def projects_own(name: str) -> Estimate:
    """The project's estimate of what is compared by hand."""
    if name in by_hand.CONTRASTS:
        size, *both = by_hand.CONTRASTS[name]
        runs = read(*dict.fromkeys(grid for grid, _ in both))
        a, b = ({"grid": grid, "experiment": label} for grid, label in both)
        (estimate,) = paired(runs[runs["train_tokens"] == size], a, b)
    elif name in by_hand.POOLED:
        grid, read_at_once, column, a, b = by_hand.POOLED[name]
        runs = read(grid)
        runs = runs[runs["num_input_tokens"] == read_at_once]
        (estimate,) = paired(runs, {column: a}, {column: b}, at=[by_hand.PLACES[column][0]], pooled=True)
    elif name in by_hand.PROMPTS:
        grid, wanted = by_hand.PROMPTS[name]
        runs = read(grid)
        for column, value in wanted.items():
            runs = runs[runs[column].isna() if value is None else runs[column] == value]
        (estimate,) = paired(runs, {"experiment": "A"}, {"experiment": "B"})
    else:
        text, embeddings = (by_hand.SITES | by_hand.TEXTWISE)[name]
        runs = read("sites")
        runs = runs[(runs["corpus"] == text) & runs["embedding"].isin(embeddings)]
        (estimate,) = paired(runs, {"experiment": "A"}, {"experiment": "B"}, at=["embedding"], pooled=True)
    return estimate


@pytest.fixture(autouse=True)
def committed(tmp_path, monkeypatch):
    """Committed runs alone."""
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("CTXLM_RESULTS", str(by_hand.RESULTS))


@pytest.mark.parametrize("names", [by_hand.SITES, by_hand.TEXTWISE], ids=["sites", "texts"])
def test_sites_are_combined_as_by_hand(names):
    sites = [projects_own(name) for name in names]
    mean, *_ = combined(sites, "A − B")
    by_us = by_hand.over_sites(*np.array([(site.value, site.error) for site in sites]).T)
    assert (mean.value, mean.low, mean.high) == pytest.approx(by_us, rel=1e-5)


@pytest.mark.parametrize("name", by_hand.EVERY)
def test_points_and_intervals_are_those_computed_by_hand(name):
    sums, tokens = by_hand.by_sample(*by_hand.sides(name))
    mean, low, high = by_hand.interval(sums, tokens)
    estimate, within = projects_own(name), HALF_WIDTH * (high - low) / 2
    assert estimate.replicates == len(sums) and estimate.value == pytest.approx(mean, rel=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=within)
