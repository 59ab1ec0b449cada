"""Other recipes for Phase 2: beside the study's, ordinary models and one another, and what ingredients are worth."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from ctxlm.analysis import explain
from ctxlm.analysis.mixture import CACHE_DECAY, CACHE_SHARE, CACHED
from ctxlm.analysis.phrases import change, percent, span
from ctxlm.analysis.replicates import together
from ctxlm.analysis.scaling import Grid, PairedDifference, paired_difference
from ctxlm.config import Experiment

MARK = "*"
CHOSEN = (
    "The recipe was chosen on held-out training text alone; the epoch is chosen by validation, as in every run. PPL "
    f"without one ingredient, in pairs with the whole recipe ({MARK}: the interval does not cover seeds and texts):"
)
LEGEND = (
    "PPL against other models', in pairs: below 0 it is lower than the column's; an interval that holds 0 cannot tell "
    "them apart. Intervals are 95 %, over validation samples drawn again and over replicates; where both have fewer "
    f"than two in common, marked by {MARK}, they do not cover seeds and training texts. Columns of models that read "
    "through an embedding name it."
)
"""How to read `beside`."""
BEFORE = {"joint": "tuned", "slow": "joint", "lean": "slow", "-slow": "", CACHED: ""}
BEFORE |= {"slow-A": "LSTM-slow", "lean-A": "LSTM-slow"}
"""What a part of a label stands in the place of: the recipe that a recipe goes on from; nothing, for a slow context of
networks (LSTM-slow) and for a cache; the network with the same memory, for slow-A and lean-A."""
APART = (
    "In pairs with the {} recipe's runs, PPL changes as follows; what each of the {} does was tried on held-out text "
    f"only, docs/findings.md ({MARK}: the interval does not cover seeds and training texts)."
)
DIFFERENCES = {
    "joint": "Three things are not as in the tuned recipe, chosen for A on held-out training text: the ContextBlock "
    "starts from small weights, Phase 1 is left out, and Phase 2 trains the ContextBlock together with the TokenBlock. "
    + APART.format("tuned", "three"),
    "slow": "Two things are not as in the joint recipe: through a trained gain the head also reads a slow context, a "
    "sum of the embeddings of the tokens read that decays by 2 % a token and gives rare tokens more weight, so that it "
    "can carry which words were used a hundred tokens ago; and in training a fifth of the TokenBlock's input tokens is "
    "blanked. That such a memory is worth having was seen on validation text; its decay was chosen for A on held-out "
    "training text. An LSTM and a Transformer can have it too: labels with slow in grid networks. "
    + APART.format("joint", "two"),
    "lean": "Two things are not as in the slow recipe, chosen for A on held-out training text: both blocks read a "
    "single token at a time instead of two, so that what came before reaches the TokenBlock through its contexts alone "
    "and there are fewer weights; and the learning rate falls from the first update on, without warm-up, over six "
    "epochs instead of five. The networks keep the tuned recipe's schedule. " + APART.format("slow", "two"),
    CACHED: "A cache gives every token its share of the tokens read, each of which weighs "
    f"{100 * (1 - CACHE_DECAY):g} % less than the one after it; it is mixed in with {100 * CACHE_SHARE:g} % of every "
    "token's probability, for all models alike. Nothing is trained, but a number for every token of the vocabulary is "
    "kept from token to token. Decay and share were chosen for the slow recipe on held-out training text; that a cache "
    "helps was seen on validation text before. In pairs with the same run without it, PPL changes as follows "
    f"({MARK}: the interval does not cover seeds and training texts).",
    "mixed": "Every token gets half the sum of the probabilities that a model and an n-gram give to it. In pairs with "
    f"each of the two alone, PPL changes as follows ({MARK}: the interval does not cover seeds and training texts).",
}
"""What is not as in the recipe before, or as in a model alone."""
NO_INGREDIENTS = {"experiment", "seed", "data_seed", "train_tokens", "device", "dtype"}


def beside(grids: Sequence[Grid], others: Sequence[Grid], models: Sequence[str]) -> pd.DataFrame:
    """A row a label and size of `grids`, with a column for each label `models` of `others`: PPL against it in pairs.

    Runs that were judged on other text, or at no equal size, leave their cell empty, and models without any their
    column out.
    """
    table = pd.DataFrame([row for grid in grids if len(grid[0]) for row in _rows(grid, others, models)]).fillna("")
    return table.loc[:, (table != "").any()]


def _rows(grid: Grid, others: Sequence[Grid], models: Sequence[str]) -> Iterator[dict[str, Any]]:
    runs, _, val_by_sample = together([grid, *others])
    ours, theirs = (runs[side] for side in (runs["grid"] == 0, runs["grid"] > 0))
    for (label, size), group in ours.groupby(["experiment", "train_tokens"]):
        row = {"Model": label, "Training tokens": f"{size:,}", "Embedding": group["embedding"].iloc[0]}
        row |= {"Runs": len(group), "Validation PPL": f"{group['val_ppl'].mean():.1f}"}
        row["Test PPL"] = "" if group["test_ppl"].isna().any() else f"{group['test_ppl'].mean():.1f}"
        row["Last PPL above best"] = _end(group)
        for other in models:
            known = theirs[(theirs["experiment"] == other) & (theirs["train_tokens"] == size)]
            found = None if other == label else paired(group, known, val_by_sample)
            if found:
                read = "" if (known["model"] == "kneser-ney").all() else f" ({known['embedding'].iloc[0]})"
                row[f"Against {other}{read}"] = _change(found.log_ppl, found).replace(" (", "<br>(")
        yield row


def mixtures_table(mixed: Grid, alone: Sequence[Grid]) -> pd.DataFrame:
    """A row a mixture of a model and an n-gram, and size, best first: its PPL, and that against each of its parts."""
    if mixed[0].empty:
        return mixed[0]
    runs, _, val_by_sample = together([mixed, *alone])
    rows: list[dict[str, Any]] = []
    groups = runs[runs["grid"] == 0].groupby(["train_tokens", "experiment"])
    for (size, label), mine in sorted(groups, key=lambda group: (group[0][0], group[1]["val_ppl"].mean())):
        row = {"Training tokens": f"{size:,}", "Mixture": label, "Validation PPL": f"{mine['val_ppl'].mean():.1f}"}
        for part, what in zip(label.split(" + "), ("model", "n-gram"), strict=True):
            known = runs[(runs["experiment"] == part) & (runs["train_tokens"] == size)]
            found = paired(mine, known, val_by_sample)
            row[f"Against the {what} alone"] = _change(found.log_ppl, found) if found else ""
        rows.append(row | {"Runs": len(mine)})
    return pd.DataFrame(rows)


def paired(runs: pd.DataFrame, others: pd.DataFrame, val_by_sample: pd.DataFrame) -> PairedDifference | None:
    """`runs` against `others`; None where there is none of the others, or both were judged on other text."""
    mine, theirs = (val_by_sample[val_by_sample["run"].isin(own["run"])] for own in (runs, others))
    with contextlib.suppress(ValueError):
        return paired_difference(mine, theirs) if len(others) else None
    return None


def _change(nats: float, found: PairedDifference | explain.Effect) -> str:
    mark = MARK if found.replicates < 2 else ""
    return change(nats, found.interval).replace(" (", f"{mark} (")


def _end(runs: pd.DataFrame) -> str:
    """How far above its best PPL ends, and how many epochs later; of a mixture, which has no epochs, nothing."""
    later = runs["epochs_run"] - runs["best_epoch"]
    if later.isna().any():
        return ""
    # beside n-grams, which have no epochs, the numbers are no longer integers
    epochs = span(later, "{:g}".format)
    return f"{percent(runs['overfit_rate'].mean())}, {epochs} epoch{'' if epochs == '1' else 's'} later"


def counterparts(grids: Sequence[Grid], name: str) -> pd.DataFrame:
    """What `name` of `BEFORE` changes: a row a label that has it in, and size that its counterpart is known at, too.

    Columns experiment, against, train_tokens, n, difference (a `PairedDifference`), ppl, ppl_against, overfit_rate,
    overfit_rate_against. Pairs that were judged on other text are left out.
    """
    runs, _, val_by_sample = together(grids)
    rows: list[dict[str, Any]] = []
    if runs.empty:
        return pd.DataFrame(rows)
    named = runs[runs["experiment"].str.contains(name, regex=False)]
    for (label, size), mine in named.groupby(["experiment", "train_tokens"]):
        other = label.replace(name, BEFORE[name])
        known = runs[(runs["experiment"] == other) & (runs["train_tokens"] == size)]
        found = paired(mine, known, val_by_sample)
        if found:
            row = {"experiment": label, "against": other, "train_tokens": size, "n": len(mine), "difference": found}
            for key, column in (("ppl", "val_ppl"), ("overfit_rate", "overfit_rate")):
                row |= {key: mine[column].mean(), f"{key}_against": known[column].mean()}
            rows.append(row)
    return pd.DataFrame(rows)


def counterparts_table(found: pd.DataFrame) -> pd.DataFrame:
    """`counterparts` as it is shown."""
    if found.empty:
        return found
    table = {
        "Model": found["experiment"],
        "Training tokens": found["train_tokens"].map("{:,}".format),
        "Validation PPL": found["ppl"].map("{:.1f}".format),
        "Counterpart": found["against"],
        "Its PPL": found["ppl_against"].map("{:.1f}".format),
        "Change of PPL": [_change(difference.log_ppl, difference) for difference in found["difference"]],
    }
    if found["overfit_rate"].notna().all():  # else mixtures, which have no epochs
        table["Last PPL above best"] = found["overfit_rate"].map(percent)
        table["The counterpart's"] = found["overfit_rate_against"].map(percent)
    return pd.DataFrame(table | {"Runs": found["n"]})


def ingredients(tuned: Grid, without: Grid) -> pd.DataFrame:
    """What happens to PPL when one ingredient is left out: a row a label of `without`, the worst loss first.

    Columns experiment, changed (parameters and their values), against (the label of `tuned` it is a pair with), ppl,
    effect (`explain.Effect`), best_epoch, overfit_rate (nan where no run came to its early stop). Labels without a run
    of equal size, seed and text in `tuned` are left out.
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
        row["overfit_rate"] = explain.stopped(group)["overfit_rate"].mean()
        rows.append(row | group[["val_ppl", "best_epoch"]].mean().to_dict())
    found = pd.DataFrame(rows)
    return found.sort_values("effect", key=lambda e: e.map(lambda x: -x.estimate)) if rows else found


def ingredients_table(found: pd.DataFrame) -> pd.DataFrame:
    """`ingredients` as it is shown."""
    if found.empty:
        return found
    effects = found["effect"]
    rates = (100 * found["overfit_rate"]).map("{:+.0f}".format).str.replace("-", "−")
    table = {
        "Recipe": found["experiment"],
        "What it has instead": found["changed"],
        "Validation PPL": found["val_ppl"].map("{:.1f}".format),
        "Change of PPL": [_change(effect.estimate, effect) for effect in effects],
        "Best epoch": found["best_epoch"].map("{:.3g}".format),
        "Over-fitting, %": rates.replace("+nan", "no early stop"),
        "Pairs": [effect.n for effect in effects],
    }
    return pd.DataFrame(table)
