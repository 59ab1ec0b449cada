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
from unittest.mock import Mock

import nbformat
import nbformat.v4 as nb
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from ctxlm.analysis import site
from ctxlm.analysis.run_plots import new_figure
from ctxlm.analysis.site import build, main
from ctxlm.batch import state
from ctxlm.config import ConfigError, load_grid
from ctxlm.files import ROOT
from tests.browser import read_by_everyone

TITLE = "Wide {with} braces {0} & shallow?"
HOSTILE = "<img src=x onerror=alert(1)>"


def picture() -> str:
    """A figure of the common width as base64 of its PNG."""
    png = BytesIO()
    new_figure(height=4)[0].savefig(png, dpi=110)
    return base64.b64encode(png.getvalue()).decode()


def notebook(*cells) -> str:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps(nb.new_notebook(cells=list(cells), metadata={"kernelspec": kernel}))


def text(source: str, *tags: str):
    return nb.new_markdown_cell(source, metadata={"tags": list(tags)})


def ran(source: str, output: str | dict, **metadata):
    """A cell that displayed HTML, or what a dictionary says."""
    data = {"text/html": output, "text/plain": "words"} if isinstance(output, str) else output
    return nb.new_code_cell(source, outputs=[nb.new_output("display_data", data)], metadata=metadata)


def printing(words: str, name: str = "stdout"):
    return nb.new_code_cell("secret_call()", outputs=[nb.new_output("stream", name=name, text=words)])


PICTURE = picture()
FIGURE = {"image/png": PICTURE, "text/plain": "<Figure>"}
WIDE = pd.DataFrame({f"a column of figures {k}": [1000.5 * k, 2.25] for k in range(12)}).to_html(border=1)
NAMES, PPLS, GAINS = ["b-10", "b-9", "a"], ["1,200.5", "−3.0", "90"], ["−2.0 %", "–", "+10.0 %"]
SORTABLE = pd.DataFrame({"name": NAMES, "PPL": PPLS, "gain": GAINS}).to_html(index=False)
SUMMARY = '<table class="simpletable"><tr><td></td><th>coef</th></tr></table><br/><br/>Notes:<br/>[1] Of errors.'


def analysis(words: str = "A is better") -> str:
    return notebook(
        text("# Of a grid", "notebook-only"),
        text(f"# Depth or width?\n\nBy [the audit](08_audit.ipynb#in-short). {HOSTILE[:4]} 5 % of it."),
        printing("UserWarning: old", "stderr"),
        text("## Which is better?\n\n2.6<!--=04_scaling:A_−_B@28,000_tokens--> % it is."),
        ran("plot();", FIGURE, tags=["main-figure"], alt="PPL by tokens"),
        ran("better", SORTABLE.replace(">a<", f">{words}<"), tags=["answer"]),
        text("Of committed runs B is worse.", "finding"),
        text("Of committed runs the text is another.", "committed"),
        text("## The `law`"),
        ran("plots", FIGURE),
        ran("wide", WIDE),
        ran("fit.summary()", SUMMARY),
        ran("long", pd.DataFrame({"a": range(50)}).to_html()),
    )


METRICS = {"experiment": "A", "train_tokens": 28000, "seed": 1, "val_ppl": 654.34, "test_ppl": 571.5, "best_epoch": 2}
METRICS |= {"epochs_run": 4, "overfit_rate": 0.0474, "total_seconds": 90.0, "test_bits_per_byte": 1.8765}
METRICS |= {"device": "cpu"}
PPL = {"train_ppl": (1100.0, 110.0, 11.0), "val_ppl": (1100.0, 700.0, 110.0)}
STEPS = [("phase2", step, name, value) for name, values in PPL.items() for step, value in enumerate(values, 1)]
HISTORY = pd.DataFrame(STEPS, columns=["phase", "step", "metric", "value"])
MISSING = [f"A_seed-3: failed: NonFiniteLoss {HOSTILE}", "A_seed-4: to come"]
CORPUS = notebook(
    text("# The corpus"),
    ran("texts", f"<table><tr><td>{HOSTILE.replace('<', '&lt;')}</td></tr></table>"),
    printing(f"{HOSTILE}\n"),
    ran("active", "<script>alert(1)</script><iframe src='http://x'></iframe><p>left</p>"),
)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def repository(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The notebook of the analysis and a grid's runs; to execute is to copy."""
    patch.setenv("CTXLM_RESULTS", str(folder / "results"))
    patch.setenv("CTXLM_OUTPUTS", str(folder / "outputs"))
    patch.setattr(site, "ROOT", folder)

    def copy(name, parameters, target, outputs):
        return nbformat.read(shutil.copy(folder / "notebooks" / f"{name}.ipynb", target), as_version=4)

    def by_file(folder, run):  # these runs are of no code
        return ("finished", "") if (folder / "metrics.json").exists() else state(folder, run)

    patch.setattr(site, "_execute", copy)
    patch.setattr(site, "state", by_file)
    write(folder, {"notebooks/04_scaling.ipynb": analysis()})
    settings = {"title": TITLE, "description": "A <small> grid.", "experiments": {"A": {"train_tokens": 28000}}}
    write(folder, {"mini.yaml": json.dumps(settings | {"sweep": {"seed": [9, 10, 11, 3, 4]}})})
    home = folder / "outputs" / "mini"
    write(home, {"A_seed-3/failure.txt": f"NonFiniteLoss {HOSTILE}", "corpus/corpus.ipynb": CORPUS})
    # the grid does not ask for the last
    for seed, changed in ((9, {}), (10, {"test_ppl": None, "device": "cuda"}), (11, {}), (1, {})):
        metrics = json.dumps(METRICS | {"seed": seed} | changed)
        write(home / f"A_seed-{seed}", {"metrics.json": metrics, "history.csv": HISTORY.to_csv(index=False)})
    return folder


@pytest.fixture
def grid(tmp_path, monkeypatch) -> str:
    return str(repository(tmp_path, monkeypatch) / "mini.yaml")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The index of a grid's report."""
    with pytest.MonkeyPatch.context() as patch:
        return build(str(repository(tmp_path_factory.mktemp("repository"), patch) / "mini.yaml"))


def soup_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def rows_of(table) -> list[dict[str, str]]:
    names = [cell.get_text() for cell in table.thead("th")]
    return [dict(zip(names, [cell.get_text() for cell in row("td")], strict=True)) for row in table.tbody("tr")]


def test_pages_load_nothing_run_nothing_but_their_own_script_and_lead_somewhere(built):
    pages = sorted(built.parent.glob("*.html"))
    assert len(pages) == 3
    for page in pages:
        soup = soup_of(page)
        assert all(tag["src"].startswith("data:image/") for tag in soup(src=True)) and not soup(onerror=True)
        assert not soup(["link", "iframe", "object", "base", "form"]) and not re.search(r"@import|url\(", str(soup))
        (policy,) = [tag["content"] for tag in soup("meta", attrs={"http-equiv": True})]
        sha = base64.b64encode(hashlib.sha256(soup.script.string.encode()).digest()).decode()
        assert len(soup("script")) == 1 and f"script-src 'sha256-{sha}'" in policy
        assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy and "http" not in policy
        for href in (link["href"] for link in soup("a")):
            file, _, anchor = href.partition("#")
            target = page.parent / file if file else page
            assert target.is_file() and (not anchor or soup_of(target).find(id=anchor)), href
        assert all(image["alt"] not in ("", "figure") for image in soup("img"))
        assert [link.get_text() for link in soup.nav("a")][:2] == ["Index", "Scaling"] and "Runs" in soup.nav.get_text()
        assert len(soup("h1")) == 1 and soup.html["lang"] == "en"


def test_a_notebook_is_shown_with_its_code_folded_its_figures_described_and_without_warnings(built):
    soup = soup_of(built.with_name("04_scaling.html"))
    words = soup.get_text()
    assert not re.search("Of a grid|UserWarning|28,000", words) and "2.6\u00a0% it is" in words
    assert [image["alt"] for image in soup("img")] == ["PPL by tokens", "The law"]
    folded = [details for details in soup("details") if details.summary.get_text() == "code"]
    assert "secret_call" in folded[0].get_text() and not any(details.has_attr("open") for details in folded)
    assert soup.find(id="the-law").get_text() == "The law"
    assert "Of committed runs" not in words  # a user's grid has findings of its own
    (rows,) = [details for details in soup("details") if details.summary.get_text() == "50 rows"]
    assert rows.find("table") and "Notes: [1] Of errors." in " ".join(words.split())
    assert all(table.find_parent(tabindex="0") for table in soup("table"))


def test_how_runs_were_made_is_shown_on_demand_short_tables_and_regressions_at_once():
    table = '<div class="output {}"><table><tr><td>1</td></tr></table></div>'
    assert site.page_body(table.format("provenance"), []).details.table
    assert not site.page_body(table.format("answer"), [])("details")
    long = table.replace("<tr><td>1</td></tr>", f"<tbody>{30 * '<tr></tr>'}</tbody>")
    assert site.page_body(long.format(""), []).details.summary.get_text() == "30 rows"
    for shown in (long.format("answer"), long.format("").replace("<table>", '<table class="simpletable">')):
        assert not site.page_body(shown, [])("details")


def test_the_index_of_a_grid_has_its_answer_its_figure_its_runs_and_why_others_are_missing(built):
    soup, corpus = (soup_of(built.with_name(name)) for name in ("index.html", "corpus.html"))
    assert soup.h1.get_text() == soup.title.get_text() == TITLE and "A <small> grid." in soup.get_text()
    answer, runs = soup("table")
    shared = "All of them: corpus chitchat, embedding ppmi, embed_dim 768, dtype auto. The"  # not the device
    assert shared in soup.get_text()
    assert "A is better" in answer.get_text() and f"data:image/png;base64,{PICTURE}" in soup.img["src"]
    assert "secret_call" not in soup.get_text() and not soup("details")
    first, second, _ = rows_of(runs)  # and not A_seed-1
    assert first == {
        **{"PPL by epoch": "", "run": "A_seed-9", "tokens": "28,000", "seed": "9", "test PPL": "571.5"},
        **{"bits per byte": "1.877", "validation PPL": "654.3", "best epoch": "2", "over-fitting": "+4.7\u00a0%"},
        "minutes": "1.5",
    }
    assert (second["run"], second["test PPL"]) == ("A_seed-10", "–")
    assert [item.get_text() for item in soup("li") if item.get_text().startswith("A_seed")] == MISSING
    for name, metric in (("training", "train_ppl"), ("validation", "val_ppl")):  # the small curve, where up is more
        x, y = np.array([point.split(",") for point in soup.svg.find(class_=name)["points"].split()], float).T
        assert x.tolist() == [1, 2, 3] and np.allclose(y, -np.log(PPL[metric]), atol=6e-4)
    # the corpus is text, of which nothing is active
    assert corpus.get_text().count(HOSTILE) == 2 and "left" in corpus.get_text() and not corpus("img")


def test_what_tells_the_experiments_of_a_grid_apart():
    table = site._compared(load_grid("quick"))
    assert table.to_dict("list") == {"experiment": ["A", "B"], "num_layers": ["6", "3"], "context_dim": ["128", "256"]}


def test_a_rebuilt_report_replaces_the_old_one_whole_and_links_to_the_site_where_there_is_one(grid, tmp_path):
    index = build(grid)
    assert "Committed findings" not in index.read_text(encoding="utf-8")
    write(index.parent, {"gone.html": "of an earlier report"})
    write(index.parents[1] / ".report-new", {"half.html": "of a command that was killed"})
    write(tmp_path, {"outputs/site/index.html": "made", "notebooks/04_scaling.ipynb": analysis("B is better")})
    content = build(grid).read_text(encoding="utf-8")
    assert "B is better" in content and '<a href="../../site/index.html">Committed findings</a>' in content
    assert {path.name for path in index.parent.iterdir()} == {"index.html", "04_scaling.html", "corpus.html"}
    assert not [*index.parents[1].glob(".report*")]


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
def test_where_the_analysis_fails_the_earlier_one_stays_and_the_index_says_why(grid, earlier, monkeypatch, capsys):
    def fail(_name, _parameters, target, *_):
        target.write_text("half", encoding="utf-8")
        raise ConfigError(f"no sizes {HOSTILE}")

    kept = None
    if earlier:
        kept = (build(grid).parents[1] / "04_scaling.ipynb").read_bytes()
        capsys.readouterr()
    monkeypatch.setattr(site, "_execute", fail)
    assert main(["--grid", grid]) == 1
    printed = capsys.readouterr()
    why, where = printed.err.removeprefix("error: ").splitlines()
    assert why == f"no sizes {HOSTILE}"
    assert printed.out.splitlines() == MISSING
    index = Path(where.rpartition(": ")[2])
    soup = soup_of(index)
    assert f"The analysis failed: {why}." in soup.get_text() and not soup.main("img", src="x")
    assert ("A is better" in soup.get_text()) == index.with_name("04_scaling.html").exists() == earlier
    executed = index.parents[1] / "04_scaling.ipynb"
    assert (executed.read_bytes() if executed.exists() else None) == kept
    assert len(rows_of(soup("table")[-1])) == 3


def test_a_grid_without_a_finished_run_is_refused_in_a_line(grid, tmp_path, capsys):
    write(tmp_path, {"none.yaml": json.dumps({"title": "None", "experiments": {"A": {}}})})
    assert main(["--grid", str(tmp_path / "none.yaml")]) == 1
    line = capsys.readouterr()
    assert line.out == "" and line.err.startswith("error: ") and line.err.count("\n") == 1
    assert "A: to come" in line.err


@pytest.mark.slow
def test_where_a_page_fails_it_is_named_and_the_earlier_site_stays(tmp_path, monkeypatch, capsys):
    """The other page sees its parameters, and no runs but committed ones."""
    source = 'import os, pathlib\nassert sizes == 7 and not [*pathlib.Path(os.environ["CTXLM_OUTPUTS"]).glob("*/")]'
    parameters = nb.new_code_cell("sizes = 1", metadata={"tags": ["parameters"]})
    good, bad = (notebook(parameters, nb.new_code_cell(code)) for code in (source, 'raise ValueError("no\\nsizes")'))
    write(tmp_path, {"notebooks/04_good.ipynb": good, "notebooks/05_bad.ipynb": bad, "site/index.html": "earlier"})
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "PAGES", {"04_good": ("04_good", {"sizes": 7}), "05_bad": ("05_bad", {})})
    assert main(["--all"]) == 1
    assert capsys.readouterr().err.startswith("error: notebooks/05_bad.ipynb ended in ValueError (no sizes): ")
    assert (tmp_path / "site" / "index.html").read_text() == "earlier"


def test_a_kernel_that_does_not_start_is_started_once_more(tmp_path, monkeypatch):
    (tmp_path / "done.ipynb").write_text(notebook(text("# Done")))
    died = subprocess.CompletedProcess([], 1, "", "RuntimeError: Kernel died before replying to kernel_info")
    monkeypatch.setattr(site.subprocess, "run", Mock(side_effect=[died, subprocess.CompletedProcess([], 0)]))
    assert site._execute("04_scaling", {}, tmp_path / "done.ipynb", tmp_path).cells[0].source == "# Done"


# In a browser


@pytest.mark.slow
def test_nbconvert_makes_a_page_that_is_read_by_everyone(tmp_path, browser):
    """As a user calls it: `jupyter nbconvert --to html --template ctxlm executed.ipynb`."""
    cells = text("# A run\n\n## How it went"), ran("draw()" * 40, FIGURE), printing("x" * 400)
    (tmp_path / "run.ipynb").write_text(notebook(*cells, ran("", FIGURE, alt="Said"), ran("", WIDE)))
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--template", "ctxlm", str(tmp_path / "run.ipynb")]
    folders = ROOT / "ctxlm" / "analysis" / "templates"
    subprocess.run([*command, f"--TemplateExporter.extra_template_basedirs={folders}"], check=True)
    read_by_everyone(browser, tmp_path / "run.html")
    assert [image["alt"] for image in soup_of(tmp_path / "run.html")("img")] == ["How it went", "Said"]


@pytest.mark.slow
def test_a_report_is_read_on_a_phone_in_the_dark_and_in_print(built, browser):
    """As is the site, of what is committed, in tests/test_prose.py."""
    for page in built.parent.glob("*.html"):
        read_by_everyone(browser, page)
        assert browser.printed() <= 4
    browser.open(built.with_name("04_scaling.html"), 390)
    scrolled = """[...document.querySelectorAll(".output")].some(box => box.scrollWidth > box.clientWidth)"""
    assert browser.run(scrolled)  # the wide table, in its own box
    browser.open(built, 390)
    field, curve = (browser.page.locator(name).first.bounding_box() for name in ("input", ".spark"))
    assert field["width"] == 390 - 2 * 16 and (curve["width"], curve["height"]) == (80, 24)


@pytest.mark.slow
def test_a_click_on_a_header_sorts_its_table_and_words_in_the_field_filter_it(built, browser):
    def column(k):
        """What is seen of a column of the table."""
        cells = browser.page.locator(f"{table} >> css=tbody tr:visible td:nth-child({k + 1})")
        return [words.replace("\u00a0", " ") for words in cells.all_inner_texts()]

    def click(k):
        header = browser.page.locator(f"{table} >> css=th").nth(k)
        header.get_by_role("button").click()
        return header.get_attribute("aria-sort")

    table = "table >> nth=0"
    browser.open(built.with_name("04_scaling.html"))
    sides = "[...document.querySelectorAll('tbody tr:first-child td')].map(cell => getComputedStyle(cell).textAlign)"
    assert browser.run(sides)[:3] == ["left", "right", "right"]
    assert click(1) == "ascending" and column(1) == ["−3.0", "90", "1,200.5"]
    assert click(1) == "descending" and column(1) == ["1,200.5", "90", "−3.0"]
    assert click(0) == "ascending" and column(0) == ["A is better", "b-9", "b-10"]
    assert click(2) == "ascending" and column(2) == ["−2.0 %", "+10.0 %", "–"]

    table = "table.runs"
    browser.open(built)
    assert not browser.page.get_by_role("button", name="PPL by epoch").count()  # of pictures there is no order
    assert column(1) == ["A_seed-9", "A_seed-10", "A_seed-11"]
    field = browser.page.get_by_role("searchbox")
    for words, left in (("SEED-1", ["A_seed-10", "A_seed-11"]), ("seed-1 –", ["A_seed-10"]), ("nothing", [])):
        field.fill(words)
        assert column(1) == left
        assert browser.page.locator("output").inner_text() == f"{len(left)} of 3 runs"
    field.fill("")
    assert click(1) == "ascending" and click(1) == "descending"
    assert column(1) == ["A_seed-11", "A_seed-10", "A_seed-9"]  # 10 is more than 9
