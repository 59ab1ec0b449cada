"""Every figure, one function each; all return a matplotlib Figure. Importing this module sets the common style.

A configuration keeps its colour, marker and line style in every figure, so that it can be told apart in grey print
too. `history` is long: phase, step, metric, value (and run, experiment, train_tokens where it holds many runs).
Where there is nothing to draw, the figure says so in a sentence.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from ctxlm.analysis.explain import Effect
from ctxlm.analysis.replicates import student
from ctxlm.analysis.scaling import PowerLaw, ppl_interval
from ctxlm.analysis.variance import components
from ctxlm.memory import FORGOTTEN

sns.set_theme(
    style="whitegrid",
    palette="colorblind",
    rc=dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9)
    | {"font.size": 10, "axes.labelsize": 10, "axes.titlesize": 10.5, "axes.edgecolor": "0.4", "figure.dpi": 110}
    | {"lines.linewidth": 1.6, "lines.markersize": 6, "grid.linewidth": 0.6, "hatch.linewidth": 0.6},
)
COLOURS = sns.color_palette("colorblind")
MARKERS, LINES, HATCHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":"), ("", "///", "...", "xx")
REFERENCE = {"color": "0.35", "linewidth": 1, "linestyle": ":"}
BELOW = {"loc": "outside lower center", "frameon": False}
WIDTH = 8.5
"""Of every figure, inches."""


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each configuration."""
    looks = zip(sorted(set(labels)), cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    return {label: {"color": colour, "marker": marker, "linestyle": line} for label, colour, marker, line in looks}


def _figure(rows: int = 1, columns: int = 1, height: float = 3.6, **options: Any) -> tuple[Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options)


def _says(sentence: str) -> Figure:
    figure, ((axes,),) = _figure(height=0.6)
    axes.axis("off")
    axes.text(0, 0.5, sentence, va="center", style="italic")
    return figure


def _say_n(figure: Figure, runs: pd.DataFrame, how: str = "") -> None:
    """Over the figure: how many runs it shows (a row a run, or several), of each configuration and size."""
    each = runs.groupby(["experiment", "train_tokens"])["run"].nunique()
    span = " to ".join(map(str, sorted({each.min(), each.max()})))
    text = f"n = {each.sum()} runs, {span} of a configuration and size{how}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5)


def _tokens_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis ticked at the sizes themselves, save those too close to the one before."""
    ticks: list[int] = []
    for size in sorted(set(sizes)):
        if not ticks or size / ticks[-1] >= (max(sizes) / min(sizes)) ** 0.09:
            ticks.append(size)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training tokens (log)")


def _log_axis(axes: Axes, label: str) -> None:
    """A logarithmic axis with plain numbers; LogLocator alone leaves a range under a decade without ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = MaxNLocator(8, steps=(1, 2, 2.5, 5, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)) if high > 8 * low else few)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:.3g}")
    axes.set_ylim(low, high)
    axes.set_ylabel(label)


def _steps_axis(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel(label)


def _dodge(position: int, count: int) -> float:
    """Factor that moves a configuration's points aside on a logarithmic axis, so that error bars stay legible."""
    return 1 + 0.012 * (2 * position - (count - 1))


# The report's figures: many runs


def plot_scaling(
    runs: pd.DataFrame, val_by_sample: pd.DataFrame, summary: Mapping[str, Any], published: pd.DataFrame | None = None
) -> Figure:
    """The main figure: PPL against training tokens, the laws and their crossovers; `published` runs are hollow."""
    if runs.empty:
        return _says("No finished run.")
    figure, ((axes,),) = _figure(height=5)
    styles, sizes = _styles(runs["experiment"]), runs["train_tokens"]
    low, high = sizes.min() / 1.25, sizes.max() * 1.25
    crossovers = [c for c in summary["crossovers"] if c["tokens"] and low / 2.5 < c["tokens"] < high * 2.5]
    low, high = (
        min([low, *(c["tokens"] / 1.1 for c in crossovers)]),
        max([high, *(c["tokens"] * 1.1 for c in crossovers)]),
    )
    for position, (label, group) in enumerate(runs.groupby("experiment")):
        look = styles[label] | {"linestyle": "none", "zorder": 3}
        law, dodge, ppl = summary["configurations"][label], _dodge(position, len(styles)), group["val_ppl"].to_numpy()
        intervals = [ppl_interval(val_by_sample[val_by_sample["run"] == run]) for run in group["run"]]
        ends = np.transpose([i or (p, p) for i, p in zip(intervals, ppl, strict=True)])
        name = f"{label}: {group['num_layers'].iloc[0]} layers, context {group['context_dim'].iloc[0]}"
        if not law["reason"]:
            name += f" · α = {law['alpha']:.3f} (n = {law['n']}, {law['interval_dof']} d.o.f.)".replace("-", "−")
            curve = PowerLaw(**{key: value for key, value in law.items() if key != "reason"})
            bounds = (low, curve.tokens_min, curve.tokens_max, high)
            for start, end, line in zip(bounds, bounds[1:], ("--", "-", "--"), strict=False):
                x = np.geomspace(start, end, 20)
                axes.plot(x, curve.ppl(x), color=look["color"], linestyle=line, linewidth=1.3)
        if group["train_tokens"].duplicated().any():  # the scatter of the runs is what counts; bars would hide it
            axes.plot(group["train_tokens"] * dodge, ppl, alpha=0.6, label=name, **look | {"markersize": 4.5})
        else:
            bars = {"yerr": abs(ends - ppl), "capsize": 3, "elinewidth": 1}
            axes.errorbar(group["train_tokens"] * dodge, ppl, label=name, **bars, **look)
        if published is not None:
            there = published[published["experiment"] == label]
            axes.plot(
                there["train_tokens"] * dodge * (1.03 if position else 0.97), there["val_ppl"], mfc="white", **look
            )
    keys = axes.get_legend_handles_labels()[0]
    if published is not None:
        keys.append(
            Line2D([], [], color="0.4", marker="o", linestyle="none", mfc="white", label="hollow: as published")
        )
    if any(not law["reason"] for law in summary["configurations"].values()):
        keys.append(Line2D([], [], color="0.4", label="law, within the fitted sizes"))
        keys.append(Line2D([], [], color="0.4", linestyle="--", label="law, extrapolated"))
    for cross in crossovers:
        what = f"crossover of {cross['a']} and {cross['b']}: {float(format(cross['tokens'], '.3g')):,.0f} tokens"
        axes.axvline(cross["tokens"], **REFERENCE)
        keys.append(Line2D([], [], label=what + (", extrapolated" if cross["extrapolated"] else ""), **REFERENCE))
    axes.set_xlim(low, high)
    _tokens_axis(axes, sizes)
    samples = val_by_sample.groupby("run")["sample"].nunique().max()
    several = runs.duplicated(["experiment", "train_tokens"]).any()
    what = "a point a run" if several else f"95 % interval over {samples} samples"
    _log_axis(axes, f"validation PPL (log), {what}")
    _say_n(figure, runs)
    figure.legend(handles=keys, ncols=2, **BELOW)
    return figure


def plot_paired_differences(summary: Mapping[str, Any]) -> Figure:
    """Difference in PPL of each pair of configurations by size, with 95 % intervals; at 0 there is none."""
    differences = pd.DataFrame(summary["paired_differences"])
    if differences.empty:
        return _says("No two configurations were trained on the same number of tokens: nothing to compare.")
    figure, ((axes,),) = _figure()
    differences["pair"] = differences["a"] + " against " + differences["b"]
    for position, (pair, look) in enumerate(_styles(differences["pair"]).items()):
        group = differences[differences["pair"] == pair]
        centre = np.expm1(group["log_ppl"].to_numpy())
        ends = np.transpose([np.expm1(i or (d, d)) for i, d in zip(group["interval"], group["log_ppl"], strict=True)])
        tokens = group["train_tokens"] * _dodge(position, differences["pair"].nunique())
        axes.errorbar(tokens, centre, abs(ends - centre), capsize=4, label=pair, **look | {"linestyle": "none"})
    axes.axhline(0, color="0.2", linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(1.2 * low, -0.01), max(1.2 * high, 0.01))
    axes.set_ylabel("difference in validation PPL")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _tokens_axis(axes, differences["train_tokens"])
    if differences["pair"].nunique() == 1:
        for y, label in ((0, differences["a"][0]), (1, differences["b"][0])):
            axes.text(1.01, y, f"{label} is\nbetter", transform=axes.transAxes, va=("bottom", "top")[y])
    samples, tokens = differences["samples"].max(), differences["tokens"].max()
    over = "samples" if differences["replicates"].max() == 1 else "samples and replicates"
    axes.set_title(f"{samples} validation samples, {tokens:,} tokens; 95 % intervals over {over}", loc="left")
    figure.legend(ncols=4, **BELOW)
    return figure


def plot_learning_curves(history: pd.DataFrame) -> Figure:
    """Training and validation PPL of every epoch, a panel a size: where they part, the run over-fits."""
    if history.empty:
        return _says("No finished run.")
    curves = history[(history["phase"] == "phase2") & history["metric"].isin(["train_ppl", "val_ppl"])]
    sizes, styles = sorted(curves["train_tokens"].unique()), _styles(curves["experiment"])
    columns = min(len(sizes), 4)
    rows = math.ceil(len(sizes) / columns)
    figure, grid = _figure(rows, columns, 1 + 2.7 * rows, sharex=True, sharey=True)
    kinds = {
        "val_ppl": ("validation", {"linestyle": "-"}),
        "train_ppl": ("training", {"linestyle": ":", "mfc": "white"}),
    }
    for axes, size in zip(grid.flat, sizes, strict=False):
        here = curves[curves["train_tokens"] == size]
        fade = {"alpha": max(0.25, min(1, 3 / here.groupby("experiment")["run"].nunique().max()))}
        for (label, _, metric), curve in here.groupby(["experiment", "run", "metric"]):
            axes.plot(curve["step"], curve["value"], markersize=4.5, **styles[label] | kinds[metric][1] | fade)
        axes.set_title(f"{size:,} training tokens")
        _steps_axis(axes, "epoch")
    for axes in grid.flat[len(sizes) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        _log_axis(axes, "PPL (log)")
    _say_n(figure, curves, ", a line each")
    keys = [Line2D([], [], label=f"{x}, {what}", **styles[x] | look) for x in styles for what, look in kinds.values()]
    figure.legend(handles=keys, ncols=min(len(styles), 4), **BELOW)
    return figure


def plot_overfitting(runs: pd.DataFrame) -> Figure:
    """By how much the last epoch's validation PPL exceeds the best one's, against training tokens.

    Replicates are averaged, with Student's 95 % interval.
    """
    if runs.empty:
        return _says("No finished run.")
    figure, ((axes,),) = _figure(height=3.4)
    for position, (label, look) in enumerate(_styles(runs["experiment"]).items()):
        here, dodge = runs[runs["experiment"] == label], _dodge(position, runs["experiment"].nunique())
        own = here.groupby(["train_tokens", "replicate"])["overfit_rate"].mean().groupby("train_tokens")
        mean = own.mean()
        ends = np.transpose([student(rates.to_numpy()) or (rates.mean(),) * 2 for _, rates in own])
        n = " to ".join(map(str, sorted({own.size().min(), own.size().max()})))
        bars = abs(ends - mean.to_numpy()) if own.size().max() > 1 else None
        axes.errorbar(mean.index * dodge, mean, bars, capsize=3, label=f"{label} (replicates: {n})", **look)
    axes.set_ylim(min(axes.get_ylim()[0], 0), max(axes.get_ylim()[1], 0.01))
    axes.set_ylabel("last validation PPL\nover the best, minus 1")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _tokens_axis(axes, runs["train_tokens"])
    several = runs["replicate"].nunique() > 1
    _say_n(figure, runs, "; means over replicates, 95 % intervals" if several else "")
    figure.legend(ncols=4, **BELOW)
    return figure


def plot_components(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> Figure:
    """Standard deviation of PPL by source of chance (`variance.components`), with an interval where there is one."""
    names = {
        "seed": "initialisation and noise",
        "data_seed": "training text",
        "run": "both: a run against its kind",
        "validation": "validation samples (alike for all runs)",
    }
    try:
        rows = np.expm1(components(runs, val_by_sample).set_index("source").reindex(list(names))[["sd", "low", "high"]])
    except ValueError as error:
        return _says(f"Chance cannot be taken apart: {error}.")
    figure, ((axes,),) = _figure(height=2.4)
    ends = [rows["sd"] - rows["low"], rows["high"] - rows["sd"]]  # nan, and no line, where there is no interval
    colours = [COLOURS[0]] * 3 + [COLOURS[1]]
    axes.barh(list(names.values()), rows["sd"], xerr=ends, color=colours, edgecolor="white", capsize=3)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("standard deviation of PPL (the line is a 95 % interval)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    return figure


def plot_effects(effects: Mapping[str, Sequence[Effect]], xlabel: str) -> Figure:
    """Estimates with their 95 % intervals, a row each and a colour a group; at 0 there is no effect."""
    rows = [(group, effect) for group, found in effects.items() for effect in found]
    if not rows:
        return _says("No finished run.")
    figure, ((axes,),) = _figure(height=1.1 + 0.32 * len(rows))
    groups = list(effects)
    for y, (group, effect) in enumerate(rows):
        k, centre = groups.index(group), math.expm1(effect.estimate)
        low, high = (math.expm1(x) for x in effect.interval or (effect.estimate, effect.estimate))
        look = {"color": COLOURS[k], "marker": MARKERS[k], "linestyle": "none", "capsize": 3}
        axes.errorbar(centre, y, xerr=[[centre - low], [high - centre]], **look)
    axes.set_yticks(range(len(rows)), [effect.name for _, effect in rows])
    axes.axvline(0, color="0.2", linewidth=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{xlabel}, 95 % interval")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    return figure


def plot_reach(history: pd.DataFrame, recency: pd.DataFrame) -> Figure:
    """How soon contexts forget (mean over runs), and what is lost when they have read the last k tokens only."""
    shares = history[history["metric"] == "share_left"]
    if shares.empty or recency.empty:
        return _says("No run that measured its memory.")
    figure, ((left, right),) = _figure(1, 2, 3.8)
    styles = _styles(recency["experiment"])
    kinds = {"forgetting": ("after Phase 1", {}), "forgetting_init": ("before it", {"linestyle": ":", "mfc": "white"})}
    for label, look in styles.items():
        for phase, (_, own) in kinds.items():
            here = shares[(shares["experiment"] == label) & (shares["phase"] == phase) & (shares["value"] > 0)]
            mean = np.exp(np.log(here["value"]).groupby(here["step"]).mean())
            left.plot(mean.index, 100 * mean, **look | {"markersize": 3.5} | own)
        rows = recency[recency["experiment"] == label]
        centre = 100 * np.expm1(rows["extra_loss"])
        ends = [100 * np.expm1(rows[end].fillna(rows["extra_loss"])) for end in ("low", "high")]
        right.errorbar(rows["k"], centre, [centre - ends[0], ends[1] - centre], capsize=3, **look)
    left.axhline(100 * FORGOTTEN, **REFERENCE)
    left.set(yscale="log", ylabel="of a disturbance left, per cent (log)", ylim=(1e-4, 200))
    left.set_xlim(-1, min(shares["step"].max(), 40) + 1)
    left.set_xlabel("tokens read since")
    right.set_xscale("log", base=2)
    ticks = sorted(recency["k"].unique())
    right.set_xticks(ticks, [str(k) for k in ticks])
    right.axhline(0, color="0.2", linewidth=1)
    right.set(xlabel="tokens the context was built from, k (log)", ylabel="PPL above the whole stream's, per cent")
    keys = [
        Line2D([], [], label=f"{label}, {what}", **look | own)
        for label, look in styles.items()
        for what, own in kinds.values()
    ]
    keys.append(Line2D([], [], label=f"forgotten: {FORGOTTEN:.0%} is left", **REFERENCE))
    figure.legend(handles=keys, ncols=3, **BELOW)
    return figure


def plot_generalisation(gaps: pd.DataFrame) -> Figure:
    """Validation minus training loss after the same epoch, against trained parameters a token, a point a run."""
    if gaps.empty:
        return _says("No run that measured its training loss after an epoch.")
    figure, grid = _figure(1, 2, 3.4, sharey=True)
    for axes, (name, what) in zip(grid.flat, (("best_gap", "best"), ("last_gap", "last")), strict=True):
        for label, look in _styles(gaps["experiment"]).items():
            rows, look = gaps[gaps["experiment"] == label], look | {"linestyle": "none", "markersize": 5, "alpha": 0.7}
            axes.plot(rows["params_per_token"], rows[name], label=label, **look)
        axes.set(xscale="log", xlabel="trained parameters a training token (log)", title=f"after the {what} epoch")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    grid.flat[0].set_ylabel("validation − training loss, nats")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), ncols=4, **BELOW)
    return figure


def plot_convergence(history: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Phase 1 of every run by iteration: converged share and mean squared change; fainter lines have fewer tokens."""
    if history.empty:
        return _says("No finished run.")
    figure, ((left, right),) = _figure(1, 2, 3.4)
    styles, sizes = _styles(runs["experiment"]), sorted(runs["train_tokens"].unique())
    for axes, metric in ((left, "converged_ratio"), (right, "mse")):
        curves = history[(history["phase"] == "phase1") & (history["metric"] == metric)]
        for (label, size, _), curve in curves.groupby(["experiment", "train_tokens", "run"]):
            shade = 0.35 + 0.65 * (sizes.index(size) + 1) / len(sizes)
            axes.plot(curve["step"], curve["value"], alpha=shade, markersize=4.5, **styles[label])
    _convergence_axes(left, right)
    left.axhline(runs["phase1_min_converged_ratio"].max(), **REFERENCE)
    right.axhline(runs["phase1_convergence_threshold"].max(), **REFERENCE)
    keys = [Line2D([], [], label=label, **look) for label, look in styles.items()]
    keys.append(Line2D([], [], label="threshold: of all tokens, to stop; of a token, to have converged", **REFERENCE))
    _say_n(figure, runs, ", a line each")
    figure.legend(handles=keys, ncols=4, **BELOW)
    return figure


def _convergence_axes(left: Axes, right: Axes) -> None:
    left.set(ylabel="converged tokens", ylim=(-0.03, 1.03))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _log_axis(right, "mean squared change\nof a context dimension (log)")
    for axes in (left, right):
        _steps_axis(axes, "iteration")


def plot_effective_rank(runs: pd.DataFrame) -> Figure:
    """Effective rank before and after Phase 1, a panel a configuration, in per cent of the context's dimensions."""
    if runs.empty:
        return _says("No finished run.")
    kinds = {
        "init_er_pct": "before Phase 1",
        "train_er_pct": "after it, with training noise",
        "train_er_noiseless_pct": "after it, without noise",
        "val_er_pct": "after it, on validation text",
    }
    labels, sizes = sorted(runs["experiment"].unique()), sorted(runs["train_tokens"].unique())
    figure, grid = _figure(len(labels), 1, 0.9 + 2.2 * len(labels), sharex=True, sharey=True)
    for axes, label in zip(grid.flat, labels, strict=True):
        here = runs[runs["experiment"] == label]
        means = here.groupby("train_tokens")[list(kinds)].mean().reindex(sizes)
        for k, (name, what) in enumerate(kinds.items()):
            look = {"label": what, "color": COLOURS[k + 2], "hatch": HATCHES[k], "edgecolor": "white"}
            bars = axes.bar(np.arange(len(sizes)) + 0.2 * (k - 1.5), means[name], 0.18, **look)
            axes.bar_label(bars, ["" if math.isnan(x) else f"{x:.1f}" for x in means[name]], fontsize=7.5, padding=1)
        axes.set(title=f"{label}: {here['context_dim'].iloc[0]} dimensions", ylabel="effective rank", ylim=(0, 112))
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        axes.grid(axis="x", visible=False)
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlabel("training tokens")
    _say_n(figure, runs, "; means")
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, **BELOW)
    return figure


def plot_seconds(runs: pd.DataFrame) -> Figure:
    """Minutes of every configuration and size by phase; seeds averaged."""
    if runs.empty:
        return _says("No finished run.")
    names = {"phase1_seconds": "Phase 1", "phase2_seconds": "Phase 2", "total_seconds": "data, test and the rest"}
    parts = runs.groupby(["experiment", "train_tokens"])[list(names)].mean() / 60
    cached = runs.groupby(["experiment", "train_tokens"])["phase1_cached"].any()
    cached = cached.map({True: " (Phase 1 cached)", False: ""})
    notes = [f"{label}, {size:,} tokens{cached[label, size]}" for label, size in parts.index]
    total = parts["total_seconds"].copy()
    parts["total_seconds"] -= parts["phase1_seconds"] + parts["phase2_seconds"]
    figure, ((axes,),) = _figure(height=1.2 + 0.32 * len(parts))
    for k, (name, what) in enumerate(names.items()):
        before = parts[list(names)[:k]].sum(axis=1)
        look = {"label": what, "color": COLOURS[k], "hatch": HATCHES[k], "edgecolor": "white"}
        bars = axes.barh(notes, parts[name], left=before, **look)
    axes.bar_label(bars, [f"{minutes:.1f}" for minutes in total], padding=3, fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel("minutes")
    _say_n(figure, runs, "; means")
    figure.legend(ncols=3, **BELOW)
    return figure


# The experiment notebook's figures: one run


def _metric(history: pd.DataFrame, phase: str, name: str) -> pd.Series:
    rows = history[(history["phase"] == phase) & (history["metric"] == name)]
    return rows.set_index("step")["value"].sort_index()


def plot_phase1(history: pd.DataFrame) -> Figure:
    """One run's Phase 1 by iteration: converged share, mean squared change, and both terms of the loss."""
    figure, ((left, middle, right),) = _figure(1, 3, 3.1)
    names = ((left, "converged_ratio", None), (middle, "mse", None))
    names += ((right, "fixed_point_loss", "fixed point"), (right, "diversity_loss", "diversity"))
    for axes, name, what in names:
        values = _metric(history, "phase1", name)
        k = int(name == "diversity_loss")
        axes.plot(values.index, values, color=COLOURS[k], marker=MARKERS[k], linestyle=LINES[k], label=what)
    _convergence_axes(left, middle)
    _steps_axis(right, "iteration")
    right.set_ylabel("terms of the loss")
    right.legend()
    return figure


def plot_phase2(history: pd.DataFrame) -> Figure:
    """One run's Phase 2 by epoch: training and validation loss and PPL, the best epoch marked.

    Validation between epochs (`val_every_steps`) is placed by Phase 2's "updates" by the end of every epoch or, in a
    history without them, as if its last value stood at the end of the last epoch.
    """
    figure, ((left, right),) = _figure(1, 2, 3.4)
    between, updates = _metric(history, "phase2_updates", "val_loss"), _metric(history, "phase2", "updates")
    for axes, name, change in ((left, "loss", np.array), (right, "ppl", np.exp)):
        train, val = (_metric(history, "phase2", f"{part}_{name}") for part in ("train", "val"))
        if len(between):
            epoch = updates.iloc[0] if len(updates) else between.index[-1] / val.index[-1]
            look = {"color": COLOURS[0], "alpha": 0.6, "linewidth": 1, "marker": ".", "markersize": 3}
            axes.plot(between.index / epoch, change(between), label="validation between epochs", **look)
        axes.plot(train.index, train, color=COLOURS[1], marker=MARKERS[1], linestyle=LINES[1], label="training")
        after = _metric(history, "phase2", f"train_{name}_after")
        if len(after):
            look = {"color": COLOURS[2], "marker": MARKERS[2], "linestyle": LINES[2]}
            axes.plot(after.index, after, label="training, after the epoch", **look)
        axes.plot(val.index, val, color=COLOURS[0], marker=MARKERS[0], label="validation")
        axes.axvline(val.idxmin(), label=f"best epoch: {val.idxmin()}", **REFERENCE)
        _steps_axis(axes, "epoch")
    left.set_ylabel("loss, nats a token")
    _log_axis(right, "PPL (log)")
    left.legend()
    return figure


def plot_singular_values(values: Mapping[str, Sequence[float]]) -> Figure:
    """Singular values of context matrices, largest first, each divided by their sum: label → values."""
    figure, ((axes,),) = _figure()
    for (label, raw), colour, line in zip(values.items(), cycle(COLOURS), cycle(LINES), strict=False):
        p = np.asarray(raw, float)
        axes.plot(np.arange(1, len(p) + 1), p / p.sum(), color=colour, linestyle=line, label=label)
    axes.set(xlabel="rank of the singular value", ylabel="singular value over their sum (log)", yscale="log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-4 * high), high)  # LayerNorm leaves one direction empty: it would flatten the rest
    axes.legend()
    return figure


def plot_memory(history: pd.DataFrame) -> Figure:
    """How soon one run forgets a disturbed context, and PPL when contexts have read the last k tokens only."""
    figure, ((left, right),) = _figure(1, 2, 3.4)
    for k, (phase, what) in enumerate((("forgetting_init", "before Phase 1"), ("forgetting", "after it"))):
        shares = _metric(history, phase, "share_left")
        look = {"color": COLOURS[k], "marker": MARKERS[k], "linestyle": LINES[k], "markersize": 3}
        left.plot(shares.index, 100 * shares, label=what, **look)
    left.axhline(100 * FORGOTTEN, label=f"forgotten: {FORGOTTEN:.0%} is left", **REFERENCE)
    left.set(yscale="log", ylabel="of the disturbance left, per cent (log)")
    _steps_axis(left, "tokens read since")
    left.legend()
    recent = _metric(history, "recent_tokens", "val_ppl")
    if recent.empty:
        right.set_axis_off()
        return figure
    of_last = recent.drop(0)
    right.plot(of_last.index, of_last, color=COLOURS[0], marker=MARKERS[0], label="the last k tokens")
    right.axhline(recent[0], label="the whole stream", **REFERENCE)
    right.set_xscale("log", base=2)
    right.set_xticks(of_last.index, [str(k) for k in of_last.index])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel("tokens the context was built from, k (log)")
    _log_axis(right, "validation PPL (log)")
    right.legend()
    return figure


# The benchmark's figures

STAGES = {
    "recurrence": "recurrence",
    "phase1_step": "Phase 1, one step",
    "phase2_epoch": "Phase 2, one epoch",
    "evaluation": "evaluation",
}


def plot_shares(table: pd.DataFrame) -> Figure:
    """Share of the matrix-product floor of every stage: by definition (bar) and of its own products (tick)."""
    labels = list(table.index.unique("experiment"))
    figure, ((axes,),) = _figure(height=1 + 0.45 * len(STAGES) * len(labels) / 2)
    thick, styles = 0.8 / len(labels), _styles(labels)
    for position, label in enumerate(labels):
        rows = table.loc[label].reindex(list(STAGES))
        y = np.arange(len(STAGES)) + (position - (len(labels) - 1) / 2) * thick
        axes.barh(y, rows["share_of_floor"], 0.9 * thick, color=styles[label]["color"], alpha=0.75, label=label)
        axes.plot(rows["share_of_own_products"], y, "|", color="0.1", markersize=13, markeredgewidth=2)
    axes.plot([], [], "|", color="0.1", markersize=13, markeredgewidth=2, label="of the products that are left to do")
    axes.axvline(1, **REFERENCE)
    axes.set_yticks(range(len(STAGES)), [f"{STAGES[s]} ({table['dtype'].xs(s, level=1).iloc[0]})" for s in STAGES])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the floor (100 %: as fast as the products of the algorithm as defined)")
    figure.legend(ncols=len(labels) + 1, **BELOW)
    return figure


def plot_growth(stages: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Seconds of each stage, and peak anonymous memory, against the number of tokens."""
    figure, ((left, right),) = _figure(columns=2, height=4)
    styles, sizes = _styles(stages["experiment"]), sorted(stages["tokens"].unique())
    for (stage, label), rows in stages[stages["stage"] != "evaluation"].groupby(["stage", "experiment"], sort=False):
        look = styles[label] | {"linestyle": LINES[list(STAGES).index(stage)]}
        left.plot(rows["tokens"], rows["seconds"], **look)
    for label, rows in runs.groupby(level="experiment"):
        right.plot(rows.index.get_level_values("tokens"), rows["peak_rss_gib"].astype(float), **styles[label])
    for axes in (left, right):
        _tokens_axis(axes, sizes)
        axes.tick_params(axis="x", rotation=30)
        axes.set_xlabel("tokens (log)")
    _log_axis(left, "seconds (log)")
    right.set_ylabel("peak anonymous memory, GiB")
    right.set_ylim(0)
    keys = [Line2D([], [], **(styles[label] | {"linestyle": "-"}), label=label) for label in styles]
    keys += [
        Line2D([], [], color="0.4", linestyle=line, label=name)
        for line, name in zip(LINES, list(STAGES.values())[:3], strict=False)
    ]
    figure.legend(handles=keys, ncols=len(keys), **BELOW)
    return figure
