"""Runs on disk: what is written, what is refused, what survives a fault, and what is published of them."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import ctxlm.files
from ctxlm.analysis.runs import READABLE, TABLES, load_runs, load_table, publish
from ctxlm.config import MODULES, NOTEBOOKS, ConfigError, Experiment, code_hash, read_yaml
from ctxlm.corpus import PROTOCOL, Stream
from ctxlm.embeddings import data_hash
from ctxlm.files import ROOT
from ctxlm.metrics import losses_by_sample
from ctxlm.results import Stopwatch, git_commit, provenance, run_by_hand, run_folder, run_folders, write_run
from tests import planted

CPU = torch.device("cpu")
STREAM = Stream(np.array([11, 11, 257, 262], dtype=np.int32), np.array([7, 7, 7, 8], dtype=np.int32))
"""Of the tokens "," and " a" and " the": 1, 2 and 4 bytes."""
COMMIT = "1234567".ljust(40, "0")
"""Of digits alone, as a hash may be."""
HISTORY = pd.DataFrame([{"phase": "phase2", "step": 1, "metric": "val_loss", "value": 2.0}])


def write(folder, **metrics):
    usual = {"experiment": "A", "train_tokens": 100, "seed": 42, "val_loss": 2.0, "val_ppl": 7.4, "protocol": PROTOCOL}
    usual |= {"val_tokens": 4, "development_tokens": 3, "test_tokens": 3}
    losses, shorter = np.array([1.0, 2.0, 4.0], dtype=np.float32), Stream(STREAM.tokens[1:], STREAM.samples[1:])
    judged = {"val": (losses, STREAM), "development": (losses[1:], shorter), "test": (losses[1:], shorter)}
    return write_run(folder, usual | metrics, HISTORY, judged, {"w": torch.arange(6.0).reshape(2, 3).T})


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """As if the tree were as committed, without asking git, which takes long where notebooks differ."""
    monkeypatch.setattr("ctxlm.results.git_commit", lambda: COMMIT)


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "results"))
    return tmp_path / "outputs", tmp_path / "results"


# One run


def test_a_run_comes_back_as_it_was_written(roots):
    folder = roots[0] / "g" / "A"
    write(folder)
    files = ["history.csv", "metrics.json", "model.safetensors", "samples.csv", "val_losses.npz"]
    assert sorted(path.name for path in folder.iterdir()) == files
    runs = load_runs("g")
    assert runs[["run", "source", "experiment", "val_ppl"]].values.tolist() == [["A", "outputs", "A", 7.4]]
    assert runs["test_bytes"].tolist() == [6]
    assert runs["test_bits_per_byte"].tolist() == pytest.approx([6 / math.log(2) / 6])
    history, samples = load_table("g", "history"), load_table("g", "samples")
    assert [*history] == ["run", *TABLES["history"]] and [*samples] == ["run", *TABLES["samples"]]
    assert history.values.tolist() == [["A", "phase2", 1, "val_loss", 2.0]]
    assert samples.values.tolist() == [
        ["A", "val", 7, 3.0, 2, 3],
        ["A", "val", 8, 4.0, 1, 4],
        *(["A", part, *row] for part in ("development", "test") for row in ([7, 2.0, 1, 2], [8, 4.0, 1, 4])),
    ]
    assert load_file(folder / "model.safetensors")["w"].shape == (3, 2)
    with np.load(folder / "val_losses.npz") as file:
        assert file["loss"].tolist() == [1.0, 2.0, 4.0] and file["sample"].tolist() == [7, 7, 8]


def test_an_unfinished_run_is_not_read(roots):
    write(roots[0] / "g" / "A").unlink()
    assert load_runs("g").empty and all(load_table("g", name).empty for name in TABLES)


def test_committed_folders_stand_in_where_outputs_have_none_and_a_folder_in_a_folder_is_a_grid(roots):
    outputs, results = roots
    for label, ppl in (("A", 1.0), ("B", 2.0)):
        write(results / "search" / "g" / label, experiment=label, val_ppl=ppl)
    rows = load_runs("search/g")[["run", "source", "val_ppl"]].values.tolist()
    assert rows == [["A", "committed", 1.0], ["B", "committed", 2.0]]
    assert len(load_table("search/g", "samples")) == 12 and len(run_folders("search/g")) == 2
    assert load_runs("g").empty and load_runs("search").empty
    write(outputs / "search" / "g" / "B", experiment="B", val_ppl=3.0)
    assert load_runs("search/g")[["run", "source", "val_ppl"]].values.tolist() == [["B", "outputs", 3.0]]


def test_a_metric_that_is_not_finite_is_refused_and_the_earlier_run_stays(roots):
    path = write(roots[0] / "g" / "A", val_ppl=1.0)
    with pytest.raises(ValueError, match="val_ppl = inf"):
        write(roots[0] / "g" / "A", val_ppl=float("inf"))
    assert json.loads(path.read_text(encoding="utf-8"))["val_ppl"] == 1.0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_earlier_run_whole(roots, monkeypatch, error):
    def fail(*_arguments, **_options):
        raise error

    folder = roots[0] / "g" / "A"
    write(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("ctxlm.results.save_file", fail)  # the last file that is written
    with pytest.raises(OSError, match=f"{folder} .*No space left.*untouched"):
        write(folder, val_ppl=2.0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(OSError, match="No space left") as caught:
        write(folder.with_name("B"))
    assert "untouched" not in str(caught.value)


def test_metrics_json_is_replaced_last(roots, monkeypatch):
    order, replace = [], ctxlm.files.os.replace
    monkeypatch.setattr(
        ctxlm.files.os, "replace", lambda source, target: (order.append(target.name), replace(source, target))
    )
    write(roots[0] / "g" / "A")
    assert len(order) == 5 and order[-1] == "metrics.json"


def test_losses_by_sample_sum_in_double_precision():
    tokens = np.zeros(10**6 + 1, dtype=np.int32)
    table = losses_by_sample(np.full(10**6, 0.1, dtype=np.float32), Stream(tokens, tokens))
    assert table["loss_sum"].item() == pytest.approx(10**6 * float(np.float32(0.1)), rel=1e-9)


def test_provenance_holds_with_what_a_run_was_made():
    e = Experiment()
    record = provenance(e, CPU, torch.bfloat16)
    assert (record["device"], record["dtype"]) == ("cpu", "bfloat16") and record["code_hash"] == code_hash()
    assert record == record | e.model_dump(exclude={"device", "dtype"}) and record["protocol"] == PROTOCOL
    assert record["data_hash"] == data_hash(e) and record["versions"]["torch"] == torch.__version__
    assert set(MODULES) == set(NOTEBOOKS) and len({code_hash(model) for model in MODULES}) == 3  # networks share theirs
    assert not any("analysis" in name for names in MODULES.values() for name in names)


def test_the_hash_of_a_run_is_that_of_its_resolved_parameters():
    e = Experiment(device="auto", dtype="auto", train_tokens=100)
    record = json.loads(json.dumps(provenance(e, CPU, torch.float32)))
    again = Experiment.from_mapping({name: record[name] for name in Experiment.model_fields})
    assert again.params_hash == record["params_hash"] != e.params_hash
    assert again == e.model_copy(update={"device": "cpu", "dtype": "float32"})
    other = provenance(e, CPU, torch.bfloat16)
    assert other["params_hash"] != record["params_hash"]  # the type of the products decides numbers


def test_the_stopwatch_adds_up_by_step():
    watch = Stopwatch()
    for step in "aab":
        with watch(step):
            pass
    assert list(watch.seconds) == ["a_seconds", "b_seconds", "total_seconds"]
    assert 0 <= watch.seconds["a_seconds"] <= watch.seconds["total_seconds"]


def test_the_commit_is_dirty_where_a_file_differs_and_unchanged_files_are_filtered_once(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    (tmp_path / ".gitattributes").write_text("*.ipynb filter=counted\n", encoding="utf-8")
    (tmp_path / "a.ipynb").write_text("{}\n", encoding="utf-8")
    git("init", "--quiet")
    git("config", "filter.counted.clean", f"echo >>'{tmp_path}/filtered'; cat")
    git("add", ".gitattributes", "a.ipynb")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr("ctxlm.results.ROOT", tmp_path)
    os.utime(tmp_path / "a.ipynb", (1, 1))  # as after a clone, git does not know whether it is the same
    before = (tmp_path / "filtered").read_text()
    commits = {git_commit() for _ in range(3)}
    assert len(commits) == 1 and not commits.pop().endswith("-dirty")
    assert len((tmp_path / "filtered").read_text()) <= len(before) + 1
    (tmp_path / "a.ipynb").write_text("{1}\n", encoding="utf-8")
    assert git_commit().endswith("-dirty")
    monkeypatch.setattr("ctxlm.results.ROOT", tmp_path / "nowhere")
    assert git_commit() is None


# A run's folder

HOLD = """
import sys
from pathlib import Path
from ctxlm.files import take
print(take(Path(sys.argv[1]) / ".lock"), flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_process_own_till_it_dies(tmp_path):
    folder = tmp_path / "A"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with pytest.raises(ConfigError, match="output_dir = "):
            run_folder(folder)
        assert run_folder(tmp_path / "B") == tmp_path / "B"
        other.kill()
    assert run_folder(folder) == run_folder(folder) == folder  # a kernel may write there again
    with ThreadPoolExecutor(1) as another:  # and from another of its threads
        assert another.submit(run_folder, folder).result() == folder
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work_starts(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir = "):
        run_folder(tmp_path / "file" / "A")


# Published tables


def plant(root, grid="quick", seed=1, **metrics):
    """A run of numbers that no short decimal equals, and of parameters that only some runs have."""
    drawn = np.random.default_rng(seed).normal(5, 1, 5)
    usual = {"git_commit": COMMIT, "code_hash": "0" * 16, "versions": {"torch": "2.13.0", "numpy": "2"}}
    usual |= {"seed": seed, "horizon": drawn[4], "stopped": True} if seed % 2 else {"seed": seed, "train_samples": 7}
    return planted.write(root, grid, losses={"test": drawn, "val": drawn[:4]}, **usual | metrics)


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


def test_published_tables_give_every_value_back(roots):
    for seed in (3, 1, 2):
        plant(roots[0], seed=seed)
    written = everything("quick")
    assert publish("quick") == roots[1] / "quick"
    assert {path.name for path in (roots[1] / "quick").iterdir()} == {
        "runs.csv",
        *(f"{name}.parquet" for name in TABLES),
    }
    assert set(load_runs("quick")["source"]) == {"outputs"}
    shutil.rmtree(roots[0])
    assert set(load_runs("quick")["source"]) == {"committed"}
    assert_alike(written, everything("quick"))
    assert set(load_runs("quick")["git_commit"]) == {COMMIT}


def test_published_runs_replace_their_earlier_rows_and_keep_others(roots):
    for seed in (1, 2, 3):
        plant(roots[0], seed=seed)
    publish("quick")
    shutil.rmtree(roots[0])
    before = everything("quick")
    run = plant(roots[0], seed=2, val_loss=1.25, horizon_init=0.1).name
    changed = everything("quick")
    publish("quick")
    shutil.rmtree(roots[0])
    after = everything("quick")
    assert load_runs("quick").set_index("run").loc[run, ["val_loss", "horizon_init"]].tolist() == [1.25, 0.1]
    for name, table in after.items():
        mine = table["run"] == run
        earlier = before[name][before[name]["run"] != run].reset_index(drop=True)
        assert_alike({name: earlier}, {name: table.loc[~mine, [*earlier]].reset_index(drop=True)})
        assert_alike({name: changed[name]}, {name: table.loc[mine, [*changed[name]]].reset_index(drop=True)})


@pytest.mark.parametrize("commit", [None, f"{COMMIT}-dirty"])
def test_a_run_that_no_commit_made_is_not_published(roots, commit):
    plant(roots[0], seed=1)
    run = plant(roots[0], seed=2, git_commit=commit).name
    with pytest.raises(ConfigError, match=run):
        publish("quick")
    assert not roots[1].exists()


def test_nothing_is_published_of_a_grid_without_runs_of_ones_own(roots):
    plant(roots[1])
    with pytest.raises(ConfigError, match="GRID=quick"):
        publish("quick")


def test_a_grid_that_is_named_by_its_file_is_published_whole(roots, tmp_path):
    plant(roots[0], "mine")
    (tmp_path / "mine.yaml").write_text(json.dumps({"experiments": {"A": {}}}), encoding="utf-8")
    written = everything("mine")
    publish(str(tmp_path / "mine.yaml"))
    shutil.rmtree(roots[0])
    assert_alike(written, everything("mine"))


def test_a_run_without_a_history_leaves_numbers_numbers(roots):
    (plant(roots[0], seed=1, model="kneser-ney") / "history.csv").write_text("phase,step,metric,value\n")
    plant(roots[0], seed=2)
    assert load_table("quick", "history")["value"].dtype == float


COMMITTED = sorted(path.name for path in (ROOT / "data" / "results").iterdir())


@pytest.mark.parametrize("grid", COMMITTED)
def test_every_committed_grid_is_whole(tmp_path, monkeypatch, grid):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    runs, history, samples = load_runs(grid), load_table(grid, "history"), load_table(grid, "samples")
    assert len(runs) and runs["run"].is_unique and set(runs["source"]) == {"committed"}
    assert runs["protocol"].nunique() == 1 and set(runs["protocol"]) <= {*READABLE}
    assert set(samples["run"]) == set(runs["run"])
    assert set(history["run"]) == set(runs.loc[runs["model"] != "kneser-ney", "run"])  # an n-gram has no history
    assert history.notna().all(axis=None) and not samples.duplicated(["run", "part", "sample"]).any()
    sums = samples.groupby(["run", "part"])[["loss_sum", "tokens"]].sum().unstack("part")
    runs = runs.set_index("run").sort_index()
    for part in {"val", "test"} | ({"development"} if "development_tokens" in runs else set()):
        assert (sums["tokens", part] == runs[f"{part}_tokens"] - 1).all()
        mean = (sums["loss_sum", part] / sums["tokens", part]).astype(float)
        np.testing.assert_allclose(mean, runs[f"{part}_loss"], rtol=1e-5)


# Runs by hand

USUAL = {notebook: read_yaml(f"params/{notebook.replace('.ipynb', '.yaml')}") for notebook in NOTEBOOKS.values()}


def by_hand(notebook="02_experiment", **changed):
    """The experiment and the folder of a notebook's run with some of its defaults changed."""
    return run_by_hand(Experiment.from_mapping(USUAL[f"notebooks/{notebook}.ipynb"], changed), None)


@pytest.mark.parametrize(
    ("notebook", "changed", "name", "label"),
    [
        ("02_experiment", {}, "A", "A"),
        ("02_experiment", {"seed": 43, "num_layers": 3}, "num_layers-3_seed-43", "num_layers-3"),
        ("02_experiment", {"train_tokens": 5000, "seed": 43}, "train_tokens-5000_seed-43", "A"),  # a size and replicate
        ("02_experiment", {"experiment": "mine", "num_layers": 3}, "mine_num_layers-3", "mine"),
        ("02_experiment", {"corpus": "texts/my own.txt"}, "corpus-texts-my-own.txt", "corpus-texts-my-own.txt"),
        ("03_baseline", {}, "KN-4", "KN-4"),
        (
            "03_baseline",
            {"model": "lstm", "hidden_dim": 64, "seed": 1},
            "lstm_hidden_dim-64_seed-1",
            "lstm_hidden_dim-64",
        ),
    ],
)
def test_a_run_by_hand_is_named_after_what_differs_from_the_notebooks_defaults(roots, notebook, changed, name, label):
    settings, folder = by_hand(notebook, **changed)
    assert folder == roots[0] / "interactive" / name and folder.is_dir() and settings.experiment == label
    assert by_hand(notebook, **changed) == (settings, folder)


def test_a_long_name_is_cut_off_and_still_tells_runs_apart(roots):
    many = {name: 7 for name in ("phase1_batch_size", "phase2_batch_size", "val_samples", "test_samples")}
    many |= {"phase1_convergence_threshold": 0.5, "phase2_gradient_clip": 2.0, "data_seed": 3}
    (first, one), (second, other) = by_hand(**many), by_hand(**many | {"phase2_gradient_clip": 3.0})
    assert len(one.name) <= 120 and len(first.experiment) <= 60
    assert one != other and first.experiment != second.experiment


def test_a_run_of_other_parameters_stays_and_the_new_one_goes_beside_it(roots):
    settings, folder = by_hand(seed=43)
    write(folder, **provenance(settings, CPU, torch.float32))
    assert by_hand(seed=43)[1] == folder  # the same again, whatever `auto` became
    before = (folder / "metrics.json").read_bytes()
    other, beside = by_hand("03_baseline", seed=43)
    assert beside.name == "seed-43-2" and other.experiment == "KN-4"
    write(beside, **provenance(other, CPU, torch.float32))
    assert by_hand("03_baseline", seed=43)[1] == beside and by_hand(seed=43)[1] == folder
    assert (folder / "metrics.json").read_bytes() == before
    (folder / "metrics.json").write_text("{}", encoding="utf-8")  # of nobody knows what
    assert by_hand(seed=43)[1].name == "seed-43-3"


def test_a_folder_that_is_named_is_taken_unless_it_holds_a_run_of_other_parameters(roots, tmp_path, monkeypatch):
    folder, e, other = tmp_path / "mine", Experiment(num_layers=3), Experiment()
    assert run_by_hand(e, folder) == (e, folder)
    write(folder, **provenance(e, CPU, torch.float32))
    assert run_by_hand(e, folder) == (e, folder)
    with pytest.raises(ConfigError, match="output_dir = "):
        run_by_hand(other, folder)
    monkeypatch.setenv("CTXLM_PROGRESS", "lines")  # a batch, whose grid has changed
    assert run_by_hand(other, folder) == (other, folder)
    with pytest.raises(ConfigError, match="output_dir"):
        run_by_hand(e, "")
