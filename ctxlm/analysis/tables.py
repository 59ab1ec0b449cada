"""The tables of the analysis: all runs of a grid, and the study's own runs beside the published ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from ctxlm.analysis.findings import as_printed
from ctxlm.analysis.scaling import ppl_interval
from ctxlm.files import resolve

REFERENCE = "data/reference/l4-2025-11-28"


def read_published(name: str) -> pd.DataFrame:
    """One of the published tables, e.g. "results"; their README says where each comes from."""
    return pd.read_csv(resolve(REFERENCE) / f"{name}.csv")


MOST_ROWS = 24
"""Runs that are listed one by one; of more, a row holds those of a configuration and size."""


def results_table(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """One row a run; PPL with its 95 % interval over validation samples, shares in per cent, times in minutes.

    Of more than `MOST_ROWS` runs, one row a configuration and size: means, and the range of PPL.
    """
    if runs.empty:
        return runs
    if len(runs) > MOST_ROWS:
        return _means_table(runs)
    intervals = [ppl_interval(val_by_sample[val_by_sample["run"] == run]) for run in runs["run"]]
    table = {
        "Label": runs["experiment"],
        "Training tokens": runs["train_tokens"].map("{:,}".format),
        "Seed": runs["seed"].astype(str),
        "Validation PPL": runs["val_ppl"].map("{:.1f}".format),
        "95 % interval": ["none" if i is None else f"{i[0]:.1f}–{i[1]:.1f}" for i in intervals],
        "Accuracy, %": (100 * runs["val_accuracy"]).map("{:.2f}".format),
        "Test PPL": runs["test_ppl"].map("{:.1f}".format),
        "Training ER, %": runs["train_er_pct"].map("{:.1f}".format),
        "Validation ER, %": runs["val_er_pct"].map("{:.1f}".format),
        "Phase 1 iterations": runs["phase1_iterations"].astype(str),
        "Converged, %": (100 * runs["phase1_converged_ratio"]).map("{:.1f}".format),
        "Best epoch": runs["best_epoch"].astype(str) + " of " + runs["epochs_run"].astype(str),
        "Over-fitting, %": (100 * runs["overfit_rate"]).map("{:.0f}".format),
        "Minutes": (runs["total_seconds"] / 60).map("{:.1f}".format)
        + runs["phase1_cached"].map({True: " (Phase 1 cached)", False: ""}),
        "Source": runs["source"],
    }
    return pd.DataFrame(table)


def _means_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration and size: how many runs, their means, and the range of PPL."""
    shares = {name: 100 * runs[name] for name in ("val_accuracy", "phase1_converged_ratio", "overfit_rate")}
    cells = runs.assign(minutes=runs["total_seconds"] / 60, **shares).groupby(["experiment", "train_tokens"])
    means, ppl = cells.mean(numeric_only=True), cells["val_ppl"]
    columns = {
        "Accuracy, %": ("val_accuracy", "{:.2f}"),
        "Test PPL": ("test_ppl", "{:.1f}"),
        "Training ER, %": ("train_er_pct", "{:.1f}"),
        "Validation ER, %": ("val_er_pct", "{:.1f}"),
        "Phase 1 iterations": ("phase1_iterations", "{:.1f}"),
        "Converged, %": ("phase1_converged_ratio", "{:.1f}"),
        "Best epoch": ("best_epoch", "{:.1f}"),
        "Over-fitting, %": ("overfit_rate", "{:.0f}"),
        "Minutes": ("minutes", "{:.1f}"),
    }
    table = {
        "Label": means.index.get_level_values("experiment"),
        "Training tokens": [f"{tokens:,}" for tokens in means.index.get_level_values("train_tokens")],
        "Runs": ppl.size().to_numpy(),
        "Mean PPL": [f"{value:.1f}" for value in ppl.mean()],
        "PPL, range": [f"{low:.0f}–{high:.0f}" for low, high in zip(ppl.min(), ppl.max(), strict=True)],
    }
    table |= {title: [text.format(value) for value in means[name]] for title, (name, text) in columns.items()}
    return pd.DataFrame(table)


def others_table(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """One row a run of models beside the context model, of each size the best first; `held out` is training text that
    stood in for validation."""
    if runs.empty:
        return runs
    runs = runs.sort_values(["train_tokens", "val_ppl"])
    networks = runs["model"] != "kneser-ney"
    intervals = [ppl_interval(val_by_sample[val_by_sample["run"] == run]) for run in runs["run"]]
    trained = [name for name in ("best_epoch", "epochs_run") if name in runs]  # n-grams alone have no such columns
    epochs = [" of ".join(f"{row[name]:.0f}" for name in trained) for row in runs.to_dict("records")]
    table = {
        "Label": runs["experiment"],
        "Training tokens": runs["train_tokens"].map("{:,}".format),
        "Held out": runs["held_out_tokens"].map("{:,}".format),
        "Learning rate": runs["phase2_learning_rate"].map("{:g}".format).where(networks, ""),
        "Validation PPL": runs["val_ppl"].map("{:.1f}".format),
        "95 % interval": ["none" if i is None else f"{i[0]:.1f}–{i[1]:.1f}" for i in intervals],
        "Test PPL": runs["test_ppl"].map("{:.1f}".format),
        "Best epoch": pd.Series(epochs, runs.index).where(networks, ""),
        "Minutes": (runs["total_seconds"] / 60).map("{:.1f}".format),
        "Source": runs["source"],
    }
    return pd.DataFrame(table)


def shown(table: pd.DataFrame, otherwise: str, prose: Sequence[str] = ()) -> Styler | Markdown:
    """The table without its index, for a notebook; the sentence `otherwise` where it is empty.

    Columns in `prose` hold sentences: they are set left and may break into lines. Powers, as in 10^13, are set high.
    """
    if table.empty:
        return Markdown(otherwise)
    table = table.assign(**{column: table[column].str.replace(" %", "\u00a0%") for column in prose})
    wrapped = {"white-space": "normal", "text-align": "left", "min-width": "11em"}
    left = {column: [{"selector": "th.col_heading", "props": "text-align: left"}] for column in prose}
    table = table.replace(r"\^(?:\(([^()]*)\)|([−-]?[\d.]*\w))", r"<sup>\1\2</sup>", regex=True)
    styler = table.style.hide(axis="index").set_properties(subset=list(prose), **wrapped)
    return styler.set_table_styles(left)


def recency_table(recency: pd.DataFrame) -> pd.DataFrame:
    """By how much PPL is worse, per cent with its 95 % interval, when contexts have read the last k tokens only.

    Args:
        recency: `explain.recency` by experiment and train_tokens.
    """
    if recency.empty:
        return recency
    low, centre, high = ((100 * np.expm1(recency[name])).round(1) + 0.0 for name in ("low", "extra_loss", "high"))
    cells = [
        f"{b:.1f}" if math.isnan(a) else f"{b:.1f} ({a:.1f} to {c:.1f})"
        for a, b, c in zip(low, centre, high, strict=True)
    ]
    unit = "PPL above the whole stream's, %" + (" (95 % interval)" if recency["low"].notna().any() else "")
    label = [
        f"{row.experiment}, {row.train_tokens:,} tokens, {row.n} replicate{'' if row.n == 1 else 's'}: {unit}"
        for row in recency.itertuples()
    ]
    table = recency.assign(cell=[cell.replace("-", "−") for cell in cells], run=label)
    table = table.pivot(index="k", columns="run", values="cell")[list(dict.fromkeys(label))]
    return table.rename_axis(columns=None).reset_index().rename(columns={"k": "Last k tokens"})


def published_runs() -> pd.DataFrame:
    """The four published runs, in the names and units of our own metrics.json."""
    keys = ["experiment", "train_tokens"]
    table = read_published("results")
    for name in ("phase1", "phase2"):
        table = table.merge(read_published(name).drop(columns="train_samples"), on=keys)
    table = table.merge(read_published("architectures")[["experiment", "num_layers", "context_dim"]], on="experiment")
    return table.assign(
        val_accuracy=table["val_accuracy_pct"] / 100,
        phase1_converged_ratio=table["phase1_converged_pct"] / 100,
        overfit_rate=table["overfit_pct"] / 100,
        total_seconds=60 * table["total_minutes"],
    )


def beside_published(runs: pd.DataFrame) -> pd.DataFrame:
    """Ours, the published value and, but for times, the relative difference: a row a quantity, a column a run.

    Runs are matched by layers, context width and training tokens; several seeds are averaged. Empty where none matches.
    """
    keys = ["num_layers", "context_dim", "train_tokens"]
    quantities = {
        "Validation PPL": ("val_ppl", 1, "{:.1f}"),
        "Validation accuracy, %": ("val_accuracy", 100, "{:.2f}"),
        "ER of training contexts, %": ("train_er_pct", 1, "{:.1f}"),
        "ER of validation contexts, %": ("val_er_pct", 1, "{:.1f}"),
        "Phase 1 iterations": ("phase1_iterations", 1, "{:.3g}"),
        "Converged tokens, %": ("phase1_converged_ratio", 100, "{:.1f}"),
        "Best epoch": ("best_epoch", 1, "{:.3g}"),
        "Over-fitting, %": ("overfit_rate", 100, "{:+.0f}"),
        "Minutes": ("total_seconds", 1 / 60, "{:.1f}"),
    }
    names = [name for name, _, _ in quantities.values()]
    ours = runs.groupby(keys, as_index=False)[names].mean() if len(runs) else pd.DataFrame(columns=keys + names)
    pairs = ours.merge(published_runs(), on=keys, suffixes=("_ours", "_published"))
    columns = {}
    for _, pair in pairs.sort_values(["experiment", "train_tokens"]).iterrows():
        cells = []
        for name, factor, text in quantities.values():
            mine, theirs = (factor * pair[f"{name}_{side}"] for side in ("ours", "published"))
            gap = "" if name == "total_seconds" else f" ({mine / theirs - 1:+.0%})"  # times are of other machines
            cells.append(f"{text.format(mine)} / {text.format(theirs)}{gap}".replace("-", "−"))
        columns[f"{pair['experiment']}, {pair['train_tokens']:,} tokens"] = cells
    return pd.DataFrame({"Ours / published": list(quantities)} | columns) if columns else pd.DataFrame()


def laws_beside_published(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Exponents and crossover of our runs of the study beside the published ones; empty where none was fitted."""
    published = read_published("power_laws").set_index("experiment")["alpha"]
    claims = read_published("claims")
    crossing = float(claims.loc[claims["claim"] == "the two PPLs cross at about", "value"].iloc[0])
    laws = {label: law for label, law in summary["configurations"].items() if not law["reason"] and label in published}
    rows = [
        (
            f"α of {label}",
            f"{law['alpha']:.3f}".replace("-", "−"),
            f"{published[label]:.3f}".replace("-", "−"),
            f"n = {law['n']}, {law['interval_dof']} d.o.f.",
        )
        for label, law in laws.items()
    ]
    if rows:
        tokens, reason = summary["crossover_tokens"], summary["crossover_reason"]
        note = reason or ("extrapolated" if summary["crossover_extrapolated"] else "inside the measured range")
        rows.append(
            ("crossover, tokens", f"{float(f'{tokens:.3g}'):,.0f}" if tokens else "none", f"{crossing:,.0f}", note)
        )
    return pd.DataFrame(rows, columns=["Law", "Ours", "Published", "Of ours"])


def audit_table(audit: pd.DataFrame) -> pd.DataFrame:
    """The audit for reading: what does not hold first, numbers with the digits that were printed and one more."""

    def number(row: pd.Series) -> str:
        if isinstance(row["recomputed"], str):
            return row["recomputed"]
        return f"{row['recomputed']:,.{min(len(row['published'].partition('.')[2]) + 1, 4)}f}".replace("-", "−")

    def difference(share: float) -> str:
        per_cent = round(100 * share, 1) if pd.notna(share) else None
        return "" if per_cent is None else f"{per_cent:+.1f}".replace("-", "−") if per_cent else "0.0"

    order = ["does not follow", "cannot be tested", "rounding", "holds"]
    audit = audit.sort_values("verdict", key=lambda verdicts: verdicts.map(order.index), kind="stable")
    table = {
        "Verdict": audit["verdict"],
        "Claim": audit["claim"],
        "Published": audit["published"].map(as_printed),
        "Recomputed": audit.apply(number, axis=1),
        "Difference, %": audit["difference"].map(difference),
        "Why": audit["why"].str.replace(r"(?<![\w)])-(?=\d)", "−", regex=True),
    }
    return pd.DataFrame(table)
