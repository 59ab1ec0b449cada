"""Progress in a kernel, in a terminal and in a log."""

import io
import sys

import nbclient
import nbformat
import pytest

from ctxlm import progress
from ctxlm.files import ROOT

WORK = """
import time
from ctxlm.progress import say, track
for epoch in (1, 2):
    for _ in track(range(30), f"epoch {epoch}"):
        time.sleep(0.03)
    say(f"epoch {epoch}: done")
"""
CURVE = """
import matplotlib.pyplot as plt
from ctxlm.analysis import run_plots
run_plots.FIRST_DRAWING = 0
curve, history = run_plots.Live(), []
for step in (1, 2, 3):
    names = ("train_loss", "val_loss", "train_ppl", "val_ppl")
    history += [{"phase": "phase2", "step": step, "metric": name, "value": 9.0 - step} for name in names]
    curve(history)
    curve.cost = 0 if step == 1 else 1000
print(curve.rows // 4, "of 3 drawn", flush=True)
curve.finish(history)
print(curve.rows // 4, "of 3 drawn")
"""


def executed(*sources):
    """The outputs of cells with these sources, run in a kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.mark.slow
def test_a_cell_has_one_line_and_one_figure_both_in_their_last_state():
    (line,), (other,), drawn = executed(WORK, WORK.replace("done", "over"), CURVE)
    assert line.data == {"text/plain": "epoch 2: done"}
    assert other.data == {"text/plain": "epoch 2: over"}  # a line of its own
    (figure,) = [output for output in drawn if "image/png" in output.get("data", {})]
    before, after = (output.text for output in drawn if output.output_type == "stream")
    assert before == "2 of 3 drawn\n" and after == "3 of 3 drawn\n" and figure is drawn[0]


@pytest.mark.slow
def test_a_batch_has_every_line_in_its_log(monkeypatch):
    monkeypatch.setenv("CTXLM_PROGRESS", "lines")
    (outputs,) = executed(WORK)
    assert {output.name for output in outputs} == {"stdout"}
    assert "".join(output.text for output in outputs) == "epoch 1: done\nepoch 2: done\n"


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Screen, True), (io.StringIO, False)])
def test_a_terminal_has_a_bar_and_a_file_none(stream, shown, monkeypatch, capsys):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(progress.track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    progress.say("all three")
    assert ("letters" in stderr.getvalue()) == shown and capsys.readouterr().out == "all three\n"


class Handle:
    """What a display of IPython's is told."""

    def __init__(self):
        self.states = []

    def display(self, data, raw):
        self.states.append(data["text/plain"])

    update = display


@pytest.fixture
def kernel(monkeypatch):
    """This process as a kernel whose clock goes on by a tenth of a second a look; what its line is."""
    handle, clock = Handle(), iter(range(10**6))
    monkeypatch.setattr(progress, "_shell", lambda: type("Shell", (), {"execution_count": 1}))
    monkeypatch.setattr(progress, "_line", progress._Line())
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) / 10)
    monkeypatch.setattr("IPython.display.DisplayHandle", lambda: handle)
    return handle.states


def test_a_line_says_how_much_is_left_twice_a_second_and_keeps_what_was_said(kernel):
    assert len(list(progress.track(range(20), "contexts"))) == 20
    assert kernel == [*(f"contexts: {state} left" for state in ("25%, 2 s", "50%, 1 s", "75%, 0 s")), "contexts: 2 s"]
    progress.say("iteration 1")
    list(progress.track(iter(range(20)), "next"))  # of which nobody knows how many there are
    assert kernel[-1] == "iteration 1" and any(state.startswith("iteration 1 · next: ") for state in kernel)


def test_what_is_soon_over_shows_nothing(kernel):
    list(progress.track(range(3), "contexts"))
    assert kernel == []
