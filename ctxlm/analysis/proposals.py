"""What became of the study's three proposals: a lower learning rate, more sizes, layers of falling widths.

A verdict a proposal, with 95 % intervals; its words follow the intervals. What has not been run is said not to be.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ctxlm.analysis import explain
from ctxlm.analysis.phrases import SINGLE, change, drawn_over, effect_text, percent, side, span
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
BEST = {-1: "predicts better", 0: "has no effect on the best PPL that can be told", 1: "predicts worse"}
LAST = {-1: "over-fits less", 0: "has no effect on over-fitting that can be told", 1: "over-fits more"}
DESIGN = {-1: "better", 0: "which is better cannot be told", 1: "worse"}
FORECAST = {-1: "too low", 0: "no error can be told", 1: "too high"}


def learning_rate(grids: Sequence[tuple[str, Grid]]) -> str:
    """Does half of the study's learning rate over-fit less, and predict better? From (where, grid) that have both."""
    return f"**1. Half the learning rate in Phase 2**: {'; '.join(_halved(*grid) for grid in grids)}."


def _halved(where: str, grid: Grid) -> str:
    runs, _, val_by_sample = grid
    if runs.empty:
        return f"{where} no finished run"
    if runs["phase2_learning_rate"].nunique() > 1 and runs["replicate"].nunique() == 1:
        said = "; ".join(_lowered(runs, val_by_sample))
        return f"{where}, in pairs of single runs of one configuration and size (their intervals are below), {said}"
    runs = runs[runs["phase2_learning_rate"].isin([RATE, RATE / 2])]
    if runs["phase2_learning_rate"].nunique() < 2:
        return f"{where} not to be told, for no runs differ in it"
    try:
        last, best = (
            {e.name.removeprefix(explain.HALVED): e for e in effects if e.name.startswith(explain.HALVED)}
            for effects in (
                explain.overfitting_effects(runs),
                explain.overfitting_effects(runs, True, val_by_sample),
            )
        )
    except ValueError as error:
        return f"{where} not to be told ({error})"
    said = [
        f"{LAST[side(last[name].interval)]}{name} and {BEST[side(effect.interval)]}: last PPL / best PPL "
        f"{effect_text(last[name])}, best PPL {effect_text(effect)}"
        for name, effect in best.items()
        if name in last
    ]
    if not said:
        return f"{where} not to be told (at one of the two rates no run has come to its early stop)"
    left = runs.drop(explain.stopped(runs).index)["phase2_learning_rate"].value_counts()
    out = "".join(f"; {n} at a rate of {rate:g} that had not stopped are left out" for rate, n in left.items())
    one, other = next(iter(last.values())), next(iter(best.values()))  # of one fit, all are estimated alike
    how = f"Student's over {one.replicates} replicates, {one.dof} d.o.f."
    if one.replicates == 1:
        how = f"runs taken as independent, HC3 errors, {one.dof} d.o.f."
    drawn = "as well"
    if other.samples:
        drawn = f"crossed with {other.samples} validation samples drawn again, {other.dof:.1f} d.o.f. by Satterthwaite"
    return (
        f"{where} it {'; it '.join(said)} (last PPL / best PPL: n = {one.n} runs, {how}{out}; best PPL: n = {other.n} "
        f"runs, {drawn})"
    )


def _lowered(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> Iterable[str]:
    """What every other rate does beside the study's, in pairs of single runs; `rates_table` has each of them.

    No mean over sizes: what a rate does depends on the updates that a size gives it.
    """
    for rate in sorted(set(runs["phase2_learning_rate"]) - {RATE}, reverse=True):
        found, said = [], []
        for (label, size), own in runs.groupby(["configuration", "train_tokens"]):
            try:
                if rate in set(own["phase2_learning_rate"]):
                    found.append(_rate_effect(own, rate, val_by_sample))
            except ValueError as error:  # judged on different tokens, or no pair
                said.append(f"{label} at {size:,} tokens is not to be told ({error})")
        for sign, words in BEST.items():
            if some := [best for best, _ in found if side(best.interval) == sign]:
                changes = span([best.estimate for best in some], lambda nats: percent(math.expm1(nats)))
                said.append(f"it {words} in {len(some)} of {len(found)} pairs (best PPL {changes})")
        if rates := [change for _, last in found for change in last]:
            said.append(f"last PPL / best PPL {span(rates, lambda nats: percent(math.expm1(nats)))}")
        yield f"at a rate of {rate:g} {', '.join(said)}"


def _rate_effect(runs: pd.DataFrame, rate: float, val_by_sample: pd.DataFrame) -> tuple[explain.Effect, pd.Series]:
    """What `rate` does to log PPL beside the study's, and in every pair that stopped to log(last PPL / best PPL)."""
    best = explain.paired_effect(
        runs, rate, RATE, val_by_sample=val_by_sample, by="phase2_learning_rate", alike=["configuration"]
    )
    stopped = explain.stopped(runs).set_index(["configuration", *CELL, "phase2_learning_rate"])["overfit_rate"]
    last = np.log1p(stopped).unstack().reindex(columns=[rate, RATE])
    return best, (last[rate] - last[RATE]).dropna()


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
                gap = effect_text(_rate_effect(alike, rate, val_by_sample)[0])
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


def more_sizes(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    """Does a law fitted to the study's two sizes foretell larger ones?

    A law through two points is linear in their losses, so that the error of its forecast is a weighted sum of three
    losses of runs that share their seed and, as far as it goes, their text. Samples are drawn again, the same for all
    three, crossed with replicates where there are several.
    """
    lead = "**2. More sizes**"
    if runs.empty:
        return f"{lead}: no finished run."
    parts, covered = [], set()
    for label, own in runs.groupby("experiment"):
        shared = ["replicate", "seed", "data_seed"]
        table = own.pivot_table(index=shared, columns="train_tokens", values="run", aggfunc="first")
        larger = [size for size in table if size > FITTED[1]] if set(FITTED) <= set(table) else []
        forecasts = []
        for size in larger:
            members = table[[*FITTED, size]].dropna()
            if members.empty:
                continue
            share = math.log(size / FITTED[0]) / math.log(FITTED[1] / FITTED[0])
            weights = np.array([1 - share, share, -1])
            try:
                sums, tokens = loss_sums(val_by_sample, members.to_numpy().ravel())
            except ValueError as error:
                forecasts.append(f"at {size:,} tokens not to be told ({error})")
                continue
            errors = np.einsum("k,rks->rs", weights, sums.reshape(len(members), 3, -1))
            errors = pd.DataFrame(errors).groupby(members.index.get_level_values("replicate")).mean().to_numpy()
            found = mean_loss(errors, tokens)
            covered.add(len(errors))
            chance = f"a single run's scatter counts {math.sqrt(np.square(weights).sum()):.1f} times"
            gap = f"{change(found.value, found.interval)} at {size:,} tokens"
            forecasts.append(f"{gap}, {_said(FORECAST, found.interval, len(errors))} ({chance})")
        if forecasts:
            parts.append(f"{label} {', '.join(forecasts)}")
    if not parts:
        return f"{lead}: no size above the study's two has been run."
    alone = "" if covered and min(covered) > 1 else "single runs, seeds not covered, "
    samples = val_by_sample.groupby("run")["sample"].nunique().max()
    return (
        f"{lead}: PPL foretold by a law fitted to {FITTED[0]:,} and {FITTED[1]:,} tokens, less the measured "
        f"({alone}{samples} validation samples drawn again): {'; '.join(parts)}."
    )


def falling_widths(grids: Sequence[tuple[str, Grid]]) -> str:
    """Are layers whose widths fall better than layers of one width? From (where, grid) that have both."""
    said = [f"{where} {_falling(runs, val_by_sample)}" for where, (runs, _, val_by_sample) in grids]
    return f"**3. Widths that fall in an arithmetic progression**: {'; '.join(said)}."


def _falling(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    parts = []
    for effect in falling_effects(runs, val_by_sample):
        verdict = _said(DESIGN, effect.interval, effect.replicates)
        name = " against ".join(f"{label} ({_shape(runs, label)})" for label in effect.name.split(" against "))
        parts.append(f"{name}: PPL {effect_text(effect)} {drawn_over(effect)}: {verdict}")
    return "; ".join(parts) or "no finished pair of runs"


def falling_effects(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> list[explain.Effect]:
    """The effect on PPL of every configuration whose label begins with `<label>-arithmetic` against `<label>`."""
    labels = runs["experiment"].unique() if len(runs) else ()
    suffixes = sorted({label[label.index(FALLING) :] for label in labels if FALLING in label})
    found = explain.variants(runs, {suffix: suffix for suffix in suffixes}, val_by_sample=val_by_sample)
    return [
        replace(effect, name=f"{base}-{effect.name} against {base}") for base, own in found.items() for effect in own
    ]


def _shape(runs: pd.DataFrame, label: str) -> str:
    run = runs[runs["experiment"] == label].iloc[0]
    parameters = run["context_block_params"] + run["token_block_params_trained"]
    return f"context {run['context_dim']}, {parameters:,.0f} parameters"


def _said(words: dict[int, str], interval: tuple[float, float] | None, replicates: int) -> str:
    """The word for an interval's side; of single runs, which other seeds may turn round, it is said to be of those."""
    found = side(interval)
    return words[found] + (SINGLE if found and replicates == 1 else "")
