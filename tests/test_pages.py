"""Notebooks as pages: a corpus as text, the benchmark."""

import ast
import base64
import io
import json
import re

import matplotlib.pyplot as plt
import nbformat
import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from nbconvert import HTMLExporter
from nbformat.v4 import new_output
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

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


def execute(notebook, folder, **parameters):
    """Run a notebook in this process, as papermill would in a kernel's; returns the path of the executed one."""
    path = folder / f"{notebook}.ipynb"
    content = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / path.name)), parameters)
    names: dict = {}
    for cell in (cell for cell in content.cells if cell.cell_type == "code"):
        tree, value = ast.parse(cell.source), None
        ending = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if ending:
            value = eval(compile(ast.Expression(ending.value), path.name, "eval"), names)
        if value is not None and not cell.source.endswith(";"):
            data, metadata = DisplayFormatter().format(value)
            cell.outputs.append(new_output("display_data", data, metadata=metadata))
        for number in plt.get_fignums():
            png = io.BytesIO()
            plt.figure(number).savefig(png, dpi=50)
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            cell.outputs.append(new_output("display_data", data))
        plt.close("all")
    nbformat.write(content, path)
    return path


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
    small = dict.fromkeys(("val_samples", "development_samples", "test_samples"), 2)
    small |= {"train_tokens": 600, "embed_dim": 16, "embedding": "random", "corpus": str(path)}
    executed = execute("01_corpus", tmp_path, **small)
    pages = [HTMLExporter().from_filename(executed)[0], build_page(executed).read_text(encoding="utf-8")]
    for page in pages:
        soup = BeautifulSoup(page, "html.parser")
        assert not CONTROL & set(page)
        assert "marked" not in re.sub(r"<(code|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)  # nor are formulas
        for tag in soup(True):
            assert "onerror" not in tag.attrs and tag.get("src") != "x"
            assert tag.name != "meta" or tag.get("http-equiv", "").lower() != "refresh"
        for tag in soup(["script", "style"]):
            hidden = tag.extract().get_text()
            assert "marked" not in hidden and "alert(" not in hidden
        words = soup.get_text()
        assert f"{visible(' '.join(HOSTILE))} marked" in words and f"{HOSTILE[0]}.txt" in words  # for the reader
        assert "corpus_digest" in words and "Write what was read" in words


@pytest.mark.parametrize("read", [{"train_sample_tokens": 20}, {"shuffle_samples": True, "data_seed": 50}])
def test_a_corpus_is_shown_that_another_is_judged_beside(tmp_path, text, read):
    judged = short_paragraphs(tmp_path / "judged.txt", count=200)
    small = dict.fromkeys(("val_samples", "development_samples", "test_samples"), 12)
    small |= {"train_tokens": 200, "embed_dim": 16, "embedding": "random", "corpus": str(text)} | read
    execute("01_corpus", tmp_path, judged_corpus=str(judged), output_dir=str(tmp_path), **small)
    assert json.loads((tmp_path / "corpus.json").read_bytes())["settings"]["judged_corpus"] == str(judged)


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(tmp_path, text, monkeypatch):
    # in this process, whose products are not timed; tests/test_benchmark.py looks at what goes between processes
    monkeypatch.setattr(benchmark, "measure_apart", lambda values: json.loads(json.dumps(benchmark.measure(values))))
    monkeypatch.setattr(benchmark, "peak_gflops", lambda *_: 50.0)
    values = {"sizes": [200, 400], "literal_tokens": 8, "embed_dim": 16}
    executed = execute("10_benchmark", tmp_path, corpus=str(text), output_dir=str(tmp_path), **values)
    measured = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    positive = """peak_gflops_float32 peak_gflops_bfloat16 phase2_epoch_share_of_floor
        phase2_epoch_speedup_over_literal recurrence_speedup_over_literal phase1_step_share_of_floor""".split()
    assert all(measured[name] > 0 for name in positive) and set(measured["peak_rss_gib"]) == {"200", "400"}
    assert isinstance(measured["time_growth_exponent"], float)  # of whatever sign: these sizes are too small to time
    assert measured["recurrence_residual"] <= 1e-5 and len(measured["stages"]) == 2 * 2 * 4
    page = build_page(executed).read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 and page.count("How fast?</h1>") == 1
