"""What the runs of 28 November 2026 gave, before the code was halved: the same parameters still give the same losses.

By `ctxlm.run.run`, in float32 at a width of 64, on a random embedding. `python -m tests.test_numbers` writes
`tests/data/losses.json` anew, which is a decision to be explained in LOG.md.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from ctxlm.config import NOTEBOOKS, Experiment, read_yaml
from ctxlm.files import ROOT
from ctxlm.run import run

KEPT = ROOT / "tests" / "data" / "losses.json"
COMMON = {
    "corpus": "chitchat", "embedding": "random", "embedding_seed": 3, "embed_dim": 64, "train_tokens": 4000,
    "data_seed": 7, "val_samples": 12, "development_samples": 5, "test_samples": 5, "max_sample_tokens": 128,
    "seed": 42, "device": "cpu", "dtype": "float32", "phase2_epochs": 2,
}  # fmt: skip
A, B = {"num_layers": 6, "context_dim": 64}, {"num_layers": 3, "context_dim": 128}
STUDY = {"output_bias": "none", "phase2_init_std": 0.1, "logit_scale": 1.0}
STABILISED = {"output_bias": "unigram", "phase2_init_std": 0.01, "logit_scale": 0.7}
NETWORK = {"output_bias": "unigram", "phase2_learning_rate": 0.001, "hidden_dim": 64}
RUNS = {
    "A": A | STUDY,
    "stabilised-A": A | STABILISED,
    "window-B": B | STABILISED | {"phase2_context_window": 4, "phase1_max_iterations": 1, "phase1_min_iterations": 1},
    "LSTM": NETWORK | {"model": "lstm", "num_layers": 1, "window": 32},
    "Transformer": NETWORK | {"model": "transformer", "num_layers": 2, "num_heads": 4, "window": 64},
    "KN-4": {"model": "kneser-ney", "ngram_order": 4},
}

ROUNDING = {"window-B": 5e-5}
"""Where processors that sum in another order differ by more than 5e-6; on one machine all paths give the same bits."""


def losses(label: str, folder: Path) -> dict[str, float]:
    """Every loss of a run by what it is, as written into `folder`."""
    notebook = Path(NOTEBOOKS[RUNS[label].get("model", "context")]).stem  # whose defaults they had
    metrics = run(Experiment.from_mapping(read_yaml(f"params/notebooks/{notebook}.yaml"), COMMON, RUNS[label]), folder)
    history = pd.read_csv(folder / "history.csv")
    rows = history[history["metric"].str.endswith("loss")]
    measured = {f"{row.phase} {row.step} {row.metric}": row.value for row in rows.itertuples()}
    return measured | {name: metrics[name] for name in ("val_loss", "development_loss", "test_loss")}


@pytest.mark.slow
@pytest.mark.parametrize("label", RUNS)
def test_losses_are_those_from_before(label, outputs):
    before = json.loads(KEPT.read_text(encoding="utf-8"))[label]
    assert losses(label, outputs / label) == pytest.approx(before, rel=ROUNDING.get(label, 1e-5))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = ROOT / "outputs" / "numbers"
    known = {label: losses(label, folder / label) for label in RUNS}
    KEPT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
