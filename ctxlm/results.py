"""One run on disk: where it came from, and how it is written whole.

A run is a folder `outputs/<grid>/<run>/`. Its `metrics.json` is written last and is the only mark of a finished run.
Those of a grid whose weights are committed, too, are folders `data/results/<grid>/<run>/`, and stand in where `outputs`
has no run of the grid.
"""

import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ctxlm.checkpoints import Checkpoints
from ctxlm.config import NOTEBOOKS, ConfigError, Experiment, check_output_dir, code_hash, read_yaml
from ctxlm.corpus import PROTOCOL, Stream
from ctxlm.embeddings import data_hash
from ctxlm.files import (
    CHECKPOINTS,
    ROOT,
    RUN_LOCK,
    atomic,
    clear_temporaries,
    digest,
    parse_json,
    resolve,
    take,
)
from ctxlm.metrics import bits_per_byte, losses_by_sample

WEIGHTS = "model.safetensors"
"""A run's file of its weights."""
LOSSES = "val_losses.npz"
"""A run's file of every validation token's loss."""
BY_HAND = "interactive"
"""The grid of runs that are made by hand and named after what they are: it has no file."""
REPLICATED = {"experiment", "train_tokens", "train_samples", "seed", "data_seed", "embedding_seed"}
"""Parameters that an experiment's label leaves out: runs that differ in no other are of one configuration."""


def provenance(experiment: Experiment, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Every resolved parameter, and the code, versions and machine a run was made with."""
    resolved = experiment.model_copy(update={"device": str(device), "dtype": str(dtype).removeprefix("torch.")})
    packages = ("numpy", "scipy", "tokenizers", "pandas", "pydantic", "safetensors")
    return resolved.model_dump() | {
        "protocol": PROTOCOL,
        "params_hash": resolved.params_hash,
        "code_hash": code_hash(experiment.model),
        "data_hash": data_hash(experiment),
        "git_commit": git_commit(),
        # torch's own word says which build it is; the package's metadata may leave "+cu132" out
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages}
        | {"torch": str(torch.__version__)},
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def run_checkpoints(folder: Path, record: Mapping[str, Any]) -> Checkpoints:
    """The checkpoints of the run that goes to `folder`, which `write_run` deletes.

    `record` is its `provenance`; a run of other parameters, code, text, torch or kind of device does not go on from
    them.
    """
    known = {name: record[name] for name in Experiment.model_fields if name != "device"}
    known |= {name: record[name] for name in ("protocol", "code_hash", "data_hash", "device_name")}
    return Checkpoints(folder / CHECKPOINTS, digest(json.dumps(known, sort_keys=True), record["versions"]["torch"]))


class Stopwatch:
    """Wall-clock seconds by step: `with watch("phase1"): ...` adds to `watch.seconds["phase1_seconds"]`."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.steps[f"{step}_seconds"] = self.steps.get(f"{step}_seconds", 0.0) + time.perf_counter() - began

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every step so far, and total_seconds since the watch was made."""
        return self.steps | {"total_seconds": time.perf_counter() - self.began}


def git_commit() -> str | None:
    """The commit checked out, with "-dirty" where tracked files differ from it; None outside a repository."""

    def git(*arguments: str, check: bool = True) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=check).stdout.strip()

    try:
        # in a fresh clone `diff` would strip all notebooks each time, ten seconds or more: so git looks at them once
        git("update-index", "-q", "--refresh", check=False)
        # a notebook that was run is listed by `git status`, which looks at its size alone; `diff` strips it first
        return git("rev-parse", "HEAD") + ("-dirty" if git("diff", "--name-only", "HEAD") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_folder(path: str | Path | None) -> Path:
    """The folder a run will be written to, made and tried before the work starts, and this process's till it ends.

    Raises:
        ConfigError: as `check_output_dir`, nothing can be written there, or another process is at it.
    """
    check_output_dir(path)
    folder = resolve(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir = {str(path)!r} cannot be written to ({error.strerror}): name another") from None
    if not take(folder / RUN_LOCK):
        raise ConfigError(
            f"output_dir = {str(path)!r} is in use by another process: wait for that run to end, shut down the "
            "notebook that has it, or name another folder"
        )
    clear_temporaries(folder)
    return folder


def run_by_hand(settings: Experiment, output_dir: str | Path | None) -> tuple[Experiment, Path]:
    """A notebook's run and its folder, as `run_folder` makes it.

    Without an `output_dir` the folder is `outputs/interactive/<name>`, named after what differs from the notebook's
    defaults, as a grid's runs are after what is swept; and so is the experiment, sizes and replicates apart, unless it
    has another label than the notebook's. The same parameters have the same folder. One that holds a run of others
    stays as it is, and the new run goes beside it, into `<name>-2`.

    Raises:
        ConfigError: as `run_folder`, or a finished run of other parameters is there.
    """
    if output_dir is not None:
        check_output_dir(output_dir)
        # a batch does a run anew whose parameters its grid has changed
        if os.environ.get("CTXLM_PROGRESS") != "lines" and _holds_another(resolve(output_dir), settings):
            raise ConfigError(
                f"output_dir = {str(output_dir)!r} holds a finished run of other parameters, which this one would "
                "overwrite: name another folder, or delete that one"
            )
        return settings, run_folder(output_dir)
    usual = Experiment.from_mapping(read_yaml(f"params/notebooks/{Path(NOTEBOOKS[settings.model]).stem}.yaml"))
    values = {name: value for name, value in settings.model_dump().items() if value != getattr(usual, name)}
    name = _name(values, 120) or usual.experiment
    if "experiment" not in values:
        label = _name({key: value for key, value in values.items() if key not in REPLICATED}, 60)
        settings = settings.model_copy(update={"experiment": label or usual.experiment})
    return settings, run_folder(folder_by_hand(name, settings))


def folder_by_hand(name: str, settings: Experiment) -> Path:
    """The folder of a run by hand: `name`, or `name`-2 and so on where that holds a run of other parameters."""
    beside = (f"{name}-{count}" if count > 1 else name for count in itertools.count(1))
    folders = (outputs_dir() / BY_HAND / own for own in beside)
    return next(folder for folder in folders if not _holds_another(folder, settings))


def _name(values: dict[str, Any], longest: int) -> str:
    """Parameters as a run's name has them, the label and the model first; a digest ends one that is cut off."""
    first = [str(values[name]) for name in ("experiment", "model") if name in values]
    rest = [f"{name}-{value}" for name, value in values.items() if name not in ("experiment", "model")]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(first + rest))
    return name if len(name) <= longest else f"{name[: longest - 9]}-{digest(name)[:8]}"


def _holds_another(folder: Path, settings: Experiment) -> bool:
    """Whether a folder holds a finished run of other parameters, or one that cannot be read."""
    path = folder / "metrics.json"
    if not path.exists():
        return False
    try:
        found = parse_json(path.read_bytes())
        machine = {name: found[name] for name in ("device", "dtype")}  # what `auto` became
        return settings.model_copy(update=machine).params_hash != found["params_hash"]
    except (OSError, ValueError, LookupError, TypeError):
        return True


def write_run(
    folder: str | Path,
    metrics: Mapping[str, Any] | pd.Series,
    history: pd.DataFrame,
    judged: Mapping[str, tuple[np.ndarray, Stream]],
    weights: dict[str, torch.Tensor],
) -> Path:
    """Write a finished run; every file is complete on disk before the first earlier one is replaced.

    Args:
        folder: the run's folder, made if need be; relative paths start at the repository's root.
        metrics: the flat content of metrics.json; bits per byte and tokens per parameter are added.
        history: rows phase, step, metric, value.
        judged: part (val, development, test) → every predicted token's loss, nats, float32 [T - 1], and its stream.
        weights: what model.safetensors holds.

    Raises:
        ValueError: a metric is not finite (JSON has no such numbers).
        OSError: the disk is full or not writable; if it is so before all is written, the earlier run is untouched.
    """
    folder = resolve(folder)
    tables = {part: losses_by_sample(*known) for part, known in judged.items()}
    metrics = dict(metrics)
    for part, table in tables.items():
        metrics |= {f"{part}_bytes": int(table["bytes"].sum()), f"{part}_bits_per_byte": bits_per_byte(table)}
    if metrics.get("trained_params"):
        metrics["tokens_per_parameter"] = metrics["train_tokens"] / metrics["trained_params"]
    samples = pd.concat(tables, names=["part"]).reset_index(level=0)
    losses, val = judged["val"]
    not_finite = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    if not_finite:
        raise ValueError(f"{not_finite[0]} = {metrics[not_finite[0]]} is not finite: the run is not written")
    writers: dict[str, Callable[[Path], Any]] = {
        "history.csv": partial(history.to_csv, index=False),
        "samples.csv": partial(samples.to_csv, index=False),
        LOSSES: lambda path: np.savez_compressed(path, loss=losses, sample=val.samples[1:]),
        WEIGHTS: lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path),
    }
    try:
        with ExitStack() as replaced_on_exit:  # in reverse order: metrics.json last
            mark = replaced_on_exit.enter_context(atomic(folder / "metrics.json"))
            paths = {name: replaced_on_exit.enter_context(atomic(folder / name)) for name in writers}
            for name, write in writers.items():
                write(paths[name])
            mark.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            # Several files cannot be replaced at once. Whoever is stopped in between leaves a folder without the mark
            # of a finished run, never an earlier metrics.json beside newer tables.
            (folder / "metrics.json").unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        untouched = "; the earlier run there is untouched" if (folder / "metrics.json").exists() else ""
        raise OSError(
            f"{folder} cannot be written to ({getattr(error, 'strerror', None) or error}): free some space there, or "
            f"make it writable, and run it again{untouched}"
        ) from None
    # A batch does it itself: one killed from here on has the run to do again, and then goes on from its last epoch.
    if os.environ.get("CTXLM_PROGRESS") != "lines":
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return folder / "metrics.json"


def outputs_dir() -> Path:
    """Where runs are written: `outputs`, or what the environment variable CTXLM_OUTPUTS names."""
    return resolve(os.environ.get("CTXLM_OUTPUTS") or "outputs")


def results_dir() -> Path:
    """Where committed runs are: `data/results`, or what the environment variable CTXLM_RESULTS names."""
    return resolve(os.environ.get("CTXLM_RESULTS") or "data/results")


def run_folders(grid: str, committed: bool = False) -> dict[str, tuple[Path, str]]:
    """Finished runs of a grid: name → (folder, "outputs" or "committed"); the latter where `outputs` has none of it."""
    for root, source in ((outputs_dir(), "outputs"), (results_dir(), "committed"))[committed:]:
        if paths := sorted((root / grid).glob("*/metrics.json")):
            return {path.parent.name: (path.parent, source) for path in paths}
    return {}
