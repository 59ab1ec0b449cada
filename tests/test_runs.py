"""Which runs are read, under which names, as which replicates; what is published; what cannot stand side by side."""

import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

import ctxlm.files
from ctxlm.analysis.runs import (
    TABLES,
    load_runs,
    load_table,
    loss_sums,
    overview,
    publish,
    read_histories,
    read_runs,
    replicates,
    with_shape,
    write_tables,
)
from ctxlm.config import Experiment
from ctxlm.corpus import PROTOCOL
from ctxlm.files import ROOT, run_folders
from tests.conftest import refusal
from tests.planted import write

COMMIT = "1234567".ljust(40, "0")
"""Of digits alone, as a hash may be."""


@pytest.fixture
def roots(outputs):
    """Where finished runs are looked for: outputs and committed ones."""
    return outputs, outputs.parent / "committed"


@pytest.fixture
def grid(tmp_path):
    """Writes the file of the grid `planted`, or another, which asks for A, or for `experiments`; returns its name."""

    def grid_file(experiments=None, name="planted", **sweep):
        common = {"val_samples": 4, "test_samples": 5}
        content = {"title": "Planted", "common": common, "experiments": experiments or {"A": {}}, "sweep": sweep}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        return str(tmp_path / f"{name}.yaml")

    return grid_file


# Which runs are read


def test_a_run_that_the_grid_does_not_ask_for_or_that_is_unfinished_is_not_read(roots, grid):
    for size in (20_000, 30_000, 45_000):
        folder = write(roots[0], "planted", train_tokens=size)
    (folder / "metrics.json").unlink()
    file = grid(train_tokens=[20_000, 45_000], seed=[42])
    runs = read_runs(file, file)  # a grid counts once
    assert runs["train_tokens"].tolist() == [20_000] and set(runs["planned"]) == {2}
    assert "make report GRID=" in refusal(read_runs, grid(train_tokens=[45_000], seed=[42]))
    assert load_runs("nothing").empty and all(load_table("nothing", name).empty for name in TABLES)
    assert "'other'" in refusal(read_runs, "other")
    write(roots[1], "other")  # committed runs that no file plans
    assert len(read_runs("other")) == 1


@pytest.mark.parametrize("other", [{"embedding": "random"}, {"max_sample_tokens": None}])
def test_a_run_of_other_parameters_than_the_file_gives_it_is_not_read(roots, grid, other):
    sizes = {"train_tokens": [20_000, 30_000], "seed": [42]}
    write(roots[0], "planted", train_tokens=20_000)
    write(roots[0], "planted", train_tokens=30_000, **other)
    assert read_runs(grid(**sizes))["train_tokens"].tolist() == [20_000]
    assert read_runs(grid({"A": other}, **sizes))["train_tokens"].tolist() == [30_000]


def test_a_run_that_is_older_than_a_parameter_has_its_default(roots, grid):
    write(roots[1], "planted")
    write(roots[1], "planted", train_tokens=30_000, without=["output_bias"])
    write(roots[1], "planted", "KN", model="kneser-ney", dtype="float64")
    runs = read_runs(grid({"A": {}, "KN": {"model": "kneser-ney"}}, train_tokens=[20_000, 30_000], seed=[42]))
    assert len(runs) == 3 and set(runs["source"]) == {"committed"}
    assert set(runs["configuration"]) == {"A", "KN"} and set(runs["output_bias"]) == {"none"}
    assert set(runs["planned"]) == {4} and set(runs["id"]) == set("planted/" + runs["run"])


def test_runs_on_a_text_that_has_changed_since_are_refused(roots, grid):
    write(roots[0], "planted", train_tokens=20_000)
    write(roots[0], "planted", train_tokens=30_000, data_hash="another")
    assert "'chitchat' was another text" in refusal(read_runs, grid(train_tokens=[20_000, 30_000], seed=[42]))


@pytest.mark.parametrize("older", [2, 1])
def test_runs_of_another_protocol_are_refused(roots, grid, older):
    write(roots[0], "planted", train_tokens=20_000)
    write(roots[0], "planted", train_tokens=30_000, protocol=older)
    assert f"protocol {older}" in refusal(read_runs, grid(train_tokens=[20_000, 30_000], seed=[42]))
    assert len(read_runs(grid(train_tokens=[20_000], seed=[42]))) == 1  # what is not asked for is in nobody's way
    assert f"protocol {older}" in refusal(read_runs, grid(train_tokens=[30_000], seed=[42]))


def test_committed_folders_stand_in_where_outputs_have_none_and_a_folder_in_a_folder_is_a_grid(roots):
    for label in "AB":
        write(roots[1], "search/g", label)
    assert load_runs("search/g")[["experiment", "source"]].values.tolist() == [["A", "committed"], ["B", "committed"]]
    assert len(load_table("search/g", "samples")) == 2 * (4 + 200 + 5) and len(run_folders("search/g")) == 2
    assert load_runs("g").empty and load_runs("search").empty
    write(roots[0], "search/g", "B")
    assert load_runs("search/g")[["experiment", "source"]].values.tolist() == [["B", "outputs"]]


# What a row holds


def test_a_row_holds_logarithms_of_what_is_fitted(roots, grid):
    write(roots[0], "planted", overfit_rate=0.2)
    write(roots[0], "planted", train_tokens=40_000, epochs_run=4, best_epoch=3)  # ended by the limit of epochs
    write(roots[0], "planted", train_tokens=80_000, epochs_run=11 / 3, best_epoch=5 / 3, overfit_rate=0.2)
    runs = read_runs(grid(train_tokens=[20_000, 40_000, 80_000], seed=[42]))
    assert runs["log_ppl"].tolist() == [5.0] * 3 and runs["val_loss"].tolist() == [6.0] * 3
    assert runs["log2_tokens"].diff()[1] == 1 and np.exp(runs["log_tokens"]).round().tolist()[:2] == [20_000, 40_000]
    fitted = [np.log(1.2), np.nan, np.log(1.2)]  # 11/3 - 5/3 is a little under 2
    assert runs["log_over_fitting"].tolist() == pytest.approx(fitted, nan_ok=True)


def test_what_a_grid_sweeps_beside_size_and_replicate_is_in_the_label(roots, grid):
    for (rate, size), seed in itertools.product([(0.001, 20_000), (0.002, 20_000), (0.002, 30_000)], (42, 43)):
        run = {"train_tokens": size, "seed": seed, "phase2_learning_rate": rate}
        write(roots[0], "planted", suffix=f"_phase2_learning_rate-{rate}", **run)
    runs = read_runs(grid(train_tokens=[20_000, 30_000], seed=[42, 43], phase2_learning_rate=[0.001, 0.002]))
    label = runs["phase2_learning_rate"].map("A, phase2_learning_rate {}".format)
    assert len(runs) == 6 and (runs["configuration"] == label).all() and set(runs["experiment"]) == {"A"}


def test_runs_of_one_label_in_two_grids_are_one_configuration_only_if_they_are_alike(roots, grid):
    grids = {"one": {}, "often": {"validations_per_epoch": 5}, "slow": {"phase2_learning_rate": 0.001}}
    files = {}
    for (name, parameters), size in zip(grids.items(), (20_000, 30_000, 40_000), strict=True):
        write(roots[1], name, train_tokens=size, **parameters)
        files[name] = grid({"A": parameters}, name, train_tokens=[size], seed=[42])
    assert set(read_runs(files["one"], files["often"])["configuration"]) == {"A"}
    apart = read_runs(files["one"], files["slow"])
    assert apart["configuration"].nunique() == 2 and apart["experiment"].nunique() == 1


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("dtype", "bfloat16", "float32"), ("device", "cpu", "cuda"), ("validations_per_epoch", 1, 4)],
)
def test_what_differs_by_the_way_is_a_configuration_only_where_the_same_run_has_both(name, one, other, roots, grid):
    asked = [[20_000, 42, one], [30_000, 42, other], [20_000, 42, other]]
    for size, seed, value in asked:
        write(roots[1], "planted", train_tokens=size, seed=seed, suffix=f"_{name}-{value}", **{name: value})
    apart = grid(**{f"train_tokens, seed, {name}": asked[:2]})
    assert read_runs(apart)["configuration"].tolist() == ["A", "A"]
    both = grid(**{f"train_tokens, seed, {name}": asked})
    assert set(read_runs(both)["configuration"]) == {f"A, {name} {one}", f"A, {name} {other}"}


# Replicates


@pytest.mark.parametrize(
    ("draws", "count"),
    [
        ([(42, 0, 0)], 1),
        ([(42, 0, 0), (43, 0, 0), (44, 0, 0)], 3),  # seeds on one text
        ([(42, 0, 1), (43, 1, 2), (44, 2, 3)], 3),
        ([(42, 0, 0), (43, 0, 0), (44, 1, 0), (45, 1, 0)], 2),  # texts, each with seeds of its own
        ([(*pair, 0) for pair in itertools.product((42, 43), (0, 1))], 1),  # crossed: nothing is independent
        ([(42, 0, 0), (43, 0, 0), (43, 1, 0), (44, 2, 0)], 2),  # 43 ties two texts together
        ([(42 + k, k + d, 0) for k in range(4) for d in (0, 1)], 1),  # each with the next
        ([(42, 0, 1), (43, 1, 1), (44, 2, 2)], 2),  # signs tie two texts together
        ([(42, 0, 5), (43, 1, 5)], 2),  # the same signs for all: held fixed
    ],
)
def test_replicates_share_neither_seed_nor_text_nor_signs(draws, count):
    names = ["seed", "data_seed", "embedding_seed"]
    runs = pd.DataFrame([(*draw, size) for size in (10, 20) for draw in draws], columns=[*names, "train_tokens"])
    runs = runs.sample(frac=1, random_state=0)  # in any order, under any index
    runs["replicate"] = replicates(runs)
    assert set(runs["replicate"]) == set(range(count))
    for name in [*names, names]:
        if isinstance(name, list) or runs[name].nunique() > 1:  # what all have in common ties nothing together
            assert (runs.groupby(name)["replicate"].nunique() == 1).all()


def test_replicates_are_numbered_over_all_grids_and_the_overview_counts(roots):
    for grid, label, seed in (("one", "A", 42), ("one", "A", 43), ("two", "B", 43)):
        for size in (20_000, 30_000):
            write(roots[0], grid, label, seed=seed, data_seed=seed - 42, train_tokens=size)
    runs = read_runs("one", "two")
    replicate = runs.groupby(["grid", "seed"])["replicate"].first()
    assert runs["replicate"].nunique() == 2 and replicate["one", 43] == replicate["two", 43]
    row = overview(runs).loc["one"]
    assert row[["runs read here", "replicates"]].tolist() == [4, 2]
    assert row["drawn anew in each"] == "seed, training text" and row["training tokens"] == "20,000, 30,000"
    short = overview(runs.assign(overfit_rate=0.2, log_over_fitting=[float("nan"), 0.2] * 3))
    assert short["ended by the limit of epochs"].tolist() == ["2 of 4", "1 of 2"]


# Losses by sample, and histories


def test_losses_come_by_run_and_sample(roots, grid):
    losses = np.random.default_rng(0).normal(5, 1, (3, 5))
    for k, loss in enumerate(losses):
        write(roots[1], "ab"[k % 2], seed=42 + k, losses={"test": loss})
    runs = read_runs(*(grid(name=name, train_tokens=[20_000], seed=[42, 43, 44]) for name in "ab"))
    sums, tokens = loss_sums(runs)
    assert tokens.tolist() == [50] * 5 and sums / 50 == pytest.approx(losses[runs["seed"] - 42])
    assert sums.sum(1) / tokens.sum() == pytest.approx(runs["log_ppl"])
    again, _ = loss_sums(runs.iloc[[2, 0, 2]])  # in any order, a run as often as it is asked for
    assert (again == sums[[2, 0, 2]]).all()
    assert loss_sums(runs, "val")[0] == pytest.approx(np.full((3, 4), 300.0))
    histories = read_histories(runs)
    assert len(histories) == 3 and histories["value"].tolist() == histories["val_loss"].tolist()
    assert histories["id"].is_unique


def test_losses_on_other_text_or_of_no_run_on_disk_are_none(roots, grid):
    write(roots[1], "a", seed=1)
    write(roots[1], "a", seed=2)
    short = write(roots[1], "fewer", seed=3, val_samples=3)
    folder = write(roots[1], "others", seed=4)
    table = pd.read_csv(folder / "samples.csv")
    table["sample"] += table["part"] == "val"
    table.to_csv(folder / "samples.csv", index=False)
    grids = {"a": {}, "fewer": {"val_samples": 3}, "others": {}}
    runs = read_runs(*(grid({"A": grids[name]}, name, train_tokens=[20_000], seed=[1, 2, 3, 4]) for name in grids))
    assert len(runs) == 4 and loss_sums(runs) is not None and loss_sums(runs, "val") is None
    for seeds, comparable in (([1, 3], False), ([1, 4], False), ([1, 2], True)):
        assert (loss_sums(runs[runs["seed"].isin(seeds)], "val") is not None) == comparable
    assert loss_sums(runs.assign(id="gone")) is None
    tables = {name: load_table("fewer", name) for name in TABLES}
    write_tables(short.parent, load_runs("fewer"), tables)  # whose integers, where one is missing, compare as nothing
    shutil.rmtree(short)
    assert loss_sums(runs[runs["seed"].isin([1, 3])], "val") is None


# Runs made by hand


def test_all_runs_of_a_folder_without_a_grid_file_are_read_and_told_apart(roots):
    assert "interactive" in refusal(read_runs, "interactive")
    write(roots[0], "interactive", "A")
    write(roots[0], "interactive", "num_layers-3", num_layers=3, seed=43)
    write(roots[0], "elsewhere", "A")
    runs = read_runs("interactive")
    assert runs["configuration"].tolist() == ["A", "num_layers-3"] and set(runs["planned"]) == {2}
    counted = overview(runs).loc["interactive", ["replicates", "drawn anew in each"]]
    assert counted.tolist() == [1, "nothing"]  # the seeds differ, but nothing was done twice
    assert len(read_runs("interactive", "elsewhere")) == 3
    write(roots[0], "twice", "A", validations_per_epoch=10, suffix="_often")
    write(roots[0], "twice", "A", stopped=True)
    runs = read_runs("twice")
    assert (runs["configuration"] == runs["run"] + runs["stopped"].map({True: ", stopped"}).fillna("")).all()
    assert overview(runs).loc["twice", "dtype"] == "float32"


# Published tables


def plant(root, seed=1, label="A", **metrics):
    """A run of numbers that no short decimal equals, and of parameters that only some runs have."""
    drawn = np.random.default_rng(seed).normal(5, 1, 5)
    usual = {"git_commit": COMMIT, "code_hash": "0" * 16, "versions": {"torch": "2.13.0", "numpy": "2"}}
    usual |= {"horizon": drawn[4], "stopped": True} if seed % 2 else {"resumed_after_epoch": 7}
    return write(root, "planted", label, {"test": drawn, "val": drawn[:4]}, seed=seed, **usual | metrics)


def everything(grid):
    """A grid's three tables, as comparable as can be: sources apart, all absent values one."""
    runs = load_runs(grid).drop(columns="source")
    runs["versions"] = [json.dumps(given) if isinstance(given, dict) else given for given in runs["versions"]]
    tables = {"runs": runs} | {name: load_table(grid, name) for name in TABLES}
    return {
        name: table.astype(object).where(table.notna(), None).sort_values("run", kind="stable", ignore_index=True)
        for name, table in tables.items()
    }


def assert_alike(tables, others):
    for name, table in tables.items():
        assert len(table) and {*table} == {*others[name]}
        pd.testing.assert_frame_equal(table, others[name][[*table]], check_exact=True)


def test_published_tables_give_every_value_back_and_later_runs_replace_their_rows_alone(roots, grid):
    asked = {"A": {}, "NA": {"model": "kneser-ney"}}  # a label is a text whatever it says
    file = grid(asked, train_tokens=[20_000], seed=[1, 2, 3, 4])
    for seed in (3, 1, 2):
        plant(roots[0], seed)
    (plant(roots[0], 4, "NA", model="kneser-ney") / "history.csv").write_text("phase,step,metric,value\n")
    written = everything("planted")
    published = publish(file)
    shutil.rmtree(roots[0])
    before = everything("planted")
    assert_alike(written, before)

    run = plant(roots[0], 2, val_loss=1.25, horizon_init=0.1).name
    changed = everything("planted")
    publish(file)
    shutil.rmtree(roots[0])
    for name, table in everything("planted").items():
        mine = table["run"] == run
        earlier = before[name][before[name]["run"] != run].reset_index(drop=True)
        assert_alike({name: earlier}, {name: table.loc[~mine, [*earlier]].reset_index(drop=True)})
        assert_alike({name: changed[name]}, {name: table.loc[mine, [*changed[name]]].reset_index(drop=True)})

    table = pd.read_csv(published / "runs.csv", dtype=str, keep_default_na=False)
    table.drop(columns="leak").to_csv(published / "runs.csv", index=False)  # runs that are older than a parameter stay
    plant(roots[0], 1)
    publish(grid(train_tokens=[20_000], seed=[1, 2]))  # what it no longer asks for goes
    shutil.rmtree(roots[0])
    assert [table["run"].nunique() for table in everything("planted").values()] == [2, 2, 2]


def test_the_table_of_published_runs_is_replaced_last(roots, grid, monkeypatch):
    """So that whoever is stopped in between names no run whose losses are not there."""
    order, replace = [], ctxlm.files.os.replace
    plant(roots[0])
    with monkeypatch.context() as patch:
        patch.setattr(ctxlm.files.os, "replace", lambda *paths: (order.append(paths[1].name), replace(*paths)))
        publish(grid(train_tokens=[20_000], seed=[1]))
    assert len(order) == 3 and order[-1] == "runs.csv"


def test_what_no_commit_made_or_another_protocol_judged_is_not_published(roots, grid):
    file = grid(train_tokens=[20_000], seed=[1, 2])
    plant(roots[1])
    assert f"GRID={file}" in refusal(publish, file)  # there are no runs of one's own
    plant(roots[0], seed=1)
    for commit in (None, f"{COMMIT}-dirty"):
        run = plant(roots[0], seed=2, git_commit=commit).name
        assert run in refusal(publish, file) and not (roots[1] / "planted" / "runs.csv").exists()
    plant(roots[0], seed=2)
    publish(file)
    plant(roots[0], seed=2, protocol=2)
    assert "protocol" in refusal(publish, file)


@pytest.mark.parametrize("grid", sorted(path.name for path in (ROOT / "data" / "results").iterdir()))
def test_every_committed_grid_is_whole_and_its_runs_are_what_their_names_say(tmp_path, monkeypatch, grid):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    runs, history, samples = load_runs(grid), load_table(grid, "history"), load_table(grid, "samples")
    assert len(runs) and runs["run"].is_unique and set(runs["source"]) == {"committed"}
    assert set(runs["protocol"]) == {PROTOCOL}
    parameters = "|".join(sorted(Experiment.model_fields, key=len, reverse=True))
    for run in runs.to_dict("records"):
        label, *pairs = re.split(rf"_({parameters})-", run["run"])
        assert label == run["experiment"]
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            assert run[name] == yaml.safe_load(value) or (value == "None" and run[name] != run[name])
    assert set(samples["run"]) == set(runs["run"])
    training = history[history["phase"] != "repeated"]  # which newer runs have, n-grams among them
    assert set(training["run"]) == set(runs.loc[runs["model"] != "kneser-ney", "run"])  # an n-gram is not trained
    assert set(history["run"]) <= set(runs["run"])
    assert history.notna().all(axis=None) and not samples.duplicated(["run", "part", "sample"]).any()
    sums = samples.groupby(["run", "part"])[["loss_sum", "tokens"]].sum().unstack("part")
    runs = runs.set_index("run").sort_index()
    for part in {"val", "test"} | ({"development"} if "development_tokens" in runs else set()):
        assert (sums["tokens", part] == runs[f"{part}_tokens"] - 1).all()
        mean = (sums["loss_sum", part] / sums["tokens", part]).astype(float)
        np.testing.assert_allclose(mean, runs[f"{part}_loss"], rtol=1e-5)
        np.testing.assert_allclose(np.exp(runs[f"{part}_loss"]), runs[f"{part}_ppl"], rtol=1e-5)


def test_a_recipe_is_named_by_all_three_of_its_settings():
    rows = [("none", 0.1, 1.0, 768), ("unigram", 0.01, 0.204, 768), ("unigram", 0.01, 0.5, 128)]
    rows += [("unigram", 0.1, 0.5, 128), ("none", 0.01, 1.0, 128), ("unigram", 0.01, 1.0, 128)]
    runs = pd.DataFrame(rows, columns=["output_bias", "phase2_init_std", "logit_scale", "embed_dim"])
    named = with_shape(runs.assign(num_layers=[6, 3, 6, 6, 6, 2]))
    assert [*named["recipe"]] == ["study", "stabilised", "stabilised", "other", "other", "other"]
    assert [*named["shape"].fillna("")] == ["A", "B", "A", "A", "A", ""]
