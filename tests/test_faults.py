"""The matrix of faults (docs/faults.md): injected for real, and what the next command then does, without a hand.

`tests/kill.py` kills a whole grid at random moments; three kills of it are here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml

from ctxlm.analysis.runs import TABLES, Damaged, damaged_runs, load_runs, set_aside
from ctxlm.analysis.site import build
from ctxlm.batch import GRID_LOCK, execute, failures, is_executed
from ctxlm.checkpoints import Checkpoints
from ctxlm.config import Experiment
from ctxlm.corpus import load_corpus
from ctxlm.files import CHECKPOINTS, ROOT, RUN_LOCK, atomic, cached_arrays, clear_temporaries, file_digest, take
from ctxlm.phase1 import shape_contexts
from ctxlm.results import run_folder, sealed_metrics
from tests import planted
from tests.conftest import rewrite, short_paragraphs, stream, tiny
from tests.kill import Grid, rounds
from tests.test_results import roots, write  # noqa: F401
from tests.test_site import make
from tests.test_site import outputs as reported  # noqa: F401
from tests.test_trainer import assert_same, trainer

FILES = ["metrics.json", *TABLES, "val_losses.npz", "model.safetensors"]
"""Of a finished run."""


def inverted(content: bytes) -> bytes:
    """One bit in the middle."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "cut": lambda content: content[: 2 * len(content) // 3],
    "emptied": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),  # as after a power failure: whole in length alone
    "a bit": inverted,
    "longer": lambda content: content + b"\n1,1,1,1\n",
    "of another kind": lambda _: b"\x89PNG\r\n\x1a\n\x00\xff",
}
"""What can befall any file."""
ELSE = ["another run's", "a folder", "deleted"]


def damage(path: Path, how: str, other: Path) -> None:
    """Damage a file; `other` is another run's of its name."""
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "another run's":
        shutil.copy(other, path)
    elif how != "deleted":
        path.write_bytes(DAMAGE[how](content))


def two(root: Path, name: str) -> tuple[Path, Path]:
    """A file of run A of grid g, and B's, which is another."""
    path, other = (write(root / "g" / run, scale).with_name(name) for run, scale in (("A", 1.0), ("B", 2.0)))
    rewrite(other.with_name("metrics.json"), seed=43)
    if other.read_bytes() == path.read_bytes():
        content = other.read_bytes()
        other.write_bytes(content.replace(b"2.0", b"3.0") if name.endswith(".csv") else content[::-1])
        content = json.loads(other.with_name("metrics.json").read_text())
        files = content["files"] | {name: file_digest(other)}
        other.with_name("metrics.json").write_text(json.dumps(sealed_metrics(content, files)))
    return path, other


# A finished run's files


@pytest.mark.parametrize("how", [*DAMAGE, *ELSE])
@pytest.mark.parametrize("name", FILES)
def test_a_run_with_a_damaged_file_is_done_again_and_the_other_one_stays(roots, name, how):  # noqa: F811
    path, other = two(roots[0], name)
    damage(path, how, other)
    found = damaged_runs("g")
    for one in found:
        set_aside(one)
    if how == "deleted" and name in ("val_losses.npz", "model.safetensors"):
        assert not found  # nothing is lost
        assert path.parent.joinpath("metrics.json").exists()
        return
    assert [*load_runs("g")["run"]] == ["B"] and not path.with_name("metrics.json").exists()
    assert len(found) == (0 if name == "metrics.json" and how == "deleted" else 1)
    kept = [file for file in path.parent.iterdir() if ".damaged-" in file.name]
    assert bool(kept) == bool(found)  # nothing is thrown away
    write(path.parent)  # what the next command does
    assert damaged_runs("g") == [] and len(load_runs("g")) == 2


@pytest.mark.parametrize("how", [*DAMAGE, "another run's", "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_committed_run_with_a_damaged_file_is_refused_with_what_to_do(roots, name, how):  # noqa: F811
    path, other = two(roots[1], name)
    damage(path, how, other)
    before = {file: file.is_dir() or file.read_bytes() for file in path.parent.iterdir()}
    for one in damaged_runs("g"):
        with pytest.raises(Damaged, match="restore it by git"):
            set_aside(one)
    assert damaged_runs("g") != []
    assert {file: file.is_dir() or file.read_bytes() for file in path.parent.iterdir()} == before


def test_all_of_a_run_in_anothers_place_is_not_read_as_its_own(outputs, tmp_path):
    grid = {"experiments": {"A": {}}, "sweep": {"seed": [42, 43]}, "common": {"train_tokens": 20_000}}
    (tmp_path / "swapped.yaml").write_text(yaml.safe_dump(grid | {"title": "Swapped"}))
    for seed in (42, 43):
        planted.write(outputs, "swapped", seed=seed)
    folders = sorted((outputs / "swapped").iterdir())
    assert len(folders) == 2
    shutil.rmtree(folders[0])
    shutil.copytree(folders[1], folders[0])
    assert [*load_runs("swapped")["seed"]] == [43, 43]  # which `Snakefile` compares with what is asked for (unrecorded)


# What killed writers leave


def test_leftovers_of_killed_writers_are_cleared_where_nobody_else_writes(tmp_path):
    folder = tmp_path / "run"
    for name in ("model.safetensors", "metrics.json"):
        with suppress(KeyboardInterrupt), atomic(folder / name) as path:
            path.write_bytes(b"half")
            shutil.copy(path, folder / f".{Path(name).stem}-{'0f' * 16}{Path(name).suffix}")
            raise KeyboardInterrupt
    (folder / ".notes").touch()
    (folder / ".checkpoints").mkdir()
    assert len([*folder.iterdir()]) == 4
    assert run_folder(folder) == folder
    assert {path.name for path in folder.iterdir()} == {".notes", ".checkpoints", RUN_LOCK, f"{RUN_LOCK}.json"}
    (folder / f".a-{'0f' * 16}.npz").touch()
    (folder / f".b-{'0f' * 16}.npz").touch()
    clear_temporaries(folder, "a.npz")
    assert [path.name for path in folder.glob("*.npz")] == [f".b-{'0f' * 16}.npz"]


def test_a_report_that_was_killed_while_it_was_written_leaves_nothing_after_the_next(reported):  # noqa: F811
    left = reported / "mini" / ".report-abc"
    left.mkdir()
    (left / "index.html").touch()
    make(reported)
    assert not left.exists() and (reported / "mini" / "report" / "index.html").exists()


@pytest.mark.parametrize("content", ["{", "", "not JSON", None])
def test_a_finished_run_whose_notebook_is_damaged_is_shown_from_its_figures(reported, content):  # noqa: F811
    path = reported / "mini" / "A_seed-1" / "experiment.ipynb"
    path.unlink()
    if content is not None:
        path.write_text(content)
    make(reported)
    assert (reported / "mini" / "report" / "runs" / "A_seed-1.html").exists()


def test_a_notebook_that_was_not_run_to_its_end_is_known(tmp_path):
    path, new = tmp_path / "a.ipynb", nbformat.v4
    cells = [new.new_code_cell("a = 1", execution_count=1), new.new_markdown_cell("words"), new.new_code_cell("")]
    nbformat.write(new.new_notebook(cells=cells), path)
    assert is_executed(path)
    nbformat.write(new.new_notebook(cells=[*cells, new.new_code_cell("b = 1")]), path)
    assert not is_executed(path) and not is_executed(tmp_path / "none.ipynb")
    path.write_bytes(path.read_bytes()[:-20])
    assert not is_executed(path)


# Caches and checkpoints


@pytest.mark.parametrize("progress", ["", "lines"])
def test_a_batch_that_is_killed_once_the_run_is_written_has_its_last_epoch_to_go_on_from(
    roots,  # noqa: F811
    monkeypatch,
    progress,
):
    """Snakemake deletes what such a job has made."""
    monkeypatch.setenv("CTXLM_PROGRESS", progress)
    folder = roots[0] / "g" / "A"
    Checkpoints(folder / CHECKPOINTS, "key").save(1, {"epoch": 1})
    write(folder)
    assert (folder / CHECKPOINTS).exists() is (progress == "lines")


def made(path):
    return cached_arrays(path, lambda: {"x": np.arange(300.0)})["x"]


@pytest.mark.parametrize("how", [*DAMAGE, *ELSE])
def test_a_damaged_cache_is_made_anew(tmp_path, how):
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    cached_arrays(other, lambda: {"x": np.ones(300)})
    made(path)
    damage(path, how, other)
    built = []
    found = cached_arrays(path, lambda: built.append(1) or {"x": np.arange(300.0)})
    assert np.array_equal(found["x"], np.arange(300.0)) and [*found] == ["x"]
    # zeros behind an archive's end, or a bit between its members, say nothing of the arrays
    assert built or how in ("longer", "a bit")


@pytest.mark.parametrize("leftover", [".a.npz.lock", f".a-{'0f' * 16}.npz"])
def test_what_a_killed_process_left_in_the_cache_is_in_nobodys_way(tmp_path, leftover):
    (tmp_path / leftover).touch()
    assert len(made(tmp_path / "a.npz")) == 300
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": 1}', "\0" * 50])
def test_a_stale_lock_is_free_whatever_its_note_says(tmp_path, note):
    (tmp_path / RUN_LOCK).write_bytes(b"")
    (tmp_path / f"{RUN_LOCK}.json").write_text(note)
    command = [sys.executable, "-c", f"from ctxlm.files import take; print([take('{tmp_path}/{RUN_LOCK}')])"]
    command[2] = command[2].replace("take('", "take(__import__('pathlib').Path('").replace("')])", "'))])")
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "['']\n"


def test_checkpoints_in_whose_folder_is_rubbish_are_gone_on_from(tmp_path):
    saved = Checkpoints(tmp_path, "key")
    saved.save(1, {"epoch": 1})
    for name in ("9999.safetensors.tmp", ".0002-abc.safetensors", "notes"):
        (tmp_path / name).write_bytes(b"rubbish")
    assert saved.load() == {"epoch": 1}


# The clock


def test_a_clock_that_was_set_back_changes_no_choice_of_checkpoint(tmp_path):
    """The latest is the one of most epochs, whatever the times say."""
    saved = Checkpoints(tmp_path, "key")
    for step in (1, 2):
        saved.save(step, {"epoch": step})
    os.utime(tmp_path / "0001.safetensors", (2e9, 2e9))
    assert saved.load() == {"epoch": 2}
    saved.save(3, {"epoch": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0002.safetensors", "0003.safetensors"]


# A full disk: a real one, of a few pages


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, 4 MB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, but: int = 0) -> Path:
    """Leave so many pages free."""
    path = disk / "full"
    left = os.statvfs(disk)
    with path.open("wb", buffering=0) as file:
        for _ in range(max(left.f_bavail - but, 0)):
            file.write(bytes(left.f_bsize))
    return path


def test_a_full_disk_costs_a_corpus_its_cache_alone(disk, tmp_path, monkeypatch):
    text = short_paragraphs(tmp_path / "text.txt")
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    expected = load_corpus(str(text)).tokens
    monkeypatch.setenv("CTXLM_CACHE", str(disk))
    full = fill(disk)
    with pytest.warns(UserWarning, match="No space left"):
        assert np.array_equal(load_corpus(str(text)).tokens, expected)
    assert [*disk.iterdir()] == [full]
    full.unlink()
    assert np.array_equal(load_corpus(str(text)).tokens, expected) and len([*disk.iterdir()]) == 1


SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8, "train_tokens": 200, "phase1_batch_size": 64}


@pytest.mark.filterwarnings("ignore:.*cannot be kept")
@pytest.mark.parametrize("pages", [0, 1, 3, 12])
def test_a_full_disk_costs_phase1_its_cache_and_no_bit(disk, tmp_path, monkeypatch, one_thread, pages):
    settings = Experiment.from_mapping(SHAPE, {"phase1_max_iterations": 4, "phase1_min_iterations": 4})

    def shaped(cache):
        monkeypatch.setenv("CTXLM_CACHE", str(cache))
        model = tiny(**SHAPE)
        shape_contexts(model, stream(200), settings)
        return model.state_dict()

    expected = shaped(tmp_path / "cache")
    full = fill(disk, pages)
    found = shaped(disk)
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    full.unlink()
    again = shaped(disk)
    assert all(torch.equal(weight, expected[name]) for name, weight in again.items())


@pytest.mark.parametrize("pages", [0, 1, 4, 9, 20])
def test_a_full_disk_costs_a_training_its_checkpoints_and_no_bit(disk, one_thread, pages):
    whole, other = trainer("study"), trainer("study")
    expected = whole.run()
    fill(disk, pages)
    assert_same(other, other.run(checkpoints=Checkpoints(disk / "states", "key")), whole, expected)
    assert all(path.stat().st_size for path in (disk / "states").glob("*")) or not pages


def test_a_run_that_finds_any_amount_of_room_is_whole_or_the_earlier_one_is(disk):
    folder = disk / "run"
    write(folder)
    before = {path.name: file_digest(path) for path in folder.iterdir()}
    outcomes = []
    for pages in range(12):
        full = fill(disk, pages)
        try:
            write(folder, 2.0)
            outcomes.append(True)
        except OSError as error:
            assert "free some space" in str(error)
            assert {path.name: file_digest(path) for path in folder.iterdir()} == before
            outcomes.append(False)
        full.unlink()
        write(folder)
    assert outcomes == sorted(outcomes) and {*outcomes} == {False, True}


def test_a_full_disk_leaves_the_earlier_report_and_says_so(reported, disk, capsys):  # noqa: F811
    shutil.copytree(reported, disk / "outputs")
    shutil.copy(reported.parent / "mini.yaml", disk / "mini.yaml")
    page = build(str(disk / "mini.yaml"), disk / "outputs")
    before = {path: path.read_bytes() for path in page.parent.rglob("*.html")}
    full = fill(disk)
    with pytest.raises(OSError, match="No space left"):
        build(str(disk / "mini.yaml"), disk / "outputs")
    assert {path: path.read_bytes() for path in page.parent.rglob("*.html")} == before
    assert not [*page.parents[1].glob(".report-*")]
    full.unlink()
    build(str(disk / "mini.yaml"), disk / "outputs")


def test_a_lock_is_taken_on_a_full_disk(disk):
    fill(disk)
    assert take(disk / "lock") == ""


# A notebook that ends in one way or another, by papermill itself


def ends(tmp_path, source, values=None, **environment):
    """Execute a notebook of these sources, one a cell; why it failed, and what its log says."""
    folder, new = tmp_path / "run", nbformat.v4
    head = "from pathlib import Path\nimport os\nfolder = Path(output_dir)\nfirst = not (folder / 'tried').exists()\n"
    cells = [new.new_code_cell("output_dir = None", metadata={"tags": ["parameters"]})]
    cells += [new.new_code_cell(head + "(folder / 'tried').touch()"), new.new_code_cell(source)]
    cells += [new.new_code_cell("(folder / 'metrics.json').write_text('{}')")]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path / "own.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        done = folder / "metrics.json"
        why = execute(str(tmp_path / "own.ipynb"), folder / "own.ipynb", done, {"output_dir": str(folder)}, "own")
    return why, (folder / "metrics.json").exists(), folder


HOLD_MEMORY = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); x = bytearray(2**33)"
DIES = {
    "a kernel that dies once": ("if first: os.kill(os.getpid(), 9)", True, ""),
    "a kernel that always dies": ("os.kill(os.getpid(), 9)", False, "memory"),
    "a papermill that is killed once": ("if first: os.kill(os.getppid(), 9)\nimport time; time.sleep(3)", True, ""),
    "want of memory that Python is told of": (HOLD_MEMORY, False, "MemoryError"),
    "an error": ("raise ValueError('no')", False, "ValueError: no"),
    "a kernel that exits": ("os._exit(0)", False, "Kernel died"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "done", "words"), DIES.values(), ids=DIES)
def test_a_kernel_that_ends(tmp_path, source, done, words):
    why, there, folder = ends(tmp_path, source)
    assert there is done and words in why and bool(why) is not done, why
    assert (folder / "own.log").exists() and "\n" not in why
    assert failures(tmp_path, ["run"]) == ({} if done else {"run": why})


@pytest.mark.slow
def test_a_kernel_that_does_not_start_is_tried_once_more_and_named(tmp_path, capsys):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "no", "language": "python"}))
    why, there, _ = ends(tmp_path, "1", JUPYTER_PATH=tmp_path)
    assert not there and "Kernel died" in why and capsys.readouterr().out.count("once more") == 1


# The whole command, on a grid that is small


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid of two n-grams, run once."""
    found = Ngrams(tmp_path_factory.mktemp("faults"))
    code, output = found.run()
    assert code == 0, output
    return found


class Ngrams:
    """A grid of n-grams, by their order."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "ngrams.yaml"
        self.outputs, self.home = folder / "outputs", folder / "outputs" / "ngrams"
        short_paragraphs(folder / "text.txt", count=140, length=60, power=2)
        self.plan(2, 3)

    def plan(self, *orders, **experiments):
        common = {"corpus": str(self.folder / "text.txt"), "embedding": "random", "embed_dim": 16, "val_samples": 5}
        common |= {"development_samples": 5, "test_samples": 5, "train_tokens": 800, "dtype": "float32"}
        own = {f"KN-{order}": {"model": "kneser-ney", "ngram_order": order} for order in orders} | experiments
        content = {"title": "n-grams", "common": common, "experiments": own}
        self.file.write_text(yaml.safe_dump(content), encoding="utf-8")

    def start(self, *options, outputs=None, **more):
        own = {"CTXLM_OUTPUTS": str(outputs or self.outputs), "CTXLM_CACHE": str(self.folder / "cache")}
        own |= {"CTXLM_RESULTS": str(self.folder / "none"), "OMP_NUM_THREADS": "1"} | more
        own["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        options = [*options, *(["--quiet", "host"] if "--dry-run" in options else [])]  # else no job is listed
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *options, "--config", f"grid={self.file}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "process_group": 0}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, **pipes)

    def run(self, *options, **more):
        with self.start(*options, **more) as process:
            output, _ = process.communicate()
        return process.returncode, output

    def numbers(self):
        """Each run's numbers, and when it was written."""
        found = {}
        for path in sorted(self.home.glob("*/metrics.json")):
            metrics = json.loads(path.read_text(encoding="utf-8"))
            found[path.parent.name] = metrics["test_loss"], metrics["val_loss"]
        return found


def jobs(output):
    """Rule → how many jobs of it were, or would be, carried out, the whole left out."""
    return {
        rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE) if rule not in ("all", "total")
    }


NOTHING = {}
ALONE = {
    "04_scaling.ipynb": {"analysis": 1, "report": 1},
    "estimates.csv": {"analysis": 1, "report": 1},
    "corpus/corpus.ipynb": {"corpus": 1, "report": 1},
    "corpus/corpus.json": {"corpus": 1, "report": 1},
    "report/index.html": {"report": 1},
    "report/04_scaling.html": {"report": 1},
    "report/runs/KN-2.html": {"report": 1},
}


@pytest.mark.night
@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "deleted"])
@pytest.mark.parametrize("name", ALONE)
def test_what_belongs_to_the_grid_is_made_again_by_itself(grid, name, how):
    path = grid.home / name
    before, stamps = path.read_bytes(), path.stat()
    damage(path, how, path)
    code, output = grid.run("--dry-run")
    path.write_bytes(before)
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert code == 0 and jobs(output) == ALONE[name], output


@pytest.mark.slow
def test_all_kinds_of_damage_at_once_are_healed_by_one_command(grid):
    before = grid.numbers()
    damage(grid.home / "KN-2" / "metrics.json", "zeros", grid.home)
    damage(grid.home / "KN-3" / "val_losses.npz", "a bit", grid.home)
    damage(grid.home / "04_scaling.ipynb", "cut", grid.home)
    for path in (grid.folder / "cache").glob("corpus-*.npz"):
        damage(path, "cut", path)
    (grid.home / f"{GRID_LOCK}.json").write_text("{")
    code, output = grid.run()
    assert code == 0 and output.count("is damaged") == 2, output
    assert grid.numbers() == before and is_executed(grid.home / "04_scaling.ipynb")
    code, output = grid.run("--dry-run")
    assert code == 0 and jobs(output) == NOTHING, output


@pytest.mark.slow
def test_a_second_command_is_told_who_is_at_it(grid):
    hold = f"from pathlib import Path; from ctxlm.files import take; take(Path('{grid.home / GRID_LOCK}')); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, **pipes) as other:
        while not (grid.home / f"{GRID_LOCK}.json").exists():
            time.sleep(0.05)
        code, output = grid.run()
        assert code != 0 and f"process {other.pid} on " in output and "Error" not in output, output
        other.kill()
    code, output = grid.run()
    assert code == 0 and f"process {other.pid} on " in output, output


@pytest.mark.night
@pytest.mark.slow
def test_outputs_from_the_future_are_not_made_again(grid):
    """The clock was wrong when they were written."""
    later = time.time() + 86_400
    for path in grid.home.glob("KN-*/*"):
        os.utime(path, (later, later))
    code, output = grid.run("--dry-run")
    assert code == 0 and "experiment" not in jobs(output), output
    for path in grid.home.glob("KN-*/*"):
        os.utime(path)
    code, output = grid.run()
    assert code == 0, output


@pytest.mark.slow
def test_a_failing_run_is_the_last_thing_that_is_read(grid):
    before = grid.numbers()
    grid.plan(2, 3, C={"num_layers": 1, "context_dim": 16, "phase2_learning_rate": 1.0e30})
    code, output = grid.run()
    lines = output.strip().splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("1 of 3 runs"))
    assert code != 0 and "lower phase2_learning_rate" in lines[at + 1] and at + 2 >= len(lines) - 1, output
    assert grid.numbers() == before
    assert (grid.home / "C" / "experiment.ipynb").exists() and (grid.home / "C" / "experiment.log").exists()
    page = (grid.home / "report" / "index.html").read_text(encoding="utf-8")
    assert "KN-2" in page and "runs/C.html" in page
    shutil.rmtree(grid.home / "C")
    grid.plan(2, 3)
    code, output = grid.run()
    assert code == 0, output


def wait_for_a_run(grid, process):
    """Until the first run of a command has begun, or the command is over."""
    while not (grid.home / "KN-2" / "experiment.log").exists() and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.night
@pytest.mark.slow
def test_outputs_that_are_removed_while_it_runs_are_made_by_the_next_command(grid):
    before = grid.numbers()
    shutil.rmtree(grid.home)
    with grid.start() as process:
        wait_for_a_run(grid, process)
        shutil.rmtree(grid.home, ignore_errors=True)
        process.communicate()
    code, output = grid.run()
    assert code == 0 and grid.numbers() == before, output


@pytest.mark.night
@pytest.mark.slow
def test_a_grid_file_that_is_changed_while_it_runs_is_the_next_commands(grid):
    shutil.rmtree(grid.home / "KN-2")
    with grid.start() as process:
        wait_for_a_run(grid, process)
        grid.plan(2, 3, 4)
        output, _ = process.communicate()
    assert set(grid.numbers()) == {"KN-2", "KN-3"}, output
    code, output = grid.run()
    assert code == 0 and set(grid.numbers()) == {"KN-2", "KN-3", "KN-4"}, output
    shutil.rmtree(grid.home / "KN-4")
    grid.plan(2, 3)
    code, output = grid.run()
    assert code == 0, output


@pytest.mark.night
@pytest.mark.slow
def test_a_full_disk_stops_a_grid_with_a_sentence_and_leaves_its_results(grid, disk):
    shutil.copytree(grid.home, disk / "outputs" / "ngrams")
    before = {path: file_digest(path) for path in disk.glob("outputs/ngrams/KN-*/metrics.json")}
    full = fill(disk)
    grid.plan(2, 3, 4)
    code, output = grid.run(outputs=disk / "outputs")
    assert code != 0 and "disk is full" in output.strip().splitlines()[-1], output
    assert {path: file_digest(path) for path in before} == before
    full.unlink()
    code, output = grid.run(outputs=disk / "outputs")
    assert code == 0 and len([*disk.glob("outputs/ngrams/KN-*/metrics.json")]) == 3, output
    grid.plan(2, 3)


@pytest.mark.night
@pytest.mark.slow
def test_a_disk_that_cannot_be_written_to_is_said_at_once(grid, disk):
    shutil.copytree(grid.home, disk / "outputs" / "ngrams")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    grid.plan(2, 3, 4)
    code, output = grid.run(outputs=disk / "outputs")
    grid.plan(2, 3)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert code != 0 and "Read-only file system" in output and "Traceback" not in output, output
    assert "begins" not in output


# Killed


@pytest.mark.night
@pytest.mark.slow
def test_a_grid_that_is_killed_at_random_is_the_undisturbed_one(tmp_path):
    rows = rounds(Grid(tmp_path), kills=3, seed=0)
    assert len(rows) == 3 and not any(row["unlike"] for row in rows) and max(row["repeated"] for row in rows) <= 1
