"""Tables and sentences on errors and reasons from planted grids: planted the other way round, they say the other."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis import explain, plots, reasons, tables, variance
from ctxlm.analysis.crossing import errors
from ctxlm.analysis.explain import Effect
from ctxlm.analysis.replicates import student
from ctxlm.analysis.scaling import effective
from tests.planted import NESTED, SIZES, effects_of, noise, planted

NUMBER = re.compile(r"[−+]?\d[\d,.]*\d|[−+]?\d")


def numbers(cell):
    """Those of a cell, in order."""
    return [float(number.replace("−", "-").replace(",", "")) for number in NUMBER.findall(cell)]


def pooled(outputs, laws, **options):
    runs, _, val_by_sample = planted(outputs, laws, **options)
    (found,) = errors(runs, val_by_sample)["pooled"]
    return found


def slopes(found):
    """The row of a pair of configurations; cells that no row fills are left out of the table."""
    (row,) = tables.slopes_table({"mine": [found]}).to_dict("records")
    return row


def pair(outputs, laws, **options):
    return slopes(pooled(outputs, laws, **options))


def rows_of(effects):
    """(group, effect) → the row of `effects_table`."""
    return tables.effects_table(effects).set_index(["Of", "Effect"]).to_dict("index")


def drawn(effect):
    """What an effect's interval was drawn over."""
    return effect.n, effect.replicates, effect.samples


STEEP, FLAT = (-0.40, 830), (-0.30, 800)


def many(sd=0.005, seed=0):
    """Five replicates of every size, with errors of runs."""
    return {"pairs": [(42 + k, k) for k in range(5)], "chance": noise(sd, seed)}


@pytest.mark.parametrize(("laws", "steeper"), [({"A": FLAT, "B": STEEP}, "B"), ({"A": STEEP, "B": FLAT}, "A")])
def test_the_steeper_law_gains_more(outputs, laws, steeper):
    row, sign = pair(outputs, laws, **many()), -1 if steeper == "B" else 1
    assert row["Verdict"] == f"{steeper} gains more from more text"
    assert (row["Grid"], row["Slopes α"]) == ("mine", "of B minus A")
    assert (row["Runs"], row["Replicates"], row["d.o.f."]) == ("40", "5", "4") and "HC3, 95 %" not in row
    assert row["Difference"].startswith("−0." if steeper == "B" else "+0.")
    assert numbers(row["Difference"]) == pytest.approx([sign * 0.1], abs=0.02) and row["p"] == "< 0.001"
    for name in ("t test, 95 %", "Bootstrap, 95 %"):
        low, high = numbers(row[name])
        assert low < numbers(row["Difference"])[0] < high and sign * low > 0 < sign * high
    meets = 20_000 * (830 / 800) ** 10
    assert numbers(row["Laws meet at, tokens"]) == pytest.approx([meets], rel=0.1)
    for name in ("Fieller, tokens", "Delta method, tokens", "Bootstrap, tokens"):
        low, high = numbers(row[name])
        assert low < numbers(row["Laws meet at, tokens"])[0] < high and "anywhere" not in row[name]
    assert row["Draws that never meet, %"] == "0.0"


def test_a_slope_that_hangs_on_the_validation_text_is_no_finding(outputs):
    runs, _, val_by_sample = planted(outputs, {"A": FLAT, "B": STEEP}, **many())
    tilted = val_by_sample["experiment"].eq("B") & val_by_sample["sample"].eq(val_by_sample["sample"].max())
    sums = val_by_sample.groupby("run")["tokens"].transform("sum")
    x = np.log(val_by_sample["train_tokens"] / 30_000)  # all of B's gain lies in a single sample
    val_by_sample["loss_sum"] += 0.1 * x * val_by_sample["experiment"].eq("B") * val_by_sample["tokens"]
    val_by_sample.loc[tilted, "loss_sum"] -= 0.1 * (x * sums)[tilted]
    (found,) = errors(runs, val_by_sample)["pooled"]
    row = slopes(found)
    assert row["Verdict"] == "B gains more on this validation text, but on another it may not"
    low, high = numbers(row["Bootstrap, 95 %"])
    assert low < 0 < high and max(numbers(row["t test, 95 %"])) < 0


def test_equal_slopes_cannot_be_told_apart(outputs):
    row = pair(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, **many(0.03, seed=3))
    low, high = numbers(row["t test, 95 %"])
    assert row["Verdict"] == "the slopes of A and B cannot be told apart" and low < 0 < high
    assert row["Fieller, tokens"].startswith("anywhere")  # nothing bounds the crossover
    assert not {"Delta method, tokens", "Bootstrap, tokens"} & set(row)


def test_without_degrees_of_freedom_nothing_is_tested(outputs):
    row = pair(outputs, {"A": FLAT, "B": STEEP}, sizes=SIZES[:2])
    meets = numbers(row.pop("Laws meet at, tokens"))
    assert meets == pytest.approx([20_000 * (830 / 800) ** 10], rel=0.01)
    said = {"Grid": "mine", "Slopes α": "of B minus A", "Difference": "−0.100", "Runs": "4", "Pairs": "2"}
    assert row == said | {"Replicates": "1", "d.o.f.": "0", "Verdict": "no error can be estimated"}
    row = pair(outputs, {"A": FLAT, "B": STEEP}, sizes=SIZES[:1])
    assert set(row) == {"Grid", "Slopes α", "Verdict"} and row["Verdict"].startswith(
        "not compared: A has runs of 1 size"
    )


def test_single_runs_are_said_to_be_single(outputs):
    found = pooled(outputs, {"A": FLAT, "B": STEEP}, chance=noise(0.005))
    row = slopes(found)
    assert (row["Runs"], row["Replicates"], row["d.o.f."]) == ("8", "1", "2") and row["Pairs"] == "4"
    assert len(numbers(row["HC3, 95 %"])) == 2 and row["HC3, 95 %"] != row["t test, 95 %"]


def test_where_a_crossover_may_be_follows_fieller(outputs):
    found = pooled(outputs, {"A": FLAT, "B": STEEP}, **many())
    outside = slopes(found | {"fieller": "outside", "fieller_interval": (1e3, 2e5), "delta_interval": None})
    assert outside["Fieller, tokens"] == "anywhere but 1,000 to 200,000"
    for kind, ends, said in (
        ("outside", (None, 2e5), "above 200,000"),
        ("outside", (1e3, None), "below 1,000"),
        ("bounded", (None, 2e5), "below 200,000"),
        ("bounded", (1e3, None), "above 1,000"),
        ("unbounded", None, "anywhere"),
        ("nowhere", None, "nowhere from 1 to 10^15"),
    ):
        assert slopes(found | {"fieller": kind, "fieller_interval": ends})["Fieller, tokens"] == said
    assert not {"Delta method, tokens", "Bootstrap, tokens"} & set(outside)  # draws left out would bound it
    unbounded = slopes(found | {"fieller": "unbounded", "fieller_interval": None, "delta_interval": None})
    assert unbounded["Fieller, tokens"] == "anywhere" and "Bootstrap, tokens" not in unbounded
    assert slopes(found | {"bootstrap_without": 0.1234})["Draws that never meet, %"] == "12.3"
    nowhere = slopes(found | {"crossover_tokens": None, "reason": "the laws are parallel"})
    assert nowhere["Laws meet at, tokens"] == "the laws are parallel"


def bent(label, size, *_):
    """What makes a law of exponent −0.3 level off."""
    return 0.3 * math.log(size / 20_000) + 40 * (size**-0.4 - 20_000**-0.4)


@pytest.mark.parametrize("bends", [False, True])
def test_the_form_that_was_planted_is_preferred(outputs, bends):
    sizes = (10_000, 20_000, 40_000, 80_000, 160_000, 320_000)
    rough = noise(0.002)
    chance = (lambda *run: bent(*run) + rough()) if bends else rough
    runs, _, val_by_sample = planted(outputs, {"A": (-0.3, 800)}, sizes=sizes, seeds=(1, 2), chance=chance)
    text = reasons.forms(errors(runs, val_by_sample)["forms"])
    assert f"A: AICc prefers {'the saturating form' if bends else 'the power law'} by" in text
    assert re.search(r"power law [−+][\d.]+ % at 160,000; power law [−+][\d.]+ % at 320,000", text)
    assert "n = 12, 9 d.o.f." in text
    few, _, val_by_sample = planted(outputs, {"A": (-0.3, 800)}, sizes=sizes[:3], grid="planted")
    few = few[few["train_tokens"] <= 40_000]
    assert "only the power law (a law that saturates needs" in reasons.forms(errors(few, val_by_sample)["forms"])


@pytest.mark.parametrize(
    ("seed", "window", "larger"), [(0.05, 0.0, "initialisation"), (0.01, 0.08, "training text"), (0.03, 0.03, None)]
)
def test_the_larger_source_of_chance_shows_where_it_can_be_told(outputs, seed, window, larger):
    chance = effects_of(np.random.default_rng(5), seed, window)
    pairs = [(42 + k, k // 2) for k in range(40 if not window else 10)]  # few windows cannot tell
    runs, _, val_by_sample = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, chance=chance, pairs=pairs)
    table = tables.chance_table(runs, val_by_sample)
    *parts, ratio = table[table["Training tokens"] == "all"].to_dict("records")
    low, high = numbers(ratio["95 % interval"])
    assert ratio["Source"].startswith("variance of training text over that of initialisation (F")
    assert [low, high] == pytest.approx(variance.ratio_interval(runs), abs=0.06)
    assert larger == ("training text" if low > 1 else "initialisation" if high < 1 else None)
    known = variance.components(runs, val_by_sample).set_index("source")
    assert [row["Source"] for row in parts] == [variance.SOURCES[source] for source in known.index]
    for row, source in zip(parts, known.itertuples(), strict=True):
        expected = 100 * np.expm1([source.sd, source.low, source.high])
        assert numbers(row["Standard deviation"] + row["95 % interval"]) == pytest.approx(expected, abs=0.06)
        assert float(row["d.o.f."]) == pytest.approx(source.dof, rel=0.01)
    by_size = table[table["Training tokens"] != "all"].to_dict("records")
    assert [row["Training tokens"] for row in by_size] == [f"{size:,}" for size in SIZES]
    for row, (size, own) in zip(by_size, runs.groupby("train_tokens"), strict=True):
        of_size = val_by_sample[val_by_sample["train_tokens"] == size]
        run = variance.components(own, of_size).set_index("source").loc["run"]
        assert row["Source"] == variance.SOURCES["run"] == "both together: a single run"
        expected = 100 * np.expm1(run[["sd", "low", "high"]].to_numpy(float))
        assert numbers(row["Standard deviation"] + row["95 % interval"]) == pytest.approx(expected, abs=0.06)
    assert plots.plot_components(runs, val_by_sample).axes[0].get_xlabel()
    one = runs[runs["seed"] % 2 == 0]
    assert tables.chance_table(one, val_by_sample).empty and tables.chance_table(runs.iloc[:0], val_by_sample).empty
    assert "cannot be taken apart" in plots.plot_components(one, val_by_sample).axes[0].texts[0].get_text()


def test_chance_of_a_grid_that_lacks_a_run_is_that_of_the_other_sizes(outputs):
    chance = effects_of(np.random.default_rng(5), 0.03, 0.03)
    runs, _, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, chance=chance, pairs=NESTED)
    cut = runs.drop(runs[runs["train_tokens"] == SIZES[-1]].index[-1])
    whole, left = (tables.chance_table(some, val).set_index("Training tokens") for some in (runs, cut))
    sizes = [f"{size:,}" for size in SIZES[:-1]]
    assert [*left.index] == sizes and left.equals(whole.loc[sizes, left.columns])


def test_published_gaps_are_held_against_what_samples_resolve(outputs):
    laws = {"A": (-0.3, 800), "B": (-0.3, 800)}
    published = tables.published_runs()
    _, _, fine = planted(outputs, laws, samples=50, spread=0.005)
    text = reasons.resolved(fine, published)
    weigh = 50 * effective(fine.groupby("sample")["tokens"].first()) / 50
    assert f"as {weigh:.0f} equal ones, which leaves {weigh - 1:.0f} d.o.f." in text
    assert text.endswith("Of its gaps, −5.4 % at 86,925 tokens exceeds that and +1.7 % at 183,620 tokens exceeds that.")
    theirs = (published["train_tokens"] / published["train_samples"]).mean()
    assert f"The study's samples have some {theirs:,.0f} tokens" in text
    _, _, coarse = planted(outputs, laws, samples=50, spread=0.1)
    text = reasons.resolved(coarse, published)
    assert text.endswith("is below that and +1.7 % at 183,620 tokens is below that.")
    _, _, between = planted(outputs, laws, samples=50, spread=0.025)
    assert reasons.resolved(between, published).endswith(
        "−5.4 % at 86,925 tokens exceeds that and +1.7 % at 183,620 tokens is below that."
    )
    assert reasons.resolved(coarse.iloc[:0], published) == ""
    assert reasons.resolved(fine[fine["experiment"] == "A"], published) == ""


LAST, BEST, DOUBLING = "last PPL / best PPL", "best PPL", "a doubling of the training tokens"


def test_overfitting_is_put_down_to_what_was_planted(outputs):
    runs, _, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    found = reasons.overfitting(runs, val)
    assert [*found] == [LAST, BEST]
    doubling, label = found[BEST]
    assert [doubling.estimate, label.estimate] == pytest.approx([-0.3 * math.log(2), math.log(850 / 800)])
    assert drawn(doubling) == (16, 2, 20)
    doubling, label = found[LAST]
    assert (doubling.name, label.name) == (DOUBLING, "B against A") and doubling.estimate < 0 < label.estimate
    assert drawn(doubling) == drawn(label) == (16, 2, 0) and doubling.dof == 1
    rows = rows_of(found)
    assert rows[BEST, DOUBLING]["Change"].startswith("−18.8 % (−18.") and rows[BEST, DOUBLING]["Verdict"] == "lower"
    assert (rows[LAST, DOUBLING]["Verdict"], rows[LAST, "B against A"]["Verdict"]) == ("lower", "higher")
    assert rows[LAST, DOUBLING]["Validation samples"] == "–" and rows[LAST, DOUBLING]["d.o.f."] == "1"
    reversed_rates = runs.assign(overfit_rate=0.5 - runs["overfit_rate"])
    rows = rows_of(reasons.overfitting(reversed_rates, val))
    assert (rows[LAST, DOUBLING]["Verdict"], rows[LAST, "B against A"]["Verdict"]) == ("higher", "lower")
    assert rows[LAST, DOUBLING]["Change"][0] == "+" and rows[LAST, "B against A"]["Change"][0] == "−"
    alone = reasons.overfitting(runs[runs["train_tokens"] == SIZES[0]], val)
    assert alone == {LAST: [], BEST: []} and tables.effects_table(alone).empty
    assert [axes.get_yticks().size for axes in plots.plot_effects(found, "change").axes] == [2, 2]


def test_the_gap_is_correlated_with_parameters_a_token(outputs):
    runs, history, _ = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    gaps = explain.generalisation(history, runs)
    at = {(row.experiment, row.train_tokens): row for row in gaps.itertuples()}
    assert len(gaps) == 16 and at["B", SIZES[0]].params_per_token == pytest.approx(3000 * 256 / SIZES[0])
    rate = runs.set_index(["experiment", "train_tokens"])["overfit_rate"].groupby(level=[0, 1]).first()
    for key, row in at.items():  # as planted, of the fifth epoch: what validation rose by, and training fell
        assert row.last_gap == pytest.approx(math.log1p(rate[key]) + 2 * rate[key] + 0.4 - 1.2 + 0.75 * 5)
    r = np.corrcoef(np.log(gaps["params_per_token"]), gaps["last_gap"])[0, 1]
    assert r > 0.9 and f" at r = +{r:.2f} (16 runs; a description, no test)." in reasons.gap(gaps)
    assert f" at r = −{r:.2f} (16 runs; " in reasons.gap(gaps.assign(last_gap=-gaps["last_gap"]))
    assert reasons.gap(gaps.iloc[:2]) == reasons.gap(pd.DataFrame()) == ""
    assert plots.plot_generalisation(gaps).axes[0].lines


def test_runs_that_did_not_stop_are_left_out_and_not_counted(outputs):
    runs, _, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    runs.loc[runs["train_tokens"] == SIZES[1], "best_epoch"] = 5
    rows = rows_of(reasons.overfitting(runs, val))
    assert {key: row["Runs"] for key, row in rows.items()} == {
        (LAST, DOUBLING): 12,
        (LAST, "B against A"): 12,
        (BEST, DOUBLING): 16,
        (BEST, "B against A"): 16,
    }
    going = reasons.overfitting(runs.assign(best_epoch=5), val)
    assert going[LAST] == [] and [effect.n for effect in going[BEST]] == [16, 16]
    assert reasons.told(explain.overfitting_effects, runs.assign(best_epoch=5)) == []
    with pytest.raises(ValueError, match="0 runs cannot tell"):
        explain.overfitting_effects(runs.assign(best_epoch=5))


def test_between_epochs_the_gain_is_said_to_be_partly_luck(outputs):
    runs, history, _ = planted(outputs, {"A": (-0.3, 800)}, sizes=SIZES[:1])
    row = history[history["metric"] == "val_loss"].iloc[0].to_dict()
    updates = [{**row, "phase": "phase2_updates", "step": step, "value": 5.0} for step in (10, 20)]
    ends = [
        {**row, "phase": "phase2", "metric": "updates", "step": epoch, "value": 40 * epoch} for epoch in range(1, 6)
    ]
    found = explain.between_epochs(pd.concat([history, pd.DataFrame(updates + ends)]), runs)
    (cells,) = tables.between_table(found).to_dict("records")
    gain = f"{100 * math.expm1(math.log(800) - 5):.1f} %"
    assert [*cells.values()] == ["A", "0.002", "1", "0.2", gain]  # 10 of 40 updates
    assert [*cells][-1] == "Better than the best epoch's end by (partly luck)"
    more = pd.DataFrame({"configuration": ["B", "A", "B"], "phase2_learning_rate": [0.001, 0.002, 0.001]})
    more = more.assign(epochs=[1.0, 4.0, 2.0], gain=[0.01, 0.0, 0.03])
    assert tables.between_table(more).to_numpy().tolist() == [
        ["A", "0.002", "1", "4.0", "0.0 %"],
        ["B", "0.001", "2", "1.5", "2.0 %"],
    ]
    assert tables.between_table(explain.between_epochs(history, runs)).empty


def reach(runs):
    return tables.horizons_table(runs).set_index("Configuration").to_dict("index")


def test_who_remembers_longest_is_read_off_the_runs(outputs):
    runs, history, _ = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    known = {"Runs": 8, "Replicates": 2}
    assert reach(runs) == {
        "A": {"Before training, tokens": "8.0", "After it, tokens": "7.0", "95 % interval": "7.0 to 7.0"} | known,
        "B": {"Before training, tokens": "14.0", "After it, tokens": "12.0", "95 % interval": "12.0 to 12.0"} | known,
    }
    swapped = reach(runs.assign(horizon=40 - runs["horizon"]))
    assert (swapped["A"]["After it, tokens"], swapped["B"]["After it, tokens"]) == ("33.0", "28.0")
    assert (swapped["A"]["95 % interval"], swapped["B"]["95 % interval"]) == ("33.0 to 33.0", "28.0 to 28.0")
    unknown = reach(runs.assign(horizon=runs["horizon"].where((runs["experiment"] == "A") | (runs["seed"] == 1))))
    assert unknown["A"] == reach(runs)["A"] and unknown["B"]["After it, tokens"] == "nan"  # in 4 of its 8 runs
    assert not NUMBER.search(unknown["B"]["95 % interval"]) and unknown["B"]["Before training, tokens"] == "14.0"
    once = runs["horizon"].where(runs.index != runs.index[runs["experiment"] == "B"][0])
    assert reach(runs.assign(horizon=once))["B"]["After it, tokens"] == "nan"  # in a single one
    unknown = reach(runs.assign(horizon_init=runs["horizon_init"].where(runs["experiment"] == "A")))
    assert unknown["A"] == reach(runs)["A"] and unknown["B"]["Before training, tokens"] == "nan"
    single = reach(runs[runs["seed"] == 1])["B"]
    assert single == reach(runs)["B"] | {"95 % interval": "none", "Runs": 4, "Replicates": 1}  # nothing to judge it by
    equal = reach(runs.assign(horizon=5 + runs["seed"] * (runs["experiment"] == "A")))
    assert numbers(equal["A"]["95 % interval"]) == pytest.approx(student([6.0, 7.0]), abs=0.06)
    assert equal["A"]["After it, tokens"] == "6.5" and equal["B"]["95 % interval"] == "5.0 to 5.0"
    assert tables.horizons_table(runs.drop(columns="horizon")).empty
    assert len(plots.plot_reach(history, explain.recency(history)).axes) == 2


def test_what_the_last_tokens_are_worth_is_read_off_the_runs(outputs):
    _, history, _ = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    found = explain.recency(history).set_index(["experiment", "k"])
    assert found.loc[("A", 1), "extra_loss"] == pytest.approx(math.exp(-1)) and (found["n"] == 2).all()
    assert found.loc[("A", 8), "high"] < reasons.WORTH < found.loc[("B", 8), "low"]  # to 1 %, 8 tokens are enough for A
    assert (found.loc[[("A", k) for k in (1, 2, 4)], "low"] > reasons.WORTH).all()
    table = tables.recency_table(explain.recency(history, ["experiment", "train_tokens"]))
    cells = table.set_index("Last k tokens, PPL above the whole's")
    cost = f"+{100 * math.expm1(math.exp(-1)):.1f}"
    assert cells.loc[1, "A, 20,000 tokens"] == f"{cost} % ({cost} to {cost} %)"
    assert cells.loc[8, "A, 20,000 tokens"] == "0.0 % (0.0 to 0.0 %)" and cells.loc[8, "B, 67,500 tokens"][:4] == "+1.8"
    assert cells.shape == (4, 8)


def verdicts(effects):
    """What was done → what follows."""
    meaning = {what: words for what, *words in reasons.ABLATIONS.values()}
    return {effect.name: reasons.effect_verdict(effect, *meaning[effect.name]) for effect in effects}


def test_an_ablation_that_hurts_shows_that_the_part_helps(outputs):
    shapes = dict.fromkeys(("A", "A-without-phase1", "A-zero"), (6, 128))
    laws = {"A": (-0.3, 800), "A-without-phase1": (-0.3, 800), "A-zero": (-0.3, 1000)}
    options = {"shapes": shapes, "seeds": (1, 2, 3), "chance": noise(0.01)}
    runs, _, val = planted(outputs, laws, **options)
    found = reasons.ablations(runs, val)
    assert [*found] == ["A"] and [effect.name for effect in found["A"]] == ["Phase 1 left out", "contexts of zeros"]
    said = verdicts(found["A"])
    assert said["Phase 1 left out"] in ("no effect can be told", "the same to 1 %")
    assert said["contexts of zeros"] == "contexts lower PPL"
    phase1, zero = found["A"]
    assert zero.estimate == pytest.approx(math.log(1000 / 800), abs=0.02)
    assert drawn(phase1) == drawn(zero) == (12, 3, 20)
    row = rows_of(found)["A", "contexts of zeros"]
    assert row["Verdict"] == "higher" and (row["Runs"], row["Replicates"], row["Validation samples"]) == (12, 3, 20)
    assert float(row["d.o.f."]) == pytest.approx(zero.dof, rel=0.01)
    runs, _, val = planted(outputs, laws | {"A-without-phase1": (-0.3, 700)}, **options)
    found = reasons.ablations(runs, val)
    assert verdicts(found["A"])["Phase 1 left out"] == "Phase 1 raises PPL"
    assert rows_of(found)["A", "Phase 1 left out"]["Verdict"] == "lower"
    one = reasons.ablations(runs[runs["seed"] == 1], val)
    assert verdicts(one["A"])["Phase 1 left out"] == "Phase 1 raises PPL, in single runs"
    assert drawn(one["A"][0]) == (4, 1, 20) and rows_of(one)["A", "Phase 1 left out"]["Verdict"].endswith("single runs")
    rates = reasons.ablations(runs[runs["seed"] == 1], overfitting=True)["A"]
    assert [(effect.interval, *drawn(effect)) for effect in rates] == [(None, 4, 1, 0)] * 2
    assert {row["Verdict"] for row in rows_of({"A": rates}).values()} == {"no interval, no verdict"}
    (axes,) = plots.plot_effects(found, "change").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Phase 1 left out", "contexts of zeros"]
    assert axes.get_title(loc="left").startswith("A: ")
    rates = {"A": 0.5, "A-without-phase1": 0.5, "A-zero": 0.2}
    kept = runs.assign(overfit_rate=runs["experiment"].map(rates))
    found = reasons.ablations(kept, overfitting=True)
    assert [effect.estimate for effect in found["A"]] == pytest.approx([0, math.log(1.2 / 1.5)])
    changes = {key: (row["Change"], row["Verdict"]) for key, row in rows_of(found).items()}
    assert changes["A", "Phase 1 left out"] == ("0.0 % (0.0 to 0.0 %)", "the same to 1 %")
    assert changes["A", "contexts of zeros"] == ("−20.0 % (−20.0 to −20.0 %)", "lower")
    assert {drawn(effect) for effect in found["A"]} == {(12, 3, 0)}
    going = kept.assign(best_epoch=kept["best_epoch"].mask(kept["experiment"] == "A-zero", 5))
    assert [effect.name for effect in reasons.ablations(going, overfitting=True)["A"]] == ["Phase 1 left out"]
    assert len(reasons.ablations(going, val)["A"]) == 2
    apart = runs[(runs["experiment"] == "A") == (runs["seed"] == 1)]  # of each, but no two that belong together
    assert reasons.ablations(apart, val) == reasons.ablations(apart) == {}
    assert reasons.ablations(apart, overfitting=True) == reasons.ablations(apart.iloc[:0], overfitting=True) == {}
    assert reasons.ablations(runs, val.assign(tokens=val["tokens"] + (val["experiment"] == "A"))) == {}


def test_contexts_that_tell_something_may_still_cost_more(outputs):
    shapes = dict.fromkeys(("A", "A-zero", "A-random"), (6, 128))
    laws = {"A": (-0.3, 800), "A-zero": (-0.3, 700), "A-random": (-0.3, 1000)}
    options = {"shapes": shapes, "seeds": (1, 2, 3), "chance": noise(0.01)}
    found = reasons.ablations(*planted(outputs, laws, **options)[::2])
    shuffled = {"contexts of shuffled tokens": "a text's own contexts are better"}
    assert verdicts(found["A"]) == {"contexts of zeros": "contexts raise PPL"} | shuffled
    assert [row["Verdict"] for row in rows_of(found).values()] == ["lower", "higher"]
    found = reasons.ablations(*planted(outputs, laws | {"A-zero": (-0.3, 900)}, **options)[::2])
    assert verdicts(found["A"]) == {"contexts of zeros": "contexts lower PPL"} | shuffled


@pytest.mark.parametrize("sign", [-1, 1])
def test_depth_and_width_are_told_apart(outputs, sign):
    shapes = {f"L{depth}-C{width}": (depth, width) for depth, width in itertools.product((3, 6), (128, 256))}
    laws = {
        label: (-0.3, 800 * math.exp(sign * (0.1 * (depth == 6) - 0.05 * (width == 256))))
        for label, (depth, width) in shapes.items()
    }
    runs, _, val = planted(outputs, laws, shapes=shapes, seeds=(1, 2, 3), chance=noise(0.005))
    found = reasons.depth_and_width(runs, val)
    assert [*found] == ["PPL", LAST, "memory horizon"]
    deep, wide = "6 layers against 3", "context 256 against 128"
    assert [effect.name for effect in found["PPL"]][:3] == [deep, wide, "interaction"]
    depth, width, *_ = found["PPL"]
    assert [depth.estimate, width.estimate] == pytest.approx([sign * 0.1, -sign * 0.05], abs=0.01)
    rows, up_and_down = rows_of(found), [("+", "higher"), ("−", "lower")][::sign]
    assert [(rows["PPL", name]["Change"][0], rows["PPL", name]["Verdict"]) for name in (deep, wide)] == up_and_down
    assert drawn(depth) == drawn(width) == (48, 3, 20)
    assert {(*drawn(effect), effect.dof) for effect in found[LAST]} == {(48, 3, 0, 2)}
    assert found["memory horizon"][0].name == deep and rows["memory horizon", deep]["Verdict"] == "lower"
    apart = reasons.depth_and_width(runs[runs["num_layers"] == 3], val)
    assert apart == {"PPL": [], LAST: [], "memory horizon": []} and tables.effects_table(apart).empty
    assert [*reasons.depth_and_width(runs.drop(columns="horizon"), val)] == ["PPL", LAST]


@pytest.mark.parametrize(("first", "second"), [("A", "B"), ("B", "A")])
def test_drawn_signs_are_set_beside_the_conventions_in_pairs(outputs, first, second):
    fixed = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, pairs=NESTED, chance=noise(0.001))
    laws = {first: (-0.3, 800), second: (-0.3, 1000)}
    drawn_signs = planted(outputs, laws, sizes=SIZES[:2], pairs=NESTED[:8:2], chance=noise(0.001, 1), embedding_seed=1)
    found = reasons.signs(drawn_signs, fixed)
    assert [*found] == ["A", "B", "signs drawn", "signs fixed"]
    rows = rows_of(found)
    changes = {first: r"[+−]?0\.\d %", second: r"\+2[45]\.\d %"}
    for label in "AB":
        (effect,) = found[label]
        assert effect.name == "signs drawn" and drawn(effect) == (8, 4, 20)
        assert re.match(rf"{changes[label]} \(", rows[label, "signs drawn"]["Change"])
    assert rows[first, "signs drawn"]["Verdict"] == "the same to 1 %"
    assert rows[second, "signs drawn"]["Verdict"] == "higher"
    gaps = [f"A against B at {size:,} tokens" for size in SIZES[:2]]  # not at 45,000
    assert [effect.name for effect in found["signs drawn"]] == [effect.name for effect in found["signs fixed"]] == gaps
    gap = math.log(800 / 1000) if first == "A" else math.log(1000 / 800)
    for effect in found["signs drawn"]:
        assert effect.estimate == pytest.approx(gap, abs=0.003) and drawn(effect) == (4, 4, 20)
        assert rows["signs drawn", effect.name]["Verdict"] == ("lower" if first == "A" else "higher")
    for effect in found["signs fixed"]:  # over all its runs
        assert effect.estimate == pytest.approx(0, abs=0.003) and drawn(effect) == (5, 5, 20)
        assert rows["signs fixed", effect.name]["Verdict"] == "the same to 1 %"
    nothing = tuple(pd.DataFrame() for _ in range(3))
    assert reasons.signs(nothing, fixed) == reasons.signs(drawn_signs, nothing) == {}
    assert reasons.scatter(nothing[0], fixed[0]) == reasons.scatter(drawn_signs[0], nothing[0]) == ""


@pytest.mark.parametrize(("spread", "sure"), [(0.2, True), (0.01, False)])
def test_what_drawn_signs_do_to_the_spread_is_tested(outputs, spread, sure):
    quiet = [0.01, -0.01, 0.005, -0.015]
    loud = [spread * x / 0.01 for x in quiet]
    laws, seeds = {"A": (-0.3, 800)}, [seed for seed, _ in NESTED[:8:2]]
    fixed, turned = (
        planted(
            outputs,
            laws,
            sizes=SIZES[:2],
            pairs=NESTED[:8:2],
            chance=lambda label, size, seed, window, errors=errors: errors[seeds.index(seed)],
            embedding_seed=draw,
        )
        for draw, errors in enumerate((quiet, loud))
    )
    found = re.fullmatch(
        r"With signs drawn, .* \(standard deviation\) by ([\d.]+) % instead of ([\d.]+) % for A "
        r"\(n = 4 pairs, Pitman-Morgan, p (.*?)\)\.",
        reasons.scatter(turned[0], fixed[0]),
    )
    assert float(found[2]) == pytest.approx(100 * math.expm1(np.std(quiet, ddof=1)), abs=0.05)
    assert float(found[1]) == pytest.approx(100 * math.expm1(np.std(loud, ddof=1)), abs=0.05)
    assert (found[3] == "< 0.001") == sure and (sure or found[3] == "= 1.000")
    two = turned[0][turned[0]["seed"].isin(seeds[:2])]
    assert reasons.scatter(two, fixed[0]) == ""  # of two nothing can be tested


def test_crossovers_are_set_side_by_side_with_what_is_known_of_them(outputs):
    several = pooled(outputs, {"A": FLAT, "B": STEEP}, **many())
    two = pooled(outputs, {"A": STEEP, "B": FLAT}, sizes=SIZES[:2])
    equal = pooled(outputs, {"A": FLAT, "B": FLAT})
    lone = pooled(outputs, {"A": FLAT, "B": STEEP}, sizes=SIZES[:1])
    table = tables.slopes_table({"mine": [several], "small": [two], "equal": [equal], "lone": [lone], "none": []})
    assert [*table["Grid"]] == ["mine", "small", "equal", "lone"]
    assert [*table] == [name for name in tables.SLOPES if name != "HC3, 95 %"]  # which no row has
    rows = table.set_index("Grid").to_dict("index")
    mine, small = rows["mine"], rows["small"]
    assert mine["Runs"] == "40" and mine["Verdict"] == "B gains more from more text"
    low, high = numbers(mine["Bootstrap, tokens"])
    assert low < numbers(mine["Laws meet at, tokens"])[0] < high
    assert small["Runs"] == "4" and small["Verdict"] == "no error can be estimated"
    assert numbers(small["Laws meet at, tokens"]) == pytest.approx([20_000 * (830 / 800) ** 10], rel=0.01)
    assert (small["Difference"], small["t test, 95 %"], small["Fieller, tokens"]) == ("+0.100", "", "")
    assert rows["equal"]["Laws meet at, tokens"] == "the laws are parallel"
    assert rows["equal"]["Verdict"] == "no error can be estimated"
    assert rows["lone"] == dict.fromkeys(mine, "") | {"Slopes α": "of B minus A", "Verdict": rows["lone"]["Verdict"]}
    assert tables.slopes_table({"mine": []}).empty and tables.slopes_table({}).empty


def test_an_effect_without_an_interval_has_no_verdict():
    sure = Effect("this", 0.1, (0.05, 0.15), 12, 3, 7.25, 20)
    table = tables.effects_table({"PPL": [sure, replace(sure, name="that", interval=None, samples=0)], "nothing": []})
    assert table.to_dict("records") == [
        {"Of": "PPL", "Effect": "this", "Change": "+10.5 % (+5.1 to +16.2 %)", "Verdict": "higher"}
        | {"Runs": 12, "Replicates": 3, "Validation samples": 20, "d.o.f.": "7.25"},
        {"Of": "PPL", "Effect": "that", "Change": "+10.5 % (no interval)", "Verdict": "no interval, no verdict"}
        | {"Runs": 12, "Replicates": 3, "Validation samples": "–", "d.o.f.": "7.25"},
    ]


def test_every_number_follows_the_data(outputs):
    def said(laws, **options):
        runs, history, val_by_sample = planted(outputs, laws, **options)
        slopes = tables.slopes_table({"mine": errors(runs, val_by_sample)["pooled"]})
        effects = tables.effects_table(reasons.overfitting(runs, val_by_sample))
        made = [slopes, tables.horizons_table(runs), effects]
        gap = reasons.gap(explain.generalisation(history, runs))
        return [(name, str(cell)) for table in made for name in table for cell in table[name]] + [("gap", gap)]

    first = said({"A": FLAT, "B": STEEP}, **many())
    second = said(
        {"A": (-0.21, 700), "B": (-0.35, 741)},
        sizes=(21_000, 29_000, 46_000),
        pairs=[(1, 0), (2, 1), (3, 2)],
        shapes={"A": (5, 104), "B": (2, 160)},
        samples=23,
        chance=noise(0.006, seed=1),
    )
    worded, fixed = {"Grid", "Slopes α", "Verdict", "Configuration", "Of", "Effect"}, r"to 1 %|–|^0\.0$|^< 0.001$"
    for (name, before), (same, after) in zip(first, second, strict=True):
        assert name == same and (name in worded or NUMBER.search(before) or before == after == "–")
        before, after = (NUMBER.findall(re.sub(fixed, "", text)) for text in (before, after))
        assert len(before) == len(after), name
        assert not [pair for pair in zip(before, after, strict=True) if pair[0] == pair[1]], name
