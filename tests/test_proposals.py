"""Verdicts on the study's proposals: planted the other way round, they say the other thing."""

import math

import pandas as pd
import pytest

from ctxlm.analysis import crossing, proposals, tables
from ctxlm.analysis.scaling import read_grid
from tests.planted import noise, plant, planted

REPLICATES = [(42, 0), (44, 1), (46, 2)]


@pytest.mark.parametrize(
    ("best", "last", "verdict"),
    [
        (0.05, -0.1, ("over-fits less", "predicts worse")),
        (-0.05, 0.1, ("over-fits more", "predicts better")),
        (
            0.0,
            0.0,
            [f"has no effect on {what} that can be told" for what in ("over-fitting", "the best PPL")],
        ),
    ],
)
def test_half_the_learning_rate(outputs, best, last, verdict):
    parts = []
    for rate in (0.002, 0.001):
        laws = {label: (-0.3, 800 * math.exp(best * (rate < 0.002))) for label in "AB"}
        options = {"pairs": REPLICATES, "chance": noise(0.005, int(1e4 * rate)), "phase2_learning_rate": rate}
        runs, history, val = planted(outputs, laws, **options)
        runs["overfit_rate"] = runs["overfit_rate"] * math.exp(3 * last * (rate < 0.002))
        rough = noise(0.01, int(1e5 * rate))
        runs["overfit_rate"] = [x * math.exp(rough()) for x in runs["overfit_rate"]]
        names = runs["run"] + f"-{rate}"
        parts.append((runs.assign(run=names), history, val.assign(run=val["run"] + f"-{rate}")))
    quick = tuple(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    none = tuple(table.iloc[:0] for table in quick)
    text = proposals.learning_rate([("at the quick scale", quick), ("at full size", none), ("here", parts[0])])
    for label in "AB":
        assert f" it {verdict[0]} for {label} and {verdict[1]}: last PPL / best PPL " in text
    assert "(last PPL / best PPL: n = 48 runs, Student's over 3 replicates, 2 d.o.f.; best PPL: n = 48 runs" in text
    assert ", crossed with 20 validation samples drawn again, " in text
    assert text.endswith("; at full size no finished run; here not to be told, for no runs differ in it.")
    cut = quick[0].assign(epochs_run=quick[0]["best_epoch"].where(quick[0]["train_tokens"] == 20_000, 5))
    text = proposals.learning_rate([("here", (cut, *quick[1:]))])
    assert "; 6 at a rate of 0.002 that had not stopped are left out; 6 at a rate of 0.001 that had" in text
    assert "n = 36 runs, Student's" in text and "n = 48 runs, crossed" in text
    early = quick[0].assign(epochs_run=quick[0]["best_epoch"].where(quick[0]["phase2_learning_rate"] < 0.002, 5))
    text = proposals.learning_rate([("here", (early, *quick[1:]))])
    assert text.endswith(": here not to be told (at one of the two rates no run has come to its early stop).")
    third = [table.assign(run=table["run"] + "-third") for table in quick]
    third[0]["phase2_learning_rate"] /= 4  # not what was proposed, however well it does
    third[0]["val_loss"] -= 1
    more = tuple(pd.concat(tables, ignore_index=True) for tables in zip(quick, third, strict=True))
    assert proposals.learning_rate([("here", more)]) == proposals.learning_rate([("here", quick)])


@pytest.mark.parametrize(("gain", "verdict"), [(-0.05, "predicts better"), (0.05, "predicts worse")])
def test_lower_rates_in_pairs_of_single_runs(outputs, gain, verdict):
    """At full size: the study's runs stand in for its own rate, which the grid lacks at one of two sizes."""
    sizes = {"A": (86_925,), "B": (86_925,)}
    grid, study = [], []
    for rate, grids in ((0.002, [study]), (0.001, [grid]), (0.0005, [grid])):
        change = gain * (rate == 0.001)
        laws = {label: (-0.3, ppl * math.exp(change)) for label, ppl in (("A", 800), ("B", 900))}
        runs, history, val = planted(outputs, laws, sizes=sizes, phase2_learning_rate=rate)
        runs["overfit_rate"] *= math.sqrt(rate / 0.002)
        names = runs["run"] + f"-{rate}"
        grids[0].append((runs.assign(run=names), history, val.assign(run=val["run"] + f"-{rate}")))
    lr = tuple(pd.concat(tables, ignore_index=True) for tables in zip(*grid, strict=True))
    lr[0]["experiment"] += ", phase2_learning_rate " + lr[0]["phase2_learning_rate"].astype(str)
    whole = proposals.with_study(lr, study[0])
    assert len(whole[0]) == 6
    text = proposals.learning_rate([("at full size", whole)])
    change = "−4.9" if gain < 0 else "+5.1"
    assert "at full size, in pairs of single runs of one configuration and size (their intervals are below), at" in text
    assert f"at a rate of 0.001 it {verdict} in 2 of 2 pairs (best PPL {change} %)" in text
    assert (
        "at a rate of 0.0005 it has no effect on the best PPL that can be told in 2 of 2 pairs (best PPL 0.0 %" in text
    )
    assert text.count("), last PPL / best PPL −") == 2  # once a rate
    runs, _, val = whole
    table = proposals.rates_table(runs, val)
    assert list(table["Learning rate"]) == ["0.0005", "0.001", "0.002"] * 2 and list(table["Against 0.002"])[2] == ""
    assert table["Best PPL"][2] == f"{runs.loc[runs['phase2_learning_rate'] == 0.002, 'val_ppl'].iloc[0]:.1f}"
    assert table["Against 0.002"][1].startswith("−4." if gain < 0 else "+5.")
    elsewhere = val.assign(tokens=val["tokens"] + val["run"].str.endswith("-0.001"))
    assert "at a rate of 0.001 A at 86,925 tokens is not to be told (" in proposals.learning_rate(
        [("here", (runs, None, elsewhere))]
    )
    going = runs.assign(epochs_run=runs["best_epoch"])
    assert "last PPL" not in proposals.learning_rate([("here", (going, None, val))])
    alone = runs[runs["phase2_learning_rate"] < 0.002]
    assert "not to be told (" in proposals.learning_rate([("here", (alone, None, val))])
    assert proposals.rates_table(runs.iloc[:0], val).empty


def bent(label, size, *_):
    """B's law bends down beyond the study's sizes, A's up."""
    return (0.1 if label == "A" else -0.1) * math.log(max(size, 183_620) / 183_620)


def test_forecasts_of_larger_sizes(outputs):
    sizes = (45_000, 86_925, 183_620, 367_240)
    laws = {"A": (-0.3, 800), "B": (-0.35, 900), "C": (-0.3, 850)}
    runs, _, val = planted(outputs, laws, sizes=sizes, chance=lambda *run: bent(*run) * (run[0] != "C"))
    text = proposals.more_sizes(runs, val)
    a, b = (100 * math.expm1(sign * 0.1 * math.log(2)) for sign in (-1, 1))
    assert (
        f"A −{-a:.1f} % (" in text
        and f"B +{b:.1f} % (" in text
        and "at 367,240 tokens, too low, in single runs (a single run" in text
    )
    assert (
        ", too high, in single runs (a single run's scatter counts 2.4 times); C 0.0 % (" in text
        and "tokens, no error can be told" in text
    )
    assert "(single runs, seeds not covered, 20 validation samples drawn again)" in text
    slopes = tables.slopes_table({"sizes": crossing.errors(runs, val)["pooled"]})
    assert [*slopes["Slope α"]] == ["of B minus A", "of C minus A", "of C minus B"] and {*slopes["Grid"]} == {"sizes"}
    straight, _, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 900)}, sizes=sizes, seeds=(1, 2))
    text = proposals.more_sizes(straight, val)
    assert "A 0.0 % (" in text and "not covered" not in text
    crossed = straight.assign(replicate=0)  # seeds crossed with texts are one replicate, however many runs they are
    assert "(single runs, seeds not covered" in proposals.more_sizes(crossed, val)
    changed = val.assign(tokens=val["tokens"] + (val["train_tokens"] > 200_000))
    assert "A at 367,240 tokens not to be told (the runs were judged on diff" in proposals.more_sizes(straight, changed)
    two = proposals.more_sizes(straight[straight["train_tokens"] < 200_000], val)
    assert two == "**2. More sizes**: no size above the study's two has been run."
    assert proposals.more_sizes(straight.iloc[:0], val) == "**2. More sizes**: no finished run."


def test_the_studys_runs_stand_in_where_sizes_lacks_them(outputs):
    plant(outputs, {"A": (-0.3, 800)}, (45_000, 86_925), "sizes")
    plant(outputs, {"A": (-0.3, 700), "B": (-0.3, 750)}, (86_925, 183_620), "study", seeds=(42, 43))
    sizes, study = read_grid("sizes"), read_grid("study")
    runs, history, val = proposals.with_study(sizes, study)
    kept = runs.set_index(["experiment", "train_tokens", "seed"])["val_ppl"]
    assert len(kept) == 2 + 7 and kept["A", 86_925, 42] > kept["A", 86_925, 43]  # its own, not the study's
    assert set(val["run"]) == set(history["run"]) == set(runs["run"]) and runs["replicate"].nunique() == 2
    assert proposals.with_study((pd.DataFrame(),) * 3, study)[0].empty
    assert proposals.stood_in({"lr": study}, {"lr": study}) == ""
    assert "taken from grid study" in proposals.stood_in({"lr": (study[0].iloc[:1], *study[1:])}, {"lr": study})


def falling(runs, val):
    text = proposals.falling_widths([("at the quick scale", (runs, None, val)), ("here", (runs.iloc[:0], None, val))])
    assert text.endswith("; here no finished pair of runs.")
    return text.removesuffix("; here no finished pair of runs.")


@pytest.mark.parametrize(("ppl", "verdict"), [(700, "better"), (900, "worse")])
def test_falling_widths_are_judged_in_pairs(outputs, ppl, verdict):
    shapes = {"A": (6, 128), "A-arithmetic": (6, 256), "B": (3, 256), "B-arithmetic-small": (3, 200)}
    laws = {"A": (-0.3, 800), "A-arithmetic": (-0.3, ppl), "B": (-0.3, 800), "B-arithmetic-small": (-0.3, 801)}
    options = {"shapes": shapes, "pairs": REPLICATES, "chance": noise(0.01), "spread": 0.05}
    runs, _, val = planted(outputs, laws, **options)
    text = falling(runs, val)
    shapes = [f"context {width}, {7000 * width:,} parameters" for width in (256, 128)]
    assert f"A-arithmetic ({shapes[0]}) against A ({shapes[1]}): PPL " in text
    assert "(n = 12 pairs in 3 replicates, crossed with 20 validation samples drawn again, " in text
    assert f"d.o.f. by Satterthwaite): {verdict}; B-arithmetic-small (context 200" in text
    assert text.endswith("which is better cannot be told")
    names = [effect.name for effect in proposals.falling_effects(runs, val)]  # a figure has no room for the shapes
    assert names == ["A-arithmetic against A", "B-arithmetic-small against B"]
    one = runs[runs["seed"] == 42]
    assert f" d.o.f., seeds not covered): {verdict}, in single runs; " in falling(one, val)
    alone = runs[~runs["experiment"].isin(["A", "B"])]
    assert falling(alone, val).endswith("no finished pair of runs")
    apart = runs[runs["experiment"].isin(["A", "B"]) == (runs["seed"] == 42)]
    assert falling(apart, val).endswith("no finished pair of runs")
    other_text = val.assign(tokens=val["tokens"] + val["experiment"].str.contains("-"))
    assert falling(runs, other_text).endswith("no finished pair of runs")
