"""Why: models of over-fitting, of depth and width, of what contexts are worth and how far back they reach.

All effects are on losses in nats (log PPL), so that 0.01 is about 1 % of PPL. Intervals are 95 % and Student's over
replicates (`replicates`); where there is a single replicate, least squares have HC3 errors (MacKinnon & White, 1985).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm

from ctxlm.analysis.replicates import student
from ctxlm.analysis.scaling import robust_interval

PAIR = ["train_tokens", "seed", "data_seed"]
"""What two runs share that are compared in a pair."""


@dataclass(frozen=True)
class Effect:
    """An estimate with its interval (None where no error can be estimated) from `n` runs in `replicates`."""

    name: str
    estimate: float
    interval: tuple[float, float] | None
    n: int
    replicates: int
    dof: int


def paired_effect(runs: pd.DataFrame, label: str, against: str, column: str = "val_loss") -> Effect:
    """Mean difference of `column`, `label` minus `against`, over runs of equal size, seed and training window.

    Raises:
        ValueError: there is no such pair.
    """
    a, b = (runs[runs["experiment"] == name].set_index([*PAIR, "replicate"])[column] for name in (label, against))
    differences = (a - b).dropna()
    if differences.empty:
        raise ValueError(f"{label} and {against} have no runs of equal size, seed and training window")
    values = differences.groupby("replicate").mean().to_numpy()
    return Effect(label, float(values.mean()), student(values), len(differences), len(values), len(values) - 1)


def stopped(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that went on to their early stop: the others were still getting better, and show no over-fitting yet."""
    return runs[runs["epochs_run"] - runs["best_epoch"] >= runs["phase2_patience"]]


def overfitting_effects(runs: pd.DataFrame, best: bool = False) -> list[Effect]:
    """What log(last PPL / best PPL) depends on: a doubling of the tokens, the configuration, a halved learning rate.

    With `best`, what the best PPL itself depends on.

    Least squares on log2 tokens, configurations (against the first one) and, where it varies, −log2 of Phase 2's
    learning rate, of the runs that `stopped`.

    Raises:
        ValueError: the runs cannot tell the effects apart.
    """
    done = stopped(runs)
    columns = {"a doubling of the training tokens": np.log2(done["train_tokens"])}
    first, *others = sorted(done["configuration"].unique()) or [""]
    columns |= {f"{label} against {first}": (done["configuration"] == label).astype(float) for label in others}
    if done["phase2_learning_rate"].nunique() > 1:
        columns["a halved learning rate"] = -np.log2(done["phase2_learning_rate"])
    return _effects(columns, done["val_loss"] if best else np.log1p(done["overfit_rate"]), done["replicate"])


def factorial_effects(runs: pd.DataFrame, column: str = "val_loss") -> list[Effect]:
    """Main effects of depth and width and their interaction, from runs with two depths crossed with two widths.

    Least squares of `column` on depth and width coded −½ and ½ (so that an effect is the mean difference between the
    deep and the shallow, the wide and the narrow), their product (how much more depth does in wide models than in
    narrow ones), sizes as factors, and the effects' change with every doubling of the tokens.

    Raises:
        ValueError: depths and widths are not two of each, or not crossed.
    """
    depths, widths = (sorted(runs[name].unique()) for name in ("num_layers", "context_dim"))
    if len(depths) != 2 or len(widths) != 2 or len(runs[["num_layers", "context_dim"]].drop_duplicates()) != 4:
        raise ValueError("depth and width are not crossed: two of each are needed, in all four pairs")
    depth = (runs["num_layers"] == depths[1]) - 0.5
    width = (runs["context_dim"] == widths[1]) - 0.5
    doublings = np.log2(runs["train_tokens"])
    doublings = doublings - doublings.mean()
    sizes = sorted(runs["train_tokens"].unique())
    deep, wide = f"{depths[1]} layers against {depths[0]}", f"context {widths[1]} against {widths[0]}"
    columns = {deep: depth, wide: width, "interaction": depth * width}
    if len(sizes) > 1:
        columns |= {f"{deep}, per doubling": depth * doublings, f"{wide}, per doubling": width * doublings}
    kept = len(columns)
    columns |= {f"size {size}": (runs["train_tokens"] == size).astype(float) for size in sizes[1:]}
    return _effects(columns, runs[column], runs["replicate"])[:kept]


def _effects(columns: dict[str, pd.Series], y: pd.Series, replicate: pd.Series) -> list[Effect]:
    """Least-squares coefficients of `y` on `columns` and a constant, which is left out.

    Where every replicate can tell the columns apart by itself, its coefficients are one value each, and the interval is
    over replicates. Otherwise runs are taken as independent.
    """
    x = np.column_stack([np.ones(len(y)), *columns.values()]).astype(float)
    values, members = y.to_numpy(float), replicate.to_numpy()
    if not len(y) or np.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError(f"{len(y)} runs cannot tell {', '.join(columns)} apart: run more of them")
    parts = [members == index for index in np.unique(members)]
    names = {name: k for k, name in enumerate(columns, start=1)}
    if len(parts) > 1 and all(np.linalg.matrix_rank(x[part]) == x.shape[1] for part in parts):
        own = np.array([np.linalg.lstsq(x[part], values[part])[0] for part in parts])
        m = len(parts)
        return [
            Effect(name, float(own[:, k].mean()), student(own[:, k]), len(y), m, m - 1) for name, k in names.items()
        ]
    fit = sm.OLS(values, x).fit()
    dof = int(fit.df_resid)
    return [
        Effect(name, float(fit.params[k]), robust_interval(fit, k) if dof > 0 else None, len(y), 1, dof)
        for name, k in names.items()
    ]


def generalisation(history: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The gap of every run: validation loss minus training loss after the same epoch, the best one and the last.

    Columns run, experiment, configuration, train_tokens, best_gap, last_gap, params_per_token. Runs that did not
    measure the training loss after an epoch are left out.
    """
    losses = history[(history["phase"] == "phase2") & history["metric"].isin(["train_loss_after", "val_loss"])]
    table = losses.pivot_table(index=["run", "step"], columns="metric", values="value")
    if "train_loss_after" not in table:
        return pd.DataFrame()
    gap = (table["val_loss"] - table["train_loss_after"]).dropna()
    known = runs[runs["run"].isin(gap.index.get_level_values("run"))]
    at = {
        name: [gap[key] for key in zip(known["run"], known[step], strict=True)]
        for name, step in (("best_gap", "best_epoch"), ("last_gap", "epochs_run"))
    }
    per_token = known["token_block_params_trained"] / known["train_tokens"]
    return known[["run", "experiment", "configuration", "train_tokens"]].assign(**at, params_per_token=per_token)


def recency(history: pd.DataFrame, by: Sequence[str] = ("experiment",)) -> pd.DataFrame:
    """What is lost when contexts have read the last k tokens only, by configuration or also by `train_tokens`.

    Columns `by`, k, extra_loss (nats: the loss at k minus that with the whole stream read, mean over replicates), low,
    high (Student's interval), n (replicates).
    """
    rows = history[(history["phase"] == "recent_tokens") & (history["metric"] == "val_loss")]
    if rows.empty:
        return pd.DataFrame(columns=[*by, "k", "extra_loss", "low", "high", "n"])
    losses = rows.set_index(["run", "step"])["value"]
    rows = rows[rows["step"] > 0].rename(columns={"step": "k"})
    rows = rows.assign(extra=rows["value"].to_numpy() - losses[[(run, 0) for run in rows["run"]]].to_numpy())
    extra = rows.groupby([*by, "k", "replicate"])["extra"].mean().groupby([*by, "k"])
    found = extra.agg(extra_loss="mean", n="count").reset_index()
    ends = [student(values.to_numpy()) or (math.nan, math.nan) for _, values in extra]
    return found.assign(low=[low for low, _ in ends], high=[high for _, high in ends])


def between_epochs(history: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Where the best point lies when validation looks between epochs.

    Columns run, best_update, epochs (updates by an epoch's), gain (nats by which it beats the best epoch's end:
    never negative, and partly luck, for it is the least of several looks at one text), and the run's configuration.
    Runs without `val_every_steps` are left out.
    """
    rows = []
    for run, part in history.groupby("run"):
        between = part[(part["phase"] == "phase2_updates") & (part["metric"] == "val_loss")].set_index("step")["value"]
        if between.empty:
            continue
        ends = part[part["phase"] == "phase2"].pivot_table(index="step", columns="metric", values="value")
        best, update = min(between.min(), ends["val_loss"].min()), int(between.idxmin())
        if ends["val_loss"].min() <= between.min():
            update = int(ends.loc[ends["val_loss"].idxmin(), "updates"])
        rows.append((run, update, update / ends["updates"].iloc[0], float(ends["val_loss"].min() - best)))
    found = pd.DataFrame(rows, columns=["run", "best_update", "epochs", "gain"])
    return found.merge(runs[["run", "configuration", "train_tokens", "phase2_learning_rate"]], on="run")
