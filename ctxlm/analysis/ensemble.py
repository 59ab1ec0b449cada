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

from ctxlm.analysis.runs import load_planned, replicates
from ctxlm.config import ConfigError, Experiment, load_grid
from ctxlm.corpus import split
from ctxlm.files import atomic, results_dir
from ctxlm.generate import load_run

FILE = "ensembles.csv"
"""Beside a grid's published tables."""


def average(losses: Tensor) -> Tensor:
    """Losses of the mean of several models' probabilities, nats [tokens], from their own losses, [models, tokens]."""
    return math.log(len(losses)) - torch.logsumexp(-losses, 0)


def ask_together(grid: str) -> Path:
    """Write what a grid's runs that share all parameters but the seed predict of test together, in float32.

    Raises:
        ConfigError: a run of the grid is not finished; or as `load_run`.
    """
    plan = load_grid(grid)
    members = load_planned(plan)
    if missing := sorted(set(plan.runs).difference(members.get("run", []))):
        raise ConfigError(
            f"{len(missing)} runs of grid {grid} are not there, as {missing[0]}: `make report GRID={grid}`"
        )
    alike = [name for name in Experiment.model_fields if name != "seed" and name in members]
    rows = []
    for _, group in members.groupby(alike, dropna=False):
        first = group.sort_values("seed").iloc[0]
        tokens = torch.from_numpy(split(plan.runs[first["run"]]).test.tokens).long()
        losses = average(torch.stack([load_run(plan.name, run).losses(tokens)[1:] for run in group["run"]]))
        judged = {"experiment": f"{len(group)} {first['experiment']}", "test_loss": losses.double().mean().item()}
        rows.append(first[["run", *alike, "seed", "test_tokens"]].to_dict() | judged)
    with atomic(results_dir() / plan.name / FILE) as path:
        pd.DataFrame(rows).to_csv(path, index=False)
    return results_dir() / plan.name / FILE


def read_ensembles(grid: str) -> pd.DataFrame:
    """Ensembles as `runs.read_runs` has runs, with the seed of their first model, labelled "3 L2" for three of L2."""
    path = results_dir() / grid / FILE
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `python -m ctxlm.analysis.ensemble {grid}`")
    rows = pd.read_csv(path)
    together = {"grid": grid, "id": grid + "/together/" + rows["run"], "log_ppl": rows["test_loss"]}
    return rows.assign(**together, replicate=replicates(rows))


if __name__ == "__main__":
    try:
        print(ask_together(sys.argv[1]))
    except (ConfigError, OSError) as error:
        sys.exit(str(error))
