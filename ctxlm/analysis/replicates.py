"""Which runs are independent of which, and what follows from it for every interval.

Runs that share a seed share initial weights; runs that share a training window share text, and a shorter stream is the
beginning of a longer one; runs may share a draw of the embedding. Such runs are not independent, whatever their size. A
*replicate* is a set of runs that shares none of these with any other set: every estimate is computed in each replicate
by itself, and the replicates' values are averaged, with Student's interval over them (the summary-measures approach;
Frison & Pocock, 1992). Nothing need then be assumed of the errors inside a replicate.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import sparse, stats

CONFIDENCE = 0.95
DRAWN = ("seed", "data_seed", "embedding_seed")
"""Parameters of which runs that share a value are not independent, if there are several values."""


def replicate_of(runs: pd.DataFrame) -> pd.Series:
    """The replicate of every run, numbered from 0.

    Of seed, data_seed and embedding_seed those count that vary: runs that have one of them in common, or each with a
    third run, are of one replicate. Seeds crossed with windows are thus a single one, from which nothing can be
    concluded beyond them.
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


def together(grids: Sequence[tuple[pd.DataFrame, ...]]) -> tuple[pd.DataFrame, ...]:
    """Several grids' runs, and tables by run, as if they were one grid's.

    Replicates are numbered anew over all of them, so that runs of two grids pair by the seed and text that they share;
    a column `grid` holds the grid's place in `grids`, which the name of a run is led by.
    """
    marked = [
        [table.assign(grid=k, run=f"{k}:" + table["run"]) for table in grid]
        for k, grid in enumerate(grids)
        if len(grid[0])
    ]
    if not marked:
        return grids[0]
    runs, *others = (pd.concat(tables, ignore_index=True) for tables in zip(*marked, strict=True))
    runs["replicate"] = replicate_of(runs)
    own = runs.set_index("run")["replicate"]
    others = (table[table["run"].isin(own.index)] for table in others)
    return runs, *(table.assign(replicate=table["run"].map(own)) for table in others)


def balanced(runs: pd.DataFrame, *columns: str) -> bool:
    """Whether there are two replicates or more, each with the same number of runs of every value of `columns`."""
    counts = runs.groupby(["replicate", *columns]).size().unstack("replicate")
    return counts.shape[1] > 1 and not counts.isna().any(axis=None) and bool((counts.nunique(axis=1) == 1).all())


def each(runs: pd.DataFrame, estimate: Callable[[pd.DataFrame], np.ndarray]) -> np.ndarray:
    """`estimate` of every replicate's runs, [replicates, ...]."""
    return np.array([estimate(part) for _, part in runs.groupby("replicate")])


def student(values: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of independent values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    half = critical(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def critical(dof: float) -> float:
    """Student's t that 95 % intervals reach out to."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, dof))
