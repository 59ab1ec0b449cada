"""The site of small executed notebooks: complete, offline, readable everywhere, and replaced only as a whole."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat.v4 as nb
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from ctxlm.analysis import site
from ctxlm.analysis.run_plots import new_figure
from ctxlm.analysis.site import build, build_all, main
from ctxlm.config import ConfigError
from ctxlm.files import ROOT
from tests.browser import read_by_everyone

TITLE = "Wide {with} braces {0} & shallow?"
HOSTILE = "<img src=x onerror=alert(1)>"


def picture() -> str:
    """A figure of the common width as base64 of its PNG."""
    figure, ((axes,),) = new_figure(height=4)
    axes.plot([1, 2])
    png = BytesIO()
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return base64.b64encode(png.getvalue()).decode()


PICTURE = picture()


def notebook(*cells) -> str:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps(nb.new_notebook(cells=list(cells), metadata={"kernelspec": kernel}))


def ran(source: str, *outputs, count: int | None = 1, **metadata):
    return nb.new_code_cell(source, execution_count=count, outputs=list(outputs), metadata=metadata)


def shown(**data):
    return nb.new_output("display_data", {kind.replace("_", "/"): value for kind, value in data.items()})


WIDE = pd.DataFrame({f"a column of figures {k}": [1000.5 * k, 2.25] for k in range(12)}).to_html(border=1)
SORTABLE = pd.DataFrame(
    {"name": ["b-10", "b-9", "a"], "PPL": ["1,200.5", "−3.0", "90"], "gain": ["−2.0 %", "–", "+10.0 %"]}
).to_html(index=False)
SUMMARY = '<table class="simpletable"><tr><td></td><th>coef</th></tr></table><br/><br/>Notes:<br/>[1] Of errors.'
PROGRESS = [nb.new_output("stream", name="stderr", text=f"\r{done} of 3") for done in (1, 2, 3)]


def analysis(words: str = "A is better") -> str:
    return notebook(
        nb.new_markdown_cell("# Of a grid", metadata={"tags": ["notebook-only"]}),
        nb.new_markdown_cell(f"# Depth or width?\n\nBy [the audit](08_audit.ipynb#in-short). {HOSTILE[:4]} 5 % of it."),
        ran("secret_call()", *PROGRESS, nb.new_output("stream", name="stderr", text="UserWarning: old")),
        nb.new_markdown_cell("## Which is better?\n\n2.6<!--= 04_scaling: A − B @ 28,000 tokens --> % it is."),
        ran("better", shown(text_html=SORTABLE.replace(">a<", f">{words}<"), text_plain="words"), tags=["answer"]),
        ran("plot();", shown(image_png=PICTURE, text_plain="<Figure>"), tags=["main-figure"], alt="PPL by tokens"),
        nb.new_markdown_cell("## The `law`"),
        ran("plots", shown(image_png=PICTURE), shown(image_png=PICTURE)),
        ran("wide", shown(text_html=WIDE)),
        ran("fit.summary()", shown(text_html=SUMMARY)),
        ran("long", shown(text_html=pd.DataFrame({"a": range(50)}).to_html())),
    )


METRICS = {"experiment": "A", "train_tokens": 28000, "seed": 1, "val_tokens": 9, "val_loss": 6.5, "val_ppl": 654.34}
METRICS |= {
    "test_ppl": 571.5,
    "test_accuracy": 0.1,
    "best_epoch": 2,
    "epochs_run": 4,
    "phase2_patience": 2,
    "overfit_rate": 0.0474,
}
METRICS |= {"protocol": 2, "total_seconds": 90.0, "embed_dim": 128, "num_layers": 6, "versions": {"torch": "2.13"}}
EPOCH = {"train_loss": 7, "train_ppl": 1100, "val_loss": 6.6, "val_ppl": 700, "val_accuracy": 0.1}
HISTORY = "phase,step,metric,value\n" + "".join(
    f"phase2,{step},{name},{value / step}\n" for step in (1, 2, 3) for name, value in EPOCH.items()
)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def a_run(**changed) -> dict[str, str]:
    return {"metrics.json": json.dumps(METRICS | changed), "history.csv": HISTORY}


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """A grid of four runs: one with its notebook, one that is committed, one that failed, and one not begun."""
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "results"))
    grid = {"title": TITLE, "description": "A <small> grid.", "experiments": {"A": {}}, "sweep": {"seed": [1, 2, 3, 4]}}
    experiment = nb.new_markdown_cell("# One experiment")
    write(tmp_path, {"mini.yaml": json.dumps(grid)})
    write(tmp_path / "results" / "mini" / "A_seed-2", a_run(seed=2))
    write(tmp_path / "results" / "mini" / "A_seed-9", a_run(seed=9))  # no longer asked for
    write(tmp_path / "outputs" / "mini" / "A_seed-1", a_run(test_ppl=None))
    failed = nb.new_output("error", ename="NonFiniteLoss", evalue="at epoch 2", traceback=[f"NonFiniteLoss {HOSTILE}"])
    files = {
        "04_scaling.ipynb": analysis(),
        "estimates.csv": "contrast,at,value\nA − B,,0.1\n",
        "A_seed-1/experiment.ipynb": notebook(experiment, ran("train(1)", *PROGRESS)),
        "A_seed-3/experiment.ipynb": notebook(experiment, ran("train(3)", failed)),
        "corpus/corpus.ipynb": notebook(
            nb.new_markdown_cell("# The corpus"),
            ran("texts", shown(text_html=f"<table><tr><td>{HOSTILE.replace('<', '&lt;')}</td></tr></table>")),
            ran("print(text)", nb.new_output("stream", name="stdout", text=f"{HOSTILE}\n")),
            ran("active", shown(text_html="<script>alert(1)</script><iframe src='http://x'></iframe><p>left</p>")),
        ),
    }
    write(tmp_path / "outputs" / "mini", files)
    return tmp_path / "outputs"


def make(outputs: Path) -> Path:
    return build(str(outputs.parent / "mini.yaml"), outputs)


INDEX = """# Deep or wide?

A is 2.6 %<!--= 04_scaling: A − B @ 28,000 tokens --> better (0.4 to 4.7 %).

![PPL of A and B by tokens](04_scaling#main-figure)

**What to do:** go deep.

## What was found

- Depth wins ([more](04_scaling.html#Which-is-better)), by the [method](method.md#judging), of [files](../LOG.md).
"""
DOCS = {
    "docs/index.md": INDEX,
    "docs/index.ja.md": "# 深さか幅か\n\n深い方が 2.6 % 良い（[詳細](08_audit.ipynb)）。\n",
    "docs/method.md": "# Method\n\n## Judging\n\n| part | tokens |\n|---|---|\n| test | 43,000 |\n",
    "docs/literature.md": "# Literature\n\nClaims.\n",
    "docs/parameters.md": "# Parameters\n\n[Back](method.md).\n",
    "docs/results.md": "# Results\n\nColumns.\n",
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository of two notebooks, whose execution is a copy, of tiny documents and of three committed runs."""
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "PAGES", {name: (name, {}) for name in ("04_scaling", "08_audit")})

    def copy(name, parameters, target):
        shutil.copy(tmp_path / "notebooks" / f"{name}.ipynb", target)
        return site._read(target, "")

    monkeypatch.setattr(site, "_execute", copy)
    audit = notebook(nb.new_markdown_cell("# Does it hold?\n\n## In short\n\nSee [scaling](04_scaling.ipynb)."))
    write(tmp_path, DOCS | {"notebooks/04_scaling.ipynb": analysis(), "notebooks/08_audit.ipynb": audit})
    ngram = a_run(experiment="KN-4", best_epoch=None)["metrics.json"]
    write(tmp_path / "results" / "baselines" / "KN-4", {"metrics.json": ngram})
    write(tmp_path / "results" / "variance" / "A_seed-10", a_run())
    write(tmp_path / "results" / "variance" / "A_seed-9", a_run(num_layers=3))
    return tmp_path


# What pages hold


class Loaded(HTMLParser):
    """Everything a page would load or run, and where its links lead."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded, self.links, self.tags, self.attributes = [], [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        self.attributes |= values.keys()
        if tag == "a":
            self.links.append(values["href"])
        else:
            self.loaded += [values[name] for name in ("src", "href", "data", "srcset", "poster") if name in values]


def pages(index: Path) -> list[Path]:
    return sorted(index.parent.rglob("*.html"))


@pytest.fixture(params=["grid", "all"])
def made(request) -> Path:
    """The index of a grid's report, and that of the site."""
    if request.param == "grid":
        return make(request.getfixturevalue("outputs"))
    return build_all(request.getfixturevalue("root") / "outputs")


def test_pages_load_nothing_and_run_nothing_but_their_own_script(made):
    assert len(pages(made)) == (6 if made.parent.name == "report" else 11)
    for page in pages(made):
        found, text = Loaded(page), page.read_text(encoding="utf-8")
        assert all(value.startswith("data:image/") for value in found.loaded)
        assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
        assert not any(name.startswith("on") for name in found.attributes)
        assert not re.search(r"@import|url\(", text)
        (policy,) = [own["content"] for _, own in found.tags if own.get("http-equiv") == "Content-Security-Policy"]
        script = BeautifulSoup(text, "html.parser").script.string
        sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert "default-src 'none'" in policy and f"script-src 'sha256-{sha}'" in policy
        assert "unsafe-eval" not in policy and "http" not in policy


def test_all_links_lead_to_pages_and_headings_that_are_there(made):
    for page in pages(made):
        for href in Loaded(page).links:
            file, _, anchor = href.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert not Path(file).is_absolute() and target.is_file(), href
            text = target.read_text(encoding="utf-8")
            assert not anchor or f'id="{anchor}"' in text, href


def test_every_image_is_described(made):
    for page in pages(made):
        images = [own for tag, own in Loaded(page).tags if tag == "img"]
        assert all(own["alt"] and own["alt"] != "figure" for own in images)
    descriptions = [own["alt"] for tag, own in Loaded(made.parent / "04_scaling.html").tags if tag == "img"]
    assert descriptions == ["PPL by tokens", "The law (1 of 2)", "The law (2 of 2)"]


def test_every_page_has_the_navigation_and_one_title(made):
    for page in pages(made):
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        labels = [link.get_text() for link in soup.nav("a") if link.get("lang") != "ja"]
        assert labels[:2] == ["Index", "Scaling"] and "Runs" in labels
        assert len(soup("h1")) == 1 and soup.html["lang"] == "en"
        ids = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(ids) == len(set(ids))


def test_a_notebook_is_shown_with_its_code_folded_and_without_warnings(made):
    soup = BeautifulSoup((made.parent / "04_scaling.html").read_text(encoding="utf-8"), "html.parser")
    text = soup.get_text()
    assert "Of a grid" not in text and "UserWarning" not in text and "of 3" not in text
    folded = [details for details in soup("details") if details.summary.get_text() == "code"]
    assert "secret_call" in folded[0].get_text() and not any(details.has_attr("open") for details in folded)
    (scaling,) = [heading for heading in soup("h2") if heading.get_text() == "The law"]
    assert scaling["id"] == "the-law" and not soup.find(class_="anchor-link")
    (rows,) = [details for details in soup("details") if details.summary.get_text() == "51 rows"]
    assert rows.find("table")
    assert "2.6\u00a0% it is" in re.sub("<!--.*?-->", "", text) and "28,000" not in text  # comments are not seen
    assert "Notes: [1] Of errors." in " ".join(text.split())
    (words,) = [cell for cell in soup("td") if cell.get_text() == "A is better"]
    assert "text" in words["class"] and all(table.find_parent(tabindex="0") for table in soup("table"))


# A grid's own report


def test_the_index_of_a_grid_has_its_answer_its_figure_and_its_runs(outputs):
    soup = BeautifulSoup(make(outputs).read_text(encoding="utf-8"), "html.parser")
    assert soup.h1.get_text() == soup.title.get_text() == TITLE and "A <small> grid." in soup.get_text()
    answer, runs = soup("table")
    assert "A is better" in answer.get_text() and f"data:image/png;base64,{PICTURE}" in soup.img["src"]
    assert "secret_call" not in soup.get_text() and not soup("details")
    header = [cell.get_text() for cell in runs.thead("th")]
    assert header == "run|tokens|seed|test PPL|validation PPL|best epoch|over-fitting|minutes".split("|")
    cells = [[cell.get_text() for cell in row("td")] for row in runs.tbody("tr")]
    assert cells[0] == ["A_seed-1", "28,000", "1", "–", "654.3", "2", "+4.7\u00a0%", "1.5"]
    assert [row[0] for row in cells] == ["A_seed-1", "A_seed-2"]  # and not A_seed-9
    (unfinished,) = [p.get_text(" ", strip=True) for p in soup("p") if "Not finished" in p.get_text()]
    assert "A_seed-3" in unfinished and "A_seed-4" in unfinished and "A_seed-1" not in unfinished


def test_a_run_is_shown_from_its_notebook_or_from_its_figures(outputs):
    folder = make(outputs).parent / "runs"
    assert sorted(path.name for path in folder.iterdir()) == [f"A_seed-{k}.html" for k in (1, 2, 3)]
    texts = {path.stem: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in folder.iterdir()}
    assert "train(1)" in texts["A_seed-1"].get_text()
    assert texts["A_seed-1"].title.get_text().startswith("One experiment: A_seed-1 · ")
    assert texts["A_seed-2"].find("svg") and "571.5" in texts["A_seed-2"].get_text()
    assert f"NonFiniteLoss {HOSTILE}" in texts["A_seed-3"].get_text() and not texts["A_seed-3"]("img")


def test_text_of_a_corpus_stays_text_and_nothing_active_is_kept(outputs):
    text = (make(outputs).parent / "corpus.html").read_text(encoding="utf-8")
    soup = BeautifulSoup(text, "html.parser")
    assert soup.get_text().count(HOSTILE) == 2 and not soup("img")
    assert len(soup("script")) == 1 and "alert(1)</script>" not in text and "left" in soup.get_text()


def test_committed_findings_are_linked_to_where_the_site_is_made(outputs):
    assert "Committed findings" not in make(outputs).read_text(encoding="utf-8")
    write(outputs, {"site/index.html": "made"})
    assert '<a href="../../site/index.html">Committed findings</a>' in make(outputs).read_text(encoding="utf-8")


def test_a_rebuilt_report_replaces_the_old_one_whole(outputs):
    stray = make(outputs).parent / "runs" / "gone.html"
    stray.write_text("of an earlier report")
    (outputs / "mini" / "04_scaling.ipynb").write_text(analysis("B is better"))
    assert "B is better" in make(outputs).read_text(encoding="utf-8")
    assert not stray.exists() and not list(outputs.glob("mini/.report*"))


FAILED = ran("fit()", nb.new_output("error", ename="ValueError", evalue="no sizes", traceback=["…"]))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("04_scaling.ipynb", None, r"04_scaling.ipynb is missing: run `make report GRID="),
        ("04_scaling.ipynb", "{", "not a readable notebook"),
        ("04_scaling.ipynb", notebook(FAILED), r"ended in ValueError \(no sizes\)"),
        ("04_scaling.ipynb", notebook(ran("a"), ran("b", count=None)), "not run to its end"),
        ("estimates.csv", None, "estimates.csv is missing or damaged"),
        ("estimates.csv", "contrast,at,val", "estimates.csv is missing or damaged"),
        ("A_seed-1/metrics.json", '{"seed": 1', "metrics.json is damaged"),
    ],
)
def test_a_failed_build_leaves_the_previous_report(outputs, capsys, name, text, words):
    before = make(outputs).read_bytes()
    (outputs / "mini" / name).unlink() if text is None else (outputs / "mini" / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        make(outputs)
    assert (outputs / "mini" / "report" / "index.html").read_bytes() == before
    assert not list(outputs.glob("mini/.report*"))
    assert main(["--grid", str(outputs.parent / "mini.yaml"), "--outputs", str(outputs)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and said.err.startswith("error: ")


def test_a_report_that_cannot_be_moved_in_leaves_the_previous_one(outputs, monkeypatch):
    before = make(outputs).read_bytes()
    rename = Path.rename

    def refuse(self, target):
        if target.name == "report" and not self.name.endswith("-earlier"):
            raise OSError("the disk is full")
        return rename(self, target)

    monkeypatch.setattr(site.Path, "rename", refuse)
    with pytest.raises(OSError, match="disk is full"):
        make(outputs)
    assert (outputs / "mini" / "report" / "index.html").read_bytes() == before


def test_command_prints_the_page_and_refuses_an_unknown_grid(outputs, capsys):
    assert main(["--grid", str(outputs.parent / "mini.yaml"), "--outputs", str(outputs)]) == 0
    assert Path(capsys.readouterr().out.strip()) == outputs / "mini" / "report" / "index.html"
    assert main(["--grid", "quik", "--outputs", str(outputs)]) == 1
    assert "grid 'quik' does not exist" in capsys.readouterr().err


# The site of all that is committed


def test_the_index_is_the_written_one_with_its_figure_and_a_summary_in_japanese(root):
    soup = BeautifulSoup(build_all(root / "outputs").read_text(encoding="utf-8"), "html.parser")
    assert soup.h1.get_text() == "Deep or wide?" and soup.img["alt"] == "PPL of A and B by tokens"
    assert PICTURE in soup.img["src"] and "28,000 tokens" not in soup.get_text()
    links = {link.get_text(): link["href"] for link in soup.main("a")}
    assert links["more"] == "04_scaling.html#which-is-better" and links["method"] == "method.html#judging"
    assert "files" not in links and "of files." in soup.get_text()  # no page of the site
    section = soup.find("section", lang="ja")
    assert section.h2.get_text() == "深さか幅か" and section.a["href"] == "08_audit.html"
    assert soup.nav.find("a", lang="ja")["href"] == f"#{section['id']}" == "#summary-in-japanese"
    linked = INDEX.replace("go deep.", "go deep. [日本語](#summary-in-japanese)")  # then the navigation has none
    write(root, {"docs/index.md": linked})
    soup = BeautifulSoup(build_all(root / "outputs").read_text(encoding="utf-8"), "html.parser")
    assert len(soup("a", href="#summary-in-japanese")) == 1


def test_committed_runs_are_in_one_table_and_each_has_a_page(root):
    folder = build_all(root / "outputs").parent
    soup = BeautifulSoup((folder / "runs.html").read_text(encoding="utf-8"), "html.parser")
    rows = [[cell.get_text() for cell in row("td")] for row in soup.table.tbody("tr")]
    assert [row[1] for row in rows] == ["KN-4", "A_seed-9", "A_seed-10"]  # by grid, numbers by value
    assert len(soup.table("th")) == 8 and rows[0][0] == "baselines" and rows[0][5] == "–"
    run = BeautifulSoup((folder / "runs" / "variance" / "A_seed-9.html").read_text(encoding="utf-8"), "html.parser")
    epochs, settings = run("table")
    assert [row("td")[0].get_text() for row in epochs.tbody("tr")] == ["1", "2 (best)", "3"]
    differences = [[cell.get_text() for cell in row("td")] for row in settings.tbody("tr")]
    assert ["num_layers", "3", "6"] in differences and ["train_tokens", "28,000", "86,925"] in differences
    assert len(run.svg("polyline")) == 2
    ngram = BeautifulSoup((folder / "runs/baselines/KN-4.html").read_text(encoding="utf-8"), "html.parser")
    assert ngram.h1.get_text() == "KN-4" and not ngram("svg")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("docs/index.md", INDEX.replace("04_scaling.html#Wh", "04_scaling.html#h"), "ich-is-better, which is not ther"),
        (
            "docs/index.md",
            INDEX.replace("04_scaling.html", "09_more.html"),
            "09_more.html#.* is no page",
        ),
        ("docs/index.md", INDEX.replace("#main-figure", "#other"), "04_scaling has no figure in a cell tagged 'other'"),
        (
            "docs/index.md",
            INDEX.replace("04_scaling#main-figure", "a.png"),
            "index.md: the image a.png is neither",
        ),
        ("docs/method.md", None, "docs/method.md"),
        (
            "notebooks/08_audit.ipynb",
            notebook(nb.new_markdown_cell("[x](10_x.html)")),
            "08_audit.html: 10_x.html is no",
        ),
        ("results/variance/A_seed-9/history.csv", "phase,step\n1", "history.csv is damaged"),
        ("notebooks/08_audit.ipynb", "{", "08_audit.ipynb is not a readable notebook"),
    ],
)
def test_a_page_that_fails_is_named_and_the_earlier_site_stays(root, capsys, name, text, words):
    before = build_all(root / "outputs").read_bytes()
    (root / name).unlink() if text is None else (root / name).write_text(text, encoding="utf-8")
    assert main(["--all", "--outputs", str(root / "outputs")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and re.search(words, said), said
    assert (root / "outputs" / "site" / "index.html").read_bytes() == before
    assert not list((root / "outputs").glob(".site*"))


def test_headings_of_one_name_have_ids_of_their_own():
    html = site.tidy("<h2>A b</h2><h2>A b 2</h2><h3>A b</h3><h3>A b</h3><h2>…</h2>", lambda href: href)
    assert re.findall('id="(.*?)"', html) == ["a-b", "a-b-2", "a-b-1", "a-b-3", "section"]


@pytest.mark.slow
def test_notebooks_are_run_on_committed_results_and_those_that_fail_are_named(tmp_path, monkeypatch):
    source = 'import os, pathlib\nassert not [*pathlib.Path(os.environ["CTXLM_OUTPUTS"]).iterdir()]\nprint(sizes)'
    parameters = nb.new_code_cell("sizes = 1", metadata={"tags": ["parameters"]})
    good, bad = (notebook(parameters, nb.new_code_cell(code)) for code in (source, 'raise ValueError("no\\nsizes")'))
    write(tmp_path / "notebooks", {"04_good.ipynb": good, "05_bad.ipynb": bad})
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "PAGES", {"04_good": ("04_good", {"sizes": 7}), "05_bad": ("05_bad", {})})
    words = r"^notebooks/05_bad.ipynb ended in ValueError \(no sizes\): open it"
    with pytest.raises(ConfigError, match=words):
        site._execute_all(tmp_path / "executed")
    executed = json.loads((tmp_path / "executed" / "04_good.ipynb").read_text(encoding="utf-8"))
    assert executed["cells"][-1]["outputs"][0]["text"] == ["7\n"]


# In a browser


COLUMN = """[...document.querySelector("table").tBodies[0].rows].map(
  row => row.cells[{}].textContent.replace("\u00a0", " "))"""
CLICK = """(() => {{ const cell = document.querySelector("table").tHead.rows[0].cells[{}];
  cell.querySelector("button").click(); return cell.getAttribute("aria-sort"); }})()"""


@pytest.mark.slow
def test_a_barrier_would_be_found(tmp_path, browser):
    (tmp_path / "page.html").write_text('<html lang="en"><title>t</title><img src="x.png">', encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert [barrier.partition(":")[0] for barrier in browser.barriers()] == ["image-alt"]


@pytest.mark.slow
def test_nbconvert_makes_a_page_that_is_read_by_everyone(tmp_path, browser):
    """As a user calls it: `jupyter nbconvert --to html --template ctxlm executed.ipynb`."""
    cells = [
        nb.new_markdown_cell("# A run\n\n## How it went"),
        ran("draw()" * 40, shown(image_png=PICTURE), nb.new_output("stream", text="x" * 400)),
        ran("", shown(image_png=PICTURE), shown(text_html=WIDE), alt="What is said of it"),
    ]
    (tmp_path / "run.ipynb").write_text(notebook(*cells), encoding="utf-8")
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--template", "ctxlm", str(tmp_path / "run.ipynb")]
    folders = ROOT / "ctxlm" / "analysis" / "templates"
    subprocess.run([*command, f"--TemplateExporter.extra_template_basedirs={folders}"], check=True)
    page = tmp_path / "run.html"
    read_by_everyone(browser, page)
    alts = [tag["alt"] for tag in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")("img")]
    assert alts == ["How it went", "What is said of it"]


@pytest.mark.slow
def test_pages_are_read_on_a_phone_in_the_dark_and_in_print(made, browser):
    for page in pages(made):
        read_by_everyone(browser, page)
        assert browser.printed() <= (4 if page == made else 6)
    browser.open(made.parent / "04_scaling.html", 390)
    scrolled = """[...document.querySelectorAll(".output")].some(box => box.scrollWidth > box.clientWidth)"""
    assert browser.run(scrolled)  # the wide table, in its own box


@pytest.mark.slow
def test_the_first_screen_has_the_answer_and_the_figure(root, browser):
    browser.open(build_all(root / "outputs"))
    bottom = "document.querySelector('main p strong').getBoundingClientRect().bottom"  # of "What to do"
    assert browser.run(bottom) < browser.run("innerHeight")


@pytest.mark.slow
def test_a_click_on_a_header_sorts_its_table(outputs, browser):
    browser.open(make(outputs))
    assert browser.run(CLICK.format(1)) == "ascending" and browser.run(COLUMN.format(1)) == ["−3.0", "90", "1,200.5"]
    assert browser.run(CLICK.format(1)) == "descending" and browser.run(COLUMN.format(1)) == ["1,200.5", "90", "−3.0"]
    assert browser.run(CLICK.format(0)) == "ascending"
    assert browser.run(COLUMN.format(0)) == ["A is better", "b-9", "b-10"]
    assert browser.run(CLICK.format(2)) == "ascending" and browser.run(COLUMN.format(2)) == ["−2.0 %", "+10.0 %", "–"]
    assert browser.run(CLICK.format(2)) == "descending" and browser.run(COLUMN.format(2)) == ["+10.0 %", "−2.0 %", "–"]
    assert browser.run("""document.querySelectorAll("[aria-sort]").length""") == 1
