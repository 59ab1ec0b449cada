"""Why: models of over-fitting, of depth and width, of what contexts are worth and how far back they reach.

All effects are on losses in nats (log PPL), so that 0.01 is about 1 % of PPL. Intervals are 95 %. Given the losses by
validation sample, they are bootstrap intervals over samples, crossed with replicates (`replicates`) where there are
several; otherwise they are Student's over replicates, for the validation text at hand. Least squares of a single
replicate have HC3 errors (MacKinnon & White, 1985).
"""

import contextlib
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import statsmodels.api as sm

from ctxlm.analysis.replicates import student
from ctxlm.analysis.scaling import CELL, loss_sums, mean_loss, robust_interval

HALVED = "a halved learning rate"


@dataclass(frozen=True)
class Effect:
    """An estimate with its interval (None where no error can be estimated) from `n` runs in `replicates`."""

    name: str
    estimate: float
    interval: tuple[float, float] | None
    n: int
    replicates: int
    dof: float
    """Replicates − 1; Satterthwaite's where samples are drawn too; the fit's where there is a single replicate."""
    samples: int = 0
    """Validation samples that the interval draws anew; 0: it is for the validation text at hand."""


def paired_effect(
    runs: pd.DataFrame,
    label: Hashable,
    against: Hashable,
    column: str = "val_loss",
    val_by_sample: pd.DataFrame | None = None,
    by: str = "experiment",
    alike: Sequence[str] = (),
) -> Effect:
    """Mean difference of `column`, `label` minus `against`, over runs of equal size, seed and training window.

    Args:
        runs: one row a run.
        label, against: values of the column `by`.
        column: what is compared.
        val_by_sample: columns run, sample, loss_sum, tokens. With it the column is `val_loss`, and samples are drawn.
        by: what differs in a pair.
        alike: what else a pair shares.

    Raises:
        ValueError: there is no such pair, or its runs were judged on different tokens.
    """
    a, b = (runs[runs[by] == name].set_index([*CELL, "replicate", *alike]) for name in (label, against))
    pairs = a.merge(b, left_index=True, right_index=True, suffixes=("_a", "_b"))
    pairs = pairs.dropna(subset=[f"{column}_a", f"{column}_b"])
    if pairs.empty:
        raise ValueError(f"{label} and {against} have no runs of equal size, seed and training window")
    if column == "test_loss" and (pairs["test_tokens_a"] != pairs["test_tokens_b"]).any():
        raise ValueError(f"{label} and {against} were judged on different test tokens")
    replicate = pairs.index.get_level_values("replicate")
    weights = np.array([(replicate == r) / (replicate == r).sum() for r in replicate.unique()])
    values = weights @ (pairs[f"{column}_a"] - pairs[f"{column}_b"]).to_numpy(float)
    if val_by_sample is None:
        return _effect(str(label), values, len(pairs))
    sums, tokens = loss_sums(val_by_sample, [*pairs["run_a"], *pairs["run_b"]])
    return _effect(str(label), values, len(pairs), weights @ (sums[: len(pairs)] - sums[len(pairs) :]), tokens)


def variants(
    runs: pd.DataFrame, parts: Mapping[str, str], column: str = "val_loss", val_by_sample: pd.DataFrame | None = None
) -> dict[str, list[Effect]]:
    """Configuration → the effects of its variants, labelled `<configuration>-<suffix>`; `parts` names each suffix."""
    found: dict[str, list[Effect]] = {}
    for base, suffix in itertools.product(sorted(set(runs["experiment"])) if len(runs) else (), parts):
        with contextlib.suppress(ValueError):  # not run, or no two that belong together, or judged on other text
            effect = paired_effect(runs, f"{base}-{suffix}", base, column, val_by_sample)
            found.setdefault(base, []).append(replace(effect, name=parts[suffix]))
    return found


def _effect(
    name: str, values: np.ndarray, n: int, sums: np.ndarray | None = None, tokens: np.ndarray | None = None
) -> Effect:
    """An effect from its `values` in every replicate or, with samples drawn too, its `sums` [replicates, samples]."""
    m = len(values)
    if sums is None:
        return Effect(name, float(values.mean()), student(values), n, m, m - 1)
    found = mean_loss(sums, tokens)
    return Effect(name, found.value, found.interval, n, m, found.dof, len(tokens))


def stopped(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that went on to their early stop: the others were still getting better, and show no over-fitting yet."""
    return runs[runs["epochs_run"] - runs["best_epoch"] >= runs["phase2_patience"]]


def overfitting_effects(
    runs: pd.DataFrame, best: bool = False, val_by_sample: pd.DataFrame | None = None
) -> list[Effect]:
    """What log(last PPL / best PPL) depends on: a doubling of the tokens, the configuration, a halved learning rate.

    With `best`, what the best PPL itself depends on; then, with `val_by_sample`, samples are drawn too.

    Least squares on log2 tokens, configurations (against the first one) and, where it varies, −log2 of Phase 2's
    learning rate for each configuration, of the runs that `stopped` (of all of them for the best PPL).

    Raises:
        ValueError: the runs cannot tell the effects apart, or were judged on different tokens.
    """
    done = runs if best else stopped(runs)
    columns = {"a doubling of the training tokens": np.log2(done["train_tokens"])}
    first, *others = sorted(done["configuration"].unique()) or [""]
    columns |= {f"{label} against {first}": (done["configuration"] == label).astype(float) for label in others}
    for label in done["configuration"].unique():
        own, halvings = done["configuration"] == label, -np.log2(done["phase2_learning_rate"])
        if halvings[own].nunique() > 1:  # centred, so that configurations are compared over all their rates
            columns[f"{HALVED} for {label}"] = (halvings - halvings[own].mean()).where(own, 0.0)
    if not best:
        return _effects(columns, np.log1p(done["overfit_rate"]), done["replicate"])
    drawn = None if val_by_sample is None else loss_sums(val_by_sample, done["run"])
    return _effects(columns, done["val_loss"], done["replicate"], drawn)


def factorial_effects(
    runs: pd.DataFrame, column: str = "val_loss", val_by_sample: pd.DataFrame | None = None
) -> list[Effect]:
    """Main effects of depth and width and their interaction, from runs with two depths crossed with two widths.

    Least squares of `column` on depth and width coded −½ and ½ (so that an effect is the mean difference between the
    deep and the shallow, the wide and the narrow), their product (how much more depth does in wide models than in
    narrow ones), sizes as factors, and the effects' change with every doubling of the tokens. With `val_by_sample`, as
    `paired_effect`.

    Raises:
        ValueError: depths and widths are not two of each, or not crossed, or runs were judged on different tokens.
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
        columns |= {
            f"{name}: change with twice the tokens": x * doublings for name, x in ((deep, depth), (wide, width))
        }
    kept = len(columns)
    columns |= {f"size {size}": (runs["train_tokens"] == size).astype(float) for size in sizes[1:]}
    drawn = None if val_by_sample is None else loss_sums(val_by_sample, runs["run"])
    return _effects(columns, runs[column], runs["replicate"], drawn)[:kept]


def _effects(
    columns: dict[str, pd.Series],
    y: pd.Series,
    replicate: pd.Series,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Effect]:
    """Least-squares coefficients of `y` on `columns` and a constant, which is left out.

    Replicates that can tell the columns apart by themselves, if there are two or more, give a value each, and the
    interval is over them; with `drawn`, the runs' `loss_sums`, over samples too. Otherwise runs are taken as
    independent.
    """
    x = np.column_stack([np.ones(len(y)), *columns.values()]).astype(float)
    values, members = y.to_numpy(float), replicate.to_numpy()
    if not len(y) or np.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError(f"{len(y)} runs cannot tell {', '.join(columns)} apart: run more of them")
    parts = [members == index for index in np.unique(members)]
    able = [part for part in parts if np.linalg.matrix_rank(x[part]) == x.shape[1]]
    names = {name: k for k, name in enumerate(columns, start=1)}
    if len(able) > 1:
        used = int(sum(part.sum() for part in able))
        weights = np.zeros((x.shape[1], len(able), len(y)))  # a coefficient is a weighted sum of a replicate's runs
        for index, part in enumerate(able):
            weights[:, index, part] = np.linalg.pinv(x[part])
        sums, tokens = drawn or (None, None)
        return [
            _effect(name, weights[k] @ values, used, None if sums is None else weights[k] @ sums, tokens)
            for name, k in names.items()
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

    Columns run, epochs (its updates by an epoch's), gain (nats by which it beats the best epoch's end: never negative,
    and partly luck, for it is the least of several looks at one text), and the run's configuration. Runs without
    `val_every_steps` are left out.
    """
    rows = []
    for run, part in history.groupby("run"):
        between = part[(part["phase"] == "phase2_updates") & (part["metric"] == "val_loss")].set_index("step")["value"]
        if between.empty:
            continue
        ends = part[part["phase"] == "phase2"].pivot_table(index="step", columns="metric", values="value")
        looks = pd.concat([ends.set_index("updates")["val_loss"], between])  # of equals the first, an epoch's end
        rows.append((run, looks.idxmin() / ends["updates"].iloc[0], ends["val_loss"].min() - looks.min()))
    found = pd.DataFrame(rows, columns=["run", "epochs", "gain"])
    return found.merge(runs[["run", "configuration", "train_tokens", "phase2_learning_rate"]], on="run")
