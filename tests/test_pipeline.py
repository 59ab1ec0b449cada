"""The whole pipeline on a small grid: from a grid file to the report, with faults on the way."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from ctxlm.config import Experiment
from ctxlm.files import ROOT
from tests.conftest import short_paragraphs

pytestmark = pytest.mark.slow
GROWN = [400, 800]  # the corpus is read up to the largest size, and so once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small corpus and the grid file `tiny.yaml`, shared by the steps below."""
    path = tmp_path_factory.mktemp("pipeline")
    short_paragraphs(path / "text.txt", count=140, length=60, power=2)
    grid_file(path, [800])
    return path


def grid_file(folder, sizes, **common):
    common = {"corpus": str(folder / "text.txt"), "embedding": "random", "embed_dim": 16, "val_samples": 5} | common
    common |= {"development_samples": 5, "test_samples": 5, "phase2_epochs": 3, "phase2_batch_size": 128}
    experiments = {"A": {"num_layers": 4, "context_dim": 16}, "B": {"num_layers": 2, "context_dim": 32}}
    words = {"title": "Tiny {with} braces {0}", "description": "and {more}"}  # which Snakemake takes for wildcards
    grid = words | {"common": common, "experiments": experiments, "sweep": {"train_tokens": sizes}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")


@pytest.fixture
def grown(folder):
    """The grid as its runs are made, whatever a test writes into its file."""
    yield
    grid_file(folder, GROWN)


def arguments(folder, *options, grid=None, **config):
    """What follows `snakemake` in the command of `make report`."""
    grid = folder / "tiny.yaml" if grid is None else grid
    return ["--cores", "2", *options, "--config", f"grid={grid}", *(f"{k}={v}" for k, v in config.items())]


def own_environment(folder, first=""):
    """`first` leads PATH."""
    path = os.pathsep.join([*filter(None, [first]), os.path.dirname(sys.executable), os.environ["PATH"]])
    own = {"CTXLM_OUTPUTS": str(folder / "outputs"), "CTXLM_RESULTS": str(folder / "none"), "PATH": path}
    return {"cwd": ROOT, "env": os.environ | own, "text": True}


def snakemake(folder, *options, first="", **popen):
    """The command of `make report`, in an environment of its own."""
    command = [sys.executable, "-m", "snakemake", *arguments(folder, *options)]
    popen |= own_environment(folder, first)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)


def finished(process):
    output, _ = process.communicate()
    return process.returncode, output


# Snakemake with everything imported once: each line is a command, which a process forked off that carries out.
SERVER = """
import json, os, sys
import ctxlm.corpus, ctxlm.embeddings, ctxlm.results
from snakemake.cli import main
for line in sys.stdin:
    output, arguments = json.loads(line)
    child = os.fork()
    if not child:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["snakemake", *arguments]
        main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def ask(folder):
    """Run the command of `make report` where no job is to be carried out, in a third of the time; its output."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes, **own_environment(folder)) as server:

        def asked(*options, **other):
            output = folder / "output"
            server.stdin.write(json.dumps([str(output), arguments(folder, *options, **other)]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), output.read_text(encoding="utf-8")

        yield asked
        server.stdin.close()


def metrics(folder):
    return {path.parent.name: path for path in sorted((folder / "outputs" / "tiny").glob("*/metrics.json"))}


def times(folder):
    return {name: path.stat().st_mtime_ns for name, path in metrics(folder).items()}


def jobs(output):
    """Rule → how many jobs of it a dry run would carry out."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE)}


@pytest.fixture
def put_back(folder):
    """Returns a file of the grid's; it is put back as it was, with its times, when the test ends."""
    before = {}

    def taken(name):
        path = folder / "outputs" / "tiny" / name
        before[path] = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        return path

    yield taken
    for path, (content, stamps) in before.items():
        path.write_bytes(content)
        os.utime(path, ns=stamps)


def test_bad_input_is_refused_before_any_work(folder, ask):
    grid_file(folder, [800], num_layer=3)
    code, output = ask()
    grid_file(folder, [800])
    assert code != 0 and "num_layer = 3 is not a parameter: did you mean num_layers?" in output
    assert "Error" not in output and not re.search(r"line \d", output)  # the sentence stands alone
    for threads, said in (("abc", "'abc'"), ("True", "True"), ("0", "0")):
        code, output = ask(threads=threads)
        assert code != 0 and f"threads = {said} is not possible: give the cores that a run gets" in output
        assert "Error" not in output and not re.search(r"line \d", output)
    code, output = ask("--cores", "0")
    assert code != 0 and "--cores 0 is not possible: give one or more" in output
    for options, environment, said in (
        (["--dry-run"], {"CTXLM_OUTPUTS": str(folder / "a{b}")}, "has braces in it: name another folder"),
        (["--dry-run"], {"CTXLM_OUTPUTS": "~/outputs", "HOME": str(folder / "home")}, ""),
    ):
        own = own_environment(folder)
        own["env"] |= environment
        command = [sys.executable, "-m", "snakemake", *arguments(folder, *options)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **own)
        assert said in done.stdout and bool(said) == bool(done.returncode), done.stdout
    assert not (ROOT / "~").exists()
    code, output = ask(grid="")
    assert code != 0 and "grid = '' names no grid: choose one of" in output
    assert "Error" not in output and not re.search(r"line \d", output)
    assert not (folder / "outputs").exists()


def test_a_grid_may_give_sizes_in_tokens_and_in_samples(folder, ask):
    content = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    content["experiments"]["S"] = {"num_layers": 2, "context_dim": 16, "train_tokens": None, "train_samples": 5}
    content["sweep"] = {}
    content["experiments"]["A"]["train_tokens"] = 400
    content["experiments"]["B"]["train_tokens"] = 800
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    code, output = ask("--dry-run", "--printshellcmds")
    grid_file(folder, [800])
    assert code == 0 and jobs(output)["corpus"] == 1 and jobs(output)["experiment"] == 3, output
    # the corpus is read up to the largest size, and its notebook takes what it is given
    (command,) = re.findall(r"python -m ctxlm\.batch notebooks/01_corpus\.ipynb .*", output)
    words = shlex.split(command)
    given = yaml.safe_load(words[words.index("--values") + 1])
    assert given.pop("output_dir") == f"{folder}/outputs/tiny/corpus"
    assert (Experiment.from_mapping(given).train_tokens, given["train_samples"]) == (800, None)
    shutil.rmtree(folder / "outputs")


def test_a_killed_grid_resumes(folder):
    process = snakemake(folder, "--cores", "1", start_new_session=True)
    logs, deadline = folder / "outputs" / "tiny", time.monotonic() + 300
    # until one run has ended and the other one has begun
    while len([*logs.glob("*/experiment.log")]) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = times(folder)
    assert len(kept) == 1
    code, output = finished(snakemake(folder, "--until", "experiment"))  # the next step goes on to the report
    assert code == 0 and f"process {process.pid} on " in output, output  # without a hand
    assert len(metrics(folder)) == 2 and times(folder).items() >= kept.items()


def test_an_added_size_runs_alone(folder):
    before = times(folder)
    grid_file(folder, GROWN)
    code, output = finished(snakemake(folder))
    assert code == 0, output
    assert times(folder).items() >= before.items() and len(metrics(folder)) == 4
    assert (folder / "outputs" / "tiny" / "report" / "index.html").exists()
    assert (folder / "outputs" / "tiny" / "report" / "04_scaling.html").exists()


def test_a_rerun_does_nothing_and_another_size_is_a_new_report(folder, grown, ask):
    code, output = ask()
    assert code == 0 and "Nothing to be done" in output
    grid_file(folder, [*GROWN, 2400])
    code, output = ask("--dry-run")
    assert code == 0, output
    assert jobs(output) == {"corpus": 1, "experiment": 2, "analysis": 1, "report": 1, "all": 1, "total": 6}


def test_the_analysis_is_that_of_the_four_runs(folder):
    estimates = pd.read_csv(folder / "outputs" / "tiny" / "estimates.csv").set_index(["contrast", "at"])
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in metrics(folder).items()}
    assert set(runs) == {f"{label}_train_tokens-{size}" for label in "AB" for size in GROWN}
    for size in GROWN:
        loss = {label: runs[f"{label}_train_tokens-{size}"]["test_loss"] for label in "AB"}
        found = estimates.loc[("A − B", f"{size} tokens")]
        assert found["value"] == pytest.approx(loss["A"] - loss["B"], abs=1e-5) and found["n"] == 1
    page = (folder / "outputs" / "tiny" / "report" / "index.html").read_text(encoding="utf-8")
    assert all(f"runs/{run}.html" in page for run in runs) and "Tiny {with} braces {0}" in page


def test_the_type_of_the_products_is_resolved_once_for_all_runs(folder):
    kind = (folder / "outputs" / "tiny" / "dtype").read_text(encoding="utf-8").strip()
    assert {json.loads(path.read_text(encoding="utf-8"))["dtype"] for path in metrics(folder).values()} == {kind}


@pytest.mark.parametrize(
    ("sizes", "changed"),
    [
        ([400, 800], {"val_samples": 4}),  # the corpus is read anew as well
        ([400, 800], {"phase2_learning_rate": 0.001}),
        ([400, 2800], {"phase2_learning_rate": 0.001}),
        ([800], {"phase2_learning_rate": 0.001}),
    ],
)
def test_a_changed_parameter_runs_all_anew_whatever_else_is_changed(folder, grown, ask, sizes, changed):
    grid_file(folder, sizes, **changed)
    code, output = ask("--dry-run")
    assert code == 0, output
    found = jobs(output)
    assert (found["experiment"], found["analysis"], found["report"]) == (2 * len(sizes), 1, 1), output
    assert "val_samples" not in changed or found["corpus"] == 1


def test_fewer_sizes_are_a_new_report(folder, grown, ask):
    grid_file(folder, [800])
    code, output = ask("--dry-run")
    found = jobs(output)
    assert code == 0 and "experiment" not in found and (found["analysis"], found["report"]) == (1, 1), output


def test_a_damaged_committed_run_is_refused_before_new_ones_are_paid_for(folder, grown, ask):
    run = folder / "none" / "tiny" / "A_train_tokens-2800"  # where committed results are
    shutil.copytree(metrics(folder)["A_train_tokens-800"].parent, run)
    (run / "metrics.json").write_bytes((run / "metrics.json").read_bytes()[:500])
    grid_file(folder, [*GROWN, 2800])
    code, output = ask()
    shutil.rmtree(folder / "none")
    assert code != 0 and "A_train_tokens-2800/metrics.json of grid tiny is damaged" in output and "git" in output
    assert "begins" not in output and len(metrics(folder)) == 4


def test_a_damaged_run_is_set_aside_and_done_again(folder):
    path = metrics(folder)["A_train_tokens-800"]
    before, others = path.with_name("history.csv").read_bytes(), times(folder)
    path.with_name("history.csv").write_bytes(before.replace(b"1", b"2", 1))
    code, output = finished(snakemake(folder))
    assert code == 0 and "A_train_tokens-800/history.csv of grid tiny is damaged" in output, output
    assert {name for name, time in times(folder).items() if time != others[name]} == {"A_train_tokens-800"}
    assert len([*path.parent.glob("*.damaged-*")]) == 2


def test_a_dry_run_names_a_damaged_run_and_leaves_it(folder, grown, ask, put_back):
    path = put_back("A_train_tokens-800/metrics.json")
    path.write_bytes(path.read_bytes()[:500])
    code, output = ask("--dry-run")
    assert code != 0 and "A_train_tokens-800/metrics.json of grid tiny is damaged" in output
    assert path.stat().st_size == 500 and len(metrics(folder)) == 4


@pytest.mark.parametrize("name", ["estimates.csv", "A_train_tokens-800/history.csv"])
def test_what_was_deleted_is_made_again(ask, put_back, name):
    put_back(name).unlink()
    code, output = ask("--dry-run")
    found = jobs(output)
    assert code == 0 and (found["experiment" if "/" in name else "analysis"], found["report"]) == (1, 1), output


def test_a_cut_analysis_is_made_anew(ask, put_back):
    path = put_back("estimates.csv")
    path.write_bytes(path.read_bytes()[:-20])
    code, output = ask("--dry-run")
    assert code == 0 and jobs(output)["analysis"] == 1 and "experiment" not in jobs(output), output


def test_what_was_put_back_is_as_it_was(ask):
    code, output = ask("--dry-run")
    assert code == 0 and "Nothing to be done" in output, output


def test_a_result_that_snakemake_has_no_record_of_is_judged_by_what_it_says(folder, grown, ask):
    names = ("metrics.json", "history.csv", "val_by_sample.csv", "test_by_sample.csv")
    made = [str(path.parent / name) for path in metrics(folder).values() for name in names]
    code, output = ask("--cleanup-metadata", *made)
    assert code == 0, output
    code, output = ask("--dry-run")
    assert code == 0 and "experiment" not in jobs(output), output
    grid_file(folder, GROWN, phase2_learning_rate=0.001)
    code, output = ask("--dry-run")
    assert code == 0 and jobs(output)["experiment"] == 4, output


def test_a_failing_run_says_why_and_leaves_the_others(folder, grown):
    before = {name: path.read_bytes() for name, path in metrics(folder).items()}
    grid = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    grid["sweep"] = {"train_tokens": [800]}
    grid["experiments"]["C"] = {"num_layers": 1, "context_dim": 16, "phase2_learning_rate": 1.0e30, "dtype": "float32"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    code, output = finished(snakemake(folder))
    assert code != 0 and "1 of 3 runs have no result" in output and "NonFiniteLoss: Phase 2's loss is" in output
    assert {name: path.read_bytes() for name, path in metrics(folder).items()} == before
    page = (folder / "outputs" / "tiny" / "report" / "index.html").read_text(encoding="utf-8")
    # the report is of what there is, and says what is missing
    for name in ("A_train_tokens-800", "C_train_tokens-800"):
        assert f"runs/{name}.html" in page
        assert (folder / "outputs" / "tiny" / "report" / "runs" / f"{name}.html").exists()
    shutil.rmtree(folder / "outputs" / "tiny" / "C_train_tokens-800")


def broken(folder, notebook):
    """A folder for PATH whose python is killed at once with this notebook."""
    path = folder / "broken" / "python"
    path.parent.mkdir(exist_ok=True)
    script = f'#!/bin/sh\ncase "$*" in *{notebook}*) kill -9 $$;; esac\nexec "{sys.executable}" "$@"\n'
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)
    return str(path.parent)


def test_an_analysis_that_was_killed_is_not_taken_for_done(folder, grown, ask):
    before = {name: path.read_bytes() for name, path in metrics(folder).items()}
    grid_file(folder, [800])  # fewer sizes: the analysis and the report are to be made anew
    code, output = finished(snakemake(folder, first=broken(folder, "04_scaling")))
    assert code != 0, output
    code, output = ask("--dry-run")
    assert code == 0 and (jobs(output)["analysis"], jobs(output)["report"]) == (1, 1), output
    assert {name: path.read_bytes() for name, path in metrics(folder).items()} == before
