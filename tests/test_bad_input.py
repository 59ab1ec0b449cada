"""Files that are read, wrong in every way that people meet: each is refused in one sentence that names it."""

import numpy as np
import pytest
from safetensors.numpy import save as as_safetensors

from ctxlm import batch
from ctxlm.config import Experiment, load_grid, read_yaml
from ctxlm.corpus import VOCABULARY, check_data
from ctxlm.embeddings import load_embedding
from tests.conftest import refusal

LATIN1 = "wörd: né\n".encode("latin-1")
CORPORA = [
    ("empty.txt", b""),
    ("blank.txt", b" \n\n\t\n"),
    ("few.txt", b"\n\n".join([b"a short text"] * 5)),
    ("one line.txt", b"a" * 100),
    ("Latin-1.txt", LATIN1),
    ("binary.txt", bytes(range(256)) * 8),
    ("Latin-1.jsonl", LATIN1),
    ("blank.jsonl", b"\n"),
    ("truncated.jsonl", b'{"text": "x"}\n\n{"text": \n'),
    ("other key.jsonl", b'{"text": "x"}\n{"txt": "x"}'),
    ("null.jsonl", b'{"text": null}'),
    ("number.jsonl", b"3"),
    ("message without content.jsonl", b'{"messages": [{}]}'),
    ("half a surrogate.jsonl", rb'{"text": "\ud83d"}'),
    ("few.jsonl", b'{"text": "x"}\n' * 5),
    ("empty texts.jsonl", b'{"text": "x"}\n' * 5 + b'{"text": ""}\n' * 9),
    ("truncated.parquet", b"PAR1 not quite"),
]


@pytest.mark.parametrize(("file", "content"), CORPORA, ids=[file for file, _ in CORPORA])
def test_a_bad_corpus_is_refused(tmp_path, empty_cache, file, content):
    (tmp_path / file).write_bytes(content)
    asked = {"train_tokens": 5, "val_samples": 1, "development_samples": 1, "test_samples": 1}
    message = refusal(check_data, [Experiment.from_mapping(asked, {"corpus": str(tmp_path / file)})])
    assert f"corpus = {str(tmp_path / file)!r}" in message and len(message) < 1000


def entries(*values, dim=2, dtype=np.float32):
    """An embedding, of zeros but for its first entries."""
    matrix = np.zeros((VOCABULARY, dim), dtype)
    matrix.flat[: len(values)] = values
    return as_safetensors({"wte.weight": matrix})


EMBEDDINGS = {
    "missing": None,
    "empty": b"",
    "truncated": entries(0.5)[:-20],
    "other key": as_safetensors({"wpe.weight": np.zeros((2, 2), np.float32)}),
    "other width": entries(dim=3),
    "whole numbers": entries(1, dtype=np.int64),
    "nan": entries(0.1, np.nan),
    "huge": entries(0.1, 1e30),
}


@pytest.mark.parametrize("content", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_a_bad_embedding_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    message = refusal(load_embedding, Experiment(embedding=str(path), embed_dim=2))
    assert f"embedding = {str(path)!r}" in message


YAML = {"empty": b"", "Latin-1": LATIN1, "truncated": b"num_layers: [1", "list": b"- num_layers\n- 6\n"}


@pytest.mark.parametrize("content", YAML.values(), ids=YAML)
def test_bad_parameter_and_grid_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for call in (read_yaml, load_grid):
        assert str(path) in refusal(call, str(path))
    assert batch.main(["--check", str(path)]) == 1
    out, message = capsys.readouterr()
    assert not out and str(path) in message and message.count("\n") == 1
