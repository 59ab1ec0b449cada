"""Files replaced whole or not at all, caches of several processes, and digests that tell apart what differs."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlm import files
from ctxlm.config import code_hash
from ctxlm.files import ROOT, atomic, cache_dir, cached_arrays, digest, find, resolve


def full(*_, **__):
    """Stands for writing to a full disk."""
    raise OSError(28, "No space left on device")


def test_the_old_file_stands_until_the_block_ends_and_the_new_one_has_its_rights(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.json"
    with atomic(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with atomic(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"  # np.savez appends what is lacking
        temporary.write_text("new")
        temporary.chmod(0o600)  # as safetensors does
        assert path.read_text() == "old"
    (tmp_path / "other").touch()
    assert path.read_text() == "new" and [*path.parent.iterdir()] == [path]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_failing_block_or_replacement_leaves_what_was(tmp_path, monkeypatch):
    for before in ([], ["old"]):
        for content in before:
            (tmp_path / "history.csv").write_text(content)
        with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "history.csv") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(OSError), atomic(tmp_path / "history.csv") as temporary:
            temporary.write_text("half")
            patch.setattr(files.os, "replace", full)
        assert [file.read_text() for file in tmp_path.iterdir()] == before


def test_paths_are_taken_from_the_repository_and_input_also_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").touch()
    assert resolve("params/base.yaml") == find("params/base.yaml") == ROOT / "params" / "base.yaml"
    assert resolve("mine.txt") == ROOT / "mine.txt" and find("mine.txt") == tmp_path / "mine.txt"
    assert resolve("~/mine.txt") == resolve(os.path.expanduser("~/mine.txt"))
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" and cache_dir().is_dir()


# Caches


def test_arrays_are_built_once_and_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no")

    path = tmp_path / "a.npz"
    with pytest.raises(RuntimeError):
        cached_arrays(path, fail)
    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left on device"):  # what cannot be kept is not lost
        assert cached_arrays(path, lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert not [*tmp_path.glob("*.npz")]
    monkeypatch.undo()
    cached_arrays(path, lambda: {"x": np.arange(4), "of no use": np.ones((2, 0))})
    monkeypatch.setattr(files, "FileLock", fail)  # none is taken to read, which one may where one may not write
    assert {name: array.shape for name, array in cached_arrays(path, fail).items()} == {"x": (4,), "of no use": (2, 0)}


BUILD = """
import sys, time, numpy as np
from pathlib import Path
from ctxlm.files import cached_arrays
def build():
    print("builds")
    time.sleep(1)
    return {"x": np.array(["built"])}
print(cached_arrays(Path(sys.argv[1]), build)["x"][0])
"""


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    command = [sys.executable, "-c", BUILD, str(tmp_path / "a.npz")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0] for process in processes) == ["builds\nbuilt\n", "built\n", "built\n"]


# Digests

parts = st.lists(st.binary(max_size=4), max_size=4)


@given(one=parts, other=parts)
def test_digests_are_equal_only_for_equal_parts(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)
    assert len(digest(*one)) == 16 and int(digest(*one), 16) >= 0


# What a run's code is: a copy of the sources is changed, and its digests are looked at again

EVERY, TRAINED = {"context", "lstm", "kneser-ney"}, {"context", "lstm"}  # other networks share an LSTM's
BELONGS = {
    "corpus device metrics": EVERY,
    "embeddings loss model trainer": TRAINED,
    "phase1 phase2 memory recurrence": {"context"},
    "networks": {"lstm"},
    "ngrams": {"kneser-ney"},
    "__init__ batch config files generate progress run search": set(),
}
BELONGS = {module: models for modules, models in BELONGS.items() for module in modules.split()}
"""The models whose numbers each module makes."""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources, which is hashed in place of the repository; what has not changed is read once."""
    for folder in ("ctxlm", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    bare = files._bare.__wrapped__
    read = cache(lambda path, _content: bare(path))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "_bare", lambda path: read(path, path.read_bytes()))
    return tmp_path


@pytest.fixture
def altered(sources):
    """The models whose digest is no longer that of the repository's code."""
    before = {model: code_hash(model) for model in EVERY}
    assert len({*before.values()}) == 3 and code_hash("mingru") == code_hash("transformer") == before["lstm"]
    return lambda: {model for model, digest in before.items() if code_hash(model) != digest}


def test_comments_docstrings_and_layout_change_no_digest(sources, altered):
    changed = 0
    for path in sorted((sources / "ctxlm").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        explained = re.sub(r'^( *)"""(?=\S)', r'\1"""Now: ', source, flags=re.M)
        changed += explained != source
        path.write_text(f"# other words\n\n\n{explained}\n\n# and at the end\n", encoding="utf-8")
    assert changed > 15 and altered() == set()


def test_a_digest_is_the_same_by_every_python(sources):
    # before 3.12 quotes within an f-string were others
    code = 'a = {"b": f"{dict(c=1)[\'c\']} \\n"}\nprint("it\'s")\n'
    (sources / "ctxlm" / "alone.py").write_text(code, encoding="utf-8")
    assert files.source_hash("ctxlm/alone.py") == "73caa04d3e330d1c"


def test_code_counts_for_the_models_whose_numbers_it_makes(sources, altered):
    for path in (sources / "ctxlm").glob("analysis/*.py"):
        path.write_text("ADDED = 1\n", encoding="utf-8")
    assert altered() == set()
    for path in (sources / "ctxlm").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        path.write_text(f"{source}\nADDED = 1\n", encoding="utf-8")
        assert altered() == BELONGS[path.stem], path.name
        path.write_text(source, encoding="utf-8")


NOTEBOOKS = {"02_experiment": {"context"}, "03_baseline": {"lstm", "kneser-ney"}, "01_corpus": set()}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_code_of_a_models_notebook_counts(sources, altered, notebook):
    path = sources / "notebooks" / f"{notebook}.ipynb"
    written = json.loads(path.read_text(encoding="utf-8"))
    for cell in written["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [{"output_type": "stream", "name": "stdout", "text": "run"}], 7
        else:
            cell["source"] = ["other words"]
    path.write_text(json.dumps(written), encoding="utf-8")
    assert altered() == set()
    (parameters,) = (c for c in written["cells"] if "parameters" in c["metadata"].get("tags", []))
    parameters["source"] = ["num_layers = 9"]  # which are compared by value
    path.write_text(json.dumps(written), encoding="utf-8")
    assert altered() == set()
    written["cells"].append({"cell_type": "code", "source": ["ADDED = 1"], "metadata": {}, "outputs": []})
    path.write_text(json.dumps(written), encoding="utf-8")
    assert altered() == NOTEBOOKS[notebook]
