"""The set-up says the same thing twice, notebooks are clean, and imports run one way."""

import ast
import graphlib
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ctxlm.config import NOTEBOOKS as RUN_BY
from ctxlm.config import Experiment, read_yaml
from ctxlm.files import ROOT

# Dependencies

CONDA_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
CONDA_NAMES |= {"seaborn-base": "seaborn", "snakemake-minimal": "snakemake"}


def lower_bounds(lines: list[str]) -> dict[str, str | None]:
    """Each package's PyPI name → its lower bound, or None where there is none."""
    bounds: dict[str, str | None] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        assert name not in bounds, f"{name} is listed twice"
        bounds[name] = next((part.version for part in requirement.specifier if part.operator == ">="), None)
    return bounds


def test_both_set_ups_name_the_same_python_and_packages_with_the_same_lower_bounds():
    """The packages of environment.yml, conda's and pip's together, under their PyPI names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    lines = []
    for entry in content["dependencies"]:
        lines += entry["pip"] if isinstance(entry, dict) else [entry]
    lines.remove("-e .")
    bounds = {CONDA_NAMES.get(name, name): bound for name, bound in lower_bounds(lines).items()}
    python = bounds.pop("python")
    bounds.pop("pip")
    assert bounds == lower_bounds(sum(project["optional-dependencies"].values(), project["dependencies"]))
    assert all(bounds.values()), "every package has a lower bound"
    assert project["requires-python"].startswith(f">={python}")


# Notebooks


def parameter_cell(path: Path) -> dict:
    """What the one cell tagged "parameters" assigns: names → literal values."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {}
    for statement in ast.parse(cell.source).body:
        (target,) = statement.targets
        values[target.id] = ast.literal_eval(statement.value)
    return values


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_valid_stripped_and_a_table_of_contents(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs for cell in code)
    assert {cell.execution_count for cell in code} == {None}
    for cell in code:
        compile(cell.source, f"{path.name}:{cell.id}", "exec")
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 30, f"cell {cell.id} belongs in a module"
    committed_only = "04" <= path.stem[:2] <= "08" and path.stem != "04_scaling"
    assert committed_only or parameter_cell(path)


@pytest.mark.parametrize("model", typing.get_args(Experiment.model_fields["model"].annotation))
def test_a_notebook_that_runs_experiments_has_every_parameter_that_its_models_read(model):
    """With its literal default, in whose place papermill puts another."""
    notebook = RUN_BY[model]
    values = parameter_cell(ROOT / notebook)
    cell = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    settings = Experiment.from_namespace(values | {"In": [cell]}, notebook)
    assert set(values) == {"output_dir", *settings.for_notebook()}
    assert set(papermill.inspect_notebook(ROOT / notebook)) == set(values)  # as papermill sees it
    assert settings == Experiment.from_mapping(read_yaml(f"params/{notebook.replace('.ipynb', '.yaml')}"))
    of_model = Experiment.from_namespace(values | {"model": model, "In": [cell]}, notebook)
    assert of_model.model == model and of_model.for_notebook().keys() == settings.for_notebook().keys()


# make


FAKE = """#!/bin/sh
case "$1 $2" in
  "-m venv") echo made >>"{log}"; sleep 1; mkdir -p "$3/bin" "$3/etc/jupyter"; ln -s "$0" "$3/bin/python";;
  "-m "*) ;;
  *) exec "{real}" "$@";;
esac
"""


def test_of_two_that_want_the_environment_one_makes_it(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "jupyterlab.json").touch()
    python = tmp_path / "python"
    python.write_text(FAKE.format(log=tmp_path / "log", real=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    command = ["make", "env", f"PYTHON={python}"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for process in both:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert (tmp_path / "log").read_text().splitlines() == ["made"]


# Imports

FLOORS = [
    {"ctxlm", "ctxlm.files", "ctxlm.progress"},
    {"ctxlm.config"},
    {"ctxlm.corpus"},
    {"ctxlm.device", "ctxlm.embeddings"},
    {"ctxlm.metrics", "ctxlm.model"},
    {"ctxlm.loss", "ctxlm.recurrence"},
    {"ctxlm.memory", "ctxlm.trainer"},
    {"ctxlm.batch", "ctxlm.networks", "ctxlm.ngrams", "ctxlm.phase1", "ctxlm.phase2"},
    {"ctxlm.run", "ctxlm.search"},
    {"ctxlm.generate"},
    {"ctxlm.analysis"},
]


def imports(path: Path) -> set[str]:
    """Full names of the modules a source file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(module: str) -> int:
    package = "ctxlm.analysis" if module.startswith("ctxlm.analysis.") else module
    return next(level for level, members in enumerate(FLOORS) if package in members)


def test_imports_run_one_way():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "ctxlm").rglob("*.py")}
    files = {module.removesuffix(".__init__"): path for module, path in files.items()}
    graph = {module: imports(path) & files.keys() - {"ctxlm", module} for module, path in files.items()}
    for module, imported in graph.items():
        above = {other for other in imported if floor(other) > floor(module)}
        assert not above, f"{module} imports {sorted(above)} from a floor above its own"
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(files) > 30


def test_the_literal_twin_shares_nothing_with_the_package():
    assert {name.split(".")[0] for name in imports(ROOT / "tests" / "literal.py")} == {"math", "torch"}
