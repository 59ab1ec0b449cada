"""One run, from settings to a folder: by `run` and by cells alike, whole or not at all, and in whose folder."""

import json
import math
import re
import subprocess
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

import ctxlm.files
from ctxlm.config import NOTEBOOKS, ConfigError, Experiment, read_yaml
from ctxlm.corpus import PROTOCOL, Split, Stream
from ctxlm.files import ROOT
from ctxlm.metrics import NonFiniteLoss, losses_by_sample
from ctxlm.run import LOSSES, WEIGHTS, Run, folder_by_hand, git_commit, run
from tests.conftest import SMALL, held, refusal, run_cells

COMMIT = "0" * 40
SETTINGS = SMALL | {"device": "cpu", "dtype": "float32", "output_bias": "unigram"}
NETWORK = {"hidden_dim": 16, "window": 8}
MODELS = {
    "context": {"phase2_context_window": 8},
    "zeros": {"context_ablation": "zero"},
    "lstm": {"model": "lstm"} | NETWORK,
    "kneser-ney": {"model": "kneser-ney"},
}
MAY_DIFFER = re.compile("seconds|git_commit|resumed_after_epoch")
"""Metrics of what a run took, and of the tree that it was made from."""
STREAM = Stream(np.array([11, 11, 257, 262], dtype=np.int32), np.array([7, 7, 7, 8], dtype=np.int32))
"""Of the tokens "," and " a" and " the": 1, 2 and 4 bytes."""


def asked(model, text):
    """The parameters of one of `MODELS` that it reads."""
    return Experiment.from_mapping(SETTINGS, MODELS[model], {"corpus": str(text)}).for_notebook()


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """A finished run of each model: its folder, and what `run` returned."""
    home, runs = tmp_path_factory.mktemp("made"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXLM_CACHE", str(home / "cache"))
        for model in MODELS:
            runs[model] = home / model, run(Experiment.from_mapping(asked(model, text)), home / model)
    return runs


def read(folder):
    """A run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def contents(folder):
    """All files of a run but its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def assert_same_run(folder, other):
    """Two runs have the same numbers to the last bit."""
    one, two = ({k: v for k, v in read(f).items() if not MAY_DIFFER.search(k)} for f in (folder, other))
    assert [*one.items()] == [*two.items()]
    tables = [pd.read_csv(f / "history.csv").query("metric != 'seconds'") for f in (folder, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for name in ("samples.csv", LOSSES, WEIGHTS):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


# What is written


@pytest.mark.parametrize("model", MODELS)
def test_the_files_of_a_run_agree(made, model):
    folder, returned = made[model]
    metrics = read(folder)
    assert {*contents(folder)} == {"history.csv", "metrics.json", WEIGHTS, "samples.csv", LOSSES}
    assert metrics == returned.to_dict()
    FileLock(folder / ".lock").acquire(timeout=0)  # a finished run is free, though its process lives
    assert (metrics["git_commit"], metrics["protocol"]) == (COMMIT, PROTOCOL)
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["threads"] == torch.get_num_threads()
    sums = pd.read_csv(folder / "samples.csv").groupby("part")[["loss_sum", "tokens", "bytes"]].sum()
    for part in ("val", "development", "test"):
        total, tokens, size = sums.loc[part]
        assert metrics[f"{part}_tokens"] == tokens + 1 and metrics[f"{part}_bytes"] == size
        assert metrics[f"{part}_loss"] == pytest.approx(total / tokens, rel=1e-6)
        assert metrics[f"{part}_ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-6)
        assert metrics[f"{part}_bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    with np.load(folder / LOSSES) as file:
        assert file["loss"].mean(dtype=float) == pytest.approx(metrics["val_loss"])
        assert len(file["sample"]) == len(file["loss"]) == metrics["val_tokens"] - 1
    weights = sum(weight.numel() for weight in load_file(folder / WEIGHTS).values())
    assert metrics["trained_params"] == weights and bool(weights) == (model != "kneser-ney")
    if weights:
        history = pd.read_csv(folder / "history.csv").query("phase == 'phase2'")
        losses = history[history["metric"] == "val_loss"].set_index("step")["value"]
        assert len(losses) == metrics["epochs_run"] and losses.idxmin() == metrics["best_epoch"]
        assert losses.min() == pytest.approx(metrics["val_loss"])
        assert metrics["tokens_per_parameter"] == 600 / weights


def test_flops_of_a_network_are_those_of_its_shapes(made):
    metrics = read(made["lstm"][0])
    body, head = 2 * 4 * 16 * (16 + 16) + 16 * 16, 50_257 * 16  # two layers of cells, and the way out
    assert metrics["flops_per_token"] == 2 * (body + head)
    assert metrics["training_flops"] == 600 * metrics["epochs_run"] * 2 * (3 * body + 2 * head)


def test_every_column_is_documented_and_every_documented_column_is_written(made):
    items = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("## metrics.json\n\n")[1]
    cells = re.findall(r"^- (.*?):\s", items.split("\n\n")[0], re.M | re.S)
    documented = set()
    for names in (re.findall(r"`(\w+)`", cell) for cell in cells):  # `val_`, `test_` before others go with each of them
        prefixes = [name for name in names if name.endswith("_")] or [""]
        documented |= {prefix + name for prefix in prefixes for name in names if name not in prefixes}
    written = {name for folder, _ in made.values() for name in read(folder)} - Experiment.model_fields.keys()
    assert written == documented - {"resumed_after_epoch", "stopped"}


@pytest.mark.parametrize("model", ["context", "zeros", "lstm"])
def test_the_cells_of_a_notebook_give_what_run_gives(made, model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    settings = asked(model, text)
    run_cells(NOTEBOOKS[settings["model"]], settings | {"output_dir": str(tmp_path / "run")})
    assert_same_run(tmp_path / "run", made[model][0])


def test_zeros_for_contexts_are_trained_and_judged_with_on_every_part(made, text, tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    other = Experiment.from_mapping(asked("zeros", text), {"phase1_init_std": 0.2})  # moves every context
    metrics, others = read(made["zeros"][0]), run(other, tmp_path / "run")
    assert metrics["horizon"] != others["horizon"]
    for part in ("val", "development", "test"):
        assert metrics[f"{part}_loss"] == others[f"{part}_loss"]


def write(folder, settings=None, this=None, **columns):
    """Write a run of three predictions that nothing has computed."""
    losses, shorter = torch.tensor([1.0, 2.0, 4.0]), Stream(STREAM.tokens[1:], STREAM.samples[1:])
    judged = {"val": (losses, 0.5), "development": (losses[1:], 0.25), "test": (losses[1:], 0.75)}
    rows = [{"phase": "phase2", "step": 1, "metric": "val_loss", "value": 2.0}]
    this = this or Run(settings or Experiment(device="cpu", train_tokens=4), folder)
    weights = {"w": torch.arange(6.0).reshape(2, 3).T}
    return this.write(Split(STREAM, STREAM, shorter, shorter), judged, columns, rows, weights)


def test_a_run_is_of_the_code_and_the_machine_that_it_began_with(tmp_path, without_text, monkeypatch):
    this = Run(Experiment(), tmp_path / "run")
    machine = [this.device.type, str(this.dtype).removeprefix("torch.")]
    assert [this.provenance["device"].partition(":")[0], this.provenance["dtype"]] == machine and "auto" not in machine
    for name in ("code_hash", "git_commit"):
        monkeypatch.setattr(f"ctxlm.run.{name}", lambda *_: "edited since")
    assert "edited since" not in write(None, this=this).tolist()


def test_what_is_judged_by_sample_is_written_part_by_part(tmp_path, without_text):
    metrics = write(tmp_path / "A")
    assert (metrics["val_loss"], metrics["test_bytes"], metrics["train_tokens"]) == (pytest.approx(7 / 3), 6, 4)
    assert [metrics[f"{part}_accuracy"] for part in ("val", "development", "test")] == [0.5, 0.25, 0.75]
    assert pd.read_csv(tmp_path / "A" / "samples.csv").values.tolist() == [
        ["val", 7, 3.0, 2, 3],
        ["val", 8, 4.0, 1, 4],
        *([part, *row] for part in ("development", "test") for row in ([7, 2.0, 1, 2], [8, 4.0, 1, 4])),
    ]
    assert load_file(tmp_path / "A" / WEIGHTS)["w"].shape == (3, 2)
    long = np.zeros(10**6 + 1, dtype=np.int32)
    table = losses_by_sample(np.full(10**6, 0.1, dtype=np.float32), Stream(long, long))
    assert table["loss_sum"].item() == pytest.approx(10**6 * float(np.float32(0.1)), rel=1e-9)  # in double precision


def test_a_run_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch, without_text):
    """The last file that is written fails; before that a number that JSON has not."""
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(NonFiniteLoss, match="test_horizon = inf"):
        write(tmp_path, test_horizon=math.inf)
    for error in (OSError(28, "No space left"), SafetensorError("No space left")):
        monkeypatch.setattr("ctxlm.run.save_file", Mock(side_effect=error))
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, test_horizon=1.0)
    assert contents(tmp_path) == before


def test_metrics_json_is_replaced_last_and_is_gone_before_any_other_file_is(tmp_path, monkeypatch, without_text):
    order, replace = [], ctxlm.files.os.replace

    def watched(source, target):
        order.append((target.name, (tmp_path / "metrics.json").exists()))
        replace(source, target)

    write(tmp_path)
    monkeypatch.setattr(ctxlm.files.os, "replace", watched)
    write(tmp_path)
    assert len(order) == 5 and order[-1][0] == "metrics.json" and not any(exists for _, exists in order)


def test_the_commit_is_dirty_where_a_file_differs_that_may_move_a_number(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    (tmp_path / "a.ipynb").write_text("{}\n")
    git("init", "--quiet")
    git("add", "a.ipynb")
    git("commit", "--quiet", "-m", "first")
    (tmp_path / "data" / "search").mkdir(parents=True)
    for written in ("README.md", "data/search/A.csv"):  # by hand, or by `make search` while a grid runs
        (tmp_path / written).touch()
        git("add", written)
    monkeypatch.setattr("ctxlm.run.ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", git_commit())
    for changed in ("a.ipynb", "ctxlm/new.py"):  # one in the commit, one in none
        (tmp_path / changed).parent.mkdir(exist_ok=True)
        (tmp_path / changed).write_text("{1}\n")
        assert git_commit().endswith("-dirty")
        git("checkout", "--quiet", "a.ipynb")
    monkeypatch.setattr("ctxlm.run.ROOT", tmp_path / "nowhere")
    assert git_commit() is None


# What is refused or fails


@pytest.mark.parametrize("change", [{"corpus": "no/such.txt"}, {"test_samples": 99}, {"phase2_learning_rate": 1e30}])
def test_a_run_that_is_refused_or_fails_lets_its_folder_go(change, tmp_path, text):
    with pytest.raises((ConfigError, NonFiniteLoss)):
        run(Experiment.from_mapping(SETTINGS, {"corpus": str(text)}, change), tmp_path)
    with FileLock(tmp_path / ".lock").acquire(0):  # a notebook's process lives on
        pass


def test_a_folder_must_be_writable_and_is_one_process_own(tmp_path):
    folder, e = tmp_path / "A", Experiment(device="cpu")
    (tmp_path / "file").touch()
    for unwritable in (tmp_path / "file", tmp_path / "file" / "A"):
        assert refusal(Run, e, unwritable).startswith(f"output_dir = {str(unwritable)!r} ")
    with held(folder / ".lock"):
        assert refusal(Run, e, folder).startswith(f"output_dir = {str(folder)!r} ")


def test_a_folder_that_holds_a_run_of_other_parameters_is_refused_by_hand(tmp_path, without_text, monkeypatch):
    folder, e, other = tmp_path / "mine", Experiment(num_layers=3, train_tokens=4), Experiment()
    write(folder, e)
    before = contents(folder)
    assert Run(e, folder).settings == e  # whatever `auto` became
    assert refusal(Run, other, folder).startswith(f"output_dir = {str(folder)!r} ")
    monkeypatch.setenv("CTXLM_BATCH", "1")  # a batch, whose grid has changed
    assert Run(other, folder).settings == other and contents(folder) == before


# Runs by hand, which name no folder

USUAL = {notebook: read_yaml(f"params/{notebook.replace('.ipynb', '.yaml')}") for notebook in NOTEBOOKS.values()}


def by_hand(notebook="02_experiment", **changed):
    """The settings and the folder of a notebook's run with some of its defaults changed."""
    return folder_by_hand(Experiment.from_mapping(USUAL[f"notebooks/{notebook}.ipynb"], changed))


@pytest.mark.parametrize(
    ("notebook", "changed", "name", "label"),
    [
        ("02_experiment", {}, "A", "A"),
        ("02_experiment", {"seed": 43, "num_layers": 3}, "num_layers-3_seed-43", "num_layers-3"),
        ("02_experiment", {"train_tokens": 5000, "seed": 43}, "train_tokens-5000_seed-43", "A"),  # a size and replicate
        ("02_experiment", {"experiment": "mine", "num_layers": 3}, "mine_num_layers-3", "mine"),
        ("02_experiment", {"corpus": "texts/my own.txt"}, "corpus-texts-my-own.txt", "corpus-texts-my-own.txt"),
        ("02_experiment", {"val_samples": 9, "num_layers": 3}, "val_samples-9_num_layers-3", "num_layers-3"),
        ("03_baseline", {}, "KN-4", "KN-4"),
        ("03_baseline", {"model": "lstm", "seed": 1, "window": 8}, "lstm_window-8_seed-1", "lstm_window-8"),
    ],
)
def test_a_run_by_hand_is_named_after_what_differs_from_the_notebooks_defaults(outputs, notebook, changed, name, label):
    settings, folder = by_hand(notebook, **changed)
    assert folder == outputs / "interactive" / name and settings.experiment == label


def test_a_run_of_other_parameters_stays_and_the_new_one_goes_beside_it(outputs, without_text):
    same = {"train_tokens": 4, "seed": 43}
    settings, folder = by_hand(**same)
    write(folder, settings)
    before = contents(folder)
    assert by_hand(**same) == (settings, folder)  # the same again
    assert Run(settings, "").folder == folder  # no name is none
    other, beside = by_hand("03_baseline", **same)
    assert beside.name == "train_tokens-4_seed-43-2" and other.experiment == "KN-4"
    write(beside, other)
    assert by_hand("03_baseline", **same)[1] == beside and by_hand(**same)[1] == folder
    assert contents(folder) == before
