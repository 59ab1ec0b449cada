"""Planted runs: in memory as `read_runs` gives them, every share of chance known; and on disk, as runs lie there."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctxlm.config import Experiment
from ctxlm.corpus import PROTOCOL

SIZES = (10_000, 14_000, 20_000, 28_000, 40_000)
MIDDLE = float(np.log(SIZES).mean())
LAWS = {"A": (-0.30, 6.3), "B": (-0.36, 6.32)}
"""Label → α, and the loss at `MIDDLE`: B is better from MEETS tokens up."""
MEETS = math.exp(MIDDLE + 0.02 / 0.06)
SPREAD = {"text", "own", "tilt", "hard", "liked", "noise"}


class Planted:
    """Runs and their losses by sample, nats.

    Attributes:
        runs: as `read_runs` gives them.
        sums: of every run, [runs, samples].
        tokens: of the samples.
    """

    def __init__(
        self,
        laws: Mapping[str, tuple[float, float]] = LAWS,
        sizes: Sequence[int] = SIZES,
        replicates: int = 4,
        tokens: Sequence[int] = (100,) * 40,
        seed: int | np.random.Generator = 0,
        **spread: float,
    ):
        """Draw runs.

        Args:
            laws: label → α, and the loss at `MIDDLE`.
            spread: standard deviations, nats: `text`, of what a replicate does to all of its runs; `own` and `tilt`, to
                level and slope of one configuration; `hard`, of what a sample does to all runs; `liked`, to those of
                one configuration; `noise`, of one run on one sample. Those of samples are of a mean over them.
        """
        assert spread.keys() <= SPREAD  # a misspelt one would be none
        rng, k = np.random.default_rng(seed), math.sqrt(len(tokens))
        self.tokens = np.asarray(tokens, float)

        def draw(name: str, *shape: int) -> np.ndarray:
            return spread.get(name, 0.0) * rng.standard_normal(shape)

        text, hard = draw("text", replicates), k * draw("hard", len(tokens))
        rows, sums = [], []
        for label, (alpha, level) in laws.items():
            group, tilt = draw("own", replicates), draw("tilt", replicates)
            liked = k * draw("liked", len(tokens))
            for r in range(replicates):
                for size in sizes:
                    x = math.log(size) - MIDDLE
                    loss = level + alpha * x + text[r] + group[r] + tilt[r] * x
                    sums.append((loss + hard + liked + k * draw("noise", len(tokens))) * self.tokens)
                    rows.append({"experiment": label, "train_tokens": size, "seed": 42 + r, "data_seed": 7 * r})
        self.sums, runs = np.array(sums), pd.DataFrame(rows)
        runs["run"] = [f"{row.experiment}_train_tokens-{row.train_tokens}_seed-{row.seed}" for row in runs.itertuples()]
        runs = runs.assign(grid="planted", id="planted/" + runs["run"], configuration=runs["experiment"])
        runs = runs.assign(embedding_seed=runs["seed"] - 41, replicate=runs["seed"] - 42)
        runs["log_ppl"] = self.sums.sum(1) / self.tokens.sum()
        runs["val_loss"] = runs["log_ppl"] + 0.01
        runs["log_tokens"], runs["log2_tokens"] = np.log(runs["train_tokens"]), np.log2(runs["train_tokens"])
        self.runs = runs.assign(test_tokens=self.tokens.sum() + 1, val_tokens=self.tokens.sum() + 1)

    def loss_sums(self, runs: pd.DataFrame, part: str = "test") -> tuple[np.ndarray, np.ndarray] | None:
        """In place of `runs.loss_sums`: on the test text alone."""
        if part != "test":
            return None
        return self.sums[pd.Index(self.runs["id"]).get_indexer(runs["id"])], self.tokens


def inside(crossover: Any, log_tokens: Any) -> np.ndarray:
    """Whether a crossover's set, as `scaling.fieller` gives it, holds log tokens: a number, or an array of them."""
    low = -math.inf if crossover.low is None else math.log(crossover.low)
    high = math.inf if crossover.high is None else math.log(crossover.high)
    between = np.logical_and(log_tokens >= low, log_tokens <= high)
    kinds = {"bounded": between, "outside": ~between, "unbounded": np.ones_like(between)}
    return kinds.get(crossover.kind, np.zeros_like(between))


def write(
    root: Path,
    grid: str,
    label: str = "A",
    losses: Mapping[str, Any] | None = None,
    suffix: str = "",
    without: Sequence[str] = (),
    **metrics: Any,
) -> Path:
    """Write a finished run on disk, named by its label, size and seed; returns its folder.

    Args:
        root: of outputs, or of committed results.
        losses: part → mean losses of its samples of 50 tokens, nats, or one for all; by default 6 on validation and 5
            on the test text.
        suffix: of the run's name.
        without: what metrics.json lacks, as an older run's.
        metrics: of metrics.json.
    """
    given = {"experiment": label, "train_tokens": 20_000, "val_samples": 4, "test_samples": 5, "dtype": "float32"}
    usual = Experiment.from_mapping(given, {"device": "cpu"}).model_dump()
    usual |= {"protocol": PROTOCOL, "git_commit": "0" * 40, "data_hash": "0" * 16, "best_epoch": 3, "epochs_run": 5}
    usual["overfit_rate"] = 0.05
    asked = usual | metrics
    folder = root / grid / f"{label}_train_tokens-{asked['train_tokens']}_seed-{asked['seed']}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for part, loss in ({"val": 6.0, "development": 5.5, "test": 5.0} | dict(losses or {})).items():
        means = np.broadcast_to(loss, asked[f"{part}_samples"])
        mean = float(means.mean())
        usual |= {f"{part}_tokens": 50 * len(means) + 1, f"{part}_loss": mean, f"{part}_ppl": math.exp(mean)}
        tables[part] = pd.DataFrame({"sample": range(len(means)), "loss_sum": 50 * means, "tokens": 50, "bytes": 200})
    samples = pd.concat(tables, names=["part"]).reset_index(level=0)
    samples.to_csv(folder / "samples.csv", index=False)
    written = {name: value for name, value in (usual | metrics).items() if name not in without}
    history = pd.DataFrame([("phase2", 1, "val_loss", (usual | metrics)["val_loss"])])
    history.to_csv(folder / "history.csv", index=False, header=["phase", "step", "metric", "value"])
    (folder / "metrics.json").write_text(json.dumps(written), encoding="utf-8")
    return folder
