"""Runs on disk: what is written, what is refused, what survives a fault."""

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
from ctxlm.analysis import runs as reading
from ctxlm.analysis.runs import (
    READABLE,
    TABLES,
    Damaged,
    damaged_runs,
    grid_dtype,
    load_runs,
    load_table,
    load_val_losses,
    set_aside,
    tables_of,
)
from ctxlm.config import MODULES, NOTEBOOKS, ConfigError, Experiment, code_hash, read_yaml
from ctxlm.corpus import PROTOCOL, Stream
from ctxlm.embeddings import data_hash
from ctxlm.files import ROOT, take
from ctxlm.metrics import losses_by_sample
from ctxlm.results import Stopwatch, check_seal, git_commit, provenance, run_by_hand, run_folder, run_folders, write_run

STREAM = Stream(np.array([11, 11, 257, 262], dtype=np.int32), np.array([7, 7, 7, 8], dtype=np.int32))
"""Of the tokens "," and " a" and " the": 1, 2 and 4 bytes."""
HISTORY = pd.DataFrame([{"phase": "phase2", "step": 1, "metric": "val_loss", "value": 2.0}])


def write(folder, scale=1.0, **metrics):
    own = {
        "experiment": "A",
        "train_tokens": 100,
        "seed": 42,
        "val_tokens": 4,
        "development_tokens": 3,
        "test_tokens": 3,
    }
    own |= {"val_loss": 2.0, "val_ppl": 7.4, "protocol": PROTOCOL}
    if "protocol" in metrics and metrics["protocol"] is None:  # as the first runs
        del own["protocol"], metrics["protocol"]
    losses, stream = scale * np.array([1.0, 2.0, 4.0], dtype=np.float32), STREAM
    shorter = Stream(stream.tokens[1:], stream.samples[1:])
    judged = {"val": (losses, stream), "development": (losses[1:], shorter), "test": (losses[1:], shorter)}
    weights = {"w": torch.arange(6.0).reshape(2, 3).T}
    return write_run(folder, own | metrics, HISTORY, judged, weights)


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "results"))
    return tmp_path / "outputs", tmp_path / "results"


def test_a_run_comes_back_as_it_was_written(roots):
    folder = roots[0] / "g" / "A"
    write(folder, val_ppl=7.4)
    assert sorted(p.name for p in folder.iterdir()) == [
        "development_by_sample.csv",
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
    columns = ["sample", "loss_sum", "tokens", "bytes"]
    assert by_sample[columns].values.tolist() == [[7, 3.0, 2, 3], [8, 4.0, 1, 4]]
    by_sample = load_table("g", "test_by_sample.csv")
    assert by_sample[columns].values.tolist() == [[7, 2.0, 1, 2], [8, 4.0, 1, 4]]
    assert runs["test_bytes"].tolist() == [6]
    assert runs["test_bits_per_byte"].tolist() == pytest.approx([6 / math.log(2) / 6])
    assert load_file(folder / "model.safetensors")["w"].shape == (3, 2)
    with np.load(folder / "val_losses.npz") as file:
        assert file["loss"].tolist() == [1.0, 2.0, 4.0] and file["sample"].tolist() == [7, 7, 8]


def test_committed_results_stand_in_where_outputs_have_none(roots):
    outputs, results = roots
    write(results / "g" / "A", val_ppl=1.0)
    write(results / "g" / "B", experiment="B", val_ppl=2.0)
    assert load_runs("g")[["run", "source", "val_ppl"]].values.tolist() == [
        ["A", "committed", 1.0],
        ["B", "committed", 2.0],
    ]
    write(outputs / "g" / "B", experiment="B", val_ppl=3.0)
    assert load_runs("g")[["run", "source", "val_ppl"]].values.tolist() == [["B", "outputs", 3.0]]


def test_a_run_that_names_no_protocol_is_of_the_first_and_a_folder_in_a_folder_is_a_grid(roots):
    for root, run, own in ((roots[1], "A", {"protocol": None}), (roots[1], "B", {"experiment": "B", "protocol": 2})):
        write(root / "search" / "g" / run, **own)
    runs = load_runs("search/g").set_index("run")
    assert runs["protocol"].to_dict() == {"A": 1, "B": 2} and set(runs["source"]) == {"committed"}
    assert len(load_table("search/g", "val_by_sample.csv")) == 4 and len(run_folders("search/g")) == 2
    assert load_val_losses("search/g", "A")["loss"].tolist() == [1.0, 2.0, 4.0]
    assert load_runs("g").empty and load_runs("search").empty
    assert damaged_runs("search/g") == []
    (roots[1] / "search" / "g" / "A" / "history.csv").write_text("")
    with pytest.raises(ConfigError, match=r"^A/history.csv of grid search/g is damaged \(.*\): restore it by git$"):
        load_table("search/g", "history.csv")


def test_an_unfinished_run_is_not_read(roots):
    write(roots[0] / "g" / "A").unlink()
    assert load_runs("g").empty and load_table("g", "history.csv").empty and load_table("g", "val_by_sample.csv").empty


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
    assert len(order) == 7 and order[-1] == "metrics.json"


def test_losses_by_sample_sum_in_double_precision():
    tokens = np.zeros(10**6 + 1, dtype=np.int32)
    table = losses_by_sample(np.full(10**6, 0.1, dtype=np.float32), Stream(tokens, tokens))
    assert table["loss_sum"].item() == pytest.approx(10**6 * float(np.float32(0.1)), rel=1e-9)


def test_provenance_says_with_what_a_run_was_made():
    own = Experiment()
    found = provenance(own, torch.device("cpu"), torch.bfloat16)
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16") and found["code_hash"] == code_hash()
    assert found == found | own.model_dump(exclude={"device", "dtype"}) and found["protocol"] == PROTOCOL
    assert found["data_hash"] == data_hash(own) and found["versions"]["torch"] == torch.__version__
    assert set(MODULES) == set(NOTEBOOKS) and len({code_hash(model) for model in MODULES}) == 3  # networks share theirs
    assert not any("analysis" in name for names in MODULES.values() for name in names)


def test_the_hash_of_a_run_is_that_of_its_resolved_parameters(roots):
    own = Experiment(device="auto", dtype="auto", train_tokens=100)
    found = provenance(own, torch.device("cpu"), torch.float32)
    write(roots[0] / "g" / "A", **found)
    metrics = json.loads((roots[0] / "g" / "A" / "metrics.json").read_text(encoding="utf-8"))
    again = Experiment.from_mapping({name: metrics[name] for name in Experiment.model_fields})
    assert again.params_hash == metrics["params_hash"] != own.params_hash
    assert again == own.model_copy(update={"device": "cpu", "dtype": "float32"})
    other = provenance(own, torch.device("cpu"), torch.bfloat16)
    assert other["params_hash"] != metrics["params_hash"]  # the type of the products decides numbers


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
    assert {path.name for path in (tmp_path / "new" / "A").iterdir()} == {".lock", ".lock.json"}
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
        why = f"A/metrics.json of grid g is damaged ({name} = {value!r} is not possible)"
        assert str(caught.value) == f"{why}: delete its metrics.json and run it again"
    del metrics[name]
    path.write_text(json.dumps(metrics), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"is damaged \(it has no {name}\): delete its metrics"):
        load_runs("g")


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_named(roots, name):
    path = write(roots[0] / "g" / "A").with_name(name)
    whole = path.read_bytes()
    damaged = [None, b"", b"\x89PNG\r\n\x1a\n\x00\xff", b"a,b\n1,2\n", whole[:-2], whole.replace(b".0", b"x")]
    if "by_sample" in name:  # of a history nothing tells how long it was
        damaged.append(whole[: whole.rindex(b"\n", 0, -1) + 1])
    for content in damaged:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_table("g", name)
        message = str(caught.value)
        assert message.startswith(f"A/{name} of grid g is damaged (") and "\n" not in message
        assert message.endswith("): delete its metrics.json and run it again")
        assert [str(damage) for damage in damaged_runs("g")] == [message]
    write(roots[1] / "h" / "A").with_name(name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"A/{name} of grid h is damaged \(.*\): restore it by git$"):
        load_table("h", name)


def flipped(content):
    """One bit in the middle of an array, whose length and names stay as they are."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"no zip", flipped]
)
def test_damaged_losses_by_token_are_named(roots, damage):
    path = write(roots[0] / "g" / "A").with_name("val_losses.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"^A/val_losses.npz of grid g is damaged \(.*\): delete its metrics"):
        load_val_losses("g", "A")
    assert [damage.path for damage in damaged_runs("g")] == [path]
    path.unlink()
    assert damaged_runs("g") == [] and load_val_losses("g", "A") is None


def change(path, old, new):
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize("name", ["metrics.json", *TABLES, "model.safetensors", "val_losses.npz"])
def test_whatever_is_changed_without_being_cut_is_noticed(roots, name):
    """A digit in a table or a metric, another run's file in its place, a bit of the weights."""
    path = write(roots[0] / "g" / "A").with_name(name)
    other = write(roots[0] / "g" / "B", 2.0).with_name(name)
    assert damaged_runs("g") == []
    before = path.read_bytes()
    changed = bytearray(before)
    digits = [place for place, byte in enumerate(before) if chr(byte).isdigit()]
    at = digits[0] if name == "metrics.json" else digits[-1] if name.endswith(".csv") else len(before) - 2
    changed[at] = ord("7") if before[at] != ord("7") else ord("8")
    for content in (bytes(changed), other.read_bytes()):
        if content == before:  # weights that are alike
            continue
        path.write_bytes(content)
        (damage,) = damaged_runs("g")
        # another run's metrics.json is whole in itself: it is this run's first table that it does not know
        swapped = name == "metrics.json" and content == other.read_bytes()
        assert damage.path == (path.with_name("val_by_sample.csv") if swapped else path)
        path.write_bytes(before)
    assert damaged_runs("g") == []


def test_a_damaged_run_is_set_aside_and_a_committed_one_left_to_git(roots):
    path = write(roots[0] / "g" / "A")
    change(path.with_name("history.csv"), b"1", b"2")
    (damage,) = damaged_runs("g")
    set_aside(damage)
    left = {file.name.partition(".damaged-")[0] for file in path.parent.iterdir() if ".damaged-" in file.name}
    assert left == {"history.csv", "metrics.json"} and not path.exists()
    committed = write(roots[1] / "h" / "A")
    change(committed.with_name("history.csv"), b"1", b"2")
    (damage,) = damaged_runs("h")
    with pytest.raises(Damaged, match="restore it by git"):
        set_aside(damage)
    assert committed.exists()


def test_all_runs_are_verified_by_one_command(roots, capsys):
    for root, grid in ((roots[0], "g"), (roots[1], "h"), (roots[1], "search/g")):
        write(root / grid / "A")
    assert reading.main() == 0 and "3 runs of 3 grids: none damaged" in capsys.readouterr().out
    change(roots[1] / "h" / "A" / "history.csv", b"1", b"2")
    assert reading.main() == 1
    assert "A/history.csv of grid h is damaged" in capsys.readouterr().out


def test_every_committed_result_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    results = ROOT / "data" / "results"
    for folder in sorted({path.parent.parent for path in results.rglob("metrics.json")}):
        grid = folder.relative_to(results).as_posix()
        runs = load_runs(grid)
        (protocol,) = runs["protocol"].unique()
        tables = [load_table(grid, name) for name in tables_of(protocol)]
        assert protocol in READABLE
        assert len(runs) == len(list(folder.iterdir())) > 0 and set(runs["source"]) == {"committed"}
        assert set(tables[1]["run"]) == set(tables[2]["run"]) == set(runs["run"])
        assert set(runs["run"]) >= set(tables[0]["run"])  # an n-gram has no history
        for run in runs.itertuples():
            by_token = load_val_losses(grid, run.run)  # committed for few
            assert by_token is None or by_token["loss"].astype(float).mean() == pytest.approx(run.val_loss, rel=1e-6)


HOLD = """
import sys
from pathlib import Path
from ctxlm.files import take
take(Path(sys.argv[1]) / ".lock")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_process_own(tmp_path):
    folder = tmp_path / "A"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            ConfigError, match=rf"^output_dir = .* is in use by process {other.pid} on .*: wait for that"
        ):
            run_folder(folder)
        assert run_folder(tmp_path / "B") == tmp_path / "B"
        other.stdin.close()
    assert run_folder(folder) == run_folder(folder) == folder  # a kernel may write there again
    with ThreadPoolExecutor(1) as another:  # and from another of its threads
        assert another.submit(run_folder, folder).result() == folder
    assert {path.name for path in folder.iterdir()} == {".lock", ".lock.json"}


def test_a_lock_of_a_killed_process_is_free_and_says_whose_it_was(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    assert f"process {other.pid} on " in take(tmp_path / ".lock")
    assert take(tmp_path / ".lock") == ""  # it is ours by now
    for note in (b"", b"[]", b"\xff", b'{"pid": 1}'):
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            other.stdin.close()
        (tmp_path / "other.lock.json").write_bytes(note)
        assert take(tmp_path / "other.lock") == ""


# The type of the products of a whole grid


def auto(**parameters) -> Experiment:
    return Experiment.from_mapping({"train_tokens": 100, "device": "cpu"}, parameters)


@pytest.fixture
def machine(roots, monkeypatch):
    """A machine whose CPU is faster in float32, and whose GPU in bfloat16; lists whom it was asked about."""
    asked = []

    def resolve_dtype(experiment, device):
        asked.append((experiment, device.type))
        return torch.bfloat16 if device.type == "cuda" else torch.float32

    monkeypatch.setattr("ctxlm.analysis.runs.resolve_device", lambda experiment: torch.device(experiment.device))
    monkeypatch.setattr("ctxlm.analysis.runs.resolve_dtype", resolve_dtype)
    return asked


def test_the_type_of_a_grid_is_resolved_once_and_kept(roots, machine):
    plan = {"A": auto(), "B": auto(seed=1)}
    path = roots[0] / "g" / "dtype"
    assert grid_dtype("g", plan) == "float32" and path.read_text(encoding="utf-8") == "float32\n"
    assert machine == [(plan["A"], "cpu")]
    for device in ("cpu", "cuda"):  # another machine, or another timing, changes nothing
        assert grid_dtype("g", {"A": auto(device=device)}) == "float32"
    write(roots[0] / "g" / "A", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"dtype says float32, but 1 finished runs are in bfloat16: write that, or"):
        grid_dtype("g", plan)
    assert len(machine) == 1
    path.unlink()
    assert grid_dtype("g", plan) == "bfloat16" and path.read_text(encoding="utf-8") == "bfloat16\n"
    assert load_runs("g")["run"].tolist() == ["A"]  # the file is no run
    assert grid_dtype("h", plan) == "float32" and (roots[0] / "h" / "dtype").exists()  # a grid, a file


def test_the_type_is_that_of_the_device_that_the_runs_are_for(roots, machine):
    given = {"A": auto(dtype="float32"), "B": auto(device="cuda"), "C": auto(device="cuda", seed=1)}
    assert grid_dtype("g", given) == "bfloat16" and machine == [(given["B"], "cuda")]  # A asks for nothing
    assert grid_dtype("h", {"A": auto(dtype="bfloat16"), "B": auto()}) == "float32"


@pytest.mark.parametrize(("source", "found"), [(0, "bfloat16"), (1, "float32")])
def test_finished_runs_of_the_plan_keep_their_type_and_committed_ones_ask_for_nothing(roots, machine, source, found):
    write(roots[source] / "g" / "B", experiment="B", dtype="bfloat16")
    assert grid_dtype("g", {"A": auto(), "B": auto()}) == found and len(machine) == source
    assert (roots[0] / "g" / "dtype").read_text(encoding="utf-8") == f"{found}\n"


@pytest.mark.parametrize(
    ("plan", "metrics"),
    [
        ({"A": auto(), "B": auto(dtype="bfloat16")}, {"dtype": "bfloat16"}),  # it was asked for
        ({"A": auto()}, {"dtype": "bfloat16"}),  # no longer planned
        ({"A": auto(), "B": auto(model="kneser-ney")}, {"dtype": "float64"}),  # an n-gram has no products
        ({"A": auto(), "B": auto()}, {}),  # as runs were written before the type was
    ],
)
def test_other_finished_runs_do_not_decide_the_type(roots, machine, plan, metrics):
    write(roots[0] / "g" / "B", experiment="B", **metrics)
    assert grid_dtype("g", plan) == "float32" and machine == [(plan["A"], "cpu")]


def test_of_finished_runs_one_that_can_decide_does(roots, machine):
    write(roots[0] / "g" / "A", dtype="float64")
    write(roots[0] / "g" / "B", experiment="B")
    write(roots[0] / "g" / "C", experiment="C", dtype="bfloat16")
    assert grid_dtype("g", dict.fromkeys("ABC", auto())) == "bfloat16" and machine == []


def test_a_type_that_a_power_cut_took_is_resolved_anew(roots, machine):
    path = roots[0] / "g" / "dtype"
    for damage in (b"", b"\0" * 9, None):
        shutil.rmtree(path.parent, ignore_errors=True)
        (path if damage is None else path.parent).mkdir(parents=True)
        if damage is not None:
            path.write_bytes(damage)
        assert grid_dtype("g", {"A": auto()}) == "float32" and path.read_text(encoding="utf-8") == "float32\n"
        write(roots[0] / "g" / "A", dtype="bfloat16")
        path.write_bytes(damage or b"\n")
        assert grid_dtype("g", {"A": auto()}) == "bfloat16"
    assert len(machine) == 3


def test_committed_runs_whose_folders_were_exchanged_are_damaged(roots):
    for label in "AB":
        write(roots[1] / "g" / f"{label}_seed-3", experiment=label, seed=3)
    assert damaged_runs("g") == []
    (roots[1] / "g" / "A_seed-3").rename(roots[1] / "g" / "C")
    (roots[1] / "g" / "B_seed-3").rename(roots[1] / "g" / "A_seed-3")
    (roots[1] / "g" / "C").rename(roots[1] / "g" / "B_seed-3")
    with pytest.raises(ConfigError, match=r"it is another run's.*restore it by git"):
        load_runs("g")
    (roots[1] / "g" / "B_seed-3").rename(roots[1] / "g" / "A_seed-4")
    with pytest.raises(ConfigError, match=r"it is another run's.*restore it by git"):
        load_runs("g")


@pytest.mark.parametrize("content", ["float64\n", "bfloat16 float32", "half"])
def test_a_type_that_is_none_is_refused_in_one_sentence(roots, machine, content):
    path = roots[0] / "g" / "dtype"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        grid_dtype("g", {"A": auto()})
    asked = "write float32 or bfloat16 there, as the grid's runs have it"
    assert str(caught.value) == f"{path} holds {content.strip()!r}: {asked}" and machine == []
    assert path.read_text(encoding="utf-8") == content


# Runs by hand

USUAL = {notebook: read_yaml(f"params/{notebook.replace('.ipynb', '.yaml')}") for notebook in NOTEBOOKS.values()}


def by_hand(notebook="02_experiment", **changed):
    """The experiment and the folder of a notebook's run with some of its defaults changed."""
    return run_by_hand(Experiment.from_mapping(USUAL[f"notebooks/{notebook}.ipynb"], changed), None)


@pytest.mark.parametrize(
    ("changed", "name", "label"),
    [
        ({}, "A", "A"),
        ({"seed": 43, "num_layers": 3}, "num_layers-3_seed-43", "num_layers-3"),
        ({"train_tokens": 5000, "seed": 43}, "train_tokens-5000_seed-43", "A"),  # a size and a replicate of A
        ({"experiment": "mine", "num_layers": 3}, "mine_num_layers-3", "mine"),
        ({"corpus": "texts/my own.txt"}, "corpus-texts-my-own.txt", "corpus-texts-my-own.txt"),
    ],
)
def test_a_run_by_hand_is_named_after_what_differs_from_the_notebooks_defaults(roots, changed, name, label):
    settings, folder = by_hand(**changed)
    assert folder == roots[0] / "interactive" / name and folder.is_dir() and settings.experiment == label
    assert by_hand(**changed) == (settings, folder)


def test_a_baseline_by_hand_is_named_after_its_model(roots):
    assert by_hand("03_baseline")[1].name == "KN-4"
    settings, folder = by_hand("03_baseline", model="lstm", hidden_dim=64, seed=1)
    assert (settings.experiment, folder.name) == ("lstm_hidden_dim-64", "lstm_hidden_dim-64_seed-1")


def test_a_long_name_is_cut_off_and_still_tells_runs_apart(roots):
    many = {name: 7 for name in ("phase1_batch_size", "phase2_batch_size", "val_samples", "test_samples")}
    many |= {"phase1_convergence_threshold": 0.5, "phase2_gradient_clip": 2.0, "data_seed": 3}
    (first, one), (second, other) = by_hand(**many), by_hand(**many | {"phase2_gradient_clip": 3.0})
    assert len(one.name) <= 120 and len(first.experiment) <= 60
    assert one != other and first.experiment != second.experiment


def test_a_run_of_other_parameters_stays_and_the_new_one_goes_beside_it(roots):
    settings, folder = by_hand(seed=43)
    device = torch.device("cpu")
    write(folder, **provenance(settings, device, torch.float32))
    assert by_hand(seed=43)[1] == folder  # the same again, whatever `auto` became
    before = (folder / "metrics.json").read_bytes()
    other, beside = by_hand("03_baseline", seed=43)
    assert beside.name == "seed-43-2" and other.experiment == "KN-4"
    write(beside, **provenance(other, device, torch.float32))
    assert by_hand("03_baseline", seed=43)[1] == beside and by_hand(seed=43)[1] == folder
    assert (folder / "metrics.json").read_bytes() == before
    (folder / "metrics.json").write_text("{}", encoding="utf-8")  # of nobody knows what
    assert by_hand(seed=43)[1].name == "seed-43-3"


def test_a_folder_that_is_named_is_taken_as_it_is(roots, tmp_path):
    own = Experiment(num_layers=3)
    write(tmp_path / "mine", **provenance(Experiment(), torch.device("cpu"), torch.float32))
    assert run_by_hand(own, tmp_path / "mine") == (own, tmp_path / "mine")
    with pytest.raises(ConfigError, match="name a folder for the run"):
        run_by_hand(own, "")


@pytest.mark.parametrize("lost", [["files"], ["files", "protocol"], ["protocol"]])
def test_a_run_without_digests_is_damaged_whatever_it_says_of_its_protocol(roots, lost):
    path = write(roots[0] / "g" / "A", protocol=PROTOCOL)
    metrics = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: metrics[name] for name in metrics if name not in lost}), encoding="utf-8")
    why = "metrics.json has no digest of it" if "files" in lost else "it was changed after the run was written"
    with pytest.raises(ConfigError) as caught:
        load_runs("g")
    assert str(caught.value) == f"A/metrics.json of grid g is damaged ({why}): delete its metrics.json and run it again"
    assert [damage.path for damage in damaged_runs("g")] == [path]


@pytest.mark.parametrize("files", [{}, None, math.nan])  # the last as a frame has it, of one without beside others
def test_a_file_without_a_digest_is_damaged(tmp_path, files):
    (tmp_path / "history.csv").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="no digest of it"):
        check_seal({"files": files}, tmp_path / "history.csv")


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
