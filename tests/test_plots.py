"""The figures that several pages draw: what they show is what the frames hold, and a label keeps its colour."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from ctxlm.analysis import corpus_plots, plots, run_plots
from ctxlm.analysis.estimates import Estimate, Estimates
from ctxlm.analysis.runs import read_histories, read_runs
from ctxlm.config import Experiment
from ctxlm.corpus import load_corpus, split


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXLM_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        return read_runs("stabilised-variance")


@pytest.fixture(scope="module")
def histories(runs):
    return read_histories(runs)


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_a_and_b_have_the_same_colours_whatever_else_is_drawn():
    for labels in (["A", "A-zero", "B", "KN-4"], ["A, phase2_learning_rate 0.001", "B", "LSTM"]):
        colours = {name: to_hex(look["color"]) for name, look in run_plots.line_styles(labels).items()}
        assert len(set(colours.values())) == len(labels)
        first = {name: to_hex(to_rgb(colour)) for name, colour in run_plots.FIRST.items() if name in labels}
        assert first.items() <= colours.items()


def test_perplexity_by_tokens_shows_every_run_and_the_means(runs):
    figure = plots.by_tokens(runs)
    (axes,) = figure.axes
    assert figure.get_figwidth() == run_plots.NARROW and figure.number not in plt.get_fignums()
    drawn = lines(axes)
    assert set(drawn) == {"A", "B"}
    means = runs[runs["experiment"] == "A"].groupby("train_tokens")["log_ppl"].mean()
    np.testing.assert_allclose(drawn["A"].get_ydata(), np.exp(means))
    known = runs.assign(log_ppl=runs["log_ppl"].where(runs["run"] != runs["run"].iloc[0]))
    for shown, count in ((axes, len(runs)), (plots.by_tokens(known).axes[0], len(runs) - 1)):
        points = [line for line in shown.lines if line.get_linestyle() == "None"]
        assert sum(len(line.get_ydata()) for line in points) == count


def test_learning_curves_go_by_epochs_however_often_one_is_validated(histories):
    figures = [plots.learning_curves(histories.assign(validations_per_epoch=parts)) for parts in (1, 4)]
    once, often = ([line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata())] for figure in figures)
    for plain, fourth in zip(once, often, strict=True):
        np.testing.assert_allclose(fourth, np.asarray(plain) / 4)


def test_memory_shows_what_is_lost_by_contexts_of_the_last_tokens(histories):
    one = histories[histories["id"] == histories["id"].iloc[0]]
    losses = run_plots.metric_of(one, "recent_tokens", "val_loss")
    left, right = run_plots.plot_memory(one[["phase", "step", "metric", "value"]]).axes
    np.testing.assert_allclose(right.lines[0].get_ydata(), 100 * np.expm1((losses - losses[0]).drop(0)))
    assert left.get_yscale() == "log"
    of_runs = run_plots.recent_tokens(histories[histories["configuration"] == "A"])
    right = run_plots.plot_memory(histories).axes[1]
    np.testing.assert_allclose(right.lines[0].get_ydata(), 100 * np.expm1(of_runs.groupby("k")["extra"].mean()))


@pytest.mark.parametrize("cut", [None, 100])
def test_the_curve_of_tokens_never_seen_goes_through_the_run(cut):
    e = Experiment(train_tokens=20_000, train_sample_tokens=cut, val_samples=50)
    curve, dot = corpus_plots.plot_unseen(load_corpus("chitchat"), split(e)).axes[0].lines
    assert dot.get_ydata()[0] == pytest.approx(np.interp(20_000, *curve.get_data()), abs=0.1) and dot.get_ydata()[0] > 5


def test_a_waterfall_comes_down_by_its_steps_to_what_is_left():
    def part(contrast, value):
        return Estimate(contrast, "A", value, value - 0.1, value + 0.1, 3, 3, 2.0, ("seed",), "%")

    (axes,) = plots.waterfall(Estimates([part("all", 0.7), part("one", -0.4), part("rest", 0.3)]), "share").axes
    bars = [sorted((bar.get_x(), bar.get_x() + bar.get_width())) for bar in axes.patches]
    np.testing.assert_allclose(bars, [[0, 0.7], [0.3, 0.7], [0, 0.3]], atol=1e-12)
    np.testing.assert_allclose([line.get_xdata() for line in axes.lines], [[0.6, 0.8], [0.2, 0.4], [0.2, 0.4]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "one", "rest"]


def test_leads_are_coloured_by_what_is_better_and_hollow_where_that_is_unsure():
    def one(text, embedding, value):
        covers = {"n": 9, "replicates": 3, "over": ("replicates",), "dof": 9.0}
        return Estimate("A − B", f"{text}, {embedding}", value, value - 0.02, value + 0.02, **covers)

    both = Estimates([one("speeches", "PPMI", -0.1), one("speeches", "SmolLM2", 0.1), one("prompts", "PPMI", 0.0)])
    figure = plots.leads({"above": both, "below": Estimates([one("prompts", "SmolLM2", -0.1)])})
    points = [
        (panel.get_title(), line.get_marker(), to_hex(line.get_color()), to_hex(line.get_markerfacecolor()))
        for panel in figure.axes
        for line in panel.lines
        if line.get_marker() in ("o", "s")
    ]
    a, b, unsure = (to_hex(colour) for colour in (run_plots.FIRST["A"], run_plots.FIRST["B"], "0.45"))
    assert points == [
        ("above", "o", a, a),
        ("above", "s", b, b),
        ("above", "o", unsure, "#ffffff"),
        ("below", "s", a, a),
    ]
    assert [[label.get_text() for label in panel.get_yticklabels()] for panel in figure.axes] == [
        ["speeches", "prompts"],
        ["prompts"],
    ]


def test_groups_show_every_run_and_the_mean_of_each_cell(runs):
    shape = runs.assign(shape=runs["experiment"], recipe="one")
    (axes,) = plots.groups(shape, "train_tokens", "shape", "recipe").axes
    assert axes.get_title() == "recipe: one"
    drawn = [line for line in axes.lines if len(line.get_ydata())]
    points = np.concatenate([line.get_ydata() for line in drawn if line.get_marker() != "_"])
    np.testing.assert_allclose(np.sort(points), np.sort(np.exp(runs["log_ppl"])))
    means = np.concatenate([line.get_ydata() for line in drawn if line.get_marker() == "_"])
    cells = np.exp(runs.groupby(["experiment", "train_tokens"])["log_ppl"].mean())
    np.testing.assert_allclose(np.sort(means), np.sort(cells))
