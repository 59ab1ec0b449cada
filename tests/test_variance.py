"""Shares of chance against planted ones, and errors over validation samples against simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis.scaling import paired_difference
from ctxlm.analysis.variance import components, resolution, sampling_error

PLANTED = {"seed": 0.04, "data_seed": 0.02, "residual": 0.01}


def crossed(rng, sizes=(10_000, 20_000, 30_000, 40_000, 50_000), seeds=(1, 2, 3), windows=(0, 1, 2), sd=PLANTED):
    """Runs of A and B with crossed seeds and windows, each cell with effects of its own; A is 0.06 nats better."""
    rows = []
    for label, size in itertools.product("AB", sizes):
        of_seed = {s: sd["seed"] * rng.standard_normal() for s in seeds}
        of_window = {w: sd["data_seed"] * rng.standard_normal() for w in windows}
        for seed, window in itertools.product(seeds, windows):
            loss = 6 - 0.3 * math.log(size / 10_000) + 0.06 * (label == "B") + of_seed[seed] + of_window[window]
            loss += sd["residual"] * rng.standard_normal()
            rows.append((f"{label}{size}-{seed}-{window}", label, size, seed, window, loss))
    return pd.DataFrame(rows, columns=["run", "experiment", "train_tokens", "seed", "data_seed", "val_loss"])


def by_sample(runs, rng, spread=0.3, samples=20):
    tokens = rng.integers(300, 1500, samples)
    hard = spread * rng.standard_normal(samples)
    parts = [
        pd.DataFrame({"run": run, "sample": range(samples), "loss_sum": (loss + hard) * tokens, "tokens": tokens})
        for run, loss in zip(runs["run"], runs["val_loss"], strict=True)
    ]
    return pd.concat(parts)


def test_planted_components_are_recovered_on_average():
    rng, found = np.random.default_rng(0), []
    for _ in range(25):
        runs = crossed(rng)
        found.append(components(runs, by_sample(runs, rng)).set_index("source")["sd"])
    variances = (pd.DataFrame(found) ** 2).mean()
    for source, sd in PLANTED.items():
        assert math.sqrt(variances[source]) == pytest.approx(sd, rel=0.1)
    assert math.sqrt(variances["configuration"]) == pytest.approx(0.03, rel=0.35)  # half of 0.06, and some noise


def test_degrees_of_freedom_and_tests():
    rng = np.random.default_rng(1)
    runs = crossed(rng)
    found = components(runs, by_sample(runs, rng)).set_index("source")
    assert list(found["dof"]) == [20, 20, 40, 19, 1]
    assert found.loc["seed", "p_value"] < 1e-6 and found.loc["residual", "p_value"] is not None
    p_values = [
        components(runs, by_sample(runs, rng)).set_index("source").loc["seed", "p_value"]
        for runs in (crossed(rng, sd=PLANTED | {"seed": 0.0}) for _ in range(80))
    ]
    assert 0 < np.mean(np.array(p_values) < 0.05) < 0.13


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs[runs["seed"] == 1],
        lambda runs: runs[runs["data_seed"] == 0],
        lambda runs: runs.iloc[1:],
        lambda runs: pd.concat([runs, runs.iloc[:1]]),
    ],
)
def test_seeds_and_windows_that_are_not_crossed_are_refused(change):
    runs = crossed(np.random.default_rng(2))
    with pytest.raises(ValueError, match="not crossed"):
        components(change(runs), by_sample(runs, np.random.default_rng(2)))


def test_sampling_error_is_the_spread_over_drawn_samples():
    rng = np.random.default_rng(3)
    tokens, base = rng.integers(100, 2000, 4000), rng.normal(6, 0.3, 4000)
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 4000, 50)
        means.append(np.average(base[drawn], weights=tokens[drawn]))
    few = rng.integers(0, 4000, 50)
    errors = [
        sampling_error(pd.DataFrame({"loss_sum": (base * tokens)[few], "tokens": tokens[few]}))
        for few in (rng.integers(0, 4000, 50) for _ in range(200))
    ]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1) and len(few) == 50
    assert math.isnan(sampling_error(pd.DataFrame({"loss_sum": [3.0], "tokens": [2]})))


def test_resolution_is_half_the_interval_of_so_many_samples():
    rng = np.random.default_rng(4)
    tokens = rng.integers(300, 1500, 50)
    hard, gap = rng.normal(6, 0.4, 50), 0.05 * rng.standard_normal(50)
    a, b = (
        pd.DataFrame({"sample": range(50), "loss_sum": loss * tokens, "tokens": tokens}) for loss in (hard + gap, hard)
    )
    low, high = paired_difference(a, b).interval
    assert resolution(a, b, samples=50) == pytest.approx((high - low) / 2, rel=0.1)
    assert resolution(a, b, samples=200) == pytest.approx(resolution(a, b, samples=50) / 2, rel=0.03)
