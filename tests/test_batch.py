"""A notebook of a batch: waited for, tried again, told of in a line; and how far a grid is."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import yaml

from ctxlm import batch
from ctxlm.batch import FAILURE, execute, failures, main, status
from ctxlm.files import ROOT

DEAD = "DeadKernelError: Kernel died"


RESULT = {"test_loss": 2.0, "train_tokens": 5, "model": "context", "code_hash": "new"}


@pytest.fixture
def papermill(tmp_path, monkeypatch):
    """Stands for papermill: what it says and ends with, one time after the other; "done" writes the result."""

    def stand_for(*ends):
        calls = []

        def run(command, **options):
            line, code = ends[len(calls)]
            calls.append((command, options["env"]))
            options["stdout"].write(f"Traceback\n{line}\n\n")
            if line == "done":
                (tmp_path / "run" / "metrics.json").write_text(json.dumps(RESULT))
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(batch.subprocess, "run", run)
        return calls

    return stand_for


def carried_out(tmp_path, **options):
    folder = tmp_path / "run"
    values = {"seed": 42, "phase1_learning_rate": 1e-05}
    return execute("notebooks/x.ipynb", folder / "experiment.ipynb", folder / "metrics.json", values, "run", **options)


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ([("done", 0)], ""),
        ([("done", 1)], ""),  # a kernel that dies once all is written
        ([(DEAD, 1), ("done", 0)], ""),
        ([("Executing Cell 5", -9), ("done", 0)], ""),
        ([("RuntimeError: Kernel didn't respond in 60 seconds", 1), ("done", 0)], ""),
        ([("ConfigError: no", 1)], "ConfigError: no"),
        ([("NonFiniteLoss: nan", 1)], "NonFiniteLoss: nan"),
        ([("all is well", 0)], "all is well"),  # papermill's word is not taken for it
        ([(DEAD, 1)] * 2, "memory"),
        ([("Executing Cell 5", -9)] * 2, "memory"),
    ],
)
def test_what_may_succeed_is_tried_once_more(tmp_path, papermill, ends, why):
    calls = papermill(*ends)
    found = carried_out(tmp_path, threads=3)
    assert why in found and bool(found) == bool(why) and len(calls) == len(ends)
    for command, environment in calls:
        assert environment["OMP_NUM_THREADS"] == "3" and environment["CTXLM_PROGRESS"] == "lines"
        assert yaml.safe_load(command[-1]) == {"seed": 42, "phase1_learning_rate": 1e-05}
    assert (tmp_path / "run" / FAILURE).exists() == bool(why)


def test_a_failure_is_forgotten_once_it_succeeds_and_an_earlier_result_is_no_success(tmp_path, papermill):
    papermill(("done", 0), ("ConfigError: no", 1), ("done", 0))
    assert carried_out(tmp_path) == ""
    assert carried_out(tmp_path) == "ConfigError: no" and failures(tmp_path, ["run"]) == {"run": "ConfigError: no"}
    time.sleep(0.01)
    assert carried_out(tmp_path) == "" and failures(tmp_path, ["run"]) == {}


def test_a_run_that_succeeded_leaves_no_checkpoint(tmp_path, papermill):
    papermill(("ConfigError: no", 1), ("done", 0))
    states = tmp_path / "run" / ".checkpoints"
    states.mkdir(parents=True)
    assert carried_out(tmp_path) and states.exists()
    assert not carried_out(tmp_path) and not states.exists()


def test_a_free_gpu_is_the_only_one_that_is_seen(tmp_path, papermill):
    calls = papermill(("done", 0))
    carried_out(tmp_path, gpus=["0", "1"])
    assert calls[0][1]["CUDA_VISIBLE_DEVICES"] == "0"


HOLD = """
import sys
from pathlib import Path
from ctxlm.files import take
take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("lock", [".batch.lock", ".lock"])
@pytest.mark.parametrize("it_succeeds", [True, False])
def test_what_another_process_does_is_waited_for_and_not_done_again(tmp_path, papermill, capsys, lock, it_succeeds):
    """As of a batch whose head was killed, but not its runs."""
    calls = papermill(("done", 0))
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / lock)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        found = []
        waiting = threading.Thread(target=lambda: found.append(carried_out(tmp_path)))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and not calls
        if it_succeeds:
            (folder / "metrics.json").write_text("{}")
        other.kill()
        waiting.join(30)
    assert found == [""] and len(calls) == (0 if it_succeeds else 1)
    assert "waits for" in capsys.readouterr().out


def test_nobody_who_reads_is_no_reason_to_stop(tmp_path):
    """The lines go to a pipe whose reader was killed."""
    script = "import time; time.sleep(0.3); from ctxlm.batch import say; say('a'); say('b'); import os; os._exit(7)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait() == 7


def test_a_terminal_that_is_gone_is_no_reason_to_stop(tmp_path):
    script = "import sys; from ctxlm.batch import say; sys.stdin.read(); say('a'); say('b'); import os; os._exit(7)"
    master, slave = os.openpty()
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=slave) as process:
        os.close(slave)
        os.close(master)
        process.stdin.close()
        assert process.wait() == 7


def test_a_run_that_was_made_with_other_code_than_its_grid_is_none_of_it(tmp_path, papermill, monkeypatch):
    papermill(("done", 0), ("done", 0))
    for code in ("old", "new"):
        monkeypatch.setenv("CTXLM_CODE", json.dumps({"context": code, "lstm": "other"}))
        found = carried_out(tmp_path)
        assert ("the code was changed" in found) == (code == "old") == bool(failures(tmp_path, ["run"]))
        time.sleep(0.01)


def test_how_far_a_grid_is(tmp_path, outputs, capsys):
    grid = {"experiments": {label: {"seed": seed} for seed, label in enumerate("ABCDE")}, "title": "five"}
    (tmp_path / "five.yaml").write_text(yaml.safe_dump(grid | {"common": {"train_tokens": 100}}))
    home = outputs / "five"
    for name in "ABCDE":
        (home / name).mkdir(parents=True)
    for name, seed in (("A", 0), ("B", 1), ("E", 7)):  # E's is of an earlier file of the grid
        known = {"seed": seed, "test_loss": 2.0, "train_tokens": 100}
        (home / name / "metrics.json").write_text(json.dumps(known))
    (home / "B" / FAILURE).write_text("NonFiniteLoss: nan\n")
    for name in "CD":
        (home / name / "experiment.log").write_text("Executing\nepoch 3: validation PPL 7.0\nExecuting\n")
    command = [sys.executable, "-c", HOLD, str(home / "C" / ".lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        head, *lines = status(str(tmp_path / "five.yaml"))
        other.stdin.close()
    states = {line.split()[0]: line for line in lines}
    for name, words in {
        "A": "finished  test PPL 7.4",
        "B": "failed",
        "C": "running",
        "D": "stopped",
        "E": "to come   what is there is of other parameters",
    }.items():
        assert words in states[name]
    assert "epoch 3: validation PPL 7.0" in states["C"] and "nan" in states["B"] and "5 runs" in head
    assert main(["--status", str(tmp_path / "five.yaml")]) == 0 and "5 runs" in capsys.readouterr().out
    assert main(["--status", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err
