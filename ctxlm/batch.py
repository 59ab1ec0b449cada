"""A notebook of a batch: executed by papermill in a process of its own, waited for, tried again, and told of in a line.

    python -m ctxlm.batch NOTEBOOK EXECUTED --done FILE --values YAML [--name NAME]

is what `Snakefile` runs for the corpus, each run and the analysis, here or on a cluster's node, and

    python -m ctxlm.batch --status GRID

prints how far a grid is.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ctxlm.config import ConfigError, Experiment, load_grid
from ctxlm.files import CHECKPOINTS, ROOT, RUN_LOCK, InUse, atomic, parse_json, resolve, take

LOCK = ".batch.lock"
"""Beside a notebook that is executed: whose task that is. A run's kernel has another, `RUN_LOCK`."""
GRID_LOCK = ".grid.lock"
"""In a grid's folder: whose the grid is while it is run (`Snakefile`)."""
FAILURE = "failure.txt"
"""Beside a notebook that failed: why, in a line."""
TRANSIENT = ("Kernel died", "Kernel didn't respond", "Address already in use", "ZMQError")
"""In the last line of what may succeed when it is done again."""
ROOM = 2**20
"""Bytes that must be free on a disk that is not called full."""
STEP = re.compile(r"(iteration|epoch) \d+: |goes on after ")
"""Begins what a notebook says of how far it is."""


def execute(
    notebook: str,
    executed: Path,
    done: Path,
    values: Mapping[str, Any],
    name: str = "",
    gpus: Sequence[str] = (),
    threads: int = 1,
) -> str:
    """Execute a notebook; returns why it failed in a line, or "".

    What another process does there is waited for, and if it succeeds, not done again. A kernel that dies is given a
    second chance. Why it failed is also in `failure.txt`.

    Args:
        executed: where it is kept with its outputs, and beside it, with the ending .log, all that it said.
        done: the file that it writes last, in the same folder.
        values: its parameters.
        name: what begins each line that is said.
        gpus: the first of them that is free is the only one that the notebook sees, until it ends.
        threads: how many it computes with.
    """
    folder, log, failure = done.parent, executed.with_suffix(".log"), done.parent / FAILURE
    folder.mkdir(parents=True, exist_ok=True)
    before = _changed(done)
    if _waited(folder, name) and _changed(done) != before:
        say(f"{name}: was finished there")
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return ""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CTXLM_PROGRESS": "lines"} | _gpu(folder, gpus)
    command = [sys.executable, "-m", "papermill", "--cwd", ".", "-k", "python3", "--no-progress-bar", "--log-output"]
    command += [notebook, str(executed), "-y", on_one_line(values)]
    failure.unlink(missing_ok=True)
    for attempt in (1, 2):
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if _changed(done) != before:  # papermill's own word is not trusted, neither for good nor for ill
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            if _made_with_its_code(done):
                return ""
            why = "the code was changed while the grid was run: give the same command again"
            break
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"papermill ended with {code} and said nothing"
        if code < 0:
            why = f"papermill was killed (signal {-code}) after: {why}"
        elif not any(words in why for words in TRANSIENT):
            break
        if attempt == 1:
            say(f"{name}: {why}; once more")
        elif code < 0 or "Kernel died" in why:
            why = f"{why}; twice, most likely for want of memory: run fewer side by side (JOBS=1)"
    why += _without_room(folder)
    with suppress(OSError), atomic(failure) as path:
        path.write_text(why + "\n", encoding="utf-8")
    return why


def _made_with_its_code(done: Path) -> bool:
    """Whether a run was made with the code that there was when its grid's command began (`Snakefile` keeps that)."""
    codes = json.loads(os.environ.get("CTXLM_CODE") or "{}")
    if not codes or done.name != "metrics.json":
        return True
    metrics = parse_json(done.read_bytes())
    return metrics["code_hash"] == codes[metrics["model"]]


def on_one_line(values: Mapping[str, Any]) -> str:
    """Parameters for papermill's -y (not JSON: YAML reads its 1e-05 as text)."""
    return yaml.safe_dump(dict(values), default_flow_style=True, width=10**6).strip()


def say(line: str) -> None:
    """Print a line, if there is still somebody to read it: whoever started this may have been killed."""
    with suppress(OSError):  # a closed pipe, a terminal that is gone, a log on a full disk
        print(f"{line}\n", end="", flush=True)  # one piece: others write there, too


def is_executed(notebook: Path) -> bool:
    """Whether a notebook can be read and was run to its end: whoever executed it may have been killed meanwhile."""
    try:
        cells = [cell for cell in parse_json(notebook.read_bytes())["cells"] if cell["cell_type"] == "code"]
        return all(cell["execution_count"] or not "".join(cell["source"]).strip() for cell in cells)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def failures(home: Path, runs: Iterable[str]) -> dict[str, str]:
    """Why runs failed, or have no result in a grid's folder for another reason: name → a line."""
    found = {}
    for name in runs:
        failure = home / name / FAILURE
        if failure.exists():
            found[name] = failure.read_text(encoding="utf-8", errors="replace").strip()
        elif not (home / name / "metrics.json").exists():
            found[name] = "was stopped" if (home / name).is_dir() else "was not begun"
            found[name] += _without_room(home)
    return found


def _without_room(folder: Path) -> str:
    """What to do where a disk is full, on which whoever fails cannot say so; "" where it is not."""
    try:
        return "; the disk is full: make room there" if shutil.disk_usage(folder).free < ROOM else ""
    except OSError:
        return ""


def status(grid: str) -> list[str]:
    """A grid's runs, a line each: what came of it, or how far it is; and a line on top for all.

    Raises:
        ConfigError: there is no such grid.
    """
    from ctxlm.results import outputs_dir, run_folders  # not above: it takes seconds, which every run would pay

    plan = load_grid(grid)
    home, runs = outputs_dir() / plan.name, plan.runs
    failed, known = failures(home, runs), run_folders(plan.name)
    states, lines, width = Counter(), [], max(map(len, runs))
    for name in sorted(runs):
        folder = home / name
        if _is_taken(folder / LOCK) or _is_taken(folder / RUN_LOCK):
            state, rest = "running", _last_step(folder)
        elif (folder / FAILURE).exists():
            state, rest = "failed", failed[name]
        elif name in known and _is_planned(known[name][0] / "metrics.json", runs[name]):
            state, rest = "finished", f"{_result(known[name][0] / 'metrics.json')}, {known[name][1]}"
        elif name in known:
            state, rest = "to come", "what is there is of other parameters"
        else:
            state, rest = ("stopped", _last_step(folder)) if folder.is_dir() else ("to come", "")
        states[state] += 1
        lines.append(f"{name:{width}}  {state:8}  {rest}".rstrip())
    counted = ", ".join(f"{count} {state}" for state, count in states.most_common())
    alone = states["finished"] < len(runs) and not _is_taken(home / GRID_LOCK)
    return [f"Grid {plan.name}: {len(runs)} runs, {counted}{'; nobody is at it' if alone else ''}", *lines]


def _is_planned(metrics: Path, wanted: Experiment) -> bool:
    """Whether a finished run has the parameters that its grid's file gives it today."""
    with suppress(OSError, ValueError, AttributeError):
        return wanted.is_that_of(parse_json(metrics.read_bytes()))
    return False


def _is_taken(path: Path) -> bool:
    """Whether a process has the lock `path`."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(0)
    except Timeout:
        return True
    lock.release()
    return False


def _last_step(folder: Path) -> str:
    """The last iteration or epoch in the log of a run."""
    with suppress(OSError):
        lines = (folder / "experiment.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if STEP.match(line)), "")
    return ""


def _changed(path: Path) -> int | None:
    """When a file was written, nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _waited(folder: Path, name: str) -> bool:
    """Take this task; whether another process had it and was waited for."""
    waited = False
    try:
        take(folder / LOCK)
    except InUse as other:
        say(f"{name}: waits for {other}")
        take(folder / LOCK, -1)
        waited = True
    kernel = FileLock(folder / RUN_LOCK)  # which outlives a killed papermill by a moment, or a batch by long
    try:
        kernel.acquire(0)
    except Timeout:
        if not waited:
            say(f"{name}: waits for a kernel that is still at it")
        kernel.acquire(-1)
        waited = True
    kernel.release()
    return waited


def _gpu(folder: Path, gpus: Sequence[str]) -> dict[str, str]:
    """What makes a free GPU the only one that is seen, and this process's until it ends."""
    for gpu in gpus:
        with suppress(InUse):
            take(folder.parent.parent / f".gpu-{gpu}.lock")
            return {"CUDA_VISIBLE_DEVICES": gpu}
    return {}


def _result(done: Path) -> str:
    """What came of a run, in a few words."""
    with suppress(OSError, ValueError, LookupError):
        known = json.loads(done.read_text(encoding="utf-8"))
        return f"test PPL {math.exp(known['test_loss']):,.1f} by {known['train_tokens']:,} tokens"
    return "done"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="?", help="as notebooks/02_experiment.ipynb")
    parser.add_argument("executed", nargs="?", type=Path, help="where it is kept with its outputs")
    parser.add_argument("--done", type=Path, help="the file that it writes last, beside it")
    parser.add_argument("--values", help="its parameters, as YAML")
    parser.add_argument("--name", default="", help="what begins each line that is said")
    parser.add_argument("--gpus", nargs="*", default=[], help="indices, of which it takes one that is free")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--planned", type=int, default=0, help="runs of the grid, to say how many are left")
    parser.add_argument("--status", metavar="GRID", help="print how far a grid is instead")
    given = parser.parse_args(arguments)
    try:
        if given.status:
            print("\n".join(status(given.status)))
            return 0
        return _carry_out(given)
    except (ConfigError, OSError) as error:
        with suppress(OSError):
            print(f"{given.name}: {error}" if given.name else error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _carry_out(given: argparse.Namespace) -> int:
    done, began = resolve(given.done), time.monotonic()
    say(f"{given.name}: begins")
    values = yaml.safe_load(given.values)
    if why := execute(given.notebook, resolve(given.executed), done, values, given.name, given.gpus, given.threads):
        say(f"{given.name}: failed: {why}")
        return 1
    left = given.planned - len([*done.parent.parent.glob("*/metrics.json")])
    rest = f", {left} of {given.planned} runs left" if given.planned else ""
    say(f"{given.name}: {_result(done)}, {time.monotonic() - began:.0f} s{rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
