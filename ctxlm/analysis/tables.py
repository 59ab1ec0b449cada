"""The tables of the analysis: all runs of a grid, and the study's own runs beside the published ones."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from ctxlm.analysis.explain import Effect
from ctxlm.analysis.findings import as_printed
from ctxlm.analysis.findings import prose as paragraphs
from ctxlm.analysis.phrases import change, change_if_known, effect_text, magnitude, p_text, percent, signed, tokens_text
from ctxlm.analysis.reasons import effect_verdict, slope_verdict
from ctxlm.analysis.replicates import student
from ctxlm.analysis.scaling import ppl_interval
from ctxlm.analysis.variance import SOURCES, components, ratio_interval
from ctxlm.files import resolve

REFERENCE = "data/reference/l4-2025-11-28"


def read_published(name: str) -> pd.DataFrame:
    """One of the published tables, e.g. "results"; their README says where each comes from."""
    return pd.read_csv(resolve(REFERENCE) / f"{name}.csv")


NARROW = 9
"""Columns of a table that is printed in type of full size."""
MOST_ROWS = 24
"""Runs that are listed one by one; of more, a row holds those of a configuration and size."""
QUANTITIES = {
    "Validation PPL": ("val_ppl", 1, "{:.1f}"),
    "Accuracy, %": ("val_accuracy", 100, "{:.2f}"),
    "Test PPL": ("test_ppl", 1, "{:.1f}"),
    "ER before Phase 1, %": ("init_er_pct", 1, "{:.1f}"),
    "Training ER, %": ("train_er_pct", 1, "{:.1f}"),
    "Training ER without noise, %": ("train_er_noiseless_pct", 1, "{:.1f}"),
    "Validation ER, %": ("val_er_pct", 1, "{:.1f}"),
    "Phase 1 iterations": ("phase1_iterations", 1, "{:.3g}"),
    "Converged, %": ("phase1_converged_ratio", 100, "{:.1f}"),
    "Best epoch": ("best_epoch", 1, "{:.3g}"),
    "Epochs": ("epochs_run", 1, "{:.3g}"),
    "Over-fitting, %": ("overfit_rate", 100, "{:+.0f}"),
    "Minutes": ("total_seconds", 1 / 60, "{:.1f}"),
}
"""What the tables of runs show: title → column, factor and format."""


def results_table(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """One row a run; PPL with its 95 % interval over validation samples, shares in per cent, times in minutes.

    Of more than `MOST_ROWS` runs, one row a configuration and size: means, and the range of PPL. Columns that a model
    does not have are empty, or left out where none has them.
    """
    rows = []
    key = ["train_tokens", "experiment"] if len(runs) > MOST_ROWS else ["train_tokens", "experiment", "run"]
    for (size, label, *one), own in runs.groupby(key) if len(runs) else ():
        first, ppl = own.iloc[0], own["val_ppl"]
        row = {"Label": label, "Training tokens": f"{size:,}"}
        if first["model"] != "kneser-ney":
            row["Learning rate"] = f"{first['phase2_learning_rate']:g}"
        if first["held_out_tokens"]:
            row["Held out"] = f"{first['held_out_tokens']:,}"
        spread = {"Seed": f"{first['seed']}"}
        if not one:
            spread = {"Runs": f"{len(own)}", "PPL, range": f"{ppl.min():.0f}–{ppl.max():.0f}"}
        row |= spread
        for title, (name, factor, text) in QUANTITIES.items():
            if name in own and own[name].notna().all():
                row[title] = text.format(factor * own[name].mean()).replace("-", "−")
            if name == "val_ppl" and one:
                ends = ppl_interval(val_by_sample[val_by_sample["run"] == one[0]])
                row["95 % interval"] = f"{ends[0]:.1f}–{ends[1]:.1f}" if ends else "none"
        row["Minutes"] += " (Phase 1 cached)" if own["phase1_cached"].any() else ""
        rows.append(row | {"Source": " and ".join(sorted(own["source"].unique()))})
    return pd.DataFrame(rows, dtype=object).fillna("")


def shown(table: pd.DataFrame, otherwise: str, prose: Sequence[str] = ()) -> Styler | Markdown:
    """The table without its index, for a notebook; the sentence `otherwise` where it is empty.

    Columns of words are set left; those in `prose` hold sentences, which may break into lines. Powers, as in 10^13, are
    set high, and a line may end at <br>; nothing else in the table is taken for HTML.
    """
    if table.empty:
        return paragraphs([otherwise])
    prose = [column for column in prose if column in table]
    table = table.assign(**{column: table[column].str.replace(" %", "\u00a0%") for column in prose})
    starts = {name: [str(cell)[0].isalpha() for cell in table[name] if str(cell)] for name in table}
    words = [name for name, known in starts.items() if name in prose or (known and sum(known) > len(known) / 2)]
    left = {column: [{"selector": "th.col_heading, td", "props": "text-align: left"}] for column in words}
    table = table.map(lambda cell: _html(cell) if isinstance(cell, str) else cell)
    styler = table.style.hide(axis="index").format_index(escape="html", axis="columns").set_table_styles(left)
    styler = styler.set_properties(subset=list(prose), **{"white-space": "normal", "min-width": "9em"})
    return styler.set_table_attributes(f'class="{"wide" if table.shape[1] > NARROW else ""}"')


def _html(cell: str) -> str:
    """A cell's text as HTML, its powers set high."""
    text = escape(cell, quote=False).replace("&lt;br&gt;", "<br>")
    return re.sub(r"\^(?:\(([^()]*)\)|([−-]?[\d.]*\w))", r"<sup>\1\2</sup>", text)


def gaps_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row a pair and size: their PPL on validation text, all of it and without the one sample that changes the
    difference most, and on the test text. Of more than `MOST_ROWS` rows, the first configuration's pairs alone.

    `summary` is that of `scaling.summarise`.
    """
    gaps = summary["paired_differences"]
    if len(gaps) > MOST_ROWS:
        gaps = [d for d in gaps if d["a"] == gaps[0]["a"]]
    rows = []
    for d in gaps:
        row = {"PPL of": f"{d['a']} against {d['b']}", "Training tokens": f"{d['train_tokens']:,}"}
        row["Validation text"] = change(d["log_ppl"], d["interval"])
        if d["without"] is not None:
            left_out = f"{d['without_tokens']:,} of {d['tokens']:,} tokens left out"
            row["Without the sample that moves it most"] = f"{percent(math.expm1(d['without']))} ({left_out})"
        if test := d["test"]:
            row["Test text"] = change_if_known(test["log_ppl"], test["interval"])
            row["Test samples"] = test["samples"] or "–"
        rows.append(row)
    return pd.DataFrame(rows, dtype=object).fillna("")


def effects_table(effects: Mapping[str, Sequence[Effect]], what: str = "change", unit: str = "run") -> pd.DataFrame:
    """A row an effect: its interval, from how many runs or pairs it is, and over what the interval was drawn; `what`
    heads the column of the numbers, and `unit` is what there are so many of."""
    title = what[0].upper() + what[1:]
    rows = [
        {"Of": group, "Effect": e.name, title: effect_text(e), "Verdict": effect_verdict(e, "higher", "lower")}
        | {
            f"{unit.capitalize()}s": e.n,
            "Replicates": e.replicates,
            "Validation samples": e.samples or "–",
            "d.o.f.": f"{e.dof:.3g}",
        }
        for group, found in effects.items()
        for e in found
    ]
    return pd.DataFrame(rows)


SLOPES = (
    "Grid|Slopes α|Difference|Verdict|t test, 95 %|p|Bootstrap, 95 %|HC3, 95 %|Laws meet at, tokens|Fieller, tokens|"
    "Delta method, tokens|Bootstrap, tokens|Draws that never meet, %|Runs|Pairs|Replicates|d.o.f."
).split("|")
"""Columns of `slopes_table`; those that are empty everywhere are left out."""


def slopes_table(grids: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """A row a grid and pair of configurations: do the slopes of their laws differ, and where do the laws meet? From
    `crossing.errors`' `pooled` of each grid."""
    rows: list[dict[str, Any]] = []
    for grid, found in ((grid, found) for grid, pairs in grids.items() for found in pairs):
        row = {"Grid": grid, "Slopes α": f"of {found['b']} minus {found['a']}"}
        if found["refused"]:
            rows.append(row | {"Verdict": f"not compared: {found['refused']}"})
            continue
        tokens, fieller = found["crossover_tokens"], found["fieller"]
        counts = {
            "Runs": found["n"],
            "Pairs": found["pairs"],
            "Replicates": found["replicates"],
            "d.o.f.": found["dof"],
        }
        row |= {title: f"{number}" for title, number in counts.items() if number is not None}
        row["Difference"] = signed(found["slope_difference"])
        row["Laws meet at, tokens"] = found["reason"] if tokens is None else tokens_text(tokens)
        if found["slope_interval"] is None:
            rows.append(row | {"Verdict": "no error can be estimated"})
            continue
        intervals = {"t test, 95 %": "slope_interval", "HC3, 95 %": "slope_interval_robust"}
        intervals["Bootstrap, 95 %"] = "bootstrap_slope"
        row |= {title: _ends(found[name], signed) for title, name in intervals.items()}
        row["p"] = p_text(found["p_value"]).removeprefix("= ")
        drawn = found["bootstrap_crossover"] if fieller == "bounded" else None  # else draws left out would bound it
        row["Fieller, tokens"] = _fieller(fieller, found["fieller_interval"])
        row["Delta method, tokens"] = _ends(found["delta_interval"], tokens_text)
        row |= {"Bootstrap, tokens": _ends(drawn, tokens_text), "Verdict": slope_verdict(found)}
        rows.append(row | {"Draws that never meet, %": f"{100 * found['bootstrap_without']:.1f}"})
    table = pd.DataFrame(rows, columns=SLOPES, dtype=object).fillna("")
    return table.loc[:, (table != "").any()]


def _fieller(kind: str, ends: tuple[float | None, float | None] | None) -> str:
    """Fieller's set in words; an interval, or what is outside of one, that is open at an end has one side."""
    if ends is None:
        return {"unbounded": "anywhere", "nowhere": "nowhere from 1 to 10^15"}[kind]
    if None in ends:
        low, high = ends if kind == "bounded" else ends[::-1]
        return f"below {tokens_text(high)}" if low is None else f"above {tokens_text(low)}"
    return ("anywhere but " if kind == "outside" else "") + _ends(ends, tokens_text)


def _ends(interval: Sequence[float | None] | None, text: Callable[[float], str]) -> str:
    """An interval, whose end is open where it is None."""
    return " to ".join("…" if end is None else text(end) for end in interval or ())


def chance_table(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> pd.DataFrame:
    """Standard deviations of PPL by source of chance, and of a run at every size by itself."""
    rows, whole = [], "all"
    for size, own in [(whole, runs), *runs.groupby("train_tokens")] if len(runs) else ():
        with contextlib.suppress(ValueError):  # not nested, or too few runs of that size
            for row in components(own, val_by_sample[val_by_sample["run"].isin(own["run"])]).itertuples():
                if size == whole or row.source == "run":
                    ends = f"{magnitude(row.low)} to {magnitude(row.high)}"
                    found = {
                        "Source": SOURCES[row.source],
                        "Training tokens": size if size == whole else f"{size:,}",
                        "Standard deviation": magnitude(row.sd),
                    }
                    rows.append(found | {"95 % interval": ends, "d.o.f.": f"{row.dof:.3g}"})
    rows.sort(key=lambda row: list(SOURCES.values()).index(row["Source"]))  # a run's at every size together
    if rows:
        with contextlib.suppress(ValueError):  # all runs together are not nested
            ends = " to ".join(f"{end:.1f}" for end in ratio_interval(runs))
            name = "variance of training text over that of initialisation (F, approximate)"
            rows.append({"Source": name, "Training tokens": whole, "95 % interval": ends})
    return pd.DataFrame(rows, dtype=object).fillna("")


def horizons_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Tokens until 1 % of a disturbance is left, before and after training: means over replicates, and the interval of
    the latter. A run that had not forgotten by then makes it nan."""
    rows = []
    for label, own in runs.groupby("experiment") if "horizon" in runs else ():
        means = own.groupby("replicate")[["horizon_init", "horizon"]].agg(lambda x: x.mean(skipna=False))
        before, after = means.mean(skipna=False)
        row = {"Configuration": label, "Before training, tokens": f"{before:.1f}", "After it, tokens": f"{after:.1f}"}
        ends = () if math.isnan(after) else student(means["horizon"].to_numpy()) or ()
        row["95 % interval"] = " to ".join(f"{end:.1f}" for end in ends) or "none"
        rows.append(row | {"Runs": len(own), "Replicates": len(means)})
    return pd.DataFrame(rows)


def between_table(found: pd.DataFrame) -> pd.DataFrame:
    """Means of `explain.between_epochs`, a row a configuration and learning rate; the gain is partly luck."""
    rows = []
    for (label, rate), own in found.groupby(["configuration", "phase2_learning_rate"]):
        row = {"Configuration": label, "Learning rate": f"{rate:g}", "Runs": f"{len(own)}"}
        row["Epochs to the best point, looked for between epochs"] = f"{own['epochs'].mean():.1f}"
        rows.append(row | {"Better than the best epoch's end by (partly luck)": magnitude(own["gain"].mean())})
    return pd.DataFrame(rows)


def recency_table(recency: pd.DataFrame) -> pd.DataFrame:
    """By how much PPL is worse when contexts have read the last k tokens only, a column a configuration and size.

    Args:
        recency: `explain.recency` by experiment and train_tokens.
    """
    if recency.empty:
        return recency
    label = recency["experiment"] + recency["train_tokens"].map(", {:,} tokens".format)
    cells = [change(row.extra_loss, (row.low, row.high)) for row in recency.itertuples()]
    table = recency.assign(cell=cells, run=label).pivot(index="k", columns="run", values="cell")
    return table.rename_axis(columns=None).reset_index().rename(columns={"k": "Last k tokens, PPL above the whole's"})


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
    theirs = published_runs()
    shown = {title: what for title, what in QUANTITIES.items() if what[0] in theirs}
    names = [name for name, _, _ in shown.values()]
    ours = runs.groupby(keys, as_index=False)[names].mean() if len(runs) else pd.DataFrame(columns=keys + names)
    pairs = ours.merge(theirs, on=keys, suffixes=("_ours", "_published"))
    columns = {}
    for _, pair in pairs.sort_values(["experiment", "train_tokens"]).iterrows():
        cells = []
        for name, factor, text in shown.values():
            mine, published = (factor * pair[f"{name}_{side}"] for side in ("ours", "published"))
            gap = "" if name == "total_seconds" else f" ({mine / published - 1:+.0%})"  # times are of other machines
            cells.append(f"{text.format(mine)} / {text.format(published)}{gap}".replace("-", "−"))
        columns[f"{pair['experiment']}, {pair['train_tokens']:,} tokens"] = cells
    return pd.DataFrame({"Ours / published": list(shown)} | columns) if columns else pd.DataFrame()


def laws_table(summary: Mapping[str, Any], beside: bool = False) -> pd.DataFrame:
    """Exponents with their intervals and, `beside` those of the study, where the laws cross; a row a law."""
    published, claims = (read_published(name) for name in ("power_laws", "claims"))
    theirs = published.set_index("experiment")["alpha"]
    rows = [
        {"Law": f"α of {label}", "Estimate": signed(law["alpha"]) if not law["reason"] else f"none: {law['reason']}"}
        | {"95 % interval": _ends(law["alpha_interval"], signed) or "none"}
        | {"Robust interval": _ends(law["alpha_interval_robust"], signed), "Runs": f"{law['n']}"}
        | {
            "d.o.f.": "" if law["reason"] else f"{law['interval_dof']}",
            "Published": signed(theirs[label]) if beside else "",
        }
        for label, law in summary["configurations"].items()
        if not beside or label in theirs
    ]
    if rows and beside:
        tokens, note = summary["crossover_tokens"], summary["crossover_reason"]
        crossing = float(claims.loc[claims["claim"] == "the two PPLs cross at about", "value"].iloc[0])
        rows.append(
            {"Law": "crossover, tokens", "Estimate": tokens_text(tokens) if tokens else note}
            | {"Published": f"{crossing:,.0f}"}
        )
    table = pd.DataFrame(rows).fillna("")
    return table.loc[:, (table != "").any()]


def audit_table(audit: pd.DataFrame) -> pd.DataFrame:
    """The audit for reading: what does not hold first, numbers with the digits that were printed and one more."""

    def number(row: pd.Series) -> str:
        if isinstance(row["recomputed"], str):
            return row["recomputed"]
        return f"{row['recomputed']:,.{min(len(row['published'].partition('.')[2]) + 1, 4)}f}".replace("-", "−")

    order = ["does not follow", "cannot be tested", "rounding", "holds"]
    audit = audit.sort_values("verdict", key=lambda verdicts: verdicts.map(order.index), kind="stable")
    table = {
        "Verdict": audit["verdict"],
        "Claim": audit["claim"],
        "Published": audit["published"].map(as_printed),
        "Recomputed": audit.apply(number, axis=1),
        "Difference, %": ["" if pd.isna(x) else signed(100 * x, 1) for x in audit["difference"]],
        "Why": audit["why"].str.replace(r"(?<![\w)])-(?=\d)", "−", regex=True),
    }
    return pd.DataFrame(table)
