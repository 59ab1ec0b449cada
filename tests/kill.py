"""Kill a small grid at random moments, start it again by the same command, and compare it with an undisturbed one.

    python -m tests.kill FOLDER [--kills 200] [--seed 0] [--minutes 0]

Killed (-9) is each time the whole tree of processes, the command's group (kernels are in groups of their own), the
command alone, or only a kernel, a papermill, or what called it. Once a grid is finished its runs' numbers, weights and
estimates are compared with those of an undisturbed one, all is deleted, and it begins anew. A line a kill is printed,
and a row kept in FOLDER/kills.csv; it ends with 1 if anything was unlike, or could not go on.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import yaml
from safetensors.numpy import load_file

from ctxlm.files import ROOT, digest
from tests.conftest import short_paragraphs

VICTIMS = {"tree": 4, "group": 3, "head": 2, "ipykernel_launcher": 3, "papermill": 1, "ctxlm.batch": 1}
"""Who is killed, and how often among all."""
TRAINED = {"phase2_epochs": 20, "phase2_patience": 20, "phase2_batch_size": 4}
EXPERIMENTS = {
    "A": {"num_layers": 4, "context_dim": 16, "train_tokens": 2000} | TRAINED,
    "B": {"num_layers": 2, "context_dim": 32, "train_tokens": 2000} | TRAINED,
    "KN-3": {"model": "kneser-ney", "ngram_order": 3, "train_tokens": 1000},
}
COMMON = {
    "embedding": "random",
    "embed_dim": 16,
    "val_samples": 5,
    "development_samples": 5,
    "test_samples": 5,
    "dtype": "float32",
}
COMMON |= {"device": "cpu"}
FREE = re.compile(r"seconds|resumed_after_epoch|phase1_cached|git_commit|^files$")
"""What may differ between two runs: what they took, and what follows from that."""
LONGEST = 40.0
"""Seconds till a kill, at most: what a run takes, or more."""


class Grid:
    """A small grid in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder.resolve(), folder.resolve() / "killed.yaml"
        self.home = self.folder / "outputs" / "killed"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = short_paragraphs(self.folder / "text.txt", count=140, length=60, power=2)
        grid = {"title": "Killed", "common": COMMON | {"corpus": str(text)}, "experiments": EXPERIMENTS}
        self.file.write_text(yaml.safe_dump(grid), encoding="utf-8")

    def start(self) -> subprocess.Popen:
        """The command, the same each time, in a group of its own; what it says goes to `said.txt`."""
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", f"grid={self.file}"]
        own = {f"CTXLM_{name}": str(self.folder / name.lower()) for name in ("OUTPUTS", "CACHE", "RESULTS")}
        own |= {"OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
        with (self.folder / "said.txt").open("a") as said:
            said.write("--- the command\n")
            said.flush()
            options = {"stdout": said, "stderr": subprocess.STDOUT, "process_group": 0}
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, **options)

    def clear(self) -> None:
        for name in ("outputs", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def said(self) -> list[str]:
        return (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace").splitlines()

    def numbers(self) -> dict[str, str]:
        """All that an undisturbed grid and a killed one must have in common, by name."""
        found = {}
        for run in EXPERIMENTS:
            folder = self.home / run
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            found |= {f"{run}/{name}": json.dumps(value) for name, value in metrics.items() if not FREE.search(name)}
            rows = (folder / "history.csv").read_text(encoding="utf-8").splitlines()
            found[f"{run}/history"] = digest(*(row for row in rows if ",seconds," not in row))
            for part in ("val", "test"):
                found[f"{run}/{part}"] = digest((folder / f"{part}_by_sample.csv").read_bytes())
            for file, arrays in (("weights", load_file(folder / "model.safetensors")), ("losses", None)):
                if arrays is None:
                    with np.load(folder / "val_losses.npz") as losses:
                        arrays = dict(losses)
                found |= {f"{run}/{file}/{name}": digest(array.tobytes()) for name, array in arrays.items()}
        found["estimates"] = digest((self.home / "estimates.csv").read_bytes())
        found["corpus"] = digest((self.home / "corpus" / "corpus.json").read_bytes())
        found["report"] = str((self.home / "report" / "index.html").exists())
        return found

    def left(self) -> list[str]:
        """Files in a finished grid that nobody has any use for."""
        beside = [
            path
            for path in self.home.rglob(".*")
            if path.is_file() and not path.name.startswith((".grid", ".b", ".lock"))
        ]
        beside += [path for path in (self.folder / "cache").rglob("*") if path.name.startswith(".") or path.is_dir()]
        return [str(path.relative_to(self.folder)) for path in beside]


class Logs:
    """How far each run was, from its log, and what it did twice."""

    def __init__(self, home: Path):
        self.home, self.texts, self.reached, self.resumed = home, {}, {}, 0
        self.before = {}
        """How far a run was when its present attempt began; what was compared with it is gone."""

    def read(self) -> int:
        """Look at all logs; the most epochs, or iterations of Phase 1, that a run was found to have begun anew."""
        most = 0
        for path in self.home.glob("*/experiment.log"):
            run, text = path.parent.name, path.read_text(encoding="utf-8", errors="replace")
            if not text.startswith(self.texts.get(run, "")):  # another attempt
                self.before |= {key: steps for key, steps in self.reached.items() if key[0] == run}
            self.texts[run] = text
            for kind, first in (("iteration", 2), ("epoch", 1)):
                steps = [int(step) for step in re.findall(rf"^{kind} (\d+): ", text, re.MULTILINE)]
                again = re.search(rf"goes on after {kind} (\d+)", text)
                if again or steps:
                    self.resumed += bool(again) and (run, kind) in self.before
                    begun = int(again[1]) + 1 if again else first
                    most = max(most, self.before.pop((run, kind), 0) + 1 - begun)
                self.reached[run, kind] = max([self.reached.get((run, kind), 0), *steps])
        return most


def tree(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def calls(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill(command: subprocess.Popen, victim: str, draws: random.Random) -> str:
    """Kill some of a command's processes; who was killed, or "" where there is none of that kind."""
    everyone = tree(psutil.Process(command.pid))
    if victim == "tree":
        for _ in range(3):  # what was started meanwhile, too
            for process in everyone:
                with suppress(psutil.Error):
                    process.kill()
            everyone = [child for process in everyone for child in tree(process)[1:]]
        return victim
    if victim == "group":
        os.killpg(command.pid, 9)
        return victim
    if victim == "head":
        command.kill()
        return victim
    found = [process for process in everyone if victim in calls(process) and f"{victim} " in f"{calls(process)} "]
    if not found:
        return ""
    with suppress(psutil.Error):
        draws.choice(found).kill()
        return victim
    return ""


def rounds(grid: Grid, kills: int, seed: int, seconds: float = 0.0, longest: float = LONGEST) -> list[dict]:
    """Kill, and start again, until so many kills were made and the last grid is finished; a row a kill.

    `seconds`, above 0, ends the last round but one after so many.
    """
    began, draws, rows, ends, victims = time.monotonic(), random.Random(seed), [], 0, list(VICTIMS)
    grid.clear()
    (grid.folder / "said.txt").write_text("")
    command = grid.start()
    if command.wait():
        raise RuntimeError("the undisturbed grid ends with an error: " + "\n".join(grid.said()[-20:]))
    expected, wanted = grid.numbers(), kills
    print(f"undisturbed: {time.monotonic() - began:.0f} s, {len(expected)} numbers to compare", flush=True)
    while len(rows) < wanted:
        grid.clear()
        ends, starts, first, logs = ends + 1, 0, len(rows), Logs(grid.home)
        while True:
            command, starts, moment = grid.start(), starts + 1, time.monotonic()
            over = len(rows) >= wanted or starts > 12  # the last ones are left alone
            code = None
            while code is None:
                wait = None if over else draws.uniform(0.5, longest)
                try:
                    code = command.wait(wait)
                except subprocess.TimeoutExpired:
                    logs.read()
                    victim = kill(command, draws.choices(victims, VICTIMS.values())[0], draws)
                    if victim:
                        said = next((line[:80] for line in reversed(grid.said()) if ": " in line), "")
                        rows.append({"kill": len(rows) + 1, "round": ends, "victim": victim})
                        rows[-1] |= {"after": round(time.monotonic() - moment, 1), "said": said}
                        print(*rows[-1].values(), sep=" | ", flush=True)
                        rows[-1]["repeated"] = 0
                    over = len(rows) >= wanted or (seconds and time.monotonic() - began > seconds)
                    wanted = len(rows) if over else wanted
                    if victim in ("tree", "group", "head"):
                        code = command.wait()
                if len(rows) > first:
                    rows[-1]["repeated"] = max(rows[-1]["repeated"], logs.read())
            if code == 0:
                break
            if starts > 20:
                raise RuntimeError("it does not go on by itself: " + "\n".join(grid.said()[-20:]))
        found = grid.numbers()
        unlike = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        left = grid.left()
        for row in rows[first:]:
            row |= {"unlike": " ".join(unlike), "left": " ".join(left), "starts": starts, "resumed": logs.resumed}
        print(f"round {ends}: {len(rows) - first} kills, {starts} starts, unlike: {unlike}, left: {left}")
        print(f"  {logs.resumed} times a phase was gone on with from a checkpoint", flush=True)
        with (grid.folder / "kills.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, "kill round victim after said repeated unlike left starts resumed".split())
            writer.writeheader()
            writer.writerows(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no other round after so many")
    given = parser.parse_args()
    rows = rounds(Grid(given.folder), given.kills, given.seed, 60 * given.minutes)
    unlike, most = [row for row in rows if row["unlike"]], max((row["repeated"] for row in rows), default=0)
    resumed = sum({row["round"]: row["resumed"] for row in rows}.values())
    print(f"{len(rows)} kills in {rows[-1]['round']} rounds: {len(unlike)} in rounds that ended unlike the undisturbed")
    print(f"grid; {resumed} times a run went on from a checkpoint, and {most} epochs at most were done twice by it")
    return 1 if unlike or most > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
