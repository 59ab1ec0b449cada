"""The playground: its views against known answers, hostile text, its committed runs, and the notebook as it is."""

import shutil
import signal
import threading
import unicodedata

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from IPython.display import HTML
from nbconvert import HTMLExporter

from ctxlm.analysis import playground as play
from ctxlm.analysis.site import cells_html
from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import decode, split
from ctxlm.files import ROOT, run_folders
from ctxlm.generate import changed, load_run, next_tokens, surprise
from ctxlm.run import run
from tests.conftest import SMALL, refusal, rewrite, short_paragraphs
from tests.test_notebooks import papermill

A, B, KN = "small/A", "small/B", "small/KN-3"
OF_A = SMALL | {"development_samples": 4, "test_samples": 4, "phase2_epochs": 1, "dtype": "float32", "device": "cpu"}
OF_A |= {"logit_scale": None}  # by the width, √2
RUNS = {
    "A": {},
    "B": {"experiment": "B", "num_layers": 1, "context_dim": 24},
    "KN-3": {"model": "kneser-ney", "ngram_order": 3},
}
TEXT = "the cat saw a big dog\nand then it ran from the house"
HOSTILE = "<script>alert(1)</script> $x$ **b** \x1b[31m \u202e \\(y\\) 'q' \"r\""


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """The folder of the finished `RUNS`, the grid `small`, and of A as if on less text; only they are to be found."""
    folder = tmp_path_factory.mktemp("runs")
    text = short_paragraphs(folder / "text.txt", 80)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "OUTPUTS", "RESULTS"):
            patch.setenv(f"CTXLM_{name}", str(folder / name.lower()))
        small = folder / "outputs" / "small"
        for name, values in RUNS.items():
            run(Experiment.from_mapping(OF_A, values, {"corpus": str(text)}), small / name)
        rewrite(shutil.copytree(small / "A", small / "other") / "metrics.json", development_samples=3, test_samples=3)
        yield small


def by_sample(folder):
    """What a run's test text cost it, by conversation."""
    return pd.read_csv(folder / "samples.csv").query("part == 'test'").set_index("sample")


def text_of(page):
    return BeautifulSoup(page, "html.parser").get_text()


# Texts


def test_what_cannot_be_seen_has_a_sign():
    everything = "".join(map(chr, range(0x3000)))
    assert all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in play.visible(everything))
    assert play.visible("a\n\x1b é 日本") == "a⏎⟨U+001B⟩ é 日本"
    assert play.visible(" a b", spaces=True) == "␣a␣b"


HOSTILE_VIEWS = {
    "reading": lambda: play.reading(HOSTILE, A),
    "against": lambda: play.against(HOSTILE, A, B),
    "ask": lambda: play.ask(HOSTILE, A, B, KN, top=1),
    "continued": lambda: play.continued(A, HOSTILE, 3),
    "table": lambda: play.table_of(pd.DataFrame({"<script>": [HOSTILE], "text": [HOSTILE]}), ["text"], HOSTILE),
}


@pytest.mark.parametrize("view", HOSTILE_VIEWS.values(), ids=HOSTILE_VIEWS)
def test_hostile_text_is_only_text(view):
    html = view()._repr_html_()
    soup = BeautifulSoup(html, "html.parser")
    assert not soup(["script", "img", "b", "strong"]) and "alert" in soup.get_text()
    assert "\x1b" not in html and "\u202e" not in html
    assert not any(name.startswith("on") for tag in soup.find_all() for name in tag.attrs)
    for element in soup(["pre", "code"]):
        element.extract()
    assert "$" not in str(soup) and "alert" not in str(soup)  # where formulas would be looked for


def titles_of(html):
    return [tag["title"] for tag in BeautifulSoup(html.data, "html.parser").find_all(title=True)]


def test_tokens_stand_in_their_order_with_their_surprise_what_was_likelier_and_the_gap_of_two():
    titles = titles_of(play.reading(TEXT, A))
    first, second = (surprise(play.model(run), TEXT) for run in (A, B))
    assert [float(title.split(" nats")[0]) for title in titles] == pytest.approx(first["nats"].tolist(), abs=0.006)
    for position, title in enumerate(titles):
        best = next_tokens(play.model(A), decode(first["token"][:position]), 4)
        assert title.split("likelier: ")[1].count("%") == 4 and f"{100 * best['probability'][0]:.1f} %" in title
    html = play.against(TEXT, A, B)
    pairs = zip(first["nats"], second["nats"], strict=True)
    assert titles_of(html) == [f"{x:.2f} − {y:.2f} nats" for x, y in pairs]
    assert f"{(first['nats'] - second['nats']).mean():+.2f} nats a token" in text_of(html.data)


# Runs


def test_the_tables_have_every_run_and_what_differs():
    table = play.catalogue("small").data.set_index("run")
    assert sorted(table.index) == [A, B, KN, "small/other"] and set(table["can be asked"]) == {"yes"}
    assert play.catalogue("all").data.equals(table.reset_index()) and play.catalogue("none").data.empty
    differs = table.iloc[:, -1]
    assert differs[A] == "–" and differs[B] == "num_layers 1, context_dim 24" and "kneser-ney" in differs[KN]
    assert play.grids() == ["small"] and play.choices(B)[0] == B and sorted(play.choices()) == sorted(table.index)
    two = play.differing(A, B).data.set_index("parameter")
    assert [name for name in two.index if name in Experiment.model_fields] == [*RUNS["B"]]
    assert two.loc["context_dim"].tolist() == ["16", "24"]


def test_the_difference_is_that_of_the_mean_losses_with_an_interval_over_conversations(runs):
    (estimate,) = play.difference(A, B)
    a, b = by_sample(runs / "A"), by_sample(runs / "B")
    assert estimate.value == pytest.approx((a["loss_sum"] - b["loss_sum"]).sum() / a["tokens"].sum(), abs=1e-9)
    assert estimate.over == ("samples",) and estimate.low < estimate.value < estimate.high


def test_the_conversations_that_differ_most_come_with_their_text(runs):
    gap = by_sample(runs / "A").eval("loss_sum / tokens") - by_sample(runs / "B").eval("loss_sum / tokens")
    table, test = play.most_different(A, B, 1).data, split(Experiment.of_run(play.metrics(A))).test
    assert table["conversation"].tolist() == [gap.argmin(), gap.argmax()]
    for text, sample in zip(table["text"], (gap.idxmin(), gap.idxmax()), strict=True):
        assert text.startswith(decode(test.tokens[test.samples == sample])[:100])


@pytest.mark.parametrize(
    ("words", "view", "values"),
    [
        ("run = 'small/none'", play.metrics, ["small/none"]),
        ("run = ''", play.metrics, [""]),
        ("choose two runs", play.difference, [A, A]),
        ("were not judged on the same text", play.most_different, [A, "small/other"]),
        ("choose a context model", play.recent, [KN, KN]),
        ("has no contexts: choose a context model", play.space, [KN, 0]),
        ("text = '' is not possible", play.reading, ["", A]),
        ("preset = 'C'", play.train, ["C"]),
        ("num_layer = 3", lambda: play.train("A", num_layer=3), []),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(words, view, values):
    assert words in refusal(view, *values)


# Asking, memory, contexts


def test_the_bars_are_the_probabilities():
    style = play.ask(TEXT, A, B, KN, top=5)
    page = text_of(style.to_html())
    for name in (A, B, KN):
        known = next_tokens(play.model(name), TEXT, 5)
        assert style.data[f"{name}, %"].tolist() == pytest.approx((100 * known["probability"]).tolist())
        assert style.data[name].tolist() == [play.visible(text, True) for text in known["text"]]
        assert all(f"{100 * p:.1f}" in page for p in known["probability"])


def test_the_figures_of_memory_are_known(runs):
    assert play.cost(A, B, 3).axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]
    upper, lower = play.cost(A, B, 40).axes
    for line, width in zip(lower.lines, (2 * 16, 24), strict=True):  # what is kept of a text does not grow
        assert {*line.get_ydata()} == {4 * width + 8 * 2}
    assert all((line.get_ydata() > 0).all() and line.get_xdata()[-1] == 40 for line in upper.lines)
    figure, table = play.exchanged(TEXT, " tree", A, KN, 4), changed(play.model(A), TEXT, " tree", 4)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), table["context_distance"], rtol=1e-5)
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), table["kl"][table["kl"] > 1e-6], rtol=1e-4)


def test_perplexities_are_the_histories(runs):
    history = pd.read_csv(runs / "A" / "history.csv").query("metric == 'val_ppl'").set_index(["phase", "step"])["value"]
    last, whole = play.recent(A, KN).axes[0].lines
    np.testing.assert_allclose(last.get_ydata(), history["recent_tokens"].drop(0))
    assert {*whole.get_ydata()} == {history["recent_tokens", 0]}
    validation, training, _, _ = play.curves(A, B).axes[0].lines
    assert validation.get_ydata().tolist() == pytest.approx(history["phase2"].tolist())
    assert len(training.get_xdata()) == 1


def test_the_nearest_contexts_are_of_other_conversations_and_in_order():
    table, (test, states) = play.neighbours(A, 1, 5, count=3).data, play.contexts(A)
    here = np.flatnonzero(test.samples == np.unique(test.samples)[1])[5]
    distances = (states.values - states.values[here]).norm(dim=1)
    nearest = int(torch.where(torch.from_numpy(test.samples != test.samples[here]), distances, torch.inf).argmin())
    assert table["conversation"].tolist()[:2] == [1, test.samples[nearest] - test.samples[0]]
    assert table["conversation"].is_unique and len(table) == 4
    shares = [int(text.rstrip(" %")) for text in table["distance"]]
    assert shares == sorted(shares)
    assert shares[:2] == [0, round(100 * float(distances[nearest] / distances.mean()))]
    spectrum = torch.linalg.svdvals(states.values - states.values.mean(0)).square()
    assert f"{spectrum[0] / spectrum.sum():.0%}" in play.space(A, 0).axes[0].get_xlabel()


# Controls


def test_views_are_shown_of_first_values_and_anew_when_a_control_is_moved(monkeypatch):
    def double(x: int, word: str) -> HTML:
        if x == 9:
            raise ConfigError("x = 9 is too much")
        return HTML(f"{2 * x} {word}")

    shown: list = []
    monkeypatch.setattr(play, "display", shown.append)
    for frontend in (False, True):
        monkeypatch.setattr(play, "in_jupyter", lambda frontend=frontend: frontend)
        play.explore(double, x=(0, 9, 3), word=["a", "b"], text="unused")
    static, box, first, _ = shown
    number, choice, text = box.children
    assert static.data == first.data == "6 a" and isinstance(text, ipywidgets.Textarea)
    number.value, choice.value, text.value = 5, "b", "no view reads it"
    number.value = 9
    assert [html.data for html in shown[4:6]] == ["10 a", "10 b"] and "x = 9 is too much" in shown[6].data


# Training


@pytest.fixture
def live(monkeypatch):
    """The small run A as the only preset, of 3 epochs; the list has what to do at each."""

    live = []
    known = {"A": Experiment.of_run(play.metrics(A)).model_copy(update={"phase2_epochs": 3})}
    monkeypatch.setattr(play, "presets", lambda: known)
    monkeypatch.setattr(play, "GRID", "small")
    monkeypatch.setattr(play.plots, "Live", lambda: lambda _history: [do() for do in live])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    yield live
    signal.signal(signal.SIGINT, before)


def interrupt():
    signal.raise_signal(signal.SIGINT)  # handled before it returns, so that two are not one


def test_a_preset_without_weights_is_trained_once_where_widgets_are_and_then_asked_as_any_run(live, runs):
    """JupyterLab has widgets answer in a thread of their own."""
    weights = runs / "A" / "model.safetensors"
    weights.rename(runs / "kept")
    play.model.cache_clear()
    thread = threading.Thread(target=play.model, args=(A,))
    thread.start()
    thread.join()
    trained = "interactive/A_again"
    known = play.metrics(trained)
    assert trained in play.choices() and known["epochs_run"] == 3 and not known.get("stopped")
    assert len(play.difference(trained, A)) == 1 and len(play.curves(A, trained).axes[0].lines) == 4

    live[:] = [pytest.fail]
    play.model.cache_clear()
    assert len(surprise(play.model(A), TEXT)) == len(surprise(play.model(trained), TEXT)) > 1
    assert play.train("A") == trained
    (runs / "kept").rename(weights)
    play.model.cache_clear()


def test_stopped_it_ends_after_the_epoch_and_says_so_and_stopped_twice_at_once(live, runs):
    before = signal.getsignal(signal.SIGINT)
    live.append(interrupt)
    trained = play.train("A", phase2_epochs=4, embed_dim=8)
    known = play.metrics(trained)
    assert trained == "interactive/A_phase2_epochs-4_embed_dim-8" and known["embed_dim"] == 8
    assert known["logit_scale"] == 2  # logits that go by the width go by the new one
    assert known["epochs_run"] == known["best_epoch"] == 1 and known["stopped"] is True and known["test_ppl"] > 1
    assert signal.getsignal(signal.SIGINT) is before
    assert play.catalogue("interactive").data.set_index("run").loc[trained].iloc[-1].endswith("stopped")
    assert play.differing(A, trained).data.set_index("parameter").loc["stopped"].tolist() == ["–", "True"]

    live[:] = [interrupt, interrupt]
    with pytest.raises(KeyboardInterrupt):
        play.train("A", seed=6)
    assert not list(runs.parent.glob("interactive/A_seed-6/metrics.json"))


# The committed runs and the notebook


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The repository's own results and caches, and no outputs."""
    for variable in ("CTXLM_RESULTS", "JPY_SESSION_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CTXLM_CACHE", str(ROOT / "data" / "cache"))
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))


@pytest.mark.parametrize("name", ["A", "KN-4"])
def test_a_committed_run_has_its_test_losses_again(name, repository):
    folder, source = run_folders("playground")[name]
    judged, test_ppl = by_sample(folder), play.metrics(f"playground/{name}")["test_ppl"]
    assert source == "committed"
    assert np.exp(judged["loss_sum"].sum() / judged["tokens"].sum()) == pytest.approx(test_ppl, rel=1e-5)
    first = judged.head(8)  # of two hundred, for time's sake
    tokens = play._test(f"playground/{name}").tokens[: first["tokens"].sum() + 1]
    losses = load_run("playground", name).losses(torch.from_numpy(tokens).long())[1:]
    assert losses.sum().item() == pytest.approx(first["loss_sum"].sum(), rel=1e-4)


@pytest.mark.slow
def test_the_notebook_runs_and_its_page_needs_no_script(tmp_path, repository):
    values = {"text": f"Hi there, how are you? {HOSTILE}", "prompt": "<script>alert(2)</script>", "cost_tokens": 40}
    process, executed = papermill(tmp_path, "09_playground", **values)
    assert process.returncode == 0, process.stderr
    notebook = nbformat.read(executed, as_version=4)
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert not any("widget" in kind or "javascript" in kind for kind in (*kinds, *notebook.metadata))
    body = cells_html(notebook)
    assert "<script" not in body and "alert(2)" in text_of(body)
    page = HTMLExporter(template_name="lab").from_notebook_node(notebook)[0]
    scripts = BeautifulSoup(page, "html.parser")(["script", "style"])
    assert "jupyter-widgets" not in page and not any("alert(" in script.text for script in scripts)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        silent = {"parameters", "injected-parameters", "notebook-only"} & {*cell.metadata.get("tags", [])}
        assert silent or cell.outputs, cell.id
