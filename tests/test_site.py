"""The site of small executed notebooks: complete, offline, readable everywhere, and replaced only as a whole."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat.v4 as nb
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from ctxlm.analysis import site
from ctxlm.analysis.run_plots import new_figure
from ctxlm.analysis.runs import write_tables
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


def ran(source: str, *outputs, **metadata):
    return nb.new_code_cell(source, execution_count=1, outputs=list(outputs), metadata=metadata)


def shown(**data):
    return nb.new_output("display_data", {kind.replace("_", "/"): value for kind, value in data.items()})


WIDE = pd.DataFrame({f"a column of figures {k}": [1000.5 * k, 2.25] for k in range(12)}).to_html(border=1)
SORTABLE = pd.DataFrame(
    {"name": ["b-10", "b-9", "a"], "PPL": ["1,200.5", "−3.0", "90"], "gain": ["−2.0 %", "–", "+10.0 %"]}
).to_html(index=False)
SUMMARY = '<table class="simpletable"><tr><td></td><th>coef</th></tr></table><br/><br/>Notes:<br/>[1] Of errors.'
PROGRESS = [nb.new_output("stream", name="stderr", text=f"\r{done} of 3") for done in (1, 2, 3)]
FAILED = notebook(ran("fit()", nb.new_output("error", ename="ValueError", evalue="no\nsizes", traceback=["…"])))


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


METRICS = {"experiment": "A", "train_tokens": 28000, "seed": 1, "val_ppl": 654.34, "test_ppl": 571.5, "best_epoch": 2}
METRICS |= {"epochs_run": 4, "phase2_patience": 2, "overfit_rate": 0.0474, "total_seconds": 90.0}
METRICS |= {"test_bits_per_byte": 1.8765}
PPL = {"train_ppl": (1100.0, 110.0, 11.0), "val_ppl": (1100.0, 700.0, 110.0)}
HISTORY = pd.DataFrame(
    [("phase2", step, name, value) for name, values in PPL.items() for step, value in enumerate(values, 1)],
    columns=["phase", "step", "metric", "value"],
)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Where notebooks, documents, runs and sites are; to execute a notebook is to copy it."""
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(site, "ROOT", tmp_path)

    def copy(name, parameters, target, outputs=None):
        shutil.copy(tmp_path / "notebooks" / f"{name}.ipynb", target)
        return site._read(target, "")

    monkeypatch.setattr(site, "_execute", copy)
    write(tmp_path, {"notebooks/04_scaling.ipynb": analysis()})
    return tmp_path


@pytest.fixture
def grid(repository) -> str:
    """The file of a grid of four runs: two finished, one that failed, and one not begun."""
    settings = {"title": TITLE, "description": "A <small> grid.", "experiments": {"A": {"train_tokens": 28000}}}
    write(repository, {"mini.yaml": json.dumps(settings | {"sweep": {"seed": [1, 2, 3, 4]}})})
    for seed, changed in ((1, {}), (2, {"test_ppl": None}), (9, {})):  # the last is no longer asked for
        run = {
            "metrics.json": json.dumps(METRICS | {"seed": seed} | changed),
            "history.csv": HISTORY.to_csv(index=False),
        }
        write(repository / "outputs" / "mini" / f"A_seed-{seed}", run)
    corpus = notebook(
        nb.new_markdown_cell("# The corpus"),
        ran("texts", shown(text_html=f"<table><tr><td>{HOSTILE.replace('<', '&lt;')}</td></tr></table>")),
        ran("print(text)", nb.new_output("stream", name="stdout", text=f"{HOSTILE}\n")),
        ran("active", shown(text_html="<script>alert(1)</script><iframe src='http://x'></iframe><p>left</p>")),
    )
    files = {"A_seed-3/failure.txt": f"NonFiniteLoss {HOSTILE}", "corpus/corpus.ipynb": corpus}
    write(repository / "outputs" / "mini", files)
    return str(repository / "mini.yaml")


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
def root(repository, monkeypatch) -> Path:
    """A repository of two notebooks, of tiny documents and of three committed runs."""
    monkeypatch.setattr(site, "PAGES", {name: (name, {}) for name in ("04_scaling", "08_audit")})
    audit = notebook(nb.new_markdown_cell("# Does it hold?\n\n## In short\n\nSee [scaling](04_scaling.ipynb)."))
    write(repository, DOCS | {"notebooks/08_audit.ipynb": audit})
    ngram = METRICS | {"run": "KN-4", "experiment": "KN-4", "model": "kneser-ney", "best_epoch": None}
    write_tables(repository / "results" / "baselines", pd.DataFrame([ngram]), {"history": HISTORY.assign(run="")[:0]})
    deep = [METRICS | {"run": f"A_seed-{seed}", "seed": seed} for seed in (10, 9)]
    history = pd.concat([HISTORY.assign(run=run["run"]) for run in deep])
    write_tables(repository / "results" / "variance", pd.DataFrame(deep), {"history": history})
    return repository


# What pages hold


def pages(index: Path) -> list[Path]:
    return sorted(index.parent.rglob("*.html"))


def soup_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(params=["grid", "all"])
def made(request) -> Path:
    """The index of a grid's report, and that of the site."""
    if request.param == "grid":
        return build(request.getfixturevalue("grid"))
    return build_all(request.getfixturevalue("root") / "outputs")


def test_pages_load_nothing_run_nothing_but_their_own_script_and_lead_somewhere(made):
    assert len(pages(made)) == (3 if made.parent.name == "report" else 8)
    for page in pages(made):
        text, soup = page.read_text(encoding="utf-8"), soup_of(page)
        loading = [tag for tag in soup(True) if tag.name != "a" and {"src", "href", "data", "srcset"} & {*tag.attrs}]
        assert all(tag.name == "img" and tag["src"].startswith("data:image/") for tag in loading)
        assert not soup(["link", "iframe", "object", "base", "form"]) and not re.search(r"@import|url\(", text)
        assert not any(name.startswith("on") for tag in soup(True) for name in tag.attrs)
        (policy,) = [tag["content"] for tag in soup("meta", attrs={"http-equiv": True})]
        sha = base64.b64encode(hashlib.sha256(soup.script.string.encode()).digest()).decode()
        assert len(soup("script")) == 1 and f"script-src 'sha256-{sha}'" in policy
        assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "http" not in policy
        for href in (link["href"] for link in soup("a")):
            file, _, anchor = href.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert not Path(file).is_absolute() and target.is_file(), href
            assert not anchor or f'id="{anchor}"' in target.read_text(encoding="utf-8"), href
        assert all(image["alt"] not in ("", "figure") for image in soup("img"))
        labels = [link.get_text() for link in soup.nav("a") if link.get("lang") != "ja"]
        assert labels[:2] == ["Index", "Scaling"] and "Runs" in labels
        assert len(soup("h1")) == 1 and soup.html["lang"] == "en"
        ids = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(ids) == len(set(ids))


def test_a_notebook_is_shown_with_its_code_folded_its_figures_described_and_without_warnings(made):
    soup = soup_of(made.parent / "04_scaling.html")
    text = soup.get_text()
    assert "Of a grid" not in text and "UserWarning" not in text and "of 3" not in text
    assert [image["alt"] for image in soup("img")] == ["PPL by tokens", "The law (1 of 2)", "The law (2 of 2)"]
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


def test_headings_of_one_name_have_ids_of_their_own():
    html = site.tidy("<h2>A b</h2><h2>A b 2</h2><h3>A b</h3><h3>A b</h3><h2>…</h2>", lambda href: href)
    assert re.findall('id="(.*?)"', html) == ["a-b", "a-b-2", "a-b-1", "a-b-3", "section"]


# A grid's own report


def rows_of(table) -> list[dict[str, str]]:
    names = [cell.get_text() for cell in table.thead("th")]
    return [dict(zip(names, [cell.get_text() for cell in row("td")], strict=True)) for row in table.tbody("tr")]


def test_the_index_of_a_grid_has_its_answer_its_figure_and_its_runs(grid):
    soup = soup_of(build(grid))
    assert soup.h1.get_text() == soup.title.get_text() == TITLE and "A <small> grid." in soup.get_text()
    answer, runs = soup("table")
    assert "A is better" in answer.get_text() and f"data:image/png;base64,{PICTURE}" in soup.img["src"]
    assert "secret_call" not in soup.get_text() and not soup("details")
    first, second = rows_of(runs)  # and not A_seed-9
    assert first | {"PPL by epoch": ""} == {
        **{"PPL by epoch": "", "run": "A_seed-1", "tokens": "28,000", "seed": "1", "test PPL": "571.5"},
        **{"bits per byte": "1.877", "validation PPL": "654.3", "best epoch": "2", "over-fitting": "+4.7\u00a0%"},
        "minutes": "1.5",
    }
    assert (second["run"], second["test PPL"]) == ("A_seed-2", "–")
    missing = [item.get_text() for item in soup("li") if item.get_text().startswith("A_seed")]
    assert missing == [f"A_seed-3: NonFiniteLoss {HOSTILE}", "A_seed-4: was not begun"]


def test_a_small_curve_is_the_logarithm_of_perplexity_by_epoch(grid):
    curves = {line["class"][0]: line["points"] for line in soup_of(build(grid)).svg("polyline")}
    assert list(curves) == ["training", "validation"]
    for name, metric in (("training", "train_ppl"), ("validation", "val_ppl")):
        x, y = np.array([point.split(",") for point in curves[name].split()], float).T
        assert x.tolist() == [3, 50, 97]
        expected = 27 - 24 * np.log(np.divide(PPL[metric], 11)) / np.log(100)  # up is more
        np.testing.assert_allclose(y, expected, atol=0.06)


def test_text_of_a_corpus_stays_text_and_nothing_active_is_kept(grid):
    soup = soup_of(build(grid).parent / "corpus.html")
    assert soup.get_text().count(HOSTILE) == 2 and not soup("img")
    assert len(soup("script")) == 1 and "alert" not in soup.script.string and "left" in soup.get_text()


def test_a_rebuilt_report_replaces_the_old_one_whole_and_links_to_the_site_where_there_is_one(grid, repository):
    index = build(grid)
    assert "Committed findings" not in index.read_text(encoding="utf-8")
    write(index.parent, {"gone.html": "of an earlier report"})
    write(repository, {"outputs/site/index.html": "made", "notebooks/04_scaling.ipynb": analysis("B is better")})
    text = build(grid).read_text(encoding="utf-8")
    assert "B is better" in text and '<a href="../../site/index.html">Committed findings</a>' in text
    assert not (index.parent / "gone.html").exists() and not [*index.parents[1].glob(".report*")]


def test_a_report_that_cannot_be_moved_in_leaves_the_previous_one(grid, monkeypatch):
    before = build(grid).read_bytes()
    rename = Path.rename

    def refuse(self, target):
        if target.name == "report" and not self.name.endswith("-earlier"):
            raise OSError("the disk is full")
        return rename(self, target)

    monkeypatch.setattr(site.Path, "rename", refuse)
    with pytest.raises(OSError, match="disk is full"):
        build(grid)
    assert (site.outputs_dir() / "mini" / "report" / "index.html").read_bytes() == before


def test_where_the_analysis_fails_the_earlier_one_stays_and_the_index_says_why(grid, monkeypatch, capsys):
    def fail(*_):
        raise ConfigError(f"no sizes {HOSTILE}")

    for earlier in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(site, "_execute", fail)
            assert main(["--grid", grid]) == 0
        why, *missing, page = capsys.readouterr().out.splitlines()
        assert why.startswith(f"no sizes {HOSTILE}")
        assert missing == [f"A_seed-3: NonFiniteLoss {HOSTILE}", "A_seed-4: was not begun"]
        soup = soup_of(Path(page))
        assert f"The analysis failed: {why}." in soup.get_text() and not soup.main("img", src="x")
        assert ("A is better" in soup.get_text()) == (Path(page).parent / "04_scaling.html").exists() == earlier
        assert len(rows_of(soup("table")[-1])) == 2
        build(grid)
        capsys.readouterr()


def test_a_grid_that_is_unknown_or_has_no_finished_run_is_refused_in_a_line(repository, capsys):
    write(repository, {"none.yaml": json.dumps({"experiments": {"A": {}}})})
    for name, words in (("quik", "grid 'quik' does not exist"), (str(repository / "none.yaml"), "A: was not begun")):
        assert main(["--grid", name]) == 1
        line = capsys.readouterr()
        assert line.out == "" and line.err.startswith("error: ") and words in line.err and line.err.count("\n") == 1


# The site of all that is committed


def test_the_index_is_the_written_one_with_its_figure_and_a_summary_in_japanese(root):
    soup = soup_of(build_all(root / "outputs"))
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
    assert len(soup_of(build_all(root / "outputs"))("a", href="#summary-in-japanese")) == 1


def test_committed_runs_are_in_one_table_whatever_was_run_here(root):
    run = {"metrics.json": json.dumps(METRICS | {"seed": 5}), "history.csv": HISTORY.to_csv(index=False)}
    write(root / "outputs" / "variance" / "A_seed-5", run)
    table = soup_of(build_all(root / "outputs").parent / "runs.html").table
    assert [(row["grid"], row["run"]) for row in rows_of(table)] == [
        ("baselines", "KN-4"),
        ("variance", "A_seed-9"),
        ("variance", "A_seed-10"),
    ]
    assert rows_of(table)[0]["best epoch"] == "–" and [len(row("svg")) for row in table.tbody("tr")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("docs/index.md", INDEX.replace("04_scaling.html#Wh", "04_scaling.html#h"), "ich-is-better, which is not ther"),
        ("docs/index.md", INDEX.replace("04_scaling.html", "09_more.html"), "09_more.html#.* is no page"),
        ("docs/index.md", INDEX.replace("#main-figure", "#other"), "04_scaling has no figure in a cell tagged 'other'"),
        ("docs/index.md", INDEX.replace("04_scaling#main-figure", "a.png"), "index.md: the image a.png is neither"),
        ("docs/method.md", None, "docs/method.md"),
        ("notebooks/08_audit.ipynb", "{", "08_audit.ipynb is not a readable notebook"),
        ("notebooks/08_audit.ipynb", notebook(nb.new_markdown_cell("[x](10_x.html)")), "08_audit.html: 10_x.html is"),
    ],
)
def test_a_page_that_fails_is_named_and_the_earlier_site_stays(root, capsys, name, text, words):
    before = build_all(root / "outputs").read_bytes()
    (root / name).unlink() if text is None else (root / name).write_text(text, encoding="utf-8")
    assert main(["--all"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and re.search(words, line), line
    assert (root / "outputs" / "site" / "index.html").read_bytes() == before
    assert not list((root / "outputs").glob(".site*"))


@pytest.mark.slow
def test_notebooks_are_run_on_committed_results_and_those_that_fail_are_named(tmp_path, monkeypatch):
    source = 'import os, pathlib\nassert not [*pathlib.Path(os.environ["CTXLM_OUTPUTS"]).glob("*/")]\nprint(sizes)'
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
    read_by_everyone(browser, tmp_path / "run.html")
    assert [image["alt"] for image in soup_of(tmp_path / "run.html")("img")] == ["How it went", "What is said of it"]


@pytest.mark.slow
def test_pages_are_read_on_a_phone_in_the_dark_and_in_print(made, browser):
    for page in pages(made):
        read_by_everyone(browser, page)
        assert browser.printed() <= (4 if page == made else 6)
    browser.open(made.parent / "04_scaling.html", 390)
    scrolled = """[...document.querySelectorAll(".output")].some(box => box.scrollWidth > box.clientWidth)"""
    assert browser.run(scrolled)  # the wide table, in its own box
    browser.open(made if made.parent.name == "report" else made.parent / "runs.html", 390)
    field, curve = (browser.page.locator(name).first.bounding_box() for name in ("input", ".spark"))
    assert field["width"] == 390 - 2 * 16 and (curve["width"], curve["height"]) == (80, 24)


@pytest.mark.slow
def test_a_click_on_a_header_sorts_its_table_and_words_in_the_field_filter_it(root, browser):
    folder = build_all(root / "outputs").parent

    def column(k):
        """What is seen of a column of the page's first table."""
        cells = browser.page.locator(f"table >> nth=0 >> css=tbody tr:visible td:nth-child({k + 1})")
        return [text.replace("\u00a0", " ") for text in cells.all_inner_texts()]

    def click(k):
        header = browser.page.locator("table >> nth=0 >> css=th").nth(k)
        header.get_by_role("button").click()
        return header.get_attribute("aria-sort")

    browser.open(folder / "04_scaling.html")
    assert click(1) == "ascending" and column(1) == ["−3.0", "90", "1,200.5"]
    assert click(1) == "descending" and column(1) == ["1,200.5", "90", "−3.0"]
    assert click(0) == "ascending" and column(0) == ["A is better", "b-9", "b-10"]
    assert click(2) == "ascending" and column(2) == ["−2.0 %", "+10.0 %", "–"]
    assert click(2) == "descending" and column(2) == ["+10.0 %", "−2.0 %", "–"]
    assert browser.page.locator("[aria-sort]").count() == 1

    browser.open(folder / "runs.html")
    assert not browser.page.get_by_role("button", name="PPL by epoch").count()  # of pictures there is no order
    assert column(2) == ["KN-4", "A_seed-9", "A_seed-10"]
    field = browser.page.get_by_role("searchbox")
    for words, left in (("VARIANCE", ["A_seed-9", "A_seed-10"]), ("seed-1 vari", ["A_seed-10"]), ("nothing", [])):
        field.fill(words)
        assert column(2) == left
        assert browser.page.locator("output").inner_text() == f"{len(left)} of 3 runs"
    field.fill("seed")
    assert click(2) == "ascending" and click(2) == "descending" and column(2) == ["A_seed-10", "A_seed-9"]
    field.fill("")
    assert column(2) == ["KN-4", "A_seed-10", "A_seed-9"]
