"""The figures of many runs, one function each; all return a matplotlib Figure.

A configuration keeps its colour, marker and line style in every figure, so that it can be told apart in grey print
too. `history` is long: phase, step, metric, value (and run, experiment, train_tokens where it holds many runs).
Where there is nothing to draw, the figure says so in a sentence.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from ctxlm.analysis.explain import Effect
from ctxlm.analysis.phrases import span, steeper
from ctxlm.analysis.replicates import student
from ctxlm.analysis.run_plots import (
    COLOURS,
    FORGETTING,
    HATCHES,
    LINES,
    MARKERS,
    RANKS,
    REFERENCE,
    convergence_axes,
    forgetting_axes,
    headline,
    legend,
    log_axis,
    new_figure,
    recent_axis,
    steps_axis,
)
from ctxlm.analysis.scaling import PowerLaw, ppl_interval, with_phase1
from ctxlm.analysis.variance import SOURCES, components


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each label; those that differ in what follows a comma have one colour."""
    colours = dict(zip(sorted({label.split(", ")[0] for label in labels}), cycle(COLOURS), strict=False))
    looks = zip(sorted(set(labels)), cycle(MARKERS), cycle(LINES), strict=False)
    return {
        label: {"color": colours[label.split(", ")[0]], "marker": marker, "linestyle": line}
        for label, marker, line in looks
    }


def _panels(labels: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes], list[Axes], list[Axes]]:
    """A panel a label, in as many rows as columns or one less; also those at the left, and those with none below."""
    columns = math.ceil(math.sqrt(len(labels)))
    rows = math.ceil(len(labels) / columns)
    figure, grid = new_figure(rows, columns, 1 + height * rows, sharex=True, sharey=True)
    for axes in grid.flat[len(labels) :]:
        axes.axis("off")
    panels = dict(zip(labels, grid.flat, strict=False))
    for label, axes in panels.items():
        axes.set_title(label)
    lowest = list(panels.values())[-columns:]
    for axes in lowest:
        axes.tick_params(labelbottom=True)
    return figure, panels, list(grid[:, 0]), lowest


def _says(sentence: str) -> Figure:
    figure, ((axes,),) = new_figure(height=0.6)
    axes.axis("off")
    axes.text(0, 0.5, sentence, va="center", style="italic")
    return figure


def _count(numbers: Sequence[int], what: str) -> str:
    """How many: "1 run", "3 runs", "2 to 5 runs"."""
    return f"{span(numbers, '{:,}'.format)} {what}{'' if max(numbers) == 1 else 's'}"


def _say_n(figure: Figure, what: str, runs: pd.DataFrame, how: str = "") -> None:
    """Over the figure: what it shows, and of how many runs, with one row or more in `runs`, of each size and label."""
    each = runs.groupby(["experiment", "train_tokens"])["run"].nunique()
    headline(figure, f"{what}: n = {_count([each.sum()], 'run')}, {span(each)} of a configuration and size{how}")


def _how(runs: pd.DataFrame) -> str:
    return "; means over replicates, 95 % intervals" if runs["replicate"].nunique() > 1 else ""


def _tokens_axis(axes: Axes, sizes: Sequence[int], columns: int = 1) -> None:
    """A logarithmic axis ticked at the sizes themselves, save those too close to the one before.

    `columns` is how many such axes stand side by side.
    """
    ticks: list[int] = []
    for size in sorted(set(sizes)):
        if not ticks or size / ticks[-1] >= (max(sizes) / min(sizes)) ** (0.09 * columns):
            ticks.append(size)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training tokens (log)")


def _dodge(position: int, count: int) -> float:
    """Factor that moves a configuration's points aside on a logarithmic axis, so that error bars stay legible."""
    return 1 + 0.012 * (2 * position - (count - 1))


def _shade(size: int, sizes: Sequence[int]) -> float:
    """Opacity of a line of so many tokens: the more, the darker."""
    return float(np.linspace(1, 0.4, len(sizes))[sorted(sizes, reverse=True).index(size)])


def _over_replicates(runs: pd.DataFrame, column: str) -> tuple[pd.Series, np.ndarray | None, pd.Series]:
    """Of each size the mean over replicates, the bars of Student's 95 % interval (None: a single one), and how many."""
    own = runs.groupby(["train_tokens", "replicate"])[column].mean().groupby("train_tokens")
    mean, count = own.mean(), own.size()
    ends = np.transpose([student(values.to_numpy()) or (values.mean(),) * 2 for _, values in own])
    return mean, abs(ends - mean.to_numpy()) if count.max() > 1 else None, count


# The report's figures: many runs


def plot_scaling(
    runs: pd.DataFrame, val_by_sample: pd.DataFrame, summary: Mapping[str, Any], published: pd.DataFrame | None = None
) -> Figure:
    """The main figure: PPL against training tokens, the laws, and where they cross if their slopes differ for certain.

    `summary` is `scaling.summarise`'s with `crossing.errors`' beside; `published` runs are hollow.
    """
    if runs.empty:
        return _says("No finished run.")
    figure, ((axes,),) = new_figure(height=5)
    styles, sizes = _styles(runs["experiment"]), runs["train_tokens"]
    low, high = sizes.min() / 1.25, sizes.max() * 1.25
    sure = {(pair["a"], pair["b"]) for pair in summary.get("pooled", ()) if steeper(pair)}
    crossovers = [c for c in summary["crossovers"] if c["tokens"] and low / 2.5 < c["tokens"] < high * 2.5]
    crossovers = [c for c in crossovers if (c["a"], c["b"]) in sure]
    low, high = (
        min([low, *(c["tokens"] / 1.1 for c in crossovers)]),
        max([high, *(c["tokens"] * 1.1 for c in crossovers)]),
    )
    for position, (label, group) in enumerate(runs.groupby("experiment")):
        look = styles[label] | {"linestyle": "none", "zorder": 3}
        law, dodge, ppl = summary["configurations"][label], _dodge(position, len(styles)), group["val_ppl"].to_numpy()
        name = f"{label}: {_count(group['num_layers'][:1], 'layer')}, context {group['context_dim'].iloc[0]}"
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
            intervals = [ppl_interval(val_by_sample[val_by_sample["run"] == run]) for run in group["run"]]
            ends = np.transpose([i or (p, p) for i, p in zip(intervals, ppl, strict=True)])
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
        what = f"the laws of {cross['a']} and {cross['b']} meet: {float(format(cross['tokens'], '.3g')):,.0f} tokens"
        axes.axvline(cross["tokens"], **REFERENCE)
        keys.append(Line2D([], [], label=what + (", extrapolated" if cross["extrapolated"] else ""), **REFERENCE))
    axes.set_xlim(low, high)
    _tokens_axis(axes, sizes)
    samples = val_by_sample.groupby("run")["sample"].nunique().max()
    several = runs.duplicated(["experiment", "train_tokens"]).any()
    log_axis(axes, "validation PPL (log)")
    _say_n(
        figure,
        "Validation PPL by training tokens",
        runs,
        ", a point each" if several else f"; 95 % intervals over {samples} samples",
    )
    legend(figure, keys)
    return figure


DOTS, HOLLOW = {"linestyle": "none"}, {"markerfacecolor": "white", "alpha": 0.7}


def plot_paired_differences(runs: pd.DataFrame, summary: Mapping[str, Any]) -> Figure:
    """Difference in PPL of each pair of configurations by size, with 95 % intervals; at 0 there is none.

    Hollow markers are the test text's, where its losses were kept by sample.
    `summary` is that of `runs`.
    """
    differences = pd.DataFrame(summary["paired_differences"])
    if differences.empty:
        return _says("No two configurations were trained on the same number of tokens: nothing to compare.")
    figure, ((axes,),) = new_figure()
    differences["pair"] = differences["a"] + " against " + differences["b"]
    for position, (pair, look) in enumerate(_styles(differences["pair"]).items()):
        group = differences[differences["pair"] == pair]
        tokens, look = group["train_tokens"] * _dodge(position, differences["pair"].nunique()), look | DOTS
        drawn = [(tokens, group.to_dict("records"), {"label": pair, "capsize": 4})]
        if all(test and test["interval"] for test in group["test"]):
            drawn.append((1.03 * tokens, group["test"], {"label": f"{pair}, test text", "capsize": 2} | HOLLOW))
        for at, found, style in drawn:
            centre = np.expm1([d["log_ppl"] for d in found])
            ends = np.transpose([np.expm1(d["interval"] or (d["log_ppl"],) * 2) for d in found])
            axes.errorbar(at, centre, abs(ends - centre), **look | style)
    axes.axhline(0, color="0.2", linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(1.2 * low, -0.01), max(1.2 * high, 0.01))
    axes.set_ylabel("difference in PPL")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _tokens_axis(axes, differences["train_tokens"])
    if differences["pair"].nunique() == 1:
        for y, label in ((0, differences["a"][0]), (1, differences["b"][0])):
            axes.text(1.01, y, f"{label} is\nbetter", transform=axes.transAxes, va=("bottom", "top")[y])
    samples, tokens = differences["samples"].max(), differences["tokens"].max()
    over = "samples" if differences["replicates"].max() == 1 else "samples and replicates"
    hollow = max((test["samples"] or 0 for test in differences["test"] if test), default=0)
    text = f"{samples} validation samples, {tokens:,} tokens"
    text = f"{samples} validation samples (hollow: {hollow} of the test text)" if hollow else text
    axes.set_title(f"{text}; 95 % intervals over {over}", loc="left")
    cells = {(row[side], row["train_tokens"]) for _, row in differences.iterrows() for side in "ab"}
    _say_n(
        figure,
        "Pairs on the same text",
        runs[[cell in cells for cell in zip(runs["experiment"], runs["train_tokens"], strict=True)]],
    )
    legend(figure)
    return figure


def plot_learning_curves(history: pd.DataFrame) -> Figure:
    """Training and validation PPL of every epoch, a panel a configuration: where they part, the run over-fits.

    Darker lines have more tokens; the fewest and the most stand at the end. Several runs of a size are thin lines, with
    their mean as far as all of them went.
    """
    if history.empty:
        return _says("No finished run.")
    curves = history[(history["phase"] == "phase2") & history["metric"].isin(["train_ppl", "val_ppl"])]
    sizes, styles = sorted(curves["train_tokens"].unique()), _styles(curves["experiment"])
    figure, panels, left, lowest = _panels(list(styles), 2.9)
    kinds = {
        "val_ppl": {"linestyle": "-", "label": "validation"},
        "train_ppl": {"linestyle": ":", "mfc": "white", "label": "training"},
    }
    for (label, size, metric), group in curves.groupby(["experiment", "train_tokens", "metric"]):
        look = styles[label] | kinds[metric] | {"alpha": _shade(size, sizes), "markersize": 4.5}
        table = group.pivot(index="step", columns="run", values="value")
        if table.shape[1] > 1:
            panels[label].plot(table.index, table, **look | {"marker": "", "linewidth": 0.5})
        mean = table.dropna().mean(axis=1)
        panels[label].plot(mean.index, mean, **look)
        if metric == "val_ppl" and size in (sizes[0], sizes[-1]) and len(sizes) > 1:
            end = mean.index[-1], mean.iloc[-1]
            panels[label].annotate(f"{size:,}", end, (5, 0), textcoords="offset points", va="center", fontsize=7)
    if len(sizes) > 1:
        low, high = lowest[0].get_xlim()  # the panels share it
        lowest[0].set_xlim(low, high + 0.14 * (high - low))
    for axes in left:
        log_axis(axes, "PPL (log)")
    for axes in lowest:
        steps_axis(axes, "epoch")
    several = curves.groupby(["experiment", "train_tokens"])["run"].nunique().max() > 1
    _say_n(figure, "PPL by epoch", curves, "; thick lines are means" if several else "")
    legend(figure, [Line2D([], [], color="0.1", marker="o", **look) for look in kinds.values()])
    return figure


def plot_overfitting(runs: pd.DataFrame) -> Figure:
    """By how much the last epoch's validation PPL exceeds the best one's, against training tokens.

    Replicates are averaged, with Student's 95 % interval.
    """
    if runs.empty:
        return _says("No finished run.")
    figure, ((axes,),) = new_figure(height=3.4)
    for position, (label, look) in enumerate(_styles(runs["experiment"]).items()):
        here, dodge = runs[runs["experiment"] == label], _dodge(position, runs["experiment"].nunique())
        mean, bars, count = _over_replicates(here, "overfit_rate")
        look |= {"capsize": 3, "label": f"{label} ({_count(count, 'replicate')})"}
        axes.errorbar(mean.index * dodge, mean, bars, **look)
    axes.set_ylim(min(axes.get_ylim()[0], 0), max(axes.get_ylim()[1], 0.01))
    axes.set_ylabel("last validation PPL\nover the best, minus 1")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _tokens_axis(axes, runs["train_tokens"])
    _say_n(figure, "Over-fitting", runs, _how(runs))
    legend(figure)
    return figure


def plot_components(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> Figure:
    """Standard deviation of PPL by source of chance (`variance.components`), with an interval where there is one."""
    try:
        rows = np.expm1(components(runs, val_by_sample).set_index("source")[["sd", "low", "high"]])
    except ValueError as error:
        return _says(f"Chance cannot be taken apart: {error}.")
    figure, ((axes,),) = new_figure(height=2.6)
    ends = [rows["sd"] - rows["low"], rows["high"] - rows["sd"]]  # nan, and no line, where there is no interval
    colours = [COLOURS[0]] * 3 + [COLOURS[1]]
    axes.barh(list(SOURCES.values()), rows["sd"], xerr=ends, color=colours, edgecolor="white", capsize=3)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("standard deviation of PPL (the line is a 95 % interval)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    windows, samples = runs.groupby("data_seed")["seed"].nunique(), val_by_sample["sample"].nunique()
    texts = f"{_count([len(windows)], 'training text')} with {_count(windows, 'seed')} each"
    _say_n(figure, "Chance", runs, f": {texts}; {_count([samples], 'validation sample')}")
    return figure


def plot_effects(effects: Mapping[str, Sequence[Effect]], what: str, cause: str = "", unit: str = "run") -> Figure:
    """Estimates with their 95 % intervals, a row each and a panel a group; at 0 there is no effect.

    Args:
        effects: group → its effects.
        what: is on the axis. cause: ends the title.
        unit: of which an effect has `n`, runs or pairs of them.
    """
    effects = {group: found for group, found in effects.items() if found}
    if not effects:
        return _says("The finished runs tell no effect.")
    rows = [len(found) for found in effects.values()]
    options = {"sharex": True, "height_ratios": [count + 0.2 for count in rows]}
    figure, grid = new_figure(len(rows), 1, 1 + 0.32 * sum(rows) + 0.4 * len(rows), **options)
    for axes, (group, found) in zip(grid.flat, effects.items(), strict=True):
        for y, effect in enumerate(found):
            centre, ends = math.expm1(effect.estimate), np.expm1(effect.interval or [])[:, None]
            bar = abs(ends - centre) if len(ends) else None
            axes.errorbar(centre, y, xerr=bar, color="0.25", marker="o", linestyle="none", capsize=3)
        axes.set_yticks(range(len(found)), [effect.name for effect in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.axvline(0, color="0.2", linewidth=1)
        axes.set_title(f"{group}: {_n_of(found, unit)}" if group else _n_of(found, unit), loc="left")
    drawn = any(effect.interval for found in effects.values() for effect in found)
    axes.set_xlabel(what + (", 95 % interval" if drawn else " (no interval can be given)"))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    headline(figure, f"{what[0].upper()}{what[1:]} {cause}".rstrip())
    return figure


def _n_of(effects: Sequence[Effect], unit: str) -> str:
    n, replicates, plural = [e.n for e in effects], [e.replicates for e in effects], "s" if len(effects) > 1 else ""
    parts = [f"n = {_count(n, unit)} in {_count(replicates, 'replicate')}" if max(n) > 1 else f"single {unit}{plural}"]
    if effects[0].samples:
        parts.append(_count([e.samples for e in effects], "validation sample"))
    return ", ".join(parts)


def plot_reach(history: pd.DataFrame, recency: pd.DataFrame) -> Figure:
    """How soon contexts forget (mean over runs), and what is lost when they have read the last k tokens only."""
    shares = history[history["metric"] == "share_left"]
    if shares.empty or recency.empty:
        return _says("No run that measured its memory.")
    figure, ((left, right),) = new_figure(1, 2, 4.2)
    styles = _styles(recency["experiment"])
    for label, look in styles.items():
        for phase, (_, own) in FORGETTING.items():
            here = shares[(shares["experiment"] == label) & (shares["phase"] == phase) & (shares["value"] > 0)]
            mean = np.exp(np.log(here["value"]).groupby(here["step"]).mean())
            left.plot(mean.index, 100 * mean, **look | own)
        rows = recency[recency["experiment"] == label]
        centre = np.expm1(rows["extra_loss"])
        ends = [np.expm1(rows[end].fillna(rows["extra_loss"])) for end in ("low", "high")]
        right.errorbar(rows["k"], centre, [centre - ends[0], ends[1] - centre], capsize=3, **look)
    keys = [
        Line2D([], [], label=f"{label}, {what}", **look | own | {"markevery": None})
        for label, look in styles.items()
        for what, own in FORGETTING.values()
    ]
    keys += forgetting_axes(left)
    recent_axis(right, recency["k"])
    right.axhline(0, color="0.2", linewidth=1)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    right.set_ylabel("PPL above the whole stream's")
    sure = ", 95 % intervals" if recency["n"].max() > 1 else ""
    _say_n(figure, "Memory", shares, f"; means (right: over {_count(recency['n'], 'replicate')}{sure})")
    legend(figure, keys)
    return figure


def plot_generalisation(gaps: pd.DataFrame) -> Figure:
    """Validation minus training loss after the same epoch, against trained parameters a token, a point a run."""
    if gaps.empty:
        return _says("No run that measured its training loss after an epoch.")
    figure, grid = new_figure(1, 2, 3.4, sharey=True)
    for axes, (name, what) in zip(grid.flat, (("best_gap", "best"), ("last_gap", "last")), strict=True):
        for label, look in _styles(gaps["experiment"]).items():
            rows, look = gaps[gaps["experiment"] == label], look | {"linestyle": "none", "markersize": 5, "alpha": 0.7}
            axes.plot(rows["params_per_token"], rows[name], label=label, **look)
        axes.set(xscale="log", xlabel="trained parameters a training token (log)", title=f"after the {what} epoch")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    grid.flat[0].set_ylabel("validation − training loss, nats")
    _say_n(figure, "Generalisation", gaps, ", a point each")
    legend(figure)
    return figure


def plot_convergence(history: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Phase 1 of every run by iteration: converged share and mean squared change; fainter lines have fewer tokens."""
    if history.empty:
        return _says("No finished run.")
    runs = with_phase1(runs)
    if runs.empty:
        return _says("Phase 1 was left out.")
    figure, ((left, right),) = new_figure(1, 2, 3.4)
    styles, sizes = _styles(runs["experiment"]), runs["train_tokens"].unique()
    for axes, metric in ((left, "converged_ratio"), (right, "mse")):
        curves = history[(history["phase"] == "phase1") & (history["metric"] == metric)]
        for (label, size, _), curve in curves.groupby(["experiment", "train_tokens", "run"]):
            axes.plot(curve["step"], curve["value"], alpha=_shade(size, sizes), markersize=4.5, **styles[label])
    convergence_axes(left, right)
    left.axhline(runs["phase1_min_converged_ratio"].max(), **REFERENCE)
    right.axhline(runs["phase1_convergence_threshold"].max(), **REFERENCE)
    keys = [Line2D([], [], label=label, **look) for label, look in styles.items()]
    thresholds = "thresholds: share at which Phase 1 ends (left), change below which a token has converged (right)"
    keys.append(Line2D([], [], label=thresholds, **REFERENCE))
    _say_n(figure, "Phase 1", runs, ", a line each")
    legend(figure, keys)
    return figure


def plot_effective_rank(runs: pd.DataFrame) -> Figure:
    """Effective rank before Phase 1 and after training, a panel a configuration, in per cent of the context."""
    if runs.empty:
        return _says("No finished run.")
    labels = sorted(runs["experiment"].unique())
    figure, panels, left, lowest = _panels(labels, 2.5)
    for label, axes in panels.items():
        here = runs[runs["experiment"] == label]
        for k, (name, what) in enumerate(RANKS.items()):
            mean, bars, _ = _over_replicates(here, f"{name}_pct")
            look = {"label": what, "color": COLOURS[k], "marker": MARKERS[k], "linestyle": LINES[k], "capsize": 2}
            axes.errorbar(mean.index * _dodge(k, len(RANKS)), mean, bars, **look | {"linewidth": 1, "markersize": 5})
        axes.set_title(f"{label}: {here['context_dim'].iloc[0]:,} dimensions")
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=None))
    for axes in left:
        axes.set_ylabel("effective rank")
    for axes in lowest:
        _tokens_axis(axes, runs["train_tokens"], math.ceil(math.sqrt(len(labels))))
    _say_n(figure, "Effective rank", runs, _how(runs))
    legend(figure)
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
    figure, ((axes,),) = new_figure(height=1.2 + 0.32 * len(parts))
    for k, (name, what) in enumerate(names.items()):
        before = parts[list(names)[:k]].sum(axis=1)
        look = {"label": what, "color": COLOURS[k], "hatch": HATCHES[k], "edgecolor": "white"}
        bars = axes.barh(notes, parts[name], left=before, **look)
    axes.bar_label(bars, [f"{minutes:.1f}" for minutes in total], padding=3, fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel("minutes")
    several = runs.duplicated(["experiment", "train_tokens"]).any()
    _say_n(figure, "Time", runs, "; means" if several else "")
    legend(figure)
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
    figure, ((axes,),) = new_figure(height=1 + 0.45 * len(STAGES) * len(labels) / 2)
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
    legend(figure)
    return figure


def plot_growth(stages: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Seconds of each stage, and peak anonymous memory, against the number of tokens."""
    figure, ((left, right),) = new_figure(columns=2, height=4)
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
    log_axis(left, "seconds (log)")
    right.set_ylabel("peak anonymous memory, GiB")
    right.set_ylim(0)
    keys = [Line2D([], [], **(styles[label] | {"linestyle": "-"}), label=label) for label in styles]
    keys += [
        Line2D([], [], color="0.4", linestyle=line, label=name)
        for line, name in zip(LINES, list(STAGES.values())[:3], strict=False)
    ]
    legend(figure, keys)
    return figure
