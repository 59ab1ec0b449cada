"""Models of every kind on the same text, side by side: perplexity, and each against one of them in pairs."""

import math
from collections.abc import Sequence

import pandas as pd

from ctxlm.analysis.explain import Effect, stopped
from ctxlm.analysis.mixture import MIXED_ORDER
from ctxlm.analysis.phrases import against, change
from ctxlm.analysis.replicates import together
from ctxlm.analysis.scaling import paired_difference
from ctxlm.corpus import VOCABULARY

BASE = "A"
"""Label of the model that all others are set against."""
ORDINARY = {
    "networks": "networks without a slow context (which know the corpus's second half where their embedding is ppmi)",
    "n-grams": "n-grams of the training tokens",
    "more": "n-grams that count more text (the corpus's second half, which a ppmi embedding knows)",
}
"""Kinds of ordinary models, as `beside_others` names them."""


LEGEND = (
    "(reads more): the n-gram counts the corpus's second half too, which a ppmi embedding knows. Numbers kept from "
    "token to token are what a model must carry to go on reading. A mixture's test PPL and accuracy are not computed. "
    "Seconds are those of whatever machine a run was made on, not to be compared. The figure is without mixtures and "
    "models of more than twice A's PPL."
)
"""How to read `ranking_table`."""


def ranking(grids: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """One row a label and size, best first: its mean PPL, and its log PPL minus that of `BASE` with its interval.

    Columns train_tokens, experiment, model, ppl, test_ppl, accuracy, seconds, parameters (trained), kept (numbers
    carried from token to token), n (runs), replicates, dof, samples, difference, interval (None: it cannot be given),
    reads_more (text beside the training tokens), slow (has a slow context), mixed (with an n-gram). Sizes without a run
    of `BASE`, and runs judged on other tokens, are left out.

    Args:
        grids: runs and their validation losses by sample, as `scaling.read_grid` gives them, of a grid or several.
    """
    runs, val_by_sample = together(grids)
    rows = []
    for size, here in runs.groupby("train_tokens"):
        tables = dict(iter(val_by_sample[val_by_sample["train_tokens"] == size].groupby("experiment")))
        for label, own in here.groupby("experiment"):
            try:
                found = paired_difference(tables[label], tables[BASE])
            except (KeyError, ValueError):
                continue
            row = {"train_tokens": size, "experiment": label, "model": own["model"].iloc[0], "n": len(own)}
            row |= {"ppl": own["val_ppl"].mean(), "test_ppl": own["test_ppl"].mean()}
            row |= {"accuracy": own["val_accuracy"].mean(), "seconds": own["total_seconds"].mean()}
            row |= {"difference": found.log_ppl, "interval": found.interval, "samples": found.samples}
            row |= {"replicates": found.replicates, "dof": found.dof}
            row |= {"parameters": _parameters(own.iloc[0]), "kept": _kept(own.iloc[0])}
            row |= {"reads_more": bool(own["ngram_second_half"].any()), "slow": bool(own["slow_decay"].any())}
            row["mixed"] = MIXED_ORDER in own and bool(own[MIXED_ORDER].notna().any())
            rows.append(row)
    columns = "train_tokens experiment model n ppl test_ppl accuracy seconds difference interval samples".split()
    columns += ["replicates", "dof", "parameters", "kept", "reads_more", "slow", "mixed"]
    return pd.DataFrame(rows, columns=columns).sort_values(["train_tokens", "ppl"], ignore_index=True)


def _parameters(run: pd.Series) -> int:
    """Trained parameters, those of embedding, head and output bias with them; an n-gram has none."""
    if run["model"] == "context":
        blocks = run["context_block_params"] + run["token_block_params_trained"]
        embedding = 0 if run["phase2_freeze_embedding"] else run["embed_dim"]
        head = 0 if run["use_weight_tying"] else run["embed_dim"] + 1  # it has a bias of its own
        bias = run["use_weight_tying"] and run["output_bias"] != "none"
        return int(blocks + _slow(run) + VOCABULARY * (embedding + head + bias))
    return 0 if run["model"] == "kneser-ney" else int(run["trained_params"])


def _slow(run: pd.Series) -> int:
    """Width of the slow context, and as many gains; 0 where there is none."""
    return run["embed_dim"] if run["slow_decay"] and run["model"] != "kneser-ney" else 0


def _kept(run: pd.Series) -> int:
    """Numbers that a model carries from one token to the next when it generates.

    The context and all but the newest input token; an LSTM's two states a layer; a Transformer's keys and values of a
    window; the slow context, where there is one; an n-gram's last tokens; of a mixture what both need.
    """
    kept, reads = {
        "context": (run["context_dim"], run["num_input_tokens"]),
        "lstm": (2 * run["num_layers"] * run["hidden_dim"], 1),
        "transformer": (2 * run["num_layers"] * run["hidden_dim"] * run["window"], 1),
        "kneser-ney": (0, run["ngram_order"]),
    }[run["model"]]
    mixed = run.get(MIXED_ORDER, 1)
    return int(kept + _slow(run) + max(reads, 1 if pd.isna(mixed) else mixed) - 1)


def ranking_table(ranked: pd.DataFrame) -> pd.DataFrame:
    """`ranking` as it is shown."""
    if ranked.empty:
        return ranked
    gaps = ["" if row.experiment == BASE else change(row.difference, row.interval) for row in ranked.itertuples()]
    table = {
        "Training tokens": ranked["train_tokens"].map("{:,}".format),
        "Model": ranked["experiment"] + ranked["reads_more"].map({True: " (reads more)", False: ""}),
        "Validation PPL": ranked["ppl"].map("{:.1f}".format),
        f"PPL against {BASE}": gaps,
        "Test PPL": ranked["test_ppl"].map("{:.1f}".format).replace("nan", ""),
        "Accuracy, %": (100 * ranked["accuracy"]).map("{:.2f}".format).replace("nan", ""),
        "Trained parameters": ranked["parameters"].map("{:,}".format),
        "Numbers kept from token to token": ranked["kept"].map("{:,}".format),
        "Runs": ranked["n"],
        "Seconds": ranked["seconds"].map("{:,.0f}".format),
    }
    return pd.DataFrame(table)


def ranking_effects(ranked: pd.DataFrame) -> dict[str, list[Effect]]:
    """Training tokens → what every other model does to PPL, for `plots.plot_effects`.

    Models of more than twice the PPL are left out, so that the others can be seen, and mixtures.
    """
    others = ranked[(ranked["experiment"] != BASE) & (ranked["difference"] < math.log(2)) & ~ranked["mixed"]]
    return {
        f"{size:,} tokens": [
            Effect(row.experiment, row.difference, row.interval, row.n, row.replicates, row.dof, row.samples)
            for row in group.itertuples()
        ]
        for size, group in others.groupby("train_tokens")
    }


def beside_others(ranked: pd.DataFrame) -> str:
    """The best ordinary model of each kind, at every size, against the context model `BASE`."""
    kinds = ranked["model"].map({"kneser-ney": "n-grams", "context": ""}).fillna("networks")
    kinds = kinds.mask((kinds == "n-grams") & ranked["reads_more"], "more").mask(ranked["mixed"] | ranked["slow"], "")
    said = []
    for size, group in ranked.groupby("train_tokens"):
        best = group.assign(kind=kinds).drop_duplicates("kind").set_index("kind")  # they are sorted
        parts = [f"of {ORDINARY[kind]} {_beside_base(best.loc[kind])}" for kind in ORDINARY if kind in best.index]
        if parts:
            said.append(f"At {size:,} tokens the lowest PPL is, {'; '.join(parts)}")
    if not said:
        return f"No other model was judged on the same tokens as {BASE}."
    samples = ranked["samples"].iloc[0]
    return (
        f"**Beside ordinary models.** {'. '.join(said)}. Intervals are 95 %, over {samples} "
        "validation samples drawn again in pairs; of single runs they do not cover seeds and training texts."
    )


def chosen_rates(tried: pd.DataFrame) -> str:
    """Which learning rate every network of a grid did best with on held-out training text, and whether both its
    neighbours were tried."""
    said = []
    for label, own in tried.groupby("configuration") if len(tried) else ():
        ppl = own.groupby("phase2_learning_rate")["val_ppl"].mean()
        if len(ppl) == 1:
            said.append(f"{label} {ppl.iloc[0]:.1f} at {ppl.index[0]:g}, the only rate so far")
            continue
        best = ppl.idxmin()
        at = f"{label} {', '.join(f'{value:.1f} at {rate:g}' for rate, value in ppl.items())}"
        edge = "" if ppl.index.min() < best < ppl.index.max() else ", at the edge of what was tried"
        going = own.drop(stopped(own).index)["phase2_learning_rate"].unique()
        early = f" (not yet at its early stop: {', '.join(f'{rate:g}' for rate in going)})" if len(going) else ""
        said.append(f"{at}: lowest at {best:g}{edge}{early}")
    if not said:
        return ""
    held, tokens = tried["held_out_tokens"].iloc[0], tried["train_tokens"].iloc[0]
    return (
        f"**Learning rates.** PPL of the last {held:,} of {tokens:,} training tokens, held out, by learning rate: "
        f"{'; '.join(said)}."
    )


def _beside_base(row: pd.Series) -> str:
    gap = f"{change(row['difference'], row['interval'])} against {BASE}"
    return f"{row['experiment']}, {row['ppl']:.1f}, {gap}: {against(row['interval'], row['replicates'], BASE)}"
