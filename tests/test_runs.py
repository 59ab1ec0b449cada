"""Which runs are read, under which names, as which replicates, and what of them cannot stand side by side."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis.runs import READABLE, loss_sums, overview, read_histories, read_runs, replicates
from ctxlm.config import ConfigError
from tests.planted import write


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Where finished runs are looked for: outputs and committed ones."""
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "committed"))
    return tmp_path / "outputs", tmp_path / "committed"


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


def test_a_run_that_the_grid_does_not_ask_for_is_not_read(roots, grid):
    for size in (20_000, 30_000):
        write(roots[0], "planted", train_tokens=size)
    runs = read_runs(grid(train_tokens=[20_000, 45_000], seed=[42]))
    assert runs["train_tokens"].tolist() == [20_000] and set(runs["planned"]) == {2}
    with pytest.raises(ConfigError, match="no finished run"):
        read_runs(grid(train_tokens=[45_000], seed=[42]))


@pytest.mark.parametrize("other", [{"embedding": "random"}, {"max_sample_tokens": 128}, {"max_sample_tokens": None}])
def test_a_run_of_other_parameters_than_the_file_gives_it_is_not_read(roots, grid, other):
    sizes = {"train_tokens": [20_000, 30_000], "seed": [42]}
    write(roots[0], "planted", train_tokens=20_000)
    write(roots[0], "planted", train_tokens=30_000, **other)
    assert read_runs(grid(**sizes))["train_tokens"].tolist() == [20_000]
    assert read_runs(grid({"A": other}, **sizes))["train_tokens"].tolist() == [30_000]


def test_a_size_may_be_asked_for_in_samples(roots, grid):
    write(roots[0], "planted", train_samples=25, train_tokens=4321, suffix="_few")
    asked = {"A": {"train_samples": 25, "train_tokens": None}}
    name = "A_train_tokens-4321_seed-42_few"
    (roots[0] / "planted" / name).rename(roots[0] / "planted" / "A_seed-42")
    assert read_runs(grid(asked, seed=[42]))["train_tokens"].tolist() == [4321]


def test_a_run_that_is_older_than_a_parameter_has_its_default(roots, grid):
    write(roots[1], "planted")
    write(roots[1], "planted", train_tokens=30_000, without=["output_bias"])
    write(roots[1], "planted", "KN", model="kneser-ney", dtype="float64")
    runs = read_runs(grid({"A": {}, "KN": {"model": "kneser-ney"}}, train_tokens=[20_000, 30_000], seed=[42]))
    assert len(runs) == 3 and set(runs["source"]) == {"committed"}
    assert set(runs["configuration"]) == {"A", "KN"}
    assert set(runs["output_bias"]) == {"none"}  # younger than one of the runs, and off when it was made
    assert set(runs["planned"]) == {4} and set(runs["id"]) == set("planted/" + runs["run"])


@pytest.mark.parametrize("older", [2, 1])
def test_runs_of_another_protocol_are_refused(roots, grid, older):
    file = grid(train_tokens=[20_000, 30_000], seed=[42])
    write(roots[0], "planted", train_tokens=20_000)
    write(roots[0], "planted", train_tokens=30_000, protocol=older)
    with pytest.raises(ConfigError, match=f"planted .*protocol {older}"):
        read_runs(file)
    assert len(read_runs(grid(train_tokens=[20_000], seed=[42]))) == 1  # what is not asked for is in nobody's way
    rest = grid(train_tokens=[30_000], seed=[42])
    if older in READABLE:
        assert set(read_runs(rest)["protocol"]) == {older}
    else:
        with pytest.raises(ConfigError, match=f"protocol {older}"):
            read_runs(rest)


def test_a_grid_without_runs_is_refused_with_what_to_do(roots, grid):
    with pytest.raises(ConfigError, match="make report GRID="):
        read_runs(grid(train_tokens=[20_000, 30_000], seed=[42, 43]))
    write(roots[1], "other")  # committed runs that no file plans
    with pytest.raises(ConfigError, match=r"grid 'other' does not exist: choose one of .*, study, "):
        read_runs("other")


def test_a_grid_counts_once(roots, grid):
    file = grid(train_tokens=[20_000], seed=[42])
    write(roots[0], "planted", train_tokens=20_000)
    assert len(read_runs(file, file)) == 1


# What a row holds


def test_a_row_holds_logarithms_of_what_is_fitted(roots, grid):
    write(roots[0], "planted", overfit_rate=0.2)
    write(roots[0], "planted", train_tokens=40_000, epochs_run=4, best_epoch=3)  # ended by the limit of epochs
    runs = read_runs(grid(train_tokens=[20_000, 40_000], seed=[42]))
    assert runs["log_ppl"].tolist() == [5.0, 5.0] and runs["val_loss"].tolist() == [6.0, 6.0]
    assert runs["log2_tokens"].diff()[1] == 1 and np.exp(runs["log_tokens"]).round().tolist() == [20_000, 40_000]
    assert runs["log_over_fitting"][0] == pytest.approx(np.log(1.2)) and np.isnan(runs["log_over_fitting"][1])


def test_what_a_grid_sweeps_beside_size_and_replicate_is_in_the_label(roots, grid):
    for (rate, size), seed in itertools.product([(0.001, 20_000), (0.002, 20_000), (0.002, 30_000)], (42, 43)):
        run = {"train_tokens": size, "seed": seed, "phase2_learning_rate": rate}
        write(roots[0], "planted", suffix=f"_phase2_learning_rate-{rate}", **run)
    runs = read_runs(grid(train_tokens=[20_000, 30_000], seed=[42, 43], phase2_learning_rate=[0.001, 0.002]))
    assert set(runs["configuration"]) == {"A, phase2_learning_rate 0.001", "A, phase2_learning_rate 0.002"}
    assert len(runs) == 6 and set(runs["experiment"]) == {"A"}
    assert set(runs[runs["train_tokens"] == 30_000]["configuration"]) == {"A, phase2_learning_rate 0.002"}
    label = runs["phase2_learning_rate"].map("A, phase2_learning_rate {}".format)
    assert (runs["configuration"] == label).all()


def test_runs_of_one_label_in_two_grids_are_one_configuration_only_if_they_are_alike(roots, grid):
    grids = {"one": {}, "after": {"train_loss_after_epoch": True}, "slow": {"phase2_learning_rate": 0.001}}
    files = {}
    for (name, parameters), size in zip(grids.items(), (20_000, 30_000, 40_000), strict=True):
        write(roots[1], name, train_tokens=size, **parameters)
        files[name] = grid({"A": parameters}, name, train_tokens=[size], seed=[42])
    assert set(read_runs(files["one"], files["after"])["configuration"]) == {"A"}
    apart = read_runs(files["one"], files["slow"])
    assert apart["configuration"].nunique() == 2 and apart["experiment"].nunique() == 1


def test_a_type_is_a_configuration_only_where_the_same_run_has_both(roots, grid):
    asked = [[20_000, 42, "bfloat16"], [30_000, 42, "float32"], [20_000, 42, "float32"]]
    for size, seed, dtype in asked:
        write(roots[1], "planted", train_tokens=size, seed=seed, dtype=dtype, suffix=f"_dtype-{dtype}")
    apart = grid(**{"train_tokens, seed, dtype": asked[:2]})
    assert read_runs(apart)["configuration"].tolist() == ["A", "A"]
    both = grid(**{"train_tokens, seed, dtype": asked})
    assert set(read_runs(both)["configuration"]) == {"A, dtype bfloat16", "A, dtype float32"}


# Replicates


@pytest.mark.parametrize(
    ("draws", "count"),
    [
        ([(42, 0, 0)], 1),
        ([(42, 0, 0), (43, 0, 0), (44, 0, 0)], 3),  # seeds on one text
        ([(42, 0, 0), (42, 1, 0)], 2),  # texts from one set of weights
        ([(42, 0, 1), (43, 1, 2), (44, 2, 3)], 3),
        ([(42, 0, 0), (43, 0, 0), (44, 1, 0), (45, 1, 0)], 2),  # texts, each with seeds of its own
        ([(*pair, 0) for pair in itertools.product((42, 43), (0, 1))], 1),  # crossed: nothing is independent
        ([(42, 0, 0), (43, 0, 0), (43, 1, 0), (44, 2, 0)], 2),  # 43 ties two texts together
        ([(42, 0, 0), (42, 0, 1), (42, 0, 2)], 3),  # signs alone
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


def test_replicates_are_numbered_over_all_grids(roots, grid):
    write(roots[1], "one", "A", seed=42)
    write(roots[1], "one", "A", seed=43)
    write(roots[1], "two", "B", seed=43)
    sweep = {"train_tokens": [20_000], "seed": [42, 43]}
    runs = read_runs(grid({"A": {}}, "one", **sweep), grid({"B": {}}, "two", **sweep)).set_index("id")["replicate"]
    assert runs.nunique() == 2
    assert runs["one/A_train_tokens-20000_seed-43"] == runs["two/B_train_tokens-20000_seed-43"]


def test_the_overview_counts(roots, grid):
    for seed, text in ((42, 0), (43, 1), (44, 2)):
        write(roots[0], "planted", seed=seed, data_seed=text)
        write(roots[0], "planted", seed=seed, data_seed=text, train_tokens=30_000)
    file = grid(train_tokens=[20_000, 30_000], **{"seed, data_seed": [[42, 0], [43, 1], [44, 2]]})
    for folder in (roots[0] / "planted").iterdir():
        text = {"42": 0, "43": 1, "44": 2}[folder.name[-2:]]
        folder.rename(folder.with_name(f"{folder.name}_data_seed-{text}"))
    row = overview(read_runs(file)).loc["planted"]
    assert row[["finished runs", "replicates"]].tolist() == [6, 3]
    assert row["drawn anew in each"] == "seed, text" and row["training tokens"] == "20,000, 30,000"


# Losses by sample, and histories


def test_losses_come_by_run_and_sample(roots, grid):
    rng = np.random.default_rng(0)
    losses = rng.normal(5, 1, (3, 5))
    for k, loss in enumerate(losses):
        write(roots[1], "ab"[k % 2], seed=42 + k, losses={"test": loss})
    runs = read_runs(*(grid(name=name, train_tokens=[20_000], seed=[42, 43, 44]) for name in "ab"))
    sums, tokens = loss_sums(runs)
    assert tokens.tolist() == [50] * 5 and sums / 50 == pytest.approx(losses[runs["seed"] - 42])
    assert sums.sum(1) / tokens.sum() == pytest.approx(runs["log_ppl"])
    again, _ = loss_sums(runs.iloc[[2, 0, 2]])  # in any order, a run as often as it is asked for
    assert (again == sums[[2, 0, 2]]).all()
    assert loss_sums(runs, "val")[0] == pytest.approx(np.full((3, 4), 300.0))


def test_losses_on_other_text_or_of_no_run_on_disk_are_none(roots, grid):
    write(roots[1], "a", seed=1)
    write(roots[1], "a", seed=2)
    write(roots[1], "fewer", seed=3, val_samples=3)
    folder = write(roots[1], "others", seed=4)
    table = pd.read_csv(folder / "samples.csv")
    table["sample"] += table["part"] == "val"
    table.to_csv(folder / "samples.csv", index=False)
    grids = {"a": {}, "fewer": {"val_samples": 3}, "others": {}}
    runs = read_runs(*(grid({"A": grids[name]}, name, train_tokens=[20_000], seed=[1, 2, 3, 4]) for name in grids))
    assert len(runs) == 4 and loss_sums(runs) is not None and loss_sums(runs, "val") is None
    for seed in (3, 4):
        assert loss_sums(runs[runs["seed"].isin([1, seed])], "val") is None
    assert loss_sums(runs[runs["seed"].isin([1, 2])], "val") is not None
    assert loss_sums(runs.assign(id="gone")) is None and loss_sums(runs.iloc[:0]) is None


def test_histories_carry_their_runs(roots, grid):
    for seed in (42, 43):
        write(roots[1], "a", seed=seed, losses={"val": seed / 10})
        write(roots[1], "b", seed=seed, losses={"val": seed / 20})
    files = (grid(name=name, train_tokens=[20_000], seed=[42, 43]) for name in "ab")
    histories = read_histories(read_runs(*files))
    assert len(histories) == 4 and histories["value"].tolist() == histories["val_loss"].tolist()
    assert histories["id"].is_unique


# Runs made by hand


def test_all_runs_of_a_folder_without_a_grid_file_are_read(roots):
    with pytest.raises(ConfigError, match=r"grid interactive has no finished run yet: run notebooks/02_experiment"):
        read_runs("interactive")
    write(roots[0], "interactive", "A")
    write(roots[0], "interactive", "num_layers-3", num_layers=3, seed=43)
    write(roots[0], "elsewhere", "A")
    runs = read_runs("interactive")
    assert runs["configuration"].tolist() == ["A", "num_layers-3"] and set(runs["planned"]) == {2}
    counted = overview(runs).loc["interactive", ["replicates", "drawn anew in each"]]
    assert counted.tolist() == [1, "nothing"]  # the seeds differ, but nothing was done twice
    assert len(read_runs("interactive", "elsewhere")) == 3


def test_runs_by_hand_that_nothing_else_tells_apart_are_told_apart(roots):
    write(roots[0], "interactive", "A", dtype="float32")
    write(roots[0], "interactive", "B", dtype="bfloat16")
    write(roots[0], "interactive", "KN", model="kneser-ney", dtype="float64")
    runs = read_runs("interactive")
    assert overview(runs).loc["interactive", "products"] == "bfloat16, float32, float64"
    assert dict(runs[["experiment", "configuration"]].values) == {
        "A": "A, dtype float32",
        "B": "B, dtype bfloat16",
        "KN": "KN",
    }
    write(roots[0], "twice", "A", val_every_steps=10, suffix="_often")
    write(roots[0], "twice", "A")
    assert read_runs("twice")["configuration"].nunique() == 2
