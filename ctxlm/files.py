"""Where things lie on disk, how a file is replaced whole, what is cached, and what a piece of source hashes to."""

import ast
import hashlib
import json
import os
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
"""The repository: relative paths in parameters are taken from here, wherever a notebook runs."""

RUN_LOCK = ".lock"
"""In a run's folder: whose it is while it is made."""
CHECKPOINTS = ".checkpoints"
"""Within a run's folder, while it is not finished."""
PLUMBING = ("ctxlm/checkpoints.py", "ctxlm/config.py", "ctxlm/files.py", "ctxlm/progress.py", "ctxlm/results.py")
"""Modules that no run's numbers depend on: parameters are held by value, files by content."""

if not (ROOT / "params").is_dir():
    raise ImportError("ctxlm works from its repository: install it there with `pip install -e .`")


def resolve(path: str | Path) -> Path:
    """`path` itself when absolute, otherwise below the repository's root."""
    return ROOT / os.path.expanduser(path)


def find(path: str | Path) -> Path:
    """An input file: below the repository's root, or else in the current folder, JupyterLab's beside a notebook."""
    beside = Path(os.path.expanduser(path)).absolute()
    return beside if beside.exists() and not resolve(path).exists() else resolve(path)


def cache_dir() -> Path:
    """The folder of the caches: `data/cache`, or what the environment variable CTXLM_CACHE names."""
    folder = resolve(os.environ.get("CTXLM_CACHE") or "data/cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"CTXLM_CACHE = {folder} cannot be made ({error.strerror}): name another folder") from None
    return folder


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block ends without an error.

    A reader therefore sees the old file or the new one, never half of one; a killed writer leaves
    only a dot-file behind, and a failed one (a full disk) removes it.
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


def clear_temporaries(folder: Path, of: str = "*.*") -> None:
    """Remove what killed writers have left of the files `of` in a folder, which nobody else writes to meanwhile."""
    stem, suffix = os.path.splitext(of)
    for path in folder.glob(f".{stem}-{'[0-9a-f]' * 32}{suffix}"):
        path.unlink(missing_ok=True)


@cache
def _lock(path: Path) -> FileLock:
    """One and the same lock for all of this process's threads. Its death lets go of it, whatever it died of; and where
    nodes share the file system, they share it."""
    return FileLock(path, thread_local=False)


def take(path: Path) -> bool:
    """Take the lock `path` till this process ends; whether it could be had. A second time it is had already."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _lock(path).is_locked or bool(_lock(path).acquire(0))
    except Timeout:
        return False


def cached_arrays(path: Path, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in the .npz file `path`, or those `build` makes, kept there. A damaged file is made anew, and one
    that is another's under this name.

    Of several processes that want the same file, one builds it and the others wait for it.
    """
    if (arrays := _own_arrays(path)) is not None:
        return arrays
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as locked:
        with suppress(OSError):  # a cache that cannot be written to has no lock either
            locked.enter_context(FileLock(lock))
            # whoever waits for it looks for the arrays once it is theirs
            locked.callback(lock.unlink, missing_ok=True)
            clear_temporaries(path.parent, path.name)
        if (arrays := _own_arrays(path)) is not None:
            return arrays
        arrays = build()
        try:
            with atomic(path) as temporary:
                np.savez(temporary, **arrays, names=np.array(sorted(arrays)), made_as=np.array(path.name))
        except OSError as error:  # what was computed is not lost because it cannot be kept
            warnings.warn(f"{path} cannot be kept ({error.strerror}): it will be made again next time", stacklevel=2)
    return arrays


def _own_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file of `cached_arrays`; None where it is missing, damaged, or was made under another name."""
    known = read_arrays(path, ("made_as",))  # which older ones do not say
    return None if known and str(known["made_as"]) != path.name else read_arrays(path)


def read_arrays(path: Path, names: Sequence[str] = ()) -> dict[str, np.ndarray] | None:
    """The arrays `names` of an .npz file, or all of them; None where the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as whole:  # numpy alone stops checking where a damaged header says an array ends
            if whole.testzip() is not None:
                return None
        with np.load(path) as file:
            return {name: file[name] for name in names or [str(name) for name in file["names"]]}
    except Exception:  # a flipped bit can raise nearly anything
        return None


def memory() -> int:
    """Bytes of this machine's memory, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_json(text: str | bytes) -> Any:
    """What a text says in JSON.

    Raises:
        ValueError: it says nothing in JSON, or is nested too deep for Python's parser.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def digest(*parts: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `parts`, each preceded by its length."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def source_hash(*names: str) -> str:
    """Digest of sources, named relative to the repository's root, and of all of ctxlm that they import.

    Comments, docstrings and layout do not count; of a notebook only the code cells do. What merely moves, checks and
    names things is left out (`PLUMBING`), and so is the analysis.
    """
    found: dict[str, ast.AST] = {}
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name in found or name in PLUMBING or name.startswith("ctxlm/analysis/"):
            continue
        found[name] = _syntax(ROOT / name)
        imported = [node.module for node in ast.walk(found[name]) if isinstance(node, ast.ImportFrom)]
        wanted += [f"{module.replace('.', '/')}.py" for module in imported if module.startswith("ctxlm.")]
    return digest(*(part for name in sorted(found) for part in (name, ast.unparse(found[name]))))


class _Bare(ast.NodeTransformer):
    """Drops strings that stand alone, which explain and do nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else self.generic_visit(node)


@cache
def _syntax(path: Path) -> ast.AST:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "code"]
        source = "\n".join("".join(cell["source"]) for cell in cells)
    return _Bare().visit(ast.parse(source))
