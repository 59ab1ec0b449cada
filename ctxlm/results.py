"""One run on disk, and the runs of a grid as data frames.

A run is a folder `outputs/<grid>/<run>/`. Its `metrics.json` is written last and is the only mark of a finished
run. Small results that took long are committed under `data/results/<grid>/<run>/` and stand in where there is no
such folder in `outputs`; those judged by protocol 1 are the grids `protocol-1/<grid>`.
"""

import io
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from ctxlm.config import ConfigError, Experiment, code_hash
from ctxlm.corpus import PROTOCOL
from ctxlm.device import resolve_device, resolve_dtype
from ctxlm.embeddings import data_hash
from ctxlm.files import ROOT, atomic, lock, read_arrays, resolve
from ctxlm.metrics import losses_by_sample

LOSSES = "val_losses.npz"
NUMBERS = {"seed": int, "train_tokens": int, "val_tokens": int, "val_loss": float, "val_ppl": float}
"""What every metrics.json has beside its `experiment`, finite and, the seed apart, above 0."""
BY_SAMPLE = {"sample": int, "loss_sum": float, "tokens": int}
TABLES = {
    "history.csv": {"phase": str, "step": int, "metric": str, "value": float},
    "val_by_sample.csv": BY_SAMPLE,
    "test_by_sample.csv": BY_SAMPLE,
}
"""The columns of a run's tables, which are committed beside its metrics.json when it took long."""
YOUNGER = "test_by_sample.csv"
"""A table that older runs do not have."""


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

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


_own_lock = cache(lock)
"""One and the same lock for all of this process's runs in a folder, so that it may take it again."""


def run_folder(path: str | Path | None) -> Path:
    """The folder a run will be written to, made and tried before the work starts, and this process's till it ends.

    Raises:
        ConfigError: no folder is named, nothing can be written there, or another process is at it.
    """
    if not path or resolve(path) == ROOT:
        raise ConfigError(f"output_dir = {path!r} is not possible: name a folder for the run, as outputs/mine/A")
    folder = resolve(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir = {str(path)!r} cannot be written to ({error.strerror}): name another") from None
    try:
        _own_lock(folder.resolve()).acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output_dir = {str(path)!r} is in use by another process: wait for that run to end, shut down the "
            "notebook that has it, or name another folder"
        ) from None
    return folder


def write_run(
    folder: str | Path,
    metrics: Mapping[str, Any] | pd.Series,
    history: pd.DataFrame,
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    weights: dict[str, torch.Tensor],
) -> Path:
    """Write a finished run; every file is complete on disk before the first earlier one is replaced.

    Args:
        folder: the run's folder, made if need be; relative paths start at the repository's root.
        metrics: the flat content of metrics.json.
        history: rows phase, step, metric, value.
        val, test: every predicted token's loss, nats, float32 [N], and its sample, int32 [N].
        weights: what model.safetensors holds.

    Raises:
        ValueError: a metric is not finite (JSON has no such numbers).
        OSError: the disk is full or not writable; if it is so before all is written, the earlier run is untouched.
    """
    folder = resolve(folder)
    not_finite = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    if not_finite:
        raise ValueError(f"{not_finite[0]} = {metrics[not_finite[0]]} is not finite: the run is not written")
    writers: dict[str, Callable[[Path], Any]] = {
        "metrics.json": lambda path: path.write_text(json.dumps(dict(metrics), indent=1) + "\n", encoding="utf-8"),
        "history.csv": lambda path: history.to_csv(path, index=False),
        "val_by_sample.csv": lambda path: losses_by_sample(*val).to_csv(path, index=False),
        "test_by_sample.csv": lambda path: losses_by_sample(*test).to_csv(path, index=False),
        LOSSES: lambda path: np.savez_compressed(path, loss=val[0], sample=val[1]),
        "model.safetensors": lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path),
    }
    try:
        with ExitStack() as replaced_on_exit:  # in reverse order: metrics.json last
            for name, write in writers.items():
                write(replaced_on_exit.enter_context(atomic(folder / name)))
            # Six files cannot be replaced at once. Whoever is stopped in between leaves a folder without the mark of
            # a finished run, never an earlier metrics.json beside newer tables.
            (folder / "metrics.json").unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        untouched = "; the earlier run there is untouched" if (folder / "metrics.json").exists() else ""
        raise OSError(
            f"{folder} cannot be written to ({getattr(error, 'strerror', None) or error}): free some space there, or "
            f"make it writable, and run it again{untouched}"
        ) from None
    return folder / "metrics.json"


def grid_dtype(grid: str, runs: Mapping[str, Experiment]) -> str:
    """The type of the products of those of a grid's `runs` whose `dtype` is `auto`: resolved once, kept in a file.

    A timing a run, or a machine a run, could give runs that are compared two types. Finished runs keep theirs. The file
    is `outputs/<grid>/dtype`; who wants the other type deletes it, and the runs with it.

    Raises:
        ConfigError: the file holds something else.
    """
    path, types = outputs_dir() / grid / "dtype", ("float32", "bfloat16")
    if not path.exists():
        finished = load_runs(grid)
        known = [run.dtype for run in finished.itertuples() if run.run in runs and runs[run.run].dtype == "auto"]
        first = next(run for run in runs.values() if run.dtype == "auto")
        found = next((dtype for dtype in known if dtype in types), None)
        found = found or str(resolve_dtype(first, resolve_device(first))).removeprefix("torch.")
        with atomic(path) as temporary:
            temporary.write_text(found + "\n", encoding="utf-8")
    if (found := path.read_text(encoding="utf-8").strip()) not in types:
        raise ConfigError(f"{path} holds {found!r}: write float32 or bfloat16 there, as the grid's runs have it")
    return found


def outputs_dir() -> Path:
    """Where runs are written: `outputs`, or what the environment variable CTXLM_OUTPUTS names."""
    return resolve(os.environ.get("CTXLM_OUTPUTS") or "outputs")


def run_folders(grid: str) -> dict[str, tuple[Path, str]]:
    """Finished runs of a grid: name → (folder, "outputs" or "committed")."""
    committed = resolve(os.environ.get("CTXLM_RESULTS") or "data/results")
    found: dict[str, tuple[Path, str]] = {}
    for root, source in ((committed, "committed"), (outputs_dir(), "outputs")):
        for path in sorted((root / grid).glob("*/metrics.json")):
            found[path.parent.name] = (path.parent, source)
    return found


def load_runs(grid: str) -> pd.DataFrame:
    """One row a finished run: the content of metrics.json, the run's name and its source.

    A parameter that is younger than a run has its default there, which is how the run was made; a run that names no
    `protocol` was judged by protocol 1.

    Raises:
        ConfigError: a metrics.json is not readable, or does not hold what a run has.
    """
    rows, younger = [], {name: field.default for name, field in Experiment.model_fields.items()}
    for run, (folder, source) in run_folders(grid).items():
        try:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            _check_metrics(metrics)
        except (OSError, ValueError) as error:
            raise _damaged(grid, run, source, "metrics.json", error) from None
        by_default = {"run": run, "source": source, "phase1_cached": False, "protocol": 1} | younger
        if "protocol" not in metrics:
            by_default["max_sample_tokens"] = None  # samples were whole
        rows.append(by_default | metrics)
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).sort_values(["experiment", "train_tokens", "seed", "run"], ignore_index=True)


def _check_metrics(metrics: Any) -> None:
    """Refuse what is no run's metrics.json, or one without the numbers that everything else is computed from."""
    if not isinstance(metrics, dict) or not isinstance(metrics.get("experiment"), str):
        raise ValueError("it holds no run")
    for name, kind in NUMBERS.items():
        if name not in metrics:
            raise ValueError(f"it has no {name}")
        value = metrics[name]
        if type(value) not in (int, kind) or not 0 <= value < math.inf or (value == 0 and name != "seed"):
            raise ValueError(f"{name} = {value!r} is not possible")


def _damaged(grid: str, run: str, source: str, name: str, error: Exception) -> ConfigError:
    again = (
        "delete it, for only mixtures need it" if name == LOSSES else "delete the run's metrics.json and run it again"
    )
    remedy = again if source == "outputs" else "restore it by git"
    return ConfigError(f"{run}/{name} of grid {grid} is damaged ({' '.join(str(error).split())}): {remedy}")


def load_val_losses(grid: str, run: str) -> dict[str, np.ndarray] | None:
    """val_losses.npz of a finished run: `loss`, nats, and `sample` of every validation token.

    None where it was not kept: it is large, and committed for few runs.

    Raises:
        ConfigError: it is damaged.
    """
    folder, source = run_folders(grid)[run]
    if not (folder / LOSSES).exists():
        return None
    arrays = read_arrays(folder / LOSSES, ("loss", "sample"))
    if arrays is None:
        raise _damaged(grid, run, source, LOSSES, ValueError("an array of it is not whole"))
    return arrays


def check_runs(grid: str) -> None:
    """Refuse damage in the files of a grid's finished runs. What is missing is no damage: it is made again.

    Raises:
        ConfigError: as `load_runs`, `load_table` and `load_val_losses`.
    """
    load_runs(grid)
    for run in run_folders(grid):
        load_val_losses(grid, run)
    for name in TABLES:
        if name == YOUNGER or all((folder / name).exists() for folder, _ in run_folders(grid).values()):
            load_table(grid, name)


def load_table(grid: str, name: str) -> pd.DataFrame:
    """One of `TABLES` of every finished run, with columns run, experiment, train_tokens and seed before its own.

    Runs that are older than a table are left out of it.

    Raises:
        ConfigError: one is damaged.
    """
    folders, tables = run_folders(grid), []
    for row in load_runs(grid).itertuples():
        path = folders[row.run][0] / name
        if name == YOUNGER and not path.exists():
            continue
        try:
            table = _read_table(path)
            if "tokens" in table:  # of N tokens N - 1 are predicted
                asked, there = getattr(row, f"{name.partition('_')[0]}_tokens") - 1, table["tokens"].sum()
                if there != asked:
                    raise ValueError(f"it has {there} tokens, metrics.json asks for {asked}")
        except (OSError, ValueError) as error:
            raise _damaged(grid, row.run, row.source, name, error) from None
        for column in ("seed", "train_tokens", "experiment", "run"):
            table.insert(0, column, getattr(row, column))
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _read_table(path: Path) -> pd.DataFrame:
    """One of `TABLES`.

    Raises:
        ValueError: it is cut off within a line, or is something else.
        OSError: it cannot be read.
    """
    content, columns = path.read_bytes(), TABLES[path.name]
    table = pd.read_csv(io.BytesIO(content), dtype=columns)
    if list(table.columns) != list(columns):
        raise ValueError(f"its columns are not {', '.join(columns)}")
    if not content.endswith(b"\n") or table.isna().any(axis=None):
        raise ValueError("a line of it is not whole")
    return table
