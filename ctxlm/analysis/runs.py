"""The finished runs of a grid as tidy tables: a row a run, a row a run and step, a row a run and judged sample.

While you work, a run is a folder (`ctxlm.run`). What is published is three files a grid,
`data/results/<grid>/{runs.csv, history.parquet, samples.parquet}`, which `make results GRID=x` writes. They are read
where there is no folder of a run of the grid.
"""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from ctxlm.config import ConfigError, Experiment, Grid, load_grid
from ctxlm.corpus import PROTOCOL
from ctxlm.files import BY_HAND, ROOT, atomic, outputs_dir, results_dir, run_folders

TABLES = {"history": ["phase", "step", "metric", "value"], "samples": ["part", "sample", "loss_sum", "tokens", "bytes"]}
"""A run's tables, and their columns."""
DRAWN = {"seed": "seed", "data_seed": "training text", "embedding_seed": "signs"}
"""Parameters that a replicate draws anew and a pair has in common, and what each of them is arbitrary about."""
VARIED = {"experiment", "train_tokens", *DRAWN}
"""Parameters that may differ between the runs of one configuration: size and replicate."""
BY_THE_WAY = ("device", "dtype", "validations_per_epoch")
"""Parameters that may differ, too, but where one replicate has both: then a grid sweeps them."""
TEXTS = "run experiment git_commit params_hash code_hash data_hash embedding_digest versions device_name".split()
"""Columns of runs.csv that pandas could take for numbers."""


TEXT_NAMES = {"chitchat": "conversations", "sotu": "speeches", "docstrings": "technical text"}
TEXT_NAMES |= {"+".join(TEXT_NAMES): "three texts mixed", "prompts": "user prompts"}
EMBEDDING_NAMES = {"ppmi": "PPMI", "smollm2": "SmolLM2"}
"""What a reader calls corpora and embeddings."""


# A grid's tables


def load_runs(grid: str, committed: bool = False) -> pd.DataFrame:
    """One row a finished run: the content of metrics.json, the run's name and its source. Without any, no row.

    A parameter that is younger than a run has its default there, which is how the run was made.
    """
    if folders := run_folders(grid, committed):
        read = {name: json.loads((folder / "metrics.json").read_bytes()) for name, (folder, _) in folders.items()}
        runs = pd.DataFrame([{"run": name, "source": folders[name][1]} | metrics for name, metrics in read.items()])
    elif (published := results_dir() / grid / "runs.csv").exists():
        runs = _read_published(published).assign(source="committed")
    else:
        return pd.DataFrame()
    return _with_defaults(runs).sort_values(["experiment", "train_tokens", "seed", "run"], ignore_index=True)


def _with_defaults(runs: pd.DataFrame) -> pd.DataFrame:
    younger = {name: field.default for name, field in Experiment.model_fields.items() if name not in runs}
    runs = runs.assign(**younger).copy()  # in one piece, which so many columns are not at once
    for name, field in Experiment.model_fields.items():
        if type(None) not in get_args(field.annotation) and runs[name].isna().any():  # else null says something
            runs[name] = runs[name].where(runs[name].notna(), field.default).astype(type(field.default))
    return runs


def load_planned(plan: Grid) -> pd.DataFrame:
    """As `load_runs`, of the runs that a grid asks for, with these parameters: others are an earlier file's."""
    return _asked(plan, load_runs(plan.name))


def _asked(plan: Grid, runs: pd.DataFrame) -> pd.DataFrame:
    rows = _with_defaults(runs).to_dict("records")
    return runs[[row["run"] in plan.runs and plan.runs[row["run"]].is_that_of(row) for row in rows]] if rows else runs


def with_shape(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of the context model with `shape`, A (six layers) or B (three), and `recipe`: study, stabilised or other."""
    bias, std, scale = runs["output_bias"], runs["phase2_init_std"], runs["logit_scale"]
    small_logits = np.isclose(scale, np.sqrt(32 / runs["embed_dim"]), rtol=0.01)  # grids round it
    kinds = [(bias == "none") & (std == 0.1) & (scale == 1), (bias == "unigram") & (std == 0.01) & small_logits]
    recipe = np.select(kinds, ["study", "stabilised"], "other")
    return runs.assign(shape=runs["num_layers"].map({6: "A", 3: "B"}), recipe=recipe)


def with_site(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with their site in words: their `text`, `through` which embedding; and the `order` that Phase 2 reads in."""
    through = runs["embedding"].replace(EMBEDDING_NAMES).where(runs["model"] != "kneser-ney", "n-gram")
    order = runs["phase2_shuffle"].eq(True).map({True: "random order", False: "text order"})
    return runs.assign(text=runs["corpus"].replace(TEXT_NAMES), through=through, order=order)


def load_table(grid: str, name: str, committed: bool = False) -> pd.DataFrame:
    """One of `TABLES` of all finished runs of a grid: column `run`, and its own."""
    if folders := run_folders(grid, committed):
        tables = {run: pd.read_csv(folder / f"{name}.csv") for run, (folder, _) in folders.items()}
        joined = pd.concat(tables, names=["run"]).reset_index(level=0).reset_index(drop=True)
        return joined.astype({"value": float} if name == "history" else {})  # an n-gram's is empty, of any type
    path = results_dir() / grid / f"{name}.parquet"
    return _parquet(path, path.stat().st_mtime_ns) if path.exists() else pd.DataFrame(columns=["run", *TABLES[name]])


def _read_published(path: Path) -> pd.DataFrame:
    # only what is empty is missing: a label may be NA
    return pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""]).copy()


@functools.lru_cache(64)
def _parquet(path: Path, _changed: int) -> pd.DataFrame:
    return pd.read_parquet(path).astype({"run": str})


def publish(grid: str) -> Path:
    """Write the finished runs in `outputs` that a grid asks for into its tables, beside earlier ones that it asks for.

    Raises:
        ConfigError: there is none, or one was made from a tree with changes, so that no commit says how.
    """
    plan = load_grid(grid)
    name, runs = plan.name, load_planned(plan)
    if runs.empty or "outputs" not in set(runs["source"]):
        raise ConfigError(f"grid {grid} has no finished run in {outputs_dir()}: run `make report GRID={grid}` first")
    runs = runs.drop(columns="source")
    if unclean := runs.loc[~runs["git_commit"].fillna("-dirty").str.fullmatch("[0-9a-f]+"), "run"].tolist():
        raise ConfigError(
            f"{len(unclean)} runs of grid {grid} were made from a tree with changes, as {unclean[0]}: commit them, "
            "delete the runs' folders, and run the grid again"
        )
    runs["versions"] = runs["versions"].map(json.dumps)
    tables = {table: load_table(name, table) for table in TABLES}
    tables = {table: rows[rows["run"].isin(runs["run"])] for table, rows in tables.items()}
    folder = results_dir() / name
    if (folder / "runs.csv").exists():
        earlier, new = _read_published(folder / "runs.csv"), set(runs["run"])
        earlier = _asked(plan, earlier[~earlier["run"].isin(new)])
        runs = pd.concat([earlier, runs])
        for table, rows in tables.items():
            before = pd.read_parquet(folder / f"{table}.parquet")
            tables[table] = pd.concat([before[before["run"].isin(earlier["run"])], rows])
    _check_alike(runs.assign(grid=name))
    write_tables(folder, runs, tables)
    return folder


def write_tables(folder: Path, runs: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> None:
    """Write published tables, sorted by run, `runs.csv` last."""
    for name, rows in tables.items():
        with atomic(folder / f"{name}.parquet") as path:
            rows = rows.sort_values("run", kind="stable", ignore_index=True)
            integers = {column: "Int32" for column in ("step", "sample", "tokens", "bytes") if column in rows}
            rows.astype(integers | {"run": "category"}).to_parquet(path, index=False, compression="zstd")
    with atomic(folder / "runs.csv") as path:
        runs.sort_values("run", ignore_index=True).to_csv(path, index=False)


# Tables for the pages


def read_runs(*grids: str) -> pd.DataFrame:
    """The finished runs of one or several grids, a row a run, ready for a formula.

    Of a grid that has a file, only runs that it asks for with the parameters that they have are read; others are an
    earlier file's. Of one without, all: of runs made by hand, as in `interactive`, or by a grid's file elsewhere.
    Beside the content of metrics.json there are the columns that docs/results.md names; `replicate` as `replicates`
    numbers them over all grids, `log_over_fitting` nan where training ended by the limit of epochs, not by an early
    stop, and has no over-fitting to show yet.

    Raises:
        ConfigError: a grid has no finished run, or runs were judged by another protocol, or on text that has changed.
    """
    frames = []
    for grid in dict.fromkeys(grids):
        plan, runs = _load(grid)
        if runs.empty:
            first = f"`make report GRID={grid}`" if plan else "notebooks/02_experiment.ipynb"
            raise ConfigError(f"grid {grid} has no finished run yet: run {first} first")
        known = {"grid": plan.name, "planned": len(plan.runs)} if plan else {"grid": grid, "planned": len(runs)}
        frames.append(runs.assign(**known, by_hand=plan is None and runs["source"].eq("outputs")))
    joined = pd.concat(frames, ignore_index=True)
    _check_alike(joined)
    joined["configuration"] = _configurations(joined, joined.pop("by_hand"))
    joined["id"] = joined["grid"] + "/" + joined["run"]
    joined["replicate"] = replicates(joined)
    joined["log_ppl"] = joined.get("test_loss", math.nan)
    joined["log_tokens"], joined["log2_tokens"] = np.log(joined["train_tokens"]), np.log2(joined["train_tokens"])
    if {"overfit_rate", "epochs_run"} <= {*joined}:
        joined["log_over_fitting"] = np.log1p(joined["overfit_rate"]).where(stopped_early(joined))
    return joined


def stopped_early(runs: pd.DataFrame) -> pd.Series:
    """Whether validation, not the limit of epochs, ended each of `runs`: those alone have over-fitting to show."""
    # several validations an epoch make these fractions, whose difference is not exact
    return (runs["epochs_run"] - runs["best_epoch"]).round(6) >= runs["phase2_patience"]


def read_finished(*grids: str) -> pd.DataFrame:
    """As `read_runs`, of those of the grids that have a finished run: for a page whose runs are still being made.

    Raises:
        ConfigError: none has one, or as `read_runs`.
    """
    return read_runs(*([grid for grid in grids if len(_load(grid)[1])] or grids))


def _load(grid: str) -> tuple[Grid | None, pd.DataFrame]:
    """A grid's file and the finished runs it asks for; of runs by hand, or whose file is elsewhere, None and all."""
    planned = (ROOT / "params" / "grids" / f"{grid}.yaml").exists()
    if grid == BY_HAND or (not planned and len(load_runs(grid))):
        return None, load_runs(grid)
    return (plan := load_grid(grid)), load_planned(plan)


def _configurations(runs: pd.DataFrame, by_hand: pd.Series) -> pd.Series:
    """Of every run its experiment's label and, where a label has unlike runs, in what they differ.

    Of runs made `by_hand`, which no plan keeps apart, the experiment's label or, where it has unlike runs, the run's.
    """
    label, kinds = runs["experiment"], [name for name in Experiment.model_fields if name in runs and name not in VARIED]
    for name in kinds:
        kind = ["experiment", *(["train_tokens", *DRAWN] if name in BY_THE_WAY else [])]
        if runs.groupby(kind)[name].nunique(dropna=False).max() > 1:
            label = label + f", {name} " + runs[name].map(_formatted)
    label = label.where(~by_hand, runs["experiment"])
    for _, rows in runs[by_hand].groupby(["grid", "experiment"]):
        if (rows[kinds].nunique(dropna=False) > 1).any() or rows.duplicated(["train_tokens", *DRAWN]).any():
            label[rows.index] = rows["run"]
    if "stopped" in runs:
        label[by_hand & runs["stopped"].eq(True)] += ", stopped"
    return label


def _formatted(value: Any) -> str:
    """A parameter's value in a label; of a column with gaps, pandas makes 256 a 256.0 and None a nan."""
    if pd.isna(value):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_histories(runs: pd.DataFrame) -> pd.DataFrame:
    """What was measured on the way, of all `runs`: columns phase, step, metric, value, and all of the runs' own."""
    tables = pd.concat([load_table(grid, "history").assign(grid=grid) for grid in runs["grid"].unique()])
    return tables.merge(runs, on=["grid", "run"])


def loss_sums(runs: pd.DataFrame, part: str = "test") -> tuple[np.ndarray, np.ndarray] | None:
    """Sums of the losses, nats [runs, samples], on every judged sample of `part`, and the samples' tokens [samples].

    None where not all runs were judged on the same text, or one of them is not on disk.
    """
    judged = pd.concat([load_table(grid, "samples").assign(grid=grid) for grid in runs["grid"].unique()])
    judged = judged[judged["part"] == part].assign(id=lambda rows: rows["grid"] + "/" + rows["run"])
    judged = judged[judged["id"].isin(runs["id"])]
    judged = judged.astype({"tokens": float})  # in which a missing one equals nothing
    sums, tokens = (judged.pivot(index="id", columns="sample", values=name) for name in ("loss_sum", "tokens"))
    if not runs["id"].isin(sums.index).all() or tokens.ne(tokens.iloc[0]).any(axis=None):
        return None
    return sums.loc[runs["id"]].to_numpy(), tokens.iloc[0].to_numpy()


def replicates(runs: pd.DataFrame) -> pd.Series:
    """The replicate of every run, numbered from 0.

    Of `DRAWN` those count that vary: runs that have a value of one of them in common, or each with a third run, are of
    one replicate. Seeds crossed with texts are thus a single one, from which nothing can be concluded beyond them.
    """
    varied = [runs[name].to_numpy() for name in DRAWN if runs[name].nunique() > 1]
    shared = np.any([v[:, None] == v for v in varied], axis=0) if varied else np.ones((len(runs), len(runs)))
    return pd.Series(connected_components(shared)[1], runs.index)


def overview(runs: pd.DataFrame) -> pd.DataFrame:
    """What the runs of each grid are: how many, of how many planned, in how many replicates, by which rules."""
    table = {}
    for grid, rows in runs.groupby("grid"):
        repeated = rows.groupby("configuration")["replicate"].nunique().max()  # two unlike runs are no replicates
        drawn = [label for name, label in DRAWN.items() if repeated > 1 and rows[name].nunique() > 1]
        rates = rows.reindex(columns=["overfit_rate", "log_over_fitting"])  # n-grams have neither
        ended = rates["overfit_rate"].notna() & rates["log_over_fitting"].isna()
        table[grid] = {
            "runs read here": len(rows),
            "planned in all": rows["planned"].iloc[0],
            "replicates": repeated,
            "drawn anew in each": ", ".join(drawn) or "nothing",
            "ended by the limit of epochs": f"{ended.sum()} of {len(rows)}",
            "training tokens": ", ".join(f"{size:,}" for size in sorted(rows["train_tokens"].unique())),
            "dtype": ", ".join(sorted(rows["dtype"].unique())),
            "source": ", ".join(sorted(rows["source"].unique())),
            "commits": ", ".join(sorted(rows["git_commit"].fillna("none").str[:7].unique())),
        }
    return pd.DataFrame(table).T.rename_axis("grid")


def _check_alike(runs: pd.DataFrame) -> None:
    """Refuse runs by another protocol than today's, and runs on a text that has changed since."""
    if len(others := runs[runs["protocol"] != PROTOCOL]):
        first = others.iloc[0]
        raise ConfigError(
            f"{len(others)} runs, as {first['run']} of grid {first['grid']}, were judged by protocol "
            f"{first['protocol']}, not by today's, {PROTOCOL}: delete the older runs' folders and run them again"
        )
    for (corpus, *_), rows in runs.groupby(["corpus", "judged_corpus", "embedding"], dropna=False):
        first = rows.drop_duplicates("data_hash").dropna(subset="data_hash")["run"]
        if len(first) > 1:
            raise ConfigError(
                f"corpus = {corpus!r} was another text for {first.iloc[0]} than for {first.iloc[1]}: delete "
                "the older runs' folders"
            )


if __name__ == "__main__":
    try:
        print(publish(sys.argv[1]))
    except (ConfigError, OSError) as error:
        sys.exit(str(error))
