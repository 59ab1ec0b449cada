"""Files that are read, wrong in every way that they can be; and what no run can be made of.

Each row is refused at once, in one sentence that names what is wrong, and leaves all files as they were.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as as_safetensors

from ctxlm import batch
from ctxlm.config import Experiment, load_grid, read_yaml
from ctxlm.corpus import VOCABULARY, check_data
from ctxlm.embeddings import load_embedding
from ctxlm.files import digest
from tests.conftest import refusal

MISSING, DIRECTORY, UNREADABLE = "missing", "directory", "unreadable"
STATES = {what: what for what in (MISSING, DIRECTORY, UNREADABLE)} | {
    "empty": b"",
    "Latin-1": "wörd: né\n".encode("latin-1"),
    "binary": bytes(range(256)) * 8,
}
"""What can be wrong with a file of any kind."""


def put(path: Path, content: str | bytes) -> str:
    """Puts a bad file, or none, at a path."""
    if content == DIRECTORY:
        path.mkdir()
    elif content == UNREADABLE and Path("/proc/self/mem").exists():
        path.symlink_to("/proc/self/mem")  # a file whose first byte nobody can read, root neither
    elif content == UNREADABLE:
        path.touch(mode=0)
    elif content != MISSING:
        path.write_bytes(content)
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where everything is read and written."""
    for name in ("cache", "outputs"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"CTXLM_{name.upper()}", str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(home):
    """Refuses a call by one sentence, and without a trace but for locks."""

    def files():
        paths = {path: path.is_file() and not path.is_symlink() for path in home.rglob("*") if path.suffix != ".lock"}
        return {path: digest(path.read_bytes()) if whole else "" for path, whole in paths.items()}

    def refuse(call, *arguments, **keywords):
        before = files()
        message = refusal(call, *arguments, **keywords)
        assert files() == before and 20 < len(message) < 1000
        return message

    return refuse


def rows(bad):
    """The rows of a kind of file: what can be wrong with any, and what with it alone."""
    return [pytest.param(content, id=what) for what, content in (STATES | bad).items()]


SHORT = b"\n\n".join([b"a short text"] * 5)
CORPORA = {
    ".txt": {"blank": b" \n\n\t\n", "few": SHORT, "one": b"a" * 100},
    ".jsonl": {
        "blank": b"\n",
        "truncated": b'{"text": "x"}\n\n{"text": \n',
        "other key": b'{"text": "x"}\n{"txt": "x"}',
        "null": b'{"text": null}',
        "number": b"3",
        "message without content": b'{"messages": [{}]}',
        "half a surrogate": rb'{"text": "\ud83d"}',
        "few": b'{"text": "x"}\n' * 5,
        "empty texts": b'{"text": "x"}\n' * 5 + b'{"text": ""}\n' * 9,
    },
    ".parquet": {"truncated": b"PAR1 not quite"},
}


@pytest.mark.parametrize(
    ("suffix", "content"),
    [pytest.param(suffix, *row.values, id=f"{suffix}-{row.id}") for suffix in CORPORA for row in rows(CORPORA[suffix])],
)
def test_a_bad_corpus_is_refused(home, refused, suffix, content):
    name = put(home / f"text{suffix}", content)
    asked = {"train_tokens": 5, "val_samples": 1, "development_samples": 1, "test_samples": 1, "corpus": name}
    assert f"corpus = {name!r}" in refused(check_data, [Experiment.from_mapping(asked)])


def entries(*values, dim=2, dtype=np.float32):
    """An embedding, of zeros but for its first entries."""
    matrix = np.zeros((VOCABULARY, dim), dtype)
    matrix.flat[: len(values)] = values
    return as_safetensors({"wte.weight": matrix})


GOOD = entries(0.5)
EMBEDDINGS = {
    "truncated": GOOD[:-20],
    "other key": as_safetensors({"wpe.weight": np.zeros((2, 2), np.float32)}),
    "other width": entries(dim=3),
    "whole numbers": entries(1, dtype=np.int64),
    "nan": entries(0.1, np.nan),
    "huge": entries(0.1, 1e30),
}


@pytest.mark.parametrize("content", rows(EMBEDDINGS))
def test_a_bad_embedding_is_refused(home, refused, content):
    name = put(home / "model.safetensors", content)
    assert f"embedding = {name!r}" in refused(load_embedding, Experiment(embedding=name, embed_dim=2))


YAML = {
    "truncated": b"num_layers: [1",
    "list": b"- num_layers\n- 6\n",
    "Python": b"a: !!python/object/apply:os.mkdir [made]\n",
    "wrong tag": b"a: !!int abc\n",
}


@pytest.mark.parametrize("content", rows(YAML))
def test_bad_parameter_and_grid_files_are_refused(home, refused, capsys, content):
    name = put(home / "mine.yaml", content)
    for call in (read_yaml, load_grid):
        assert name in refused(call, name)
    assert batch.main(["--check", name]) == 1
    out, message = capsys.readouterr()
    assert not out and name in message and message.count("\n") == 1
