"""The pipeline on a real Slurm of one node: jobs that outlive their command."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ctxlm.files import ROOT
from tests.test_pipeline import Grid

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "srun")
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
    MISSING.append("snakemake-executor-plugin-slurm")
if os.getuid():
    MISSING.append("root")

pytestmark = [
    pytest.mark.night,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"a Slurm of one's own needs {', '.join(MISSING)}"),
]


class OnSlurm(Grid):
    """A grid of two runs, on a cluster that has room for one of them at a time."""

    def start(self):
        """The command of README.md; a run takes both cores of the node, and its GPU."""
        command = [sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", "--set-threads", "experiment=2"]
        command += ["--slurm-init-seconds-before-status-checks", "5", "--slurm-logdir", str(self.folder / "logs")]
        command += ["--config", f"grid={self.file}", "gres=gpu:1"]
        return super().start(*command, first=str(self.folder / "bin"), SLURM_CONF=str(self.folder / "slurm.conf"))

    def states(self):
        """Of the jobs in the queue."""
        environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        command = ["squeue", "--noheader", "--format=%T"]
        return {*subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout.split()}

    def wait_for_both(self, process):
        """Until one job runs and the other one waits for it."""
        deadline = time.monotonic() + 300
        while not {"RUNNING", "PENDING"} <= self.states():
            assert process.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.5)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    grid = OnSlurm(tmp_path_factory.mktemp("slurm"))
    grid.plan("A", "K")
    script = ROOT / "tests" / "slurm" / "cluster"
    try:
        subprocess.run([script, "start", grid.folder], check=True)
        yield grid
    finally:
        subprocess.run([script, "stop", grid.folder], check=True)


def test_runs_of_jobs_that_outlive_their_command_are_not_done_again(grid):
    process = grid.start()
    grid.wait_for_both(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process, results = grid.start(), {}
    while process.poll() is None:
        for run, content in grid.results().items():
            assert results.setdefault(run, content) == content, f"{run} was done twice"
        time.sleep(0.2)
    assert process.returncode == 0 and set(results) == {"A", "K"}, grid.printed
