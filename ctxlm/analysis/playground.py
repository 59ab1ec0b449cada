"""The playground: trained models asked in words, two side by side, what contexts remember, and a small training.

Views are plain functions of finished runs, each named "grid/run", that return a figure, a table or HTML, or raise a
ConfigError where there is nothing to show; `explore` puts controls above them. Texts, of a corpus or out of a model,
may hold anything: they are escaped, in `pre` and `code` elements, where nobody looks for formulas.
"""

import functools
import inspect
import json
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, display
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from ctxlm import run as running
from ctxlm.analysis import run_plots as plots
from ctxlm.analysis import runs as tidy
from ctxlm.analysis.estimates import Estimates, paired
from ctxlm.analysis.run_plots import quoted, visible
from ctxlm.config import ConfigError, Experiment, load_grid
from ctxlm.corpus import Stream, decode, split
from ctxlm.files import BY_HAND, atomic, outputs_dir, results_dir, run_folders
from ctxlm.generate import ContextLanguageModel, LanguageModel, changed, generate, load_run, next_tokens, surprise
from ctxlm.metrics import NonFiniteLoss
from ctxlm.progress import in_jupyter
from ctxlm.recurrence import Contexts, chunked

GRID = "playground"
"""The grid whose context models are the presets; trainings here go to `BY_HAND`."""
READ = 8_000
"""Characters of a text that are read, its first."""
MAX_NATS = 12
"""A surprise from which on the colour grows no deeper."""


# How a notebook shows views


def explore(*views: Callable[..., Any], **controls: Any) -> None:
    """Show views of their controls' first values and, where there is a frontend, again whenever a control is changed.

    Args:
        views: each is given those of the controls that it takes.
        controls: a list of choices, a text, or (least, most, first) for a number.
    """
    taken = {view: inspect.signature(view).parameters.keys() & controls.keys() for view in views}
    if not in_jupyter():
        place = {list: 0, tuple: 2}  # where the first value stands
        first = {name: c if isinstance(c, str) else c[place[type(c)]] for name, c in controls.items()}
        for view, names in taken.items():
            _show(view, **{name: first[name] for name in names})
        return
    import ipywidgets  # opens channels to a frontend: not where there is none

    widgets = {name: _widget(name, control) for name, control in controls.items()}
    display(ipywidgets.Box([*widgets.values()], layout={"flex_flow": "row wrap"}))
    for view, names in taken.items():
        display(ipywidgets.interactive_output(functools.partial(_show, view), {n: widgets[n] for n in names}))


def _widget(name: str, control: Any) -> Any:
    import ipywidgets

    look = {"description": name, "style": {"description_width": "initial"}}
    look["layout"] = {"width": "28em", "max_width": "100%", "margin": "2px 12px 2px 0"}
    if isinstance(control, list):
        return ipywidgets.Dropdown(options=control, **look)
    if isinstance(control, tuple):
        least, most, first = control
        slider = ipywidgets.FloatSlider if isinstance(most, float) else ipywidgets.IntSlider
        return slider(min=least, max=most, value=first, continuous_update=False, **look)
    kind = ipywidgets.Textarea if name == "text" else ipywidgets.Text
    return kind(value=control, continuous_update=False, **look)


def _show(view: Callable[..., Any], **values: Any) -> None:
    """Display a view, or the sentence that says why there is none."""
    try:
        shown = view(**values)
    except (ConfigError, NonFiniteLoss, OSError) as error:
        shown = HTML(f"<p>{quoted(error)}</p>")
    display(shown)


def lines(panels: Mapping[str, pd.DataFrame], x: str, title: str = "") -> Figure:
    """Panels below one another, from label → table: over its index a line for every column (run, what).

    The first run is blue and the second orange; a second line of a run is dotted.
    """
    figure, axes = plots.new_figure(len(panels), height=0.8 + 1.8 * len(panels), width=plots.NARROW, sharex=True)
    for panel, (label, frame) in zip(axes[:, 0], panels.items(), strict=True):
        first: dict[str, str] = {}
        for run, what in frame:
            line, k, values = "-" if first.setdefault(run, what) == what else ":", [*first].index(run), frame[run, what]
            look = {"color": plots.COLOURS[k], "marker": plots.MARKERS[k] if len(values) < 60 else ""}
            name = textwrap.fill(f"{run}, {what}" if what else run, 48)
            panel.plot(values.dropna(), label=name, linestyle=line, **look)
        if "(log)" in label:
            plots.log_axis(panel, label)
        else:
            panel.set(ylabel=label, ylim=(min(0, panel.get_ylim()[0]), None))
    plots.steps_axis(axes[-1, 0], x)
    axes[0, 0].set_title(textwrap.fill(title, 48), loc="left", parse_math=False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    columns = 1 if max(map(len, names)) > 26 else 2
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
    return figure


def table_of(frame: pd.DataFrame, texts: Sequence[str] = (), caption: str = "") -> Styler:
    """A table; the columns `texts`, which may be long, are left-aligned."""
    look = {"text-align": "left", "min-width": "13em", "overflow-wrap": "anywhere"}
    heads = {name: [{"selector": "th", "props": "text-align:left"}] for name in texts}
    style = frame.style.hide(axis="index").format(quoted).format_index(quoted, axis=1).set_table_styles(heads)
    return style.set_properties(subset=list(texts), **look).set_caption(quoted(caption))


def coloured(rows: Iterable[tuple[str, str, str, str]], what: str, legend: Mapping[str, str] | None = None) -> HTML:
    """Tokens on colours, from rows (text, colour, number below, title); above them `what`, and meaning → colour."""
    ink, tokens = "color:#111;font:inherit", []  # on a colour the same in a light page and a dark one
    for text, colour, number, title in rows:
        small = f'<sub style="font-size:10px;opacity:.75">{escape(number)}</sub>' if number else ""
        look = f"background:{colour};{ink};border-radius:3px" if colour else "background:none;font:inherit"
        tokens.append(f'<code title="{escape(visible(title))}" style="{look}">{escape(visible(text))}{small}</code>')
        tokens += ["<br>"] * text.endswith("\n")
    legend = legend or {str(nats): heat(nats) for nats in range(0, MAX_NATS + 1, 3)}
    boxes = (f'<span style="background:{c};{ink};padding:2px 8px">{escape(name)}</span>' for name, c in legend.items())
    look = "white-space:pre-wrap;overflow-wrap:break-word;word-break:normal;font:15px/2 sans-serif;max-width:60em"
    head = f'<p style="font:14px sans-serif;margin:.3em 0">{quoted(what)} {"".join(boxes)}</p>'
    return HTML(f'<div>{head}<pre style="{look}">{"".join(tokens)}</pre></div>')


def heat(nats: float) -> str:
    """The colour of a surprise, light enough for dark letters."""
    return to_hex(plt.get_cmap("YlOrBr")(0.6 * min(max(nats, 0.0) / MAX_NATS, 1.0)))


# Runs


def grids() -> list[str]:
    """Grids that have finished runs, in `outputs` or committed; the playground's and those by hand first."""
    names = {path.parent.name for path in results_dir().glob("*/runs.csv")}
    for root in (outputs_dir(), results_dir()):
        names |= {path.parents[1].relative_to(root).as_posix() for path in root.glob("**/*/metrics.json")}
    return sorted(names - {"."}, key=lambda name: (name not in (GRID, BY_HAND), name))


def finished(grid: str) -> pd.DataFrame:
    """The finished runs of a grid by "grid/run": what metrics.json holds, and whether they can be `asked`.

    The playground's own, whose weights are not all committed, are trained when they are asked.
    """
    runs, folders = tidy.load_runs(grid), run_folders(grid)
    if runs.empty:
        return runs
    asked = [run for run, (folder, _) in folders.items() if grid == GRID or (folder / running.WEIGHTS).exists()]
    return runs.assign(asked=runs["run"].isin(asked)).set_index(grid + "/" + runs["run"])


def choices(*first: str) -> list[str]:
    """Runs that can be asked, `first` ones first."""
    tables = [finished(grid) for grid in grids() if run_folders(grid)]
    return list(dict.fromkeys([*first, *(run for runs in tables for run in runs.index[runs["asked"]])]))


def catalogue(grid: str = GRID) -> Styler:
    """The finished runs of a grid, or of "all": test PPL, whether they can be asked, what differs from its first."""
    rows, names = [], [name for name in Experiment.model_fields if name not in ("experiment", "device")]
    for each in grids() if grid == "all" else [grid]:
        for run, row in (runs := finished(each)).iterrows():
            usual = runs.iloc[0]
            differs = [f"{name} {_value(row[name])}" for name in names if str(row[name]) != str(usual[name])]
            differs += ["stopped"] * (row.get("stopped") is True)
            rows.append([run, _value(row.get("test_ppl")), "yes" if row["asked"] else "no", ", ".join(differs) or "–"])
    columns = ["run", "test PPL", "can be asked", "differs from the grid's first run in"]
    return table_of(pd.DataFrame(rows, columns=columns), [columns[0], columns[-1]], f"{len(rows)} finished runs")


def metrics(run: str) -> dict[str, Any]:
    """What metrics.json holds of the run "grid/run"; what is missing is None.

    Raises:
        ConfigError: there is no such run.
    """
    runs = finished(run.rpartition("/")[0])
    if run not in runs.index:
        raise ConfigError(f"run = {run!r} is no finished run: choose one of the table, as {GRID}/A")
    return {name: None if value != value else value for name, value in runs.loc[run].to_dict().items()}


def table(run: str, kind: str) -> pd.DataFrame:
    """The `history` of a run, or its `samples`."""
    grid, _, name = run.rpartition("/")
    rows = tidy.load_table(grid, kind)
    return rows[rows["run"] == name]


@functools.lru_cache(8)
def model(run: str) -> LanguageModel:
    """The model of a run, loaded once. One of the playground's own grid that has no weights is trained first."""
    grid, _, name = run.rpartition("/")
    if grid == GRID and metrics(run)["model"] == "context":
        folder, _ = run_folders(grid)[name]
        if not (folder / running.WEIGHTS).exists():
            print(f"{run} is trained first: its weights are too large to be committed. It takes one to three minutes.")
            return load_run(*train(name).split("/"))
    return load_run(grid, name)


def _value(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:,.5g}"


# Training


def presets() -> dict[str, Experiment]:
    """What a training may begin with: the playground's context models."""
    return {name: e for name, e in load_grid(GRID).runs.items() if e.model == "context"}


def train(preset: str, **change: Any) -> str:
    """Train a preset with parameters changed, its curve live, and write it; returns "interactive/<preset>_<change>".

    One that is finished is not trained again. Jupyter's stop button (Ctrl-C) ends it after its epoch: the best epoch so
    far is kept and judged, and metrics.json says `stopped`. Pressed twice, it ends at once and nothing is written.

    Raises:
        ConfigError: there is no such preset, or as `ctxlm.run.run`.
        NonFiniteLoss: the change does not let it learn.
    """
    if preset not in (known := presets()):
        raise ConfigError(f"preset = {preset!r} is no context model of grid {GRID}: choose one of {', '.join(known)}")
    start, by_width = known[preset], {"logit_scale": None}
    of_width = start.logit_scale == Experiment.from_mapping(start.model_dump(), by_width).logit_scale
    e = Experiment.from_mapping(start.model_dump(), by_width if of_width else {}, change)
    e.check_read(change)
    # notebook 02's by hand may be called as the preset
    name = running.name_of({"experiment": preset} | change, 120) if change else f"{preset}_again"
    run, path = f"{BY_HAND}/{name}", outputs_dir() / BY_HAND / name / "metrics.json"
    if path.exists() and e.is_that_of(metrics(run)):
        print(f"{run} is finished: to train it anew, delete {path.parent}")
        return run

    def press(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.append(True)
        print("It stops after this epoch and keeps the best one. Stopped once more, it ends at once and keeps nothing.")

    def follow(history: list[dict]) -> bool:
        curve(history)
        ended[:] = pressed
        return bool(ended)

    curve, pressed, ended = plots.Live(), [], []
    main = threading.current_thread() is threading.main_thread()  # which alone takes signals
    before = signal.signal(signal.SIGINT, press) if main else None
    try:
        running.run(e, path.parent, follow)
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if ended:
        with atomic(path) as new:
            new.write_text(json.dumps(json.loads(path.read_bytes()) | {"stopped": True}, indent=1) + "\n")
    for kept in (model, contexts, _test):
        kept.cache_clear()
    return run


# Two runs side by side


def differing(a: str, b: str) -> Styler:
    """The parameters in which two runs differ, and what came of them."""
    known = {run: metrics(run) for run in (a, b)}
    names = [name for name in Experiment.model_fields if known[a][name] != known[b][name]]
    names += ["context_block_params", "token_block_params_trained", "best_epoch", "epochs_run"]
    names += ["stopped"] * any(k.get("stopped") is True for k in known.values()) + ["val_ppl", "test_ppl"]
    columns = {run: [_value(k.get(name)) for name in names] for run, k in known.items()}
    return table_of(pd.DataFrame({"parameter": names} | columns))


def curves(a: str, b: str) -> Figure:
    """PPL by epoch of two runs: validation, and training dotted.

    Raises:
        ConfigError: neither was trained by epochs.
    """
    each = [_ppl(run, table(run, "history")) for run in dict.fromkeys((a, b))]
    if all(frame.empty for frame in each):
        raise ConfigError(f"runs = {a!r} and {b!r} are counted, not trained: choose a model that has epochs")
    return lines({"PPL (log)": pd.concat(each, axis=1)}, "epoch")


def _ppl(run: str, history: pd.DataFrame) -> pd.DataFrame:
    """PPL by epoch, of validation and of training."""
    names = {"validation": "val_ppl", "training": "train_ppl"}
    return pd.DataFrame({(run, part): plots.by_epoch(history, name) for part, name in names.items()})


def difference(a: str, b: str) -> Estimates:
    """Test PPL of `a` against that of `b`, conversation by conversation; the interval is over these alone.

    Raises:
        ConfigError: they are one run, or were judged on other texts.
    """
    if a == b:
        raise ConfigError(f"a = b = {a!r}: choose two runs")
    both = pd.DataFrame([metrics(run) | {"grid": run.rpartition("/")[0], "id": run} for run in (a, b)])
    # one pair, whatever was drawn for each side: both read the same test text
    both = both.assign(log_ppl=both.get("test_loss"), replicate=0, **dict.fromkeys(tidy.DRAWN, 0))
    estimates = paired(both, {"id": a}, {"id": b}, [], contrast=f"{a} − {b}")
    if not estimates or estimates[0].low is None:
        raise ConfigError(f"{a} and {b} were not judged on the same text: make their test_samples and corpus equal")
    return estimates


def most_different(a: str, b: str, count: int = 3) -> Styler:
    """The test conversations that speak most for `a`, and those that speak most for `b`; nats a token."""
    difference(a, b)  # refuses what cannot be compared
    nats = {run: _nats(run) for run in (a, b)}
    gap, test = (nats[a] - nats[b]).sort_values(), _test(a)
    columns = {"difference": gap.map("{:+.2f}".format)}
    columns |= {f"nats, {run}": values.map("{:.2f}".format) for run, values in nats.items()}
    frame = pd.DataFrame(columns).loc[[*gap.index[:count], *gap.index[-count:]]]
    frame = frame.rename_axis("conversation").reset_index()
    tokens = [test.tokens[_positions(test, k)] for k in frame["conversation"]]
    frame.insert(0, "text", [decode(some[:80]) + " …" * (len(some) > 80) for some in tokens])
    return table_of(frame, ["text"])


def _nats(run: str) -> pd.Series:
    """Of each test conversation, counted from 0, the mean loss, nats a token."""
    rows = table(run, "samples").query("part == 'test'")
    return (rows["loss_sum"] / rows["tokens"]).set_axis(np.searchsorted(np.unique(_test(run).samples), rows["sample"]))


@functools.lru_cache(4)
def _test(run: str) -> Stream:
    """The text that a run's test is of."""
    return split(Experiment.of_run(metrics(run))).test


def _positions(test: Stream, conversation: int) -> np.ndarray:
    """The positions of a conversation, counted from 0, in the test text."""
    samples = np.unique(test.samples)
    return np.flatnonzero(test.samples == samples[min(conversation, len(samples) - 1)])


# Asking


def ask(prompt: str, a: str, b: str, c: str, top: int = 10) -> Styler:
    """The most probable next tokens after a prompt, of up to three runs side by side, with bars."""
    columns: dict[str, Any] = {}
    for run in dict.fromkeys((a, b, c)):
        likely = next_tokens(model(run), prompt, top)
        columns |= {run: [visible(text, True) for text in likely["text"]], f"{run}, %": 100 * likely["probability"]}
    style, numbers = table_of(pd.DataFrame(columns), caption=f"after {prompt[-300:]}"), [*columns][1::2]
    for name, colour in zip(numbers, plots.COLOURS, strict=False):
        most = max(columns[number].max() for number in numbers)
        style = style.format("{:.1f}", subset=[name]).bar([name], color=f"{colour}66", vmin=0, vmax=most)
    return style


def continued(
    run: str, prompt: str, tokens: int = 80, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> HTML:
    """A prompt and how a run goes on from it; each token of it on the colour of its surprise."""
    drawn = generate(model(run), prompt, tokens, temperature, top_k, seed)
    rows = [(text, heat(nats), "", f"{nats:.2f} nats") for _, text, nats in drawn]
    return coloured([(prompt, "", "", "the prompt")] * bool(prompt) + rows, "surprise, nats:")


def cost(a: str, b: str, cost_tokens: int) -> Figure:
    """The least time of a token in each twentieth of a text, and bytes of all that is kept of it."""
    each = {}
    for run in dict.fromkeys((a, b)):
        lm, rows = model(run), []
        state = lm.start()
        for end, token in enumerate(np.resize(_test(run).tokens, cost_tokens).tolist(), 1):
            began = time.perf_counter()
            lm.log_probs(state)
            state = lm.step(state, token)
            rows.append((end, 1000 * (time.perf_counter() - began), state.nbytes))
        twentieths = np.arange(len(rows)) * 20 // len(rows)
        read = pd.DataFrame(rows, columns=["end", "ms", "bytes"]).groupby(twentieths)
        each[run, ""] = read.agg({"end": "max", "ms": "min", "bytes": "max"}).set_index("end")
    panels = {"milliseconds a token": "ms", "bytes kept": "bytes"}
    panels = {label: pd.DataFrame({run: read[name] for run, read in each.items()}) for label, name in panels.items()}
    return lines(panels, "tokens read")


# Reading


def reading(text: str, a: str) -> HTML:
    """A text on the colours of its surprises, the number below each token, nats; its title names likelier ones."""
    lm, rows = model(a), []
    read, state = surprise(lm, text[:READ]), lm.start()
    for row in read.itertuples():
        values, best = lm.log_probs(state).topk(4)
        pairs = zip(best.tolist(), values.exp().tolist(), strict=True)
        likelier = ", ".join(f"{visible(decode([token]), True)} {100 * p:.1f} %" for token, p in pairs)
        rows.append((row.text, heat(row.nats), f"{row.nats:.1f}", f"{row.nats:.2f} nats; likelier: {likelier}"))
        state = lm.step(state, row.token)
    return coloured(rows, f"{a}, {read['nats'].mean():.2f} nats a token:")


def against(text: str, a: str, b: str) -> HTML:
    """The surprises of `a` minus those of `b` on the same text: in the colour of the one that foresaw the token."""
    read, other = surprise(model(a), text[:READ]), surprise(model(b), text[:READ])["nats"]
    blue_to_orange = LinearSegmentedColormap.from_list("", [plots.COLOURS[0], "white", plots.COLOURS[1]])
    gaps = read["nats"] - other
    colours = [to_hex(colour) for colour in blue_to_orange(0.5 + 0.32 * np.clip([-3, 0, 3, *gaps], -3, 3) / 3)]
    titles = [f"{x:.2f} − {y:.2f} nats" for x, y in zip(read["nats"], other, strict=True)]
    rows = zip(read["text"], colours[3:], gaps.map("{:+.1f}".format), titles, strict=True)
    legend = dict(zip((f"{a} foresaw it", "alike", f"{b} did"), colours, strict=False))
    return coloured(rows, f"{gaps.mean():+.2f} nats a token:", legend)


# Memory


def exchanged(text: str, token: str, a: str, b: str, back: int) -> Figure:
    """What is still changed at the text's end if the token k steps before it is exchanged, k from 0 to `back`."""
    each = {run: changed(model(run), text, token, back) for run in (a, b)}
    names = {"context distance,\nshare of its length (log)": "context_distance"}
    names["KL of the next\ntoken, nats (log)"] = "kl"
    panels = {}
    for label, name in names.items():
        frame = pd.DataFrame({(run, ""): rows[name] for run, rows in each.items()})
        panels[label] = frame.where(frame > 1e-6)
    title = f"A token of “{visible(text[-48:])}” exchanged for “{visible(token, True)}”"
    return lines(panels, "tokens read since the exchange, k", title)


def recent(a: str, b: str) -> Figure:
    """Validation PPL when contexts have read the last k tokens only, as the runs measured it; dotted: all tokens."""
    columns = {}
    for run in (a, b):
        ppl = plots.metric_of(table(run, "history"), "recent_tokens", "val_ppl")
        if len(ppl):
            columns |= {(run, "the last k"): ppl.drop(0), (run, "all tokens"): ppl.drop(0) * 0 + ppl[0]}
    if not columns:
        raise ConfigError(f"neither {a} nor {b} has measured it: choose a context model")
    frame = pd.DataFrame(columns)
    figure = lines({"validation PPL (log)": frame}, "")
    plots.recent_axis(figure.axes[0], frame.index)
    return figure


# Contexts


@functools.lru_cache(4)
def contexts(run: str) -> tuple[Stream, Contexts]:
    """The test text, and a run's contexts there.

    Raises:
        ConfigError: it is no context model.
    """
    lm, test = model(run), _test(run)
    if not isinstance(lm, ContextLanguageModel):
        raise ConfigError(f"run = {run!r} has no contexts: choose a context model, as {GRID}/A")
    return test, chunked(lm.model, torch.from_numpy(test.tokens).long())


def space(run: str, conversation: int) -> Figure:
    """The path of a conversation's contexts in the plane of the test contexts' two principal dimensions."""
    test, states = contexts(run)
    values = states.values - states.values.mean(0)
    eigenvalues, axes_of = torch.linalg.eigh(values.T @ values)
    plane, shares = (values @ axes_of[:, [-1, -2]]).numpy(), (eigenvalues.flip(0) / eigenvalues.sum()).tolist()
    path, others = _positions(test, conversation), np.linspace(0, len(plane) - 1, 2000).astype(int)
    figure, ((axes,),) = plots.new_figure(height=3.7, width=plots.NARROW)
    axes.plot(*plane[others].T, ".", color="0.75", markersize=1.5, zorder=1)
    axes.plot(*plane[path].T, color="0.5", linewidth=0.5, zorder=2)
    dots = axes.scatter(*plane[path].T, c=np.arange(len(path)), cmap="viridis", s=14, zorder=3)
    look = {"parse_math": False, "zorder": 4, "bbox": {"fc": "w", "ec": "none", "alpha": 0.7, "pad": 1}}
    for position in path[:: max(len(path) // 8, 1)]:
        axes.annotate(visible(decode([test.tokens[position]]), True), plane[position], **look)
    axes.set(xlabel=f"first dimension, {shares[0]:.0%} of the spread", ylabel=f"second, {shares[1]:.0%}")
    figure.colorbar(dots, label="token of the conversation")
    return figure


def neighbours(run: str, conversation: int, position: int, count: int = 6) -> Styler:
    """The test contexts nearest to one, each in another conversation: distance, and the text that led there."""
    test, states = contexts(run)
    path = _positions(test, conversation)
    here = path[min(position, len(path) - 1)]
    distances = (states.values - states.values[here]).norm(dim=1).numpy()
    frame = pd.DataFrame({"distance": distances, "conversation": np.unique(test.samples, return_inverse=True)[1]})
    nearest = frame.drop(path).sort_values("distance").drop_duplicates("conversation").head(count)
    shown = pd.concat([frame.loc[[here]], nearest])
    shown["distance"] = [f"{100 * x / distances.mean():.0f} %" for x in shown["distance"]]
    shown.insert(0, "text up to there", [decode(test.tokens[max(k - 11, 0) : k + 1]) for k in shown.index])
    return table_of(shown, ["text up to there"], "the first is the context itself; 100 % is the mean distance")
