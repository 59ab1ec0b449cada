"""Fixtures shared by the tests: tiny models, streams and their literal twins."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported: one thread sums in one order, so equal inputs give equal bits; and tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import pytest
import torch
from hypothesis import settings

from ctxlm.config import ConfigError, Experiment
from ctxlm.files import ROOT
from ctxlm.model import ContextLM
from ctxlm.phase2 import Phase2
from ctxlm.trainer import Trained, Trainer

matplotlib.use("Agg")

# The same examples each time, so that a failure is a change's; `--hypothesis-profile new` draws others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None)
settings.load_profile("fixed")


SMALL = {
    "embedding": "random", "embed_dim": 16, "context_dim": 16, "num_layers": 2, "train_tokens": 600, "val_samples": 2,
    "development_samples": 2, "test_samples": 2, "phase2_epochs": 2, "phase2_batch_size": 128,
}  # fmt: skip
"""A run of the context model that takes seconds, on `short_paragraphs`."""


def tiny(vocabulary: int = 60, **parameters) -> ContextLM:
    """A model of a few hundred weights; the embedding has GPT-2's spread."""
    defaults = {"num_layers": 3, "context_dim": 12, "embed_dim": 8, "train_tokens": 100}
    settings = Experiment.from_mapping(defaults, parameters)
    embedding = 0.14 * torch.randn(vocabulary, settings.embed_dim, generator=torch.Generator().manual_seed(1))
    return ContextLM(settings, embedding)


def stream(length: int, vocabulary: int = 60, seed: int = 0) -> torch.Tensor:
    """Random tokens, int64 [length]."""
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def train_token_block(model, train, val, e: Experiment, dtype=torch.float32) -> Trained:
    """Phase 2, of contexts that are there."""
    return Trainer(Phase2(model, train, val, e, dtype), e).run()


def short_paragraphs(path: Path, count: int = 60, length: int = 40, power: int = 1) -> Path:
    """A text file of so many paragraphs of so many words."""
    words = "the a cat dog saw ran to from with red blue big small house tree and then it was".split()
    paragraphs = (" ".join(words[i * j**power % 19] for j in range(1, length + 1)) for i in range(1, count + 1))
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def refusal(call, *arguments, **keywords) -> str:
    """The sentence of the ConfigError that the call must raise."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message == message.strip() and "\n" not in message
    return message


def run_cells(notebook: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Run a notebook's cells in this process, as papermill would in a kernel's; returns its names."""
    names: dict[str, Any] = {"In": []}
    for cell in json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            names["In"].append("".join(cell["source"]))
            exec(compile(names["In"][-1], f"{notebook}:{cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
            names["In"].append(f"# Parameters\n{given}")
            names |= parameters
    return names


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen]:
    """A lock as another process has it."""
    script = "import sys; from pathlib import Path; from ctxlm.files import take; print(take(Path(sys.argv[1])))"
    command = [sys.executable, "-u", "-c", f"{script}; sys.stdin.read()", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        yield other
        other.kill()


def rewrite(path: Path, **metrics) -> None:
    """Change a metrics.json as if the run had been written so."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | metrics), encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def one_commit():
    """Runs are of one commit, without asking git, which takes long where notebooks differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxlm.run.git_commit", lambda: "0" * 40)
        yield


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of the test's own; returns its folder."""
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus of 60 short paragraphs."""
    return short_paragraphs(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture
def without_text(monkeypatch):
    """No corpus is read for a run's provenance."""
    monkeypatch.setattr("ctxlm.run.data_hash", lambda *_: "0" * 16)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Where runs are written and read, with no committed results beside them."""
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "committed"))
    return tmp_path / "outputs"


@pytest.fixture(scope="module")
def browser():
    from tests.browser import chromium  # not needed on a machine that has only a GPU's tests to run

    with chromium() as opened:
        yield opened


def pytest_xdist_auto_num_workers():
    """As many as `make report` has cores (psutil would count the whole machine's); more than eight find no work."""
    from snakemake.utils import available_cpu_count  # not needed on a machine that has only a GPU's tests to run

    return min(8, available_cpu_count())


def pytest_collection_modifyitems(config, items):
    """Fast tests first; side by side, files that take long first, so that none is waited for at the end.

    These are JupyterLab's, which waits more than it works, and then those of the most slow tests.
    """
    slow = {item: item.get_closest_marker("slow") is not None for item in items}
    items.sort(key=slow.get)
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items if slow[item])
        items.sort(key=lambda item: (item.path.name != "test_lab.py", -counts[item.path]))


@pytest.fixture
def judged(monkeypatch):
    """Plants runs whose losses are known by sample, as `loss_sums` then gives them."""

    from tests.planted import Planted  # statsmodels takes seconds, which other tests need not wait for

    def plant(*arguments, **options):
        planted = Planted(*arguments, **options)
        monkeypatch.setattr("ctxlm.analysis.runs.loss_sums", planted.loss_sums)
        return planted

    return plant
