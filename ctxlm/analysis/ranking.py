"""Models of every kind on the same text, side by side: perplexity, and each against one of them in pairs."""

import math
from collections.abc import Sequence

import pandas as pd

from ctxlm.analysis.explain import Effect
from ctxlm.analysis.findings import percent
from ctxlm.analysis.scaling import paired_difference


def ranking(grids: Sequence[tuple[pd.DataFrame, pd.DataFrame]], against: str = "A") -> pd.DataFrame:
    """One row a label and size, best first: its mean PPL, and its log PPL minus that of `against` with its interval.

    Columns train_tokens, experiment, ppl, accuracy, minutes, n (runs), samples, difference, interval (None: it cannot
    be given). Sizes without a run of `against`, and runs judged on other tokens, are left out.

    Args:
        grids: runs and their validation losses by sample, as `scaling.read_grid` gives them, of a grid or several.
        against: label of the model that all are set against.
    """
    runs, val_by_sample = (pd.concat(tables) for tables in zip(*grids, strict=True))
    rows = []
    for size, here in runs.groupby("train_tokens"):
        tables = dict(iter(val_by_sample[val_by_sample["train_tokens"] == size].groupby("experiment")))
        for label, own in here.groupby("experiment"):
            try:
                found = paired_difference(tables[label], tables[against])
            except (KeyError, ValueError):
                continue
            row = {"train_tokens": size, "experiment": label, "ppl": own["val_ppl"].mean(), "n": len(own)}
            row |= {"accuracy": own["val_accuracy"].mean(), "minutes": own["total_seconds"].mean() / 60}
            row |= {"difference": found.log_ppl, "interval": found.interval, "samples": found.samples}
            rows.append(row)
    columns = ["train_tokens", "experiment", "ppl", "accuracy", "minutes", "n", "samples", "difference", "interval"]
    return pd.DataFrame(rows, columns=columns).sort_values(["train_tokens", "ppl"], ignore_index=True)


def ranking_table(ranked: pd.DataFrame, against: str = "A") -> pd.DataFrame:
    """`ranking` as it is shown."""
    if ranked.empty:
        return ranked
    gaps = [
        "" if row.experiment == against else f"{_percent(row.difference)} {_between(row.interval)}"
        for row in ranked.itertuples()
    ]
    table = {
        "Training tokens": ranked["train_tokens"].map("{:,}".format),
        "Model": ranked["experiment"],
        "Validation PPL": ranked["ppl"].map("{:.1f}".format),
        f"PPL against {against}": gaps,
        "Accuracy, %": (100 * ranked["accuracy"]).map("{:.2f}".format),
        "Runs": ranked["n"],
        "Minutes": ranked["minutes"].map("{:.1f}".format),
    }
    return pd.DataFrame(table)


def ranking_effects(ranked: pd.DataFrame, against: str = "A") -> dict[str, list[Effect]]:
    """Training tokens → what every other model does to PPL, for `plots.plot_effects`."""
    others = ranked[ranked["experiment"] != against]
    return {
        f"{size:,} tokens": [
            Effect(f"{row.experiment}, {size:,} tokens", row.difference, row.interval, row.n, 1, row.samples - 1)
            for row in group.itertuples()
        ]
        for size, group in others.groupby("train_tokens")
    }


def beside_others(ranked: pd.DataFrame, against: str = "A") -> str:
    """The best of the others at every size, against the context model `against`."""
    said = []
    for size, group in ranked[ranked["experiment"] != against].groupby("train_tokens"):
        best = group.iloc[0]
        verdict = "which of the two is better cannot be told"
        if best["interval"] is not None and not best["interval"][0] <= 0 <= best["interval"][1]:
            verdict = f"it is {'better' if best['difference'] < 0 else 'worse'} than {against}"
        said.append(
            f"at {size:,} tokens {best['experiment']}, with a PPL of {best['ppl']:.1f}, "
            f"{_percent(best['difference'])} {_between(best['interval'])} against {against}: {verdict}"
        )
    if not said:
        return f"No other model was judged on the same tokens as {against}."
    samples = ranked["samples"].iloc[0]
    return (
        f"**Beside ordinary models.** The best of them is {'; '.join(said)}. Intervals are 95 %, over {samples} "
        "validation samples drawn again in pairs; seeds and training texts are not counted."
    )


def _percent(nats: float) -> str:
    return percent(math.expm1(nats))


def _between(interval: tuple[float, float] | None) -> str:
    return "(no interval)" if interval is None else f"({' to '.join(map(_percent, interval))})"
