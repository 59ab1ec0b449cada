"""Notebooks as pages: a corpus as text, the benchmark."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import nbformat
import papermill
import pytest
from IPython.core.formatters import DisplayFormatter
from nbconvert import HTMLExporter
from nbformat.v4 import new_output

from ctxlm.analysis import benchmark
from ctxlm.analysis.playground import visible
from ctxlm.analysis.site import build_page
from ctxlm.files import ROOT
from tests.conftest import short_paragraphs


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A corpus of 60 short paragraphs, and a cache of its own."""
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    return short_paragraphs(tmp_path / "text.txt")


def execute(notebook, folder, monkeypatch, **parameters):
    """Run a notebook in this process, where parts can be replaced; returns the path of the executed one.

    Its cells keep what they displayed and the figures they left, but not the values that end them.
    """
    content, displayed = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4), []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    names: dict = {}
    for cell in (cell for cell in content.cells if cell.cell_type == "code"):
        exec(compile(cell.source, f"{notebook}:{cell.id}", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= parameters
        for thing in displayed:
            data, metadata = DisplayFormatter().format(thing)
            cell.outputs.append(new_output("display_data", data, metadata=metadata))
        for number in plt.get_fignums():
            png = io.BytesIO()
            plt.figure(number).savefig(png, dpi=50)
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            cell.outputs.append(new_output("display_data", data))
        plt.close("all")
        displayed.clear()
    nbformat.write(content, folder / f"{notebook}.ipynb")
    return folder / f"{notebook}.ipynb"


class Elements(HTMLParser):
    """The elements of a page with their attributes, what scripts and styles hold, and the text that a reader sees."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.hidden, self.text, self.within = [], [], "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.within = tag

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within in ("script", "style"):
            self.hidden.append(data)
        else:
            self.text += data


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '<meta http-equiv="refresh" content="0;url=http://x">',
    "</pre><style>",
    "<script>alert(2)</script>",
    "$5 or $6 **b**\x1b[m\x9b\u202e",
)
CONTROL = set("\x1b\x9b\u202e")


def test_a_corpus_is_shown_as_text_whatever_it_holds(tmp_path, text):
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    marked = [f"{' '.join(HOSTILE)} marked {paragraph}" for paragraph in paragraphs]
    path = tmp_path / f"{HOSTILE[0]}.txt"
    path.write_text("\n\n".join(marked), encoding="utf-8")
    small = {"train_tokens": 600, "embed_dim": 16, "embedding": "random", "corpus": str(path)}
    small |= dict.fromkeys(("val_samples", "development_samples", "test_samples"), 2)
    notebook, executed = ROOT / "notebooks" / "01_corpus.ipynb", tmp_path / "01_corpus.ipynb"
    kernel = {"kernel_name": "python3", "cwd": str(ROOT), "progress_bar": False}
    papermill.execute_notebook(notebook, executed, small, **kernel)
    pages = [HTMLExporter().from_filename(executed)[0], build_page(executed).read_text(encoding="utf-8")]
    for page in pages:
        content = Elements(page)
        assert f"{visible(' '.join(HOSTILE))} marked" in content.text  # for the reader
        assert f"{HOSTILE[0]}.txt" in content.text
        assert not any("marked" in hidden or "alert(" in hidden for hidden in content.hidden)
        assert not CONTROL & set(page)
        assert "marked" not in re.sub(r"<(code|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)  # nor are formulas
        for tag, attributes in content.elements:
            assert "onerror" not in attributes and attributes.get("src") != "x"
            assert tag != "meta" or attributes.get("http-equiv", "").lower() != "refresh"
        assert "corpus_digest" in content.text and "Write what was read" in content.text


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(tmp_path, text, monkeypatch):
    # in this process, whose products are not timed; tests/test_benchmark.py looks at what goes between processes
    monkeypatch.setattr(benchmark, "measure_apart", lambda values: json.loads(json.dumps(benchmark.measure(values))))
    monkeypatch.setattr(benchmark, "peak_gflops", lambda *_: 50.0)
    values = {
        "sizes": [300, 900],
        "literal_tokens": 20,
        "embed_dim": 16,
        "corpus": str(text),
        "output_dir": str(tmp_path),
    }
    executed = execute("10_benchmark", tmp_path, monkeypatch, **values)
    measured = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    positive = """peak_gflops_float32 peak_gflops_bfloat16 phase2_epoch_share_of_floor
        phase2_epoch_speedup_over_literal recurrence_speedup_over_literal phase1_step_share_of_floor""".split()
    assert all(measured[name] > 0 for name in positive) and set(measured["peak_rss_gib"]) == {"300", "900"}
    assert isinstance(measured["time_growth_exponent"], float)  # of whatever sign: these sizes are too small to time
    assert measured["recurrence_residual"] <= 1e-5 and len(measured["stages"]) == 2 * 2 * 4
    page = build_page(executed).read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 and page.count("How fast?</h1>") == 1
