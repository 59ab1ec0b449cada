"""The table of bad input: every parameter and every file that is read, wrong in every way that it can be.

Each row is refused at once, in one sentence on one line that names what is wrong, and leaves all files as they were.
"""

import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as as_safetensors
from safetensors.torch import save_file

from ctxlm import batch, device, embeddings
from ctxlm.config import ConfigError, Experiment, load_grid, parse_yaml, read_yaml
from ctxlm.corpus import VOCABULARY, check_data
from ctxlm.embeddings import data_hash, load_embedding
from ctxlm.files import ROOT, cached_arrays, digest
from ctxlm.generate import load_run
from ctxlm.model import ContextLM, own_weights
from ctxlm.results import run_folder
from tests.conftest import short_paragraphs


def sentence(call, *arguments, **keywords) -> str:
    """What a user is told of the error that the call must raise."""
    with pytest.raises((ConfigError, OSError)) as caught:
        call(*arguments, **keywords)
    return one_line(str(caught.value))


def one_line(message: str) -> str:
    """A sentence that a terminal can be sent."""
    assert message.isprintable() and 20 < len(message.strip()) == len(message) < 700, message[:2000]
    return message


# Parameters, built from the model: a new one has its rows by itself

PROPERTIES = Experiment.model_json_schema()["properties"]


def bad_values(name):
    """What a parameter cannot be: (what is wrong with it, value)."""
    kinds = {kind["type"]: kind for kind in PROPERTIES[name].get("anyOf", [PROPERTIES[name]])}
    number = kinds.get("integer") or kinds.get("number")
    yield from {"missing": "" if "null" in kinds else None, "list": [1], "mapping": {"a": 1}}.items()
    yield from {"nan": float("nan"), "infinite": float("inf"), "huge": 10**5000}.items()
    yield "case of the name", ...
    if number:
        yield from {"truth": True, "text": "three", "quoted": "3", "sexagesimal": "20:00", "large": 1e300}.items()
        least, below = number.get("minimum", 0) - 1, number.get("exclusiveMinimum")
        yield "too low", least if below is None else below
        most = number.get("exclusiveMaximum") or number.get("maximum", 1e30) * 1.01
        yield "too high", math.ceil(most) if "integer" in kinds else float(most)
    if "integer" in kinds:
        yield "fraction", 2.5
    if "boolean" in kinds:
        yield from {"text": "yes", "case": "True", "number": 1}.items()
    if "string" in kinds:
        default = Experiment.model_fields[name].default
        yield from {"number": 7, "empty": "", "unknown": "no such", "long": default * 10**6}.items()
        yield from {"surrogate": f"{default}\ud800.txt", "control before an extension": "\x1b[31m.txt"}.items()
        yield from {"control": f"{default}\x1b[31m\x07", "null": f"{default}\0", "line": f"{default}\n"}.items()
        if name != "experiment":  # a label may be of any case
            yield "case", default.upper()


VALUES = [pytest.param(name, value, id=f"{name}-{what}") for name in PROPERTIES for what, value in bad_values(name)]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_bad_value_is_refused(name, value):
    if value is ...:
        wrong = name.upper()
        message = sentence(Experiment.from_mapping, {wrong: Experiment.model_fields[name].default})
        assert message.startswith(f"{wrong} = ") and name in message
        return
    message = sentence(Experiment.from_mapping, {name: value})
    assert message.startswith(f"{name} = ")
    try:
        assert repr(value)[:20] in message
    except ValueError:  # so long a number is none that Python writes out
        assert "digits" in message


FOLDERS = {
    "nothing": "",
    "blank": " ",
    "number": 5,
    "truth": True,
    "list": ["outputs"],
    "nan": float("nan"),
    "null": "outputs/A\0",
    "the repository": ".",
    "the repository by its path": str(ROOT),
    "parameters": "params/mine",
    "parameters by a detour": "outputs/../params/mine",
    "sources": str(ROOT / "ctxlm"),
    "git": ".git/mine",
    "beside": "mine",
    "all outputs": "outputs",
}


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_a_bad_folder_is_refused(home, folder):
    before = {path.name for path in ROOT.iterdir()}
    for check in (run_folder, lambda folder: Experiment.from_namespace({"output_dir": folder})):
        message = sentence(check, folder)
        assert message.startswith("output_dir = ") and repr(folder)[1:9] in message
    assert {path.name for path in ROOT.iterdir()} == before and not (ROOT / "params" / "mine").exists()


def test_a_folder_among_files_or_links_that_lead_astray_is_refused(home):
    (home / "file").touch()
    (home / "link").symlink_to(ROOT / "params")
    for folder in (home / "file", home / "file" / "A", home / "link" / "mine", home / ("a" * 300)):
        assert sentence(run_folder, str(folder)).startswith(f"output_dir = {str(folder)!r}"[:100])
    assert not (ROOT / "params" / "mine").exists()


# Files

MISSING, DIRECTORY, UNREADABLE = "missing", "directory", "unreadable"
STATES = {what: what for what in (MISSING, DIRECTORY, UNREADABLE)} | {
    "empty": b"",
    "UTF-16": "text: wörd\n".encode("utf-16"),
    "Latin-1": "wörd: né\n".encode("latin-1"),
    "binary": bytes(range(256)) * 8,
}
"""What can be wrong with a file of any kind."""


def put(path: Path, content: str | bytes) -> str:
    """Puts a bad file, or none, at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.unlink()
    if content == DIRECTORY:
        path.mkdir()
    elif content == UNREADABLE and Path("/proc/self/mem").exists():
        path.symlink_to("/proc/self/mem")  # a file whose first byte nobody can read, root neither
    elif content == UNREADABLE:
        path.touch(mode=0)
    elif content != MISSING:
        path.write_bytes(content)
    return str(path)


def tree(folder: Path) -> dict[str, str]:
    """All that lies in a folder, with digests."""
    files = {path: path.is_file() and not path.is_symlink() for path in folder.rglob("*")}
    return {str(path): digest(path.read_bytes()) if whole else "" for path, whole in files.items()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where everything is read and written; it is as it was before the refusal."""
    for name in ("cache", "outputs", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"CTXLM_{name.upper()}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def refused(home, capsys):
    """Refuses a call, or a command, by one sentence, and without a trace."""

    def refuse(call, *arguments, command=False, **keywords):
        before = tree(home)
        if command:
            assert call(*arguments, **keywords) == 1
            out, message = capsys.readouterr()
            assert not out and one_line(message.removesuffix("\n"))
        else:
            message = sentence(call, *arguments, **keywords)
        assert tree(home) == before
        return message

    return refuse


def rows(bad):
    """The rows of a kind of file: what can be wrong with any, and what with it alone."""
    return [pytest.param(content, id=what) for what, content in (STATES | bad).items()]


DEEP, DIGITS = b"[" * 200_000, b"9" * 5_000
SHORT = b"\n\n".join([b"a short text"] * 5)

CORPORA = {
    ".txt": {"blank": b" \n\n\t\n", "few": SHORT, "one": b"a" * 100},
    ".jsonl": {
        "blank": b"\n",
        "truncated": b'{"text": "x"}\n\n{"text": \n',
        "other key": b'{"text": "x"}\n{"txt": "x"}',
        "null": b'{"text": null}',
        "number": b"3",
        "list": b'["text"]',
        "no message": b'{"messages": []}',
        "message without content": b'{"messages": [{}]}',
        "half a surrogate": rb'{"text": "\ud83d"}',
        "deep": DEEP,
        "deep inside": b'{"text": "x", "more": ' + DEEP,
        "digits": b'{"text": "x", "id": ' + DIGITS + b"}",
        "few": b'{"text": "x"}\n' * 5,
        "empty texts": b'{"text": "x"}\n' * 5 + b'{"text": ""}\n' * 9,
        "an array of all": b'[{"text": "x"}, {"text": "y"}]',
    },
    ".parquet": {"text": b"one\n\ntwo", "truncated": b"PAR1 not quite"},
    ".csv": {"text": b"text\none\n"},
    "": {"no extension": b"text"},
}
CORPUS_ROWS = [
    pytest.param(suffix, row.values[0], id=f"{suffix}-{row.id}") for suffix, bad in CORPORA.items() for row in rows(bad)
]


@pytest.mark.parametrize(("suffix", "content"), CORPUS_ROWS)
def test_a_bad_corpus_is_refused(home, refused, suffix, content):
    name = put(home / f"text{suffix}", content)

    def read():
        check_data(
            [
                Experiment.from_mapping(
                    {"corpus": name, "train_tokens": 5, "val_samples": 1, "development_samples": 1, "test_samples": 1}
                )
            ]
        )

    assert f"corpus = {name!r}" in refused(read)
    if content in (MISSING, DIRECTORY):
        assert f"corpus = {name!r}" in refused(Experiment.from_namespace, {"corpus": name})


def wte(**tensors):
    return as_safetensors({key.replace("_", "."): array for key, array in tensors.items()})


def entries(*values, dim=2, dtype=np.float32):
    """An embedding, of zeros but for its first entries."""
    matrix = np.zeros((VOCABULARY, dim), dtype)
    matrix.flat[: len(values)] = values
    return wte(wte_weight=matrix)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


class Harmful:
    """What would make a file as it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


GOOD = entries(0.5)
EMBEDDINGS = {
    "truncated": GOOD[:-20],
    "header truncated": GOOD[:20],
    "other key": wte(wpe_weight=np.zeros((2, 2), np.float32)),
    "other width": entries(dim=3),
    "few rows": wte(wte_weight=np.zeros((5, 2), np.float32)),
    "flat": wte(wte_weight=np.zeros(VOCABULARY, np.float32)),
    "whole numbers": entries(1, dtype=np.int64),
    "nan": entries(0.1, np.nan),
    "infinite": entries(0.1, -np.inf),
    "huge": entries(0.1, 1e30),
    "too large for float32": entries(0.1, 1e300, dtype=np.float64),
    "pickle": pickle.dumps(Harmful()),
    "header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "header of no JSON": header(b"wte.weight"),
    "deep": header(DEEP),
    "beyond its end": header(b'{"wte.weight":{"dtype":"F32","shape":[50257,2],"data_offsets":[0,402056]}}'),
}


@pytest.mark.parametrize("content", rows(EMBEDDINGS))
def test_a_bad_embedding_is_refused(home, refused, monkeypatch, content):
    monkeypatch.chdir(home)
    name = put(home / "model.safetensors", content)
    e = Experiment(embedding=name, embed_dim=2)
    assert f"embedding = {name!r}" in refused(load_embedding, e)
    if content == UNREADABLE:
        assert f"embedding = {name!r}" in refused(data_hash, e)
    if content in (MISSING, DIRECTORY):
        assert f"embedding = {name!r}" in refused(Experiment.from_namespace, {"embedding": name})


BOMB = "a0: &a0 [lol, lol]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12))
YAML = {
    "truncated": b"num_layers: [1",
    "list": b"- num_layers\n- 6\n",
    "text": b"num_layers",
    "number": b"20:00",
    "key twice": b"seed: 1\nnum_layers: 3\nseed: 2\n",
    "key twice inside": b"A: {seed: 1, 'seed': 2}\n",
    "bomb": BOMB.encode(),
    "merged bomb": BOMB.replace("[", "{<<: [").replace("]", "]}").replace("{<<: [lol, lol]}", "{lol: 1}").encode(),
    "itself": b"a: &a [*a]\n",
    "no anchor": b"a: *b\n",
    "deep": DEEP,
    "deep mapping": b"{a: " * 50_000,
    "digits": b"num_layers: " + DIGITS,
    "list as key": b"? [a]\n: 1\n",
    "mapping as key": b"? {a: 1}\n: 1\n",
    "Python": b"a: !!python/object/apply:os.mkdir [unpickled]\n",
    "unknown tag": b"a: !mine 3\n",
    "wrong tag": b"a: !!int abc\n",
    "wrong time": b"a: !!timestamp abc\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "tabs": b"a:\n\tb: 1\n",
    "long": b"# " + b"x" * 2_000_000 + b"\na: 1\n",
    "control": b"a: \x1b[31m\n",
}


@pytest.mark.parametrize("content", rows(YAML))
def test_bad_parameters_are_refused(home, refused, monkeypatch, content):
    monkeypatch.chdir(home)
    name = put(home / "mine.yaml", content)
    assert name in refused(read_yaml, name)


def yaml_bytes(**content):
    return yaml.safe_dump(content, sort_keys=False).encode()


EXPERIMENT = {"A": {"seed": 1}}
GRIDS = {name: YAML[name] for name in ("truncated", "list", "key twice", "bomb", "deep")} | {
    "no experiments": b"title: Mine\n",
    "other key": yaml_bytes(experiments=EXPERIMENT, swep={}),
    "case of a key": yaml_bytes(Experiments=EXPERIMENT),
    "parameter without an experiment": b"num_layers: 3\n",
    "sexagesimal": b"experiments: {A: {train_tokens: 20:00}}\n",
    "octal": b"experiments: {A: {train_tokens: 010}}\n",
    "date": b"experiments: {A: {train_tokens: 2026-11-28}}\n",
    "no date": b"experiments: {A: {train_tokens: 2026-99-99}}\n",
    "many runs": yaml_bytes(
        experiments=EXPERIMENT, sweep={name: [*range(1, 41)] for name in ("seed", "data_seed", "train_tokens")}
    ),
    "nan": b"experiments: {A: {phase2_learning_rate: .nan}}\n",
    "swept nan": b"experiments: {A: {}}\nsweep: {phase2_learning_rate: [.nan]}\n",
    "control in a label": yaml_bytes(experiments={"A\x1b[31m": {}}),
    "control in a key": yaml_bytes(experiments=EXPERIMENT, **{"\x1b[31m": 1}),
    "label as a path": yaml_bytes(experiments={"../../A": {}}),
    "path as a value": yaml_bytes(experiments={"A": {}}, sweep={"corpus": ["../../a.txt"]}),
    "layer that is missing": yaml_bytes(experiments={"A": "params/C.yaml"}),
    "layer of another home": yaml_bytes(experiments={"A": "~nobody-here/C.yaml"}),
    "layer with a null": yaml_bytes(experiments={"A": "params/A\0.yaml"}),
    "layer that is a folder": yaml_bytes(experiments={"A": "params"}),
    "layer that is a list": yaml_bytes(experiments={"A": [["params/A.yaml"]]}),
    "impossible together": yaml_bytes(experiments={"A": {"num_layers": 1024, "context_dim": 65_536}}),
}


@pytest.mark.parametrize("content", rows(GRIDS))
def test_a_bad_grid_is_refused(home, refused, monkeypatch, content):
    monkeypatch.chdir(home)
    name = put(home / "mine.yaml", content)
    assert name in refused(load_grid, name)
    if content not in (GRIDS["bomb"], GRIDS["deep"]):
        refused(batch.main, ["--check", name], command=True)


@pytest.mark.parametrize("name", ["a b", ".", ".hidden", "-x", "a;b", "a\x1b[31m", "quick", "study"])
def test_a_grid_whose_name_is_no_folders_is_refused(home, refused, name):
    grid = put(home / "grids" / f"{name}.yaml", yaml_bytes(experiments=EXPERIMENT))
    assert repr(grid)[1:-1][:-8] in refused(load_grid, grid)


# Models on disk


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose model is as it was initialised."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXLM_CACHE", str(folder / "cache"))
        given = {"corpus": str(short_paragraphs(folder / "text.txt")), "embedding": "random", "embed_dim": 4}
        given |= {
            "num_layers": 1,
            "context_dim": 4,
            "val_samples": 2,
            "development_samples": 2,
            "test_samples": 2,
            "train_tokens": 100,
        }
        e = Experiment.from_mapping(given)
        run = folder / "run"
        run.mkdir()
        save_file(own_weights(ContextLM(e, torch.from_numpy(load_embedding(e)))), run / "model.safetensors")
        (run / "metrics.json").write_text(json.dumps(e.model_dump()), encoding="utf-8")
        load_run(run)
        yield run


METRICS = {"truncated": b'{"seed": 1', "list": b"[]", "no run": b"{}", "deep": DEEP}
WEIGHTS = {"pickle": pickle.dumps(Harmful()), "other": GOOD, "short": GOOD[:20]}
MODEL_ROWS = [
    pytest.param(name, row.values[0], id=f"{name}-{row.id}")
    for name, bad in (("metrics.json", METRICS), ("model.safetensors", WEIGHTS))
    for row in rows(bad)
]


@pytest.mark.parametrize(("name", "content"), MODEL_ROWS)
def test_a_bad_file_of_a_model_is_refused(home, refused, trained, monkeypatch, name, content):
    monkeypatch.chdir(home)
    folder = Path(shutil.copytree(trained, home / "run"))
    put(folder / name, content)
    assert str(folder) in refused(load_run, folder)


# Traps


def test_what_is_pickled_in_a_cache_is_not_run(home, monkeypatch):
    monkeypatch.chdir(home)
    path = home / "cache" / "corpus.npz"
    np.savez(path, tokens=np.array([Harmful()], dtype=object), names=np.array(["tokens"]))
    assert cached_arrays(path, lambda: {"tokens": np.arange(3)})["tokens"].tolist() == [0, 1, 2]  # made anew
    assert not (home / "unpickled").exists()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_a_sentence_holds_no_control_character(text):
    message = str(ConfigError(f"corpus = {text}"))
    assert message.isprintable() and (message == f"corpus = {text}" or not text.isprintable())


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
        max_leaves=20,
    )
)
def test_yaml_without_its_traps_is_still_yaml(value):
    assert parse_yaml(yaml.safe_dump(value)) == value


@pytest.mark.parametrize("text", ["20:00", "1:30:00.5", "010", "2026-11-28", "0b11", "190:20:30"])
def test_what_does_not_look_like_a_number_is_none(text):
    assert parse_yaml(f"a: {text}") == {"a": text} != yaml.safe_load(f"a: {text}")


def test_a_few_aliases_are_fine():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\n") == {"a": [1, 2], "b": [[1, 2]] * 2}


def test_a_model_that_this_machine_has_no_room_for_is_refused(monkeypatch):
    for module in (device, embeddings):
        monkeypatch.setattr(module, "memory", lambda: 8 * 2**30)
    large = Experiment(num_layers=64, context_dim=8192, device="cpu")  # 4.3e9 weights
    message = sentence(device.resolve_device, large)
    assert "num_layers = 64" in message and "context_dim = 8192" in message
    assert device.resolve_device(Experiment(num_layers=6, context_dim=8192, device="cpu")).type == "cpu"
    assert "embed_dim = 65536" in sentence(load_embedding, Experiment(embedding="random", embed_dim=65_536))
