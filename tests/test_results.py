"""Runs on disk: what is written, what is refused, what survives a fault."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import ctxlm.files
from ctxlm.config import SOURCES, ConfigError, Experiment, code_hash
from ctxlm.corpus import PROTOCOL
from ctxlm.embeddings import data_hash
from ctxlm.files import ROOT
from ctxlm.results import (
    TABLES,
    YOUNGER,
    Stopwatch,
    check_runs,
    load_runs,
    load_table,
    load_val_losses,
    losses_by_sample,
    provenance,
    run_folder,
    run_folders,
    write_run,
)

HISTORY = pd.DataFrame([{"phase": "phase2", "step": 1, "metric": "val_loss", "value": 2.0}])


def write(folder, **metrics):
    own = {"experiment": "A", "train_tokens": 100, "seed": 42, "val_tokens": 4, "test_tokens": 3}
    own |= {"val_loss": 2.0, "val_ppl": 7.4}
    losses, samples = np.array([1.0, 2.0, 4.0], dtype=np.float32), np.array([7, 7, 8], dtype=np.int32)
    weights = {"w": torch.arange(6.0).reshape(2, 3).T}
    return write_run(folder, own | metrics, HISTORY, (losses, samples), (losses[1:], samples[1:]), weights)


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "results"))
    return tmp_path / "outputs", tmp_path / "results"


def test_a_run_comes_back_as_it_was_written(roots):
    folder = roots[0] / "g" / "A"
    write(folder, val_ppl=7.4)
    assert sorted(p.name for p in folder.iterdir()) == [
        "history.csv",
        "metrics.json",
        "model.safetensors",
        "test_by_sample.csv",
        "val_by_sample.csv",
        "val_losses.npz",
    ]
    runs = load_runs("g")
    assert runs[["run", "source", "experiment", "val_ppl"]].values.tolist() == [["A", "outputs", "A", 7.4]]
    assert load_table("g", "history.csv")[["run", "train_tokens", "metric", "value"]].values.tolist() == [
        ["A", 100, "val_loss", 2.0]
    ]
    by_sample = load_table("g", "val_by_sample.csv")
    assert by_sample[["sample", "loss_sum", "tokens"]].values.tolist() == [[7, 3.0, 2], [8, 4.0, 1]]
    by_sample = load_table("g", "test_by_sample.csv")
    assert by_sample[["sample", "loss_sum", "tokens"]].values.tolist() == [[7, 2.0, 1], [8, 4.0, 1]]
    assert load_file(folder / "model.safetensors")["w"].shape == (3, 2)
    with np.load(folder / "val_losses.npz") as file:
        assert file["loss"].tolist() == [1.0, 2.0, 4.0] and file["sample"].tolist() == [7, 7, 8]


def test_committed_results_stand_in_and_outputs_win(roots):
    outputs, results = roots
    write(results / "g" / "A", val_ppl=1.0)
    write(results / "g" / "B", experiment="B", val_ppl=2.0)
    write(outputs / "g" / "B", experiment="B", val_ppl=3.0)
    runs = load_runs("g").set_index("run")
    assert runs.loc["A", ["source", "val_ppl"]].tolist() == ["committed", 1.0]
    assert runs.loc["B", ["source", "val_ppl"]].tolist() == ["outputs", 3.0]


def test_a_run_that_names_no_protocol_is_of_the_first_and_a_folder_in_a_folder_is_a_grid(roots):
    for root, run, own in ((roots[1], "A", {}), (roots[1], "B", {"experiment": "B", "protocol": 2})):
        write(root / "protocol-1" / "g" / run, **own)
    runs = load_runs("protocol-1/g").set_index("run")
    assert runs["protocol"].to_dict() == {"A": 1, "B": 2} and set(runs["source"]) == {"committed"}
    assert len(load_table("protocol-1/g", "val_by_sample.csv")) == 4 and len(run_folders("protocol-1/g")) == 2
    assert load_val_losses("protocol-1/g", "A")["loss"].tolist() == [1.0, 2.0, 4.0]
    assert load_runs("g").empty and load_runs("protocol-1").empty
    check_runs("protocol-1/g")
    (roots[1] / "protocol-1" / "g" / "A" / "history.csv").write_text("")
    with pytest.raises(ConfigError, match=r"^A/history.csv of grid protocol-1/g is damaged \(.*\): restore it by git$"):
        load_table("protocol-1/g", "history.csv")


def test_an_unfinished_run_is_not_read(roots):
    write(roots[0] / "g" / "A").unlink()
    assert load_runs("g").empty and load_table("g", "history.csv").empty and load_table("g", "val_by_sample.csv").empty


def test_a_metrics_file_that_holds_no_run_is_named(roots):
    folder = roots[0] / "g" / "A"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"A/metrics.json of grid g is damaged \(it holds no run\): delete the run's"):
        load_runs("g")


def test_a_damaged_metrics_file_is_named(roots):
    write(roots[0] / "g" / "A").write_text('{"experiment": ', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"A/metrics.json of grid g is damaged .*: delete the run's metrics.json"):
        load_runs("g")


def test_a_metric_that_is_not_finite_is_refused_and_the_earlier_run_stays(roots):
    path = write(roots[0] / "g" / "A", val_ppl=1.0)
    with pytest.raises(ValueError, match="val_ppl = inf is not finite"):
        write(roots[0] / "g" / "A", val_ppl=float("inf"))
    assert json.loads(path.read_text())["val_ppl"] == 1.0


def test_a_full_disk_leaves_the_earlier_run_whole(roots, monkeypatch):
    folder = roots[0] / "g" / "A"
    path = write(folder, val_ppl=1.0)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def no_space(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctxlm.results.save_file", no_space)  # the last file that is written
    with pytest.raises(OSError, match="No space left"):
        write(folder, val_ppl=2.0)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert json.loads(path.read_text())["val_ppl"] == 1.0


def test_metrics_json_is_replaced_last(roots, monkeypatch):
    folder, order = roots[0] / "g" / "A", []
    replace = ctxlm.files.os.replace
    monkeypatch.setattr(
        ctxlm.files.os, "replace", lambda source, target: (order.append(target.name), replace(source, target))
    )
    write(folder)
    assert len(order) == 6 and order[-1] == "metrics.json"


def test_losses_by_sample_sum_in_double_precision():
    table = losses_by_sample(np.full(10**6, 0.1, dtype=np.float32), np.zeros(10**6, dtype=np.int32))
    assert table["loss_sum"].item() == pytest.approx(10**6 * float(np.float32(0.1)), rel=1e-9)


def test_provenance_says_with_what_a_run_was_made():
    own = Experiment()
    found = provenance(own, torch.device("cpu"), torch.bfloat16)
    assert found["params_hash"] == own.params_hash and found["code_hash"] == code_hash()
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16")
    assert set(own.model_dump()) <= set(found) and found["versions"]["torch"] == torch.__version__
    assert found["data_hash"] == data_hash(own)
    assert code_hash("kneser-ney") != code_hash() and not any("analysis" in name for name in SOURCES)


def test_the_stopwatch_adds_up_by_step():
    watch = Stopwatch()
    for _ in range(2):
        with watch("a"):
            pass
    with watch("b"):
        pass
    assert list(watch.seconds) == ["a_seconds", "b_seconds", "total_seconds"]
    assert 0 <= watch.seconds["a_seconds"] <= watch.seconds["total_seconds"]


def test_a_runs_folder_is_tried_before_the_work_starts(tmp_path):
    assert run_folder(tmp_path / "new" / "A") == tmp_path / "new" / "A"
    assert list((tmp_path / "new" / "A").iterdir()) == []
    for nothing in (None, "", "."):
        with pytest.raises(ConfigError, match=r"output_dir = .* is not possible: name a folder"):
            run_folder(nothing)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir = .* cannot be written to \(Not a directory\): name another"):
        run_folder(tmp_path / "file" / "A")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_run_that_cannot_be_written_says_where_why_and_what_to_do(roots, monkeypatch, error):
    def fail(*_arguments, **_options):
        raise error

    folder = roots[0] / "g" / "A"
    monkeypatch.setattr("ctxlm.results.save_file", fail)
    with pytest.raises(OSError) as caught:
        write(folder)
    sentence = f"{folder} cannot be written to (No space left on device): free some space there, or make it writable, "
    assert str(caught.value) == f"{sentence}and run it again"
    monkeypatch.undo()
    write(folder)
    monkeypatch.setattr("ctxlm.results.save_file", fail)
    with pytest.raises(OSError, match=r"; the earlier run there is untouched$"):
        write(folder)


@pytest.mark.parametrize("name", ["val_ppl", "val_loss", "train_tokens", "val_tokens", "seed"])
def test_a_metrics_file_without_a_number_that_counts_is_named(roots, name):
    path = write(roots[0] / "g" / "A")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    for value in ("7.4", None, float("nan"), float("inf"), -1, True, [1]) + ((0,) if name != "seed" else ()):
        path.write_text(json.dumps(metrics | {name: value}), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_runs("g")
        why = f"A/metrics.json of grid g is damaged ({name} = {value!r} is not possible): delete the run's metrics.json"
        assert str(caught.value) == f"{why} and run it again"
    del metrics[name]
    path.write_text(json.dumps(metrics), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"is damaged \(it has no {name}\): delete"):
        load_runs("g")


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_named(roots, name):
    path = write(roots[0] / "g" / "A").with_name(name)
    whole = path.read_bytes()
    damaged = [None, b"", b"\x89PNG\r\n\x1a\n\x00\xff", b"a,b\n1,2\n", whole[:-2], whole.replace(b".0", b"x")]
    if "by_sample" in name:  # of a history nothing tells how long it was
        damaged.append(whole[: whole.rindex(b"\n", 0, -1) + 1])
    if name == YOUNGER:  # older runs do not have it
        damaged.remove(None)
        path.unlink()
        assert load_table("g", name).empty
    for content in damaged:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_table("g", name)
        message = str(caught.value)
        assert message.startswith(f"A/{name} of grid g is damaged (") and "\n" not in message
        assert message.endswith("): delete the run's metrics.json and run it again")
        if content is None:  # Snakemake makes it again
            check_runs("g")
            continue
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_runs("g")
    write(roots[1] / "h" / "A").with_name(name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"A/{name} of grid h is damaged \(.*\): restore it by git$"):
        load_table("h", name)


def test_every_committed_result_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    results = ROOT / "data" / "results"
    for folder in sorted({path.parent.parent for path in results.rglob("metrics.json")}):
        grid = folder.relative_to(results).as_posix()
        runs, tables = load_runs(grid), [load_table(grid, name) for name in TABLES]
        assert (runs["protocol"] == (1 if grid.startswith("protocol-1/") else PROTOCOL)).all()
        assert len(runs) == len(list(folder.iterdir())) > 0 and set(runs["source"]) == {"committed"}
        assert set(tables[1]["run"]) == set(runs["run"]) >= set(tables[0]["run"])  # an n-gram has no history
        for run in runs.itertuples():
            by_token = load_val_losses(grid, run.run)  # committed for few
            assert by_token is None or by_token["loss"].astype(float).mean() == pytest.approx(run.val_loss, rel=1e-6)


HOLD = """
import sys
from pathlib import Path
from ctxlm.files import lock
held = lock(Path(sys.argv[1]))
held.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_process_own(tmp_path):
    folder = tmp_path / "A"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=r"^output_dir = .* is in use by another process: wait for that run"):
            run_folder(folder)
        assert run_folder(tmp_path / "B") == tmp_path / "B"
        other.stdin.close()
    assert run_folder(folder) == run_folder(folder) == folder  # a kernel may write there again
    assert not any(folder.iterdir())
