"""A run goes on where it was killed, or the disk was full: the same numbers as if nothing had happened."""

import signal
import subprocess
import sys

import pytest
import torch
import yaml

from ctxlm.config import Experiment
from ctxlm.files import ROOT
from ctxlm.run import Run, run
from tests.test_run import asked, assert_same_run, read

EPOCHS = {"phase2_epochs": 5, "phase2_patience": 5}


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def without_code(monkeypatch, without_text):
    """No source is read for a run's provenance: that takes longer than to write it."""
    monkeypatch.setattr("ctxlm.run.code_hash", lambda _: "0" * 16)


# Killed, and gone on with

KILLED = """
import os, signal, sys, torch, yaml
from ctxlm import files, run
from ctxlm.config import Experiment

place, folder, values = sys.argv[1:]
run.git_commit, save, replace = (lambda: None), torch.save, os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_saved(state, path):
    if place == "while a checkpoint is written" and state["validations"] == 2:
        path.write_bytes(b"half")
        die()
    save(state, path)

def half_written(source, target):
    if place == "while the run is written" and target.name == "metrics.json":
        die()
    replace(source, target)

def follow(history):
    if place == "before a checkpoint" and history[-1]["step"] == 4:
        die()

torch.save, files.os.replace = half_saved, half_written
run.run(Experiment.from_mapping(yaml.safe_load(values)), folder, follow)
"""
PLACES = {"while a checkpoint is written": 0, "before a checkpoint": 1, "while the run is written": 3}
"""Where a process is killed: the epoch after which it has gone on itself."""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["context", pytest.param("lstm", marks=pytest.mark.night)])
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(model, text, tmp_path):
    values, often = asked(model, text) | EPOCHS, tmp_path / "often"
    for place, after in PLACES.items():
        command = [sys.executable, "-c", KILLED, place, str(often), yaml.safe_dump(values)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert f"goes on after epoch {after}," in process.stdout or not after
        assert not (often / "metrics.json").exists()
    for folder in (often, tmp_path / "whole"):
        run(Experiment.from_mapping(values), folder)
    assert read(often)["resumed_after_epoch"] == 5 and "resumed_after_epoch" not in read(tmp_path / "whole")
    assert_same_run(often, tmp_path / "whole")
    assert not [*often.glob("*checkpoint*")]  # nor half-written ones


def test_what_a_runs_checkpoint_depends_on(tmp_path, without_code):
    def changed(**change):
        this = Run(Experiment(device="cpu", dtype="float32"), tmp_path)
        this.provenance.update(change)
        return this.checkpoint

    others = {"seed": 43, "code_hash": "other", "data_hash": "other", "device_name": "a GPU"}
    for name, value in (others | {"dtype": "bfloat16", "versions": {"torch": "9"}}).items():
        assert changed(**{name: value}) != changed(), name
    assert changed(git_commit="other", threads=9, device="cuda:1") == changed()  # one GPU of two, which are alike


# A full disk


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_disk_that_is_full_for_a_while_costs_a_run_its_checkpoints_and_no_bit(
    error, text, tmp_path, monkeypatch, capsys
):
    """Which torch says in two ways: where the file cannot be made, and where it is cut off."""
    e, save, failed = Experiment.from_mapping(asked("lstm", text), EPOCHS), torch.save, []

    def full(state, path):
        if 2 <= state["validations"] < 5:
            failed.append(path.write_bytes(b"half"))
            raise error
        save(state, path)

    run(e, tmp_path / "run")
    monkeypatch.setattr(torch, "save", full)
    run(e, tmp_path / "full")
    assert len(failed) == 3 == capsys.readouterr().out.count(str(tmp_path / "full" / "checkpoint.pt"))
    assert_same_run(tmp_path / "full", tmp_path / "run")
