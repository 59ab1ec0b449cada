"""A run goes on where it was killed, or the disk was full: the same numbers as if nothing had happened."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxlm import checkpoints as module
from ctxlm import phase1
from ctxlm.checkpoints import Checkpoints
from ctxlm.config import Experiment
from ctxlm.corpus import load_corpus
from ctxlm.files import CHECKPOINTS, ROOT, atomic, cached_arrays
from ctxlm.phase1 import shape_contexts
from ctxlm.results import run_checkpoints, run_folder
from tests.conftest import short_paragraphs, stream, tiny
from tests.test_results import write
from tests.test_trainer import KINDS, assert_same, trainer

STATE = {"weights": [torch.arange(6.0).reshape(2, 3)], "epoch": 1}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def lines(monkeypatch):
    """What it tells whoever reads the log."""
    lines = []
    monkeypatch.setattr(module, "say", lines.append)
    return lines


# A state on disk

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=4)
kinds = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])
tensors = st.builds(lambda shape, kind: torch.ones(shape).to(kind), st.lists(st.integers(1, 3), max_size=3), kinds)
states = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@given(states.filter(lambda state: state is not None))
@settings(max_examples=50, deadline=None)
def test_any_state_comes_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("states")
    Checkpoints(folder, "key").save(3, {"inf": math.inf, "state": state})
    result = Checkpoints(folder, "key").load()
    assert result["inf"] == math.inf and equal(result["state"], state)


def test_a_tensor_that_occurs_twice_is_written_once(tmp_path):
    large = torch.ones(100_000)
    Checkpoints(tmp_path, "key").save(1, {"weights": [large], "means": [large]})
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 450_000


def test_the_latest_two_are_kept(tmp_path):
    saved = Checkpoints(tmp_path, "key")
    for step in range(1, 12):
        saved.save(step, STATE | {"epoch": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0010.safetensors", "0011.safetensors"]
    assert Checkpoints(tmp_path, "key").load()["epoch"] == 11


def test_of_a_damaged_one_the_one_before_is_gone_on_from(tmp_path, lines):
    """As a power failure leaves it: whole in length alone."""
    saved = Checkpoints(tmp_path, "key")
    for step in (1, 2):
        saved.save(step, STATE | {"epoch": step})
    (tmp_path / f".0003-{'0f' * 16}.safetensors").write_bytes(b"half")  # of a killed writer
    path = tmp_path / "0002.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    assert saved.load()["epoch"] == 1 and len(lines) == 1


def test_one_of_another_key_is_not_gone_on_from_and_leaves_no_trace(tmp_path, lines):
    Checkpoints(tmp_path, "key").save(5, STATE)
    other = Checkpoints(tmp_path, "another")
    assert other.load() is None and len(lines) == 1
    other.save(1, STATE)
    assert other.load()["epoch"] == 1 and len([*tmp_path.iterdir()]) == 1


def test_what_takes_long_to_write_is_written_less_often(tmp_path, monkeypatch):
    """2 % of the time at most, on a disk that takes two seconds a state; one that is quick has every step."""
    clock, written = [0.0], []

    def slow(state, path, head):
        clock[0] += 2.0
        path.write_bytes(b"")
        written.append(clock[0])

    monkeypatch.setattr(module, "save_file", slow)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    saved = Checkpoints(tmp_path, "key")
    for step in range(100):
        clock[0] += 10.0
        saved.save(step, STATE)
    assert len(written) > 5 and 2.0 * len(written) <= 0.02 * clock[0]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"num_layers": 3}, False),
        ({"seed": 43}, False),
        ({"code_hash": "other"}, False),
        ({"data_hash": "other"}, False),
        ({"device_name": "a GPU"}, False),
        ({"versions": {"torch": "9"}}, False),
        ({"device": "cuda:1"}, True),  # one GPU of two, which are alike
        ({"git_commit": "other", "threads": 9}, True),
    ],
    ids=str,
)
def test_what_a_runs_checkpoints_depend_on(tmp_path, change, same):
    record = Experiment.from_mapping({"train_tokens": 100}).model_dump() | {
        "protocol": 2, "code_hash": "c", "data_hash": "d", "device_name": "x", "versions": {"torch": "2"}, "threads": 1
    }  # fmt: skip
    assert (run_checkpoints(tmp_path, record).key == run_checkpoints(tmp_path, record | change).key) is same


# Killed, and gone on with


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_training_that_was_killed_after_an_epoch_ends_with_the_same_bits(kind, epoch, one_thread, tmp_path):
    def kill(rows):
        if rows[-1]["step"] == epoch:
            raise Killed

    whole, killed, again = trainer(kind), trainer(kind), trainer(kind)
    expected = whole.run()
    with pytest.raises(Killed):
        killed.run(kill, Checkpoints(tmp_path, kind))
    result = again.run(checkpoints=Checkpoints(tmp_path, kind))
    assert_same(again, result, whole, expected)
    assert result.resumed == result.summary()["resumed_after_epoch"] == epoch
    assert "resumed_after_epoch" not in expected.summary()


def test_a_training_that_was_over_when_killed_is_not_done_again(tmp_path):
    first, again = trainer("study"), trainer("study")
    expected = first.run(checkpoints=Checkpoints(tmp_path, "key"))
    again.run_epoch = None
    assert_same(again, again.run(checkpoints=Checkpoints(tmp_path, "key")), first, expected)


SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8, "train_tokens": 200, "phase1_batch_size": 64}


def shaped(**parameters):
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 6, "phase1_min_iterations": 6}, parameters)
    model = tiny(**SHAPE)
    return model, shape_contexts(model, stream(200), settings)


@pytest.mark.parametrize("iteration", [2, 4, 6])
def test_phase1_that_was_killed_after_an_iteration_ends_with_the_same_bits(
    iteration, one_thread, tmp_path, monkeypatch
):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "one"))
    model, expected = shaped()

    def kill(line):
        if line.startswith(f"iteration {iteration + 1}" if iteration < 6 else "iteration 6"):
            raise Killed

    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(phase1, "say", kill)
        with pytest.raises(Killed):
            shaped()
    lines = []
    monkeypatch.setattr(phase1, "say", lines.append)
    again, result = shaped(phase2_learning_rate=0.5, experiment="other")  # another run's, which shares it
    assert lines[0].startswith("goes on after iteration") and len(lines) == 1 + 6 - min(iteration, 5)
    assert [row for row in result.phase1.history if row["metric"] != "seconds"] == [
        row for row in expected.phase1.history if row["metric"] != "seconds"
    ]
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    assert all(torch.equal(result.spectra[name], expected.spectra[name]) for name in expected.spectra)
    assert [path.suffix for path in (tmp_path / "other").iterdir()] == [".npz"]


RUN = {
    "embedding": "random", "embed_dim": 16, "context_dim": 16, "num_layers": 2, "train_tokens": 600, "val_samples": 2,
    "development_samples": 2, "test_samples": 2, "phase2_epochs": 4, "phase2_batch_size": 64, "output_bias": "unigram",
    "device": "cpu", "dtype": "float32", "phase2_weight_average": 0.9, "phase2_shuffle": True,
}  # fmt: skip
NO_NETWORKS = {"context_dim", "phase2_shuffle"}
"""Parameters that 03_baseline does not have."""
NETWORK = {"model": "lstm", "hidden_dim": 16, "window": 8, "phase2_learning_rate": 0.001}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", ["02_experiment", "03_baseline"])
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(notebook, tmp_path):
    """kill -9 of the whole group as soon as another epoch is on disk; the same command each time."""
    text = short_paragraphs(tmp_path / "text.txt", count=60)
    values = {name: value for name, value in RUN.items() if notebook == "02_experiment" or name not in NO_NETWORKS}
    values |= {"corpus": str(text)} | (NETWORK if notebook == "03_baseline" else {})

    def start(folder):
        command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(tmp_path / "out.ipynb")]
        command += ["--cwd", ".", "-k", "python3", "-y", yaml.safe_dump(values | {"output_dir": str(folder)})]
        environment = os.environ | {"CTXLM_CACHE": str(tmp_path / folder.name / "cache"), "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet)

    whole, often = tmp_path / "whole" / "run", tmp_path / "often" / "run"
    assert start(whole).wait() == 0
    for epoch in (1, 2, 4):
        process = start(often)
        while not (often / ".checkpoints" / f"000{epoch}.safetensors").exists() and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not (often / "metrics.json").exists():  # the last kill may come too late
        assert start(often).wait() == 0
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, often))
    unlike = {name for name in first | second if first.get(name) != second.get(name) and "seconds" not in name}
    assert unlike <= {"resumed_after_epoch", "phase1_cached", "git_commit"}
    tables = [pd.read_csv(folder / "history.csv").query("metric != 'seconds'") for folder in (whole, often)]
    pd.testing.assert_frame_equal(*tables)
    assert (whole / "samples.csv").read_bytes() == (often / "samples.csv").read_bytes()
    weights, others = (load_file(folder / "model.safetensors") for folder in (whole, often))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert not (often / ".checkpoints").exists()


# What killed writers leave


def test_leftovers_of_killed_writers_are_cleared(tmp_path):
    folder, name = tmp_path / "run", f"-{'0f' * 16}"
    with suppress(KeyboardInterrupt), atomic(folder / "metrics.json") as path:
        path.write_bytes(b"half")
        (folder / f".model{name}.safetensors").touch()
        raise KeyboardInterrupt
    (folder / CHECKPOINTS).mkdir()
    assert {path.name for path in run_folder(folder).iterdir()} == {CHECKPOINTS, ".lock"}
    for leftover in (".a.npz.lock", f".a{name}.npz"):
        (tmp_path / leftover).touch()
    cached_arrays(tmp_path / "a.npz", lambda: {"x": np.ones(3)})
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.npz"}


def test_a_batch_that_is_killed_once_the_run_is_written_has_its_last_epoch_to_go_on_from(tmp_path, monkeypatch):
    """Snakemake deletes what such a job has made."""
    for progress in ("lines", ""):
        monkeypatch.setenv("CTXLM_PROGRESS", progress)
        Checkpoints(tmp_path / CHECKPOINTS, "key").save(1, STATE)
        write(tmp_path)
        assert (tmp_path / CHECKPOINTS).exists() is (progress == "lines")


# A full disk: a real one


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, 64 MB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, but: int = 0) -> Path:
    """Leave so many pages free."""
    free = os.statvfs(disk)
    with (disk / "full").open("wb", buffering=0) as file:
        file.write(bytes(free.f_bsize * max(free.f_bavail - but, 0)))
    return disk / "full"


@pytest.mark.parametrize("pages", [0, 1, 9, 20])
def test_a_full_disk_costs_a_training_its_checkpoints_and_no_bit(disk, one_thread, pages):
    whole, other = trainer("study"), trainer("study")
    expected = whole.run()
    fill(disk, pages)
    assert_same(other, other.run(checkpoints=Checkpoints(disk / "states", "key")), whole, expected)
    assert all(path.stat().st_size for path in (disk / "states").glob("*")) or not pages


@pytest.mark.filterwarnings("ignore:.*cannot be kept")
@pytest.mark.parametrize("pages", [0, 3])
def test_a_full_disk_costs_a_corpus_and_phase1_their_cache_and_no_bit(disk, tmp_path, monkeypatch, one_thread, pages):
    text = short_paragraphs(tmp_path / "text.txt")

    def made(cache):
        monkeypatch.setenv("CTXLM_CACHE", str(cache))
        return [torch.from_numpy(load_corpus(str(text)).tokens), *shaped()[0].state_dict().values()]

    expected = made(tmp_path / "cache")
    fill(disk, pages)
    assert all(map(torch.equal, made(disk), expected))
    (disk / "full").unlink()
    assert all(map(torch.equal, made(disk), expected))


def test_a_run_that_has_any_amount_of_room_is_whole_or_the_earlier_one_is(disk):
    folder = disk / "run"
    write(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcomes = []
    for pages in range(12):
        full = fill(disk, pages)
        try:
            write(folder, seed=43)
            outcomes.append(True)
        except OSError as error:
            assert "free some space" in str(error)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
            outcomes.append(False)
        full.unlink()
        write(folder)
    assert outcomes == sorted(outcomes) and {*outcomes} == {False, True}
