"""Effects against planted ones, and curves against tables made by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ctxlm.analysis import scaling
from ctxlm.analysis.explain import (
    between_epochs,
    factorial_effects,
    generalisation,
    overfitting_effects,
    paired_effect,
    recency,
)
from ctxlm.analysis.tables import recency_table


def grid(loss, labels=("A", "B"), sizes=(10_000, 20_000, 40_000), seeds=(1, 2, 3), rates=(0.002,)) -> pd.DataFrame:
    """Runs whose `val_loss` is `loss(label, size, seed, rate)`."""
    rows = [
        {"run": f"{label}-{size}-{seed}-{rate}", "experiment": f"{label}, rate {rate}", "configuration": label}
        | {"train_tokens": size, "seed": seed}
        | {
            "data_seed": 0,
            "replicate": seeds.index(seed),
            "phase2_learning_rate": rate,
            "val_loss": loss(label, size, seed, rate),
        }
        | {"best_epoch": 3, "epochs_run": 5, "phase2_patience": 2, "token_block_params_trained": 200_000}
        for label, size, seed, rate in itertools.product(labels, sizes, seeds, rates)
    ]
    return pd.DataFrame(rows)


def test_paired_effect_is_students_over_replicates():
    rng = np.random.default_rng(0)
    lasting = dict(zip((1, 2, 3), 0.03 * rng.standard_normal(3), strict=True))  # a seed's effect on B, at all sizes
    runs = grid(lambda label, size, seed, _: math.log(size) + (0.05 + lasting[seed]) * (label == "B"))
    runs["experiment"] = runs["configuration"]
    found = paired_effect(runs, "B", "A")
    own = np.array([0.05 + effect for effect in lasting.values()])
    expected = stats.ttest_1samp(own, 0).confidence_interval()
    assert (found.n, found.replicates, found.dof) == (9, 3, 2) and found.estimate == pytest.approx(own.mean())
    assert found.interval == pytest.approx((expected.low, expected.high))
    few = runs[(runs["train_tokens"] == 10_000) & ((runs["seed"] == 1) | (runs["experiment"] == "A"))]
    assert (paired_effect(few, "B", "A").n, paired_effect(few, "B", "A").interval) == (1, None)
    with pytest.raises(ValueError, match="C and A have no runs of equal size"):
        paired_effect(runs, "C", "A")


def by_sample(runs, taste, tokens):
    """Losses by sample; `taste` [runs, samples] is what samples add to a run's own loss, 0 over all of their kind."""
    parts = [
        pd.DataFrame({"run": run, "sample": range(len(tokens)), "loss_sum": (loss + own) * tokens, "tokens": tokens})
        for run, loss, own in zip(runs["run"], runs["val_loss"], taste, strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def judged(runs, val_by_sample):
    """The runs with the losses that these samples give them."""
    sums = val_by_sample.groupby("run")[["loss_sum", "tokens"]].sum()
    return runs.assign(val_loss=runs["run"].map(sums["loss_sum"] / sums["tokens"]))


def test_paired_effects_cover_samples_and_replicates(monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 999)
    rng, covered, tokens = np.random.default_rng(4), [], np.tile([200, 400, 900], 10)
    for _ in range(150):
        lasting = 0.03 * rng.standard_normal(5)
        runs = grid(lambda label, size, seed, _: 6 + (0.05 + lasting[seed]) * (label == "B"), seeds=range(5))  # noqa: B023
        runs["experiment"] = runs["configuration"]
        taste = 0.1 * rng.standard_normal(len(tokens))  # a sample likes B less, or more, at all sizes and seeds
        losses = by_sample(runs, np.outer(runs["experiment"] == "B", taste), tokens)
        runs = judged(runs, losses)
        found = paired_effect(runs, "B", "A", val_by_sample=losses)
        covered.append(found.interval[0] < 0.05 < found.interval[1])
    assert 0.90 < np.mean(covered) < 0.99
    plain = paired_effect(runs, "B", "A")
    assert found.estimate == pytest.approx(plain.estimate) and (found.samples, plain.samples) == (30, 0)
    assert (found.n, found.replicates) == (plain.n, plain.replicates) == (15, 5) and plain.dof == 4 < found.dof
    one = runs[runs["seed"] == 0]
    assert paired_effect(one, "B", "A").interval is None
    alone = paired_effect(one, "B", "A", val_by_sample=losses)  # over the samples alone
    assert alone.replicates == 1 and alone.interval[0] < alone.estimate < alone.interval[1]
    losses.loc[losses["run"] == runs["run"].iloc[0], "tokens"] += 1
    with pytest.raises(ValueError, match="different validation tokens"):
        paired_effect(runs, "B", "A", val_by_sample=losses)


def test_planted_overfitting_is_taken_apart():
    rng = np.random.default_rng(1)
    runs = grid(lambda *_: 6.0, rates=(0.002, 0.001, 0.0005))
    rise = 0.6 - 0.1 * np.log2(runs["train_tokens"] / 10_000) + 0.2 * (runs["configuration"] == "B")
    rise += (0.15 - 0.1 * (runs["configuration"] == "B")) * np.log2(runs["phase2_learning_rate"] / 0.001)
    runs["overfit_rate"] = np.expm1(rise + 0.01 * rng.standard_normal(len(runs)))
    found = {effect.name: effect for effect in overfitting_effects(runs)}
    planted = {"a doubling of the training tokens": -0.1, "B against A": 0.2}
    planted |= {"a halved learning rate for A": -0.15, "a halved learning rate for B": -0.05}
    assert found.keys() == planted.keys()
    for name, value in planted.items():
        assert found[name].interval[0] < value < found[name].interval[1]
        assert found[name].estimate == pytest.approx(value, abs=0.01)
        assert (found[name].n, found[name].replicates, found[name].dof) == (54, 3, 2)
    # runs that did not come to their early stop say nothing about it
    cut = runs.assign(epochs_run=runs["best_epoch"].where(runs["seed"] == 1, runs["epochs_run"]))
    assert overfitting_effects(cut)[0].n == 36
    one = runs[runs["phase2_learning_rate"] == 0.002]
    assert [effect.name for effect in overfitting_effects(one)] == list(planted)[:2]
    alone = overfitting_effects(one[one["seed"] == 1])
    assert (alone[0].replicates, alone[0].dof) == (1, 3) and alone[0].interval is not None
    for few in (runs[runs["train_tokens"] == 10_000], runs.iloc[:0]):
        with pytest.raises(ValueError, match="cannot tell"):
            overfitting_effects(few)


def factorial(loss, sizes=(10_000, 20_000, 40_000)):
    rows = [
        {"num_layers": depth, "context_dim": width, "train_tokens": size, "replicate": replicate}
        | {"val_loss": loss(depth, width, size), "run": f"{depth}-{width}-{size}-{replicate}"}
        for depth, width, size, replicate in itertools.product((3, 6), (128, 256), sizes, range(5))
    ]
    return pd.DataFrame(rows)


def test_planted_depth_width_and_interaction_are_recovered():
    rng = np.random.default_rng(2)

    def loss(depth, width, size):
        deep, wide, doublings = (depth == 6) - 0.5, (width == 256) - 0.5, math.log2(size / 20_000)
        effects = -0.08 * deep + 0.05 * wide + 0.03 * deep * wide + 0.02 * deep * doublings - 0.01 * wide * doublings
        return 6 - 0.2 * doublings + effects + 0.004 * rng.standard_normal()

    found = factorial_effects(factorial(loss))
    names = ["6 layers against 3", "context 256 against 128", "interaction"]
    names += [
        "6 layers against 3: change with twice the tokens",
        "context 256 against 128: change with twice the tokens",
    ]
    assert [effect.name for effect in found] == names
    for effect, value in zip(found, (-0.08, 0.05, 0.03, 0.02, -0.01), strict=True):
        assert effect.estimate == pytest.approx(value, abs=0.006)
        assert (effect.n, effect.replicates, effect.dof) == (60, 5, 4)
    covered = [e.interval[0] < v < e.interval[1] for e, v in zip(found, (-0.08, 0.05, 0.03, 0.02, -0.01), strict=True)]
    assert sum(covered) >= 4
    single = factorial_effects(factorial(loss, sizes=(20_000,)))
    assert [effect.name for effect in single] == names[:3]


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs[runs["num_layers"] == 3],
        lambda runs: runs[(runs["num_layers"] == 3) | (runs["context_dim"] == 128)],
        lambda runs: pd.concat([runs, runs.assign(num_layers=4)]),
    ],
)
def test_depth_and_width_that_are_not_crossed_are_refused(change):
    with pytest.raises(ValueError, match="not crossed"):
        factorial_effects(change(factorial(lambda *_: 6.0)))


def test_effects_of_depth_cover_seeds_that_last_across_sizes():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(150):
        seeds = {
            (depth, width, r): 0.05 * rng.standard_normal()
            for depth in (3, 6)
            for width in (128, 256)
            for r in range(5)
        }
        runs = factorial(lambda *_: 6.0)
        runs["val_loss"] = [
            6 - 0.08 * (row.num_layers == 6) + seeds[row.num_layers, row.context_dim, row.replicate]
            for row in runs.itertuples()
        ]
        low, high = factorial_effects(runs)[0].interval
        covered += low < -0.08 < high
    assert 0.90 < covered / 150 < 0.99


def test_effects_of_width_cover_samples_too(monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 999)
    rng, covered, tokens = np.random.default_rng(6), [], np.full(25, 300)
    for _ in range(150):
        runs = factorial(lambda depth, width, size: 6 + 0.05 * (width == 256) + 0.01 * rng.standard_normal())
        taste = 0.1 * rng.standard_normal(len(tokens))
        losses = by_sample(runs, np.outer(runs["context_dim"] == 256, taste), tokens)
        runs = judged(runs, losses)
        found = factorial_effects(runs, val_by_sample=losses)
        covered.append(found[1].interval[0] < 0.05 < found[1].interval[1])
    assert 0.90 < np.mean(covered) < 0.99
    plain = factorial_effects(runs)
    assert [effect.estimate for effect in found] == pytest.approx([effect.estimate for effect in plain])
    assert {effect.samples for effect in found} == {25} and {effect.samples for effect in plain} == {0}
    assert np.ptp(found[1].interval) > 1.5 * np.ptp(plain[1].interval)  # which holds the text fixed


def rows(run, phase, values):
    return [
        {
            "run": run,
            "experiment": run[0],
            "replicate": int(run[1]) if run[1].isdigit() else 0,
            "phase": phase,
            "step": step,
            "metric": metric,
            "value": value,
        }
        for (step, metric), value in values.items()
    ]


def test_generalisation_gap_is_that_of_the_same_epoch():
    runs = grid(lambda *_: 6.0, labels=("A",), sizes=(10_000,), seeds=(1, 2))
    with_gap, without = runs["run"]
    val = {(epoch, "val_loss"): 6 + 0.1 * abs(epoch - 3) for epoch in range(1, 6)}
    after = {(epoch, "train_loss_after"): 6 - 0.3 * epoch for epoch in range(1, 6)}
    history = pd.DataFrame(rows(with_gap, "phase2", val | after) + rows(without, "phase2", val))
    (found,) = generalisation(history, runs).to_dict("records")
    assert (found["run"], found["params_per_token"]) == (with_gap, 20)
    assert found["best_gap"] == pytest.approx(0.9) and found["last_gap"] == pytest.approx(6.2 - 4.5)
    assert generalisation(pd.DataFrame(rows(without, "phase2", val)), runs).empty


def test_recency_is_the_mean_extra_loss_with_its_interval():
    table = {"A1": (0.5, 0.1), "A2": (0.7, 0.12), "B1": (0.9, 0.3)}
    history = []
    for run, (one, two) in table.items():
        losses = {(0, "val_loss"): 6.0, (1, "val_loss"): 6 + one, (2, "val_loss"): 6 + two}
        history += rows(run, "recent_tokens", losses)
    found = recency(pd.DataFrame(history)).set_index(["experiment", "k"])
    assert found.loc[("A", 1), "extra_loss"] == pytest.approx(0.6) and found.loc[("A", 1), "n"] == 2
    expected = stats.ttest_1samp([0.5, 0.7], 0).confidence_interval()
    assert found.loc[("A", 1), ["low", "high"]].tolist() == pytest.approx([expected.low, expected.high])
    assert found.loc[("B", 2), "extra_loss"] == pytest.approx(0.3) and math.isnan(found.loc[("B", 2), "low"])
    assert recency(pd.DataFrame(rows("A1", "phase2", {(1, "val_loss"): 6.0}))).empty
    sizes = pd.DataFrame(history).assign(train_tokens=lambda h: h["run"].map({"A1": 1000, "A2": 2000, "B1": 2000}))
    by_size = recency(sizes, ["experiment", "train_tokens"])
    assert by_size.set_index(["experiment", "train_tokens", "k"])["extra_loss"]["A", 2000, 1] == pytest.approx(0.7)
    shown = recency_table(by_size)
    first, *others = shown
    assert first == "Last k tokens, PPL above the whole's" and shown[first].tolist() == [1, 2]
    assert others == ["A, 1,000 tokens", "A, 2,000 tokens", "B, 2,000 tokens"]
    assert shown[others[1]].tolist() == [f"+{100 * math.expm1(x):.1f} % (no interval)" for x in (0.7, 0.12)]
    assert recency_table(found.reset_index().iloc[:0]).empty
    of_two = recency_table(found.loc[["A"]].reset_index().assign(train_tokens=1000))
    low, high = (f"{100 * math.expm1(x):+.1f}".replace("-", "−") for x in (expected.low, expected.high))
    assert of_two["A, 1,000 tokens"][0] == f"+{100 * math.expm1(0.6):.1f} % ({low} to {high} %)"


def test_the_best_point_between_epochs():
    runs = grid(lambda *_: 6.0, labels=("A",), sizes=(10_000,), seeds=(1, 2, 3))
    first, second, third = runs["run"]
    ends = {(1, "val_loss"): 6.5, (2, "val_loss"): 6.2, (1, "updates"): 20, (2, "updates"): 40}
    between = {(10, "val_loss"): 7.0, (20, "val_loss"): 6.5, (30, "val_loss"): 6.1}
    worse = {(10, "val_loss"): 7.0, (30, "val_loss"): 6.3}
    history = rows(first, "phase2", ends) + rows(first, "phase2_updates", between)
    history += rows(second, "phase2", ends) + rows(second, "phase2_updates", worse) + rows(third, "phase2", ends)
    found = between_epochs(pd.DataFrame(history), runs).set_index("run")
    assert list(found.index) == [first, second] and set(found["configuration"]) == {"A"}
    assert found.loc[first, "epochs"] == 1.5
    assert found.loc[first, "gain"] == pytest.approx(0.1)
    assert found.loc[second, ["epochs", "gain"]].tolist() == [2, 0]
