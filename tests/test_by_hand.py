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
    mean, low, _ = by_hand.interval(sums, tokens)
    estimate = projects_own(name)
    assert estimate.replicates == len(sums)
    assert estimate.value == pytest.approx(mean, rel=1e-6)
    alone = stats.ttest_1samp(sums.sum(1) / tokens.sum(), 0).confidence_interval()
    half = max(mean - low, (alone.high - alone.low) / 2)
    replicate, conversation, rest = by_hand.mean_squares(sums, tokens)
    if replicate < rest:
        m, n = sums.shape
        more = max(conversation - rest, 0)
        dof = (rest + more) ** 2 / (rest**2 / (m - 1) + more**2 / (n - 1))
        half = max(half, stats.t.ppf(0.975, dof) * np.sqrt((rest + more) / m / n))
    assert estimate.value - estimate.low == pytest.approx(half, rel=HALF_WIDTH)
    assert estimate.high - estimate.value == pytest.approx(half, rel=HALF_WIDTH)
