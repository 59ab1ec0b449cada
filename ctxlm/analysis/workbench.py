"""A small context model trained in a notebook: a preset with a change, its curve live, stopped at will.

A finished run is named "grid/run".
"""

import math
import re
import shlex
import threading
from collections.abc import Callable, Sequence
from html import escape
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from IPython.display import HTML, display
from matplotlib.figure import Figure

from ctxlm.analysis.explore import (
    beside,
    has_widgets,
    large,
    legend_above,
    quiet,
    quoted,
    show_widgets,
    shown,
    visible,
    widget,
    wrapped,
)
from ctxlm.analysis.run_plots import COLOURS, REFERENCE, log_axis, metric_of, new_figure, steps_axis
from ctxlm.analysis.runs import load_runs, load_table
from ctxlm.config import NOTEBOOKS, ConfigError, Experiment, load_grid, parse_yaml, read_yaml
from ctxlm.corpus import split
from ctxlm.device import resolve_device, resolve_dtype
from ctxlm.embeddings import load_embedding
from ctxlm.files import digest
from ctxlm.memory import recent_tokens
from ctxlm.metrics import NonFiniteLoss, loss_summary
from ctxlm.model import ContextLM, own_weights
from ctxlm.phase1 import shape_contexts
from ctxlm.phase2 import Predictor, evaluate, train_token_block
from ctxlm.recurrence import Ablation, chunked
from ctxlm.results import (
    BY_HAND,
    WEIGHTS,
    Stopwatch,
    folder_by_hand,
    provenance,
    run_checkpoints,
    run_folder,
    write_run,
)

GRID = "playground"
"""The grid whose context models are the presets."""


def metrics(run: str) -> dict[str, Any]:
    """The metrics.json of the run "grid/run".

    Raises:
        ConfigError: there is no such run.
    """
    grid, _, name = run.rpartition("/")
    rows = load_runs(grid) if grid else pd.DataFrame()
    if rows.empty or name not in set(rows["run"]):
        raise ConfigError(f"run = {run!r} is no finished run: choose one of the table, as {GRID}/A")
    return known_of(rows[rows["run"] == name].iloc[0])


def known_of(row: pd.Series) -> dict[str, Any]:
    """A row of `load_runs` as its metrics.json has it: what is missing is None, whole numbers are whole."""
    known = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    known = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in known.items()}
    whole = {name for name, value in known.items() if isinstance(value, float) and value.is_integer()}
    return known | {name: int(known[name]) for name in whole if not name.endswith(("_loss", "_ppl"))}


def history(run: str) -> pd.DataFrame:
    grid, _, name = run.rpartition("/")
    rows = load_table(grid, "history")
    return rows[rows["run"] == name]


def experiment(run: str) -> Experiment:
    known = metrics(run)
    given = {name: known[name] for name in Experiment.model_fields if name in known}
    if given.get("train_samples") is not None:  # it also says how many tokens these were
        given["train_tokens"] = None
    return Experiment.from_mapping(given, {"device": "cpu", "dtype": "float32"})


def presets() -> dict[str, Experiment]:
    """What a training may begin with: the playground's context models."""
    return {name: e for name, e in load_grid(GRID).runs.items() if e.model == "context"}


def changed_experiment(preset: str, change: str) -> tuple[Experiment, str]:
    """A run of the playground's grid with parameters changed, as YAML, and a name for it.

    Raises:
        ConfigError: there is no such preset, or the change is no mapping of parameters, or not possible.
    """
    known = presets()
    if preset not in known:
        raise ConfigError(f"preset = {preset!r} is no context model of grid {GRID}: choose one of {', '.join(known)}")
    try:
        given = parse_yaml(change) or {}
    except ConfigError:
        given = change
    if not isinstance(given, dict):
        raise ConfigError(f"change = {change!r} is no list of parameters: write one a line, as num_layers: 3")
    e = Experiment.from_mapping(known[preset].model_dump(), given)
    name = "_".join([preset, *(f"{key}-{value}" for key, value in given.items())])
    return e, re.sub(r"[^\w.+-]", "-", name)[:100]


def train(
    preset: str,
    change: str = "",
    on_epoch: Callable[[list[dict]], bool | None] | None = None,
    folder: str | Path | None = None,
) -> str:
    """Train a preset of the context model with a change, and write it; returns its name, "interactive/<difference>".

    One that is finished there already is not trained again.

    Args:
        on_epoch: as `Trainer.run`'s; a run that it ended early has `stopped` among its metrics.
        folder: another one than that.

    Raises:
        ConfigError: as `changed_experiment`; it is no context model; or something that has to be there is not.
        NonFiniteLoss: the change does not let it learn.
    """
    e, name = changed_experiment(preset, change)
    e.meant_for("notebooks/02_experiment.ipynb")
    beside = folder_by_hand(name, e)
    if folder is None and (beside / WEIGHTS).exists():
        return f"{beside.parent.name}/{beside.name}"
    watch, device = Stopwatch(), resolve_device(e)
    dtype = resolve_dtype(e, device)
    record, streams, vectors = provenance(e, device, dtype), split(e), load_embedding(e)
    record["embedding_digest"] = digest(vectors.tobytes())
    folder = run_folder(folder or beside)
    checkpoints = run_checkpoints(folder, record)
    train, val, development, test = (torch.from_numpy(s.tokens).long().to(device) for s in vars(streams).values())
    asked_to_stop = False

    def follow(rows: list[dict]) -> bool:
        nonlocal asked_to_stop
        asked_to_stop = bool(on_epoch and on_epoch(rows))
        return asked_to_stop

    network = ContextLM(e, torch.from_numpy(vectors)).to(device)
    with watch("phase1"):
        shaped = shape_contexts(network, train, e, dtype)
    with watch("phase2"):
        kept = {} if e.context_ablation != "none" or e.phase2_context_window else {"keep": dtype}
        contexts, val_contexts = chunked(network, train, **kept), chunked(network, val, **kept)
        ablation = Ablation(network, contexts, e)
        phase2 = train_token_block(network, ablation(contexts), ablation(val_contexts), e, dtype, follow, checkpoints)
    predict = Predictor(network, dtype)
    with watch("test"):
        judged = {
            name: evaluate(predict, ablation(chunked(network, tokens, **kept)))
            for name, tokens in (("development", development), ("test", test))
        }
    if e.phase2_context_window:  # the ContextBlock has moved on
        val_contexts = chunked(network, val)
    own_contexts = e.context_ablation == "none" and not e.context_rank
    recent = recent_tokens(network, predict.from_layers, val_contexts) if own_contexts else []
    sizes = {f"{name}_tokens": len(stream) for name, stream in vars(streams).items()}
    found = record | sizes | {"train_tokens": len(train) + e.held_out_tokens}
    found |= network.cost(len(train), shaped.phase1.iterations, phase2.epochs_run)
    found |= network.parameter_counts() | shaped.summary() | phase2.summary() | watch.seconds
    for name, (losses, accuracy) in judged.items():
        found |= loss_summary(name, losses, accuracy)
    found |= {"recurrence_residual": contexts.residual}
    if asked_to_stop and phase2.epochs_run < e.phase2_epochs:
        found["stopped"] = True
    rows = pd.DataFrame(shaped.phase1.history + phase2.history + recent)
    losses = {"val": phase2.val_losses} | {name: by_token for name, (by_token, _) in judged.items()}
    by_part = {name: (by_token.cpu().numpy(), getattr(streams, name)) for name, by_token in losses.items()}
    write_run(folder, found, rows, by_part, own_weights(network))
    return f"{folder.parent.name}/{folder.name}"


@large
def curve(history: pd.DataFrame, title: str = "") -> Figure:
    """Training and validation PPL by epoch, so far."""
    figure, ((axes,),) = new_figure(height=4)
    for part, metric, line in (("training", "train_ppl", ":"), ("validation", "val_ppl", "-")):
        values = metric_of(history, "phase2", metric)
        axes.plot(values.index, values, line, marker="o", label=part, color=COLOURS[0])
    best = metric_of(history, "phase2", "val_ppl").idxmin()
    axes.axvline(best, **REFERENCE)
    head = f"{wrapped(visible(title))}\nbest epoch {best}" if title else f"best epoch so far {best}"
    axes.set_title(head, loc="left", parse_math=False)
    steps_axis(axes, "epoch")
    log_axis(axes, "PPL (log)")
    legend_above(figure)
    return figure


class Training:
    """What this kernel trains, one at a time and in a thread, and where it is seen: in the workbench shown last."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.stopped = threading.Event()
        self.seen: tuple[Any, ...] = ()

    @property
    def goes_on(self) -> bool:
        return self.thread is not None

    def attach(self, start: Any, stop: Any, places: Sequence[Any]) -> None:
        """Be seen in `places`, with the two buttons, from now on; what was seen last is seen there at once."""
        self.start, self.stop, self.places = start, stop, places
        self._enable()
        if self.seen:
            self._show(*self.seen)

    def begin(self, preset: str, change: str, views: Sequence[Callable[..., Any]]) -> None:
        """Train a preset with a change; at the end the `views` show the preset, `a`, beside the new run, `b`."""
        if self.goes_on:
            return
        self.stopped.clear()
        self.thread = threading.Thread(target=self._work, args=(preset, change, views), daemon=True)
        self._enable()
        self._show(quiet("Reading the text, then Phase 1; the curve begins with the first epoch."))
        self.thread.start()

    def _work(self, preset: str, change: str, views: Sequence[Callable[..., Any]]) -> None:
        try:
            both = {"a": f"{GRID}/{preset}", "b": train(preset, change, self._follow)}
            said: set[str] = set()
            self._show(*(shown(view, both, said) for view in views))
        except (ConfigError, NonFiniteLoss, OSError) as error:
            self._show(HTML(f"<p>{quoted(str(error))}</p>"))
        except BaseException as error:  # of which a frontend shows nothing: what is seen would stand for ever
            self._show(quiet(repr(error)))
            raise
        finally:
            self.thread = None
            self._enable()

    def _follow(self, rows: list[dict]) -> bool:
        self._show(curve(pd.DataFrame(rows)))
        return self.stopped.is_set()

    def _show(self, *seen: Any) -> None:
        self.seen = seen
        for place, view in zip(self.places, chain(seen, repeat(HTML(""))), strict=False):
            place.update(view)

    def _enable(self) -> None:
        self.start.disabled, self.stop.disabled = self.goes_on, not self.goes_on or self.stopped.is_set()
        self.stop.description = "Stopping…" if self.goes_on and self.stopped.is_set() else "Stop"

    def end(self) -> None:
        """Stop after the epoch that goes on."""
        self.stopped.set()
        self._enable()


TRAINING = Training()


def title_of(run: str) -> str:
    """A finished run, whether it was stopped, and its test PPL."""
    known = metrics(run)
    return f"{run}{', stopped' * (known.get('stopped') is True)}, test PPL {known['test_ppl']:,.1f}"


def workbench(preset: list[str], change: str, run: str, views: Sequence[Callable[..., Any]]) -> None:
    """Controls that train a preset with a change, in a thread, with its curve live; at first a finished `run`'s curve.

    Stop ends the training after its epoch, and the best one is kept. A training that goes on is seen here from now on.

    Args:
        views: show, once it is trained, the preset beside the new run, as their `a` and `b`.
    """
    first = curve(history(run), title_of(run))
    if not has_widgets():
        display(first)
        return
    import ipywidgets

    controls = widget("preset", preset), widget("change", change)
    start, stop = ipywidgets.Button(description="Train"), ipywidgets.Button(description="Stop")
    show_widgets(beside([*controls, start, stop]))
    places = [display(view, display_id=True) for view in (first, *[HTML("")] * (len(views) - 1))]
    TRAINING.attach(start, stop, places)
    start.on_click(lambda _: TRAINING.begin(*(control.value for control in controls), views))
    stop.on_click(lambda _: TRAINING.end())


def commands(preset: str, change: str) -> HTML:
    """The papermill command that trains a preset with a change, and a grid that repeats both over replicates."""
    e, name = changed_experiment(preset, change)
    path = "params/base.yaml" if e.model == "context" else "params/baselines/base.yaml"
    base, own = Experiment.from_mapping(read_yaml(path)), load_grid(GRID).runs[preset]
    given = {key: value for key, value in e.for_notebook().items() if value != getattr(base, key)}
    folder = f"outputs/{BY_HAND}"  # the notebook makes its run's own folder there, beside that of section 2
    command = ["papermill", NOTEBOOKS[e.model], f"{folder}/{name}.ipynb", "--cwd", ".", "-k", "python3"]
    command += ["-f", path, "-y", yaml.safe_dump(given, default_flow_style=True, width=10**6).strip()]
    changed = {key: value for key, value in e.for_notebook().items() if value != getattr(own, key)}
    drawn = ["seed", "data_seed", "embedding_seed"]
    common = {
        key: value for key, value in own.for_notebook().items() if value != getattr(base, key) and key not in drawn
    }
    grid = {
        "title": f"{preset}, and with a change",
        "common": {key: value for key, value in common.items() if key not in ("experiment", *changed)},
        "experiments": {preset: {key: getattr(own, key) for key in changed}, "changed": changed},
        "sweep": {", ".join(drawn): [[42, 0, 1], [43, 20, 2], [44, 40, 3]]},
    }
    typed = f"source .venv/bin/activate\nmkdir -p {folder}\n{shlex.join(command)}"
    parts = [typed, yaml.safe_dump(grid, sort_keys=False)]
    look = "white-space:pre-wrap;overflow-wrap:anywhere;padding:.6em;border:1px solid #8888;border-radius:4px"
    return HTML("".join(f'<pre style="{look}">{escape(part)}</pre>' for part in parts))
