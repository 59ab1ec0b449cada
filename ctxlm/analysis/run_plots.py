"""The style of all figures, and those that the notebooks of one run draw.

A run's notebook imports this module, and nothing that only the analysis of many runs needs: seaborn and statsmodels
take seconds. `history` is long: phase, step, metric, value. Importing the module sets the common style.
"""

import colorsys
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib_inline.config import InlineBackend

from ctxlm.progress import in_jupyter

COLOURS = "#0173b2 #de8f05 #029e73 #d55e00 #cc78bc #ca9161 #fbafe4 #949494 #ece133 #56b4e9".split()
"""seaborn's palette `colorblind`."""
plt.rcParams |= {
    "axes.prop_cycle": plt.cycler("color", COLOURS),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **{"font.size": 10, "axes.labelsize": 10, "axes.titlesize": 10.5, "figure.dpi": 110},
    **dict.fromkeys(("axes.grid", "axes.axisbelow", "patch.force_edgecolor"), True),
    **dict.fromkeys(("xtick.bottom", "ytick.left"), False),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "0.15"),
    **{"axes.edgecolor": "0.4", "axes.linewidth": 1.25, "grid.color": "0.8", "grid.linewidth": 0.6},
    **{"lines.linewidth": 1.6, "lines.markersize": 6, "lines.solid_capstyle": "round"},
    "patch.edgecolor": "w",
}
# Jupyter crops none, so that all are of one width.
InlineBackend.instance(parent=get_ipython()).print_figure_kwargs = {"bbox_inches": None}
MARKERS, LINES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":")
REFERENCE = {"color": "0.35", "linewidth": 1, "linestyle": ":"}
WIDTH, NARROW = 8.5, 4.9
"""Of a figure, inches. One of the second width can be read on a phone as it is; one of the first scrolls there."""
FIRST = {"A": COLOURS[0], "B": COLOURS[1]}
"""The colours of the two that the study compares."""
RANKS = {
    "init_er": "before Phase 1",
    "train_er": "in Phase 1, with its noise",
    "train_er_noiseless": "after training, without noise",
    "val_er": "after training, on validation text",
}
"""What a run's effective ranks and spectra are of."""
FORGETTING = {
    "forgetting_init": ("before training", {"linestyle": ":", "mfc": "white", "markersize": 7, "markevery": (0, 6)}),
    "forgetting": ("after training", {"linestyle": "-", "markersize": 4, "markevery": (3, 6)}),
}
"""Phases of a history that follow a disturbance; sparse markers, in turns, leave both curves to be seen."""


def new_figure(
    rows: int = 1, columns: int = 1, height: float = 3.6, width: float = WIDTH, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure, `height` and `width` in inches, and its panels [rows, columns]. A cell shows it by returning it."""
    size = {"figsize": (width, height), "dpi": 144 if width < WIDTH else None}
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout="constrained", **size, **options)
    plt.close(figure)  # open, it would be shown once more
    return figure, panels


def legend(figure: Figure, handles: Sequence[Artist] | None = None) -> Figure:
    """The figure, which grows with the rows of the legend below it, by default of the first panel."""
    handles = handles or figure.axes[0].get_legend_handles_labels()[0]
    width = figure.get_figwidth()
    labels = [textwrap.fill(str(handle.get_label()), int(88 * width / WIDTH)) for handle in handles]
    widths = [43 + 4.7 * max(map(len, label.split("\n"))) for label in labels]  # points, with the line and the gap
    fitting = (n for n in range(len(widths), 0, -1) if sum(map(max, np.array_split(widths, n))) < 72 * width)
    columns = next(fitting, 1)
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))  # as even as its rows allow
    figure.legend(handles, labels, ncols=columns, loc="outside lower center", frameon=False)
    lines = math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (lines - 1))
    return figure


def line_styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each label; a variant of A or B ("A-zero") has its colour, lighter."""
    styles, others, kin = {}, cycle(COLOURS[2:]), dict.fromkeys(FIRST, 0)
    for label, marker, line in zip(sorted(set(labels)), cycle(MARKERS), cycle(LINES), strict=False):
        base = label.split("-")[0].split(",")[0]
        if base in FIRST:
            hue, light, full = colorsys.rgb_to_hls(*to_rgb(FIRST[base]))
            colour = colorsys.hls_to_rgb(hue, min(light * (1 + 0.45 * kin[base]), 0.8), full)
            kin[base] += 1
        else:
            colour = next(others)
        styles[label] = {"color": colour, "marker": marker, "linestyle": line}
    return styles


def log_axis(axes: Axes, label: str) -> None:
    """A logarithmic axis with plain numbers; LogLocator alone leaves a range under a decade without ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = MaxNLocator(8, steps=(1, 2, 2.5, 5, 10))
    subs = (1, 1.5, 2, 3, 5, 7) if high < 80 * low else (1, 3)
    axes.yaxis.set_major_locator(LogLocator(subs=subs) if high > 8 * low else few)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:.3g}")
    axes.set_ylim(low, high)
    axes.set_ylabel(label)


def steps_axis(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel(label)


def recent_axis(axes: Axes, k: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(k)), [str(tokens) for tokens in sorted(set(k))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens the context was built from, k (log)")


def metric_of(history: pd.DataFrame, phase: str, name: str) -> pd.Series:
    rows = history[(history["phase"] == phase) & (history["metric"] == name)]
    return rows.set_index("step")["value"].sort_index()


def by_epoch(history: pd.DataFrame, name: str) -> pd.Series:
    """A metric of Phase 2 by epoch, of which a run with several validations in one has parts; older runs have none."""
    values, epochs = (metric_of(history, "phase2", metric) for metric in (name, "epoch"))
    return values.set_axis(epochs.reindex(values.index)) if len(epochs) else values


def plot_phase1(history: pd.DataFrame) -> Figure:
    """One run's Phase 1 by iteration: converged share, mean squared change, and both terms of the loss."""
    figure, ((left, middle, right),) = new_figure(1, 3, 3.1)
    left.plot(metric_of(history, "phase1", "converged_ratio"), marker="o")
    left.set(ylabel="converged tokens", ylim=(-0.03, 1.03))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    middle.plot(metric_of(history, "phase1", "mse"), marker="o")
    log_axis(middle, "mean squared change\nof a context dimension (log)")
    right.plot(metric_of(history, "phase1", "fixed_point_loss"), "o-", label="fixed point")
    right.plot(metric_of(history, "phase1", "diversity_loss"), "s--", label="diversity")
    right.set_ylabel("terms of the loss")
    right.legend()
    for axes in (left, middle, right):
        steps_axis(axes, "iteration")
    return figure


def plot_phase2(history: pd.DataFrame) -> Figure:
    """One run's Phase 2 by epoch: training and validation loss and PPL, the best epoch marked."""
    figure, ((left, right),) = new_figure(1, 2, 3.4)
    for axes, name in ((left, "loss"), (right, "ppl")):
        train, val = (by_epoch(history, f"{part}_{name}") for part in ("train", "val"))
        axes.plot(train, "s--", color=COLOURS[1], label="training")
        axes.plot(val, "o-", color=COLOURS[0], label="validation")
        axes.axvline(val.idxmin(), label=f"best epoch: {val.idxmin():g}", **REFERENCE)
        steps_axis(axes, "epoch")
    left.set_ylabel("loss, nats a token")
    log_axis(right, "PPL (log)")
    left.legend()
    return figure


class Live:
    """The figure of a training, drawn anew in its place while the training goes on: give it as `on_epoch`."""

    handle: DisplayHandle | None = None

    def __call__(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Draw the history so far, where a figure can be updated."""
        if in_jupyter():
            self.finish(history)

    def finish(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Leave the figure of the whole training."""
        if not history:
            return
        figure = plot_phase2(pd.DataFrame(history))
        if self.handle:
            self.handle.update(figure)
        else:
            self.handle = display(figure, display_id=True)


def plot_singular_values(values: Mapping[str, Sequence[float]]) -> Figure:
    """Singular values of context matrices, largest first, each divided by their sum: of `RANKS` → values."""
    figure, ((axes,),) = new_figure()
    for k, (name, raw) in enumerate(values.items()):
        p = np.asarray(raw, float)
        look = {"color": COLOURS[k], "linestyle": LINES[k], "label": RANKS[name]}
        axes.plot(np.arange(1, len(p) + 1), p / p.sum(), linewidth=4.5 - k, alpha=0.8, **look)  # thinner over thicker
    axes.set(xlabel="rank of the singular value", ylabel="singular value over their sum (log)", yscale="log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-4 * high), high)  # LayerNorm leaves one direction empty: it would flatten the rest
    axes.legend()
    return figure


def plot_memory(histories: pd.DataFrame) -> Figure:
    """How soon contexts forget a disturbance, and what a context loses that has read the last k tokens only.

    Args:
        histories: of one run; or of many, with their `id` and `configuration`, of which the means are drawn.
    """
    from ctxlm.memory import FORGOTTEN  # torch takes two seconds, which other figures need not wait for

    if "configuration" not in histories:
        histories = histories.assign(configuration="this run", id="")
    figure, ((left, right),) = new_figure(1, 2, 4.2)
    styles = line_styles(histories["configuration"])
    shares = histories[(histories["metric"] == "share_left") & (histories["value"] > 0)]
    for (name, phase), rows in shares.groupby(["configuration", "phase"]):
        mean = np.exp(np.log(rows["value"]).groupby(rows["step"]).mean())
        what, style = FORGETTING[phase]
        left.plot(100 * mean, label=f"{name}, {what}", **styles[name] | style)
    floor = 100 * float(np.finfo(np.float32).eps)
    left.axhline(100 * FORGOTTEN, label=f"forgotten: {FORGOTTEN:.0%} is left", **REFERENCE)
    rounding = "rounding of 32-bit numbers: less cannot be seen"
    left.axhline(floor, label=rounding, **REFERENCE | {"linestyle": "-."})
    left.set(yscale="log", ylabel="disturbance that is left, % (log)", ylim=(floor / 3, 200))
    steps_axis(left, "tokens read since")
    recent = recent_tokens(histories)
    for name, rows in recent.groupby("configuration"):
        right.plot(100 * np.expm1(rows.groupby("k")["extra"].mean()), **styles[name])
    right.axhline(0, color="0.2", linewidth=1)
    right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    right.set_ylabel("validation PPL that is lost")
    if recent.empty:  # of contexts that were exchanged
        right.set_axis_off()
    else:
        recent_axis(right, recent["k"])
    return legend(figure)


def recent_tokens(histories: pd.DataFrame) -> pd.DataFrame:
    """What is lost when contexts have read the last k tokens only: the histories' rows with `k` and `extra`, nats."""
    rows = histories[(histories["phase"] == "recent_tokens") & (histories["metric"] == "val_loss")]
    whole = rows[rows["step"] == 0].set_index("id")["value"]
    rows = rows[rows["step"] > 0]
    whole = rows["id"].map(whole).astype(float)  # of no rows, too
    return rows.assign(k=rows["step"], extra=rows["value"] - whole)


def visible(text: str, spaces: bool = False) -> str:
    """A text with signs in the place of what cannot be seen: control characters and, if asked for, spaces."""
    signs = {c: f"⟨U+{ord(c):04X}⟩" for c in text if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"}
    return text.translate(str.maketrans(signs | {"\n": "⏎", "\t": "⇥"} | ({" ": "␣"} if spaces else {})))


def quoted(text: Any) -> str:
    """A text as HTML: escaped, and in an element in which nobody looks for formulas."""
    look = "font:inherit;color:inherit;background:none;white-space:pre-wrap"
    return f'<code style="{look}">{escape(visible(str(text)))}</code>'
