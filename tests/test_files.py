"""Files replaced whole or not at all, and digests that tell apart what differs."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlm import files
from ctxlm.config import code_hash
from ctxlm.files import ROOT, atomic, cache_dir, cached_arrays, clear_temporaries, digest, resolve, source_hash


def child(script: str, path) -> subprocess.Popen:
    """A Python process that runs `script` with `path` as its argument, its output readable as text."""
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_old_file_stands_until_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.json"
    with atomic(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with atomic(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"  # np.savez appends what is lacking
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failing_block_or_replacement_leaves_what_was(tmp_path, monkeypatch, before, error):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "history.csv"
    if before:
        path.write_text(before)
    if error is OSError:
        monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        if error is not OSError:
            raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


STALL = """
import signal, sys
from pathlib import Path
from ctxlm.files import atomic
with atomic(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("half written", flush=True)
    signal.pause()
"""


def test_a_killed_writer_leaves_the_old_file_and_a_dot_file(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    process = child(STALL, path)
    assert process.stdout.readline() == "half written\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".") and left.read_text() == "half"
    clear_temporaries(tmp_path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_new_file_has_the_rights_of_any_other(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    with atomic(path) as temporary:
        temporary.write_text("a")
    other.write_text("b")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


parts = st.lists(st.binary(max_size=4), max_size=4)


@given(one=parts, other=parts)
def test_digests_are_equal_only_for_equal_parts(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)


@given(text=st.text(), cut=st.integers(0, 20))
def test_a_digest_sees_where_one_part_ends(text, cut):
    assert digest(text[:cut], text[cut:]) != digest(text)
    assert digest(text) == digest(text.encode())
    assert len(digest(text)) == 16 and int(digest(text), 16) >= 0


def hashed(*names):
    """`source_hash` of the files as they are now."""
    files._syntax.cache_clear()
    return source_hash(*names)


def test_the_source_hash_sees_content_and_name_and_not_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    (tmp_path / "one.py").write_text("a = 1\n")
    (tmp_path / "two.py").write_text("b = 2\n")
    before = hashed("one.py", "two.py")
    assert hashed("two.py", "one.py") == before
    (tmp_path / "two.py").write_text("b = 3\n")
    changed = hashed("one.py", "two.py")
    assert changed != before
    (tmp_path / "two.py").rename(tmp_path / "three.py")
    assert hashed("one.py", "three.py") not in (before, changed)
    with pytest.raises(FileNotFoundError):
        hashed("two.py")
    (tmp_path / "one.py").write_text("a: int = 1\n")
    assert hashed("one.py") != hashed("three.py")


def test_paths_are_taken_from_the_repository_wherever_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("params/base.yaml") == ROOT / "params" / "base.yaml"
    assert (ROOT / "ctxlm" / "files.py").samefile(files.__file__)
    assert resolve(tmp_path / "mine.txt") == tmp_path / "mine.txt"
    assert resolve("~/mine.txt") == resolve(os.path.expanduser("~/mine.txt"))


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" and cache_dir().is_dir()
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.delenv("CTXLM_CACHE")
    assert cache_dir() == tmp_path / "data" / "cache" and cache_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="CTXLM_CACHE = "):
        cache_dir()


# What a run's code is: a copy of the sources is changed, and its digests are looked at again

MODELS = ("context", "lstm", "transformer", "kneser-ney")
MODULES = sorted(path.stem for path in (ROOT / "ctxlm").glob("*.py"))
NETWORKS = {"lstm", "transformer"}
EVERY = set(MODELS)
BELONGS = {
    "corpus": EVERY,
    "device": EVERY,
    "metrics": EVERY,
    "progress": set(),
    "embeddings": EVERY - {"kneser-ney"},
    "loss": EVERY - {"kneser-ney"},
    "model": EVERY - {"kneser-ney"},
    "phase2": {"context"},
    "recurrence": EVERY - {"kneser-ney"},
    "trainer": EVERY - {"kneser-ney"},
    "phase1": {"context"},
    "memory": {"context"},
    "networks": NETWORKS,
    "ngrams": {"kneser-ney"},
    "config": set(),
    "files": set(),
    "results": set(),
    "search": set(),
    "batch": set(),
    "checkpoints": set(),
    "generate": set(),
    "__init__": set(),
}
"""The models whose numbers each module makes."""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources, which is hashed in place of the repository."""
    for folder in ("ctxlm", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    yield tmp_path
    files._syntax.cache_clear()


def code_hashes():
    files._syntax.cache_clear()
    return {model: code_hash(model) for model in MODELS}


def test_a_copy_of_the_sources_has_their_digests(sources, monkeypatch):
    copied = code_hashes()
    monkeypatch.setattr(files, "ROOT", ROOT)
    assert code_hashes() == copied and len(set(copied.values())) == 3
    assert copied["lstm"] == copied["transformer"]


def test_comments_docstrings_and_layout_change_no_digest(sources):
    before = code_hashes()
    for path in sorted((sources / "ctxlm").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").split("\n")
        path.write_text("# other words\n\n\n" + "\n".join(lines) + "\n\n# and at the end\n", encoding="utf-8")
    assert code_hashes() == before
    changed = 0
    for path in sorted((sources / "ctxlm").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        explained = re.sub(r'^( *)"""(?=\S)', r'\1"""Now: ', source, flags=re.M)
        changed += explained != source
        path.write_text(explained, encoding="utf-8")
    assert changed > 15 and code_hashes() == before


@pytest.mark.parametrize("module", MODULES)
def test_code_counts_for_the_models_whose_numbers_it_makes(sources, module):
    before, path = code_hashes(), sources / "ctxlm" / f"{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    after = code_hashes()
    assert {model for model in MODELS if after[model] != before[model]} == BELONGS[module]


def test_a_changed_number_counts_and_the_analysis_does_not(sources):
    before, path = code_hashes(), sources / "ctxlm" / "model.py"
    for analysis in sorted((sources / "ctxlm" / "analysis").glob("*.py")):
        analysis.write_text(analysis.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    assert code_hashes() == before
    source = path.read_text(encoding="utf-8")
    assert source.count("RARE = 1e-3\n") == 1
    path.write_text(source.replace("RARE = 1e-3\n", "RARE = 2e-3\n"), encoding="utf-8")
    after = code_hashes()
    assert {model for model in MODELS if after[model] != before[model]} == EVERY - {"kneser-ney"}


@pytest.mark.parametrize(
    ("notebook", "models"), [("02_experiment", {"context"}), ("03_baseline", EVERY - {"context"}), ("01_corpus", set())]
)
def test_a_models_notebook_counts(sources, notebook, models):
    before, path = code_hashes(), sources / "notebooks" / f"{notebook}.ipynb"
    written = json.loads(path.read_text(encoding="utf-8"))
    for cell in written["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [{"output_type": "stream", "name": "stdout", "text": "run"}], 7
        else:
            cell["source"] = ["other words"]
    path.write_text(json.dumps(written), encoding="utf-8")
    assert code_hashes() == before
    written["cells"].append({"cell_type": "code", "source": ["ADDED = 1"], "metadata": {}, "outputs": []})
    path.write_text(json.dumps(written), encoding="utf-8")
    after = code_hashes()
    assert {model for model in MODELS if after[model] != before[model]} == models


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_arrays(tmp_path / "folder" / "a.npz", fail)
    assert not any((tmp_path / "folder").iterdir())


def test_what_cannot_be_kept_is_not_lost(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert cached_arrays(tmp_path / "a.npz", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert not any(tmp_path.iterdir())


def test_a_flipped_bit_never_gives_other_arrays(tmp_path):
    path, made = tmp_path / "a.npz", {"x": np.arange(40.0).reshape(20, 2), "y": np.arange(5)}
    cached_arrays(path, lambda: made)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        for bit in (0, 4):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            arrays = cached_arrays(path, lambda: made)
            assert all(np.array_equal(arrays[name], made[name]) for name in made), (position, bit)


def test_one_process_builds_and_the_others_wait(tmp_path):
    script = (
        "import sys, time, numpy as np; from pathlib import Path; from ctxlm.files import cached_arrays\n"
        "def build():\n    print('built'); time.sleep(1); return {'x': np.ones(1)}\n"
        "cached_arrays(Path(sys.argv[1]), build)"
    )
    path = tmp_path / "a.npz"
    processes = [child(script, path) for _ in range(3)]
    printed = [process.communicate()[0] for process in processes]
    assert sum("built" in text for text in printed) == 1 and all(process.returncode == 0 for process in processes)
