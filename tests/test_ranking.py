"""Models of every kind side by side: planted differences come back, and whoever wins is named."""

import math

import pandas as pd
import pytest

from ctxlm.analysis import plots, ranking
from ctxlm.analysis.findings import nothing
from ctxlm.analysis.phrases import change, side
from ctxlm.analysis.scaling import read_grid, summarise
from ctxlm.analysis.tables import results_table
from ctxlm.config import BASELINES, read_yaml
from tests.planted import plant

SHAPES = {"A": (6, 128), "B": (3, 256), "KN-3": (1, 1), "KN-4": (1, 1)}


def both(outputs, ngrams, spread=0.005):
    """Runs and losses by sample of a planted grid of A and B, and of one of n-grams."""
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 820)}, sizes=(20_000, 40_000), shapes=SHAPES, spread=spread)
    plant(outputs, ngrams, (20_000, 40_000), "ngrams", shapes=SHAPES, spread=spread, model="kneser-ney")
    return [read_grid("planted")[::2], read_grid("ngrams", models=["kneser-ney"])[::2]]


@pytest.mark.parametrize(("ppl", "sign"), [(600, -1), (1000, 1)])
def test_planted_differences_come_back(outputs, ppl, sign):
    ranked = ranking.ranking(both(outputs, {"KN-3": (-0.3, 1200), "KN-4": (-0.3, ppl)}))
    rows = ranked.set_index(["train_tokens", "experiment"])
    assert len(rows) == 8 and rows.loc[(20_000, "KN-4"), "difference"] == pytest.approx(math.log(ppl / 800))
    low, high = rows.loc[(40_000, "B"), "interval"]
    assert low < math.log(820 / 800) < high and rows.loc[(40_000, "A"), "difference"] == 0
    assert ranked["ppl"].groupby(ranked["train_tokens"]).apply(lambda x: x.is_monotonic_increasing).all()
    table = ranking.ranking_table(ranked)
    assert len(table) == 8 and set(table.loc[table["Model"] == "A", "PPL against A"]) == {""}
    ngrams, told = rows.xs("KN-4", level="experiment"), table[table["Model"] == "KN-4"]
    assert told["Validation PPL"].iloc[0] == f"{ppl}.0" and set(ngrams["samples"]) == {20}
    assert [side(interval) for interval in ngrams["interval"]] == [sign] * 2 and set(ngrams["replicates"]) == {1}
    expected = [change(math.log(ppl / 800), interval) for interval in ngrams["interval"]]
    assert told["PPL against A"].tolist() == expected
    assert expected[0].startswith({-1: "−25.0 % (−", 1: "+25.0 % (+"}[sign])
    assert table["Model"][[0, 4]].tolist() == [{-1: "KN-4", 1: "A"}[sign]] * 2  # the best first
    assert rows.loc[(20_000, "A"), ["parameters", "kept"]].tolist() == [7000 * 128, 128 + 1]
    assert rows.loc[(20_000, "KN-4"), ["parameters", "kept"]].tolist() == [0, 3]
    effects = ranking.ranking_effects(ranked)
    assert list(effects) == ["20,000 tokens", "40,000 tokens"] and len(effects["20,000 tokens"]) == 3
    assert {effect.samples for effect in effects["20,000 tokens"]} == {20}
    panels = plots.plot_effects(effects, "PPL").axes
    assert [axes.get_title("left").partition(":")[0] for axes in panels] == list(effects)
    assert {label.get_text() for label in panels[1].get_yticklabels()} == {"B", "KN-3", "KN-4"}


@pytest.mark.parametrize(
    ("parameters", "more"),
    [
        ({"phase2_freeze_embedding": False}, 50_257 * 128),
        ({"phase2_freeze_embedding": False, "output_bias": "unigram"}, 50_257 * 129),
        ({"slow_decay": 0.9}, 128),
        ({"use_weight_tying": False}, 50_257 * 129),
        ({"use_weight_tying": False, "output_bias": "unigram"}, 50_257 * 129),
    ],
)
def test_what_else_is_trained_counts(outputs, parameters, more):
    (ours, losses), _ = both(outputs, {"KN-3": (-0.3, 1200)})
    rows = ranking.ranking([(ours.assign(embed_dim=128, **parameters), losses)]).set_index("experiment")
    assert rows.loc["A", "parameters"].tolist() == [7000 * 128 + more] * 2


def test_networks_keep_states_or_a_window(outputs):
    ours, (networks, losses) = both(outputs, {"KN-3": (-0.3, 700), "KN-4": (-0.3, 750)})
    shape = {"num_layers": 2, "hidden_dim": 100, "window": 32}
    networks = networks.assign(model=networks["experiment"].map({"KN-3": "lstm", "KN-4": "transformer"}), **shape)
    rows = ranking.ranking([ours, (networks, losses)]).set_index("experiment")
    assert rows.loc["KN-3", ["parameters", "kept"]].to_numpy().tolist() == [[5000, 400]] * 2
    assert rows.loc["KN-4", ["parameters", "kept"]].to_numpy().tolist() == [[5000, 400 * 32]] * 2
    slow = [(of.assign(slow_decay=0.98, embed_dim=16), losses) for of, losses in (ours, (networks, losses))]
    kept = ranking.ranking(slow).set_index("experiment")["kept"]
    assert (kept - rows["kept"]).tolist() == [16] * len(kept)


def test_what_cannot_be_told_is_said(outputs):
    ranked = ranking.ranking(both(outputs, {"KN-3": (-0.3, 900), "KN-4": (-0.3, 801)}, spread=0.1))
    own = ranked[ranked["experiment"] == "KN-4"]
    assert len(own) == 2 and all(low < 0 < high for low, high in own["interval"])
    table = ranking.ranking_table(ranked)
    for cell in table.loc[table["Model"] == "KN-4", "PPL against A"]:
        assert cell.startswith("+0.1 % (−") and " to +" in cell


def test_a_model_that_reads_more_is_set_apart(outputs):
    ours, (ngrams, losses) = both(outputs, {"KN-3": (-0.3, 700), "KN-4": (-0.3, 300)})
    ngrams = ngrams.assign(ngram_second_half=ngrams["experiment"] == "KN-4")
    ranked = ranking.ranking([ours, (ngrams, losses)])
    assert ranked.loc[ranked["reads_more"], "experiment"].tolist() == ["KN-4"] * 2
    models = ranking.ranking_table(ranked)["Model"]
    assert sorted(models) == sorted(["A", "B", "KN-3", "KN-4 (reads more)"] * 2)
    assert ranking.LEGEND.startswith("(reads more): the n-gram counts the corpus's second half too")


def test_models_on_other_tokens_are_not_ranked(outputs):
    ours, (ngrams, losses) = both(outputs, {"KN-4": (-0.3, 700)})
    ranked = ranking.ranking([ours, (ngrams, losses.assign(tokens=losses["tokens"] + 1))])
    assert set(ranked["experiment"]) == {"A", "B"}
    alone = ranking.ranking([(ours[0][ours[0]["experiment"] == "A"], ours[1])])
    assert set(alone["experiment"]) == {"A"} and ranking.ranking_effects(alone) == {}
    assert set(ranking.ranking_table(alone)["PPL against A"]) == {""}
    assert ranking.ranking_table(ranking.ranking([(ngrams.iloc[:0], losses)])).empty


def test_other_models_of_a_grid_have_a_table(outputs):
    _, (ngrams, losses) = both(outputs, {"KN-3": (-0.3, 700), "KN-4": (-0.3, 650)})
    networks = ngrams.assign(model="lstm", run=ngrams["run"] + "-lstm", held_out_tokens=8692, val_ppl=300.0)
    losses = pd.concat([losses, losses.assign(run=losses["run"] + "-lstm")])
    table = results_table(pd.concat([ngrams.drop(columns=["best_epoch", "epochs_run"]), networks]), losses)
    assert len(table) == 8 and table["Label"].tolist()[:4] == ["KN-3", "KN-3", "KN-4", "KN-4"]
    assert table["Validation PPL"].tolist()[:4] == ["700.0", "300.0", "650.0", "300.0"]
    assert table["Learning rate"].tolist() == ["", "0.002"] * 4
    assert table["Held out"].tolist() == ["", "8,692"] * 4
    assert table["Best epoch"].tolist() == ["", "3"] * 4 and table["Epochs"].tolist() == ["", "5"] * 4
    own = {"best_epoch", "epochs_run", *(name for name in ngrams if name.startswith("phase1") or "_er_" in name)}
    alone = results_table(ngrams.drop(columns=own).assign(phase1_cached=False), losses)
    absent = ["Learning rate", "Held out", "Best epoch", "Epochs", "Converged, %", "Training ER, %"]
    assert len(alone) == 4 and not [name for name in absent if name in alone]
    assert not alone["Minutes"].str.contains("cached").any() and alone["Test PPL"].tolist()[:2] == ["707.0", "656.5"]
    assert results_table(ngrams.iloc[:0], losses).empty


def test_other_models_stay_out_of_a_grids_own_sections(outputs):
    both(outputs, {"KN-4": (-0.3, 700)})
    assert read_grid("ngrams")[0].empty and "no finished run of the context model" in nothing("ngrams")
    runs, _, val_by_sample = read_grid("ngrams")
    assert len(summarise("ngrams", runs, val_by_sample)["runs"]) == 2  # but the report counts them
    plant(outputs, {"A": (-0.3, 800)}, (20_000,), "stale")  # a run that the grid file no longer asks for
    assert nothing("stale") == "No finished run of grid stale: run `make report GRID=stale`."
    assert nothing("absent") == "No finished run of grid absent: run `make report GRID=absent`."


def test_rates_tried_on_held_out_text_have_a_row_each(outputs):
    options = {"shapes": {"L": (1, 1), "T": (1, 1)}, "model": "lstm", "held_out_tokens": 2000}
    tried = {0.0005: (700, 600), 0.001: (650, 620), 0.002: (690, 640)}
    for rate, ppl in tried.items():
        laws = {label: (-0.3, p) for label, p in zip("LT", ppl, strict=True)}
        going = {"epochs_run": 3} if rate == 0.0005 else {}  # not yet at its early stop
        folder = plant(outputs, laws, (20_000,), "rates", phase2_learning_rate=rate, **options, **going)
        for run in folder.glob("*seed-42"):
            run.rename(run.with_name(f"{run.name}_phase2_learning_rate-{rate}"))
    table = results_table(*read_grid("rates", models=["lstm"])[::2])
    rates = [f"{rate:g}" for rate in tried]
    assert table["Label"].tolist() == [f"{label}, phase2_learning_rate {rate}" for label in "LT" for rate in rates]
    assert table["Learning rate"].tolist() == rates * 2 and set(table["Held out"]) == {"2,000"}
    assert table["Validation PPL"].tolist() == ["700.0", "650.0", "690.0", "600.0", "620.0", "640.0"]
    assert set(table["Best epoch"]) == {"3"} and table["Epochs"].tolist() == ["3", "5", "5"] * 2


@pytest.mark.parametrize("label", ["LSTM", "Transformer"])
def test_the_networks_rates_are_those_that_held_out_text_chose(outputs, monkeypatch, label):
    monkeypatch.delenv("CTXLM_RESULTS")  # what is committed
    runs, _, _ = read_grid("protocol-1/baseline-rates", models=BASELINES)
    ppl = runs[runs["configuration"] == label].set_index("phase2_learning_rate")["val_ppl"]
    assert len(ppl) > 2 and ppl.index.min() < ppl.idxmin() < ppl.index.max()
    assert read_yaml(f"params/baselines/{label.lower()}.yaml")["phase2_learning_rate"] == ppl.idxmin()
