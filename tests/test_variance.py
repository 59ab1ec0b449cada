"""Shares of chance against planted ones, and errors over validation samples against simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis.scaling import effective, paired_difference
from ctxlm.analysis.variance import components, ratio_interval, resolution, sampling_error


def nested(rng, seed=0.04, window=0.02, sizes=(10_000, 20_000, 30_000), windows=5, per_window=2):
    """Runs of A and B in windows with seeds of their own; a seed shifts a configuration at all sizes, a window both."""
    rows, numbers = [], itertools.count(42)
    for w in range(windows):
        text = window * rng.standard_normal()
        for s in [next(numbers) for _ in range(per_window)]:
            for label in "AB":
                shift = seed * rng.standard_normal()
                for size in sizes:
                    loss = 6 - 0.3 * math.log(size / 10_000) + 0.06 * (label == "B") + text + shift
                    rows.append((f"{label}{size}-{s}-{w}", label, size, s, w, loss))
    return pd.DataFrame(rows, columns=["run", "experiment", "train_tokens", "seed", "data_seed", "val_loss"])


def by_sample(runs, rng, spread=0.3, samples=20):
    tokens = rng.integers(300, 1500, samples)
    hard = spread * rng.standard_normal(samples)
    parts = [
        pd.DataFrame({"run": run, "sample": range(samples), "loss_sum": (loss + hard) * tokens, "tokens": tokens})
        for run, loss in zip(runs["run"], runs["val_loss"], strict=True)
    ]
    return pd.concat(parts)


def test_planted_components_are_recovered_and_covered():
    rng, found, covered = np.random.default_rng(0), [], []
    truth = pd.Series({"seed": 0.04, "data_seed": 0.02, "run": math.hypot(0.04, 0.02)})
    for _ in range(150):
        runs = nested(rng)
        rows = components(runs, by_sample(runs, rng)).set_index("source")
        found.append((rows["sd"] ** 2)[["seed", "data_seed", "run"]])
        covered.append((rows["low"][truth.index] <= truth) & (truth <= rows["high"][truth.index]))
    seed, window, both = pd.DataFrame(found).mean()
    assert math.sqrt(seed) == pytest.approx(0.04, rel=0.05)
    assert math.sqrt(window) == pytest.approx(0.02, rel=0.35)  # negative estimates are cut at 0
    assert math.sqrt(both) == pytest.approx(math.hypot(0.04, 0.02), rel=0.1)
    shares = pd.DataFrame(covered).mean()
    assert shares[["seed", "run"]].between(0.90, 0.99).all()
    assert shares["data_seed"] > 0.90  # wider than it need be where the windows hardly differ
    assert rows.loc[["seed", "data_seed"], "dof"].tolist() == [10, 4]
    tokens = by_sample(runs, rng).groupby("sample")["tokens"].first()
    assert 10 < rows.loc["validation", "dof"] < 19 and len(tokens) == 20
    assert rows.loc["validation", "low"] < rows.loc["validation", "sd"] < rows.loc["validation", "high"]
    assert 4 < rows.loc["run", "dof"] < 14


def test_the_ratio_of_both_sources_is_covered():
    rng = np.random.default_rng(7)
    drawn = [nested(rng, seed=0.03, window=0.06) for _ in range(200)]
    assert 0.90 < np.mean([low < 4 < high for low, high in map(ratio_interval, drawn)]) < 0.99
    rows = [components(runs, by_sample(runs, rng)).set_index("source").loc["data_seed"] for runs in drawn]
    assert 0.90 < np.mean([row["low"] < 0.06 < row["high"] for row in rows]) < 0.99


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs[runs["seed"] % 2 == 0],  # a single seed a window
        lambda runs: runs[runs["data_seed"] == 0],
        lambda runs: runs.iloc[1:],
        lambda runs: pd.concat([runs, runs.iloc[:1]]),
        lambda runs: runs.assign(seed=runs["seed"] % 2),  # the same seeds in every window
        lambda runs: runs.iloc[:0],
    ],
)
def test_what_is_not_nested_is_refused(change):
    runs = nested(np.random.default_rng(2))
    with pytest.raises(ValueError, match="it takes two training windows or more"):
        components(change(runs), by_sample(runs, np.random.default_rng(2)))


def test_sampling_error_is_the_spread_over_drawn_samples():
    rng = np.random.default_rng(3)
    tokens, base = rng.integers(100, 2000, 4000), rng.normal(6, 0.3, 4000)
    draws = [rng.integers(0, 4000, 50) for _ in range(2000)]
    means = [np.average(base[few], weights=tokens[few]) for few in draws]
    errors = [
        sampling_error(pd.DataFrame({"loss_sum": (base * tokens)[few], "tokens": tokens[few]})) for few in draws[:200]
    ]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert math.isnan(sampling_error(pd.DataFrame({"loss_sum": [3.0], "tokens": [2]})))


def test_resolution_is_half_the_interval_of_so_many_samples():
    rng = np.random.default_rng(4)
    tokens = rng.integers(300, 1500, 50)
    hard, gap = rng.normal(6, 0.4, 50), 0.05 * rng.standard_normal(50)
    a, b = (
        pd.DataFrame({"sample": range(50), "loss_sum": loss * tokens, "tokens": tokens, "replicate": 0})
        for loss in (hard + gap, hard)
    )
    low, high = paired_difference(a, b).interval
    assert resolution(a, b, samples=50) == pytest.approx((high - low) / 2, rel=0.1)
    assert resolution(a, b, samples=200) == pytest.approx(resolution(a, b, samples=50) / 2, rel=0.03)


def test_samples_of_unequal_length_weigh_as_fewer():
    assert effective([100] * 4) == pytest.approx(4)
    assert effective([1000, 1, 1, 1]) == pytest.approx(1, rel=0.01)
