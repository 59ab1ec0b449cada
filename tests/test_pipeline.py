"""The whole pipeline on a small grid: from a grid file to the report, with faults on the way."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from ctxlm.batch import main
from ctxlm.files import ROOT
from tests.conftest import short_paragraphs
from tests.test_run import MAY_DIFFER

pytestmark = pytest.mark.slow
COMMON = {"embedding": "random", "embed_dim": 16, "val_samples": 5, "development_samples": 5, "test_samples": 5}
NGRAM = {"model": "kneser-ney", "ngram_order": 2}
FAILS = {"model": "lstm", "num_layers": 1, "hidden_dim": 16, "phase2_learning_rate": 1.0e30, "dtype": "float32"}
RUNS = {"A": {"num_layers": 2, "context_dim": 16, "phase2_batch_size": 8}, "K": NGRAM}
RUNS |= {"L": NGRAM | {"train_tokens": 200}, "C": FAILS}


class Grid:
    """A grid file, the commands that carry it out, and what comes of them."""

    def __init__(self, folder: Path, outputs: Path | None = None):
        self.folder, self.file = folder, folder / "tiny.yaml"
        self.outputs = outputs or folder / "outputs"
        self.home, self.log = self.outputs / "tiny", self.folder / f"{self.outputs.name}.txt"
        self.outputs.mkdir(parents=True, exist_ok=True)

    def plan(self, *runs: str, **common) -> None:
        text = short_paragraphs(self.folder / "text.txt", count=140, length=60, power=2)
        common = {"corpus": str(text), "train_tokens": 400, "phase2_epochs": 6} | COMMON | common
        words = {"title": "Tiny {with} braces {0}", "description": "and {more}"}  # which Snakemake takes for wildcards
        grid = words | {"common": common, "experiments": {name: RUNS[name] for name in runs}}
        self.file.write_text(yaml.safe_dump(grid), encoding="utf-8")

    def start(self, *command: str, first: str = "", **variables: str) -> subprocess.Popen:
        """A command, or that of the report; what it prints goes to a file. `first` leads PATH."""
        binaries = os.path.dirname(sys.executable)
        report = ["make", "--old-file=.venv/.ready", f"BIN={binaries}", "report", f"GRID={self.file}", "JOBS=2"]
        variables |= {f"CTXLM_{name}": str(self.outputs / name.lower()) for name in ("CACHE", "RESULTS")}
        variables |= {"CTXLM_OUTPUTS": str(self.outputs), "OMP_NUM_THREADS": "1"}
        variables["PATH"] = os.pathsep.join(filter(None, [first, binaries, os.environ["PATH"]]))
        options = {"cwd": ROOT, "env": os.environ | variables, "start_new_session": True}
        with self.log.open("a") as file:
            return subprocess.Popen(command or report, stdout=file, stderr=subprocess.STDOUT, **options)

    def run(self, *command: str, **options) -> tuple[int, str]:
        """A command's exit code and all that it prints."""
        self.log.unlink(missing_ok=True)
        return self.start(*command, **options).wait(), self.printed

    def without_report(self, *options: str) -> list[str]:
        """The command of the runs alone."""
        return [sys.executable, "-m", "snakemake", "--cores", "2", *options, "--config", f"grid={self.file}"]

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def results(self) -> dict[str, bytes]:
        """Run → its metrics.json."""
        results = {}
        for path in self.home.glob("*/metrics.json"):
            with suppress(FileNotFoundError):  # it is just being replaced
                results[path.parent.name] = path.read_bytes()
        return results

    def numbers(self) -> dict[str, object]:
        """All that an undisturbed grid and a killed one have in common."""
        numbers = {}
        for run, content in self.results().items():
            metrics = json.loads(content)
            numbers[run] = {name: value for name, value in metrics.items() if not MAY_DIFFER.search(name)}
            for name in ("samples.csv", "val_losses.npz", "model.safetensors"):
                numbers[f"{run}/{name}"] = (self.home / run / name).read_bytes()
            lines = (self.home / run / "history.csv").read_text(encoding="utf-8").splitlines()
            numbers[f"{run}/history.csv"] = [line for line in lines if ",seconds," not in line]
        return numbers


def to_do(output: str) -> set[str]:
    """Runs that a dry run would carry out."""
    return set(re.findall(r"^ +wildcards: run=(\S+)$", output, re.MULTILINE))


def tree(process: psutil.Process, below: str = "") -> list[psutil.Process]:
    """A process and all that it has started, parents first; without those whose command has `below` in it."""
    with suppress(psutil.Error):
        children = [child for child in process.children() if not below or below not in " ".join(child.cmdline())]
        return [process, *(one for child in children for one in tree(child, below))]
    return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid that was carried out, of three runs, of which one fails and one had a result of other parameters."""
    grid = Grid(tmp_path_factory.mktemp("pipeline"))
    grid.plan("A", "K", "C")
    (grid.home / "K").mkdir(parents=True)
    (grid.home / "K" / "metrics.json").write_text('{"model": "kneser-ney", "ngram_order": 3}')
    code, output = grid.run()
    assert code != 0 and "NonFiniteLoss" in output, output
    return grid


def test_a_wrong_grid_is_refused_before_any_work(tmp_path, capsys):
    grid = Grid(tmp_path)
    grid.plan("A", num_layer=3)
    for code, output in (grid.run(), grid.run(*grid.without_report())):
        assert code != 0 and "num_layer = 3" in output and "num_layers" in output
        assert not re.search(r"Traceback|Exception|line \d", output)  # the sentence stands alone
    grid.plan("A", corpus=str(tmp_path / "none.txt"))
    assert main(["--check", str(grid.file)]) == 1
    assert capsys.readouterr().err.startswith("corpus = ") and not grid.home.exists()


def test_a_grid_gives_runs_and_a_report(grid):
    assert set(grid.results()) == {"A", "K"} and json.loads(grid.results()["K"])["ngram_order"] == 2
    pages = {path.name: path.read_text(encoding="utf-8") for path in grid.home.glob("report/*.html")}
    assert set(pages) == {"index.html", "04_scaling.html", "corpus.html"}
    assert "Tiny {with} braces {0}" in pages["index.html"] and (grid.home / "estimates.csv").exists()
    failure = (grid.home / "C" / "failure.txt").read_text(encoding="utf-8")  # of one that failed beside them
    assert failure.startswith("NonFiniteLoss: ") and failure.count("\n") == 1  # the sentence stands alone
    assert "NonFiniteLoss" in pages["index.html"]


def test_a_dry_run_names_what_is_to_do_and_changes_nothing(grid, monkeypatch):
    """A changed run, one that failed, and a new one; and all where the text has changed."""
    before = {path: path.stat().st_mtime_ns for path in grid.home.rglob("*")}
    monkeypatch.setitem(RUNS, "K", NGRAM | {"ngram_order": 3})
    grid.plan("A", "K", "L", "C")
    code, output = grid.run(*grid.without_report("--dry-run"))
    assert code == 0 and to_do(output) == {"K", "L", "C"}, output
    with (grid.folder / "text.txt").open("a") as text:
        text.write("\n\none more\n")
    assert "A" in to_do(grid.run(*grid.without_report("--dry-run"))[1])
    assert {path: path.stat().st_mtime_ns for path in grid.home.rglob("*")} == before


def test_an_added_size_runs_alone_and_then_nothing_is_to_do(grid):
    before = grid.results()
    grid.plan("A", "K", "L")
    code, output = grid.run(*grid.without_report())
    assert code == 0 and set(grid.results()) == {"A", "K", "L"} and grid.results().items() > before.items(), output
    code, output = grid.run(*grid.without_report("--dry-run"))
    assert code == 0 and "Nothing to be done" in output and to_do(output) == set(), output


@pytest.mark.night
def test_a_killed_grid_goes_on_by_the_same_command_and_by_two_at_once(grid):
    """Killed are first all processes, then the command alone, whose jobs go on; at last two commands end it."""
    grid.plan("A", "K", "L")
    killed, command = Grid(grid.folder, grid.folder / "killed"), grid.without_report()
    assert grid.run(*command)[0] == 0
    process = killed.start(*command)
    wait_for(lambda: [*killed.home.glob("A/checkpoint.pt")], process)
    kill(tree(psutil.Process(process.pid)))
    process.wait()
    assert "A" not in killed.results()
    process, log = killed.start(*command), killed.home / "A" / "experiment.log"
    wait_for(lambda: log.exists() and "goes on after" in log.read_text(encoding="utf-8"), process)
    kill(tree(psutil.Process(process.pid), below="ctxlm.batch"))
    process.wait()
    commands, seen = [killed.start(*command), killed.start(*command)], defaultdict(set)
    while None in [command.poll() for command in commands]:
        for run, content in killed.results().items():
            seen[run].add(content)
        time.sleep(0.1)
    assert [command.returncode for command in commands] == [0, 0], killed.printed
    assert {run: len(contents) for run, contents in seen.items()} == {"A": 1, "K": 1, "L": 1}  # each was done once
    assert killed.numbers() == grid.numbers()


@pytest.mark.night
def test_a_grid_that_is_killed_at_random_is_the_undisturbed_one(grid):
    """Killed are all processes, the command alone, or any one of them."""
    grid.plan("A", "K", "L")
    assert grid.run()[0] == 0
    draws, kills, starts = random.Random(0), 0, 0
    while kills < 20:
        killed, code = Grid(grid.folder, grid.folder / f"killed-{starts}"), None
        while code != 0:
            process, code, starts = killed.start(), None, starts + 1
            assert starts < 60, f"it does not go on by itself: {killed.printed}"
            while code is None:
                try:
                    code = process.wait(draws.uniform(1, 40) if kills < 20 else None)
                except subprocess.TimeoutExpired:
                    everyone = tree(psutil.Process(process.pid))
                    commands = tree(psutil.Process(process.pid), below="ctxlm.batch")
                    kill(draws.choice([everyone, commands, [draws.choice(everyone)]]))
                    kills += 1
        assert killed.numbers() == grid.numbers(), killed.printed
        assert (killed.home / "estimates.csv").read_bytes() == (grid.home / "estimates.csv").read_bytes()
