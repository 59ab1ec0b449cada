"""The headline numbers once more, by hand: from the published tables, with NumPy, SciPy and pandas alone.

Written from docs/method.md, docs/results.md and the grids' files; shares no code with `ctxlm`, so that
`test_by_hand.py` can hold the project's estimates against it. `python tests/by_hand.py` prints the numbers.

What is compared is the mean loss, nats a token of the test text. A replicate is a triple of seed, training text and
signs; both sides of a difference are of one triple. Replicates and conversations are two crossed random factors:

    difference = mean + replicate + conversation + rest.

A mean loss is a ratio, so every conversation enters as its jackknife pseudo-value (Tukey 1958). An analysis of variance
of these, [replicates, conversations], gives the three variance components (negative ones count as zero), from them the
variance of the mean, and Satterthwaite's (1946) degrees of freedom for Student's interval.
"""

from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
DRAWN = ("seed", "data_seed", "embedding_seed")
ALIKE = ("protocol", "dtype", "corpus", "embedding")
"""In what runs that are compared must not differ, beside the text that they are judged on."""


class Result(NamedTuple):
    """Per cent, with a 95 % interval; nan where a single replicate gives none."""

    value: float
    low: float
    high: float
    replicates: int


class Run(NamedTuple):
    metrics: pd.Series
    """Its row of runs.csv."""
    samples: pd.DataFrame
    """loss_sum and tokens by sample."""


Side = dict[tuple[int, ...], Run]
"""Runs of one cell of a grid by their replicates."""


@cache
def tables(grid: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A grid's runs, and their losses by run, part and sample."""
    folder = RESULTS / grid
    samples = pd.read_parquet(folder / "samples.parquet").astype({"run": str, "tokens": int})
    return pd.read_csv(folder / "runs.csv", index_col="run"), samples.set_index(["run", "part", "sample"]).sort_index()


def read(grid: str, text: str = "test", **wanted) -> Side:
    """The finished runs of a grid with these values in runs.csv."""
    runs, samples = tables(grid)
    side: Side = {}
    for run, metrics in runs[(runs[[*wanted]] == pd.Series(wanted)).all(axis=1)].iterrows():
        replicate = tuple(metrics[name] for name in DRAWN)
        if replicate in side:
            raise ValueError(f"grid {grid} has two runs of replicate {replicate} with {wanted}")
        side[replicate] = Run(metrics, samples.loc[run, text])
    return side


def by_sample(*pairs: tuple[Side, Side]) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums of the first sides less the second ones', [replicates, samples], and the samples' tokens.

    Of several pairs the mean, over replicates that have all of them.
    """
    sides = [side for pair in pairs for side in pair]
    replicates = sorted(set.intersection(*map(set, sides)))
    used = [side[replicate] for side in sides for replicate in replicates]
    if not used:
        raise ValueError("no replicate has all sides")
    tokens = used[0].samples["tokens"]
    for run in used:
        if not run.samples["tokens"].equals(tokens):
            raise ValueError("runs were judged on different texts")
        if any(run.metrics[name] != used[0].metrics[name] for name in ALIKE):
            raise ValueError(f"runs differ in one of {', '.join(ALIKE)}")
    sums = [[a[r].samples["loss_sum"] - b[r].samples["loss_sum"] for r in replicates] for a, b in pairs]
    return np.mean(sums, axis=0), tokens.to_numpy(float)


def mean_squares(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of replicates, conversations and the rest: of the mean loss's pseudo-values, a conversation left out in turn."""
    m, n = sums.shape
    whole = sums.sum(1, keepdims=True)
    pseudo = n * whole / tokens.sum() - (n - 1) * (whole - sums) / (tokens.sum() - tokens)
    rows, columns, grand = pseudo.mean(1, keepdims=True), pseudo.mean(0), pseudo.mean()
    squares = n * ((rows - grand) ** 2).sum(), m * ((columns - grand) ** 2).sum()
    rest = ((pseudo - rows - columns + grand) ** 2).sum()
    return np.array([squares[0] / (m - 1), squares[1] / (n - 1), rest / (m - 1) / (n - 1)])


def interval(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """Mean of `sums` / `tokens`, nats a token, and its interval over replicates and conversations."""
    m, n = sums.shape
    mean = sums.sum() / m / tokens.sum()
    if m == 1:
        return mean, np.nan, np.nan
    replicate, conversation, rest = mean_squares(sums, tokens)
    # m n times the mean's variance is a sum of mean squares: replicate + conversation − rest. A factor whose mean
    # square is below the rest's adds nothing to it.
    if replicate < rest:
        parts = np.array([0, max(conversation, rest), 0])
    elif conversation < rest:
        parts = np.array([replicate, 0, 0])
    else:
        parts = np.array([replicate, conversation, -rest])
    dof = parts.sum() ** 2 / (parts**2 / [m - 1, n - 1, (m - 1) * (n - 1)]).sum()
    half = stats.t.ppf(0.975, dof) * np.sqrt(parts.sum() / m / n)
    return mean, mean - half, mean + half


def difference(*pairs: tuple[Side, Side]) -> Result:
    """Of test perplexity, per cent; of several pairs in the mean of logarithms."""
    sums, tokens = by_sample(*pairs)
    return Result(*(100 * np.expm1(end) for end in interval(sums, tokens)), len(sums))


def spread(side: Side) -> Result:
    """Standard deviation of log perplexity over replicates, per cent, with the chi-square interval."""
    m = len(side)
    if m < 2:
        return Result(np.nan, np.nan, np.nan, m)
    sd = np.std([np.log(run.metrics["test_ppl"]) for run in side.values()], ddof=1)
    ends = sd * np.sqrt((m - 1) / stats.chi2.ppf([0.975, 0.025], m - 1))
    return Result(*(100 * np.expm1(end) for end in (sd, *ends)), m)


def shape(grid: str, experiment: str, train_tokens: int, **wanted) -> Side:
    """The runs of an experiment at one size."""
    return read(grid, experiment=experiment, train_tokens=train_tokens, **wanted)


def depth(layers: int, width: int, grid: str = "depth", num_input_tokens: int = 2) -> Side:
    """A cell of a grid of layers and widths, of the runs that read so many tokens at a time."""
    return shape(grid, f"L{layers}-C{width}", 20_000, num_input_tokens=num_input_tokens)


def contrasts() -> dict[str, list[tuple[Side, Side]]]:
    """What is compared in the headline numbers, by name: pairs of sides, over which the mean is taken."""
    small, large = 86_925, 183_620
    study, stabilised = ({name: shape(grid, name, small) for name in "AB"} for grid in ("study", "stabilised"))
    later, stabilised_later = ({name: shape(grid, name, large) for name in "AB"} for grid in ("study", "stabilised"))
    blind = {name: shape("stabilised-ablations-full", f"{name}-zero", small) for name in "AB"}
    study_blind = {name: shape("ablations-full", f"{name}-zero", small) for name in "AB"}
    quick = {name: shape("stabilised-variance", name, 20_000) for name in "AB"}
    zeros = {name: shape("stabilised-ablations", f"{name}-zero", 20_000) for name in "AB"}
    layers, widths = (1, 2, 3, 6), (128, 256)
    cells = {cell: depth(*cell) for cell in product(layers, widths)}
    single = {cell: depth(*cell, num_input_tokens=1) for cell in product(layers, widths)}
    learnt = {cell: depth(*cell, "searched-depth", 1) for cell in product(layers, widths)}
    searched = {name: shape("searched-ablations", name, 20_000) for name in ("whole", "without-contexts")}
    return {
        "A − B, stabilised, 86,925": [(stabilised["A"], stabilised["B"])],
        "A − B, study, 86,925": [(study["A"], study["B"])],
        "A − B, study, 183,620": [(later["A"], later["B"])],
        "A − B, stabilised, 183,620": [(stabilised_later["A"], stabilised_later["B"])],
        "A − B, stabilised, quick scale": [(quick["A"], quick["B"])],
        "stabilised − study, A, 86,925": [(stabilised["A"], study["A"])],
        "stabilised − study, B, 86,925": [(stabilised["B"], study["B"])],
        "zeros − contexts, A, stabilised, 86,925": [(blind["A"], stabilised["A"])],
        "zeros − contexts, B, stabilised, 86,925": [(blind["B"], stabilised["B"])],
        "zeros − contexts, A, study, 86,925": [(study_blind["A"], study["A"])],
        "zeros − contexts, B, study, 86,925": [(study_blind["B"], study["B"])],
        "KN-4 − A, stabilised, 183,620": [(shape("baselines", "KN-4", large), stabilised_later["A"])],
        "zeros − contexts, A, stabilised, quick scale": [(zeros["A"], quick["A"])],
        "zeros − contexts, B, stabilised, quick scale": [(zeros["B"], quick["B"])],
        "A − B with zeros, stabilised, quick scale": [(zeros["A"], zeros["B"])],
        "context 256 − 128, stabilised, quick scale": [(cells[n, 256], cells[n, 128]) for n in layers],
        "1 layer − 6 layers, stabilised, quick scale": [(cells[1, width], cells[6, width]) for width in widths],
        "context 256 − 128, searched, quick scale": [(learnt[n, 256], learnt[n, 128]) for n in layers],
        "2 layers − 6 layers, searched, quick scale": [(learnt[2, width], learnt[6, width]) for width in widths],
        "A − B, searched, quick scale": [(learnt[6, 128], learnt[3, 256])],
        "zeros − contexts, searched, quick scale": [(searched["without-contexts"], searched["whole"])],
        "2 layers − 6 layers, one token, quick scale": [(single[2, width], single[6, width]) for width in widths],
        "A, stabilised − searched, 86,925": [(stabilised["A"], shape("searched", "A-searched", small))],
    }


def headline() -> dict[str, Result]:
    """The headline numbers by name."""
    sides = {grid: shape(grid, "A", 86_925) for grid in ("study", "stabilised")}
    spreads = {f"sd over replicates, A, {grid}, 86,925": spread(side) for grid, side in sides.items()}
    return {name: difference(*pairs) for name, pairs in contrasts().items()} | spreads


def halves(side: Side) -> tuple[Side, Side]:
    """The runs judged on the first half of their conversations alone, and on the second."""
    cut = {of: len(run.samples) // 2 for of, run in side.items()}
    first = {of: run._replace(samples=run.samples[: cut[of]]) for of, run in side.items()}
    return first, {of: run._replace(samples=run.samples[cut[of] :]) for of, run in side.items()}


def attacks() -> dict[str, Result]:
    """The main claim, that A does better than B, where it might not hold."""
    results = {}
    for grid, size in product(("stabilised", "study"), (86_925, 183_620)):
        a, b = (shape(grid, name, size) for name in "AB")
        for half, pair in zip(("first", "second"), zip(halves(a), halves(b), strict=True), strict=True):
            results[f"A − B, {grid}, {size:,}, {half} half of the test text"] = difference(pair)
        a, b = (shape(grid, name, size, text="val") for name in "AB")
        results[f"A − B, {grid}, {size:,}, other conversations (validation)"] = difference((a, b))
    for grid, (recipe, prefix) in product(("dtype", "random", "rotation"), (("stabilised", "sound-"), ("study", ""))):
        size = 10_000 if grid == "rotation" else 20_000
        pair = shape(grid, f"{prefix}A", size), shape(grid, f"{prefix}B", size)
        results[f"A − B, {recipe}, quick scale, {grid}"] = difference(pair)
    return results


if __name__ == "__main__":
    for name, (value, low, high, replicates) in (headline() | attacks()).items():
        print(f"{name:62} {value:+7.2f} %  ({low:+7.2f} to {high:+7.2f})  {replicates} replicates")
