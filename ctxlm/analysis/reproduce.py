"""Published runs, drawn at random, run again and compared: `make reproduce K=12`.

A run is made again with its own type of products, seed and text, and agrees where its perplexities lie within
`TOLERANCE`. On another processor it may well not: that one rounds otherwise, and training carries it on. What
is done again lies in `outputs/reproduce`; a command that was stopped goes on with it.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
from snakemake.utils import available_cpu_count

from ctxlm.analysis.runs import load_runs
from ctxlm.batch import run_apart
from ctxlm.config import ConfigError, Experiment
from ctxlm.files import atomic, outputs_dir, results_dir

TOLERANCE = {"bfloat16": 0.005, "float32": 1e-4}
"""How far apart two perplexities of one run may be, as a share; those of n-grams as in float32."""


def draw(count: int, seed: int, grids: Sequence[str] = ()) -> pd.DataFrame:
    """Published runs, drawn at random; a longer draw begins as a shorter one.

    Args:
        count: how many.
        seed: of the draw.
        grids: what is drawn from; by default all that is published.

    Raises:
        ConfigError: there are not so many.
    """
    names = grids or sorted(path.parent.name for path in results_dir().glob("*/runs.csv"))
    tables = {grid: load_runs(grid, committed=True).assign(grid=grid) for grid in names}
    if empty := [grid for grid, table in tables.items() if table.empty]:
        raise ConfigError(f"grid {empty[0]!r} has no published runs: docs/grids.md lists those that have")
    runs = pd.concat(tables.values() or [pd.DataFrame()])
    if not 0 < count <= len(runs):
        where = f" of {', '.join(grids)}" if grids else ""
        raise ConfigError(f"K = {count}: {len(runs)} runs{where} are published: ask for 1 or more of those")
    return runs.sample(frac=1, random_state=seed).head(count)


def again(published: pd.Series) -> dict[str, object]:
    """A published run, run again: its perplexities of validation and test, then and now, and whether they agree."""
    e, folder = Experiment.of_run(published), outputs_dir() / "reproduce" / published["grid"] / published["run"]
    e = e.model_copy(update={"dtype": published["dtype"]})
    tolerance = TOLERANCE["float32" if e.model == "kneser-ney" else e.dtype]
    try:
        metrics = run_apart(e, folder)
    except ConfigError as error:  # the others are still compared
        print(error, file=sys.stderr)
        metrics = {}
    row: dict[str, object] = {"grid": published["grid"], "run": published["run"], "dtype": e.dtype}
    same = metrics.get("device_name") == published["device_name"]
    row["processor"] = "the same" if same else "another, or unknown"
    for name in ("val_ppl", "test_ppl"):
        row |= {name: published[name], f"{name}, again": metrics.get(name, float("nan"))}
    changes = [row[f"{name}, again"] / row[name] - 1 for name in ("val_ppl", "test_ppl")]
    row |= {"change, %": 100 * max(changes, key=abs), "allowed, %": 100 * tolerance}
    return row | {"agrees": all(abs(c) <= tolerance for c in changes)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--grid", action="append", default=[], help="draw from this grid alone; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=available_cpu_count(), help="runs at a time")
    given = parser.parse_args(arguments)
    rows = []
    try:
        runs = draw(given.count, given.seed, given.grid)
        print(f"{len(runs)} runs, which took {runs['total_seconds'].sum() / 60:.0f} minutes when published", flush=True)
        with ThreadPoolExecutor(given.jobs) as pool:
            for row in pool.map(again, [run for _, run in runs.iterrows()]):
                rows.append(row)
                print(
                    f"{row['grid']}/{row['run']}: test PPL {row['test_ppl']:.2f}, again {row['test_ppl, again']:.2f}, "
                    f"{'agrees' if row['agrees'] else 'DIFFERS'} ({row['change, %']:+.2f} %; on one processor "
                    f"{row['allowed, %']:g} % is allowed, and this is {row['processor']}); "
                    f"{given.count - len(rows)} left",
                    flush=True,
                )
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if rows:
            with atomic(outputs_dir() / "reproduce" / "reproduce.csv") as path:
                pd.DataFrame(rows).to_csv(path, index=False)
    agreed = sum(row["agrees"] for row in rows)
    print(f"{agreed} of {len(rows)} agree; {outputs_dir() / 'reproduce' / 'reproduce.csv'} has the numbers")
    return 0 if agreed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
