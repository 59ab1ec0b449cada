"""Where things lie on disk, how a file is replaced whole, what is cached, and what a piece of source hashes to."""

import ast
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
"""The repository: relative paths in parameters are taken from here, wherever a notebook runs."""
BY_HAND = "interactive"
"""The grid of runs that are made by hand and named after what they are: it has no file."""
RUN_LOCK = ".lock"
"""In a run's folder: held by the process that makes it."""
PLUMBING = {f"ctxlm/{name}.py" for name in ("config", "files", "progress", "run")}
"""Modules left out of a run's code: parameters are compared by value, files by content; `run` does what notebooks 02
and 03 spell out, which a test holds."""

if not (ROOT / "params").is_dir():
    raise ImportError("ctxlm works from its repository: install it there with `pip install -e .`")


def resolve(path: str | Path) -> Path:
    """`path` itself when absolute, otherwise below the repository's root."""
    return ROOT / os.path.expanduser(str(path))  # YAML gives a folder called 2025 as a number


def find(path: str | Path) -> Path:
    """An input file: below the repository's root, or else in the current folder, JupyterLab's beside a notebook."""
    beside = Path(os.path.expanduser(path)).absolute()
    return beside if beside.exists() and not resolve(path).exists() else resolve(path)


def cache_dir() -> Path:
    """The folder of the caches, made if need be: `data/cache`, or what the environment variable CTXLM_CACHE names."""
    folder = resolve(os.environ.get("CTXLM_CACHE") or "data/cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def outputs_dir() -> Path:
    """Where runs are written: `outputs`, or what the environment variable CTXLM_OUTPUTS names."""
    return resolve(os.environ.get("CTXLM_OUTPUTS") or "outputs")


def results_dir() -> Path:
    """Where committed results are: `data/results`, or what the environment variable CTXLM_RESULTS names."""
    return resolve(os.environ.get("CTXLM_RESULTS") or "data/results")


def run_folders(grid: str, committed: bool = False) -> dict[str, tuple[Path, str]]:
    """Finished runs of a grid: name → (folder, "outputs" or "committed"); the latter where `outputs` has none of it.

    `committed`: look among committed results alone.
    """
    for root, source in ((outputs_dir(), "outputs"), (results_dir(), "committed"))[committed:]:
        if paths := sorted((root / grid).glob("*/metrics.json")):
            return {path.parent.name: (path.parent, source) for path in paths}
    return {}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block ends without an error.

    A reader sees the old file or the new one, never half of one. A killed writer leaves a dot-file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files private; results are for everyone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _lock(path: Path) -> FileLock:
    """A path's one lock: shared by the threads of this process, freed by its death, seen from other machines too."""
    return FileLock(path, thread_local=False)


def take(path: Path) -> bool:
    """Take the lock `path` till `release` or the process ends; whether it could be had. Twice is once."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _lock(path).is_locked or bool(_lock(path).acquire(0.5))  # `make status` holds it for a moment
    except Timeout:
        return False


def release(path: Path) -> None:
    """Let go of a lock that `take` took."""
    _lock(path.resolve()).release()


def cached_arrays(path: Path, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in the .npz file `path`, or those `build` makes, kept there.

    Of several processes that want the same file, one builds it and the others wait for it.
    """
    with nullcontext() if path.exists() else FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            with np.load(path) as file:
                return dict(file)
        arrays = build()
        try:
            with atomic(path) as temporary:
                np.savez(temporary, **arrays)
        except OSError as error:  # what was computed is not lost because it cannot be kept
            warnings.warn(f"{path} cannot be kept ({error.strerror}): it will be made again next time", stacklevel=2)
        return arrays


def digest(*parts: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `parts`, each preceded by its length."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:16]


def source_hash(*names: str) -> str:
    """Digest of sources, named relative to the repository's root, and of all of ctxlm that they import.

    Comments, docstrings and layout do not count; of a notebook only the code cells do, parameters apart. Left out is
    what merely moves, checks and names things (`PLUMBING`), and the analysis.
    """
    sources: dict[str, str] = {}
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name not in sources and name not in PLUMBING and not name.startswith("ctxlm/analysis/"):
            sources[name], imported = _bare(ROOT / name)
            wanted += imported
    return digest(*(part for name in sorted(sources) for part in (name, sources[name])))


class _Bare(ast.NodeTransformer):
    """Drops strings that stand alone, which do nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node


@cache
def _bare(path: Path) -> tuple[str, list[str]]:
    """A source without what explains it, and the files of ctxlm that it imports."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "code"]
        cells = [cell for cell in cells if "parameters" not in cell["metadata"].get("tags", [])]
        source = "\n".join("".join(cell["source"]) for cell in cells)
    syntax = _Bare().visit(ast.parse(source))
    modules = [node.module for node in ast.walk(syntax) if isinstance(node, ast.ImportFrom)]
    code = ast.unparse(syntax).replace('"', "'")  # Pythons before 3.12 quote within f-strings otherwise
    return code, [f"{name.replace('.', '/')}.py" for name in modules if name.startswith("ctxlm.")]
