"""The figures that several pages draw, of many runs; all return a matplotlib Figure.

A configuration keeps its colour in every figure: A blue, B orange, their variants lighter. Runs are points, their
means bars and lines.
"""

import math
from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter
from scipy import stats

from ctxlm.analysis.estimates import Estimates
from ctxlm.analysis.run_plots import (
    COLOURS,
    FIRST,
    LINES,
    MARKERS,
    NARROW,
    REFERENCE,
    legend,
    line_styles,
    log_axis,
    new_figure,
    steps_axis,
)
from ctxlm.analysis.scaling import STUDIES, crossing_share

BAR = {"marker": "_", "markersize": 13, "markeredgewidth": 2}
"""How a mean is drawn, so that it hides no run."""


def by_tokens(runs: pd.DataFrame) -> Figure:
    """Test PPL by training tokens: a point a run, bars and a line at the means of the replicates with most sizes."""
    figure, ((axes,),) = new_figure(height=3.7, width=NARROW)
    known = runs.dropna(subset=["log_ppl"])
    styles, sizes = line_styles(known["configuration"]), sorted(set(known["train_tokens"]))
    # side by side, never far from their size: so much of log tokens has each configuration
    band = min(0.08, 0.24 / len(styles), 0.6 * min(np.diff(np.log(sizes)), default=1) / len(styles))
    for position, (name, rows) in enumerate(known.groupby("configuration")):
        middle, replicate = band * (position + 0.5 - len(styles) / 2), rows["replicate"].rank(method="dense")
        beside = np.exp(middle + 0.75 * band * ((replicate - 0.5) / replicate.max() - 0.5))
        count = rows.groupby("replicate")["train_tokens"].transform("nunique")
        whole = rows[count == count.max()]  # a mean of other replicates at every size would not be one curve's
        mean, look = np.exp(whole.groupby("train_tokens")["log_ppl"].mean()), styles[name]
        points = {"linestyle": "none", "markersize": 4.5, "alpha": 0.55, "markeredgewidth": 0}
        axes.plot(mean.index * np.exp(middle), mean, label=name, **look | BAR)
        axes.plot(rows["train_tokens"] * beside, np.exp(rows["log_ppl"]), **look | points)
    ticks = []
    for size in sizes:  # save those too close together
        if not ticks or size / ticks[-1] >= (sizes[-1] / sizes[0]) ** 0.18:
            ticks.append(size)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12)
    if len(ticks) == 1:  # else points drawn aside of it would lie at both ends
        axes.set_xlim(ticks[0] / 1.3, ticks[0] * 1.3)
    axes.set_xlabel("training tokens (log)")
    log_axis(axes, "test PPL (log)")
    return legend(figure, [Line2D([], [], label=name, **look) for name, look in styles.items()])


def crossings(table: pd.DataFrame) -> Figure | None:
    """How often chance would make curves cross that run side by side, by how far apart these are; 0 is a tie.

    `table` is as `scaling.crossing_shares` gives it, and its first pair is drawn; None if it has none.
    """
    if table.empty:
        return None
    pair = table.iloc[0]
    leads = np.linspace(0, max(0.1, 1.2 * abs(pair["lead"])), 60)
    figure, ((axes,),) = new_figure(height=3.2, width=NARROW)
    for n, line, colour in zip(STUDIES, cycle(LINES), COLOURS[2:], strict=False):
        shares = crossing_share(leads, pair["covariance"], pair["dof"], n)
        axes.plot(100 * np.expm1(leads), shares, linestyle=line, color=colour, label=f"{n} replicate{'s' * (n > 1)}")
    axes.axvline(100 * math.expm1(abs(pair["lead"])), **REFERENCE, label="lead as measured")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set(ylim=0, xlim=0, title=f"How often chance makes {pair['a']} and {pair['b']} cross")
    axes.set(xlabel="true lead, the same at both sizes", ylabel="studies that see a crossover")
    return legend(figure)


def leads(panels: Mapping[str, Estimates]) -> Figure:
    """A − B by text with its 95 % interval: a marker for each embedding, in the colour of the better if significant.

    Args:
        panels: by title; `at` of each difference is a site's name: a text, …, an embedding.
    """
    embeddings = {"PPMI": "word counts (PPMI)", "SmolLM2": "pretrained (SmolLM2)"}
    texts = [list(dict.fromkeys(e.at.split(", ")[0] for e in table)) for table in panels.values()]
    heights = [len(names) for names in texts]
    figure, drawn = new_figure(len(panels), 1, 1.8 + 0.4 * sum(heights), 3.9, sharex=True, height_ratios=heights)
    for (title, table), names, (axes,) in zip(panels.items(), texts, drawn, strict=True):
        for e, verdict in zip(table, table.verdicts, strict=True):
            text, *_, embedding = e.at.split(", ")
            position, (value, low, high) = [*embeddings].index(embedding), e.in_unit
            row = names.index(text) + (0.3 * position - 0.15 if len(table) > len(names) else 0)
            colour = {"lower": FIRST["A"], "higher": FIRST["B"]}.get(verdict, "0.45")
            inside = colour if verdict in ("lower", "higher") else "white"
            axes.plot([low, high], [row, row], color=colour, linewidth=2)
            axes.plot(value, row, MARKERS[position], color=colour, mfc=inside, markersize=7)
        axes.axvline(0, **REFERENCE)
        axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
    for side, words, x in (("left", "← A better", 0), ("right", "B better →", 1)):
        drawn[0, 0].annotate(words, (x, 1.16), xycoords="axes fraction", ha=side, color=FIRST[words.strip("← →")[0]])
    drawn[-1, 0].set_xlabel("A's perplexity less B's, % (95 % intervals;\nfilled: significant, corrected)")
    drawn_through = {e.at.split(", ")[-1] for table in panels.values() for e in table}
    keys = [(m, words) for m, (name, words) in zip(MARKERS, embeddings.items(), strict=False) if name in drawn_through]
    return legend(figure, [Line2D([], [], color="0.3", marker=m, linestyle="", label=words) for m, words in keys])


def waterfall(parts: Estimates, label: str) -> Figure:
    """How the logarithm of 1 + a share comes down step by step, with 95 % intervals; a panel for each `at`.

    Args:
        parts: of each `at` in order: the level at first, steps that change it, and what is left.
        label: of the axis.
    """
    places = list(dict.fromkeys(e.at for e in parts))
    figure, (panels,) = new_figure(1, len(places), 3.2, sharey=True, sharex=True)
    farthest = 1.08 * max(max(e.value, e.high or 0) for e in parts)
    ticks = [tick for tick in (0, 0.25, 0.5, 1, 1.5, 2) if math.log1p(tick) < 0.95 * farthest]
    for place, axes in zip(places, panels, strict=True):
        first, *steps, last = (e for e in parts if e.at == place)
        level = 0.0
        for row, e in enumerate((first, *steps, last)):
            step = 0 < row <= len(steps)
            start = level if step else 0.0
            level = start + e.value
            axes.barh(row, e.value, left=start, height=0.6, color=COLOURS[9 if step else 7], alpha=0.8)
            if e.low is not None:
                axes.plot([start + e.low, start + e.high], [row, row], color="0.2", linewidth=2)
        axes.set_title(place)
        axes.set_yticks(range(len(steps) + 2), [e.contrast for e in (first, *steps, last)])
        axes.set_xticks(np.log1p(ticks), [f"{100 * tick:.0f} %" for tick in ticks])
        axes.set(ylim=(len(steps) + 1.6, -0.6), xlim=(0, farthest), xlabel=label)
        axes.grid(axis="y", visible=False)
    return figure


def learning_curves(histories: pd.DataFrame, panel: str = "train_tokens") -> Figure | None:
    """Training (dotted) and validation PPL by epoch; a panel a size or `panel`: a faint line a run, thick means.

    None where no run has epochs.
    """
    curves = histories[(histories["phase"] == "phase2") & histories["metric"].isin(["train_ppl", "val_ppl"])]
    if curves.empty:  # of n-grams
        return None
    curves = curves.assign(epoch=curves["step"] / curves["validations_per_epoch"])
    curves, styles = curves.sort_values("train_tokens", kind="stable"), line_styles(curves["configuration"])
    values = list(dict.fromkeys(curves[panel]))
    columns = min(len(values), 3 if len(values) % 3 == 0 else 2)
    rows = math.ceil(len(values) / columns)
    figure, panels = new_figure(rows, columns, 0.9 + 2.7 * rows, sharex=True, sharey=True)
    figure.get_layout_engine().set(hspace=0.06)
    for axes in panels.flat[len(values) :]:
        axes.axis("off")
    for value, axes in zip(values, panels.flat, strict=False):
        here = curves[curves[panel] == value]
        for (name, metric), part in here.groupby(["configuration", "metric"]):
            look = styles[name] | {"linestyle": ":" if metric == "train_ppl" else "-", "marker": ""}
            table = part.pivot_table(index="epoch", columns="id", values="value")
            axes.plot(table.index, table, **look, linewidth=0.5, alpha=0.4)
            mean = np.exp(np.log(table.dropna()).mean(axis=1))
            axes.plot(mean.index, mean, **look | {"marker": styles[name]["marker"], "markersize": 4})
        axes.set_title(f"{value:,} tokens" if panel == "train_tokens" else value)
    for axes in panels.flat[max(0, len(values) - columns) : len(values)]:  # the lowest of each column
        steps_axis(axes, "epoch")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in panels[:, 0]:
        log_axis(axes, "PPL (log)")
    keys = [Line2D([], [], **look | {"linestyle": "-"}, label=name) for name, look in styles.items()]
    keys += [
        Line2D([], [], color="0.3", linestyle=line, label=kind)
        for line, kind in (("-", "validation"), (":", "training"))
    ]
    return legend(figure, keys)


def groups(runs: pd.DataFrame, x: str, hue: str, panel: str) -> Figure:
    """Test PPL by two factors, a panel a value of a third: a point a run, a bar the mean, joined where x is a number.

    Numbers are drawn in their order, names in that of the rows.
    """
    values, names, places = (_levels(runs[name]) for name in (panel, hue, x))
    figure, (panels,) = new_figure(1, len(values), 3.8, sharey=True)
    shown = runs.assign(ppl=np.exp(runs["log_ppl"]))
    palette = [FIRST.get(name, COLOURS[2 + k % 8]) for k, name in enumerate(names)]
    numeric, apart = pd.api.types.is_numeric_dtype(runs[x]), 0.6 * (1 - 1 / len(names))
    offsets = np.linspace(-apart / 2, apart / 2, len(names))
    look = {"x": x, "y": "ppl", "hue": hue, "order": places, "hue_order": names, "palette": palette, "legend": False}
    look |= {"errorbar": None, "estimator": stats.gmean, "linestyle": "-" if numeric else "none", "linewidth": 1.6}
    for value, axes in zip(values, panels, strict=True):
        rows = shown[shown[panel] == value]
        sns.pointplot(rows, dodge=apart or False, ax=axes, **look | BAR)
        for name, colour, marker, offset in zip(names, palette, cycle(MARKERS), offsets, strict=False):
            points = rows[rows[hue] == name]
            position = points[x].map(places.index) + offset
            axes.plot(position, points["ppl"], marker, color=colour, markersize=4.5, alpha=0.55, markeredgewidth=0)
        axes.set(title=f"{panel}: {value}", ylabel="", xlim=(-0.5, len(places) - 0.5))
    log_axis(panels[0], "test PPL (log)")
    keys = zip(names, palette, cycle(MARKERS), strict=False)
    return legend(figure, [Line2D([], [], color=c, marker=m, label=f"{hue} {name}") for name, c, m in keys])


def _levels(column: pd.Series) -> list:
    """A column's values: numbers in their order, names in that of the rows."""
    return sorted(column.unique()) if pd.api.types.is_numeric_dtype(column) else [*column.unique()]
