"""Fixtures shared by the tests: tiny models, streams and their literal twins."""

import os

# Before torch is imported: tests' products are tiny, and side by side on all cores threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from snakemake.utils import available_cpu_count

from ctxlm.config import Experiment
from ctxlm.model import ContextLM

matplotlib.use("Agg")


def tiny(vocabulary: int = 60, **parameters) -> ContextLM:
    """A model of a few hundred weights; the embedding has GPT-2's spread."""
    defaults = {"num_layers": 3, "context_dim": 12, "embed_dim": 8, "train_tokens": 100}
    settings = Experiment.from_mapping(defaults, parameters)
    embedding = 0.14 * torch.randn(vocabulary, settings.embed_dim, generator=torch.Generator().manual_seed(1))
    return ContextLM(settings, embedding)


def stream(length: int, vocabulary: int = 60, seed: int = 0) -> torch.Tensor:
    """Random tokens, int64 [length]."""
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def one_thread():
    """Products of one thread are summed in one order, so equal inputs give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Where runs are written and read, with no committed results beside them."""
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("CTXLM_RESULTS", str(tmp_path / "committed"))
    yield tmp_path / "outputs"
    plt.close("all")


def pytest_xdist_auto_num_workers():
    """As many as `make report` has cores (psutil would count the whole machine's); more than eight find no work."""
    return min(8, available_cpu_count())


def pytest_collection_modifyitems(items):
    """Fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
