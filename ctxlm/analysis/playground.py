"""What the playground shows: models asked in words, two runs side by side, what contexts remember.

Views of finished runs, each named "grid/run", for `explore.explore`; they return figures, tables or HTML.
"""

import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from ctxlm.analysis import runs as tidy
from ctxlm.analysis.estimates import Estimates, paired
from ctxlm.analysis.explore import (
    MOST_NATS,
    colour_scale,
    coloured,
    heat,
    large,
    legend_above,
    quoted,
    table_of,
    tell,
    visible,
    wrapped,
)
from ctxlm.analysis.plots import FIRST, recent_tokens
from ctxlm.analysis.run_plots import (
    COLOURS,
    LINES,
    MARKERS,
    REFERENCE,
    log_axis,
    metric_of,
    new_figure,
    recent_axis,
    steps_axis,
)
from ctxlm.analysis.workbench import GRID, experiment, history, known_of, metrics, train
from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import Stream, decode, split
from ctxlm.generate import ContextSpeaker, Speaker, State, changed, generate, load_run, next_tokens, surprise
from ctxlm.model import ContextLM
from ctxlm.phase2 import Predictor
from ctxlm.recurrence import Ablation, Contexts, chunked
from ctxlm.results import BY_HAND, WEIGHTS, outputs_dir, results_dir, run_folders

MANY = 5
"""Parameters that a row of the table of runs names."""
SURPRISES = [(heat(nats), str(nats)) for nats in range(0, MOST_NATS + 1, 3)]
"""Colours and what they stand for, nats."""
ECHOED = 300
"""Characters of a prompt, its last, that are shown again beside what comes next."""
READ = 8_000
"""Characters of a text that are read, its first: at each token a pointer is told what was likelier."""


def labels(*runs: str) -> dict[str, str]:
    """Runs and how a figure calls them: by what they are and, where two would be called alike, by their grid too."""
    parameters = "|".join(sorted(Experiment.model_fields, key=len, reverse=True))
    short = {run: re.sub(rf"_({parameters})-", r", \1 ", run.rpartition("/")[2]) for run in runs}
    alike = [name for name in short.values() if list(short.values()).count(name) > 1]
    return {run: f"{name}, {run.rpartition('/')[0]}" if name in alike else name for run, name in short.items()}


def _looks(*runs: str) -> dict[str, dict[str, Any]]:
    """Of each run the label, the colour, the marker and the line: A is blue and B orange, as everywhere.

    Others, also variants of these, have colours that are far apart.
    """
    others, found = iter((COLOURS[2], COLOURS[4], COLOURS[3])), {}
    for (run, name), marker, line in zip(labels(*runs).items(), MARKERS, LINES, strict=False):
        colour = FIRST.get(name) or next(others)
        found[run] = {"label": name, "color": colour, "marker": marker, "linestyle": line}
    return found


@functools.lru_cache(8)
def _loaded(run: str, _changed: int) -> Speaker:
    return load_run(*run.rsplit("/", 1))


def model(run: str) -> Speaker:
    """The model of a run, loaded once. One of the playground's own grid that has no weights is trained first."""
    grid, _, name = run.rpartition("/")
    if grid == GRID and metrics(run)["model"] == "context" and not (run_folders(grid)[name][0] / WEIGHTS).exists():
        if not (outputs_dir() / BY_HAND / name / WEIGHTS).exists():
            tell(f"{run} is trained first: its weights are too large to be committed. It takes one to three minutes.")
        run = train(name, "")
    return _loaded(run, _written(run))


def _written(run: str) -> int:
    """When a run was written, ns; 0 of one without a folder."""
    grid, _, name = run.rpartition("/")
    folders = run_folders(grid)
    return (folders[name][0] / "metrics.json").stat().st_mtime_ns if name in folders else 0


def _runs() -> pd.DataFrame:
    """All finished runs in `outputs` and among the committed: run, grid, source, metrics; the playground's first."""
    grids = {path.parent.name for path in results_dir().glob("*/runs.csv")}
    for root in (outputs_dir(), results_dir()):
        grids |= {path.parents[1].relative_to(root).as_posix() for path in root.glob("**/*/metrics.json")}
    rows = []
    for grid in sorted(grids - {"."}, key=lambda name: (name not in (GRID, BY_HAND), name)):
        folders = run_folders(grid)
        for _, row in tidy.load_runs(grid).iterrows():
            known = {"test_ppl": None} | known_of(row)
            folder, _ = folders.get(row["run"], (None, ""))
            asked = folder is not None and known["context_ablation"] == "none" and not known["context_rank"]
            kept = known["model"] == "kneser-ney" or (asked and (folder / WEIGHTS).exists())
            rows.append({"grid": grid, "run": row["run"], "source": row["source"], "at hand": asked and kept})
            rows[-1]["metrics"] = known
    return pd.DataFrame(rows, columns=["grid", "run", "source", "at hand", "metrics"])


def choices(*first: str) -> list[str]:
    """Runs that can be asked, `first` ones first; those of the playground can be trained on first use."""
    runs = _runs()
    found = (runs["grid"] + "/" + runs["run"])[runs["at hand"] | (runs["grid"] == GRID)].tolist()
    return [*first, *(run for run in found if run not in first)]


def catalogue(grid: str = GRID) -> Styler:
    """The finished runs of a grid, or of "all": what differs, test PPL, whether they can be asked.

    Where much differs, it is what differs from the grid's first run.
    """
    runs, rows = _runs(), []
    for name, own in runs[(runs["grid"] == grid) | (grid == "all")].groupby("grid", sort=False):
        values = pd.DataFrame([{key: str(m.get(key)) for key in _read_by(m)} for m in own["metrics"]])
        varied = [key for key in values if values[key].nunique() > 1 and key not in ("experiment", "device", "dtype")]
        usual = values.iloc[0] if len(varied) > MANY else {}
        for row, value in zip(own.to_dict("records"), values.to_dict("records"), strict=True):
            read = [key for key in varied if key in _read_by(row["metrics"])]
            differs = [f"{key} {value[key]}" for key in read if not len(usual) or value[key] != usual[key]]
            differs = differs[:MANY] + ["…"] * (len(differs) > MANY) + ["stopped"] * _stopped(row["metrics"])
            asked = "yes" if row["at hand"] else "no" if name != GRID else "after training"
            rows.append([f"{name}/{row['run']}", row["metrics"]["test_ppl"], asked, ", ".join(differs) or "–"])
    caption = f"{len(rows)} of {len(runs)} finished runs in {runs['grid'].nunique()} grids"
    formats = {"test PPL": lambda x: "" if x is None or np.isnan(x) else f"{x:,.1f}"}
    table = pd.DataFrame(rows, columns=["run", "test PPL", "can be asked", "what differs"])
    return table_of(table, ["run", "what differs"], formats).set_caption(caption)


def _read_by(known: Mapping[str, Any]) -> list[str]:
    """The parameters that a run's model reads."""
    return [*Experiment.model_construct(model=known["model"]).for_notebook()]


def _stopped(known: Mapping[str, Any]) -> bool:
    """Whether a training was ended by hand before its last epoch."""
    return known.get("stopped") is True


def grids() -> list[str]:
    """What `catalogue` may be of."""
    return list(dict.fromkeys([GRID, "all", *_runs()["grid"]]))


# Two runs side by side


def differing(a: str, b: str) -> Styler:
    """The parameters in which two runs differ, and what came of them."""
    _check_two(a, b)
    both, named = (metrics(a), metrics(b)), labels(a, b)
    names = [n for n in Experiment.model_fields if n in both[0] and n in both[1] and both[0][n] != both[1][n]]
    names += ["context_block_params", "token_block_params_trained", "best_epoch", "epochs_run"]
    names += ["stopped"] * any(map(_stopped, both)) + ["val_ppl", "test_ppl"]
    columns = [named[a], named[b]]
    rows = [[name, *(_value(m.get(name)) for m in both)] for name in names]
    return table_of(pd.DataFrame(rows, columns=["parameter", *columns]), columns)


def _value(value: Any) -> str:
    if isinstance(value, bool | str) or value is None:
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


@large
def curves(a: str, b: str) -> Figure:
    """PPL by epoch of two runs: validation, and training dotted."""
    figure, ((axes,),) = new_figure(height=4.4)
    for run, look in _looks(*dict.fromkeys((a, b))).items():
        for metric, part, line in (("val_ppl", "validation", "-"), ("train_ppl", "training", ":")):
            values, own = metric_of(history(run), "phase2", metric), look | {"linestyle": line}
            axes.plot(values.index, values, **own | {"label": f"{look['label']}, {part}"})
    steps_axis(axes, "epoch")
    log_axis(axes, "PPL (log)")
    legend_above(figure)
    return figure


def difference(a: str, b: str) -> Estimates:
    """Test PPL of `a` against that of `b`, conversation by conversation; the interval is over these alone.

    Raises:
        ConfigError: they are one run, or were judged on other texts.
    """
    _check_two(a, b)
    both, named = pd.DataFrame([_row(a), _row(b)]), labels(a, b)
    # one pair, whatever was drawn for each side: both read the same test text
    both = both.assign(replicate=0, **dict.fromkeys(tidy.PAIR, 0))
    found = paired(both, {"id": a}, {"id": b}, [], contrast=f"{named[a]} − {named[b]}")
    if not found or found[0].low is None:
        raise ConfigError(
            f"{a} and {b} were not judged on the same test text: make their test_samples and corpus equal"
        )
    return found


def _check_two(a: str, b: str) -> None:
    if a == b:
        raise ConfigError(f"a = b = {a!r}: choose two runs")


def _row(run: str) -> dict[str, Any]:
    """A run as `estimates` reads it."""
    grid, _, name = run.rpartition("/")
    known = metrics(run)
    return known | {"grid": grid, "run": name, "id": run, "source": "outputs", "log_ppl": known.get("test_loss")}


def _test(run: str) -> Stream:
    """The text that a run's test is of: by protocol 2 it was what is development now."""
    return _judged(experiment(run), metrics(run)["protocol"])


@functools.lru_cache(4)
def _judged(e: Experiment, protocol: int) -> Stream:
    return split(e).development if protocol == 2 else split(e).test


def _positions(test: Stream, conversation: int) -> np.ndarray:
    """The positions of a conversation, counted from 0, in the test text."""
    samples = np.unique(test.samples)
    return np.flatnonzero(test.samples == samples[min(conversation, len(samples) - 1)])


def _by_conversation(run: str) -> pd.DataFrame:
    """Of each test conversation, counted from 0, the tokens and the mean loss, nats."""
    grid, _, name = run.rpartition("/")
    rows = tidy.load_table(grid, "samples")
    table = rows[(rows["run"] == name) & (rows["part"] == "test")]
    table = table.set_index(np.searchsorted(np.unique(_test(run).samples), table["sample"]))
    return table.assign(nats=table["loss_sum"] / table["tokens"])


def _opening(run: str, conversation: int, characters: int = 280) -> str:
    test = _test(run)
    text = decode(test.tokens[_positions(test, conversation)])
    return text if len(text) <= characters else text[:characters] + " …"


def most_different(a: str, b: str, count: int = 3) -> Styler:
    """The test conversations that speak most for `a`, and those that speak most for `b`; nats a token."""
    difference(a, b)  # refuses what cannot be compared
    nats, named = {run: _by_conversation(run)["nats"] for run in (a, b)}, labels(a, b)
    gap = (nats[a] - nats[b]).sort_values()
    ends = pd.concat([gap.head(count), gap.tail(count)])
    rows = [[_opening(a, at), _signed(x), nats[a][at], nats[b][at], at] for at, x in ends.items()]
    columns = [f"nats, {named[a]}", f"nats, {named[b]}"]
    table = pd.DataFrame(rows, columns=["text", "difference", *columns, "conversation"])
    return table_of(table, ["text"], dict.fromkeys(columns, "{:.2f}"))


def extremes(run: str, count: int = 4) -> Styler:
    """The test conversations that a run reads best, and worst; nats a token."""
    order = _by_conversation(run).sort_values("nats")
    table = (
        pd.concat([order.head(count), order.tail(count)])[["nats", "tokens"]].rename_axis("conversation").reset_index()
    )
    table.insert(0, "text", [_opening(run, at) for at in table["conversation"]])
    table.insert(1, "PPL", np.exp(table["nats"]))
    return table_of(table, ["text"], {"nats": "{:.2f}", "PPL": "{:,.0f}"})


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+z.{digits}f}".replace("-", "−")


# Asking


def ask(prompt: str, a: str, b: str, c: str, top: int = 10) -> HTML:
    """The most probable next tokens after a prompt, of up to three runs side by side, as bars."""
    look = _looks(*dict.fromkeys((a, b, c)))
    found = {run: next_tokens(model(run), prompt, top) for run in look}
    most, parts = max(table["probability"].max() for table in found.values()), []
    for run, table in found.items():
        rows = (
            f'<tr><td style="text-align:left">{quoted(row.text, True)}</td><td>{100 * row.probability:.1f}&nbsp;%</td>'
            f'<td style="width:6em"><div style="background:{to_hex(look[run]["color"])};height:.8em;min-width:1px;'
            f'width:{row.probability / most:.1%}"></div></td></tr>'
            for row in table.itertuples()
        )
        head = f"<caption>{quoted(look[run]['label'])}</caption>"
        parts.append(f'<table style="margin:0;font-size:14px">{head}<tbody>{"".join(rows)}</tbody></table>')
    tail = prompt if len(prompt) <= ECHOED else f"… {prompt[-ECHOED:]}"
    asked = f'<p style="font:15px sans-serif;margin:.3em 0">after {quoted(tail)}</p>'
    return HTML(f'{asked}<div style="display:flex;flex-wrap:wrap;gap:.5em 1em">{"".join(parts)}</div>')


def continued(
    run: str, prompt: str, tokens: int = 80, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> HTML:
    """A prompt and how a run goes on from it; each token of it on the colour of its surprise."""
    drawn = list(generate(model(run), prompt, tokens, temperature, top_k, seed))
    rows = [(prompt, "", "", "the prompt")] if prompt else []
    rows += [(text, heat(nats), "", f"{nats:.2f} nats") for _, text, nats in drawn]
    return coloured(rows, colour_scale(SURPRISES, "surprise, nats:"))


@large
def cost(a: str, b: str, tokens: int) -> Figure:
    """The least time of a token in each twentieth of a text, and bytes of all that is kept of it.

    Raises:
        ConfigError: there are no `tokens`.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"cost_tokens = {tokens!r} is not possible: give a whole number from 1 on")
    figure, ((upper,), (lower,)) = new_figure(2, height=6.4, sharex=True)
    for run, look in _looks(*dict.fromkeys((a, b))).items():
        speaker, test = model(run), _test(run).tokens.tolist()
        state, seconds, sizes = speaker.start(), [], []
        for count in range(tokens):
            began = time.perf_counter()
            speaker.log_probs(state)
            state = speaker.step(state, test[count % len(test)])
            seconds.append(time.perf_counter() - began)
            sizes.append(state_bytes(state))
        parts = np.array_split(np.arange(tokens), min(tokens, 20))
        at, each = [part[-1] + 1 for part in parts], [min(seconds[part[0] : part[-1] + 1]) for part in parts]
        upper.plot(at, 1000 * np.array(each), **look)
        lower.plot(at, [sizes[k - 1] for k in at], **look)
    upper.set(ylabel="milliseconds a token", ylim=0)
    lower.set(ylabel="bytes kept", ylim=0, xlabel="tokens read")
    legend_above(figure)
    return figure


def state_bytes(state: State) -> int:
    """Bytes of all that a model knows of a text."""
    tensors = [*state.hidden, *([] if state.slow is None else [state.slow])]
    return 8 * len(state.recent) + sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# Reading


def _alternatives(speaker: Speaker, tokens: Sequence[int], top: int = 4) -> list[str]:
    """At each token the most probable ones, as a pointer is told."""
    state, found = speaker.start(), []
    for token in tokens:
        values, best = speaker.log_probs(state).topk(top)
        pairs = zip(best.tolist(), values.exp().tolist(), strict=True)
        found.append(", ".join(f"{visible(decode([other]), True)} {100 * p:.1f} %" for other, p in pairs))
        state = speaker.step(state, token)
    return found


def reading(text: str, a: str) -> HTML:
    """A text on the colours of its surprises, the number below each token, nats; a pointer is told alternatives."""
    table = surprise(model(a), text[:READ])
    others = _alternatives(model(a), table["token"].tolist())
    told = [f"{nats:.2f} nats; likelier: {other}" for nats, other in zip(table["nats"], others, strict=True)]
    rows = [(r.text, heat(r.nats), f"{r.nats:.1f}", t) for r, t in zip(table.itertuples(), told, strict=True)]
    what = f"{labels(a)[a]}, {table['nats'].mean():.2f} nats a token:"
    return coloured(rows, colour_scale(SURPRISES, what))


def against(text: str, a: str, b: str) -> HTML:
    """The surprises of `a` minus those of `b` on the same text: in the colour of the one that foresaw the token."""
    _check_two(a, b)
    text, look = text[:READ], _looks(a, b)
    first, second = surprise(model(a), text), surprise(model(b), text)
    ends = [look[a]["color"], "white", look[b]["color"]]
    colours = LinearSegmentedColormap.from_list("against", ends)

    def colour(gap: float) -> str:
        return to_hex(colours(0.5 + 0.32 * np.clip(gap / 3, -1, 1)))

    gaps = first["nats"] - second["nats"]
    rows = [
        (row.text, colour(gap), _signed(gap, 1), f"{row.nats:.2f} − {other:.2f} nats")
        for row, gap, other in zip(first.itertuples(), gaps, second["nats"], strict=True)
    ]
    names = [
        (colour(-3), f"{look[a]['label']} foresaw it"),
        (colour(0), "alike"),
        (colour(3), look[b]["label"] + " did"),
    ]
    return coloured(rows, colour_scale(names, f"{_signed(gaps.mean())} nats a token:"))


# Memory


@large
def exchanged(text: str, token: str, a: str, b: str, back: int) -> Figure:
    """What is still changed at the text's end if the token k steps before it is exchanged, k from 0 to `back`.

    Raises:
        ConfigError: as `changed`; or the text is a single token.
    """
    count = len(surprise(model(a), text))
    if count == 1:
        raise ConfigError(f"text = {text!r} is a single token, after which nothing is read: write a longer one")
    back = min(back, count - 1)
    figure, ((upper,), (lower,)) = new_figure(2, height=7.4, sharex=True)
    for run, look in _looks(*dict.fromkeys((a, b))).items():
        table = changed(model(run), text, range(back + 1), token)
        upper.plot(table["back"], table["context_distance"].where(lambda x: x > 1e-6), **look)
        lower.plot(table["back"], table["kl"].where(lambda x: x > 1e-6), **look)
    for axes, label in ((upper, "context distance,\nshare of its length"), (lower, "KL of the next\ntoken, nats")):
        axes.set(yscale="log", ylabel=label)
    end = visible(text if len(text) <= 50 else f"… {text[-48:]}")
    upper.set_title(wrapped(f"A token of “{end}” exchanged for “{visible(token, True)}”"), loc="left", parse_math=False)
    steps_axis(lower, "tokens read since the exchange, k")
    legend_above(figure)
    return figure


@large
def recent(a: str, b: str) -> Figure:
    """Validation PPL when contexts have read the last k tokens only, as the runs measured it."""
    figure, ((axes,),) = new_figure(height=4.4)
    for run, look in _looks(*dict.fromkeys((a, b))).items():
        known = history(run)
        if not (known["phase"] == "recent_tokens").any():
            continue
        rows = recent_tokens(known.assign(id=run))
        axes.plot(rows["k"], np.exp(rows["value"]), **look)
        axes.axhline(np.exp((rows["value"] - rows["extra"]).iloc[0]), color=look["color"], linestyle=":")
    if not axes.lines:
        raise ConfigError(f"neither {a} nor {b} has measured it: choose a context model")
    recent_axis(axes, [1, 2, 4, 8, 16, 32, 64])
    axes.set_xlabel("tokens read, k (log)")
    log_axis(axes, "PPL (log)")
    legend_above(figure)
    return figure


# Contexts


@functools.lru_cache(4)
def _contexts(run: str, _changed: int) -> tuple[ContextLM, Stream, Contexts]:
    speaker = model(run)
    if not isinstance(speaker, ContextSpeaker):
        raise ConfigError(f"run = {run!r} has no contexts: choose a context model, as {GRID}/A")
    test = _test(run)
    return speaker.model, test, chunked(speaker.model, torch.from_numpy(test.tokens).long())


def contexts(run: str) -> tuple[ContextLM, Stream, Contexts]:
    """A run's model, the test text, and its contexts there.

    Raises:
        ConfigError: it is no context model.
    """
    model(run)
    return _contexts(run, _written(run))


@large
def space(run: str, conversation: int) -> Figure:
    """The path of a conversation's contexts in the plane of the test contexts' two principal dimensions."""
    _, test, found = contexts(run)
    values = found.values - found.values.mean(0)
    eigenvalues, axes_of = torch.linalg.eigh(values.T @ values)
    plane, shares = (values @ axes_of[:, [-1, -2]]).numpy(), (eigenvalues.flip(0) / eigenvalues.sum()).tolist()
    own, others = _positions(test, conversation), np.linspace(0, len(plane) - 1, 2000).astype(int)
    figure, ((axes,),) = new_figure(height=6.2)
    axes.plot(*plane[others].T, ".", color="0.75", markersize=3, zorder=1)
    axes.plot(*plane[own].T, color="0.5", linewidth=0.5, zorder=2)
    dots = axes.scatter(*plane[own].T, c=np.arange(len(own)), cmap="viridis", s=36, zorder=3)
    for position in own[:: max(len(own) // 8, 1)]:
        text = visible(decode([test.tokens[position]]), True)
        axes.annotate(
            text, plane[position], parse_math=False, zorder=4, bbox={"fc": "w", "ec": "none", "alpha": 0.7, "pad": 1}
        )
    axes.set(xlabel=f"first dimension, {shares[0]:.0%} of the spread", ylabel=f"second, {shares[1]:.0%}")
    figure.colorbar(dots, label=f"token of conversation {conversation}")
    return figure


def neighbours(run: str, conversation: int, position: int, count: int = 6) -> Styler:
    """The test contexts nearest to one, each in another conversation: distance, and the text that led there."""
    _, test, found = contexts(run)
    own = _positions(test, conversation)
    here = own[min(position, len(own) - 1)]
    distances = (found.values - found.values[here]).norm(dim=1).numpy()
    places = np.argsort(distances, kind="stable")
    _, first = np.unique(test.samples[places], return_index=True)  # of each conversation the nearest
    places = [here, *(at for at in places[np.sort(first)] if test.samples[at] != test.samples[here])][: count + 1]
    table = {
        "text up to there": [decode(test.tokens[max(at - 11, 0) : at + 1]) for at in places],
        "distance": [f"{100 * distances[at] / distances.mean():.0f} %" for at in places],
        "conversation": np.searchsorted(np.unique(test.samples), test.samples[places]),
    }
    caption = "the first is the context itself; 100 % is the mean distance"
    return table_of(pd.DataFrame(table), ["text up to there"]).set_caption(caption)


@large
def what_if(run: str, conversation: int) -> Figure:
    """How the loss on a conversation grows if zeros, or contexts of shuffled text, stand in place of its contexts.

    The sum over tokens so far of the loss so, minus the loss with its own contexts: above 0, the contexts help.
    """
    losses = replaced(run, conversation)
    figure, ((axes,),) = new_figure(height=4.4)
    for name, colour, line in (("zeros", COLOURS[2], "-"), ("shuffled", COLOURS[3], "--")):
        gap = (losses[name] - losses["contexts"]).cumsum()
        axes.plot(
            gap.index + 1,
            gap,
            color=colour,
            linestyle=line,
            label=f"{name}: {_signed(gap.iloc[-1] / len(gap))} a token",
        )
    axes.axhline(0, **REFERENCE)
    axes.set(xlabel=f"token of conversation {conversation}", ylabel="nats lost so far")
    legend_above(figure)
    return figure


@torch.no_grad()
def replaced(run: str, conversation: int) -> pd.DataFrame:
    """The loss of each token of a conversation, nats, with its contexts, with zeros, and with shuffled text's."""
    network, test, found = contexts(run)
    at = torch.from_numpy(_positions(test, conversation))
    at = at[at > 0] - 1  # the token before predicts it
    predict, columns = Predictor(network, torch.float32), {}
    for name, ablation in (("contexts", "none"), ("zeros", "zero"), ("shuffled", "random_tokens")):
        e = experiment(run).model_copy(update={"context_ablation": ablation})
        columns[name] = predict(Ablation(network, found, e)(found), at)[1].numpy()
    return pd.DataFrame(columns)
