"""A notebook of a batch: waited for, not done again, told of in a line; and how far a grid is."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import nbformat
import pytest
import yaml
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook

from ctxlm import batch
from ctxlm.batch import FAILURE, corpora, execute, is_finished, main, run_apart
from ctxlm.config import Experiment, code_hash, load_grid
from ctxlm.embeddings import data_hash
from ctxlm.files import ROOT
from tests.conftest import SMALL, held, refusal


@pytest.fixture
def folder(tmp_path, outputs):
    """A run's in a grid's folder."""
    (outputs / "grid" / "run").mkdir(parents=True)
    return outputs / "grid" / "run"


@pytest.fixture
def values(text, folder, empty_cache):
    """A run's parameters, of a small text."""
    return SMALL | {"phase1_learning_rate": 1e-05, "corpus": str(text), "output_dir": str(folder)}


def write_result(folder, values, **metrics):
    """What a finished run of today's code has in its metrics.json, as far as it counts."""
    run = Experiment.from_mapping({name: value for name, value in values.items() if name != "output_dir"})
    hashes = {"code_hash": code_hash(run.model), "data_hash": data_hash(run.corpus, run.judged_corpus, run.embedding)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(
        json.dumps(run.model_dump() | hashes | {"test_loss": 2.0, "test_ppl": 7.39} | metrics)
    )


@pytest.fixture
def papermill(folder, values, monkeypatch):
    """Stands for papermill: what it says and ends with, one time after the other; "done" writes the result."""

    def stand_for(*ends):
        calls = []

        def run(command, **options):
            line, code = ends[len(calls)]
            calls.append((command, options["env"]))
            options["stdout"].write(f"Traceback\n{line}\n\n")
            if line == "done":
                write_result(folder, values)
            elif line == "gone":
                (folder / "metrics.json").unlink()
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(batch.subprocess, "run", run)
        return calls

    return stand_for


def carry_out(folder, values, notebook="notebooks/x.ipynb", **options):
    return execute(str(notebook), folder / "experiment.ipynb", folder / "metrics.json", values, **options)


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        ("done", 0, ""),
        ("done", 1, ""),  # a kernel that dies once all is written
        ("ConfigError: no", 1, "ConfigError: no"),
        ("all is well", 0, "all is well"),  # papermill's word is not taken for it
        ("gone", 1, "gone"),  # whoever deletes a folder while its run is made has no result
        ("Executing Cell 5", -9, "memory"),
    ],
)
def test_why_a_notebook_failed_is_kept_in_a_line_until_it_succeeds(
    folder, values, papermill, line, code, why, monkeypatch
):
    write_result(folder, values, train_tokens=200)  # an earlier result is no success
    calls = papermill((line, code), ("done", 0))
    monkeypatch.setattr(sys, "executable", "/a folder/python")  # a space in it parts no words
    reason = carry_out(folder, values, threads=3)
    assert why in reason and bool(reason) == bool(why) and "\n" not in reason
    assert ((folder / FAILURE).read_text().strip() if why else "") == reason
    ((command, environment),) = calls
    assert environment["OMP_NUM_THREADS"] == "3" and environment["CTXLM_BATCH"] == "1"
    assert command[:3] == ["/a folder/python", "-m", "papermill"] and yaml.safe_load(command[-1]) == values
    assert carry_out(folder, values) == "" and not (folder / FAILURE).exists()


def test_a_full_disk_is_said_though_nothing_can_be_kept_there(folder, values, papermill, monkeypatch):
    def full(_path):
        raise OSError(28, "No space left on device")

    papermill(("database is locked", 1), ("done", 0))
    with monkeypatch.context() as patch:
        patch.setattr(batch, "atomic", full)
        patch.setattr(batch.shutil, "disk_usage", lambda _: Mock(free=2**20 - 1))
        assert "disk is full" in carry_out(folder, values)
    assert carry_out(folder, values) == ""  # once there is room


@pytest.mark.parametrize(
    ("metrics", "asked", "finished"),
    [
        ({}, {}, True),
        ({}, {"train_tokens": 200}, False),
        ({"code_hash": "other"}, {}, False),
        ({"data_hash": "other"}, {}, False),
        ({"dtype": "bfloat16"}, {"dtype": "auto"}, True),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, False),
    ],
    ids=str,
)
def test_which_result_is_that_of_a_run(folder, values, metrics, asked, finished):
    done = folder / "metrics.json"
    run = Experiment.from_mapping({name: value for name, value in values.items() if name != "output_dir"}, asked)
    assert not is_finished(done, run)
    write_result(folder, values, **metrics)
    assert is_finished(done, run) == finished


def test_a_loss_that_is_not_finite_is_no_failure_of_a_run_apart_all_else_is(folder, papermill):
    papermill(("NonFiniteLoss: Phase 2's loss is nan", 1), ("ConfigError: no", 1), ("", -9))
    assert run_apart(Experiment(), folder) == {}
    for reason in ("ConfigError: no", "memory"):
        message = refusal(run_apart, Experiment(), folder)
        assert message.startswith(f"{folder}: ") and reason in message


def test_a_free_gpu_is_the_only_one_that_is_seen(folder, values, papermill, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    calls = papermill(*[("", 1)] * 4)
    with FileLock(folder.parent.parent / f".gpu-{platform.node()}-3.lock"):  # grids and searches share the GPUs
        for device in ("auto", "cuda", "cpu"):
            carry_out(folder, values | {"device": device})
    carry_out(folder, {"model": "kneser-ney", "output_dir": str(folder)})  # counts
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in calls] == ["5", "5", "3,5", "3,5"]


@pytest.mark.parametrize(("lock", "succeeds"), [(".batch.lock", True), (".lock", False)])
def test_what_another_process_does_is_waited_for_and_not_done_again(folder, values, papermill, lock, succeeds):
    """As of a batch whose head was killed, but not its runs."""
    calls, reasons = papermill(("done", 0)), []
    with held(folder / lock):
        waiting = threading.Thread(target=lambda: reasons.append(carry_out(folder, values)))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and not calls
        if succeeds:
            write_result(folder, values)
    waiting.join(30)
    assert reasons == [""] and len(calls) == (0 if succeeds else 1)


def test_a_reader_that_was_killed_is_no_reason_to_stop():
    script = "import os, sys; from ctxlm.batch import print_line as p; sys.stdin.read(); p('a'); p('b'); os._exit(7)"
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=writer) as process:
        os.close(writer)
        os.close(reader)
        process.stdin.close()
        assert process.wait() == 7


@pytest.fixture
def grid(folder, values, tmp_path):
    """The file of a grid: one run is finished, three have results of other parameters or code, three have none."""
    results = {"done": {}, "failed": {"seed": 99}, "changed": {"seed": 99}, "older": {"code_hash": "other"}}
    labels = {label: {"seed": seed} for seed, label in enumerate([*results, "running", "run", "missing"])}
    common, file = {name: value for name, value in values.items() if name != "output_dir"}, tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"title": "t", "common": common, "experiments": labels}))
    asked = {label: run.for_notebook() for label, run in load_grid(str(file)).runs.items()}
    for label, other in results.items():
        write_result(folder.with_name(label), asked[label], **other)
    values |= asked["run"]
    return file


def test_runs_that_read_the_same_share_a_corpus_which_the_largest_stands_for():
    few, more = (Experiment(train_tokens=tokens, seed=tokens) for tokens in (100, 200))
    other = Experiment(train_tokens=100, corpus="sotu")
    assert corpora([more, few]) == {"corpus": more}
    assert corpora([few, other, more]) == {"corpus-1": more, "corpus-2": other}


def test_how_far_a_grid_is(folder, grid, capsys):
    for label in ("done", "failed"):  # the former was finished after it
        (folder.with_name(label) / FAILURE).write_text("NonFiniteLoss: nan\n")
    folder.with_name("missing").mkdir()  # as a cluster's job in the queue
    for label in ("running", "run"):
        folder.with_name(label).mkdir(exist_ok=True)
        (folder.with_name(label) / "experiment.log").write_text("Executing\nepoch 3: PPL 7.0\nExecuting\n")
    with held(folder.with_name("running") / ".batch.lock"):
        assert main(["--status", str(grid)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert f"{len(lines)} runs, " in head and {"3 to come", "1 failed"} <= {*head.split(", ")}
    states = {label: " ".join(rest) for label, *rest in map(str.split, lines)}
    assert states["done"].startswith("finished ") and "7.4" in states["done"]
    assert states["failed"].startswith("failed ") and "nan" in states["failed"]
    assert [states["running"], states["run"]] == ["running epoch 3: PPL 7.0", "stopped epoch 3: PPL 7.0"]
    assert all(states[label].startswith("to come") for label in ("changed", "older", "missing"))
    assert main(["--status", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err


def test_a_line_counts_the_runs_that_are_left_as_they_are_asked_for_today(
    folder, grid, values, papermill, monkeypatch, capsys
):
    monkeypatch.setenv("CTXLM_GRID", str(grid))
    papermill(("done", 0))
    command = ["x.ipynb", str(folder / "experiment.ipynb"), "--done", str(folder / "metrics.json")]
    command += ["--values", yaml.safe_dump(values)]
    assert main(command) == 0
    assert "5 of 7" in capsys.readouterr().out
    grid.write_text("title: {")  # it is being edited: that is no failure of a run
    assert main(command) == 0
    assert "of 7" not in capsys.readouterr().out


def test_results_of_other_parameters_or_code_are_to_be_made_anew(grid, outputs, capsys):
    assert main(["--check", str(grid)]) == 0
    anew = {f"{outputs}/grid/{label}/metrics.json" for label in ("failed", "changed", "older")}
    assert {*capsys.readouterr().out.split()} == anew


@pytest.mark.parametrize("lacking", [{"device": "cuda:99"}, {"embedding": "no/such.safetensors"}])
def test_a_grid_is_refused_whose_device_or_embedding_is_not_there(grid, lacking):
    file = yaml.safe_load(grid.read_text())
    grid.write_text(yaml.safe_dump(file | {"common": file["common"] | lacking}))
    assert str(*lacking.values()) in refusal(batch.check, str(grid))


def test_a_grid_is_refused_where_nothing_can_be_written(grid, outputs, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refusal(batch.check, str(grid)) == f"CTXLM_OUTPUTS = '{outputs}' cannot be written to: name another folder"


@pytest.mark.slow
def test_a_kernel_may_be_killed(folder, values, tmp_path):
    source = "import os, time; os.kill(os.getpid(), 9); time.sleep(60)"
    cells = [new_code_cell("output_dir = None", metadata={"tags": ["parameters"]}), new_code_cell(source)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path / "x.ipynb")
    reason = carry_out(folder, values, tmp_path / "x.ipynb")
    assert "memory" in reason and (folder / FAILURE).read_text().strip() == reason
