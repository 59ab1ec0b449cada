"""The whole pipeline on a small grid: from a grid file to the report, with faults on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ctxlm.files import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small corpus and the grid file `tiny.yaml`, shared by the steps below."""
    path = tmp_path_factory.mktemp("pipeline")
    words = "the a cat dog saw ran to from with red blue big small house tree and then it was".split()
    paragraphs = (" ".join(words[(i * j * j) % 19] for j in range(1, 61)) for i in range(1, 141))
    (path / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    grid_file(path, [800, 1600])
    return path


def grid_file(folder, sizes, **common):
    common = {"corpus": str(folder / "text.txt"), "embedding": "random", "embed_dim": 16, "val_samples": 5} | common
    common |= {"test_samples": 5, "phase2_epochs": 3, "phase2_batch_size": 128}
    experiments = {"A": {"num_layers": 4, "context_dim": 16}, "B": {"num_layers": 2, "context_dim": 32}}
    words = {"title": "Tiny {with} braces {0}", "description": "and {more}"}  # which Snakemake takes for wildcards
    grid = words | {"common": common, "experiments": experiments, "sweep": {"train_tokens": sizes}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")


def snakemake(folder, *options, grid=None, first="", **popen):
    """The command of `make report`, in an environment of its own; `first` leads PATH."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--rerun-incomplete", *options]
    command += ["--config", f"grid={folder / 'tiny.yaml' if grid is None else grid}"]
    own = {"CTXLM_OUTPUTS": str(folder / "outputs"), "CTXLM_RESULTS": str(folder / "none")}
    path = os.pathsep.join([*filter(None, [first]), os.path.dirname(sys.executable), os.environ["PATH"]])
    popen |= {"cwd": ROOT, "env": os.environ | own | {"PATH": path}, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)


def finished(process):
    output, _ = process.communicate()
    return process.returncode, output


def metrics(folder):
    return {path.parent.name: path for path in sorted((folder / "outputs" / "tiny").glob("*/metrics.json"))}


def test_bad_input_is_refused_before_any_work(folder):
    grid_file(folder, [800], num_layer=3)
    code, output = finished(snakemake(folder))
    grid_file(folder, [800, 1600])
    assert code != 0 and "num_layer = 3 is not a parameter: did you mean num_layers?" in output
    assert "Error" not in output and "line " not in output  # the sentence stands alone
    code, output = finished(snakemake(folder, grid=""))
    assert code != 0 and "grid = '' names no grid: choose one of" in output
    assert not (folder / "outputs").exists()


def test_a_grid_may_give_sizes_in_tokens_and_in_samples(folder):
    grid_file(folder, [800])
    content = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    content["experiments"]["S"] = {"num_layers": 2, "context_dim": 16, "train_tokens": None, "train_samples": 5}
    content["sweep"] = {}
    content["experiments"]["A"]["train_tokens"] = content["experiments"]["B"]["train_tokens"] = 800
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    code, output = finished(snakemake(folder, "--until", "corpus"))
    grid_file(folder, [800, 1600])
    assert code == 0, output
    shutil.rmtree(folder / "outputs")


def test_a_killed_grid_resumes(folder):
    process = snakemake(folder, start_new_session=True)
    deadline = time.monotonic() + 300
    while not metrics(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {name: path.stat().st_mtime_ns for name, path in metrics(folder).items()}
    assert kept and len(kept) < 4
    unlocked, output = finished(snakemake(folder, "--unlock"))
    assert unlocked == 0, output
    code, output = finished(snakemake(folder))
    assert code == 0, output
    assert len(metrics(folder)) == 4
    assert (folder / "outputs" / "tiny" / "report" / "index.html").exists()
    assert (folder / "outputs" / "tiny" / "audit.csv").exists()


def test_the_analysis_is_that_of_the_four_runs(folder):
    analysis = json.loads((folder / "outputs" / "tiny" / "analysis.json").read_text(encoding="utf-8"))
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in metrics(folder).items()}
    assert set(runs) == {f"{label}_train_tokens-{size}" for label in "AB" for size in (800, 1600)}
    assert {run["run"] for run in analysis["runs"]} == set(runs)
    for label in "AB":
        law = analysis["configurations"][label]
        assert (law["n"], law["residual_dof"], law["alpha_interval"]) == (2, 0, None)


def test_a_rerun_does_nothing_and_an_added_size_runs_alone(folder):
    code, output = finished(snakemake(folder))
    assert code == 0 and "Nothing to be done" in output
    before = {name: path.stat().st_mtime_ns for name, path in metrics(folder).items()}
    grid_file(folder, [800, 1600, 2400])
    code, output = finished(snakemake(folder))
    assert code == 0, output
    after = {name: path.stat().st_mtime_ns for name, path in metrics(folder).items()}
    assert {name: after[name] for name in before} == before and len(after) == 6


@pytest.mark.parametrize(
    ("sizes", "changed"),
    [
        ([800, 1600, 2400], {"val_samples": 4}),  # the corpus is read anew as well
        ([800, 1600, 2400], {"phase2_learning_rate": 0.001}),
        ([800, 1600, 2800], {"phase2_learning_rate": 0.001}),
        ([800, 1600], {"phase2_learning_rate": 0.001}),
    ],
)
def test_a_changed_parameter_runs_all_anew_whatever_else_is_changed(folder, sizes, changed):
    grid_file(folder, sizes, **changed)
    code, output = finished(snakemake(folder, "--dry-run"))
    grid_file(folder, [800, 1600, 2400])
    assert code == 0, output
    for rule, jobs in (("experiment", 2 * len(sizes)), ("analysis", 1), ("report", 1)):
        assert re.search(rf"^{rule} +{jobs}$", output, re.MULTILINE), output


def test_fewer_sizes_are_a_new_report(folder):
    grid_file(folder, [800, 1600])
    code, output = finished(snakemake(folder, "--dry-run"))
    grid_file(folder, [800, 1600, 2400])
    assert code == 0 and not re.search(r"^experiment ", output, re.MULTILINE), output
    assert re.search(r"^analysis +1$", output, re.MULTILINE) and re.search(r"^report +1$", output, re.MULTILINE)


def test_a_damaged_run_is_named_before_new_ones_are_paid_for(folder):
    path = metrics(folder)["A_train_tokens-800"]
    whole = path.read_bytes()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(whole[:500])
    grid_file(folder, [800, 1600, 2400, 2800])
    code, output = finished(snakemake(folder))
    grid_file(folder, [800, 1600, 2400])
    path.write_bytes(whole)
    os.utime(path, ns=times)
    assert code != 0 and "A_train_tokens-800/metrics.json of grid tiny is damaged" in output
    assert "experiment" not in output and len(metrics(folder)) == 6


@pytest.mark.parametrize("name", ["analysis.json", "audit.csv", "A_train_tokens-800/history.csv"])
def test_what_was_deleted_is_made_again(folder, name):
    path = folder / "outputs" / "tiny" / name
    path.rename(path.with_name("away"))
    code, output = finished(snakemake(folder, "--dry-run"))
    path.with_name("away").rename(path)
    assert code == 0 and "Nothing to be done" not in output, output
    for rule in ("experiment" if "/" in name else "analysis", "report"):
        assert re.search(rf"^{rule} +1$", output, re.MULTILINE), output


def test_a_cut_analysis_is_made_anew(folder):
    path = folder / "outputs" / "tiny" / "analysis.json"
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(whole[:300])
    code, output = finished(snakemake(folder, "--dry-run"))
    path.write_bytes(whole)
    os.utime(path, ns=times)
    assert code == 0 and re.search(r"^analysis +1$", output, re.MULTILINE), output
    assert "Nothing to be done" in finished(snakemake(folder, "--dry-run"))[1]


def test_the_type_of_the_products_is_resolved_once_for_all_runs(folder):
    kind = (folder / "outputs" / "tiny" / "dtype").read_text(encoding="utf-8").strip()
    assert {json.loads(path.read_text(encoding="utf-8"))["dtype"] for path in metrics(folder).values()} == {kind}


def test_a_failing_run_says_why_and_leaves_the_others(folder):
    before = {name: path.read_bytes() for name, path in metrics(folder).items()}
    grid = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    grid["experiments"]["C"] = {"num_layers": 1, "context_dim": 16, "phase2_learning_rate": 1.0e30, "dtype": "float32"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    code, output = finished(snakemake(folder))
    assert code != 0 and "NonFiniteLoss: Phase 2's loss is" in output
    assert {name: path.read_bytes() for name, path in metrics(folder).items()} == before


def broken(folder, notebook):
    """A folder for PATH whose papermill fails at once with this notebook, as one that was killed."""
    path = folder / "broken" / "papermill"
    path.parent.mkdir(exist_ok=True)
    real = shutil.which("papermill", path=os.path.dirname(sys.executable))
    path.write_text(f'#!/bin/sh\ncase "$*" in *{notebook}*) exit 137;; esac\nexec "{real}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path.parent)


def test_an_analysis_that_was_killed_is_not_taken_for_done(folder):
    before = {name: path.read_bytes() for name, path in metrics(folder).items()}
    grid_file(folder, [800, 1600])  # fewer sizes: the analysis and the report are to be made anew
    code, output = finished(snakemake(folder, first=broken(folder, "03_analysis")))
    assert code != 0, output
    code, output = finished(snakemake(folder, "--dry-run"))
    assert code == 0 and "Nothing to be done" not in output
    for rule in ("analysis", "report"):
        assert re.search(rf"^{rule} +1$", output, re.MULTILINE), output
    grid_file(folder, [800, 1600, 2400])
    assert {name: path.read_bytes() for name, path in metrics(folder).items()} == before
