"""The finished runs of a grid, as data frames; what was damaged from outside is refused in one sentence."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctxlm.config import ConfigError, Experiment
from ctxlm.device import resolve_device, resolve_dtype
from ctxlm.files import atomic, read_arrays
from ctxlm.results import LOSSES, outputs_dir, run_folders

NUMBERS = {"seed": int, "train_tokens": int, "val_tokens": int, "val_loss": float, "val_ppl": float}
"""What every metrics.json has beside its `experiment`, finite and, the seed apart, above 0."""
BY_SAMPLE = {"sample": int, "loss_sum": float, "tokens": int}
TABLES = {
    "history.csv": {"phase": str, "step": int, "metric": str, "value": float},
    "val_by_sample.csv": BY_SAMPLE,
    "test_by_sample.csv": BY_SAMPLE,
}
"""The columns of a run's tables, which are committed beside its metrics.json when it took long."""
OPTIONAL_TABLE = "test_by_sample.csv"
"""A table that older runs do not have."""


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
        if name == OPTIONAL_TABLE or all((folder / name).exists() for folder, _ in run_folders(grid).values()):
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
        if name == OPTIONAL_TABLE and not path.exists():
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


def grid_dtype(grid: str, runs: Mapping[str, Experiment]) -> str:
    """The type of the products of those of a grid's `runs` whose `dtype` is `auto`: resolved once, kept in a file.

    A timing a run, or a machine a run, could give runs that are compared two types. Runs that `outputs` holds keep
    theirs; committed ones, which are run anew, ask for nothing. The file is `outputs/<grid>/dtype`.

    Raises:
        ConfigError: the file holds something else, or another type than finished runs have.
    """
    path, types = outputs_dir() / grid / "dtype", ("float32", "bfloat16")
    asking = {name: run for name, run in runs.items() if run.dtype == "auto"}
    networks = {name: run for name, run in asking.items() if run.model != "kneser-ney"}  # an n-gram has no products
    finished = (run for run in load_runs(grid).itertuples() if run.run in networks and run.source == "outputs")
    known = [run.dtype for run in finished if run.dtype in types]
    if not path.exists():
        first = next(iter((networks or asking).values()))
        found = known[0] if known else str(resolve_dtype(first, resolve_device(first))).removeprefix("torch.")
        with atomic(path) as temporary:
            temporary.write_text(found + "\n", encoding="utf-8")
    if (found := path.read_text(encoding="utf-8").strip()) not in types:
        raise ConfigError(f"{path} holds {found!r}: write float32 or bfloat16 there, as the grid's runs have it")
    if known and found not in known:
        raise ConfigError(
            f"{path} says {found}, but {len(known)} finished runs are in {known[0]}: write that, or delete their "
            "metrics.json to run them again"
        )
    return found
