"""Documents hold: links lead somewhere, files they name are there, tables are those of the code and the files.

Numbers in prose are held elsewhere.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from ctxlm.analysis.runs import load_planned
from ctxlm.config import Experiment, load_grid, read_yaml
from ctxlm.corpus import VOCABULARY
from ctxlm.files import ROOT
from ctxlm.model import ContextLM

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted((ROOT / "data").glob("**/README.md"))
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What the headings of a document or of a notebook are called in links."""
    text = prose(path)
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_to_what_is_there_and_so_do_names_of_files(path):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    if path.match("LOG.md"):  # they name files as they were called
        return
    named = re.findall(r"`((?:ctxlm|docs|notebooks|params|tests)/[\w./-]+\.\w+)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_grid_is_listed_with_how_many_of_its_runs_are_published(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    listed, states = {}, {}
    text = prose(ROOT / "docs" / "grids.md")
    for names, runs in re.findall(r"^- (`.*?`) \((.*?)\): ", text, flags=re.MULTILINE):
        listed |= dict(zip(names.replace("`", "").split(", "), runs.split(", "), strict=True))
    for grid in (load_grid(path.stem) for path in (ROOT / "params" / "grids").glob("*.yaml")):
        published, planned = len(load_planned(grid)), len(grid.runs)
        states[grid.name] = str(planned) if published == planned else f"{published} of {planned}"
    assert listed == states
    assert [path.name for path in (ROOT / "data" / "results").iterdir() if f"`{path.name}`" not in text] == []


def test_the_table_of_parameters_is_that_of_the_models(monkeypatch):
    monkeypatch.setattr("ctxlm.model.generator", lambda *_: None)  # counted without any weights
    lines = prose(ROOT / "docs" / "method.md").partition("| model |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    stated = {row[0]: row[1:] for row in rows}
    files = {"A": ["A"], "B": ["B"], "A, arithmetic": ["A-arithmetic"], "B, arithmetic": ["B-arithmetic"]}
    files |= {"B, arithmetic, small": ["B-arithmetic-small"]}
    assert stated.keys() == files.keys()
    for label, names in files.items():
        e = Experiment.from_mapping(*(read_yaml(f"params/{name}.yaml") for name in names))
        with torch.device("meta"):
            model = ContextLM(e, torch.empty(VOCABULARY, e.embed_dim))
        counts = (f"{count:,}" for count in model.parameter_counts().values())
        cost = f"{model.cost(1, 1, 0)['flops_per_token'] / 1e6:.1f}"
        assert stated[label] == [*counts, cost, str(e.num_layers), str(e.context_dim)]
