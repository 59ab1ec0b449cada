"""The playground: its views against known answers, hostile text, its committed runs, and the notebook as it is."""

import json
import re
import threading
import unicodedata

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from IPython.display import HTML
from ipywidgets.widgets.widget import _instances
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from scipy import stats

from ctxlm.analysis import explore as showing
from ctxlm.analysis import playground as play
from ctxlm.analysis import workbench as bench
from ctxlm.analysis.site import cells_html
from ctxlm.config import ConfigError, Experiment, load_grid
from ctxlm.corpus import decode, split, tokenizer
from ctxlm.files import ROOT
from ctxlm.generate import changed, load_run, next_tokens, surprise
from ctxlm.results import run_folders
from tests.conftest import short_paragraphs
from tests.test_generate import CONTEXT, NETWORK
from tests.test_notebooks import papermill, run_here
from tests.test_pages import Elements

A, B, KN = "small/A", "small/B", "small/KN-3"
RUNS = {
    "A": CONTEXT | {"experiment": "A", "development_samples": 4, "test_samples": 4},
    "B": CONTEXT | {"experiment": "B", "development_samples": 4, "test_samples": 4, "num_layers": 1, "context_dim": 24},
    "other": CONTEXT | {"experiment": "A", "development_samples": 3, "test_samples": 3},
    "KN-3": {key: NETWORK[key] for key in ("train_tokens", "val_samples")}
    | {"model": "kneser-ney", "ngram_order": 3, "development_samples": 4, "test_samples": 4},
}
TEXT = "the cat saw a big dog\nand then it ran from the house"
HOSTILE = "<script>alert(1)</script> $x$ **b** \x1b[31m \u202e \\(y\\) 'q' \"r\""
PATH = HOSTILE.replace("\x1b", "") + ".txt"


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """The folder of the finished `RUNS`, the grid `small`; only they are there to be found."""
    folder = tmp_path_factory.mktemp("runs")
    text = short_paragraphs(folder / "text.txt", 80)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "OUTPUTS", "RESULTS"):
            patch.setenv(f"CTXLM_{name}", str(folder / name.lower()))
        for name, values in RUNS.items():
            notebook = "03_baseline" if "model" in values else "02_experiment"
            run_here(notebook, **values, corpus=str(text), output_dir=str(folder / "outputs" / "small" / name))
        yield folder / "outputs" / "small"
    plt.close("all")


def by_sample(folder):
    """What a run's test text cost it, by conversation."""
    return pd.read_csv(folder / "samples.csv").query("part == 'test'").set_index("sample")


# Texts


def test_what_cannot_be_seen_has_a_sign():
    everything = "".join(map(chr, range(0x3000)))
    assert all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in showing.visible(everything))
    assert showing.visible("a\n\x1b é 日本") == "a⏎␛ é 日本"
    assert showing.visible(" a b", spaces=True) == "␣a␣b"


@pytest.mark.parametrize(
    "view",
    [
        lambda: play.reading(HOSTILE, A),
        lambda: play.against(HOSTILE, A, B),
        lambda: play.ask(HOSTILE, A, B, KN, top=1),
        lambda: play.continued(A, HOSTILE, 3),
        lambda: showing.table_of(pd.DataFrame({"<script>": [HOSTILE], "text": [HOSTILE]}), ["text"]),
        lambda: HTML(showing.quoted(HOSTILE)),
        lambda: bench.commands("A", f"experiment: A\n{'output_bias'}: none\ncorpus: {json.dumps(PATH)}"),
    ],
)
def test_hostile_text_is_only_text(view):
    html = view()._repr_html_()
    page = Elements(html)
    assert not {"script", "img", "b", "strong"} & {tag for tag, _ in page.elements}
    assert "\x1b" not in html and "\u202e" not in html
    assert "alert" in page.text and not any("alert" in hidden for hidden in page.hidden)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
    outside = re.sub(r"<style.*?</style>|<(pre|code)\b.*?</\1>|<[^>]*>", "", html, flags=re.DOTALL)
    assert "$" not in outside and "alert" not in outside  # where formulas would be looked for


def test_tokens_stand_in_their_order_with_what_a_pointer_is_told():
    page = Elements(play.reading(TEXT, A)._repr_html_())
    titles = [attributes["title"] for tag, attributes in page.elements if tag == "code"]
    table = surprise(load_run("small", "A"), TEXT)
    assert [float(title.split(" nats")[0]) for title in titles] == pytest.approx(table["nats"].tolist(), abs=0.006)
    for title, position in zip(titles, range(len(table)), strict=True):
        best = next_tokens(load_run("small", "A"), decode(table["token"][:position]), 4)
        assert title.split("likelier: ")[1].count("%") == 4
        assert f"{100 * best['probability'][0]:.1f} %" in title


def test_the_gap_of_two_is_the_difference_of_their_surprises():
    page = Elements(play.against(TEXT, A, B)._repr_html_())
    titles = [attributes["title"] for tag, attributes in page.elements if tag == "code"]
    first, second = (surprise(load_run("small", name), TEXT)["nats"] for name in "AB")
    assert titles == [f"{x:.2f} − {y:.2f} nats" for x, y in zip(first, second, strict=True)]
    assert f"{(first - second).mean():+.2f} nats a token".replace("-", "−") in page.text


# Runs


def test_the_table_has_every_run_and_what_differs():
    table = play.catalogue("small").data
    assert sorted(table["run"]) == [A, B, KN, "small/other"] and set(table["can be asked"]) == {"yes"}
    assert play.catalogue("all").data.equals(table) and play.catalogue("none").data.empty
    differs = dict(zip(table["run"], table["what differs"], strict=True))
    assert differs[A] == "–" and differs[B] == "num_layers 1, context_dim 24"
    assert "kneser-ney" in differs[KN] and "context_dim" not in differs[KN]
    assert play.grids() == ["playground", "all", "small"]
    assert play.choices(B)[0] == B and sorted(play.choices()) == sorted(table["run"])


def test_only_what_differs_is_listed():
    table = play.differing(A, B).data.set_index("parameter")
    parameters = [name for name in table.index if name in Experiment.model_fields]
    assert parameters == ["experiment", "num_layers", "context_dim"]
    assert table.loc["context_dim"].tolist() == ["16", "24"]


# Two runs


def test_the_difference_is_that_of_the_mean_losses_and_its_interval_is_over_conversations(runs):
    (estimate,) = play.difference(A, B)
    a, b = by_sample(runs / "A"), by_sample(runs / "B")
    gaps, tokens = (a["loss_sum"] - b["loss_sum"]).to_numpy(), a["tokens"].to_numpy()
    mean = gaps.sum() / tokens.sum()
    assert (
        estimate.value == pytest.approx(mean, abs=1e-9) and estimate.over == ("samples",) and estimate.replicates == 1
    )
    # of a ratio estimator, with n / (n - 1)
    n = len(gaps)
    error = np.sqrt(n / (n - 1) * np.square(gaps - mean * tokens).sum()) / tokens.sum()
    effective = tokens.sum() ** 2 / np.square(tokens).sum()
    reach = error * stats.t.ppf(0.975, effective - 1)
    assert (estimate.low, estimate.high) == pytest.approx((mean - reach, mean + reach), rel=1e-6)


def test_the_conversations_that_differ_most_come_with_their_text(runs):
    table = play.most_different(A, B, 1).data
    nats = [by_sample(runs / name).eval("loss_sum / tokens") for name in "AB"]
    gap = nats[0] - nats[1]
    assert table["conversation"].tolist() == [gap.argmin(), gap.argmax()]
    assert [float(x.replace("−", "-")) for x in table["difference"]] == pytest.approx([gap.min(), gap.max()], abs=0.006)
    test = split(play.experiment(A)).test
    assert table["text"][0].startswith(decode(test.tokens[test.samples == gap.idxmin()])[:100])


def test_best_and_worst_are_the_ends_of_the_order(runs):
    nats = by_sample(runs / "A").eval("loss_sum / tokens")
    table = play.extremes(A, 1).data
    assert table["conversation"].tolist() == [nats.argmin(), nats.argmax()]
    assert table["PPL"].tolist() == pytest.approx(np.exp([nats.min(), nats.max()]))


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (lambda: play.metrics("small/none"), "is no finished run: choose one of the table"),
        (lambda: play.metrics("none/A"), "is no finished run"),
        (lambda: play.metrics(""), "is no finished run"),
        (lambda: play.difference(A, A), "choose two runs"),
        (lambda: play.difference(A, "small/other"), "were not judged on the same test text"),
        (lambda: play.most_different(A, "small/other"), "were not judged on the same test text"),
        (lambda: play.cost(A, B, 0), "^cost_tokens = 0 is not possible"),
        (lambda: play.cost(A, B, 2.5), "^cost_tokens = 2.5 is not possible"),
        (lambda: play.exchanged("the", " tree", A, B, 24), "^text = 'the' is a single token.*: write a longer one$"),
        (lambda: play.recent(KN, KN), "choose a context model"),
        (lambda: play.space(KN, 0), "has no contexts: choose a context model"),
    ],
)
def test_what_cannot_be_shown_is_refused(view, words):
    with pytest.raises(ConfigError, match=words):
        view()


# Asking


def test_the_bars_are_the_probabilities():
    page = Elements(play.ask(TEXT, A, B, KN, top=5)._repr_html_())
    for run in (A, B, KN):
        for row in next_tokens(load_run(*run.split("/")), TEXT, 5).itertuples():
            assert f"{showing.visible(row.text, True)}{100 * row.probability:.1f}\xa0%" in page.text


def test_of_a_long_text_the_beginning_is_read_and_of_a_long_prompt_the_end_shown(monkeypatch):
    monkeypatch.setattr(play, "READ", 9)
    for page in (play.reading(TEXT, A), play.against(TEXT, A, B)):
        tokens = [element for element in Elements(page._repr_html_()).elements if element[0] == "code"]
        assert 0 < len(tokens) <= 9
    asked = Elements(play.ask("begin " + "x" * 1000 + " end", A, B, KN, top=1)._repr_html_()).text
    assert " end" in asked and "begin" not in asked


def test_what_is_kept_of_a_text_does_not_grow():
    assert play.cost(A, B, 3).axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]
    upper, lower = play.cost(A, B, 40).axes
    for line, width in zip(lower.lines, (2 * 16, 24), strict=True):
        assert {*line.get_ydata()} == {4 * width + 8 * 2}
    assert all((line.get_ydata() > 0).all() for line in upper.lines)


# Memory and contexts


def test_what_an_exchange_leaves_is_drawn_as_it_is():
    figure = play.exchanged(TEXT, " tree", A, KN, 4)
    table = changed(load_run("small", "A"), TEXT, range(5), " tree")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), table["context_distance"], rtol=1e-5)
    assert len(figure.axes[1].lines) == 2
    shorter = play.exchanged("the cat saw", " tree", A, B, 24)  # no more are exchanged than there are
    assert len(shorter.axes[1].lines[0].get_xdata()) == len(tokenizer().encode("the cat saw").ids)


def test_perplexity_from_the_last_tokens_is_the_histories(runs):
    line = play.recent(A, KN).axes[0].lines[0]
    history = pd.read_csv(runs / "A" / "history.csv").query("phase == 'recent_tokens' and metric == 'val_ppl'")
    known = history.set_index("step")["value"].drop(0)
    assert line.get_xdata().tolist() == known.index.tolist()
    np.testing.assert_allclose(line.get_ydata(), known)


def test_the_nearest_contexts_are_of_other_conversations_and_in_order():
    table = play.neighbours(A, 1, 5, count=3).data
    _, test, states = play.contexts(A)
    here = np.flatnonzero(test.samples == np.unique(test.samples)[1])[5]
    distances = (states.values - states.values[here]).norm(dim=1)
    others = torch.from_numpy(test.samples != test.samples[here])
    nearest = int(torch.where(others, distances, torch.inf).argmin())
    first = test.samples[0]
    assert table["conversation"].tolist()[:2] == [1, test.samples[nearest] - first]
    assert table["conversation"].is_unique and len(table) == 4
    shares = [int(text.rstrip(" %")) for text in table["distance"]]
    assert shares == sorted(shares) and shares[0] == 0
    assert shares[1] == round(100 * float(distances[nearest] / distances.mean()))


def test_the_plane_holds_the_two_largest_shares_of_the_spread():
    figure = play.space(A, 0)
    values = play.contexts(A)[2].values
    spectrum = torch.linalg.svdvals(values - values.mean(0)).square()
    assert f"{spectrum[0] / spectrum.sum():.0%}" in figure.axes[0].get_xlabel()


def test_with_its_own_contexts_a_conversation_has_the_losses_it_was_judged_by(runs):
    judged = by_sample(runs / "A")
    for place, sample in enumerate(judged.index):
        losses = play.replaced(A, place)
        assert losses["contexts"].sum() == pytest.approx(judged["loss_sum"][sample], rel=1e-4)
        assert len(losses) == judged["tokens"][sample]
    # with zeros the TokenBlock is all that speaks
    network, test, _ = play.contexts(A)
    at = torch.tensor([3])
    layers = [torch.zeros(1, width) for width in network.context_block.widths]
    tokens = torch.from_numpy(test.tokens).long()
    h = network.token_block(network.inputs(tokens, at), layers)
    logits = F.linear(network.logit_scale * h, network.embedding, network.output_bias)
    expected = F.cross_entropy(logits, tokens[4:5]).item()
    assert play.replaced(A, 0)["zeros"][3] == pytest.approx(expected, abs=1e-4)


# Controls


def double(x: int, word: str) -> HTML:
    return HTML(f"<p>{2 * x} {word}</p>")


def box_of(bundle):
    """The widget that is shown; nothing of it is kept in words."""
    assert bundle["text/plain"] == ""
    return _instances[bundle[showing.WIDGET]["model_id"]]


def shown_by(monkeypatch, frontend, view, **controls):
    """What is displayed, in order, and what it is exchanged for later."""
    displayed, updated = [], []

    class Handle:
        def update(self, thing):
            updated.append(thing)

    def display(thing, display_id=False, raw=False):
        displayed.append(box_of(thing) if raw else thing)
        return Handle()

    monkeypatch.setattr(showing, "display", display)
    monkeypatch.setattr(showing, "has_widgets", lambda: frontend)
    showing.explore(view, **controls)
    return displayed, updated


CONTROLS = {"x": (0, 9, 3), "word": ["a", "b"], "unused": "text"}


def test_without_a_frontend_only_the_first_values_are_shown(monkeypatch):
    (only,), updated = shown_by(monkeypatch, False, double, **CONTROLS)
    assert only.data == "<p>6 a</p>" and not updated
    (only,), _ = shown_by(monkeypatch, False, play.reading, text="", a=A)
    assert "text = &#x27;&#x27; is not possible" in only.data  # a sentence in the place of the view


def test_a_moved_control_exchanges_what_is_shown(monkeypatch):
    (box, only), updated = shown_by(monkeypatch, True, double, **CONTROLS)
    assert only.data == "<p>6 a</p>"
    number, choice, unused = box.children
    number.value, choice.value = 5, "b"
    unused.value = "no view reads it"
    assert [thing.data for thing in updated[1::2]] == ["<p>10 a</p>", "<p>10 b</p>"]
    assert ["working…" in thing.data for thing in updated] == [True, False] * 2  # never an answer to something else


def test_what_a_view_waits_for_is_said_in_its_place(monkeypatch, capsys):
    def view(x: int) -> HTML:
        showing.tell("it is trained first")
        if x == 9:
            raise ZeroDivisionError("x")
        return HTML(str(x))

    (box, _), updated = shown_by(monkeypatch, True, view, x=(0, 9, 3))
    assert capsys.readouterr().out == "it is trained first\n"  # below the cell that runs
    box.children[0].value = 5
    assert "it is trained first" in updated[1].data and updated[2].data == "5"
    with pytest.raises(ZeroDivisionError):
        box.children[0].value = 9
    assert "ZeroDivisionError" in updated[-1].data and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("session", "names", "expected"),
    [(None, {}, False), ("09_playground.ipynb", {}, True), (None, {"__vsc_ipynb_file__": "09_playground.ipynb"}, True)],
)
def test_widgets_are_shown_where_someone_can_move_them(session, names, expected, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)  # JupyterLab sets it, papermill and nbconvert do not
    if session:
        monkeypatch.setenv("JPY_SESSION_NAME", session)
    monkeypatch.setattr(showing, "get_ipython", lambda: type("Shell", (), {"user_ns": names})())
    assert showing.has_widgets() == expected
    monkeypatch.setattr(showing, "get_ipython", lambda: None)
    assert not showing.has_widgets()


# Training


@pytest.fixture
def preset(runs, monkeypatch):
    """The small run A as the only preset."""
    known = {"A": Experiment.from_mapping(play.experiment(A).model_dump(), {"phase2_epochs": 3})}
    monkeypatch.setattr(bench, "presets", lambda: known)
    monkeypatch.setattr(bench, "GRID", "small")


def test_a_run_is_trained_named_after_its_change_and_can_be_asked(preset):
    histories = []
    run = bench.train("A", "num_layers: 1", lambda rows: histories.append(len(rows)))
    assert run == "interactive/A_num_layers-1" and len(histories) == 3
    assert play.metrics(run)["num_layers"] == 1 and play.metrics(run)["epochs_run"] == 3
    assert len(surprise(play.model(run), TEXT)) == len(tokenizer().encode(TEXT).ids)
    assert len(play.recent(run, A).axes[0].lines) == 4 and len(play.difference(run, A)) == 1


def test_a_preset_without_weights_is_trained_once(preset, runs, monkeypatch, capsys):
    monkeypatch.setattr(play, "GRID", "small")
    monkeypatch.setattr(play, "WEIGHTS", "of-another-name")  # in the preset's folder there is none
    monkeypatch.setattr(play, "metrics", lambda run: {"model": "kneser-ney" if run == KN else "context"})
    first = surprise(play.model(A), TEXT)["nats"]
    assert f"{A} is trained first" in capsys.readouterr().out
    written = (runs.parent / "interactive" / "A" / "metrics.json").stat().st_mtime_ns
    assert surprise(play.model(A), TEXT)["nats"].equals(first) and len(surprise(play.model(KN), TEXT))
    assert (runs.parent / "interactive" / "A" / "metrics.json").stat().st_mtime_ns == written


def test_the_same_experiment_has_the_test_perplexity_of_the_notebooks(preset):
    assert play.metrics(bench.train("A", "phase2_epochs: 1"))["test_ppl"] == pytest.approx(
        play.metrics(A)["test_ppl"], rel=1e-5
    )


class Place:
    """Where a view is shown, and exchanged; a curve that comes is handed on first."""

    def __init__(self, first, on_curve=lambda: None):
        self.views, self.on_curve = [first], on_curve

    def update(self, view):
        self.views.append(view)
        if isinstance(view, Figure):
            self.on_curve()


@pytest.fixture
def bench_shown(preset, monkeypatch):
    """Shows the workbench: its two buttons, the place of its curve, and the one below it."""
    displayed = []

    def display(thing, display_id=False, raw=False):
        displayed.append(box_of(thing) if raw else Place(thing))
        return displayed[-1]

    def show(change):
        displayed.clear()
        bench.workbench(["A"], change, A, [play.curves, play.differing])
        box, place, below = displayed
        *_, start, stop = box.children
        return start, stop, place, below

    for module in (bench, showing):
        monkeypatch.setattr(module, "display", display)
    monkeypatch.setattr(bench, "has_widgets", lambda: True)
    monkeypatch.setattr(bench, "TRAINING", bench.Training())
    return show


def join():
    for thread in (thread for thread in threading.enumerate() if thread.name.startswith("Thread-")):
        thread.join(60)


def test_stop_ends_it_after_the_epoch_and_its_run_says_so(bench_shown):
    start, stop, place, below = bench_shown("phase2_epochs: 4")
    assert isinstance(place.views[0], Figure) and not start.disabled and stop.disabled
    place.on_curve = stop.click
    start.click()
    join()
    run = "interactive/A_phase2_epochs-4"
    known = play.metrics(run)
    assert known["epochs_run"] == known["best_epoch"] == 1 and known["stopped"] is True and not start.disabled
    assert "stopped" in below.views[-1].data["parameter"].tolist()
    differs = play.catalogue("interactive").data.set_index("run").loc[run, "what differs"]
    assert differs.endswith("stopped")
    table = play.differing(A, run).data.set_index("parameter")
    assert table.loc["stopped"].tolist() == ["–", "True"] and "epochs_run" in table.index


def test_one_that_was_not_stopped_is_not_marked(bench_shown):
    start, stop, place, below = bench_shown("phase2_epochs: 1\nseed: 5")
    place.on_curve = stop.click  # in its last epoch: it ends as it would have
    start.click()
    join()
    labels = place.views[-1].legends[0].get_texts()
    assert [text.get_text() for text in labels][::2] == ["A, validation", "A, phase2_epochs 1, seed 5, validation"]
    assert below.views[-1].data.columns[1:].tolist() == ["A", "A, phase2_epochs 1, seed 5"]
    assert not play.metrics("interactive/A_phase2_epochs-1_seed-5").get("stopped")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_nobody_foresaw_is_shown_and_another_training_may_begin(bench_shown, monkeypatch):
    def fail(*_):
        raise KeyError("unforeseen")

    monkeypatch.setattr(bench, "train", fail)
    start, stop, place, below = bench_shown("")
    start.click()
    join()
    assert "unforeseen" in place.views[-1].data and below.views[-1].data == ""
    assert not start.disabled and stop.disabled
    bench.TRAINING.seen = (1, 2, 3)  # more than there is room for
    bench.TRAINING.attach(start, stop, [place])
    assert place.views[-1] == 1


def test_a_workbench_shown_again_goes_on_with_the_training(bench_shown):
    came, goes_on = threading.Event(), threading.Event()

    def hold():
        came.set()
        goes_on.wait(60)

    start, _, place, _ = bench_shown("phase2_epochs: 2\nseed: 6")
    place.on_curve = hold
    start.click()
    assert came.wait(60)
    start, stop, again, below = bench_shown("another: one")
    assert start.disabled and not stop.disabled and again.views[-1] is place.views[-1]
    before = len(place.views)
    stop.click()
    start.click()  # which nobody can: one training at a time
    goes_on.set()
    join()
    assert len(place.views) == before and len(again.views) > 2 and not start.disabled and stop.disabled
    assert play.metrics("interactive/A_phase2_epochs-2_seed-6")["stopped"] is True
    *_, later, still_below = bench_shown("another: one")
    assert later.views[-1] is again.views[-1] and still_below.views[-1] is below.views[-1]  # not the curve from before


@pytest.mark.parametrize(
    ("preset_name", "change", "words"),
    [
        ("C", "", "preset = 'C' is no context model of grid small: choose one of A"),
        ("A", "num_layers", "change = 'num_layers' is no list of parameters: write one a line, as num_layers: 3"),
        ("A", "a: [", "change = 'a: [' is no list of parameters"),
        ("A", "num_layer: 3", "num_layer = 3 is not a parameter: did you mean num_layers?"),
    ],
)
def test_a_change_that_is_none_is_refused(preset_name, change, words, preset):
    with pytest.raises(ConfigError) as caught:
        bench.changed_experiment(preset_name, change)
    assert str(caught.value).startswith(words)


def test_the_grid_to_copy_is_one(tmp_path):
    page = Elements(bench.commands("A", "num_layers: 2\nlogit_scale: 0.3")._repr_html_())
    command, grid = re.match(r"(source.*?)(title:.*)", page.text, flags=re.DOTALL).groups()
    (tmp_path / "my-own.yaml").write_text(grid, encoding="utf-8")
    runs = load_grid(str(tmp_path / "my-own.yaml")).runs
    assert len(runs) == 6
    unchanged = load_grid("playground").runs["A"]
    assert {(r.num_layers, r.logit_scale) for r in runs.values()} == {(6, 0.5), (2, 0.3)}
    assert {r.context_dim for r in runs.values()} == {unchanged.context_dim}
    given = yaml.safe_load(re.search(r"-y '(.*?)'", command, flags=re.DOTALL)[1])
    assert given["num_layers"] == 2 and given["logit_scale"] == 0.3


# The committed runs and the notebook


@pytest.mark.parametrize("name", ["A", "B", "KN-4"])
def test_a_committed_run_has_its_test_losses_again(name, monkeypatch):
    monkeypatch.delenv("CTXLM_RESULTS")
    monkeypatch.setenv("CTXLM_CACHE", str(ROOT / "data" / "cache"))
    monkeypatch.setenv("CTXLM_OUTPUTS", str(ROOT / "none"))
    folder, source = run_folders("playground")[name]
    assert source == "committed"
    judged, test_ppl = by_sample(folder), play.metrics(f"playground/{name}")["test_ppl"]
    assert np.exp(judged["loss_sum"].sum() / judged["tokens"].sum()) == pytest.approx(test_ppl, rel=1e-5)
    first = judged.head(8)  # of two hundred, for time's sake
    tokens = play._test(f"playground/{name}").tokens[: first["tokens"].sum() + 1]  # by protocol 2, another part's
    losses = load_run("playground", name).losses(torch.from_numpy(tokens).long())[1:]
    assert losses.sum().item() == pytest.approx(first["loss_sum"].sum(), rel=1e-4)


@pytest.mark.slow
def test_the_notebook_runs_and_its_page_needs_no_script(tmp_path, monkeypatch):
    for variable in ("CTXLM_RESULTS", "JPY_SESSION_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CTXLM_CACHE", str(ROOT / "data" / "cache"))
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    text = f"Hi there, how are you? {HOSTILE}"
    process, executed = papermill(
        tmp_path, "09_playground", text=text, prompt="<script>alert(2)</script>", cost_tokens=40
    )
    assert process.returncode == 0, process.stderr
    notebook = nbformat.read(executed, as_version=4)
    assert "widgets" not in notebook.metadata
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert not any("widget" in kind or "javascript" in kind for kind in kinds)
    body = cells_html(notebook)
    assert "<script" not in body and "alert(2)" in Elements(body).text
    page = HTMLExporter(template_name="lab").from_notebook_node(notebook)[0]
    assert "jupyter-widgets" not in page and "html-manager" not in page
    assert not any("alert(" in hidden for hidden in Elements(page).hidden)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        silent = {"parameters", "injected-parameters", "notebook-only"} & {*cell.metadata.get("tags", [])}
        assert silent or cell.outputs, cell.id
