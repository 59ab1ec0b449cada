"""Executed notebooks and committed runs as an offline site of short pages.

    python -m ctxlm.analysis.site --grid quick   a grid's own runs: outputs/quick/report/
    python -m ctxlm.analysis.site --all          everything that is committed, without training: outputs/site/

A page loads nothing but itself: style, images and the few lines that sort a table are inside, and its policy forbids
the rest. What a page says is written in the notebooks and in `docs/`; how it looks, in `templates/`.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
from bs4 import BeautifulSoup
from filelock import FileLock
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, TagRemovePreprocessor
from nbformat import NotebookNode
from tqdm.contrib.concurrent import thread_map

from ctxlm.analysis.runs import load_planned, load_runs, load_table, stopped_early
from ctxlm.batch import corpora, print_line, state
from ctxlm.config import ConfigError, Grid, load_grid
from ctxlm.files import ROOT, atomic, outputs_dir, results_dir
from ctxlm.run import git_commit

NOTEBOOK_ONLY = "notebook-only"
"""Tag of cells that help whoever opens the notebook, and are left out of its page."""
FINDING = "finding"
"""Tag of cells that say what committed runs showed: they have no place on a page of other runs."""
COMMITTED = "committed"
"""Tag of cells that say what committed runs are: they have no place in the report of a grid."""
PROVENANCE = "provenance"
"""Tag of cells whose table says how runs were made: a page shows it on demand."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
"""What the article is printed by, the first that there is."""
SHARED = ("corpus", "embedding", "embed_dim", "dtype", "device")
"""What a report says once of all its runs, where it is the same for them."""
ANALYSIS = "04_scaling"
"""The notebook that is run on every grid."""
PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    ANALYSIS: (ANALYSIS, {}),
    "04_as_studied": (ANALYSIS, {"grid": "study"}),
    "04_quick_scale": (ANALYSIS, {"grid": "stabilised-variance"}),
    **{name: (name, {}) for name in ("04_sites", "04_what_decides", "04_chance", "05_overfitting", "06_contexts")},
    **{name: (name, {}) for name in ("07_alternatives", "08_audit")},
}
"""The article's pages in their order: name → the notebook it is made of, and parameters that are given to that."""
DOCS = ("method", "index.ja", "plan", "literature", "parameters", "results")
"""Files of `docs` that are pages; the navigation has the first two."""
PLACES = {"../data/results": "runs.html"}
"""Where the site has what links of `docs/index.md` lead to in the repository."""
TEMPLATES = Path(__file__).parent / "templates"


def build(grid: str) -> Path:
    """Run the analysis of a grid's finished runs and write its `report/`, which replaces the earlier one when whole.

    Where the analysis fails, its earlier result stays, and the report says so.

    Args:
        grid: a grid's name or file.

    Raises:
        ConfigError: no run is finished; or the analysis failed, once the report is written.
    """
    settings, outputs = load_grid(grid), outputs_dir()
    home, runs = outputs / settings.name, load_planned(settings)
    committed = {*runs["run"][runs["source"] == "committed"]} if len(runs) else set()
    states = {name: state(home / name, run) for name, run in settings.runs.items()}
    states = {name: words for name, words in states.items() if name not in committed or words[0] != "to come"}
    missing = {name: ": ".join(filter(None, words)) for name, words in states.items() if words[0] != "finished"}
    missing |= {name: f"{why}; its published result stands here" for name, why in missing.items() if name in committed}
    reasons = [f"{name}: {why}" for name, why in missing.items()]
    if runs.empty:
        raise ConfigError(f"no run of grid {settings.name} is finished: {'; '.join(reasons)}")
    failure = ""
    try:
        with atomic(home / f"{ANALYSIS}.ipynb") as target:
            _execute(ANALYSIS, {"grid": grid, "output_dir": str(home)}, target, outputs)
    except ConfigError as error:
        failure = str(error)
    sources = {ANALYSIS: home / f"{ANALYSIS}.ipynb"}
    sources |= {name: home / name / "corpus.ipynb" for name in corpora(settings.runs.values())}
    notebooks = {name: nbformat.read(path, as_version=4) for name, path in sources.items() if path.exists()}
    navigation = {"index.html": "Index"} | {f"{name}.html": _label(name) for name in notebooks}
    navigation |= {"index.html#runs": "Runs"}
    if (outputs / "site" / "index.html").exists():
        navigation |= {"../../site/index.html": "Committed findings"}
    with _replaced(home / "report") as folder:
        common, answer = {"site": settings.title, "navigation": navigation}, []
        for name, notebook in notebooks.items():
            body = page_body(cells_html(notebook, COMMITTED, FINDING), navigation)
            answer += body.select(".answer") + body.select(".main-figure")
            _write(folder / f"{name}.html", body=body, **common)
        common |= {"title": settings.title, "description": settings.description, "failure": failure}
        settings_of_all = runs.reindex(columns=SHARED).convert_dtypes()
        common |= {"shared": {n: c.dropna().iloc[0] for n, c in settings_of_all.items() if c.nunique() == 1}}
        common["compared"] = _compared(settings)
        listed = _listed(runs, load_table(settings.name, "history"))
        _write(folder / "index.html", "runs.html", answer=answer, runs=listed, missing=missing, **common)
    for line in reasons:
        print_line(line)
    index = home / "report" / "index.html"
    if failure:
        raise ConfigError(f"{failure}\nThe report has the runs, and what an earlier analysis said of them: {index}")
    return index


def build_all() -> Path:
    """Write `site/`: the article, its notebooks executed anew, and a table of all committed runs.

    Raises:
        ConfigError: a notebook failed: which and why. The earlier site stays.
    """
    target = outputs_dir() / "site"
    with _replaced(target) as folder:
        executed = _execute_all(folder / "notebooks")
        navigation = {"index.html": "Index"} | {f"{name}.html": _label(name) for name in executed}
        navigation |= {"runs.html": "Runs", "method.html": "Method", "index.ja.html": "日本語"}
        pages = {*navigation, *(f"{name}.html" for name in DOCS)}
        bodies = {name: page_body(_document(name), pages) for name in ("index", *DOCS)}
        for name, notebook in executed.items():
            without = [FINDING] if PAGES[name][1] else []  # of other runs than the findings are about
            bodies[name] = page_body(cells_html(notebook, *without), pages)
        for image in (image for name in ("index", *DOCS) for image in bodies[name]("img")):
            page, _, tag = image.get("title", "").partition("#")  # names the page and the tag of a figure's cell
            source = ROOT / "docs" / image["src"]
            if page in executed and (figure := bodies[page].select_one(f".{tag} img")):
                # The documents show the committed one: `make docs` copies it.
                (folder / source.name).write_bytes(base64.b64decode(figure["src"].partition(",")[2]))
                image.attrs = figure.attrs | {"alt": image["alt"]}
            elif source.suffix == ".svg" and source.is_file():
                image["src"] = f"data:image/svg+xml;base64,{base64.b64encode(source.read_bytes()).decode()}"
        common = {"site": bodies["index"].h1.get_text(), "navigation": navigation}
        for name, body in bodies.items():
            words = {"kicker": _label(name) if name in executed else "", "lang": "ja" if name == "index.ja" else "en"}
            _write(folder / f"{name}.html", body=body, **words, **common)
        runs = []
        for grid in sorted(path.name for path in results_dir().iterdir()):
            table = load_runs(grid, committed=True).assign(grid=grid)
            runs += _listed(table, load_table(grid, "history", committed=True))
        _write(folder / "runs.html", "runs.html", title="Runs", runs=runs, committed=True, **common)
        _print(folder / "index.html", folder / "article.pdf")
    return target / "index.html"


def _print(page: Path, pdf: Path) -> None:
    """A page as it is printed, and a link to that, where a browser that can do so is at hand.

    Links to other pages are left out: in a file that is carried elsewhere they would name this machine's folders.
    """
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        alone = pdf.with_suffix(".html")
        text = page.read_text(encoding="utf-8")
        alone.write_text(re.sub(r' href="(?!https?:|#)[^"]*"', "", text), encoding="utf-8")
        options = ["--headless", "--no-pdf-header-footer", f"--print-to-pdf={pdf}"]
        options += ["--no-sandbox"] * (os.geteuid() == 0)  # which it refuses to root
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([browser, *options, alone.as_uri()], capture_output=True, timeout=60)
        alone.unlink()
        if pdf.exists():
            link = f'<footer>\n<p><a href="{pdf.name}">This page as a PDF</a></p>'
            page.write_text(text.replace("<footer>", link), encoding="utf-8")


# Notebooks are executed


def _execute_all(folder: Path) -> dict[str, NotebookNode]:
    """Run the notebooks of `PAGES`, two at a time, into a folder. Returns page → executed notebook.

    Raises:
        ConfigError: one failed.
    """
    folder.mkdir()

    # in that folder there are no runs, which in `outputs` would stand in for committed ones
    def job(page: str) -> NotebookNode:
        return _execute(*PAGES[page], folder / f"{page}.ipynb", folder)

    executed = thread_map(job, PAGES, max_workers=2, desc="pages", leave=False, disable=None)
    return dict(zip(PAGES, executed, strict=True))


def _execute(name: str, parameters: Mapping[str, Any], target: Path, outputs: Path) -> NotebookNode:
    """Run a notebook, which reads runs in `outputs`. It keeps its paths, which thus are those of no machine."""
    command = [sys.executable, "-m", "papermill", "--cwd", ROOT, "-k", "python3", "--no-progress-bar"]
    command += [f"notebooks/{name}.ipynb", os.path.relpath(target, ROOT), "-y", json.dumps(parameters)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CTXLM_OUTPUTS": str(outputs)}
    for _ in range(2):
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if process.returncode == 0:
            return nbformat.read(target, as_version=4)
        if "Kernel died before replying" not in process.stderr:  # as where two that start at once take the same port
            break
    why = (process.stderr.strip().splitlines() or ["no word of why"])[-1]
    with suppress(OSError, ValueError):  # where it failed before its first cell, nothing is written
        results = [output for cell in nbformat.read(target, as_version=4).cells for output in cell.get("outputs", ())]
        why = next((f"{o.ename} ({' '.join(o.evalue.split())})" for o in results if o.output_type == "error"), why)
    raise ConfigError(f"notebooks/{name}.ipynb ended in {why}: open it and run it to see where")


# Notebooks and Markdown become HTML


def cells_html(notebook: NotebookNode, *without: str) -> str:
    """A notebook's cells, but for those with a tag of `without`: code folded above its output, figures described."""
    exporter = HTMLExporter(
        template_name="ctxlm",
        extra_template_basedirs=[str(TEMPLATES)],
        preprocessors=[TagRemovePreprocessor(remove_cell_tags={NOTEBOOK_ONLY, *without}), CoalesceStreamsPreprocessor],
        exclude_anchor_links=True,
    )
    return exporter.from_notebook_node(notebook, {"cells_only": True})[0]


def page_body(html: str, pages: Collection[str]) -> BeautifulSoup:
    """HTML of cells as a page shows it: nothing loads or runs anything, links lead to `pages`, what is wide scrolls."""
    html = re.sub("<!--.*?-->", "", html, flags=re.DOTALL)
    parts = re.split("(<pre.*?</pre>)", html, flags=re.DOTALL)  # code stays as it is
    # no line ends within these
    parts[::2] = (re.sub("(?<=[0-9>]) %", "\u00a0%", part).replace("A − B", "A\u00a0−\u00a0B") for part in parts[::2])
    soup = BeautifulSoup("".join(parts), "html.parser")
    for tag in soup("script iframe object embed link meta base form".split()):
        tag.decompose()
    for tag in soup(re.compile("^h[1-6]$")):
        tag["id"] = _slug(tag.get_text())
    for tag in soup("a", href=True):
        tag["href"] = _link(tag["href"], pages)
        if tag["href"] is None:
            tag.unwrap()
    for tag in soup.select(".output > br"):  # of the notes below a regression's tables
        tag.replace_with(" ")
    for tag in soup("img"):
        tag.parent["tabindex"] = "0"  # on a phone it scrolls, so that its labels can be read
        header = base64.b64decode(tag["src"].partition("png;base64,")[2][:32])
        if 0 < int.from_bytes(header[16:20]) < 800:  # of so few pixels in width, they can be read there as it is
            tag["class"] = "narrow"
    for tag in soup("table"):
        made, rows = tag.find_parent(class_=PROVENANCE), len(tag.select("tbody tr"))
        if not tag.find_parent(class_="output"):
            tag.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
        elif made or (rows > 18 and not tag.find_parent(class_="answer") and tag.get("class") != ["simpletable"]):
            label = "how the runs were made" if made else f"{rows} rows"
            tag.wrap(soup.new_tag("details")).insert(0, soup.new_tag("summary", string=label))
    return soup


def _link(href: str, pages: Collection[str]) -> str | None:
    """A link of a notebook or of Markdown, which names their files, as a page has it; None where there is no page."""
    parts = urlsplit(PLACES.get(href, href))
    name = Path(parts.path)
    page = f"{name.stem}.html" if name.suffix in (".ipynb", ".md") else parts.path
    if parts.scheme:
        return href
    if page and page not in pages:
        return None
    return page + (f"#{_slug(unquote(parts.fragment))}" if parts.fragment else "")


def _slug(text: str) -> str:
    """A heading's id, as GitHub makes it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def _document(name: str) -> str:
    """A file of `docs` as HTML."""
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    return cells_html(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]))


# Pages are written


def _write(path: Path, template: str = "page.html", **values: Any) -> None:
    """Write a page; `values` are what its template names."""
    path.write_text(_templates().get_template(template).render(here=path.name, **values), encoding="utf-8")


@cache
def _templates() -> Environment:
    """The templates, with what every page has: its script, and when it was written."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "digest": digest, "commit": git_commit() or "unknown"}
    environment.globals["written"] = f"{datetime.now().astimezone():%d %B %Y, %H:%M %Z}"
    return environment


def _compared(grid: Grid) -> pd.DataFrame:
    """What tells a grid's experiments apart: a row each, and a column a parameter that all read and each has one of."""
    read = [{name: str(value) for name, value in run.for_notebook().items()} for run in grid.runs.values()]
    runs = pd.DataFrame(read).dropna(axis=1)
    groups = runs.groupby("experiment")
    apart = [name for name in runs if runs[name].nunique() > 1 and groups[name].nunique().max() == 1]
    return groups[[name for name in apart if name != "experiment"]].first().reset_index()


def _listed(runs: pd.DataFrame, history: pd.DataFrame) -> list[dict[str, Any]]:
    """Runs as their table shows them, from what `load_runs` and `load_table` give."""
    numbers = "train_tokens seed test_ppl test_bits_per_byte val_ppl best_epoch".split()
    numbers += "epochs_run phase2_patience overfit_rate total_seconds".split()
    shown = runs.reindex(columns=["grid", "run", *numbers]).astype(dict.fromkeys(numbers, float))
    shown["overfit_rate"] = shown["overfit_rate"].where(stopped_early(shown))
    measured = history[(history["phase"] == "phase2") & history["metric"].isin(["train_ppl", "val_ppl"])]
    curves = {run: _curve(rows) for run, rows in measured.groupby("run", observed=True)}
    return [run | {"curve": curves.get(run["run"])} for run in shown.to_dict("records")]


def _curve(rows: pd.DataFrame) -> dict[str, str]:
    """A run's PPL by epoch, logarithmic, as a drawing: its view box, and the points of its two lines."""
    heights = -np.log(rows.pivot(index="step", columns="metric", values="value").astype(float))  # SVG's y goes down
    width, height = np.ptp(heights.index) or 1, np.ptp(heights.to_numpy()) or 1
    box = f"{heights.index[0]} {heights.min(axis=None):.3f} {width} {height:.3f}"
    return {"box": box} | {name: " ".join(f"{x},{y:.3f}" for x, y in heights[name].items()) for name in heights}


def _label(name: str) -> str:
    """A page's name in the navigation: "05_overfitting" → "Overfitting"."""
    return re.sub(r"^\d+_", "", name).replace("_", " ").replace("-", " ").capitalize()


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` once the block has ended without an error; else the earlier one stays.

    Of several processes that want it, one is at it and the others wait.
    """
    new = target.with_name(f".{target.name}-new")
    new.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".lock-{target.name}")):
        shutil.rmtree(new, ignore_errors=True)  # of a command that failed
        new.mkdir()
        yield new
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make pages of executed notebooks and of committed runs.")
    parser.add_argument("--grid", default="quick", help="name of a grid that was run, or its file")
    parser.add_argument("--all", action="store_true", help="the site of everything that is committed, instead")
    options = parser.parse_args(arguments)
    try:
        print_line(str(build_all() if options.all else build(options.grid)))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
