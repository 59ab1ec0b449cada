"""The tuned recipe: what it does beside the study's and beside ordinary models, and what each ingredient is worth."""

from collections.abc import Sequence

import pandas as pd

from ctxlm.analysis import explain
from ctxlm.analysis.phrases import against, change, percent
from ctxlm.analysis.replicates import together
from ctxlm.analysis.scaling import Grid, paired_difference
from ctxlm.config import Experiment

CHOSEN = "The recipe was chosen on held-out training text alone; the epoch is chosen by validation, as in every run."
NO_INGREDIENTS = {"experiment", "seed", "data_seed", "train_tokens", "device", "dtype"}


def recipe(grid: Grid, others: Sequence[Grid], models: Sequence[str], lead: str = "The tuned recipe.") -> str:
    """The grid's PPL at every size, in pairs against each of the labels `models` of the grids `others`."""
    if grid[0].empty:
        return ""
    runs, _, known = together([grid, *others])
    val_by_sample, known = known[known["grid"] == 0], known[known["grid"] > 0]
    reads, runs = runs[runs["grid"] > 0].set_index("run")[["model", "embedding", "embed_dim"]], runs[runs["grid"] == 0]
    said, replicates = [], []
    for (size, label), group in runs.groupby(["train_tokens", "experiment"]):
        mine = val_by_sample[val_by_sample["run"].isin(group["run"])]
        gaps = []
        for other in models:
            theirs = known[(known["experiment"] == other) & (known["train_tokens"] == size)]
            if theirs.empty:
                continue
            try:
                found = paired_difference(mine, theirs)
            except ValueError:  # judged on other text
                continue
            replicates.append(found.replicates)
            verdict = against(found.interval, found.replicates, other)
            apart = _other_embedding(group, reads.loc[theirs["run"].unique()])
            gaps.append(f"{change(found.log_ppl, found.interval)}, {verdict}{apart}")
        later = group["epochs_run"] - group["best_epoch"]
        ends = f"; it ends {percent(group['overfit_rate'].mean())} above its best, {_epochs(later)} later"
        if not later.any():
            ends = "; it ends at its best"
        if later.isna().any():  # a mixture has no epochs
            ends = ""
        versus = f": {'; '.join(gaps)}" if gaps else ""
        said.append(f"{label} at {size:,} tokens has a PPL of {group['val_ppl'].mean():.1f}{versus}{ends}")
    single = "" if min(replicates, default=1) > 1 else "; of single runs they do not cover seeds and training texts"
    samples = val_by_sample["sample"].nunique()
    return (
        f"**{lead}** {'. '.join(said)}. Intervals are 95 %, over {samples} validation samples drawn again in "
        f"pairs{single}."
    )


def _other_embedding(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """A reminder where a difference is one of embeddings too; n-grams have none."""
    networks = theirs[theirs["model"] != "kneser-ney"]
    read, reads = (set(runs.groupby(["embedding", "embed_dim"]).groups) for runs in (networks, ours))
    return " (which reads another embedding)" if read - reads else ""


def _epochs(later: pd.Series) -> str:
    low, high = later.min(), later.max()
    # beside n-grams, which have no epochs, the numbers are no longer integers
    return f"{low:g}{'' if low == high else f' to {high:g}'} epoch{'' if high == 1 else 's'}"


def ingredients(tuned: Grid, without: Grid) -> pd.DataFrame:
    """What happens to PPL when one ingredient is left out: a row a label of `without`, the worst loss first.

    Columns experiment, changed (parameters and their values), against (the label of `tuned` it is a pair with), ppl,
    effect (`explain.Effect`), best_epoch, overfit_rate. Labels without a run of equal size, seed and text in `tuned`
    are left out.
    """
    rows = []
    if tuned[0].empty or without[0].empty:
        return pd.DataFrame()
    runs, _, val_by_sample = together([tuned, without])
    for label, group in without[0].groupby("experiment"):
        whole = max((base for base in tuned[0]["experiment"].unique() if label.startswith(base)), key=len, default="")
        try:
            effect = explain.paired_effect(runs, label, whole, val_by_sample=val_by_sample)
        except ValueError:  # no two that belong together, or judged on other text
            continue
        base = tuned[0][tuned[0]["experiment"] == whole].iloc[0]
        names = [n for n in Experiment.model_fields if n not in NO_INGREDIENTS]
        changed = [f"{n} = {group[n].iloc[0]}" for n in names if group[n].iloc[0] != base[n]]
        row = {"experiment": label, "against": whole, "changed": ", ".join(changed), "effect": effect}
        rows.append(row | group[["val_ppl", "best_epoch", "overfit_rate"]].mean().to_dict())
    found = pd.DataFrame(rows)
    return found.sort_values("effect", key=lambda e: e.map(lambda x: -x.estimate)) if rows else found


def ingredients_table(found: pd.DataFrame) -> pd.DataFrame:
    """`ingredients` as it is shown."""
    if found.empty:
        return found
    effects = found["effect"]
    table = {
        "Instead of the recipe's": found["changed"],
        "Validation PPL": found["val_ppl"].map("{:.1f}".format),
        "Change of PPL": [change(e.estimate, e.interval) for e in effects],
        "Best epoch": found["best_epoch"].map("{:.3g}".format),
        "Over-fitting, %": (100 * found["overfit_rate"]).map("{:+.0f}".format).str.replace("-", "−"),
        "Pairs": [effect.n for effect in effects],
    }
    return pd.DataFrame(table)
