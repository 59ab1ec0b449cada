"""Progress in a kernel, in a terminal and in a log."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from ctxlm import progress


@pytest.mark.parametrize(
    ("shell", "variables", "someone"),
    [
        ({"kernel": 1, "user_ns": {}}, {"JPY_SESSION_NAME": "09"}, True),  # JupyterLab
        ({"kernel": 1, "user_ns": {"__vsc_ipynb_file__": "09"}}, {}, True),  # VS Code
        ({"kernel": 1, "user_ns": {}}, {}, False),  # papermill
        (
            {"kernel": 1, "user_ns": {}},
            {"JPY_SESSION_NAME": "09", "CTXLM_BATCH": "1"},
            False,
        ),  # a batch from JupyterLab
        ({"user_ns": {}}, {"JPY_SESSION_NAME": "09"}, False),  # IPython in its terminal
    ],
)
def test_someone_sits_before_an_editors_kernel_and_not_before_a_batchs(shell, variables, someone, monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(**shell))
    for name in ("JPY_SESSION_NAME", "CTXLM_BATCH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert progress.in_jupyter() == someone


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "someone", "bars"),
    [(Screen, False, ["stderr"]), (io.StringIO, False, []), (io.StringIO, True, ["stdout"])],
)
def test_a_terminal_and_a_notebook_have_a_bar_and_a_file_none(stream, someone, bars, monkeypatch):
    files = {"stdout": io.StringIO(), "stderr": stream()}
    for name, file in files.items():
        monkeypatch.setattr(sys, name, file)
    monkeypatch.setattr(progress, "in_jupyter", lambda: someone)
    assert list(progress.track("abc", "at once")) == ["a", "b", "c"]
    for _ in progress.track("abc", "letters"):
        time.sleep(0.3)
    progress.say("all three")
    written = {name: file.getvalue() for name, file in files.items()}
    assert [name for name in written if "letters" in written[name]] == bars
    assert written["stdout"].endswith("all three\n") and not any("at once" in text for text in written.values())
