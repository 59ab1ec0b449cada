"""How far a piece of work is: a line that changes in Jupyter, a bar in a terminal, and nothing in a log.

In a Jupyter kernel all that one cell reports is one line of plain text, updated in place, so that an executed notebook
keeps its last state. A batch of runs (`Snakefile`, `ctxlm.search`) sets the environment variable CTXLM_PROGRESS to
`lines`: then what `say` is given is printed, line by line, and papermill's log has it.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY = 0.5
"""Seconds between two states of a line."""


def in_place() -> bool:
    """Whether outputs can be updated in place: in a Jupyter kernel that no batch has started."""
    return _shell() is not None and os.environ.get("CTXLM_PROGRESS") != "lines"


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, while `what` is shown with how far it is; `total` is how many there are, if they have no length."""
    if not in_place():
        yield from tqdm(items, what, total, leave=False, disable=not sys.stderr.isatty() or _shell() is not None)
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    began = time.monotonic()
    due = began + EVERY
    for done, item in enumerate(items):
        if done and (now := time.monotonic()) >= due:
            due = now + EVERY
            left = _duration((now - began) * max(total - done, 0) / done) if total else ""
            _line.show(what, f"{done / total:.0%}, {left} left" if total else f"{done:,}")
        yield item
    _line.end(what, time.monotonic() - began)


def say(line: str) -> None:
    """Show a line that is worth keeping; in Jupyter it takes the place of the cell's one before."""
    if in_place():
        _line.keep(line)
    else:
        tqdm.write(line)


def _shell() -> Any:
    """IPython's shell in a Jupyter kernel; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") else None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class _Line:
    """The line of the cell that is being run."""

    def __init__(self) -> None:
        self.cell, self.kept, self.handle = -1, "", None

    def keep(self, line: str) -> None:
        self._begin()
        self.kept = line
        self._write(line)

    def show(self, what: str, state: str) -> None:
        """A passing state, behind what is kept."""
        self._begin()
        self._write(f"{self.kept} · {what}: {state}" if self.kept else f"{what}: {state}")

    def end(self, what: str, seconds: float) -> None:
        """Take the passing state away; where nothing else is kept, say how long it took."""
        self._begin()
        if self.handle:
            self._write(self.kept or f"{what}: {_duration(seconds)}")

    def _begin(self) -> None:
        """Start a line of its own for a cell that has none."""
        if (cell := _shell().execution_count) != self.cell:
            self.cell, self.kept, self.handle = cell, "", None

    def _write(self, text: str) -> None:
        from IPython.display import DisplayHandle

        self.handle, new = self.handle or DisplayHandle(), self.handle is None
        (self.handle.display if new else self.handle.update)({"text/plain": text}, raw=True)


_line = _Line()
