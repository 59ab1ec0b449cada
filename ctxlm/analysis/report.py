"""A grid's executed notebooks as one report that opens from disk: `python -m ctxlm.analysis.report --grid quick`.

`report/index.html` is the analysis without its code; `report/notebooks/` has every executed notebook with it. A page
loads nothing but itself: images and style are inside, and its policy forbids the rest.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from datetime import datetime
from html import escape
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from pygments.formatters import HtmlFormatter

from ctxlm.config import ConfigError, Grid, load_grid
from ctxlm.files import atomic, resolve
from ctxlm.results import git_commit, outputs_dir

NOTEBOOK_ONLY = "notebook-only"
"""Tag of cells that help whoever opens the notebook, and are left out of the index."""

STYLE = """
body { max-width: 60rem; margin: 2rem auto 4rem; padding: 0 1.2rem; color: #1c1c1c; background: #fff;
       font: 1rem/1.55 "Source Sans 3", "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .4rem; }
header { border-bottom: 2px solid #0173b2; margin-bottom: 1.6rem; padding-bottom: .8rem; }
header p { margin: .2rem 0; color: #555; font-size: .92rem; }
a { color: #01598a; }
img { display: block; margin: 1rem auto; max-width: 100%; }
pre, code { font: .84rem/1.45 "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.highlight { background: #f6f7f8; border-left: 3px solid #ccd3d8; padding: .2rem .7rem; margin: .8rem 0 .4rem; }
.output { overflow-x: auto; }
.output_stream { color: #555; }
table { border-collapse: collapse; margin: .9rem auto; font-size: .78rem; line-height: 1.3; border: 0; }
th, td { padding: .3rem .45rem; text-align: right; border: 0; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 1.5px solid #888; white-space: normal; }
th:first-child, td:first-child, nav th, nav td { text-align: left; }
table.wide { font-size: .66rem; } table.wide th, table.wide td { padding: .2rem .25rem; }
nav table { margin-left: 0; font-size: .9rem; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } h2, h3, .text_cell { break-after: avoid; }
  img, table { break-inside: avoid; } img { max-height: 23cm; } .output { overflow: visible; }
  th, td { padding: .15rem .2rem; } main table { font-size: 8pt; }
  main table.wide { font-size: 6.2pt; } a { color: inherit; text-decoration: none; } }
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><header>{header}</header><main>{body}</main></body></html>
"""
NAVIGATION = """<nav><h2 id="notebooks">The executed notebooks, with their code</h2>
<table><tr><th>Notebook</th><th>Run</th></tr>{rows}</table></nav>"""


def build(grid: str, outputs: Path | None = None) -> Path:
    """Write `report/` of a grid from its executed notebooks; it replaces the earlier one only when complete.

    Args:
        grid: a grid's name or file. outputs: where its folder is; by default as `results.outputs_dir`.

    Raises:
        ConfigError: the analysis is missing or failed, or a notebook is not readable.
    """
    settings = load_grid(grid)
    home = (outputs or outputs_dir()) / settings.name
    analysis = _read(home / "analysis.ipynb", f"run `make report GRID={grid}` first")
    runs = _finished_runs(analysis, home / "analysis.ipynb")
    experiments = (home / run / "experiment.ipynb" for run in settings.runs)  # not those the grid no longer asks for
    others = [*sorted(home.glob("corpus*/corpus.ipynb")), *(path for path in experiments if path.exists())]
    staging = Path(tempfile.mkdtemp(dir=home, prefix=".report-"))
    try:
        staging.chmod(0o755)  # mkdtemp makes folders private; a report is for everyone
        (staging / "notebooks").mkdir()
        rows = []
        for path in [*others, home / "analysis.ipynb"]:
            name = path.stem if path.parent == home else path.parent.name
            notebook = _read(path, "delete it and run the grid again")
            title = _title(notebook, path)
            header = (
                f'{escape(name)} · <a href="../index.html">{escape(settings.title)}</a> (grid {escape(settings.name)})'
            )
            page = _page(f"{title}: {name}", f"<p>{header}</p>", _body(notebook, code=True))
            (staging / "notebooks" / f"{name}.html").write_text(page, encoding="utf-8")
            note = "" if path.stem != "experiment" or path.with_name("metrics.json").exists() else " (not finished)"
            link = f'<a href="notebooks/{quote(name)}.html">{escape(name)}</a>{note}'
            rows.append(f"<tr><td>{escape(title)}</td><td>{link}</td></tr>")
        body, contents = _with_contents(_body(analysis, code=False))
        page = _page(settings.title, _header(settings, runs) + contents, body + NAVIGATION.format(rows="".join(rows)))
        (staging / "index.html").write_text(page, encoding="utf-8")
        _replace(home / "report", staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return home / "report" / "index.html"


def build_page(path: Path) -> Path:
    """Write one executed notebook, without its code, as a page beside it.

    Raises:
        ConfigError: it is missing or not readable.
    """
    notebook = _read(path, "run it first")
    title = _title(notebook, path)
    page = _page(title, f"<p>{escape(_written())}</p>", _body(notebook, code=False))
    with atomic(path.with_suffix(".html")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path.with_suffix(".html")


def _header(settings: Grid, runs: int) -> str:
    facts = f"{runs} finished run{'' if runs == 1 else 's'} · grid {settings.name} · {_written()}"
    lines = "".join(f"<p>{escape(line)}</p>" for line in (settings.description, facts))
    return f"<h1>{escape(settings.title)}</h1>{lines}"


def _with_contents(body: str) -> tuple[str, str]:
    """A page's body, every section of which can now be linked to, and the links."""
    links = []

    def numbered(heading: re.Match) -> str:
        anchor = f"section-{len(links) + 1}"
        links.append(f'<a href="#{anchor}">{heading[1]}</a>')
        return f'<h2 id="{anchor}">{heading[1]}</h2>'

    body = re.sub("<h2>(.*?)</h2>", numbered, body, flags=re.DOTALL)
    links.append('<a href="#notebooks">The notebooks with their code</a>')
    return body, f"<p>{' · '.join(links)}</p>"


def _written() -> str:
    commit, _, changed = (git_commit() or "unknown").partition("-")
    return f"written {datetime.now().astimezone():%d %B %Y, %H:%M %Z} · commit {commit[:12]}{changed and ', changed'}"


def _read(path: Path, remedy: str) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ConfigError(f"{path} is not a readable notebook ({str(error).splitlines()[0]}): {remedy}") from None


def _finished_runs(notebook: nbformat.NotebookNode, path: Path) -> int:
    """How many runs the analysis read; refuses an analysis that failed or did not come to its end."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for error in (output for output in cell.outputs if output.output_type == "error"):
            raise ConfigError(f"{path} ended in {error.ename} ({error.evalue}): open it to see where")
        if cell.execution_count is None and cell.source.strip():
            raise ConfigError(f"{path} was not run to its end: run it again")
    try:
        return len(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["runs"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"{path.with_suffix('.json')} is missing or damaged: run the analysis again") from None


def _title(notebook: nbformat.NotebookNode, path: Path) -> str:
    """The notebook's first heading, or its file's name."""
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), path.stem)


def _body(notebook: nbformat.NotebookNode, code: bool) -> str:
    """The notebook's cells as HTML; figures are described by the heading above them."""
    if not code:
        kept = [cell for cell in notebook.cells if NOTEBOOK_ONLY not in cell.metadata.get("tags", [])]
        notebook = nbformat.v4.new_notebook(cells=kept, metadata=notebook.metadata)
    heading = ""
    for cell in notebook.cells:
        headings = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
        heading = headings[-1] if cell.cell_type == "markdown" and headings else heading
        cell.metadata["alt"] = heading or "figure"
    exporter = HTMLExporter(
        template_name="basic",
        preprocessors=[CoalesceStreamsPreprocessor],  # of a progress bar, its last state
        exclude_input=not code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        embed_images=True,
        mathjax_url="",
        require_js_url="",
    )
    return exporter.from_notebook_node(notebook)[0]


def _page(title: str, header: str, body: str) -> str:
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    return PAGE.format(title=escape(title), style=style, header=header, body=body)


def _replace(report: Path, staging: Path) -> None:
    """Move `staging` to `report`, putting the earlier report back if that fails."""
    earlier = staging.with_name(f"{staging.name}-earlier")
    if report.exists():
        report.rename(earlier)
    try:
        staging.rename(report)
    except OSError:
        if earlier.exists():
            earlier.rename(report)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build a grid's report from its executed notebooks.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--grid", default="quick", help="name of the grid, or its file")
    what.add_argument("--notebook", help="an executed notebook to make a page of, instead")
    parser.add_argument("--outputs", help="folder of all grids' outputs; by default outputs, or CTXLM_OUTPUTS")
    options = parser.parse_args(arguments)
    try:
        if options.notebook:
            print(build_page(resolve(options.notebook)))
            return 0
        print(build(options.grid, resolve(options.outputs) if options.outputs else None))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
