"""A notebook of a batch, executed by papermill in a process of its own; what is worth a line is printed.

    python -m ctxlm.batch NOTEBOOK EXECUTED --done FILE --values YAML

is what `Snakefile` runs for a corpus and for each run, here or on a cluster's node; `--check GRID` says what is wrong
with a grid before any work, and which of its results are to be made anew; and `--status GRID` how far it is.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ctxlm.config import DATA_PARAMETERS, NOTEBOOKS, ConfigError, Experiment, code_hash, load_grid
from ctxlm.files import ROOT, RUN_LOCK, atomic, outputs_dir, resolve

BATCH_LOCK = ".batch.lock"
"""Beside a notebook that is executed: held by the command that does it."""
FAILURE = "failure.txt"
"""Beside a notebook that failed: why, in a line."""
STEP = re.compile(r"(iteration|epoch) [\d.]+: |goes on after ")
"""Begins what a notebook prints of how far it is."""


def execute(notebook: str, executed: Path, done: Path, values: Mapping[str, Any], threads: int = 1) -> str:
    """Execute a notebook; returns why it failed in a line, which is also in `failure.txt`, or "".

    What another command does there is waited for, and a run that is finished is not done again.

    Args:
        executed: where it is kept with its outputs, and beside it, with the ending .log, all that it printed.
        done: the file that it writes last, in the same folder.
        values: its parameters.
        threads: how many it computes with.
    """
    folder, failure = done.parent, done.parent / FAILURE
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(FileLock(folder / BATCH_LOCK))
        with FileLock(folder / RUN_LOCK):  # waits for a kernel that outlives a killed papermill
            pass
        asked = {name: value for name, value in values.items() if name != "output_dir"}
        if done.name == "metrics.json" and is_finished(done, Experiment.from_mapping(asked)):
            return ""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CTXLM_BATCH": "1"}
        environment |= free_gpu(values, held)
        command = [sys.executable, *"-m papermill --cwd . -k python3 --no-progress-bar --log-output".split()]
        command += [notebook, str(executed), "-y", on_one_line(values)]
        failure.unlink(missing_ok=True)
        before, log = _changed(done), executed.with_suffix(".log")
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if _changed(done) not in (before, None):  # what papermill reports is not trusted, neither for good nor for ill
            return ""
        printed = log.read_text(encoding="utf-8", errors="replace").strip()
        reason = printed.splitlines()[-1].strip() if printed else f"papermill ended with {code} and printed nothing"
        if code < 0 or "Kernel died" in reason:
            reason += "; most likely for want of memory: run fewer side by side (JOBS=1), or give it more"
        if shutil.disk_usage(folder).free < 2**20:
            reason += "; the disk is full: make room there"
        with suppress(OSError), atomic(failure) as path:
            path.write_text(reason + "\n", encoding="utf-8")
        return reason


def run_apart(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """A run of a search, or one that is made again: its notebook executed on one thread; its metrics.

    Returns:
        what metrics.json holds, or nothing if the model does not learn.

    Raises:
        ConfigError: it failed for another reason.
    """
    done, values = folder / "metrics.json", experiment.for_notebook() | {"output_dir": str(folder)}
    notebook = NOTEBOOKS[experiment.model]
    reason = execute(notebook, folder / Path(notebook).name, done, values)
    if reason.startswith("NonFiniteLoss"):
        return {}
    if reason:
        raise ConfigError(f"{folder}: {reason}")
    return json.loads(done.read_bytes())


def is_finished(done: Path, run: Experiment) -> bool:
    """Whether a run's metrics.json is there, of these parameters, of today's code and of today's text."""
    metrics = json.loads(done.read_bytes()) if done.exists() else {}
    todays = run.is_that_of(metrics) and metrics.get("code_hash") == code_hash(run.model)
    return todays and metrics.get("data_hash") == data_of(run)


def data_of(run: Experiment) -> str:
    """A run's `data_hash`, made once for all that read one text through one embedding.

    Raises:
        ConfigError: as `data_hash`.
    """
    return _data_hash(run.corpus, run.judged_corpus, run.embedding)


@cache
def _data_hash(*read: str | None) -> str:
    from ctxlm.embeddings import data_hash  # not above: it takes a second, which every job would pay

    return data_hash(*read)


def visible_gpus() -> list[str]:
    """Indices of the GPUs that this machine lends us; none without a driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        listed = [index.strip() for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [] if "-1" in listed else [index for index in listed if index]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return answer.stdout.split() if answer.returncode == 0 else []


def free_gpu(values: Mapping[str, Any], held: ExitStack) -> dict[str, str]:
    """Make a free GPU the only one that a run of these parameters sees, if it wants one; its own until `held` ends.

    Where none is free, a run sees them all.
    """
    wanted = values.get("device", "cpu") in ("auto", "cuda") and values.get("model") != "kneser-ney"
    for gpu in visible_gpus() if wanted else []:
        with suppress(Timeout):
            held.enter_context(FileLock(outputs_dir() / f".gpu-{platform.node()}-{gpu}.lock").acquire(0))
            return {"CUDA_VISIBLE_DEVICES": gpu}
    return {}


def corpora(runs: Iterable[Experiment]) -> dict[str, Experiment]:
    """The corpora of a grid by folder, usually one: runs that read the same tokens by the same embedding share it.

    Returns:
        the folder's name → a run that reads it, of the largest size.
    """
    by_size = sorted(runs, key=lambda run: run.train_tokens)
    kinds = list({str(run.model_dump(include=DATA_PARAMETERS)): run for run in by_size}.values())
    return {"corpus" if len(kinds) == 1 else f"corpus-{k}": run for k, run in enumerate(kinds, 1)}


def home_of(grid: str) -> str:
    """A grid's folder as Snakemake and `output_dir` name it: below the root, unless CTXLM_OUTPUTS is absolute."""
    return f"{os.path.expanduser(os.environ.get('CTXLM_OUTPUTS') or 'outputs')}/{grid}"


def check(grid: str) -> list[str]:
    """See that a grid can be run: its file, its devices, its text, its embeddings.

    Returns:
        results in its folder that are of other parameters, code or text. `make report` has Snakemake make them anew,
        which after a failure, or without its own folder, does not know what a result was made with.

    Raises:
        ConfigError: what is wrong, in a sentence.
    """
    from ctxlm.corpus import check_data
    from ctxlm.device import resolve_device
    from ctxlm.embeddings import load_embedding

    plan = load_grid(grid)
    runs = plan.runs.values()
    home = outputs_dir()
    if home.exists() and not os.access(home, os.W_OK):
        raise ConfigError(f"CTXLM_OUTPUTS = {str(home)!r} cannot be written to: name another folder")
    for run in runs:
        resolve_device(run)
    check_data(runs)
    for run in {(run.embedding, run.embed_dim): run for run in runs if run.model != "kneser-ney"}.values():
        if run.embedding not in ("ppmi", "ppmi-train", "random"):  # those that may be missing
            load_embedding(run)
    results = {f"{home_of(plan.name)}/{name}/metrics.json": run for name, run in plan.runs.items()}
    return [path for path, run in results.items() if resolve(path).exists() and not is_finished(resolve(path), run)]


def on_one_line(values: Mapping[str, Any]) -> str:
    """Parameters for papermill's -y (not JSON: YAML reads its 1e-05 as text)."""
    return yaml.safe_dump(dict(values), default_flow_style=True, width=10**6).strip()


def print_line(line: str) -> None:
    """Print a line, if there is still somebody to read it: whoever started this may have been killed."""
    with suppress(OSError):  # a closed pipe, a terminal that is gone, a log on a full disk
        print(f"{line}\n", end="", flush=True)  # one piece: others write there, too


def status(grid: str) -> list[str]:
    """A grid's runs in `outputs`, a line each: what came of it, or how far it is; and a line on top for all.

    Raises:
        ConfigError: there is no such grid.
    """
    plan = load_grid(grid)
    home, width = outputs_dir() / plan.name, max(map(len, plan.runs))
    states = {name: state(home / name, run) for name, run in sorted(plan.runs.items())}
    counted = Counter(word for word, _ in states.values()).most_common()
    head = f"Grid {plan.name}: {len(plan.runs)} runs, " + ", ".join(f"{count} {word}" for word, count in counted)
    return [head, *(f"{name:{width}}  {word:8}  {rest}".rstrip() for name, (word, rest) in states.items())]


def state(folder: Path, run: Experiment) -> tuple[str, str]:
    """What has become of a run, in a word; and what else there is to say."""
    done = folder / "metrics.json"
    for lock in (BATCH_LOCK, RUN_LOCK):  # the latter is of its kernel, or of a run by hand
        try:
            if (folder / lock).exists():
                with FileLock(folder / lock, timeout=0):
                    pass
        except Timeout:
            return "running", _last_step(folder)
    if is_finished(done, run):
        return "finished", _result(done)
    if (folder / FAILURE).exists():
        return "failed", (folder / FAILURE).read_text(encoding="utf-8").strip()
    if done.exists():
        return "to come", "of other parameters, code or text"
    begun = (folder / "experiment.log").exists()  # not by the folder alone: a cluster's queued job has one
    return ("stopped", _last_step(folder)) if begun else ("to come", "")


def _last_step(folder: Path) -> str:
    """The last iteration or epoch in the log of a run."""
    log = folder / "experiment.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if STEP.match(line)), "")


def _changed(path: Path) -> int | None:
    """When a file was written, nanoseconds; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _result(done: Path) -> str:
    """What came of a run, in a few words."""
    metrics = json.loads(done.read_text(encoding="utf-8"))
    if "test_ppl" not in metrics:
        return "done"
    return f"test PPL {metrics['test_ppl']:,.1f} by {metrics['train_tokens']:,} tokens"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="?", help="as notebooks/02_experiment.ipynb")
    parser.add_argument("executed", nargs="?", type=Path, help="where it is kept with its outputs")
    parser.add_argument("--done", type=Path, help="the file that it writes last, beside it")
    parser.add_argument("--values", help="its parameters, as YAML")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", metavar="GRID", help="say what is wrong with a grid instead")
    parser.add_argument("--status", metavar="GRID", help="print how far a grid is instead")
    given = parser.parse_args(arguments)
    try:
        if given.check is not None:
            print(shlex.join(check(given.check)))
        elif given.status is not None:
            print("\n".join(status(given.status)))
        elif given.notebook is None:
            parser.error("name a notebook, or --check or --status a grid")
        else:
            return _carry_out(given)
    except (ConfigError, OSError) as error:
        print(f"{given.done.parent.name}: {error}" if given.done else error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _carry_out(given: argparse.Namespace) -> int:
    """Execute a notebook; each line that is printed begins with its folder's name."""
    done, began = resolve(given.done), time.monotonic()
    folder = done.parent
    print_line(f"{folder.name}: begins")
    reason = execute(given.notebook, resolve(given.executed), done, yaml.safe_load(given.values), given.threads)
    if reason:
        print_line(f"{folder.name}: failed: {reason}")
        return 1
    line = f"{folder.name}: {_result(done)}, {time.monotonic() - began:.0f} s"
    with suppress(Exception):  # no grid (Snakefile names it), or one that is edited: this run is finished all the same
        runs = load_grid(os.environ["CTXLM_GRID"]).runs
        left = sum(not is_finished(folder.parent / name / "metrics.json", run) for name, run in runs.items())
        line += f", {left} of {len(runs)} runs left"
    print_line(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
