"""Progress in a kernel, in a terminal and in a log."""

import io
import sys
import time

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
curve, history, draws, plot = run_plots.Live(), [], [], run_plots.plot_phase2
run_plots.plot_phase2 = lambda history: draws.append(1) or plot(history)
for step in (1, 2, 3):
    names = ("train_loss", "val_loss", "train_ppl", "val_ppl")
    history += [{"phase": "phase2", "step": step, "metric": name, "value": 9.0 - step} for name in names]
    curve(history)
assert len(draws) == 3  # drawn while it went on
curve.finish(history)
"""


NOBODY = "import os; os.environ.pop('JPY_SESSION_NAME', None)"  # sits before it
BATCH = "os.environ |= {'CTXLM_BATCH': '1', 'JPY_SESSION_NAME': 'someone'}"
SOMEONE = "del os.environ['CTXLM_BATCH']"


@pytest.fixture(scope="module")
def outputs():
    """What a kernel prints and draws: nobody before it, in a batch, and for someone."""
    sources = [NOBODY + WORK, BATCH + WORK, SOMEONE + WORK, CURVE]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return [cell.outputs for cell in notebook.cells]


def shown(outputs):
    """What is left on the screen of printed text, whose lines a carriage return writes anew."""
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return [line.split("\r")[-1].strip() for line in text.split("\n")]


@pytest.mark.slow
def test_a_cell_keeps_its_lines_and_one_figure_in_its_last_state(outputs):
    _, _, work, drawn = outputs
    assert shown(work) == ["epoch 1: done", "epoch 2: done", ""] and {output.name for output in work} == {"stdout"}
    assert "epoch 1:" in "".join(output.text for output in work).split("epoch 1: done")[0]  # a bar, before
    (figure,) = [output for output in drawn if "image/png" in output.get("data", {})]
    assert [figure] == drawn


@pytest.mark.slow
def test_a_batch_and_papermill_by_hand_have_every_line_and_no_bar(outputs):
    for printed in outputs[:2]:
        assert {output.name for output in printed} == {"stdout"}
        assert "".join(output.text for output in printed) == "epoch 1: done\nepoch 2: done\n"


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "bar"), [(Screen, True), (io.StringIO, False)])
def test_a_terminal_has_a_bar_and_a_file_none(stream, bar, monkeypatch, capsys):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(progress.track("abc", "at once")) == ["a", "b", "c"]
    for _ in progress.track("abc", "letters"):
        time.sleep(0.3)
    progress.say("all three")
    assert ("letters" in stderr.getvalue()) == bar and "at once" not in stderr.getvalue()
    assert capsys.readouterr().out == "all three\n"
