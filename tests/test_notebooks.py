"""The notebooks run as they are, by hand and by papermill, and refuse bad input before any work."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from nbconvert import HTMLExporter
from safetensors.torch import load_file

from ctxlm.analysis.report import build_page
from ctxlm.analysis.run_plots import WIDTH
from ctxlm.config import BASELINES, Experiment
from ctxlm.corpus import split
from ctxlm.embeddings import load_embedding
from ctxlm.files import ROOT
from ctxlm.metrics import effective_rank_pct, singular_values
from ctxlm.model import ContextLM, load_own_weights
from ctxlm.phase2 import Predictor, evaluate
from ctxlm.recurrence import sequential

SMALL = {
    "embedding": "random",
    "embed_dim": 16,
    "context_dim": 16,
    "num_layers": 2,
    "train_tokens": 600,
    "val_samples": 2,
    "test_samples": 2,
    "phase2_epochs": 2,
    "phase2_batch_size": 128,
}


@pytest.fixture
def text(tmp_path):
    """A corpus of 60 short paragraphs."""
    words = "the a cat dog saw ran to from with red blue big small house tree and then it was".split()
    paragraphs = (" ".join(words[(i * j) % 19] for j in range(1, 41)) for i in range(1, 61))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Runs here start without the Phase 1 of others."""
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))


def papermill(tmp_path, notebook="02_experiment", cwd=ROOT, **parameters):
    """Run a notebook as the README says; returns the process and the executed notebook's path."""
    executed = tmp_path / f"{notebook}.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(executed)]
    command += ["--cwd", str(cwd), "-k", "python3", "--no-progress-bar", "-y", yaml.safe_dump(parameters)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT), executed


def last_line(process):
    return [line for line in process.stderr.splitlines() if line.strip()][-1]


def test_an_experiment_from_a_text_of_ones_own(tmp_path, text):
    process, executed = papermill(tmp_path, corpus=str(text), output_dir=str(tmp_path / "run"), **SMALL)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
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
    # and a run that differs only in Phase 2 pays for Phase 1 no more
    other = {"phase2_learning_rate": 0.0005, "corpus": str(text), "output_dir": str(tmp_path / "other")}
    process, _ = papermill(tmp_path, **SMALL | other)
    assert process.returncode == 0, process.stderr
    again = json.loads((tmp_path / "other" / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["phase1_cached"], again["phase1_cached"]) == (False, True)
    assert again["phase1_computed_seconds"] == metrics["phase1_computed_seconds"]
    assert again["init_er_pct"] == metrics["init_er_pct"] and again["train_er_pct"] == metrics["train_er_pct"]


def test_a_run_that_trains_its_contexts_is_judged_by_them(tmp_path, text):
    """What is written about contexts is of the ContextBlock as Phase 2 left it, and the weights written are those."""
    own = SMALL | {"phase2_context_window": 8, "phase1_init_std": 0.05, "corpus": str(text), "dtype": "float32"}
    own |= {"phase1_min_iterations": 1, "phase1_max_iterations": 1, "phase2_freeze_embedding": False}
    own |= {"slow_decay": 0.9, "phase2_token_dropout": 0.2}
    process, _ = papermill(tmp_path, output_dir=str(tmp_path / "run"), **own)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    settings = Experiment.from_mapping(own)
    model = ContextLM(settings, torch.from_numpy(load_embedding(settings)))
    before = model.context_block.norms[0].weight.clone()
    load_own_weights(model, load_file(tmp_path / "run" / "model.safetensors"))
    assert not torch.equal(model.context_block.norms[0].weight, before)
    streams = split(settings)
    train, val = (sequential(model, torch.from_numpy(s.tokens).long()) for s in (streams.train, streams.val))
    losses, _ = evaluate(Predictor(model, torch.float32), val)
    assert losses.mean().item() == pytest.approx(metrics["val_loss"], rel=1e-4)
    for name, contexts in (("train_er_noiseless", train), ("val_er", val)):
        found = effective_rank_pct(singular_values(contexts.values))
        assert found == pytest.approx(metrics[f"{name}_pct"], rel=1e-4)


def test_every_promised_metric_is_written_and_explained(tmp_path, text):
    promised = """experiment seed train_tokens val_tokens num_layers context_dim context_block_params
        token_block_params_published token_block_params_trained train_er_pct train_er_noiseless_pct val_er_pct
        init_er_pct phase1_iterations phase1_converged_tokens phase1_converged_ratio best_epoch epochs_run val_loss
        val_ppl val_accuracy last_val_ppl overfit_rate test_ppl test_accuracy phase1_seconds phase2_seconds
        total_seconds recurrence_residual params_hash code_hash git_commit versions device dtype""".split()
    process, _ = papermill(tmp_path, corpus=str(text), output_dir=str(tmp_path / "run"), **SMALL)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert set(promised) <= set(metrics)
    readme = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "parameters.md"))
    assert [name for name in metrics if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("model", BASELINES)
def test_a_baseline_writes_the_columns_of_every_other_run(model, tmp_path, text):
    own = {"train_tokens": 600, "val_samples": 2, "test_samples": 2, "ngram_order": 3, "embedding": "random"}
    own |= {"model": model, "embed_dim": 16, "hidden_dim": 16, "phase2_epochs": 1, "output_bias": "unigram"}
    process, _ = papermill(tmp_path, "06_baseline", corpus=str(text), output_dir=str(tmp_path / "run"), **own)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["model"], metrics["ngram_order"], metrics["train_tokens"]) == (model, 3, 600)
    assert metrics["val_ppl"] > 1 and 0 <= metrics["test_accuracy"] <= 1
    by_sample = pd.read_csv(tmp_path / "run" / "val_by_sample.csv")
    assert by_sample["loss_sum"].sum() / by_sample["tokens"].sum() == pytest.approx(metrics["val_loss"], rel=1e-5)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    trained = sum(w.numel() for w in weights.values())  # the output's bias with the rest
    assert metrics["trained_params"] == trained and bool(trained) == (model != "kneser-ney")
    assert ("lstm_residual" in metrics) == (model == "lstm")
    readme = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "parameters.md"))
    assert [name for name in metrics if f"`{name}`" not in readme] == []


def test_a_model_is_not_run_by_another_ones_notebook(tmp_path):
    process, _ = papermill(tmp_path, **SMALL, model="kneser-ney", output_dir=str(tmp_path / "other"))
    assert last_line(process).startswith("ConfigError: model = 'kneser-ney' is run by notebooks/06_baseline.ipynb")


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"num_layer": 3}, "ConfigError: num_layer = 3 is not a parameter: did you mean num_layers?"),
        ({"corpus": "no/such.txt"}, "ConfigError: corpus = 'no/such.txt' is neither chitchat nor ultrachat nor a file"),
        ({"output_dir": ""}, "ConfigError: output_dir = '' is not possible: name a folder for the run"),
        ({"train_tokens": 1}, "ConfigError: train_tokens = 1 leaves a single token, and nothing to predict from it"),
        ({"train_tokens": 10**6}, "ConfigError: train_tokens = 1000000 is more than the training capacity of"),
    ],
)
def test_bad_input_is_one_sentence_and_touches_nothing(tmp_path, text, bad, sentence):
    earlier = tmp_path / "run" / "metrics.json"
    earlier.parent.mkdir()
    earlier.write_text('{"kept": true}', encoding="utf-8")
    process, _ = papermill(tmp_path, **({"corpus": str(text), "output_dir": str(earlier.parent)} | SMALL | bad))
    assert process.returncode != 0
    assert last_line(process).startswith(sentence)
    assert earlier.read_text(encoding="utf-8") == '{"kept": true}' and len(list(earlier.parent.iterdir())) == 1


def test_the_loss_that_is_not_finite_leaves_no_metrics(tmp_path, text):
    bad = SMALL | {"phase2_learning_rate": 1.0e30, "dtype": "float32"}
    process, _ = papermill(tmp_path, corpus=str(text), output_dir=str(tmp_path / "run"), **bad)
    assert process.returncode != 0
    assert last_line(process).startswith("NonFiniteLoss: Phase 2's loss is")
    assert not (tmp_path / "run" / "metrics.json").exists()


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
)


def test_a_corpus_is_shown_as_text_whatever_it_holds(tmp_path, text):
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    marked = [f"{' '.join(HOSTILE)} marked {paragraph}" for paragraph in paragraphs]
    path = tmp_path / f"{HOSTILE[0]}.txt"
    path.write_text("\n\n".join(marked), encoding="utf-8")
    own = {"train_tokens": 600, "val_samples": 4, "test_samples": 2, "embed_dim": 16, "embedding": "random"}
    process, executed = papermill(tmp_path, "01_corpus", corpus=str(path), **own)
    assert process.returncode == 0, process.stderr
    pages = [HTMLExporter().from_filename(executed)[0], build_page(executed).read_text(encoding="utf-8")]
    for page in pages:
        found = Elements(page)
        assert f"{' '.join(HOSTILE)} marked" in found.text and f"{HOSTILE[0]}.txt" in found.text  # for the reader
        assert not any("marked" in hidden or "alert(" in hidden for hidden in found.hidden)
        for tag, attributes in found.elements:
            assert "onerror" not in attributes and attributes.get("src") != "x"
            assert tag != "meta" or attributes.get("http-equiv", "").lower() != "refresh"
        assert "corpus_digest" in found.text and "Write what was read" in found.text


@pytest.mark.slow
def test_what_protocol_1_said_is_shown_to_the_end(tmp_path):
    process, executed = papermill(tmp_path, "04_protocol_1", cwd=ROOT / "notebooks", output_dir=str(tmp_path / "out"))
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "out").exists()  # nothing is written but the notebook
    page = build_page(executed).read_text(encoding="utf-8")
    headings = """In short|The study at full size|How sure are the laws?|Ours beside the published|
        The study&#39;s three proposals|Chance: other seeds, other texts|How far back the contexts reach|
        What Phase 1 and the contexts contribute|What Phase 1 and the contexts contribute at full size|
        Why Phase 2 over-fits|Depth or width|What a user would otherwise pick|The tuned recipe|
        Contexts that learn to predict|A longer memory|A single input token|A cache of the words read|
        Recipes and networks in pairs|Together with an n-gram|Method"""
    found = [re.sub("<[^>]+>", "", heading) for heading in re.findall("<h2[^>]*>(.*?)</h2>", page)]
    assert found == [re.sub(r"^\s+", "", heading).replace("&#39;", "'") for heading in headings.split("|")]
    assert "<h1>Results judged by protocol 1</h1>" in page and "one long conversation could turn a verdict" in page
    assert page.count("data:image/png") > 20 and "No finished run" not in page
    counts = {name: int(runs) for name, runs in re.findall(r"Grid protocol-1/([\w-]+): (\d+) runs", page)}
    committed = ROOT / "data" / "results" / "protocol-1"
    assert len(counts) > 10 and counts == {name: len([*(committed / name).iterdir()]) for name in counts}


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(tmp_path, text):
    own = {"sizes": [300, 900], "literal_tokens": 20, "embed_dim": 16, "corpus": str(text), "output_dir": str(tmp_path)}
    process, executed = papermill(tmp_path, "05_benchmark", **own)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    positive = """peak_gflops_float32 peak_gflops_bfloat16 phase2_epoch_share_of_floor
        phase2_epoch_speedup_over_literal recurrence_speedup_over_literal phase1_step_share_of_floor""".split()
    assert all(found[name] > 0 for name in positive) and set(found["peak_rss_gib"]) == {"300", "900"}
    assert isinstance(found["time_growth_exponent"], float)  # of whatever sign: these sizes are too small to time
    assert found["recurrence_residual"] <= 1e-5 and len(found["stages"]) == 2 * 2 * 4
    page = build_page(executed).read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 and page.count("How fast?</h1>") == 1 and "import" not in page


@pytest.mark.parametrize(
    ("notebook", "change"),
    [("02_experiment", {}), ("02_experiment", {"context_ablation": "zero"}), ("06_baseline", {})],
)
def test_cells_can_be_run_again_after_a_change(notebook, change, tmp_path, text, monkeypatch):
    """As by hand: what earlier cells left behind is not taken for a parameter."""
    monkeypatch.setattr("matplotlib.pyplot.show", lambda *_: None)
    own = {**SMALL, "corpus": str(text), "output_dir": str(tmp_path / "run"), "phase2_epochs": 1, **change}
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    namespace: dict = {}
    for _ in range(2):
        for cell in (cell for cell in cells if cell.cell_type == "code"):
            exec(compile(cell.source, cell.id, "exec"), namespace)
            if cell.id == "parameters":
                namespace |= {name: value for name, value in own.items() if name in namespace}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", ["01_corpus", "02_experiment", "06_baseline"])
def test_a_notebook_runs_with_its_defaults_where_jupyterlab_opens_it(notebook, tmp_path):
    own = {"output_dir": str(tmp_path / "out")}
    small = {"train_tokens": 2000, "val_samples": 1, "test_samples": 1, "phase2_epochs": 1} if "02" in notebook else {}
    process, _ = papermill(tmp_path, notebook, cwd=ROOT / "notebooks", **own, **small)
    assert process.returncode == 0, process.stderr
