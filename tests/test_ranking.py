"""Models of every kind side by side: planted differences come back, and whoever wins is named."""

import math

import pandas as pd
import pytest

from ctxlm.analysis import plots, ranking
from ctxlm.analysis.findings import nothing
from ctxlm.analysis.scaling import LEFT_OUT, read_grid, summarise
from ctxlm.analysis.tables import others_table
from ctxlm.config import BASELINES, load_grid, read_yaml
from tests.planted import plant

SHAPES = {"A": (6, 128), "B": (3, 256), "KN-3": (1, 1), "KN-4": (1, 1)}


def both(outputs, ngrams, spread=0.005):
    """Runs and losses by sample of a planted grid of A and B, and of one of n-grams."""
    plant(outputs, {"A": (-0.3, 800), "B": (-0.3, 820)}, sizes=(20_000, 40_000), shapes=SHAPES, spread=spread)
    plant(outputs, ngrams, (20_000, 40_000), "ngrams", shapes=SHAPES, spread=spread, model="kneser-ney")
    return [read_grid("planted")[::2], read_grid("ngrams", models=["kneser-ney"])[::2]]


@pytest.mark.parametrize(("ppl", "verdict"), [(600, "better"), (1000, "worse")])
def test_planted_differences_come_back(outputs, ppl, verdict):
    ranked = ranking.ranking(both(outputs, {"KN-3": (-0.3, 1200), "KN-4": (-0.3, ppl)}))
    rows = ranked.set_index(["train_tokens", "experiment"])
    assert len(rows) == 8 and rows.loc[(20_000, "KN-4"), "difference"] == pytest.approx(math.log(ppl / 800))
    low, high = rows.loc[(40_000, "B"), "interval"]
    assert low < math.log(820 / 800) < high and rows.loc[(40_000, "A"), "difference"] == 0
    assert ranked["ppl"].groupby(ranked["train_tokens"]).apply(lambda x: x.is_monotonic_increasing).all()
    text = ranking.beside_others(ranked)
    assert (
        text.count(f": did {verdict} than A, in single runs") == 2
        and f"KN-4, {ppl}.0, " in text
        and "over 20 validation samples" in text
    )
    table = ranking.ranking_table(ranked)
    assert len(table) == 8 and set(table.loc[table["Model"] == "A", "PPL against A"]) == {""}
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
    # which is not what a user would otherwise pick
    slow = ranking.ranking([ours, (networks.assign(slow_decay=0.98, embed_dim=16), losses)])
    assert "networks" not in ranking.beside_others(slow)
    text = ranking.beside_others(ranking.ranking([ours, (networks, losses)]))
    kind = "of networks without a slow context (which know the corpus's second half where their embedding is ppmi)"
    assert text.count(f"{kind} KN-3, ") == 2 and "n-grams" not in text


def test_what_cannot_be_told_is_said(outputs):
    ranked = ranking.ranking(both(outputs, {"KN-3": (-0.3, 900), "KN-4": (-0.3, 801)}, spread=0.1))
    assert "which of the two, it or A, is better cannot be told" in ranking.beside_others(ranked)


def test_a_model_that_reads_more_is_set_apart(outputs):
    ours, (ngrams, losses) = both(outputs, {"KN-3": (-0.3, 700), "KN-4": (-0.3, 300)})
    ngrams = ngrams.assign(ngram_second_half=ngrams["experiment"] == "KN-4")
    text = ranking.beside_others(ranking.ranking([ours, (ngrams, losses)]))
    assert text.count("of n-grams of the training tokens KN-3, ") == 2 and "of networks" not in text
    assert text.count("of n-grams that count more text (") == text.count("knows) KN-4, ") == 2
    models = ranking.ranking_table(ranking.ranking([ours, (ngrams, losses)]))["Model"]
    assert set(models) == {"A", "B", "KN-3", "KN-4 (reads more)"}


def test_models_on_other_tokens_are_not_ranked(outputs):
    ours, (ngrams, losses) = both(outputs, {"KN-4": (-0.3, 700)})
    ranked = ranking.ranking([ours, (ngrams, losses.assign(tokens=losses["tokens"] + 1))])
    assert set(ranked["experiment"]) == {"A", "B"}
    alone = ranking.ranking([(ours[0][ours[0]["experiment"] == "A"], ours[1])])
    assert ranking.beside_others(alone) == "No other model was judged on the same tokens as A."
    assert ranking.ranking_table(ranking.ranking([(ngrams.iloc[:0], losses)])).empty


def test_other_models_of_a_grid_have_a_table(outputs):
    _, (ngrams, losses) = both(outputs, {"KN-3": (-0.3, 700), "KN-4": (-0.3, 650)})
    networks = ngrams.assign(model="lstm", run=ngrams["run"] + "-lstm", held_out_tokens=8692, val_ppl=300.0)
    losses = pd.concat([losses, losses.assign(run=losses["run"] + "-lstm")])
    table = others_table(pd.concat([ngrams.drop(columns=["best_epoch", "epochs_run"]), networks]), losses)
    assert table["Validation PPL"].tolist()[:4] == ["300.0", "300.0", "650.0", "700.0"]
    assert table["Learning rate"].tolist()[:4] == ["0.002", "0.002", "", ""]
    assert table["Best epoch"].tolist()[:4] == ["3 of 5", "3 of 5", "", ""]
    assert others_table(ngrams.iloc[:0], losses).empty


def test_other_models_stay_out_of_a_grids_own_sections(outputs):
    both(outputs, {"KN-4": (-0.3, 700)})
    assert read_grid("ngrams")[0].empty and "no finished run of the context model" in nothing("ngrams")
    runs, _, val_by_sample = read_grid("ngrams")
    assert len(summarise("ngrams", runs, val_by_sample)["runs"]) == 2  # but the report counts them
    plant(outputs, {"A": (-0.3, 800)}, (20_000,), "stale")  # a run that the grid file no longer asks for
    assert nothing("stale") == "No finished run of grid stale: run `make report GRID=stale`."
    assert nothing("absent") == "No finished run of grid absent: run `make report GRID=absent`."


def test_the_rate_that_held_out_text_prefers(outputs):
    options = {"shapes": {"L": (1, 1), "T": (1, 1)}, "model": "lstm", "held_out_tokens": 2000}
    runs = []
    for rate, ppl in {0.0005: (700, 600), 0.001: (650, 620), 0.002: (690, 640)}.items():
        laws = {label: (-0.3, p) for label, p in zip("LT", ppl, strict=True)}
        plant(outputs, laws, (20_000,), "rates", phase2_learning_rate=rate, **options)
        runs.append(read_grid("rates", models=["lstm"])[0])
        if rate == 0.0005:
            runs[0].loc[runs[0]["experiment"] == "T", "epochs_run"] = runs[0]["best_epoch"]
    text = ranking.chosen_rates(pd.concat(runs, ignore_index=True))
    assert "the last 2,000 of 20,000 training tokens, held out" in text
    assert "L 700.0 at 0.0005, 650.0 at 0.001, 690.0 at 0.002: lowest at 0.001;" in text
    assert text.endswith(
        "640.0 at 0.002: lowest at 0.0005, at the edge of what was tried (not yet at its early stop: 0.0005)."
    )
    assert "L 700.0 at 0.0005, the only rate so far; T 600.0 at 0.0005, the only" in ranking.chosen_rates(runs[0])
    assert ranking.chosen_rates(runs[0].iloc[:0]) == ""


@pytest.mark.parametrize("label", ["LSTM", "Transformer"])
def test_the_networks_rates_are_those_that_held_out_text_chose(outputs, monkeypatch, label):
    monkeypatch.delenv("CTXLM_RESULTS")  # what is committed
    plan = load_grid("baseline-rates").runs
    runs, _, _ = read_grid("baseline-rates", plan, models=BASELINES)
    ppl = runs[runs["configuration"] == label].set_index("phase2_learning_rate")["val_ppl"]
    assert runs.attrs[LEFT_OUT] == 0 and len(ppl) > 2 and ppl.index.min() < ppl.idxmin() < ppl.index.max()
    assert read_yaml(f"params/baselines/{label.lower()}.yaml")["phase2_learning_rate"] == ppl.idxmin()
