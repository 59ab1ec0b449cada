"""Models of every kind on the same text, side by side: perplexity, and each against one of them in pairs."""

import math
from collections.abc import Sequence

import pandas as pd

from ctxlm.analysis.explain import Effect
from ctxlm.analysis.phrases import change
from ctxlm.analysis.replicates import together
from ctxlm.analysis.scaling import paired_difference
from ctxlm.corpus import VOCABULARY

BASE = "A"
"""Label of the model that all others are set against."""
LEGEND = (
    "(reads more): the n-gram counts the corpus's second half too, which a ppmi embedding knows. Numbers kept from "
    "token to token are what a model must carry to go on reading. Seconds are those of whatever machine a run was made "
    "on, not to be compared. The figure is without models of more than twice A's PPL. Intervals are 95 %, over "
    "validation samples drawn again in pairs; of single runs they do not cover seeds and training texts."
)
"""How to read `ranking_table`."""


def ranking(grids: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """One row a label and size, best first: its mean PPL, and its log PPL minus that of `BASE` with its interval.

    Columns train_tokens, experiment, model, ppl, test_ppl, accuracy, seconds, parameters (trained), kept (numbers
    carried from token to token), n (runs), replicates, dof, samples, difference, interval (None: it cannot be given),
    reads_more (text beside the training tokens). Sizes without a run of `BASE`, and runs judged on other tokens, are
    left out.

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
            rows.append(row | {"reads_more": bool(own["ngram_second_half"].any())})
    columns = "train_tokens experiment model n ppl test_ppl accuracy seconds difference interval samples".split()
    columns += ["replicates", "dof", "parameters", "kept", "reads_more"]
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
    window; the slow context, where there is one; an n-gram's last tokens.
    """
    kept, reads = {
        "context": (run["context_dim"], run["num_input_tokens"]),
        "lstm": (2 * run["num_layers"] * run["hidden_dim"], 1),
        "transformer": (2 * run["num_layers"] * run["hidden_dim"] * run["window"], 1),
        "kneser-ney": (0, run["ngram_order"]),
    }[run["model"]]
    return int(kept + _slow(run) + reads - 1)


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

    Models of more than twice the PPL are left out, so that the others can be seen.
    """
    others = ranked[(ranked["experiment"] != BASE) & (ranked["difference"] < math.log(2))]
    return {
        f"{size:,} tokens": [
            Effect(row.experiment, row.difference, row.interval, row.n, row.replicates, row.dof, row.samples)
            for row in group.itertuples()
        ]
        for size, group in others.groupby("train_tokens")
    }
