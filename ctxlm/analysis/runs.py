"""The finished runs of a grid, as tidy frames: a row a run, and a row a run and judged sample.

What was damaged from outside, or cannot stand beside one another, is refused in one sentence.
"""

import functools
import io
import math
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ctxlm.config import ConfigError, Experiment, load_grid, shown
from ctxlm.corpus import PROTOCOL
from ctxlm.device import resolve_device, resolve_dtype
from ctxlm.files import ROOT, atomic, parse_json, read_arrays
from ctxlm.results import BY_HAND, LOSSES, WEIGHTS, check_seal, outputs_dir, results_dir, run_folders

NUMBERS = {"seed": int, "train_tokens": int, "val_tokens": int, "val_loss": float, "val_ppl": float}
"""What every metrics.json has beside its `experiment`, finite and, the seed apart, above 0."""
BY_SAMPLE = {"sample": int, "loss_sum": float, "tokens": int, "bytes": int}
TABLES = {
    "history.csv": {"phase": str, "step": int, "metric": str, "value": float},
    "val_by_sample.csv": BY_SAMPLE,
    "development_by_sample.csv": BY_SAMPLE,
    "test_by_sample.csv": BY_SAMPLE,
}
READABLE = (2, PROTOCOL)
"""Protocols whose runs are read, though not in one table: protocol 2's test text is protocol 3's development text."""
"""The columns of a run's tables, which are committed beside its metrics.json when it took long."""
DRAWN = {"seed": "seed", "data_seed": "text", "embedding_seed": "signs"}
"""Parameters that a replicate draws anew, and what each of them is arbitrary about."""
PAIR = [*DRAWN]
"""What two runs that are a pair have in common, beside what they are compared at."""
TYPES = ("float32", "bfloat16")
"""Types of product that an experiment may have; an n-gram, which has no products, names another."""
ALIKE = {"experiment", "train_tokens", "train_samples", "device", "train_loss_after_epoch", "val_every_steps", *DRAWN}
"""Parameters that may differ between the runs of one configuration: size, replicate, machine, what else is measured."""


def read_runs(*grids: str) -> pd.DataFrame:
    """The finished runs of one or several grids, a row a run, ready for a formula.

    Of a grid that has a file, only runs that it asks for with the parameters that they have are read; others are an
    earlier file's. Of a folder in `outputs` without such a file, as `interactive`, where runs made by hand are, all.
    Beside the content of metrics.json there are

    - `grid`, `run`, and `id`, which joins both;
    - `configuration`: the experiment's label and, where its runs differ in more than size and replicate, in what; of
      runs made by hand then the run's name;
    - `replicate`, as `replicates` numbers them over all grids;
    - `log_ppl` (nats, of the test text; `val_loss` is of validation), `log_tokens`, `log2_tokens`;
    - `log_over_fitting`: log of the last epoch's validation PPL over the best one's; nan where training ended by the
      limit of epochs, not by an early stop, and has no over-fitting to show yet.

    - `planned`: how many runs the grid's file asks for.

    Raises:
        ConfigError: a grid has no finished run; a file is damaged; runs were judged by a protocol that is no longer
            read, or by two; or multiply in two types that their grid's file does not give them.
    """
    frames = []
    for grid in dict.fromkeys(grids):
        plan = None if _by_hand(grid) else load_grid(grid)
        name = plan.name if plan else grid
        runs = load_runs(name)
        if plan and len(runs):
            runs = runs[
                [run["run"] in plan.runs and plan.runs[run["run"]].is_that_of(run) for _, run in runs.iterrows()]
            ]
        if runs.empty:
            first = f"`make report GRID={grid}`" if plan else "notebooks/02_experiment.ipynb"
            raise ConfigError(f"grid {grid} has no finished run yet: run {first} first")
        _check_alike(name, runs, plan and plan.runs)
        frames.append(runs.assign(grid=name, planned=len(plan.runs) if plan else len(runs)))
    found = pd.concat(frames, ignore_index=True)
    if found["protocol"].nunique() > 1:
        judged = found.groupby("grid")["protocol"].first()
        listed = ", ".join(f"{grid} by protocol {protocol}" for grid, protocol in judged.items())
        raise ConfigError(f"grids were not judged on the same text ({listed}): read those of one protocol")
    found = _configured(found)
    if by_hand := [grid for grid in grids if _by_hand(grid)]:
        found = _told_apart(found, found["grid"].isin(by_hand))
    found["id"] = found["grid"] + "/" + found["run"]
    found["replicate"] = replicates(found)
    found["log_ppl"] = found.get("test_loss", math.nan)
    found["log_tokens"], found["log2_tokens"] = np.log(found["train_tokens"]), np.log2(found["train_tokens"])
    if {"overfit_rate", "epochs_run"} <= {*found}:
        stopped = found["epochs_run"] - found["best_epoch"] >= found["phase2_patience"]
        found["log_over_fitting"] = np.log1p(found["overfit_rate"]).where(stopped)
    return found


def read_finished(*grids: str) -> pd.DataFrame:
    """As `read_runs`, of those of the grids that have a finished run: for a page whose runs are still being made.

    Raises:
        ConfigError: none has one, or as `read_runs`.
    """
    return read_runs(*([grid for grid in grids if run_folders(grid)] or grids))


def _by_hand(grid: str) -> bool:
    """Whether a grid is a folder of finished runs that no file plans."""
    planned = (ROOT / "params" / "grids" / f"{grid}.yaml").exists()
    return grid == BY_HAND or (not planned and any(source == "outputs" for _, source in run_folders(grid).values()))


def _told_apart(runs: pd.DataFrame, by_hand: pd.Series) -> pd.DataFrame:
    """Runs made by hand, which no plan keeps apart, with their experiment in `configuration`, or with their own name
    where it stands for several unlike ones; and with the type of their products where it is not one for all."""
    label = runs["configuration"].where(~by_hand, runs["experiment"])
    kinds = [name for name in Experiment.model_fields if name in runs and name not in ALIKE]
    for _, own in runs[by_hand].groupby(["grid", "experiment"]):
        alike = (own[kinds].nunique(dropna=False) <= 1).all() and not own.duplicated(["train_tokens", *PAIR]).any()
        label[own.index] = own["experiment"] if alike else own["run"]
    typed = by_hand & runs["dtype"].isin(TYPES)
    if runs.loc[typed, "dtype"].nunique() > 1:
        label[typed] += ", dtype " + runs["dtype"]
    if "stopped" in runs:
        label[by_hand & runs["stopped"].eq(True)] += ", stopped"
    return runs.assign(configuration=label)


def read_histories(runs: pd.DataFrame) -> pd.DataFrame:
    """What was measured on the way, of all `runs`: columns phase, step, metric, value, and all of the runs' own."""
    tables = pd.concat([load_table(grid, "history.csv").assign(grid=grid) for grid in runs["grid"].unique()])
    return tables[["grid", "run", "phase", "step", "metric", "value"]].merge(runs, on=["grid", "run"])


def loss_sums(runs: pd.DataFrame, part: str = "test") -> tuple[np.ndarray, np.ndarray] | None:
    """Sums of the losses, nats [runs, samples], on every judged sample of `part`, and the samples' tokens [samples].

    None where not all runs were judged on the same text, or one of them is not on disk.
    """
    sums, tokens, name = {}, None, f"{part}_by_sample.csv"
    folders = {grid: run_folders(grid) for grid in runs["grid"].unique()}
    for row in runs.drop_duplicates("id").itertuples():
        folder, _ = folders[row.grid].get(row.run, (None, ""))
        if folder is None:
            return None
        judged = _table(row.grid, row, folder / name).set_index("sample").sort_index()
        tokens = judged["tokens"] if tokens is None else tokens
        if not judged["tokens"].equals(tokens):
            return None
        sums[row.id] = judged["loss_sum"].to_numpy(float)
    return (np.stack([sums[name] for name in runs["id"]]), tokens.to_numpy(float)) if sums else None


def replicates(runs: pd.DataFrame) -> pd.Series:
    """The replicate of every run, numbered from 0.

    Of `DRAWN` those count that vary: runs that have a value of one of them in common, or each with a third run, are of
    one replicate. Seeds crossed with texts are thus a single one, from which nothing can be concluded beyond them.
    """
    varied = [pd.factorize(runs[name])[0] for name in DRAWN if name in runs and runs[name].nunique() > 1]
    links, nodes = [], len(runs)
    for codes in varied:  # a node for every run and every value
        links.append((np.arange(len(runs)), nodes + codes))
        nodes += codes.max() + 1
    if not links:
        return pd.Series(0, runs.index)
    ends = tuple(np.concatenate(side) for side in zip(*links, strict=True))
    graph = sparse.coo_matrix((np.ones(len(ends[0])), ends), shape=(nodes, nodes))
    _, found = sparse.csgraph.connected_components(graph, directed=False)
    return pd.Series(pd.factorize(found[: len(runs)])[0], runs.index)


def overview(runs: pd.DataFrame) -> pd.DataFrame:
    """What the runs of each grid are: how many, of how many planned, in how many replicates, by which rules."""
    # of one configuration: two unlike runs are no replicates
    repeated = runs.groupby(["grid", "configuration"])["replicate"].nunique().groupby("grid").max()
    drawn = {
        grid: [said for name, said in DRAWN.items() if repeated[grid] > 1 and own[name].nunique() > 1]
        for grid, own in runs.groupby("grid")
    }
    rows = {
        grid: {
            "finished runs": len(own),
            "planned": own["planned"].iloc[0],
            "replicates": repeated[grid],
            "drawn anew in each": ", ".join(drawn[grid]) or "nothing",
            "training tokens": ", ".join(f"{size:,}" for size in sorted(own["train_tokens"].unique())),
            "protocol": ", ".join(map(str, sorted(own["protocol"].unique()))),
            "products": ", ".join(sorted(own["dtype"].unique())),
            "source": ", ".join(sorted(own["source"].unique())),
        }
        for grid, own in runs.groupby("grid")
    }
    return pd.DataFrame(rows).T.rename_axis("grid")


def _configured(runs: pd.DataFrame) -> pd.DataFrame:
    """With the column `configuration`."""
    label = runs["experiment"]
    for name in (name for name in Experiment.model_fields if name in runs and name not in ALIKE):
        # `auto` takes each machine's faster type: only a grid that sweeps it has one cell in both
        kind = ["experiment", *(["train_tokens", *PAIR] if name == "dtype" else [])]
        if runs.groupby(kind)[name].nunique(dropna=False).max() > 1:
            label = label + f", {name} " + runs[name].map(_shown)
    return runs.assign(configuration=label)


def _shown(value: Any) -> str:
    """A parameter's value in a label; of a column with gaps, pandas makes 256 a 256.0 and None a nan."""
    if pd.isna(value):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_alike(grid: str, runs: pd.DataFrame, plan: Mapping[str, Experiment] | None) -> None:
    """Refuse runs that cannot stand beside one another; without a plan, types of products may differ.

    Raises:
        ConfigError: as `read_runs`.
    """
    other = runs.loc[(runs["protocol"] != runs["protocol"].max()) | ~runs["protocol"].isin(READABLE), "run"]
    if len(other):
        judged = " and ".join(f"{n} by protocol {by}" for by, n in runs["protocol"].value_counts().sort_index().items())
        raise ConfigError(
            f"grid {grid} has runs that were judged otherwise than by one protocol, {' or '.join(map(str, READABLE))} "
            f"({judged}): delete the metrics.json of each, as of {other.iloc[0]}, and run "
            + (f"`make report GRID={grid}` again" if plan else "it again")
        )
    if not plan:
        return
    typed = runs[runs["dtype"].isin(TYPES)]
    if typed["dtype"].nunique() > 1 and [plan[run].dtype for run in typed["run"]] != typed["dtype"].tolist():
        counts = typed["dtype"].value_counts().sort_index()
        types = " and ".join(f"{n} in {kind}" for kind, n in counts.items())
        raise ConfigError(
            f"grid {grid} has runs whose matrix products are of two types (dtype: {types}), which its file does not "
            f"give them: write `dtype: {counts.idxmax()}`, or the other one, under `common` in that file and run `make "
            f"report GRID={grid}` again"
        )


def load_runs(grid: str) -> pd.DataFrame:
    """One row a finished run: the content of metrics.json, the run's name and its source.

    A parameter that is younger than a run has its default there, which is how the run was made; a run that names no
    `protocol` was judged by protocol 1.

    Raises:
        ConfigError: a metrics.json is not readable, or does not hold what a run has.
    """
    rows = [_load_run(grid, run, folder, source) for run, (folder, source) in run_folders(grid).items()]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).sort_values(["experiment", "train_tokens", "seed", "run"], ignore_index=True)


def _load_run(grid: str, run: str, folder: Path, source: str) -> dict[str, Any]:
    """A row of `load_runs`."""
    path = folder / "metrics.json"
    try:
        metrics = parse_json(path.read_bytes())
        _check_metrics(metrics)
        check_seal(metrics, path)
        if source == "committed" and not _is_named(run, metrics):
            raise ValueError("it is another run's")
    except (OSError, ValueError) as error:
        raise _damaged(grid, run, source, path, error) from None
    by_default = {name: field.default for name, field in Experiment.model_fields.items()}
    by_default |= {"run": run, "source": source, "phase1_cached": False, "protocol": 1}
    return by_default | metrics


def _is_named(run: str, metrics: Mapping[str, Any]) -> bool:
    """Whether a run has the experiment and the parameters that its name says."""
    parameters = "|".join(sorted(Experiment.model_fields, key=len, reverse=True))
    label, *said = re.split(rf"_({parameters})-", run)
    return label == metrics["experiment"] and [str(metrics.get(name)) for name in said[::2]] == said[1::2]


def _check_metrics(metrics: Any) -> None:
    """Refuse what is no run's metrics.json, or one without the numbers that everything else is computed from."""
    if not isinstance(metrics, dict) or not isinstance(metrics.get("experiment"), str):
        raise ValueError("it holds no run")
    fields = {name: field.default for name, field in Experiment.model_fields.items()} | {"protocol": PROTOCOL}
    for name in fields.keys() & metrics:
        value, text = metrics[name], isinstance(fields[name], str)
        if isinstance(value, list | dict) or isinstance(value, str) != text or not str(value).isprintable():
            raise ValueError(f"{name} = {shown(value)} is not possible")
    for name, kind in NUMBERS.items():
        if name not in metrics:
            raise ValueError(f"it has no {name}")
        value = metrics[name]
        if type(value) not in (int, kind) or not 0 <= value < 1e300 or (value == 0 and name != "seed"):
            raise ValueError(f"{name} = {shown(value)} is not possible")


class Damaged(ConfigError):
    """A file of a finished run is not what was written."""

    def __init__(self, sentence: str, path: Path, source: str):
        super().__init__(sentence)
        self.path, self.source = path, source


def _damaged(grid: str, run: str, source: str, path: Path, error: Exception) -> Damaged:
    again = "delete its metrics.json and run it again" if _by_hand(grid) else f"`make report GRID={grid}` runs it again"
    remedy = again if source == "outputs" else "restore it by git"
    why = " ".join(str(error).split())
    return Damaged(f"{run}/{path.name} of grid {grid} is damaged ({why}): {remedy}", path, source)


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
        raise _damaged(grid, run, source, folder / LOSSES, ValueError("an array of it is not whole"))
    return arrays


def damaged_runs(grid: str) -> list[Damaged]:
    """What is damaged in the files of a grid's finished runs, or missing: one thing a run."""
    found = []
    for run, (folder, source) in run_folders(grid).items():
        try:
            row = pd.Series(_load_run(grid, run, folder, source))
            for name in tables_of(row["protocol"]):
                _table(grid, row, folder / name)
            load_val_losses(grid, run)
            # which may be deleted to save space, but not changed
            for path in (path for path in (folder / LOSSES, folder / WEIGHTS) if path.exists()):
                try:
                    check_seal({"files": row["files"]}, path)
                except (OSError, ValueError) as error:
                    raise _damaged(grid, run, source, path, error) from None
        except Damaged as damage:
            found.append(damage)
    return found


def tables_of(protocol: int) -> list[str]:
    """The names of those of `TABLES` that a run has."""
    return [name for name in TABLES if protocol > 2 or not name.startswith("development")]


def set_aside(damage: Damaged) -> None:
    """Put a damaged file of a run under another name, and what marks the run as finished: it is then done again.

    Raises:
        Damaged: it is a committed run, which git has.
    """
    if damage.source != "outputs":
        raise damage
    for path in {damage.path, damage.path.with_name("metrics.json")}:
        if path.exists():
            path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))


def load_table(grid: str, name: str) -> pd.DataFrame:
    """One of `TABLES` of every finished run, with columns run, experiment, train_tokens and seed before its own.

    Raises:
        ConfigError: one is damaged.
    """
    folders, tables = run_folders(grid), []
    for row in load_runs(grid).itertuples():
        table = _table(grid, row, folders[row.run][0] / name)
        for column in ("seed", "train_tokens", "experiment", "run"):
            table.insert(0, column, getattr(row, column))
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _table(grid: str, run: Any, path: Path) -> pd.DataFrame:
    """One of `TABLES` of a run, a row of `load_runs`.

    Raises:
        ConfigError: as `load_table`.
    """
    try:
        table = _read_table(path)
        check_seal({"files": getattr(run, "files", None)}, path)
        if "tokens" in table:  # of N tokens N - 1 are predicted
            asked, there = getattr(run, f"{path.name.partition('_')[0]}_tokens") - 1, table["tokens"].sum()
            if there != asked:
                raise ValueError(f"it has {there} tokens, metrics.json asks for {asked}")
    except (OSError, ValueError, OverflowError) as error:
        raise _damaged(grid, run.run, run.source, path, error) from None
    return table


def _read_table(path: Path) -> pd.DataFrame:
    """One of `TABLES`.

    Raises:
        ValueError: it is cut off within a line, or is something else.
        OSError: it cannot be read.
    """
    known = path.stat()  # a page asks for the same tables again and again
    return _parsed(path, known.st_mtime_ns, known.st_size).copy()


@functools.lru_cache(maxsize=4096)
def _parsed(path: Path, _changed: int, _size: int) -> pd.DataFrame:
    content, columns = path.read_bytes(), TABLES[path.name]
    table = pd.read_csv(io.BytesIO(content), dtype=columns)
    if list(table.columns) not in (list(columns), [name for name in columns if name != "bytes"]):  # by protocol 2
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
    try:
        kept = path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except (FileNotFoundError, IsADirectoryError):
        kept = ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it") from None
    if not kept:  # not there, or as a power cut leaves it: nothing is lost with it
        if path.is_dir():
            shutil.rmtree(path)
        first = next(iter((networks or asking).values()))
        found = known[0] if known else str(resolve_dtype(first, resolve_device(first))).removeprefix("torch.")
        with atomic(path) as temporary:
            temporary.write_text(found + "\n", encoding="utf-8")
        return found
    found = kept
    if found not in types:
        raise ConfigError(f"{path} holds {shown(found)}: write float32 or bfloat16 there, as the grid's runs have it")
    if known and found not in known:
        raise ConfigError(
            f"{path} says {found}, but {len(known)} finished runs are in {known[0]}: write that, or delete their "
            "metrics.json to run them again"
        )
    return found


def main() -> int:
    """Check the files of all finished runs, in `outputs` and committed; print what is damaged."""
    roots = [root for root in (outputs_dir(), results_dir()) if root.is_dir()]
    grids = {path.parent.parent.relative_to(root).as_posix() for root in roots for path in root.rglob("metrics.json")}
    damage = [one for grid in sorted(grids) for one in damaged_runs(grid)]
    for one in damage:
        print(one)
    count = sum(len(run_folders(grid)) for grid in grids)
    print(f"{count} runs of {len(grids)} grids: {len(damage) or 'none'} damaged")
    return 1 if damage else 0


if __name__ == "__main__":
    sys.exit(main())
