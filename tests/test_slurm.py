"""The pipeline on a real Slurm of one node: jobs that are cancelled, run out of time, or outlive their command."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ctxlm.files import ROOT
from tests.conftest import short_paragraphs
from tests.test_pipeline import finished, grid_file, jobs, metrics, own_environment

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "srun")
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
    MISSING.append("snakemake-executor-plugin-slurm")
if os.getuid():
    MISSING.append("root")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"a Slurm of one's own needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A grid of two runs, and a cluster that has room for one of them at a time."""
    path = tmp_path_factory.mktemp("slurm")
    short_paragraphs(path / "text.txt", count=140, length=60, power=2)
    grid_file(path, [800])
    script = ROOT / "tests" / "slurm" / "cluster"
    try:
        subprocess.run([script, "start", path], check=True)
        yield path
    finally:
        subprocess.run([script, "stop", path], check=True)


def environment(folder, instead=None):
    """As the pipeline's, with the cluster's commands; `instead` is a shell's line that experiments run."""
    own = own_environment(folder, first=str(folder / "bin"))
    own["env"] |= {"SLURM_CONF": str(folder / "slurm.conf")}
    if instead:
        (folder / "instead").mkdir()
        script = folder / "instead" / "python"
        shell = f'#!/bin/sh\ncase "$*" in *ctxlm.batch*02_experiment*) {instead};; esac\nexec "{sys.executable}" "$@"\n'
        script.write_text(shell)
        script.chmod(0o755)
        own["env"]["PATH"] = f"{script.parent}:{own['env']['PATH']}"
    return own


def snakemake(folder, *options, **other):
    """The README's command; a run takes both cores of the node, and its GPU."""
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", "--set-threads", "experiment=2"]
    command += ["--slurm-init-seconds-before-status-checks", "5", "--slurm-logdir", str(folder / "logs"), *options]
    command += ["--config", f"grid={folder / 'tiny.yaml'}", "gres=gpu:1"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen(command, **piped, **environment(folder, **other))


def queue(folder):
    """State → the ids of jobs in it, of all that Slurm remembers."""
    command = ["squeue", "--states=all", "--noheader", "--format=%T %i"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, check=True, **environment(folder)).stdout
    found = {}
    for line in listed.splitlines():
        state, job = line.split()
        found.setdefault(state, set()).add(job)
    return found


def wait_for_both(folder, process):
    """Until one job runs and the other one waits for it."""
    deadline = time.monotonic() + 300
    while not {"RUNNING", "PENDING"} <= queue(folder).keys():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.5)
    return queue(folder)


def test_a_cancelled_job_and_one_that_ran_out_of_time_are_said(folder):
    options = ["--retries", "0", "--set-resources", "experiment:runtime=1"]
    process = snakemake(folder, *options, instead="exec sleep 600")
    (waiting,) = wait_for_both(folder, process)["PENDING"]
    subprocess.run(["scancel", waiting], check=True, **environment(folder))
    code, output = finished(process)
    assert code != 0 and f"SLURM-job '{waiting}' failed, SLURM status is: 'CANCELLED'" in output, output
    assert "SLURM status is: 'TIMEOUT'" in output and not metrics(folder), output


def test_jobs_that_outlive_their_command_are_not_run_twice(folder):
    process = snakemake(folder)  # repairs what failed before, too
    before = wait_for_both(folder, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = finished(snakemake(folder))
    assert code == 0, output
    assert set().union(*queue(folder).values()) <= set().union(*before.values())
    assert len(metrics(folder)) == 2 and (folder / "outputs" / "tiny" / "report" / "index.html").exists()
    grid_file(folder, [800], phase2_learning_rate=0.001)  # Snakemake has no record of what they were made with
    code, output = finished(snakemake(folder, "--dry-run"))
    assert code == 0 and jobs(output)["experiment"] == 2, output
