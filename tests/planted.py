"""A planted grid: run folders as a real grid leaves them, whose laws, differences and curves are known exactly."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctxlm.analysis.scaling import Grid, read_grid
from ctxlm.corpus import PROTOCOL

SHAPES = {"A": (6, 128), "B": (3, 256), "C": (4, 192)}
"""Layers and context width of the planted configurations."""
SIZES = (20_000, 30_000, 45_000, 67_500)
NESTED = [(42 + k, k // 2) for k in range(10)]
"""Five windows of training text, each with two seeds of its own."""


def noise(sd: float, seed: int = 0) -> Callable[..., float]:
    """Independent errors of runs, for `chance`."""
    rng = np.random.default_rng(seed)
    return lambda *_: sd * rng.standard_normal()


def effects_of(rng: np.random.Generator, sd_seed: float, sd_window: float) -> Callable[..., float]:
    """Effects that last across sizes: of a seed on a configuration, and of a window on both."""
    drawn = {}

    def chance(label, size, seed, window):
        for key, sd in (((label, "s", seed), sd_seed), (("w", window), sd_window)):
            drawn.setdefault(key, sd * rng.standard_normal())
        return drawn[label, "s", seed] + drawn["w", window] + 0.002 * rng.standard_normal()

    return chance


def plant(
    root: Path,
    laws: Mapping[str, tuple[float, float]],
    sizes: Sequence[int] | Mapping[str, Sequence[int]] = SIZES,
    grid: str = "planted",
    seeds: Sequence[int] = (42,),
    pairs: Sequence[tuple[int, int]] | None = None,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    samples: int = 20,
    spread: float = 0.005,
    test_gaps: Mapping[str, float] | None = None,
    corpus: str = "chitchat",
    chance: Callable[[str, int, int, int], float] = lambda *_: 0.0,
    **metrics,
) -> Path:
    """Write metrics.json, history.csv and val_by_sample.csv of every run; returns the grid's folder.

    Args:
        laws: label → (alpha, PPL at 20,000 tokens); the runs' validation losses lie on them exactly.
        sizes: training tokens of all labels, or of each.
        pairs: (seed, data_seed) of the runs of a size, instead of `seeds` on one text.
        chance: nats added to the loss of a run, by label, size, seed and data_seed.
        test_gaps: label → nats by which its test loss, of every sample, lies above 5; None: none is kept by sample.
        spread: standard deviation, between samples, of what one run adds to a sample's mean loss.
        metrics: columns of metrics.json to override in every run.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, 1500, samples)
    common = 0.3 * rng.standard_normal(samples)  # some conversations are harder, for every run
    for label, (alpha, ppl) in laws.items():
        for size in sizes[label] if isinstance(sizes, Mapping) else sizes:
            for seed, window in pairs or [(seed, 0) for seed in seeds]:
                loss = math.log(ppl) + alpha * math.log(size / 20_000) + chance(label, size, seed, window)
                by_sample = common + spread * rng.standard_normal(samples)
                by_sample += loss - np.average(by_sample, weights=tokens)
                table = pd.DataFrame(
                    {"sample": range(7, 7 + samples), "loss_sum": by_sample * tokens, "tokens": tokens}
                )
                name = f"{label}_train_tokens-{size}_seed-{seed}" + (f"_data_seed-{window}" if window else "")
                folder = root / grid / name
                folder.mkdir(parents=True, exist_ok=True)
                table.to_csv(folder / "val_by_sample.csv", index=False)
                if test_gaps:
                    tested = pd.DataFrame({"sample": range(90, 140), "loss_sum": 100 * (5 + test_gaps[label])})
                    tested.assign(tokens=100).to_csv(folder / "test_by_sample.csv", index=False)
                run = _metrics(label, *shapes[label], size, seed, loss, int(tokens.sum()) + 1)
                run |= {"corpus": corpus, "data_seed": window} | metrics
                history = _history(run, loss)
                history.to_csv(folder / "history.csv", index=False)
                (folder / "metrics.json").write_text(json.dumps(run))
    return root / grid


def _metrics(label: str, layers: int, width: int, size: int, seed: int, loss: float, val_tokens: int) -> dict:
    rate = 2000 * width / 128 / size  # smaller data and wider contexts over-fit more
    return {
        "experiment": label,
        "protocol": PROTOCOL,
        "corpus": "chitchat",
        "embedding": "ppmi",
        "train_tokens": size,
        "num_layers": layers,
        "context_dim": width,
        "embed_dim": 128,
        "phase1_min_converged_ratio": 0.95,
        "phase1_convergence_threshold": 0.03,
        "phase2_learning_rate": 0.002,
        "phase2_batch_size": 512,
        "phase2_patience": 2,
        "context_block_params": 4000 * width,
        "token_block_params_trained": 3000 * width,
        "trained_params": 5000,
        "horizon_init": 36 / layers + size / 2e4,
        "horizon": 30 / layers + size / 2e4,
        "seed": seed,
        "data_seed": 0,
        "val_tokens": val_tokens,
        "train_er_pct": 90 - 1.5 * layers - size / 100_000,
        "train_er_noiseless_pct": 88 - 1.5 * layers,
        "val_er_pct": 87 - 1.5 * layers,
        "init_er_pct": 70 + 2.5 * layers,
        "phase1_iterations": 5 + layers // 3,
        "phase1_converged_tokens": round(0.979 * size),
        "phase1_converged_ratio": 0.979,
        "best_epoch": 3,
        "epochs_run": 5,
        "val_loss": loss,
        "val_ppl": math.exp(loss),
        "val_accuracy": 0.15,
        "last_val_ppl": math.exp(loss) * (1 + rate),
        "overfit_rate": rate,
        "test_tokens": 5001,
        "test_loss": loss + 0.01,
        "test_ppl": math.exp(loss + 0.01),
        "test_accuracy": 0.149,
        "phase1_seconds": size * width / 5e5,
        "phase2_seconds": size * layers / 4e3,
        "total_seconds": size * width / 5e5 + size * layers / 4e3 + 5,
        "git_commit": "0" * 40,
        "code_hash": "0" * 16,
        "device": "cpu",
        "dtype": "float32",
    }


def _history(run: dict, loss: float) -> pd.DataFrame:
    rows = []
    for k in range(1, run["phase1_iterations"] + 1):
        values = {"converged_ratio": 0.979 / (1 + math.exp(8 - 2 * k)), "seconds": 1.0}
        if k > 1:
            values |= {"mse": 0.5 * math.exp(-0.7 * k), "fixed_point_loss": 0.5 * math.exp(-0.7 * k)}
            values |= {"diversity_loss": -0.14 - 0.002 * k}
        rows += [("phase1", k, metric, value) for metric, value in values.items()]
    rise = math.log(1 + run["overfit_rate"]) / 2
    for epoch in range(1, run["epochs_run"] + 1):
        val = loss + (rise * (epoch - 3) if epoch > 3 else 0.15 * (3 - epoch) ** 2)
        train = loss + 1.2 - 0.75 * epoch - 2 * run["overfit_rate"]
        for part, value in (("train", train), ("val", val)):
            rows += [("phase2", epoch, f"{part}_loss", value), ("phase2", epoch, f"{part}_ppl", math.exp(value))]
            rows += [("phase2", epoch, f"{part}_accuracy", 0.15)]
        rows += [("phase2", epoch, "seconds", 2.0), ("phase2", epoch, "train_loss_after", train - 0.4)]
        rows += [("phase2", epoch, "train_ppl_after", math.exp(train - 0.4))]
    for name in ("horizon_init", "horizon"):
        phase = name.replace("horizon", "forgetting")
        rows += [(phase, k, "share_left", 0.01 ** (k / run[name])) for k in range(21)]
    for k in (0, 1, 2, 4, 8):
        extra = math.exp(-k * run["num_layers"] / 6) if k else 0
        rows += [
            ("recent_tokens", k, "val_loss", loss + extra),
            ("recent_tokens", k, "val_ppl", math.exp(loss + extra)),
        ]
    return pd.DataFrame(rows, columns=["phase", "step", "metric", "value"])


def planted(outputs: Path, laws: Mapping[str, tuple[float, float]], **options: Any) -> Grid:
    """The grid `planted`, anew, as `read_grid` gives it."""
    shutil.rmtree(outputs / "planted", ignore_errors=True)
    plant(outputs, laws, **options)
    return read_grid("planted")
