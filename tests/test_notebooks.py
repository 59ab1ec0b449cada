"""The notebooks run as they are, by hand and by papermill, refuse bad input before any work, and show text as text."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from ctxlm.analysis import benchmark, site
from ctxlm.analysis.estimates import paired
from ctxlm.analysis.run_plots import WIDTH, visible
from ctxlm.analysis.runs import read_runs
from ctxlm.config import ConfigError, Experiment
from ctxlm.files import ROOT
from tests.conftest import SMALL, run_cells, short_paragraphs

CACHE = os.environ.get("CTXLM_CACHE") or "data/cache"

pytestmark = pytest.mark.usefixtures("empty_cache")


def papermill(folder, notebook="02_experiment", cwd=ROOT, **parameters):
    """Run a notebook as the README says; returns the process and the executed notebook's path."""
    executed = folder / f"{notebook}.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(executed)]
    command += ["--cwd", str(cwd), "-k", "python3", "--no-progress-bar", "-y", yaml.safe_dump(parameters)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT), executed


def run_here(notebook="02_experiment", **parameters):
    """Run a notebook's cells in this process, where no kernel has to be waited for."""
    return run_cells(f"notebooks/{notebook}.ipynb", parameters)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_an_experiment_from_a_text_of_ones_own(tmp_path, text):
    process, executed = papermill(tmp_path, corpus=str(text), output_dir=str(tmp_path / "run"), **SMALL)
    assert process.returncode == 0, process.stderr
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["train_tokens"], metrics["num_layers"], metrics["corpus"]) == (600, 2, str(text))
    assert metrics["val_ppl"] > 1 and metrics["test_ppl"] > 1 and metrics["recurrence_residual"] <= 1e-5
    history = pd.read_csv(tmp_path / "run" / "history.csv").set_index(["phase", "step", "metric"])["value"]
    assert history["forgetting_init", 0, "share_left"] == history["forgetting", 0, "share_left"] == 1
    assert history["recent_tokens", 0, "val_ppl"] > 1
    for name in ("init_er_pct", "train_er_pct", "train_er_noiseless_pct", "val_er_pct"):
        assert 0 < metrics[name] <= 100
    cells = nbformat.read(executed, as_version=4).cells
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    figures = [base64.b64decode(shown["image/png"]) for shown in data if "image/png" in shown]
    assert [int.from_bytes(png[16:20]) for png in figures] == [round(110 * WIDTH)] * 4  # pixels: all are alike


BAD = [("02_experiment", bad) for bad in ({"num_layer": 3}, {"corpus": "no/such.txt"}, {"device": "cuda:7"})]
BAD += [("02_experiment", {"model": "kneser-ney"}), ("02_experiment", {"window": 3})]
BAD += [("03_baseline", {"model": "context"}), ("03_baseline", {"val_samples": 99})]


@pytest.mark.parametrize(("notebook", "bad"), BAD)
def test_bad_input_is_one_sentence_and_touches_nothing(tmp_path, text, notebook, bad, monkeypatch):
    """Nor what an earlier run has left, which a batch may do anew."""
    monkeypatch.setenv("CTXLM_BATCH", "1")
    folder, kept = tmp_path / "run", {"device": "cpu", "dtype": "float32"}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(kept), encoding="utf-8")
    values = SMALL if notebook == "02_experiment" else {"train_tokens": 600}
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"^{name} = {value!r}[ :]") as caught:
        run_here(notebook, **values | {"corpus": str(text), "output_dir": str(folder)} | bad)
    assert "\n" not in str(caught.value) and metrics_of(folder) == kept
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"metrics.json"}


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '<meta http-equiv="refresh" content="0;url=http://x">',
    "</pre><style>",
    "<script>alert(2)</script>",
    "$5 or $6 **b**\x1b[m\x9b\u202e",
)
CONTROL = set("\x1b\x9b\u202e")
CORPUS = {"train_tokens": 600, "embed_dim": 16, "embedding": "random"}
CORPUS |= dict.fromkeys(("val_samples", "development_samples", "test_samples"), 2)


@pytest.mark.slow
def test_a_corpus_is_shown_as_text_whatever_it_holds(tmp_path, text):
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    path = tmp_path / f"{HOSTILE[0]}.txt"
    path.write_text("\n\n".join(f"{' '.join(HOSTILE)} marked {words}" for words in paragraphs), encoding="utf-8")
    process, executed = papermill(tmp_path, "01_corpus", ROOT / "notebooks", corpus=str(path), **CORPUS)
    assert process.returncode == 0, process.stderr
    cells = site.cells_html(nbformat.read(executed, as_version=4))
    for page in (HTMLExporter().from_filename(executed)[0], str(site.page_body(cells, pages=()))):
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


@pytest.mark.parametrize(
    "read", [{"train_sample_tokens": 20}, {"shuffle_samples": True, "data_seed": 50}], ids=["cut", "shuffled"]
)
def test_a_corpus_is_shown_that_another_is_judged_beside(tmp_path, text, read):
    judged = short_paragraphs(tmp_path / "judged.txt", count=200)
    read = {"corpus": str(text), "judged_corpus": str(judged), "train_tokens": 200} | read
    run_here("01_corpus", **CORPUS | read, output_dir=str(tmp_path))
    assert json.loads((tmp_path / "corpus.json").read_bytes())["settings"]["judged_corpus"] == str(judged)


@pytest.mark.slow
def test_the_benchmark_is_measured(tmp_path, text, monkeypatch):
    def here(command, **_):  # in this process, whose products are not timed
        assert command[:3] == [sys.executable, "-m", "ctxlm.analysis.benchmark"]
        return Mock(returncode=0, stdout=json.dumps(benchmark.measure(Experiment(**json.loads(command[3])))))

    monkeypatch.setattr(benchmark, "subprocess", Mock(run=here))
    monkeypatch.setattr(benchmark, "peak_gflops", lambda *_: 50.0)
    values = {"sizes": [200, 400], "literal_tokens": 8, "embed_dim": 16}
    run_here("10_benchmark", corpus=str(text), output_dir=str(tmp_path), **values)
    stages, runs = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("stages", "runs"))
    assert len(stages) == 2 * 2 * 4 and set(runs["tokens"]) == {200, 400}
    assert (stages[["seconds", "share_of_floor"]] > 0).all(axis=None)
    literal = stages.groupby("stage")["speedup_over_literal"].min()
    assert (literal[["recurrence", "phase2_epoch"]] > 0).all() and literal[["phase1_step", "evaluation"]].isna().all()
    assert (runs["recurrence_residual"] <= 1e-5).all()


@pytest.mark.slow
def test_runs_made_by_hand_are_compared(tmp_path, text, outputs):
    """Two runs of one size; then all that lie beside one another, also once others have come, or without epochs."""
    values = SMALL | {"corpus": str(text), "phase2_epochs": 1}
    for seed in (42, 43):
        run_here(**values, seed=seed)
    folders = sorted((outputs / "interactive").iterdir())
    assert len(folders) == 2 and metrics_of(folders[0])["seed"] != metrics_of(folders[1])["seed"]
    run_here("04_scaling", grid="interactive", output_dir=str(tmp_path / "replicates"))
    run_here(**values | {"num_layers": 3})
    few = {"corpus": str(text), "val_samples": 2, "development_samples": 2, "test_samples": 2}
    run_here("03_baseline", **few, train_tokens=600)
    run_here("04_scaling", grid="interactive", output_dir=str(tmp_path / "compared"))
    runs = read_runs("interactive")
    first, second, *_ = ({"configuration": name} for name in sorted(runs["configuration"].unique()))
    (expected,) = paired(runs, first, second)
    shutil.rmtree(outputs / "interactive")
    for size in (400, 600):
        run_here("03_baseline", **few, train_tokens=size)
    run_here("04_scaling", grid="interactive", output_dir=str(tmp_path / "counted"))
    compared, counted = (pd.read_csv(tmp_path / name / "estimates.csv") for name in ("compared", "counted"))
    assert compared["contrast"][0] == expected.contrast and len(counted)
    assert compared["value"][0] == pytest.approx(expected.in_unit[0])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", ["01_corpus", "02_experiment", "03_baseline"])
def test_a_notebook_runs_with_its_defaults_where_jupyterlab_opens_it(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", CACHE)  # chitchat is read once for all tests
    monkeypatch.chdir(ROOT / "notebooks")
    few = {"val_samples": 1, "development_samples": 1, "test_samples": 1, "phase2_epochs": 1, "train_tokens": 2000}
    run_here(notebook, output_dir=str(tmp_path / "out"), **(few if notebook == "02_experiment" else {}))
    assert (tmp_path / "out" / ("corpus.json" if notebook == "01_corpus" else "metrics.json")).exists()
