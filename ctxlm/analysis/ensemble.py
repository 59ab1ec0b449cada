"""Several runs asked together: the mean of the probabilities that their models give to every token.

    python -m ctxlm.analysis.ensemble depth-members

writes `data/results/depth-members/ensembles.csv`, a row an ensemble, from the weights in `outputs`.
"""

import math
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ctxlm.analysis.runs import replicates
from ctxlm.config import ConfigError, load_grid
from ctxlm.corpus import split
from ctxlm.files import atomic, results_dir
from ctxlm.generate import load_run

FILE = "ensembles.csv"
"""Beside a grid's published tables."""


def average(losses: Tensor) -> Tensor:
    """Losses of the mean of several models' probabilities, nats [tokens], from their own losses, [models, tokens]."""
    return math.log(len(losses)) - torch.logsumexp(-losses, 0)


def ask_together(grid: str) -> Path:
    """Write what the finished runs of a grid that share all but the seed predict of test together, in float32.

    Raises:
        ConfigError: as `load_run`, of every run of the grid.
    """
    plan = load_grid(grid)
    members = pd.DataFrame([{"run": run} | e.model_dump() for run, e in plan.runs.items()])
    rows = []
    for (label, *_), group in members.groupby(["experiment", "train_tokens", "data_seed", "embedding_seed"]):
        first = group.sort_values("seed").iloc[0]
        tokens = torch.from_numpy(split(plan.runs[first["run"]]).test.tokens).long()
        losses = average(torch.stack([load_run(plan.name, run).losses(tokens)[1:] for run in group["run"]]))
        known = {"run": first["run"], "experiment": f"{len(group)} {label}", "test_tokens": len(tokens)}
        rows.append(dict(first) | known | {"test_loss": losses.double().mean().item()})
    with atomic(results_dir() / plan.name / FILE) as path:
        pd.DataFrame(rows).to_csv(path, index=False)
    return results_dir() / plan.name / FILE


def read_ensembles(grid: str) -> pd.DataFrame:
    """Ensembles as `runs.read_runs` has runs, with the seed of their first model, labelled "3 L2" for three of L2."""
    rows = pd.read_csv(results_dir() / grid / FILE)
    together = {"grid": grid, "id": grid + "/together/" + rows["run"], "log_ppl": rows["test_loss"]}
    return rows.assign(**together, replicate=replicates(rows))


if __name__ == "__main__":
    try:
        print(ask_together(sys.argv[1]))
    except (ConfigError, OSError) as error:
        sys.exit(str(error))
