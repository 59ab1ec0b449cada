"""Verdicts on the study's proposals: planted the other way round, they say the other thing."""

import math
import re

import pandas as pd
import pytest

from ctxlm.analysis import crossing, proposals, tables
from ctxlm.analysis.scaling import read_grid
from tests.planted import noise, plant, planted

REPLICATES = [(42, 0), (44, 1), (46, 2)]


def said(answer, runs, val, column="Verdict"):
    """What a column says of each row, in their order."""
    return [row.get(column) for row in answer(runs, val)]


@pytest.mark.parametrize(
    ("best", "last", "verdict"),
    [
        (0.05, -0.1, "predicts worse; over-fits less"),
        (-0.05, 0.1, "predicts better; over-fits more"),
        (0.0, 0.0, "no effect on PPL can be told; no effect on over-fitting can be told"),
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
    runs, _, val = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    rows = list(proposals.learning_rate(runs, val))
    assert [(row["Of"], row["Verdict"]) for row in rows] == [("A", verdict), ("B", verdict)]
    assert {row["From"] for row in rows} == {"12 pairs in 3 replicates, 20 validation samples"}
    assert said(proposals.learning_rate, *parts[0][::2]) == ["not to be told: no runs differ in it"]
    cut = runs.assign(epochs_run=runs["best_epoch"].where(runs["train_tokens"] == 20_000, 5))
    fewer = "12 pairs in 3 replicates, 20 validation samples; 9 pairs to the early stop"
    assert set(said(proposals.learning_rate, cut, val, "From")) == {fewer}
    early = runs.assign(epochs_run=runs["best_epoch"].where(runs["phase2_learning_rate"] < 0.002, 5))
    assert said(proposals.learning_rate, early, val) == [verdict.partition(";")[0]] * 2
    assert said(proposals.learning_rate, early, val, "Last PPL / best PPL") == ["", ""]
    third = runs.assign(run=runs["run"] + "-third", phase2_learning_rate=runs["phase2_learning_rate"] / 4)
    third["val_loss"] -= 1  # not what was proposed, however well it does
    more = pd.concat([runs, third], ignore_index=True), pd.concat([val, val.assign(run=val["run"] + "-third")])
    assert list(proposals.learning_rate(*more)) == rows


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
    runs, _, val = whole
    table = proposals.rates_table(runs, val)
    assert list(table["Learning rate"]) == ["0.0005", "0.001", "0.002"] * 2 and list(table["Against 0.002"])[2] == ""
    assert table["Best PPL"][2] == f"{runs.loc[runs['phase2_learning_rate'] == 0.002, 'val_ppl'].iloc[0]:.1f}"
    assert table["Against 0.002"][1].startswith("−4." if gain < 0 else "+5.")
    rows = list(proposals.learning_rate(runs, val))
    assert [row["Of"] for row in rows] == ["A at 86,925 tokens", "B at 86,925 tokens"]
    assert {row["Verdict"] for row in rows} == {f"{verdict}, in single runs"}
    assert all(row["PPL"].startswith("−4.9 % (−" if gain < 0 else "+5.1 % (+") for row in rows)
    assert all(row["Last PPL / best PPL"].endswith(" % (no interval)") for row in rows)
    assert {row["From"] for row in rows} == {"1 pair, 20 validation samples"}
    elsewhere = val.assign(tokens=val["tokens"] + val["run"].str.endswith("-0.001"))
    assert all(
        text.startswith("not to be told: the runs wer") for text in said(proposals.learning_rate, runs, elsewhere)
    )
    going = runs.assign(epochs_run=runs["best_epoch"])
    assert said(proposals.learning_rate, going, val, "Last PPL / best PPL") == ["", ""]
    apart = runs[(runs["phase2_learning_rate"] == 0.001) == (runs["configuration"] == "A")]
    assert said(proposals.learning_rate, apart, val, "PPL") == [None, None]  # no pair
    assert proposals.rates_table(runs.iloc[:0], val).empty


def bent(label, size, *_):
    """B's law bends down beyond the study's sizes, A's up."""
    return (0.1 if label == "A" else -0.1) * math.log(max(size, 183_620) / 183_620)


def test_forecasts_of_larger_sizes(outputs):
    sizes = (45_000, 86_925, 183_620, 367_240)
    laws = {"A": (-0.3, 800), "B": (-0.35, 900), "C": (-0.3, 850)}
    runs, _, val = planted(outputs, laws, sizes=sizes, chance=lambda *run: bent(*run) * (run[0] != "C"))
    rows = {row["Of"][:1]: row for row in proposals.more_sizes(runs, val)}
    a, b = (100 * math.expm1(sign * 0.1 * math.log(2)) for sign in (-1, 1))
    assert rows["A"]["PPL"].startswith(f"−{-a:.1f} % (−") and rows["A"]["Verdict"] == "too low, in single runs"
    assert rows["B"]["PPL"].startswith(f"+{b:.1f} % (+") and rows["B"]["Verdict"] == "too high, in single runs"
    assert rows["C"]["PPL"].startswith("0.0 % (") and rows["C"]["Verdict"] == "no error can be told"
    assert rows["A"]["Of"] == "A at 367,240 tokens (a single run's scatter counts 2.4 times)"
    assert rows["A"]["From"] == "1 law, 20 validation samples"
    slopes = tables.slopes_table({"sizes": crossing.errors(runs, val)["pooled"]})
    assert [*slopes["Slopes α"]] == ["of B minus A", "of C minus A", "of C minus B"] and {*slopes["Grid"]} == {"sizes"}
    straight, _, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 900)}, sizes=sizes, seeds=(1, 2))
    [a, _] = proposals.more_sizes(straight, val)
    assert a["PPL"].startswith("0.0 % (") and a["From"].startswith("2 laws in 2 replicates, ")
    crossed = straight.assign(replicate=0)  # seeds crossed with texts are one replicate, however many runs they are
    assert said(proposals.more_sizes, crossed, val, "From") == ["2 laws, 20 validation samples"] * 2
    changed = val.assign(tokens=val["tokens"] + (val["train_tokens"] > 200_000))
    assert said(proposals.more_sizes, straight, changed)[0].startswith("not to be told: the runs were judged on diff")
    two = straight[straight["train_tokens"] < 200_000]
    assert said(proposals.more_sizes, two, val) == ["not to be told: no size above the study's two has been run"]


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


@pytest.mark.parametrize(("ppl", "verdict"), [(700, "better"), (900, "worse")])
def test_falling_widths_are_judged_in_pairs(outputs, ppl, verdict):
    shapes = {"A": (6, 128), "A-arithmetic": (6, 256), "B": (3, 256), "B-arithmetic-small": (3, 200)}
    laws = {"A": (-0.3, 800), "A-arithmetic": (-0.3, ppl), "B": (-0.3, 800), "B-arithmetic-small": (-0.3, 801)}
    options = {"shapes": shapes, "pairs": REPLICATES, "chance": noise(0.01), "spread": 0.05}
    runs, _, val = planted(outputs, laws, **options)
    rows = list(proposals.falling_widths(runs, val))
    shapes = [f"context {width}, {7000 * width:,} parameters" for width in (256, 128)]
    assert rows[0]["Of"] == f"A-arithmetic ({shapes[0]}) against A ({shapes[1]})"
    assert [row["Verdict"] for row in rows] == [verdict, "which is better cannot be told"]
    assert rows[0]["From"] == "12 pairs in 3 replicates, 20 validation samples"
    turned = runs.assign(test_loss=runs["test_loss"] - 0.3 * (runs["experiment"] == "B-arithmetic-small"))
    text = "which is better cannot be told; on the test text better"
    assert said(proposals.falling_widths, turned, val) == [verdict, text]
    assert said(proposals.falling_widths, turned, val, "Test PPL")[1].startswith("−2")
    elsewhere = runs.assign(test_tokens=runs["test_tokens"] + (runs["experiment"] == "B-arithmetic-small"))
    assert said(proposals.falling_widths, elsewhere, val, "Test PPL")[1] == ""  # judged on another test text
    names = [effect.name for effect in proposals.falling_effects(runs, val)]  # a figure has no room for the shapes
    assert names == ["A-arithmetic against A", "B-arithmetic-small against B"]
    one = list(proposals.falling_widths(runs[runs["seed"] == 42], val))  # each size by itself
    assert len(one) == 8 and one[0]["Of"].endswith(f" against A ({shapes[1]}) at 20,000 tokens")
    assert re.fullmatch(r"[−+]\d+\.\d %", one[0]["Test PPL"])  # of a single run there is no interval
    assert one[0]["Verdict"] == f"{verdict}, in single runs" and one[0]["From"].startswith("1 pair, ")
    none = ["not to be told: no finished pair of runs"]
    assert said(proposals.falling_widths, runs[~runs["experiment"].isin(["A", "B"])], val) == none
    apart = runs[runs["experiment"].isin(["A", "B"]) == (runs["seed"] == 42)]
    assert said(proposals.falling_widths, apart, val) == none
    other_text = val.assign(tokens=val["tokens"] + val["experiment"].str.contains("-"))
    assert said(proposals.falling_widths, runs, other_text) == none


def test_a_table_of_verdicts(outputs):
    runs, history, val = planted(outputs, {"A": (-0.3, 800)}, sizes=(86_925, 183_620, 367_240))
    grid, none = (runs, history, val), (runs.iloc[:0], history, val)
    table = proposals.verdicts({"quick": none, "full": grid}, {"full": grid}, {"quick": none})
    assert [text[:1] for text in table["Proposal"]] == ["1", "", "2", "3"]  # named once
    assert [*table["Scale"]] == ["quick", "full", "full", "quick"]
    assert [*table["Verdict"]][:2] == ["no finished run", "not to be told: no runs differ in it"]
    assert table["PPL"][2] and not table["PPL"][3] and table["Verdict"][3] == "no finished run"
