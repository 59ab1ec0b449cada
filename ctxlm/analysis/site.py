"""Executed notebooks and committed runs as an offline site of short pages.

    python -m ctxlm.analysis.site --grid quick      a grid's own runs: outputs/quick/report/
    python -m ctxlm.analysis.site --all             everything that is committed, without training: outputs/site/
    python -m ctxlm.analysis.site --notebook PATH   one executed notebook: a page beside it

A page loads nothing but itself: style, images and the few lines that sort a table are inside, and its policy forbids
the rest. What a page says is written in the notebooks and in `docs/`; here it is only laid out.
"""

import argparse
import base64
import hashlib
import json
import math
import mimetypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
from bs4 import BeautifulSoup, NavigableString, Tag
from filelock import FileLock
from jinja2 import Environment, FileSystemLoader, Undefined
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode

from ctxlm.analysis.runs import load_planned, load_runs, load_table
from ctxlm.batch import failures, say
from ctxlm.config import ConfigError, load_grid
from ctxlm.files import ROOT, atomic, resolve
from ctxlm.results import git_commit, outputs_dir, results_dir

NOTEBOOK_ONLY = "notebook-only"
"""Tag of cells that help whoever opens the notebook, and are left out of its page."""
MOST_ON_A_PHONE = 800
"""Pixels; the labels of a figure of fewer can be read where it is 358 wide."""
ANSWER, MAIN_FIGURE = "answer", "main-figure"
"""Tags of the cells whose output is a grid's table of headline estimates, and its main figure."""
FINDING = "finding"
"""Tag of cells that say what committed runs showed: they have no place in the report of a user's own."""
ANALYSIS = "04_scaling"
"""The notebook that is run on every grid."""
PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    ANALYSIS: (ANALYSIS, {}),
    "04_as_studied": (ANALYSIS, {"grid": "study"}),
    "04_quick_scale": (ANALYSIS, {"grid": "sound-variance"}),
    **{name: (name, {}) for name in ("04_chance", "05_overfitting", "06_contexts", "07_alternatives", "08_audit")},
}
"""The article's pages in their order: name → the notebook it is made of, and parameters that are given to that."""
DOCS = ("method", "literature", "parameters", "results")
"""Files of `docs` that are pages; the navigation has the first."""
LONGEST = 30
"""Rows that a notebook's table may have and stay open."""
TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
"""Content-Security-Policy of every page: nothing from anywhere, and no script but the site's own."""
ACTIVE = "script iframe object embed link meta base form".split()
"""Elements that an output may hold and a page does not: they load or run something."""
CURVES = {"training": "train_ppl", "validation": "val_ppl"}
"""What a run's small curve shows: the line's name, and the metric."""
Link = tuple[str, str]
"""A label, and a page's path from the site's first folder."""


@dataclass
class Site:
    """Pages below one folder, with the same navigation on each."""

    folder: Path
    name: str
    """What follows a page's own title."""
    navigation: Sequence[Link] = ()
    strict: bool = False
    """Whether a link to a page that is not there is refused."""

    def write(self, path: str, template: str, title: str, **values: Any) -> None:
        """Write a page from a template; `path` is its own, from the site's first folder."""
        values |= {"title": title, "here": path, "root": "../" * path.count("/")}
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(template, site=self.name, navigation=self.navigation, **values), encoding="utf-8")

    def write_notebook(self, path: str, notebook: NotebookNode, title: str, **values: Any) -> None:
        """Write a notebook's page; a link that is refused is that of this page."""
        try:
            body = tidy(cells_html(notebook), partial(self.link, root="../" * path.count("/")))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        self.write(path, "notebook.html", title, body=body, **values)

    def link(self, href: str, root: str = "") -> str | None:
        """A link of a notebook or of Markdown as its page has it; None: what it leads to has no page, so it is none.

        A notebook and a Markdown file are named by their files, or as pages.

        Raises:
            ConfigError: the site is strict, and the link names a page that is not there.
        """
        parts = urlsplit(href)
        anchor = f"#{slug(unquote(parts.fragment))}" if parts.fragment else ""
        if parts.scheme or parts.netloc:
            return href
        if not parts.path:
            return anchor
        name = PurePosixPath(parts.path)
        if name.name == "index.ja.md":
            return f"{root}index.html#summary-in-japanese"
        pages = {path for _, path in self.navigation} | {f"{doc}.html" for doc in DOCS if self.strict}
        if name.suffix in (".html", ".ipynb", ".md") and f"{name.stem}.html" in pages:
            return f"{root}{name.stem}.html{anchor}"
        if self.strict and name.suffix == ".html":
            raise ConfigError(f"{href} is no page of this site: correct the link")
        return None


@dataclass(frozen=True)
class Run:
    """A finished run: the content of its metrics.json, and its learning curve as `_curve` draws it."""

    grid: str
    name: str
    metrics: Mapping[str, Any]
    curve: list[tuple[str, list[tuple[float, float]]]]

    @property
    def minutes(self) -> float | None:
        seconds = self.metrics.get("total_seconds")
        return None if seconds is None else seconds / 60


# A grid's own report


def build(grid: str) -> Path:
    """Run the analysis of a grid's finished runs and write its `report/`, which replaces the earlier one when whole.

    Where the analysis fails, its earlier result stays, and the report says why.

    Args:
        grid: a grid's name or file.

    Raises:
        ConfigError: no run is finished.
    """
    settings, outputs = load_grid(grid), outputs_dir()
    home = outputs / settings.name
    runs = _listed(settings.name, load_planned(settings), load_table(settings.name, "history"))
    absent = [name for name in settings.runs if name not in {run.name for run in runs}]
    missing = dict.fromkeys(absent, "what is there is of other parameters") | failures(home, absent)
    if not runs:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise ConfigError(f"no run of grid {settings.name} is finished: {reasons}")
    failure = _analyse(grid, home)
    corpora = sorted(home.glob("corpus*/corpus.ipynb"))
    pages = [(_label(path.parent.name), f"{path.parent.name}.html") for path in corpora]
    if (analysed := home / f"{ANALYSIS}.ipynb").exists():
        pages.insert(0, (_label(ANALYSIS), f"{ANALYSIS}.html"))
    navigation, more = [("Index", "index.html"), *pages, ("Runs", "index.html#runs")], list(pages)
    if (outputs / "site" / "index.html").exists():
        more.append(("Committed findings", "../../site/index.html"))
        navigation.append(more[-1])
    with _staged(home / "report") as folder:
        site, answer = Site(folder, settings.title, navigation), ""
        for path in corpora:
            notebook = _read(path, f"run `make report GRID={grid}` again")
            site.write_notebook(f"{path.parent.name}.html", notebook, _title(notebook, path.stem))
        if analysed.exists():
            analysis = _without(_read(analysed, "delete it"), FINDING)
            site.write_notebook(f"{ANALYSIS}.html", analysis, _title(analysis, ANALYSIS))
            answer = tidy(cells_html(_tagged(analysis, ANSWER, MAIN_FIGURE)), site.link)
        values = {"answer": answer, "failure": failure, "runs": runs, "missing": missing, "links": more}
        site.write("index.html", "grid.html", settings.title, description=settings.description, **values)
    for line in (failure, *(f"{name}: {why}" for name, why in missing.items())):
        if line:
            print(line)
    return home / "report" / "index.html"


def _analyse(grid: str, home: Path) -> str:
    """Run the analysis on a grid's runs, into `home`; returns why it failed, or ""."""
    home.mkdir(parents=True, exist_ok=True)
    target = home / f".{ANALYSIS}.ipynb"
    try:
        _execute(ANALYSIS, {"grid": grid, "output_dir": str(home)}, target)
        target.replace(home / f"{ANALYSIS}.ipynb")
    except ConfigError as error:
        target.unlink(missing_ok=True)
        status = ["git", "status", "--porcelain", "--", f"notebooks/{ANALYSIS}.ipynb"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True).stdout
        hint = f"; it differs from the commit: `git checkout notebooks/{ANALYSIS}.ipynb` puts it back"
        return f"{error}{hint if changed else ''}"
    return ""


# The site of all that is committed


def build_all(outputs: Path | None = None) -> Path:
    """Write `site/`: the article, its notebooks executed anew, and a table of all committed runs.

    Args:
        outputs: where it is written; by default as `results.outputs_dir`.

    Raises:
        ConfigError: a notebook failed, or a page cannot be made: which and why. The earlier site stays.
    """
    docs, outputs = ROOT / "docs", outputs or outputs_dir()
    for name in ("index", "index.ja", *DOCS):  # before a minute is spent
        _title_of(docs / f"{name}.md")
    outputs.mkdir(parents=True, exist_ok=True)
    with _staged(outputs / "site") as folder:
        executed = _execute_all(folder / "notebooks")
        pages = [(_label(name), f"{name}.html") for name in executed]
        navigation = [("Index", "index.html"), *pages, ("Runs", "runs.html"), ("Method", "method.html")]
        site = Site(folder, _title_of(docs / "index.md"), navigation, strict=True)
        grids = sorted(path.name for path in results_dir().iterdir())
        tables = [
            (name, load_runs(name, committed=True), load_table(name, "history", committed=True)) for name in grids
        ]
        runs = [run for table in tables for run in _listed(*table)]
        site.write("runs.html", "committed.html", "Runs", runs=runs)
        around = [None, *navigation, None]
        turns = {page[1]: {"before": around[k], "after": around[k + 2]} for k, page in enumerate(navigation)}
        for name, notebook in executed.items():
            page, title = f"{name}.html", _title(notebook, name)
            if PAGES[name][1]:  # of other runs than the findings are about
                notebook, title = _without(notebook, FINDING), f"{_label(name)}: {title}"
            site.write_notebook(page, notebook, title, kicker=_label(name), **turns[page])
        for name in DOCS:
            page, words = f"{name}.html", _markdown(docs / f"{name}.md", site.link, executed)
            site.write(page, "page.html", _title_of(docs / f"{name}.md"), body=words, **turns.get(page, {}))
        words, japanese = (_markdown(docs / f"index{suffix}", site.link, executed) for suffix in (".md", ".ja.md"))
        site.write("index.html", "article.html", site.name, body=words, japanese=japanese, after=navigation[1])
        # The index's first figure is the README's, too: `make docs` copies it.
        first = re.search(r"!\[[^]]*\]\(([^)]+)\)", (docs / "index.md").read_text(encoding="utf-8"))
        figure = _image(first[1] if first else f"{ANALYSIS}#{MAIN_FIGURE}", docs, executed)
        (folder / "answer.png").write_bytes(base64.b64decode(figure.partition(",")[2]))
        _check_links(folder)
    return outputs / "site" / "index.html"


def _execute_all(folder: Path) -> dict[str, NotebookNode]:
    """Run the notebooks of `PAGES`, two at a time, into a folder. Returns page → executed notebook.

    Raises:
        ConfigError: some failed: a sentence for each.
    """
    folder.mkdir()
    failures = []

    def execute(page: str) -> NotebookNode | None:
        began = time.monotonic()
        try:
            # runs in `outputs` would stand in for committed ones
            notebook = _execute(*PAGES[page], folder / f"{page}.ipynb", folder)
        except ConfigError as error:
            failures.append(str(error))
            return None
        print(f"{page} {time.monotonic() - began:.0f} s", end="; ", file=sys.stderr, flush=True)
        return notebook

    with ThreadPoolExecutor(2) as pool:
        executed = dict(zip(PAGES, pool.map(execute, PAGES), strict=True))
    print(file=sys.stderr)
    if failures:
        raise ConfigError("; ".join(sorted(failures)))
    return executed


def _execute(name: str, parameters: Mapping[str, Any], target: Path, outputs: Path | None = None) -> NotebookNode:
    """Run a notebook, with another folder of `outputs`; one whose kernel did not start is run again."""
    source = ROOT / "notebooks" / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", "--cwd", ROOT, "-k", "python3", "--no-progress-bar"]
    command += [source, target, "-y", json.dumps(parameters)]
    for _ in range(2):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CTXLM_OUTPUTS": str(outputs)} if outputs else {})
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode == 0:
            return _read(target, "run it by hand to see why")
        if failure := target.exists() and _failure(_read(target, "run it by hand to see why")):
            break
    why = failure or (process.stderr.strip().splitlines() or ["no word of why"])[-1]
    raise ConfigError(f"notebooks/{name}.ipynb ended in {why}: open it and run it to see where")


def _check_links(folder: Path) -> None:
    """Refuse links within the site that lead nowhere."""
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    anchors = {path: {"", *re.findall(r'\sid="([^"]*)"', text)} for path, text in texts.items()}
    for path, text in texts.items():
        for href in set(re.findall(r'<a [^>]*href="([^"]*)"', text)):
            parts = urlsplit(unquote(href))
            target = Path(os.path.normpath(path.parent / parts.path)) if parts.path else path
            if not parts.scheme and parts.fragment not in anchors.get(target, ()):
                raise ConfigError(f"{path.relative_to(folder)} links to {href}, which is not there: correct the link")


# Runs


def _listed(grid: str, runs: pd.DataFrame, history: pd.DataFrame) -> list[Run]:
    """Runs of a grid as its table shows them, from what `load_runs` and `load_table` give."""
    curves = history[(history["phase"] == "phase2") & history["metric"].isin(["train_ppl", "val_ppl"])]
    by_run = dict(iter(curves.groupby("run", observed=True)))
    return [Run(grid, row["run"], row.dropna().to_dict(), _curve(by_run.get(row["run"]))) for _, row in runs.iterrows()]


def _curve(rows: pd.DataFrame | None) -> list[tuple[str, list[tuple[float, float]]]]:
    """Training and validation PPL by epoch, logarithmic, as points in a drawing of 100 by 30; none of an n-gram."""
    if rows is None:
        return []
    wide = np.log(rows.pivot(index="step", columns="metric", values="value").astype(float))
    low, span = wide.min(axis=None), np.ptp(wide.to_numpy()) or 1.0
    x = 3 + 94 * (wide.index - wide.index[0]) / max(wide.index[-1] - wide.index[0], 1)
    y = 27 - 24 * (wide - low) / span
    return [(name, [*zip(x.round(1), y[column].round(1), strict=True)]) for name, column in CURVES.items()]


# Notebooks and Markdown as HTML


def build_page(path: Path) -> Path:
    """Write one executed notebook as a page beside it.

    Raises:
        ConfigError: it is missing or not readable.
    """
    notebook = _read(path, "run it first")
    body = tidy(cells_html(notebook), Site(path.parent, "").link)
    with atomic(path.with_suffix(".html")) as temporary:
        temporary.write_text(render("notebook.html", title=_title(notebook, path.stem), body=body), encoding="utf-8")
    return path.with_suffix(".html")


def render(template: str, **values: Any) -> str:
    """One of `templates/`, with what every page has: policy, style, script, when it was written."""
    return _templates().get_template(template).render(**_common(), **values)


@cache
def _common() -> dict[str, Any]:
    style = Markup((TEMPLATES / "ctxlm" / "style.css").read_text(encoding="utf-8"))
    commit, _, changed = (git_commit() or "unknown").partition("-")
    written = (
        f"Written {datetime.now().astimezone():%d %B %Y, %H:%M %Z} · commit {commit[:12]}{changed and ', changed'}"
    )
    return {"policy": POLICY, "script": Markup(SCRIPT), "style": style, "written": written}


@cache
def _templates() -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["under"] = lambda path, root: root + quote(path, safe="/#")
    environment.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    return environment


def _number(value: Any, digits: int = 0, factor: float = 1, unit: str = "", sign: bool = False) -> str:
    """A number as it is printed; a dash where there is none."""
    if isinstance(value, Undefined) or value is None or not math.isfinite(value):
        return "–"
    return f"{factor * value:{'+' if sign else ''},.{digits}f}{unit}".replace("-", "−").replace(" ", "\u00a0")


def cells_html(notebook: NotebookNode) -> str:
    """A notebook's cells: code folded above its output, figures described; without what is tagged `NOTEBOOK_ONLY`.

    A figure is described by its cell's metadata `alt`, or by the heading above it.
    """
    kept, heading = _kept(notebook), ""
    for cell in kept:
        if cell.cell_type == "markdown":
            headings = [line for line in cell.source.splitlines() if re.match("#+ ", line)]
            heading = re.sub("[`*]", "", headings[-1].lstrip("# ")) if headings else heading
        if cell.cell_type != "code":
            continue
        # a progress bar stands between lines that belong together
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        figures = [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
        for k, output in enumerate(figures, 1):
            alt = cell.metadata.get("alt") or heading or "figure"
            output.metadata["alt"] = alt if len(figures) == 1 else f"{alt} ({k} of {len(figures)})"
    exporter = HTMLExporter(
        template_name="ctxlm",
        extra_template_basedirs=[str(TEMPLATES)],
        preprocessors=[CoalesceStreamsPreprocessor],  # of a progress bar, its last state
        exclude_anchor_links=True,
        mathjax_url="",
        require_js_url="",
    )
    kept = nbformat.v4.new_notebook(cells=kept, metadata=notebook.metadata)
    return exporter.from_notebook_node(kept, {"cells_only": True})[0]


def tidy(html: str, link: Callable[[str], str | None], below: bool = False) -> Markup:
    """HTML of a notebook or of Markdown as the site shows it.

    Headings have ids, links lead to pages, tables scroll in a box of their own, nothing loads or runs anything; with
    `below`, headings stand a level lower.
    """
    soup = BeautifulSoup(html, "html.parser")
    for tag in [*soup(ACTIVE), *soup(class_="anchor-link")]:
        tag.decompose()
    taken: set[str] = set()
    for tag in soup(["h1", "h2", "h3", "h4", "h5"]):
        name = slug(tag.get_text()) or "section"
        tag["id"] = next(own for own in (name, *(f"{name}-{k}" for k in range(1, 99))) if own not in taken)
        taken.add(tag["id"])
        if below:
            tag.name = f"h{int(tag.name[1]) + 1}"
    for tag in soup("a", href=True):
        href = link(tag["href"])
        if href is None:
            tag.unwrap()
        else:
            tag["href"] = href
    for tag in soup.select(".output > br"):  # of the notes below a regression's tables
        tag.replace_with(" ")
    for tag in soup("img"):
        tag["alt"] = tag.get("alt") or "figure"
        if 0 < _pixels_wide(str(tag.get("src"))) < MOST_ON_A_PHONE:
            tag["class"] = "narrow"
        else:
            tag.parent["tabindex"] = "0"  # on a phone it scrolls, so that its labels can be read
    for tag in soup("table"):
        del tag["border"]
        _align(tag)
        rows = len(tag("tr"))
        if not tag.find_parent(class_="output"):
            tag.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
        elif rows > LONGEST and "simpletable" not in tag.get("class", []):
            folded = tag.wrap(soup.new_tag("details"))
            folded.insert(0, soup.new_tag("summary", string=f"{rows} rows"))
    for tag in soup(class_=["output", "scroll"]):
        if tag.find("table") or tag.find("pre"):
            tag["tabindex"] = "0"  # so that a keyboard can scroll it
    for text in soup.find_all(string=re.compile(r"(^|\d) %")):
        if type(text) is NavigableString and not text.find_parent(["pre", "code"]):  # no comment, which would be seen
            text.replace_with(re.sub(r"(^|\d) %", "\\1\u00a0%", text))  # no line ends between the two
    return Markup(str(soup))


def _pixels_wide(src: str) -> int:
    """The width of a PNG in a data URI, from its header; 0 of anything else."""
    head = base64.b64decode(src.partition("base64,")[2][:32]) if src.startswith("data:image/png") else b""
    return int.from_bytes(head[16:20])


def _align(table: Tag) -> None:
    """Mark columns of text, which stand on the left (numbers on the right), and those of long text."""
    if table.find(colspan=True) or table.find(rowspan=True) or "simpletable" in table.get("class", []):
        return
    rows = [row(["th", "td"]) for row in table("tr")]
    bodies = [cells for cells in rows if cells and cells[-1].name == "td"]
    for k in range(max(map(len, rows), default=0)):
        words = [cells[k].get_text(strip=True) for cells in bodies if len(cells) > k]
        long = max(map(len, words), default=0) > 40
        # a number may have a unit; a sentence that begins with one is no number
        if long or sum(not re.match(r"[-+−]?[\d.]", word) for word in words if word) * 2 > sum(map(bool, words)):
            kind = ["text", "long"] if long else ["text"]
            for cells in (cells for cells in rows if len(cells) > k):
                cells[k]["class"] = [*cells[k].get("class", []), *kind]


def slug(text: str) -> str:
    """A heading's id, as GitHub makes it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def _markdown(path: Path, link: Callable[[str], str | None], notebooks: Mapping[str, NotebookNode]) -> Markup:
    """A Markdown file as HTML, with the images it names: files beside it, or `notebook#tag`, the figure of a cell.

    Raises:
        ConfigError: it cannot be read, or names an image or a page that is not there.
    """
    try:
        soup = BeautifulSoup(markdown2html(path.read_text(encoding="utf-8")), "html.parser")
        for tag in soup("img"):
            tag["src"] = _image(tag["src"], path.parent, notebooks)
        return tidy(str(soup), link, below=path.name == "index.ja.md")  # it is a section of another page
    except (OSError, ConfigError) as error:
        raise ConfigError(f"docs/{path.name}: {getattr(error, 'strerror', None) or error}") from None


def _image(src: str, folder: Path, notebooks: Mapping[str, NotebookNode]) -> str:
    """An image as a data URI."""
    name, _, tag = src.partition("#")
    if name in notebooks:
        for output in (output for cell in _tagged(notebooks[name], tag).cells for output in cell.outputs):
            if "image/png" in output.get("data", {}):
                return f"data:image/png;base64,{output.data['image/png'].strip()}"
        raise ConfigError(f"{name} has no figure in a cell tagged {tag!r}")
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"the image {src} is neither a file nor a figure of a notebook of this site")
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _read(path: Path, remedy: str) -> NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ConfigError(f"{path} is not a readable notebook ({str(error).splitlines()[0]}): {remedy}") from None


def _kept(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if NOTEBOOK_ONLY not in cell.metadata.get("tags", [])]


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _without(notebook: NotebookNode, tag: str) -> NotebookNode:
    """The notebook without its cells that have a tag."""
    kept = [cell for cell in notebook.cells if tag not in cell.metadata.get("tags", [])]
    return nbformat.v4.new_notebook(cells=kept, metadata=notebook.metadata)


def _tagged(notebook: NotebookNode, *tags: str) -> NotebookNode:
    """The outputs of the cells that have one of these tags, as a notebook without code."""
    cells = [cell for tag in tags for cell in _code(notebook) if tag in cell.metadata.get("tags", [])]
    bare = [nbformat.v4.new_code_cell(outputs=cell.outputs, metadata=cell.metadata) for cell in cells]
    return nbformat.v4.new_notebook(cells=bare, metadata=notebook.metadata)


def _failure(notebook: NotebookNode) -> str | None:
    """The error that a notebook ended in, as "ValueError (no sizes)"."""
    errors = (o for cell in _code(notebook) for o in cell.outputs if o.output_type == "error")
    return next((f"{error.ename} ({' '.join(error.evalue.split())})" for error in errors), None)


def _title(notebook: NotebookNode, otherwise: str) -> str:
    """The first heading that its page has."""
    return _heading("\n".join(cell.source for cell in _kept(notebook) if cell.cell_type == "markdown")) or otherwise


def _title_of(path: Path) -> str:
    try:
        return _heading(path.read_text(encoding="utf-8")) or path.stem
    except OSError as error:
        raise ConfigError(f"docs/{path.name} cannot be read ({error.strerror})") from None


def _heading(markdown: str) -> str | None:
    lines = (line for line in markdown.splitlines() if re.match("#+ ", line))
    return next((re.sub("<!--.*?-->|[`*]", "", line.lstrip("# ")).strip() for line in lines), None)


def _label(name: str) -> str:
    """A page's name in the navigation: "05_overfitting" → "Overfitting"."""
    return re.sub(r"^\d+_", "", name).replace("_", " ").replace("-", " ").capitalize()


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` once the block has ended without an error; else the earlier one stays.

    Of several processes that want it, one is at it and the others wait.
    """
    with FileLock(target.with_name(f".lock-{target.name}")):
        for left in target.parent.glob(f".{target.name}-*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        with _staging(target) as staging:
            yield staging


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        staging.chmod(0o755)  # mkdtemp makes folders private; a site is for everyone
        yield staging
        _replace(target, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(target: Path, staging: Path) -> None:
    """Move `staging` to `target`, putting the earlier one back if that fails."""
    earlier = staging.with_name(f"{staging.name}-earlier")
    if target.exists():
        target.rename(earlier)
    try:
        staging.rename(target)
    except OSError:
        if earlier.exists():
            earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make pages of executed notebooks and of committed runs.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--grid", default="quick", help="name of a grid that was run, or its file")
    what.add_argument("--all", action="store_true", help="the site of everything that is committed, instead")
    what.add_argument("--notebook", help="an executed notebook to make a page of, instead")
    options = parser.parse_args(arguments)
    try:
        if options.notebook:
            say(str(build_page(resolve(options.notebook))))
        else:
            say(str(build_all() if options.all else build(options.grid)))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
