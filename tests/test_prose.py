"""The site of what is committed, and numbers in prose: every one is held against the estimate it is of.

In Markdown a number is followed by `<!--=PAGE:CONTRAST@AT-->`, spaces written as "_", which names an estimate that the
page shows. The number before it is its value; where a bracket closes before it, value, low and high.
"""

import base64
import math
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from scipy import stats

from ctxlm.analysis.estimates import MIME
from ctxlm.analysis.site import PAGES, build_all
from ctxlm.files import ROOT
from tests import by_hand
from tests.browser import read_by_everyone

BARRIERS = ("index.html", "06_contexts.html", "08_audit.html", "method.html", "runs.html")
"""Pages of every kind, on which a reader without eyes or mouse must find no barrier."""
MARKER = re.compile(r"<!--=(?P<page>\w+):(?P<contrast>\S+?)@(?P<at>\S*?)-->")
NUMBER = re.compile(r"[+−-]?\d[\d,]*(?:\.\d+)?")
DOCUMENTS = ["README.md", "README.ja.md", "docs/index.md", "docs/index.ja.md", "docs/literature.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site of what is committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXLM_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        return build_all().parent


@pytest.fixture(scope="module")
def pages(site):
    """Every page of analysis, executed from committed results alone: name → notebook."""
    return {name: nbformat.read(site / "notebooks" / f"{name}.ipynb", as_version=4) for name in PAGES}


@pytest.fixture(scope="module")
def estimates(pages):
    """(page, contrast, at) → the estimate, as the page shows it; a name is of one number."""
    known = {}
    for name, page in pages.items():
        for output in (output for cell in page.cells for output in cell.get("outputs", [])):
            for estimate in output.get("data", {}).get(MIME, []):
                key = name, estimate["contrast"], estimate["at"]
                assert known.setdefault(key, estimate)["in_unit"] == estimate["in_unit"], f"{key} names two numbers"
    return known


def prose():
    """(where, text) of all Markdown that may state results."""
    for name in DOCUMENTS:
        yield name, (ROOT / name).read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("0[4-8]_*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                yield path.name, cell.source


def key_of(marker):
    """(page, contrast, at) of the estimate that a marker names."""
    return marker["page"], *(marker[name].replace("_", " ") for name in ("contrast", "at"))


def stated(text):
    """(where its numbers are, marker) of every marker of a text."""
    start = 0
    for marker in MARKER.finditer(text):
        end = len(text[: marker.start()].rstrip().rstrip("*_").rstrip())
        count = 3 if text[:end].endswith((")", "）")) else 1
        yield [*NUMBER.finditer(text, start, end)][-count:], marker
        start = marker.end()


def agrees(printed, value):
    """Whether a printed number is this value, rounded to the printed digits; a sign that is printed must be right."""
    number = float(printed.replace(",", "").replace("−", "-"))
    decimals = len(printed.partition(".")[2])
    if printed[0] in "+−-" and number * value < 0:
        return False
    return math.isclose(abs(number), abs(value), abs_tol=0.5 * 10**-decimals + 1e-9)


def holds(numbers, estimate):
    """Whether printed numbers are an estimate's: its value, or value, low and high, the ends in either order."""
    shown = estimate["in_unit"]
    if len(numbers) == 3 and shown[1] < 0 < shown[2] and not all(text[0] in "+−" for text in numbers[1:]):
        return False  # ends on both sides of 0 carry their signs
    if len(numbers) == 1:
        return agrees(numbers[0], shown[0])
    ends = [(numbers[1], numbers[2]), (numbers[2], numbers[1])]
    return agrees(numbers[0], shown[0]) and any(all(map(agrees, end, shown[1:])) for end in ends)


@pytest.mark.slow
def test_every_stated_number_is_the_one_that_its_page_computes(estimates):
    wrong = []
    for where, text in prose():
        for places, marker in stated(text):
            numbers, key = [place[0] for place in places], key_of(marker)
            if key not in estimates:
                wrong.append(f"{where}: no estimate {key}")
            elif not holds(numbers, estimates[key]):
                wrong.append(f"{where}: {numbers} is not {estimates[key]['in_unit']} of {key}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", by_hand.EVERY)
def test_what_pages_show_is_what_is_computed_by_hand(name, estimates):
    """From which runs, too: by hand they are chosen anew.

    Points are the same sums. Intervals are made in another way: by hand conversations are jackknife pseudo-values, of
    which each counts once; in the project they are sums, which weigh as many tokens, and Kish's effective number of
    conversations. Ends agree to 3 % of the half-width.
    """
    sums, tokens = by_hand.sums(name)
    mean, low, high = by_hand.interval(sums, tokens)
    e = estimates[re.fullmatch(r"(\S+): (.+) @ (.*)", name).groups()]
    assert e["replicates"] == len(sums) and e["value"] == pytest.approx(mean, rel=1e-6)
    assert (e["low"], e["high"]) == pytest.approx((low, high), abs=0.03 * (high - low) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sites", "contrast", "size"),
    [
        (by_hand.SITES, "A − B, stabilised", "86,925 tokens"),
        (by_hand.TEXTWISE, "A − B, both embeddings, stabilised", "86,925 tokens"),
        (by_hand.TWICE, "A − B, stabilised", "183,620 tokens"),
        (by_hand.SHIFTS, "shift of A − B, twice the text", "mean of 4 sites"),
        (by_hand.STUDIED, "A − B, as the study trains", "86,925 tokens"),
        *(
            (
                [name for name in by_hand.RECIPE if f"@ {x}," in name and ("both" in name) == both],
                "stabilised − study",
                f"{x}, {at}",
            )
            for x in "AB"
            for both, at in enumerate(["mean of 6 sites", "mean of 3 texts"])
        ),
        (by_hand.AT_RANDOM, "A − B", "mean of 4 texts, random order"),
    ],
)
def test_sites_are_combined_as_by_hand(sites, contrast, size, estimates):
    rows = [estimates[re.fullmatch(r"(\S+): (.+) @ (.*)", name).groups()] for name in sites]
    errors = [(e["high"] - e["low"]) / 2 / stats.t.ppf(0.975, e["dof"]) for e in rows]
    by_us = by_hand.over_sites(np.array([e["value"] for e in rows]), np.array(errors))
    combined = estimates["04_sites", contrast, size]
    assert (combined["value"], combined["low"], combined["high"]) == pytest.approx(by_us, rel=1e-5)


def test_no_percentage_of_a_result_goes_unmarked():
    """In the index, the README's results and the findings of a page, a percentage that has no marker cannot be held."""
    for where, text in prose():
        if where.startswith("README"):
            text = text[text.find("<!-- results -->") : text.find("<!-- end of results -->")]
        elif where == "docs/literature.md" or (where.endswith(".ipynb") and "In short" not in text):
            continue  # others' claims have their source beside them
        rest = re.sub(r"95\s?[%％]", "", text)  # the level of an interval is no result
        for places, marker in reversed([*stated(rest)]):  # only the numbers that a marker is of are taken out
            start = places[0].start()
            rest = rest[:start] + re.sub(r"\d", "", rest[start : marker.start()]) + rest[marker.end() :]
        assert not re.search(r"\d\s?[%％]", rest), f"{where}: {re.search(r'.{0,60}[0-9] ?[%％]', rest)[0]!r}"


@pytest.mark.slow
def test_pages_are_short_have_regressions_in_sight_show_no_warning_and_describe_figures(pages):
    for name, page in pages.items():
        code = [cell for cell in page.cells if cell.cell_type == "code" and cell.id != "kernel"]
        assert len(code) <= 15 and max(len(cell.source.splitlines()) for cell in code) <= 16, name
        assert any("smf." in cell.source and "summary()" in cell.source for cell in code), name
        assert any(MIME in output.get("data", {}) for cell in code for output in cell.outputs), name
        for cell in code:
            figures = [data["image/png"] for o in cell.outputs if "image/png" in (data := o.get("data", {}))]
            assert len({*figures}) == len(figures), f"{name} shows twice: {cell.source}"
            assert bool(cell.metadata.get("alt")) == bool(figures), f"{name}: {cell.source}"
            assert not [o.text for o in cell.outputs if o.get("name") == "stderr"], name


def test_the_markers_are_read_as_they_are_meant():
    text = "A is **6.4 % lower** (1.8 to 10.7)<!--=04:A_−_B@28,000_tokens--> and 3<!--=08:claims@-->."
    assert [([place[0] for place in places], key_of(marker)) for places, marker in stated(text)] == [
        (["6.4", "1.8", "10.7"], ("04", "A − B", "28,000 tokens")),
        (["3"], ("08", "claims", "")),
    ]
    estimate = {"in_unit": (-6.397, -10.73, -1.849)}
    for right in (["−6.4", "−10.7", "−1.8"], ["6.4", "1.8", "10.7"], ["6.4"]):
        assert holds(right, estimate)
    for wrong in (["+6.4"], ["6.5"]):
        assert not holds(wrong, estimate)


@pytest.mark.slow
def test_the_site_of_what_is_committed_is_whole_and_short(site, browser):
    assert 1 <= len(re.findall(rb"/Type /Page\b", (site / "article.pdf").read_bytes())) <= 4
    texts = {path.name: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    for page, text in texts.items():
        assert text.count("<h1") == 1 and """Policy" content="default-src 'none'; """ in text, page
        links = re.findall(r'<(?:a|img) [^>]*?(?:href|src)="([^":#]*)#?([^":]*)"', text)
        assert len(links) > 10, page
        for path, anchor in links:
            assert (site / (path or page)).is_file(), (page, path)
            assert not anchor or f' id="{anchor}"' in texts[path or page], (page, path, anchor)
    index = BeautifulSoup(texts["index.html"], "html.parser")
    assert '<html lang="ja">' in texts["index.ja.html"] and index.html["lang"] == "en"
    figure = base64.b64encode((site / "sites.png").read_bytes()).decode()  # which `make docs` copies
    assert figure in index.img["src"] and figure in texts["04_sites.html"]
    committed = sum(len(pd.read_csv(path)) for path in (ROOT / "data" / "results").glob("*/runs.csv"))
    committed += len([*(ROOT / "data" / "results").glob("*/*/metrics.json")])
    for page in sorted(site.glob("*.html")):
        read_by_everyone(browser, page, barriers=page.name in BARRIERS)
        browser.open(page)
        assert browser.printed() <= (4 if page.name == "index.html" else 6), page
        if page.name == "runs.html":
            assert browser.page.locator("output").inner_text() == f"{committed} of {committed} runs"
