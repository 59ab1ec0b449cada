"""One run, from settings to a written folder: `run`. Notebooks 02 and 03 spell out its steps.

    from ctxlm.run import run
    run(Experiment(train_tokens=10_000), "outputs/mine/A")["test_ppl"]

A run is a folder `outputs/<grid>/<run>/`. Its `metrics.json` is written last and is the only mark of a finished run.
"""

import itertools
import json
import math
import os
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ctxlm import networks, ngrams
from ctxlm.config import NOTEBOOKS, ConfigError, Experiment, code_hash, read_yaml
from ctxlm.corpus import PROTOCOL, Split, split
from ctxlm.device import has_bfloat16, resolve_device, resolve_dtype, tokens_on
from ctxlm.embeddings import data_hash, load_embedding
from ctxlm.files import BY_HAND, ROOT, RUN_LOCK, atomic, digest, outputs_dir, release, resolve, take
from ctxlm.memory import forgetting, reach, recent_tokens
from ctxlm.metrics import (
    NonFiniteLoss,
    bits_per_byte,
    effective_rank_pct,
    loss_summary,
    losses_by_repeat,
    losses_by_sample,
    singular_values,
)
from ctxlm.model import ContextLM, trained_weights
from ctxlm.phase1 import shape_contexts
from ctxlm.phase2 import Phase2, Predictor, evaluate
from ctxlm.recurrence import Ablation, chunked
from ctxlm.trainer import OnEpoch, Trainer

WEIGHTS, LOSSES = "model.safetensors", "val_losses.npz"
"""A run's files of its weights, and of every validation token's loss."""
CHECKPOINT = "checkpoint.pt"
"""In a run's folder while it is made: its state after the last epoch."""
REPLICATED = {
    *("experiment", "train_tokens", "seed", "data_seed", "embedding_seed"),
    *("val_samples", "development_samples", "test_samples", "max_sample_tokens"),
}
"""Parameters that an experiment's label leaves out: size, replicate, and how much is judged."""


def run(settings: Experiment, output_dir: str | Path | None = None, on_epoch: OnEpoch | None = None) -> pd.Series:
    """Carry out a run and write its folder.

    Args:
        settings: what is run.
        output_dir: its folder; by default one in `outputs/interactive`, as `folder_by_hand` names it.
        on_epoch: is given the history after every validation, as in `Trainer.run`.

    Returns:
        What metrics.json holds (docs/results.md).

    Raises:
        ConfigError: the settings cannot be run here, or the folder is another's.
        NonFiniteLoss: a loss is no longer finite.
        OSError: the disk is full or not writable.
    """
    this = Run(settings, output_dir)
    try:
        return (_context if this.settings.model == "context" else _baseline)(this, on_epoch)
    finally:
        release(this.folder / RUN_LOCK)


class Run:
    """A run while it is made: what it asks for, the machine, where it goes, and how long its steps take."""

    def __init__(self, settings: Experiment, output_dir: str | Path | None = None):
        """Take the folder, before any work.

        Raises:
            ConfigError: as `run`.
        """
        settings, folder = (settings, resolve(output_dir)) if output_dir else folder_by_hand(settings)
        self.settings, self.device = settings, resolve_device(settings)
        self.dtype = resolve_dtype(settings, self.device)
        self.provenance = self._provenance()  # now: sources may change while it runs
        self.folder = take_folder(folder)
        # a batch does a run anew whose parameters its grid has changed
        if "CTXLM_BATCH" not in os.environ and _holds_another(folder, settings):
            release(folder / RUN_LOCK)
            raise ConfigError(f"output_dir = {str(output_dir)!r} holds a run of other parameters: name another folder")
        self.began, self.seconds = time.perf_counter(), defaultdict(float)

    def __repr__(self) -> str:
        return f"to {os.path.relpath(self.folder)}, on {self.device}, matrix products in {self.dtype}"

    @contextmanager
    def watch(self, step: str) -> Iterator[None]:
        """Add what the block takes, by the clock, to the step's seconds."""
        began = time.perf_counter()
        yield
        self.seconds[f"{step}_seconds"] += time.perf_counter() - began

    def _provenance(self) -> dict[str, Any]:
        """Every resolved parameter, and the code, versions and machine that the run is made with."""
        machine = {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        resolved = self.settings.model_copy(update=machine)
        card = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        packages = ("numpy", "scipy", "tokenizers", "pandas", "pydantic", "safetensors")
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
        # torch reports which build it is; the package's metadata may leave "+cu132" out
        versions["torch"] = str(torch.__version__)
        return resolved.model_dump() | {
            "protocol": PROTOCOL,
            "code_hash": code_hash(resolved.model),
            "data_hash": data_hash(resolved.corpus, resolved.judged_corpus, resolved.embedding),
            "git_commit": git_commit(),
            "versions": versions,
            "device_name": card,
            "threads": torch.get_num_threads(),
        }

    @property
    def checkpoint(self) -> dict[str, Any]:
        """Arguments of `Trainer.run`: the file, and what its content depends on."""
        names = Experiment.model_fields.keys() - {"device"} | {"protocol", "code_hash", "data_hash", "device_name"}
        known = {name: self.provenance[name] for name in sorted(names)}
        key = digest(json.dumps(known), self.provenance["versions"]["torch"])
        return {"checkpoint": self.folder / CHECKPOINT, "key": key}

    def write(
        self,
        streams: Split,
        judged: Mapping[str, tuple[Tensor | np.ndarray, float]],
        columns: Mapping[str, Any],
        history: list[dict],
        weights: Mapping[str, Tensor],
    ) -> pd.Series:
        """Write the finished run; every file is complete on disk before the first earlier one is replaced.

        Args:
            streams: what was read and judged.
            judged: part (val, development, test) → every predicted token's loss, nats, float32 [T - 1], and accuracy.
            columns: of metrics.json, beside those that follow from the rest.
            history: rows phase, step, metric, value.
            weights: what model.safetensors holds.

        Raises:
            NonFiniteLoss: a metric is not finite (JSON has no such numbers).
            OSError: the disk is full or not writable; if it is so before all is written, an earlier run is untouched.
        """
        losses = {part: torch.as_tensor(by_token).cpu().numpy() for part, (by_token, _) in judged.items()}
        tables = {part: losses_by_sample(values, getattr(streams, part)) for part, values in losses.items()}
        metrics = self.provenance | dict(columns)
        for part, table in tables.items():
            metrics[f"{part}_tokens"] = len(getattr(streams, part))
            metrics |= loss_summary(part, torch.from_numpy(losses[part]), judged[part][1])
            metrics |= {f"{part}_bytes": int(table["bytes"].sum()), f"{part}_bits_per_byte": bits_per_byte(table)}
        if metrics.get("trained_params"):
            metrics["tokens_per_parameter"] = len(streams.train) / metrics["trained_params"]
        metrics |= self.seconds | {"total_seconds": time.perf_counter() - self.began}
        if bad := [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise NonFiniteLoss(f"{bad[0]} = {metrics[bad[0]]} is not finite, so nothing is written: lower a rate")
        history = history + losses_by_repeat(losses["val"], streams.val, streams.train)
        rows = pd.DataFrame(history, columns=["phase", "step", "metric", "value"])
        samples, val = pd.concat(tables, names=["part"]).reset_index(level=0), streams.val.samples[1:]
        writers = {
            "history.csv": lambda path: rows.to_csv(path, index=False),
            "samples.csv": lambda path: samples.to_csv(path, index=False),
            LOSSES: lambda path: np.savez_compressed(path, loss=losses["val"], sample=val),
            WEIGHTS: lambda path: save_file({name: w.contiguous() for name, w in weights.items()}, path),
        }
        try:
            with ExitStack() as replaced_on_exit:  # in reverse order: metrics.json last
                mark = replaced_on_exit.enter_context(atomic(self.folder / "metrics.json"))
                paths = {name: replaced_on_exit.enter_context(atomic(self.folder / name)) for name in writers}
                for name, write in writers.items():
                    write(paths[name])
                mark.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
                # Several files cannot be replaced at once: whoever is stopped in between leaves no finished run.
                (self.folder / "metrics.json").unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.folder} cannot be written to ({getattr(error, 'strerror', None) or error}): make room there, "
                "or make it writable, and run it again"
            ) from None
        for left in self.folder.glob("*checkpoint*.pt"):  # and what a killed process half wrote
            left.unlink(missing_ok=True)
        release(self.folder / RUN_LOCK)
        return pd.Series(metrics)


def _context(this: Run, on_epoch: OnEpoch | None) -> pd.Series:
    """The two-phase model."""
    e, dtype, watch = this.settings, this.dtype, this.watch
    with watch("data"):
        streams, vectors = split(e), load_embedding(e)
        train, val, development, test = tokens_on(this.device, streams)
    model = ContextLM(e, torch.from_numpy(vectors)).to(this.device)
    with watch("memory"):
        before = forgetting(model.context_block, chunked(model, val), "forgetting_init")
    with watch("phase1"):
        shaped = shape_contexts(model, train, e, dtype)
    # the inner layers' contexts too, where Phase 2 reads them as they are
    keep = None if e.context_ablation != "none" or e.phase2_context_window else dtype
    with watch("phase2"):
        train_contexts, val_contexts = (chunked(model, x, keep) for x in (train, val))
        ablation = Ablation(model, train_contexts, e)
        read = ablation(train_contexts), ablation(val_contexts)
        phase2 = Trainer(Phase2(model, *read, e, dtype), e).run(on_epoch, **this.checkpoint)
        if e.phase2_context_window:  # the ContextBlock has moved on
            train_contexts, val_contexts = (chunked(model, x) for x in (train, val))
    spectra = shaped.spectra | {
        "train_er_noiseless": singular_values(train_contexts.values),
        "val_er": singular_values(val_contexts.values),
    }
    predict = Predictor(model, dtype)
    judged = {"val": (phase2.val_losses, phase2.val_accuracy)}
    with watch("test"):
        for part, tokens in (("development", development), ("test", test)):
            judged[part] = evaluate(predict, ablation(chunked(model, tokens, keep)))
    with watch("memory"):
        rates, after = reach(model.context_block, val_contexts)
        whole = e.context_ablation == "none" and not e.context_rank
        recent = recent_tokens(model, predict.from_layers, val_contexts) if whole else []
    columns = (
        {"embedding_digest": digest(vectors.tobytes())}
        | model.parameter_counts()
        | model.cost(len(train), shaped.iterations, phase2.epochs_run)
        | {f"{name}_pct": effective_rank_pct(values) for name, values in spectra.items()}
        | shaped.summary()
        | phase2.summary()
        | rates
        | {"recurrence_residual": train_contexts.residual, "recurrence_warmup": train_contexts.warmup}
    )
    history = shaped.history + phase2.history + recent + before + after
    return this.write(streams, judged, columns, history, trained_weights(model))


def _baseline(this: Run, on_epoch: OnEpoch | None) -> pd.Series:
    """What a user would otherwise pick."""
    e, watch = this.settings, this.watch
    with watch("data"):
        streams = split(e)
    with watch("training"):
        if e.model == "kneser-ney":
            baseline = ngrams.build(e, streams)
        else:
            baseline = networks.build(e, streams, on_epoch=on_epoch, **this.checkpoint)
    with watch("test"):
        judged = {part: baseline.judge(getattr(streams, part).tokens) for part in ("val", "development", "test")}
    return this.write(streams, judged, baseline.columns, baseline.history, baseline.weights)


def processor() -> str:
    """The processor's name, where the system says it, and its instructions: others round and add up otherwise."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    bfloat16 = ", bfloat16" if has_bfloat16(torch.device("cpu")) else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{bfloat16}"


def git_commit() -> str | None:
    """The commit checked out, with "-dirty" where what may move a number differs from it; None outside a repository."""

    def git(*arguments: str, check: bool = True) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=check).stdout.strip()

    try:
        # in a fresh clone `diff` would strip all notebooks each time, ten seconds or more: so git looks at them once
        git("update-index", "-q", "--refresh", check=False)
        # a notebook that was run is listed by `git status`, which looks at its size alone; `diff` strips it first
        written = ("data/results", "data/search", "docs", "*.md")
        changed = git("diff", "--name-only", "HEAD", "--", ".", *(f":!{path}" for path in written))
        changed += git("ls-files", "--others", "--exclude-standard", "--", "ctxlm", "params")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def take_folder(folder: Path) -> Path:
    """Make a run's folder, see that it can be written to, and take it till it is written or this process ends.

    Raises:
        ConfigError: nothing can be written there, or another process is at it.
    """
    try:
        taken = take(folder / RUN_LOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"output_dir = {str(folder)!r} cannot be written to ({reason}): name another") from None
    if not taken:
        raise ConfigError(
            f"output_dir = {str(folder)!r} is in use by another process: wait for that run to end, shut down the "
            "notebook that has it, or name another folder"
        )
    return folder


def folder_by_hand(settings: Experiment) -> tuple[Experiment, Path]:
    """The folder in `outputs/interactive` of a run that names none, and its settings under the label that fits.

    It is named after what differs from the defaults of the notebook that runs it, as a grid's runs are after what is
    swept; and so is the experiment, sizes and replicates apart, unless it has a label of its own. The same parameters
    have the same folder. Beside one that holds a run of others the new run goes into `<name>-2`.
    """
    usual = Experiment.from_mapping(read_yaml(f"params/notebooks/{Path(NOTEBOOKS[settings.model]).stem}.yaml"))
    values = {name: value for name, value in settings.model_dump().items() if value != getattr(usual, name)}
    if "experiment" not in settings.model_fields_set:  # its default is the context model's
        values.pop("experiment", None)
    name = name_of(values, 120) or usual.experiment
    if "experiment" not in values:
        label = name_of({key: value for key, value in values.items() if key not in REPLICATED}, 60)
        settings = settings.model_copy(update={"experiment": label or usual.experiment})
    beside = (f"{name}-{count}" if count > 1 else name for count in itertools.count(1))
    folders = (outputs_dir() / BY_HAND / each for each in beside)
    return settings, next(folder for folder in folders if not _holds_another(folder, settings))


def name_of(values: dict[str, Any], longest: int) -> str:
    """Parameters as a run's name has them, the label and the model first; a digest ends one that is cut off."""
    first = [str(values[name]) for name in ("experiment", "model") if name in values]
    rest = [f"{name}-{value}" for name, value in values.items() if name not in ("experiment", "model")]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(first + rest))
    return name if len(name) <= longest else f"{name[: longest - 9]}-{digest(name)[:8]}"


def _holds_another(folder: Path, settings: Experiment) -> bool:
    """Whether a folder holds a finished run of other parameters."""
    path = folder / "metrics.json"
    return path.exists() and not settings.is_that_of(json.loads(path.read_bytes()))
