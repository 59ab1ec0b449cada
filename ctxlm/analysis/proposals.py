"""What became of the study's three proposals: a lower learning rate, more sizes, layers of falling widths.

A verdict a proposal, with 95 % intervals; its words follow the intervals. What has not been run is said not to be.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ctxlm.analysis import explain
from ctxlm.analysis.phrases import SINGLE, change_if_known, count, effect_text, side
from ctxlm.analysis.replicates import together
from ctxlm.analysis.scaling import CELL, Grid, loss_sums, mean_loss
from ctxlm.config import Experiment
from ctxlm.corpus import ULTRACHAT_SIZES

FITTED = tuple(ULTRACHAT_SIZES.values())
"""The study's sizes, training tokens."""
RATE = Experiment.model_fields["phase2_learning_rate"].default
"""The study's learning rate in Phase 2."""
READ = ["corpus", "embedding", "embed_dim", "val_samples"]
"""What runs must have in common to stand beside one another."""
STAND_IN = (
    "What these full-size grids lack of the study's own settings, the rate of 0.002 and A and B of one width, is taken "
    "from grid study; its runs may be of another version of the code and another type of products, which moves single "
    "runs by up to 1 %."
)
FALLING = "arithmetic"
"""Begins the suffix of a label whose layers have falling widths."""
BEST = {-1: "predicts better", 0: "no effect on PPL can be told", 1: "predicts worse"}
LAST = {-1: "over-fits less", 0: "no effect on over-fitting can be told", 1: "over-fits more"}
FORECAST = {-1: "too low", 0: "no error can be told", 1: "too high"}
DESIGN = {-1: "better", 0: "which is better cannot be told", 1: "worse"}
RATES = partial(explain.paired_effect, by="phase2_learning_rate", alike=["configuration"])
"""The effect of one learning rate against another."""
Row = dict[str, Any]


def verdicts(rates: Mapping[str, Grid], sizes: Mapping[str, Grid], designs: Mapping[str, Grid]) -> pd.DataFrame:
    """A row a verdict with its interval and what that rests on; of each proposal, grids by their scale, e.g. "full"."""
    asked = {
        "1. Half the learning rate in Phase 2": (rates, learning_rate),
        "2. More sizes: what a law through the study's two foretells against what is measured": (sizes, more_sizes),
        "3. Widths that fall in an arithmetic progression": (designs, falling_widths),
    }
    rows = [
        {"Proposal": proposal, "Scale": scale} | row
        for proposal, (grids, answer) in asked.items()
        for scale, (runs, _, val_by_sample) in grids.items()
        for row in (answer(runs, val_by_sample) if len(runs) else [{"Verdict": "no finished run"}])
    ]
    columns = ["Proposal", "Scale", "Of", "Verdict", "PPL", "Test PPL", "Last PPL / best PPL", "From"]
    table = pd.DataFrame(rows, columns=columns, dtype=object).fillna("")
    return table.assign(Proposal=table["Proposal"].mask(table["Proposal"].duplicated(), ""))


def _row(
    of: str,
    words: Mapping[int, str],
    unit: str,
    best: explain.Effect,
    test: explain.Effect | None = None,
    last: explain.Effect | None = None,
) -> Row:
    """The verdict that `words` has for the interval's side: on the best PPL and, if given, on last PPL / best PPL.

    What the same runs have on the test text stands beside it, its interval over replicates alone.
    """
    single = SINGLE if best.replicates == 1 and side(best.interval) else ""  # other seeds may turn it round
    said = [words[side(best.interval)] + single]
    if test and test.interval and side(test.interval) != side(best.interval):
        said.append(f"on the test text {words[side(test.interval)]}")
    if last and last.interval:
        said.append(LAST[side(last.interval)])
    rests = count(best.n, unit) + (f" in {best.replicates} replicates" if best.replicates > 1 else "")
    rests += f", {best.samples} validation samples"
    return {
        "Of": of,
        "Verdict": "; ".join(said),
        "PPL": effect_text(best),
        "Test PPL": change_if_known(test.estimate, test.interval) if test else "",
        "Last PPL / best PPL": effect_text(last) if last else "",
        "From": rests + (f"; {count(last.n, unit)} to the early stop" if last and last.n < best.n else ""),
    }


def _untold(why: object, of: str = "") -> Row:
    return {"Of": of, "Verdict": f"not to be told: {why}"}


def learning_rate(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> Iterator[Row]:
    """Does half of the study's learning rate predict better, and over-fit less? A row a configuration, from pairs.

    Of a single replicate, each size by itself, for what a rate does depends on the updates that a size gives it.
    """
    runs = runs[runs["phase2_learning_rate"].isin([RATE, RATE / 2])]
    if runs["phase2_learning_rate"].nunique() < 2:
        yield _untold("no runs differ in it")
        return
    by_size = ["train_tokens"] if runs["replicate"].nunique() == 1 else []
    for (label, *size), own in runs.groupby(["configuration", *by_size]):
        of = label + "".join(f" at {tokens:,} tokens" for tokens in size)
        test, last, ended = None, None, explain.stopped(own)
        with contextlib.suppress(ValueError):  # judged on different test texts
            test = RATES(own, RATE / 2, RATE, "test_loss")
        with contextlib.suppress(ValueError):  # one of the two was still getting better
            last = RATES(ended.assign(rise=np.log1p(ended["overfit_rate"])), RATE / 2, RATE, "rise")
        try:
            best = RATES(own, RATE / 2, RATE, val_by_sample=val_by_sample)
        except ValueError as error:  # judged on different tokens, or no pair
            yield _untold(error, of)
            continue
        yield _row(of, BEST, "pair", best, test, last)


def rates_table(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration, size and learning rate: best epoch, best PPL, against the study's rate, over-fitting."""
    if runs.empty:
        return runs
    rows = []
    for (label, size, rate), own in runs.groupby(["configuration", "train_tokens", "phase2_learning_rate"]):
        gap = ""
        if rate != RATE:
            try:
                alike = runs[(runs["configuration"] == label) & (runs["train_tokens"] == size)]
                gap = effect_text(RATES(alike, rate, RATE, val_by_sample=val_by_sample))
            except ValueError:
                gap = "not to be told"
        row = {
            "Configuration": label,
            "Training tokens": f"{size:,}",
            "Learning rate": f"{rate:g}",
            "Best epoch": " and ".join(f"{run.best_epoch} of {run.epochs_run}" for run in own.itertuples()),
            "Best PPL": f"{own['val_ppl'].mean():.1f}",
            f"Against {RATE:g}": gap,
            "Over-fitting, %": f"{100 * own['overfit_rate'].mean():+.0f}".replace("-", "−"),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def with_study(grid: Grid, study: Grid) -> Grid:
    """A grid of the study's configurations, and from the study's own the runs that it lacks, read alike."""
    if study[0].empty or grid[0].empty:
        return grid
    same = ["configuration", "phase2_learning_rate", *CELL]
    known = study[0].set_index(same).index.isin(grid[0].set_index(same).index)
    alike = study[0].set_index(READ).index.isin(grid[0].set_index(READ).index)
    lacking = study[0][alike & ~known]
    return together([grid, (lacking, *study[1:])])


def stood_in(before: Mapping[str, Grid], after: Mapping[str, Grid]) -> str:
    """A word on the study's runs where `with_study` took any."""
    return STAND_IN if any(len(grid[0]) > len(before[name][0]) for name, grid in after.items()) else ""


def more_sizes(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> Iterator[Row]:
    """Does a law fitted to the study's two sizes foretell larger ones? A row a configuration and size.

    A law through two points is linear in their losses, so that the error of its forecast is a weighted sum of three
    losses of runs that share their seed and, as far as it goes, their text. Samples are drawn again, the same for all
    three, crossed with replicates where there are several.
    """
    larger = [size for size in sorted(set(runs["train_tokens"])) if size > FITTED[1]]
    if not larger:
        yield _untold("no size above the study's two has been run")
    for (label, own), size in itertools.product(runs.groupby("experiment"), larger):
        shared = ["replicate", "seed", "data_seed"]
        table = own.pivot_table(index=shared, columns="train_tokens", values="run", aggfunc="first")
        members = table.reindex(columns=[*FITTED, size]).dropna()
        if members.empty:
            continue
        share = math.log(size / FITTED[0]) / math.log(FITTED[1] / FITTED[0])
        weights = np.array([1 - share, share, -1])
        scatter = f"a single run's scatter counts {math.sqrt(np.square(weights).sum()):.1f} times"
        of = f"{label} at {size:,} tokens ({scatter})"
        try:
            sums, tokens = loss_sums(val_by_sample, members.to_numpy().ravel())
        except ValueError as error:
            yield _untold(error, of)
            continue
        errors = np.einsum("k,rks->rs", weights, sums.reshape(len(members), 3, -1))
        errors = pd.DataFrame(errors).groupby(members.index.get_level_values("replicate")).mean().to_numpy()
        found = mean_loss(errors, tokens)
        rests = (len(members), len(errors), found.dof, len(tokens))
        yield _row(of, FORECAST, "law", explain.Effect(of, found.value, found.interval, *rests))


def falling_widths(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> Iterator[Row]:
    """Are layers whose widths fall better than layers of one width? A row a pair of configurations."""
    effects = falling_effects(runs, val_by_sample)
    tested = {effect.name: effect for effect in falling_effects(runs, None, "test_loss")}
    if not effects:
        yield _untold("no finished pair of runs")
    for effect in effects:
        pair, _, size = effect.name.partition(" at ")
        shapes = " against ".join(f"{label} ({_shape(runs, label)})" for label in pair.split(" against "))
        yield _row(f"{shapes}{size and f' at {size}'}", DESIGN, "pair", effect, tested.get(effect.name))


def falling_effects(
    runs: pd.DataFrame, val_by_sample: pd.DataFrame | None, column: str = "val_loss"
) -> list[explain.Effect]:
    """The effect on PPL of every configuration whose label begins with `<label>-arithmetic` against `<label>`; of a
    single replicate, at each size by itself."""
    if runs.empty:
        return []
    found: list[explain.Effect] = []
    single = runs["replicate"].nunique() == 1
    suffixes = {label[label.index(FALLING) :] for label in set(runs["experiment"]) if FALLING in label}
    for size, own in runs.groupby("train_tokens") if single else [(None, runs)]:
        at = f" at {size:,} tokens" if single else ""
        parts = {suffix: suffix for suffix in sorted(suffixes)}
        pairs = explain.variants(own, parts, column, val_by_sample)
        for base, effects in pairs.items():
            found += [replace(effect, name=f"{base}-{effect.name} against {base}{at}") for effect in effects]
    return found


def _shape(runs: pd.DataFrame, label: str) -> str:
    run = runs[runs["experiment"] == label].iloc[0]
    parameters = run["context_block_params"] + run["token_block_params_trained"]
    return f"context {run['context_dim']}, {parameters:,.0f} parameters"
