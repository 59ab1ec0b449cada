"""How far a piece of work is: a bar in a terminal and in Jupyter, and only whole lines in a batch's log."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def in_jupyter() -> bool:
    """Whether someone sits before this kernel, unlike under papermill, which would keep all states of a bar."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if not hasattr(shell, "kernel") or "CTXLM_BATCH" in os.environ:
        return False
    editor = "__vsc_ipynb_file__" in shell.user_ns  # VS Code's
    return editor or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, while a bar shows how far they are, of what takes more than a moment; it vanishes at the end."""
    hidden = not (in_jupyter() or sys.stderr.isatty())
    file = sys.stdout if in_jupyter() else sys.stderr  # Jupyter shows the latter as an error
    yield from tqdm(items, what, leave=False, disable=hidden, file=file, mininterval=0.5, delay=0.5)


def say(line: str) -> None:
    """Print a line that is worth keeping."""
    tqdm.write(line)
