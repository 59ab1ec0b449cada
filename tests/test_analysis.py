"""The analysis of planted grids: its sentences, figures and tables, and the notebook that shows them."""

import json
import math
import re
import shutil
from itertools import pairwise

import nbformat
import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis import explain, plots, ranking, run_plots, tables
from ctxlm.analysis.crossing import errors
from ctxlm.analysis.explain import Effect
from ctxlm.analysis.findings import findings, gaps, nothing, origin, prose, unconverged
from ctxlm.analysis.phrases import signed
from ctxlm.analysis.scaling import read_grid, summarise
from ctxlm.config import ConfigError
from ctxlm.files import ROOT
from tests.planted import SHAPES, SIZES, noise, plant

STUDY = {"sizes": (86_925, 183_620), "shapes": {"A": (6, 768), "B": (3, 1536)}, "samples": 50, "embed_dim": 768}


def plan(folder, labels, sizes, seeds):
    """The grid file that asks for planted runs."""
    content = {
        "common": {"embed_dim": 128},
        "experiments": {k: {"num_layers": SHAPES[k][0], "context_dim": SHAPES[k][1]} for k in labels},
        "sweep": {"train_tokens": list(sizes), "seed": list(seeds)},
    }
    (folder / "planted.yaml").write_text(json.dumps(content))


def read(grid: str = "planted"):
    runs, history, val_by_sample = read_grid(grid)
    return runs, history, val_by_sample, summarise(grid, runs, val_by_sample)


def said(outputs, laws, *arguments, **options) -> list[str]:
    plant(outputs, laws, *arguments, **options)
    runs, _, val_by_sample, summary = read()
    paragraphs = (*findings(runs, summary, errors(runs, val_by_sample)["pooled"]), origin("planted", runs))
    return [text.replace("\u00a0", " ") for text in paragraphs]


# Sentences

A, B = "A (deep and narrow: 6 layers, context 128)", "B (shallow and wide: 3 layers, context 256)"


def test_the_better_configuration_is_named(outputs):
    sizes = "20,000, 30,000, 45,000 and 67,500 tokens"
    answer = said(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))[0]
    assert answer.startswith(f"**Deep and narrow, or shallow and wide?** {A} **is better than** {B} at {sizes}, every")
    assert f"(below 0, A is better): −{100 * (1 - 800 / 850):.1f} % (" in answer
    shutil.rmtree(outputs / "planted")
    answer = said(outputs, {"A": (-0.3, 860), "B": (-0.3, 800)})[0]
    better = "**did better, in single runs, than**"
    assert answer.startswith(f"**Deep and narrow, or shallow and wide?** {B} {better} {A} at {sizes}, every size that")
    assert f"+{100 * (860 / 800 - 1):.1f} % (" in answer


def test_a_crossing_is_told_by_size_and_as_crossover(outputs):
    texts = said(outputs, {"A": (-0.287, 800), "B": (-0.385, 850)})
    assert (
        f"depends on the amount of text**, in single runs: {A} is better at 20,000 and 30,000 tokens, {B} is better at"
        in texts[0]
    )
    tokens = float(f"{20_000 * (850 / 800) ** (1 / 0.098):.3g}")
    crossover = next(text for text in texts if text.startswith("**Crossover.**"))
    assert f"about {tokens:,.0f} tokens, inside the measured range (20,000 to 67,500)" in crossover
    assert "A is better below, B above" in crossover
    table = tables.laws_table(read()[-1]).set_index("Law")
    assert table.loc["α of A"].tolist() == ["−0.287", "−0.287 to −0.287", "−0.287 to −0.287", "4", "2"]
    assert table.loc["α of B", ["Estimate", "Runs", "d.o.f."]].tolist() == ["−0.385", "4", "2"]


def test_configurations_that_do_not_differ_cannot_be_told_apart(outputs):
    texts = said(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, spread=0.05)
    assert f"{A} and {B} **cannot be told apart** at 20,000, 30,000" in texts[0] and "is better than" not in texts[0]
    assert "None can be claimed between A and B" in texts[2]


def test_two_sizes_give_exponents_without_intervals_and_an_extrapolated_crossover(outputs):
    texts = said(outputs, {"A": (-0.3, 800), "B": (-0.5, 950)}, sizes=(20_000, 30_000))
    table = tables.laws_table(read()[-1])
    assert table[["Runs", "d.o.f.", "95 % interval"]].to_numpy().tolist() == [["2", "0", "none"]] * 2
    assert table["Estimate"].tolist() == ["−0.300", "−0.500"] and "Robust interval" not in table
    assert "extrapolated from 20,000 to 30,000" in texts[2] and "None can be claimed" in texts[2]
    assert "nothing says how surely: the laws have no degrees of freedom." in texts[2]


def test_a_crossover_with_errors_refers_to_them(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.35, 820)})
    runs, _, val_by_sample = read_grid("planted")
    runs["val_ppl"] *= [1.04, 0.97, 0.98, 1.03, 0.97, 1.03, 1.04, 0.98]
    summary = summarise("planted", runs, val_by_sample)
    runs["val_loss"] = np.log(runs["val_ppl"])
    pooled = errors(runs, val_by_sample)["pooled"]
    low, high = pooled[0]["slope_interval"]
    assert low <= 0 <= high and "None can be claimed: the fitted laws of A and B" in findings(runs, summary, pooled)[2]
    (told,) = pooled
    surely = {"slope_interval": (-0.1, -0.01), "bootstrap_slope": (-0.1, -0.01)}
    assert "How well it is known is said under" in findings(runs, summary, [told | surely])[2]
    elsewhere = told | surely | {"bootstrap_slope": (-0.1, 0.01)}
    assert (
        "but B gains more on this validation text, but on another it may not (p"
        in findings(runs, summary, [elsewhere])[2]
    )
    refused = {"a": "A", "b": "B", "refused": "the runs were judged on different validation tokens"}
    assert "but the runs were judged on different" in findings(runs, summary, [refused])[2]


def test_numbers_and_per_cent_signs_are_set_as_in_print():
    assert [signed(x, 1) for x in (-0.04, 0.04, -0.06, 1.0)] == ["0.0", "0.0", "−0.1", "+1.0"]
    assert prose(["at 5 % of", "A to B"]).data == "at 5\u00a0% of\n\nA to B"


def test_incomplete_grids_are_described(outputs):
    assert said(outputs, {}) == ["No finished run of grid planted: run `make report GRID=planted`."] * 2
    assert tables.laws_table(read()[-1]).empty and tables.laws_table(read()[-1], beside=True).empty
    texts = said(outputs, {"A": (-0.3, 800)}, sizes=(20_000,))
    assert "Only A (6 layers, context 128) has been run" in texts[0] and len(texts) == 2
    (law,) = tables.laws_table(read()[-1]).to_dict("records")
    assert law["Law"] == "α of A" and law["Estimate"].startswith("none: a law needs runs of at least two sizes")
    assert (law["95 % interval"], law["Runs"], law.get("d.o.f.", "")) == ("none", "1", "")
    texts = said(outputs, {"B": (-0.3, 800)}, sizes=(30_000,))
    assert "cannot be compared: no amount of training text was given to both" in texts[0]
    texts = said(outputs, {"C": (-0.3, 900)}, sizes=(20_000, 30_000), seeds=(1, 2))
    assert sum("**did better, in single runs, than**" in text for text in texts) == 2
    assert "1 to 2 for each" in " ".join(texts)


def test_where_only_a_rate_differs_the_question_is_not_one_of_depth(outputs):
    plant(outputs, {"A": (-0.3, 800)}, phase2_learning_rate=0.002)
    for folder in sorted((outputs / "planted").iterdir()):
        other = folder.with_name(f"{folder.name}_slow")
        shutil.copytree(folder, other)
        metrics = json.loads((other / "metrics.json").read_text()) | {"phase2_learning_rate": 0.001}
        (other / "metrics.json").write_text(json.dumps(metrics))
    runs, _, val_by_sample, summary = read()
    answer = findings(runs, summary, errors(runs, val_by_sample)["pooled"])[0]
    assert answer.startswith("**Which is better?** A, phase2_learning_rate 0.001 (6 layers, context 128)")


def test_a_size_that_cannot_be_compared_is_said_so(outputs):
    folder = plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)})
    path = folder / "B_train_tokens-30000_seed-42" / "val_by_sample.csv"
    table = pd.read_csv(path)
    table["sample"] += 1
    table.to_csv(path, index=False)
    runs, _, val_by_sample, summary = read()
    texts = findings(runs, summary, errors(runs, val_by_sample)["pooled"])
    assert "at 20,000, 45,000 and 67,500 tokens" in texts[0]
    assert texts[1].startswith("At 30,000 tokens A and B are not compared: ")


def test_slow_or_still_improving_runs_are_counted(outputs):
    options = {"phase1_converged_ratio": 0.9, "epochs_run": 3}
    text = said(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, **options)[-1]
    assert " Phase 1 of A and B ran out of iterations before it converged." in text
    assert text.endswith(" 8 of the runs had not come to their early stop.")
    table = tables.results_table(*read()[:3:2])
    assert set(table["Converged, %"]) == {"90.0"} and set(table["Best epoch"]) == set(table["Epochs"]) == {"3"}
    text = said(outputs, {"A": (-0.3, 800)}, sizes=SIZES[:3])[-1]  # all but one of A's are done
    assert " Phase 1 of A and B ran out" in text and text.endswith(" 5 of the runs had not come to their early stop.")
    others = read()[0].assign(model="lstm")  # which have no Phase 1
    assert "ran out" not in origin("planted", others) and "early stop" not in origin("planted", others)


def test_every_number_in_sentences_and_rows_comes_from_the_data(outputs):
    def everything(*arguments, **options):
        texts = said(outputs, *arguments, **options)
        runs, _, val_by_sample, summary = read()
        first = tables.results_table(runs, val_by_sample).drop_duplicates("Label")
        return texts + [" ".join(row) for row in (*tables.laws_table(summary).to_numpy(), *first.to_numpy())]

    first = everything({"A": (-0.287, 800), "B": (-0.385, 850)}, seeds=(1, 2, 3), epochs_run=4)
    for folder in (outputs / "planted").iterdir():
        for file in folder.iterdir():
            file.unlink()
    changed = {"best_epoch": 4, "epochs_run": 5, "phase1_converged_ratio": 0.963, "phase1_iterations": 9}
    changed |= {"val_samples": 23, "embed_dim": 112, "val_accuracy": 0.21, "phase2_learning_rate": 0.001}
    second = everything(
        {"A": (-0.191, 700), "B": (-0.273, 740)},
        sizes=(21_000, 29_000, 46_000, 66_000),
        seeds=(4, 5),
        shapes={"A": (5, 96), "B": (2, 160)},
        samples=23,
        **changed,
    )
    numbers = re.compile(r"[−+]?\d[\d,.]*\d|\d")
    assert len(first) == len(second)
    for before, after in zip(first, second, strict=True):
        before, after = (
            numbers.findall(re.sub(r"95 % interval|below 0|Phase 1", "", text)) for text in (before, after)
        )
        assert len(before) == len(after) and len(before) > 0
        assert not [pair for pair in zip(before, after, strict=True) if pair[0] == pair[1]]


def test_the_answer_says_what_it_must_be_read_with(outputs):
    plain = said(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)})
    assert "ran out of iterations" not in plain[-1] and "versions of the code" not in plain[-1]
    assert "early stop" not in plain[-1]
    unfinished = said(outputs, {"B": (-0.3, 850)}, phase1_converged_ratio=0.84, code_hash="1" * 16)
    assert "(outputs). Phase 1 of B ran out of iterations before it converged. " in unfinished[-1]
    assert "**2 versions of the code** made them" in unfinished[-1]


def test_the_gap_is_set_beside_the_published_one(outputs):
    plant(outputs, {"A": (-0.3, 846), "B": (-0.3, 900)}, **STUDY)  # A leads by 6 % at both sizes
    text = gaps(read()[-1], tables.published_runs()).replace("\u00a0", " ")
    assert "PPL of A against B: −5.4 % published, −6.0 % (" in text and "+1.7 % published, −6.0 % (" in text
    assert text.endswith("at 183,620 tokens. B has the lower PPL there, A here, at 183,620 tokens.")
    assert gaps({"paired_differences": []}, tables.published_runs()) == ""


def test_the_origin_names_corpus_and_embedding(outputs):
    plant(outputs, {"A": (-0.3, 800)}, corpus="mine.txt")
    assert ": A 6 layers of 128; corpus mine.txt, ppmi embeddings of 128 dimensions, " in origin("planted", read()[0])
    plant(outputs, {"B": (-0.3, 800)}, embedding="random")
    assert "; corpus chitchat and mine.txt, ppmi and random embeddings of 128" in origin("planted", read()[0])
    assert origin("study", pd.DataFrame()) == nothing("study") and "make report GRID=study" in nothing("study")


# Tables


def test_published_tables_hold_what_the_study_printed():
    results = tables.read_published("results").set_index(["experiment", "train_tokens"])
    assert results.loc[("A", 86_925), "val_ppl"] == 554.58 and results.loc[("B", 183_620), "val_accuracy_pct"] == 18.07
    phase1 = tables.read_published("phase1")
    share = 100 * phase1["phase1_converged_tokens"] / phase1["train_tokens"]
    assert np.abs(share - phase1["phase1_converged_pct"]).max() < 0.05
    epochs = tables.read_published("phase2_epochs").pivot(
        index=["experiment", "train_tokens"], columns="epoch", values="val_ppl"
    )
    assert list(epochs.columns) == [2, 4]
    rate = tables.read_published("phase2").set_index(["experiment", "train_tokens"])["overfit_pct"]
    assert np.abs(100 * (epochs[4] / epochs[2] - 1) - rate).max() < 0.6
    assert (epochs[2] == results["val_ppl"].sort_index()).all()
    minutes = results["phase1_minutes"] + results["phase2_minutes"] - results["total_minutes"]
    assert minutes.abs().max() < 0.05


def test_ours_beside_the_published_are_matched_by_shape_and_size(outputs):
    plant(outputs, {"A": (-0.3, 846), "B": (-0.4, 1031)}, **STUDY)
    runs, _, _, summary = read()
    table = tables.beside_published(runs).set_index("Ours / published")
    ours = 846 * (86_925 / 20_000) ** -0.3
    expected = f"{ours:.1f} / 554.6 ({ours / 554.58 - 1:+.0%})".replace("-", "−")
    assert table.loc["Validation PPL", "A, 86,925 tokens"] == expected
    assert table.shape == (9, 4) and "%" not in table.loc["Minutes", "A, 86,925 tokens"]
    summary["configurations"]["C"] = summary["configurations"]["A"]  # which the study does not have
    laws = tables.laws_table(summary, beside=True).set_index("Law")
    assert list(laws.index) == ["α of A", "α of B", "crossover, tokens"]
    assert laws["Published"].tolist() == ["−0.287", "−0.385", "141,000"]
    assert laws["Estimate"].tolist() == ["−0.300", "−0.400", f"{float(f'{20_000 * (1031 / 846) ** 10:.3g}'):,.0f}"]
    assert laws.loc["crossover, tokens", "95 % interval"] == laws.loc["crossover, tokens", "Runs"] == ""
    summary |= {"crossover_tokens": None, "crossover_reason": "the two laws are parallel"}
    assert tables.laws_table(summary, beside=True)["Estimate"].iloc[-1] == "the two laws are parallel"
    assert "Published" not in tables.laws_table(summary) and len(tables.laws_table(summary)) == 3
    plant(outputs, {"A": (-0.3, 800)}, grid="small")
    assert tables.beside_published(read("small")[0]).empty
    assert tables.beside_published(pd.DataFrame()).empty


def test_powers_in_cells_are_set_high():
    table = pd.DataFrame(
        {"Why": ["10^13 tokens", "tokens^(−0.287) and tokens^α", "2^(1/0.098) or 5 %"], "n": [1, 2, 3]}
    )
    page = tables.shown(table, "").to_html()
    assert "10<sup>13</sup> tokens<" in page and "2<sup>1/0.098</sup> or 5 %" in page
    assert "tokens<sup>−0.287</sup> and tokens<sup>α</sup>" in page


def test_columns_of_words_are_set_left_and_wide_tables_small():
    table = pd.DataFrame({"n": ["1", "2"], "Label": ["A", ""], "Change": ["", "no"], "Why": ["6 %", "+1"]})
    page = tables.shown(table, "", prose=["Why"]).to_html()
    left = set(re.findall(r"(t[hd])\S*\.col(\d) {\s*text-align: left;", page))
    assert left == {(part, column) for part in ("th", "td") for column in "123"}  # words, or named as prose
    assert page.count("white-space: normal;") == 1 and "6\u00a0%" in page
    for columns, kind in ((9, ""), (10, "wide")):
        assert f'class="{kind}">' in tables.shown(pd.DataFrame([range(columns)]), "").to_html()
    assert tables.shown(pd.DataFrame(), "none yet").data == "none yet"


def test_what_looks_like_html_is_shown_as_text(outputs):
    image = "<img src=x onerror=alert(1)>"
    table = pd.DataFrame([{"Model": image, f"Against {image}": "−5.0 %<br>(p < 0.1) & 10^13", "Runs": 1}])
    page = tables.shown(table, "", prose=["Model"]).to_html()
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert "−5.0 %<br>(p &lt; 0.1) &amp; 10<sup>13</sup></td>" in page
    assert tables.shown(pd.DataFrame(), f"none of {image}").data == "none of &lt;img src=x onerror=alert(1)>"
    plant(outputs, {"A": (-0.3, 800)}, corpus=f"{image}.txt")  # a file may be called so
    text = prose([origin("planted", read_grid("planted")[0]), "p < 0.001"]).data
    assert "corpus &lt;img src=x onerror=alert(1)>.txt, " in text and text.endswith("\n\np &lt; 0.001")


@pytest.mark.parametrize(("replicates", "robust"), [(1, True), (3, False), (10, True)])
def test_laws_have_their_intervals_and_robust_ones_where_they_can(outputs, replicates, robust):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.4, 850)}, seeds=range(replicates), chance=noise(0.02))
    summary = read()[-1]
    table = tables.laws_table(summary).set_index("Law")
    assert ("Robust interval" in table) == robust
    for label, law in summary["configurations"].items():
        row = table.loc[f"α of {label}"]
        assert (row["Estimate"], row["Runs"]) == (signed(law["alpha"]), f"{4 * replicates}")
        assert row["d.o.f."] == f"{replicates - 1 if replicates > 1 else 2}"
        low, high = row["95 % interval"].split(" to ")
        assert [low, high] == [signed(end) for end in law["alpha_interval"]] and low != high
        if robust:
            assert row["Robust interval"] == " to ".join(signed(end) for end in law["alpha_interval_robust"])


def test_results_table_has_a_row_a_run(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, phase1_cached=True)
    runs, _, val_by_sample, _ = read()
    table = tables.results_table(runs, val_by_sample)
    assert table["Label"].tolist() == ["A", "B"] * 4
    assert table["Training tokens"].tolist()[::2] == [f"{size:,}" for size in SIZES]
    row = table.iloc[0].to_dict()
    low, high = map(float, row.pop("95 % interval").split("–"))
    assert low < 800 < high
    minutes = (20_000 * 128 / 5e5 + 20_000 * 6 / 4e3 + 5) / 60
    ppl = {"Validation PPL": "800.0", "Accuracy, %": "15.00", "Test PPL": f"{800 * math.exp(0.01):.1f}"}
    ranks = {"ER before Phase 1, %": "85.0", "Training ER, %": "80.8", "Training ER without noise, %": "79.0"}
    ranks |= {"Validation ER, %": "78.0", "Phase 1 iterations": "7", "Converged, %": "97.9"}
    phase2 = {"Best epoch": "3", "Epochs": "5", "Over-fitting, %": "+10"}
    time = {"Minutes": f"{minutes:.1f} (Phase 1 cached)", "Source": "outputs"}
    first = {"Label": "A", "Training tokens": "20,000", "Learning rate": "0.002", "Seed": "42"}
    assert row == first | ppl | ranks | phase2 | time
    one = val_by_sample[val_by_sample["sample"] == val_by_sample["sample"].min()]
    assert set(tables.results_table(runs, one)["95 % interval"]) == {"none"}
    assert tables.results_table(pd.DataFrame(), pd.DataFrame()).empty


# Figures


def test_main_figure_shows_points_laws_and_crossover(outputs):
    plant(outputs, {"A": (-0.287, 800), "B": (-0.385, 850)})
    runs, _, val_by_sample, summary = read()
    pair = {"a": "A", "b": "B", "slope_interval": (-0.2, -0.1), "bootstrap_slope": (-0.2, -0.1)}
    axes = plots.plot_scaling(runs, val_by_sample, summary | {"pooled": [pair]}).axes[0]
    for container, (_, group) in zip(axes.containers, runs.groupby("experiment"), strict=True):
        points = container[0]
        assert points.get_ydata() == pytest.approx(group["val_ppl"].to_numpy())
        assert points.get_xdata() == pytest.approx(group["train_tokens"].to_numpy(), rel=0.02)
    assert len({container[0].get_marker() for container in axes.containers}) == 2
    curves = [line for line in axes.lines if len(line.get_xdata()) == 20]
    solid = [line.get_xdata() for line in curves if line.get_linestyle() == "-"]
    assert [(x[0], x[-1]) for x in solid] == [pytest.approx((20_000, 67_500))] * 2
    dashed = [line.get_xdata() for line in curves if line.get_linestyle() == "--"]
    assert len(dashed) == 4 and all(x[-1] <= 20_001 or x[0] >= 67_499 for x in dashed)
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [pytest.approx(summary["crossover_tokens"])]
    for interval, drawn in (((-0.2, 0.1), 0), ((-0.2, -0.1), 1), (None, 0)):  # drawn where slopes differ
        tested = summary | {"pooled": [pair | {"slope_interval": interval}]}
        axes = plots.plot_scaling(runs, val_by_sample, tested).axes[0]
        assert sum(line.get_linestyle() == ":" for line in axes.lines) == drawn
    assert not [line for line in axes.lines if line.get_markerfacecolor() == "white"]


def test_published_points_are_hollow(outputs):
    plant(outputs, {"A": (-0.3, 846), "B": (-0.4, 1031)}, **STUDY)
    runs, _, val_by_sample, summary = read()
    axes = plots.plot_scaling(runs, val_by_sample, summary, tables.published_runs()).axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[554.58, 447.22], [586.36, 439.79]]


def test_paired_figure_shows_the_differences_in_per_cent(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)})
    runs, _, _, summary = read()
    figure = plots.plot_paired_differences(runs, summary)
    assert figure.axes[0].containers[0][0].get_ydata() == pytest.approx([800 / 850 - 1] * 4)
    assert figure.get_suptitle() == "Pairs on the same text: n = 8 runs, 1 of a configuration and size"
    unpaired = plots.plot_paired_differences(pd.concat([runs, runs.iloc[:1].assign(train_tokens=1)]), summary)
    assert unpaired.get_suptitle() == figure.get_suptitle()


def test_curves_are_those_of_the_history(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)})
    runs, history, _, _ = read()
    figure = plots.plot_learning_curves(history)
    assert [axes.get_title() for axes in figure.axes] == ["A", "B"]
    drawn = [tuple(line.get_ydata()) for line in figure.axes[0].lines]
    first = history[
        (history["run"] == runs["run"][0]) & (history["metric"] == "val_ppl") & (history["phase"] == "phase2")
    ]
    assert tuple(first["value"]) in drawn and len(drawn) == 2 * len(SIZES)
    shades = [line.get_alpha() for line in figure.axes[0].lines[::2]]
    assert shades == sorted(set(shades))
    for axes, (_, own) in zip(figure.axes, runs.groupby("experiment"), strict=True):  # its fewest and most tokens
        assert [text.get_text() for text in axes.texts] == ["20,000", "67,500"]
        last = [own.loc[own["train_tokens"] == size, "last_val_ppl"].item() for size in (SIZES[0], SIZES[-1])]
        assert [text.xy for text in axes.texts] == [(5, pytest.approx(ppl)) for ppl in last]
    one = plots.plot_learning_curves(history[history["train_tokens"] == SIZES[0]])
    assert [len(axes.texts) for axes in one.axes] == [0, 0]
    left, right = plots.plot_convergence(history, runs).axes
    assert len(left.lines) == len(right.lines) == 8 + 1  # and the threshold
    rates = plots.plot_overfitting(runs).axes[0].lines[0]
    assert rates.get_ydata() == pytest.approx(runs["overfit_rate"][:4].to_numpy())


def test_learning_curves_of_several_runs_are_averaged_as_far_as_all_went(outputs):
    plant(outputs, {"A": (-0.3, 800)}, sizes=SIZES[:1], seeds=(1, 2), chance=noise(0.1))
    history = read()[1]
    short = history[(history["run"] != history["run"][0]) | (history["phase"] != "phase2") | (history["step"] < 5)]
    figure = plots.plot_learning_curves(short)
    thin = [line for line in figure.axes[0].lines if line.get_linewidth() < 1]
    mean = [line for line in figure.axes[0].lines if line.get_linewidth() > 1]
    assert [len(line.get_xdata()) for line in mean] == [4, 4] and len(thin) == 4
    for k, line in enumerate(mean):
        assert line.get_ydata() == pytest.approx(np.mean([x.get_ydata()[:4] for x in thin[2 * k : 2 * k + 2]], axis=0))
    assert figure.get_suptitle() == "PPL by epoch: n = 2 runs, 2 of a configuration and size; thick lines are means"


def test_points_are_ranks_and_bars_minutes(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)})
    runs = read()[0]
    axes = plots.plot_effective_rank(runs).axes
    points = [container[0].get_ydata() for container in axes[1].containers]
    assert points[0] == pytest.approx([77.5] * 4) and points[3] == pytest.approx([82.5] * 4)
    low, high = axes[1].get_ylim()
    assert low > 70 and high < 95  # no further than there are points
    bars = plots.plot_seconds(runs).axes[0].containers
    total = np.sum([[bar.get_width() for bar in container] for container in bars], axis=0)
    assert total == pytest.approx(runs["total_seconds"].to_numpy() / 60)
    assert plots.plot_seconds(runs).get_suptitle() == "Time: n = 8 runs, 1 of a configuration and size"
    twice = pd.concat([runs, runs.assign(run=runs["run"] + "-again")])
    assert plots.plot_seconds(twice).get_suptitle() == "Time: n = 16 runs, 2 of a configuration and size; means"


def test_one_run_is_drawn_by_phase(outputs):
    plant(outputs, {"A": (-0.3, 800)}, sizes=(20_000,))
    history = read()[1][["phase", "step", "metric", "value"]]
    assert [len(axes.lines) for axes in run_plots.plot_phase1(history).axes] == [1, 1, 2]
    left, right = run_plots.plot_phase2(history).axes
    assert [line.get_label() for line in left.lines] == [
        "training",
        "training, after the epoch",
        "validation",
        "best epoch: 3",
    ]
    assert np.log(right.lines[1].get_ydata()) == pytest.approx(left.lines[1].get_ydata())
    updates = pd.DataFrame({"phase": "phase2_updates", "step": [20, 40], "metric": "val_loss", "value": [7.0, 6.9]})
    by_the_end = pd.DataFrame(
        {"phase": "phase2", "step": range(1, 6), "metric": "updates", "value": range(40, 201, 40)}
    )
    between = run_plots.plot_phase2(pd.concat([history, updates, by_the_end])).axes[0].lines[0]
    assert list(between.get_xdata()) == [0.5, 1.0]


def test_singular_values_are_normalised():
    axes = run_plots.plot_singular_values({"init_er": [4, 3, 1], "val_er": np.array([1.0, 1.0])}).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.375, 0.125], [0.5, 0.5]]
    assert [line.get_label() for line in axes.lines] == ["before Phase 1", "after training, on validation text"]
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()


def test_effects_have_their_n_and_intervals_only_where_there_are_any(outputs):
    sure = [Effect("first", 0.1, (0.0, 0.2), 5, 5, 4, 20), Effect("second", 0.0, (-0.1, 0.1), 4, 4, 3, 20)]
    alone = [Effect("first", 0.1, None, 1, 1, 0)]
    figure = plots.plot_effects({"A": sure, "B": alone, "C": []}, "change of PPL", "by nothing", "pair")
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["A: n = 4 to 5 pairs in 4 to 5 replicates, 20 validation samples", "B: single pair"]
    assert figure.get_suptitle() == "Change of PPL by nothing"
    assert figure.axes[1].get_xlabel() == "change of PPL, 95 % interval"
    assert [container.has_xerr for axes in figure.axes for container in axes.containers] == [True, True, False]
    axes = plots.plot_effects({"": alone}, "change of PPL").axes[0]
    assert axes.get_xlabel() == "change of PPL (no interval can be given)"
    assert "no effect" in plots.plot_effects({}, "change").axes[0].texts[0].get_text()


def test_memory_shows_all_tokens_before_and_after(outputs):
    plant(outputs, {"A": (-0.3, 800)}, sizes=SIZES[:2], seeds=(1, 2))
    runs, history, _, _ = read()
    one = history[history["run"] == runs["run"][0]]
    for figure in (run_plots.plot_memory(one), plots.plot_reach(history, explain.recency(history))):
        before, after = figure.axes[0].lines[:2]
        assert before.get_xdata()[-1] == after.get_xdata()[-1] == 20 and figure.axes[0].get_xlim()[1] > 20
        assert before.get_ydata()[0] == after.get_ydata()[0] == 100
        assert before.get_markevery() != after.get_markevery()
        assert "n = " in figure.get_suptitle()
    assert "right: over 2 replicates, 95 % intervals" in figure.get_suptitle()
    assert (
        plots.plot_generalisation(explain.generalisation(history, runs))
        .get_suptitle()
        .startswith("Generalisation: n = 4 runs")
    )


def test_no_text_of_the_main_figures_overlaps(outputs):
    sizes = (20_000, 21_000, 30_000, 45_000, 90_000, 500_000)
    plant(outputs, {"A": (-0.287, 800), "B": (-0.385, 850), "C": (-0.33, 820)}, sizes=sizes)
    runs, history, val_by_sample, summary = read()
    figures = [plots.plot_scaling(runs, val_by_sample, summary), plots.plot_overfitting(runs)]
    figures += [plots.plot_paired_differences(runs, summary), plots.plot_learning_curves(history)]
    for figure in [*figures, plots.plot_effective_rank(runs)]:
        figure.canvas.draw()
        for axes in figure.axes:
            shown = [label for label in axes.get_xticklabels() if label.get_text() and label.get_visible()]
            boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
            assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


@pytest.mark.parametrize("longer", ["", ", phase2_learning_rate 0.0005"])
def test_no_figure_is_wider_than_the_others(outputs, longer):
    plant(outputs, {"A": (-0.287, 800), "B": (-0.385, 850), "C": (-0.33, 820)}, seeds=(1, 2), chance=noise(0.01))
    runs, history, val_by_sample = (table.assign(experiment=table["experiment"] + longer) for table in read()[:3])
    summary = summarise("planted", runs, val_by_sample)
    figures = [plots.plot_scaling(runs, val_by_sample, summary), plots.plot_paired_differences(runs, summary)]
    figures += [plots.plot_overfitting(runs), plots.plot_learning_curves(history), plots.plot_seconds(runs)]
    figures += [plots.plot_convergence(history, runs), plots.plot_effective_rank(runs)]
    figures += [plots.plot_generalisation(explain.generalisation(history, runs))]
    figures += [plots.plot_reach(history, explain.recency(history))]
    figures += [run_plots.plot_memory(history[history["run"] == runs["run"][0]])]
    for figure in figures:
        figure.canvas.draw()
        box = figure.get_tightbbox()
        assert figure.get_figwidth() == run_plots.WIDTH and box.x0 >= 0 and box.x1 <= run_plots.WIDTH


def test_phase1_left_out_has_not_run_out_of_iterations(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, SIZES)
    runs = read_grid("planted")[0].assign(phase1_converged_ratio=0.5)
    assert len(unconverged(runs)) == len(runs) == 8
    left_out = runs.assign(phase1_max_iterations=runs["experiment"].map({"A": 1, "B": 10}))
    assert set(unconverged(left_out)["experiment"]) == {"B"}


# The notebooks

CELLS, CELLS_1 = (
    nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells for name in ("03_analysis", "04_protocol_1")
)


def run_cells(cells, **parameters) -> None:
    """Run a notebook's cells here, in order, with these parameters."""
    names: dict = {}
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        exec(cell.source, names)  # no kernel to wait for, and errors point into ctxlm
        if "parameters" in cell.metadata.get("tags", []):
            names |= parameters


def run_notebook(grid: str, folder) -> dict:
    """Run the analysis of a grid; returns analysis.json."""
    run_cells(CELLS, grid=grid, output_dir=str(folder))
    return json.loads((folder / "analysis.json").read_text())


@pytest.mark.parametrize(
    ("laws", "sizes", "seeds"),
    [
        ({}, (), (42,)),
        ({"A": (-0.3, 800)}, (20_000,), (42,)),
        ({"A": (-0.3, 800)}, SIZES, (42, 43)),
        ({"A": (-0.3, 800), "B": (-0.4, 850)}, {"A": SIZES, "B": SIZES[:2]}, (42,)),
        ({"A": (-0.3, 800), "B": (-0.4, 850)}, {"A": SIZES[:2], "B": SIZES[2:]}, (42,)),
        ({"A": (-0.3, 800), "B": (-0.4, 850), "C": (-0.35, 830)}, SIZES[:2], (42,)),
    ],
    ids=["none", "one run", "one configuration", "unequal sizes", "disjoint sizes", "three configurations"],
)
def test_notebook_says_what_there_is(outputs, tmp_path, monkeypatch, capsys, laws, sizes, seeds):
    plan(tmp_path, "ABC", SIZES, seeds)
    monkeypatch.chdir(ROOT / "notebooks")
    plant(outputs, laws, sizes, seeds=seeds)
    content = run_notebook(str(tmp_path / "planted.yaml"), tmp_path)
    assert set(content["configurations"]) == set(laws) and content["grid"] == "planted"
    assert "NaN" not in (tmp_path / "analysis.json").read_text()
    for label, law in content["configurations"].items():
        assert law["alpha"] is None or law["alpha"] == pytest.approx(laws[label][0])


def test_notebook_shows_the_committed_study(outputs, tmp_path, monkeypatch):
    laws = {"A": (-0.3, 846), "B": (-0.4, 1031)}
    plant(tmp_path / "committed", laws, grid="protocol-1/study", protocol=1, **STUDY)
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(getattr(thing, "data", thing)))
    run_cells(CELLS_1, output_dir=None)
    texts = [text for text in shown if isinstance(text, str)]
    (own,) = [text for text in texts if text.startswith("## The study at full size\n\nGrid protocol-1/study: 4 runs ")]
    assert "Source: committed results (data/results)." in own
    assert run_notebook("study", tmp_path)["configurations"] == {}  # of what is judged anew, nothing has been run
    plant(tmp_path / "committed", laws, grid="study", **STUDY)
    assert math.isclose(run_notebook("study", tmp_path)["configurations"]["A"]["alpha"], -0.3)


NESTED = [(42 + k, k // 2) for k in range(4)]
SIDE = {  # the grids that explain: shapes of their configurations, and which runs there are
    "variance": ({"A": (6, 128), "B": (3, 256)}, (10_000, 14_000), NESTED),
    "signs": ({"A": (6, 128), "B": (3, 256)}, (10_000,), NESTED[::2]),
    "overfitting": ({"A": (6, 128), "B": (3, 256)}, (14_000, 28_000), NESTED[::2]),
    "ablations": ({"A": (6, 128), "A-zero": (6, 128), "A-without-phase1": (6, 128)}, (20_000,), NESTED[::2]),
    "ablations-full": ({"A": (6, 768), "A-zero": (6, 768)}, (86_925,), NESTED[:1]),
    "factorial": ({f"L{d}-C{w}": (d, w) for d in (3, 6) for w in (128, 256)}, (14_000, 28_000), NESTED[::2]),
    "study": ({"A": (6, 768), "B": (3, 1536)}, (86_925,), NESTED[:1]),
    "baselines": ({"KN-4": (1, 1)}, (86_925,), NESTED[:1]),
    "networks": ({"LSTM": (1, 1)}, (86_925,), NESTED[:1]),
    "tuned": ({"tuned-A": (6, 768)}, (86_925,), NESTED[:1]),
    "joint": ({"joint-A": (6, 768)}, (86_925,), NESTED[:1]),
    "slow": ({"slow-A": (6, 768)}, (86_925,), NESTED[:1]),
}
MODELS = {"baselines": "kneser-ney", "networks": "lstm"}


@pytest.mark.parametrize("missing", ["nothing", "one run", "all but one", "a configuration"])
def test_notebook_shows_what_there_is_of_the_grids_that_explain(missing, outputs, tmp_path, monkeypatch):
    for grid, (shapes, sizes, pairs) in SIDE.items():
        laws = {label: (-0.3, 800 + 20 * k) for k, label in enumerate(shapes)}
        options = {"pairs": pairs, "shapes": shapes, "chance": noise(0.01), "model": MODELS.get(grid, "context")}
        folder = plant(tmp_path / "committed", laws, sizes, f"protocol-1/{grid}", protocol=1, **options)
        found = sorted(folder.iterdir())
        gone = {"nothing": [], "one run": found[:1], "all but one": found[1:]}
        last = sorted(shapes)[-1]
        for run in gone.get(missing, [run for run in found if run.name.startswith(f"{last}_")]):
            shutil.rmtree(run)
    shown: list[object] = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(getattr(thing, "data", str(thing))))
    run_cells(CELLS_1, output_dir=None)
    text = "\n".join(part for part in shown if isinstance(part, str))
    headings = (
        "The study at full size|"
        "Chance: other seeds|How far back|What Phase 1 and the contexts contribute\n|"
        "What Phase 1 and the contexts contribute at full size|Why Phase 2|Depth or width|What a user would otherwise"
    )
    for heading in headings.split("|"):
        assert f"## {heading}" in text
    shown = [part for part in shown if isinstance(part, pd.DataFrame)]
    assert not any(part.astype(str).isin(["nan", "None"]).any(axis=None) for part in shown)
    if missing == "nothing":
        assert "Not " not in text and text.count("nan") == 0
        assert text.startswith("**What the grids of this repository say** (quick: A 6 layers of 128, B 3 layers of 256")
        better = "A (deep and narrow: 6 layers, context 768) **did better, in single runs, than** B ("
        assert f"**Deep and narrow, or shallow and wide?** {better}" in text
        assert "\n\nGrid protocol-1/variance: 16 runs in 2 replicates, trained on" in text
        columns = (
            "Law",
            "Slopes α",
            "Standard deviation",
            "Before training, tokens",
            "Question",
            "PPL against A",
            "Against KN-4",
        )
        laws, slopes, chance, reach, known, ranked, compared = (
            next(part for part in shown if column in part) for column in columns
        )
        assert laws["Estimate"].str.startswith("none: a law needs runs of at least two sizes").sum() == 2
        assert slopes["Grid"].tolist() == ["study", "variance"]
        assert len(chance) == 4 + 2 + 1 and reach["Configuration"].tolist() == ["A", "B"]
        effects = pd.concat([part for part in shown if "Effect" in part])
        responses = {"last PPL / best PPL", "best PPL", "PPL", "memory horizon", "signs drawn", "signs fixed"}
        assert set(effects["Of"]) == {"A", "B"} | responses
        assert len(known) == 15 and known["Answer"].iloc[-4].startswith("PPL against A: KN-4 ")
        assert known["Answer"][0].startswith("A did better, in single runs, than B at ")
        assert known["Scale: grids"][:2].tolist() == ["full: study", "quick: variance"]
        assert known["Scale: grids"].iloc[-4] == "full: study, baselines, networks"
        assert set(ranked["Model"]) == {"A", "B", "KN-4", "LSTM", "tuned-A", "joint-A", "slow-A"}
        pairs = pd.concat([part for part in shown if "Its PPL" in part])
        assert pairs["Model"].tolist() == ["joint-A", "slow-A"]
        assert pairs["Counterpart"].tolist() == ["tuned-A", "joint-A"]
        against = [name for name in compared if name.startswith("Against")]
        assert against == ["Against KN-4", "Against LSTM (ppmi)"]
        assert ranking.LEGEND.replace(" %", "\u00a0%") in text


def test_notebook_shows_a_grid_and_nothing_of_others(outputs, tmp_path, monkeypatch):
    plan(tmp_path, "AB", (20_000, 30_000), (42,))
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, sizes=(20_000, 30_000))
    for root, grid, protocol in ((outputs, "variance", 2), (tmp_path / "committed", "protocol-1/planted", 1)):
        plant(root, {"A": (-0.2, 900)}, (45_000,), grid, protocol=protocol)
    shown: list[object] = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(getattr(thing, "data", str(thing))))
    content = run_notebook(str(tmp_path / "planted.yaml"), tmp_path)
    assert len(content["runs"]) == 4 and {run["source"] for run in content["runs"]} == {"outputs"}
    text = "\n".join(part for part in shown if isinstance(part, str))
    better = f"{A} **did better, in single runs, than** {B} at 20,000 and 30,000 tokens, every size that both"
    assert text.startswith(f"**Deep and narrow, or shallow and wide?** {better}")
    assert "\n\nGrid planted: 4 runs in 1 replicate, trained on" in text and text.count("Grid ") == 1
    assert "Not " not in text and "nan" not in text and "45,000" not in text and "protocol-1" not in text
    found = [part for part in shown if isinstance(part, pd.DataFrame)]
    assert not any(part.astype(str).isin(["nan", "None"]).any(axis=None) for part in found)
    laws, slopes = (next(part for part in found if column in part) for column in ("Law", "Slopes α"))
    assert laws["Estimate"].tolist() == ["−0.300", "−0.300"] and slopes["Slopes α"].tolist() == ["of B minus A"]
    plant(outputs, {"A": (-0.3, 800)}, (20_000,), protocol=1)
    with pytest.raises(ConfigError, match=r"^grid planted has runs that were judged otherwise than by today's"):
        run_notebook(str(tmp_path / "planted.yaml"), tmp_path)


@pytest.mark.parametrize("cells", [CELLS, CELLS_1], ids=["03_analysis", "04_protocol_1"])
def test_notebook_is_stripped_and_short(cells):
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        # figures come where a cell ends, so that two headings in one cell would part them from their text
        assert len(re.findall(r"(?<!def )\bbegin\(", cell.source)) <= 1 and not re.search(
            r"^ .*begin\(", cell.source, re.M
        )
        assert cell.outputs == [] and cell.execution_count is None and len(cell.source.splitlines()) <= 12
    assert len({cell.id for cell in cells}) == len(cells)


def test_of_many_runs_the_table_holds_means(outputs):
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 820)}, sizes=(20_000, 30_000), seeds=range(7), chance=noise(0.02))
    runs, _, val_by_sample = read_grid("planted")
    runs["best_epoch"] = runs["seed"]
    table = tables.results_table(runs, val_by_sample)
    assert table["Runs"].tolist() == ["7"] * 4 and table["Label"].tolist() == ["A", "B", "A", "B"]
    assert table["Training tokens"].tolist() == ["20,000", "20,000", "30,000", "30,000"]
    own = runs[(runs["experiment"] == "A") & (runs["train_tokens"] == 30_000)]
    assert table["Validation PPL"][2] == f"{own['val_ppl'].mean():.1f}"
    assert table["Test PPL"][2] == f"{own['test_ppl'].mean():.1f}"
    assert table["PPL, range"][2] == f"{own['val_ppl'].min():.0f}–{own['val_ppl'].max():.0f}"
    assert set(table["Best epoch"]) == {"3"} and "Seed" not in table and "95 % interval" not in table
    fewer = tables.results_table(runs[runs["seed"] < 6], val_by_sample)
    assert len(fewer) == 24 and "Runs" not in fewer and "PPL, range" not in fewer
