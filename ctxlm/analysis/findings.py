"""What the runs of a grid say, in sentences: every number in them is computed from the runs."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from IPython.display import Markdown

from ctxlm.analysis.explain import stopped
from ctxlm.analysis.phrases import (
    SINGLE,
    change,
    change_if_known,
    count,
    p_text,
    percent,
    sizes_text,
    span,
    steeper,
    tokens_text,
    winner,
)
from ctxlm.analysis.reasons import slope_verdict
from ctxlm.analysis.runs import load_runs
from ctxlm.analysis.scaling import LEFT_OUT, PLANNED, PROTOCOL_1, with_phase1

VARIED = {"seed": "seeds", "data_seed": "training texts", "embedding_seed": "signs of the embedding"}
LEAD = "**Deep and narrow, or shallow and wide?** "


def nothing(grid: str, left_out: int = 0) -> str:
    """The sentence for a grid without a finished run of the models asked for, or with none of its own parameters."""
    if left_out:
        return (
            f"Grid {grid} has {count(left_out, 'finished run')}, of other parameters than the grid file's: run `make "
            f"report GRID={grid}` again."
        )
    if grid.startswith(PROTOCOL_1):
        return f"No finished run of grid {grid}: restore data/results/{grid} by git."
    runs = load_runs(grid)
    if len(runs) and (runs["model"] != "context").any():
        return (
            f"Grid {grid} has no finished run of the context model; other models have their own section of the report."
        )
    return f"No finished run of grid {grid}: run `make report GRID={grid}`."


def findings(runs: pd.DataFrame, summary: dict[str, Any], pooled: Sequence[dict[str, Any]]) -> list[str]:
    """Paragraphs about the runs, the answer to "deep and narrow, or shallow and wide?" first.

    Args:
        runs: one row a run, as `scaling.read_grid` gives them.
        summary: `scaling.summarise` of the same runs.
        pooled: of `crossing.errors` of the same runs: whether slopes differ.
    """
    if runs.empty:
        return [nothing(summary["grid"], runs.attrs.get(LEFT_OUT, 0))]
    paragraphs = [*answers(runs, summary)]
    tested = {(found["a"], found["b"]): found for found in pooled}
    for pair in summary["crossovers"]:
        paragraphs.append(_crossover(pair, summary["configurations"], tested.get((pair["a"], pair["b"]), {})))
    return paragraphs


def prose(paragraphs: Iterable[str]) -> Markdown:
    """Paragraphs for a notebook; empty ones are left out, and no line begins with a per cent sign.

    They are Markdown, but hold no HTML: a name that looks like it, as of a corpus's file, is shown as it is.
    """
    return Markdown("\n\n".join(paragraphs).replace(" %", "\u00a0%").replace("<", "&lt;"))


def origin(grid: str, runs: pd.DataFrame, stood_in: int = 0) -> str:
    """Which grid a section is made from, of how many runs of what, and where they lie.

    `stood_in` more are taken from grid study.
    """
    stale = runs.attrs.get(LEFT_OUT, 0)
    if runs.empty:
        return nothing(grid, stale)
    models, unfinished = shapes_text(runs), ""
    if (runs["model"] == "context").all():
        unfinished = _unfinished(runs)
    else:
        models = f"other models ({', '.join(sorted(runs['experiment'].unique()))})"
    sizes, replicates = sizes_text(sorted(runs["train_tokens"].unique())), runs["replicate"].nunique()
    independent = count(replicates, "replicate")
    finished, planned = count(len(runs), "run"), runs.attrs.get(PLANNED, len(runs))
    if stood_in:
        finished += f" and {stood_in} of grid study"
    if planned > len(runs) + stood_in:
        finished += f", of {planned} planned,"
    stale = f" {count(stale, 'more run')} of other parameters than the grid file's left out." if stale else ""
    corpora, embeddings = (" and ".join(sorted(runs[name].unique())) for name in ("corpus", "embedding"))
    return (
        f"Grid {grid}: {finished} in {independent}, trained on {sizes}: {models}; corpus {corpora}, {embeddings} "
        f"embeddings of {span(runs['embed_dim'])} dimensions, {span(runs['val_samples'])} validation samples. "
        f"Source: {sources(runs)}.{stale}{unfinished}{one_kind(runs)}"
    )


def shapes_text(runs: pd.DataFrame) -> str:
    """What each configuration is; of those that are alike, the first, and how many more."""
    shape = ["num_layers", "context_dim", "design"]
    shapes = runs.groupby("configuration")[shape].first().reset_index().groupby(shape, sort=False)["configuration"]
    said = []
    for (layers, width, design), labels in shapes:
        more = f" (and {len(labels) - 1} more)" if len(labels) > 1 else ""
        how = f"{width}" if design == "constant" else f"widths that fall to {width}"
        said.append(f"{labels.iloc[0]}{more} {count(layers, 'layer')} of {how}")
    return ", ".join(said)


def sources(runs: pd.DataFrame) -> str:
    """Whether results are this machine's or the repository's."""
    names = {"committed": "committed results (data/results)", "outputs": "runs of this machine (outputs)"}
    return " and ".join(names[source] for source in sorted(runs["source"].unique()))


def one_kind(runs: pd.DataFrame) -> str:
    """A word where runs were made by different versions of the code or of the text, or multiply in different types."""
    said, versions = "", runs["code_hash"].nunique()
    if "data_hash" in runs and runs.groupby(["corpus", "embedding"])["data_hash"].nunique().max() > 1:
        said = " **The corpus's or the embedding's file was another** for some of them: run the grid again."
    if versions > 1:
        commits = ", ".join(str(commit)[:12] for commit in runs.groupby("code_hash")["git_commit"].first())
        said += f" **{versions} versions of the code** made them (commits {commits})."
    if runs.groupby("experiment")["dtype"].nunique().max() > 1:
        types = " and in ".join(f"{kind} in {n}" for kind, n in runs["dtype"].value_counts().items())
        said += f" **Matrix products** are in {types} of them."
    return said


def gaps(summary: dict[str, Any], published: pd.DataFrame) -> str:
    """The gap between two configurations, published and ours, at every size of both."""
    ppl = published.set_index(["experiment", "train_tokens"])["val_ppl"]
    said, turned = [], []
    for d in summary["paired_differences"]:
        keys = [(d[side], d["train_tokens"]) for side in ("a", "b")]
        if all(key in ppl.index for key in keys):
            theirs, size = ppl[keys[0]] / ppl[keys[1]] - 1, f"{d['train_tokens']:,} tokens"
            if (theirs < 0) != (d["log_ppl"] < 0):
                turned.append(
                    f"{d['a' if theirs < 0 else 'b']} has the lower PPL there, {d['a' if theirs > 0 else 'b']} here, "
                    f"at {size}"
                )
            ours = change(d["log_ppl"], d["interval"])
            said.append(f"{percent(theirs)} published, {ours} ours at {size}")
    if not said:
        return ""
    a, b = summary["paired_differences"][0]["a"], summary["paired_differences"][0]["b"]
    verdict = "; ".join(turned) or "The same configuration has the lower PPL"
    return f"**The gap.** PPL of {a} against {b}: {'; '.join(said)}. {verdict}."


def describe(runs: pd.DataFrame) -> dict[str, str]:
    """What each configuration is: its label with its layers and the width of its context."""
    shapes = runs.groupby("experiment")[["num_layers", "context_dim"]].first()
    (fewest, narrowest), (most, widest) = shapes.min(), shapes.max()
    kinds = {(most, narrowest): "deep and narrow: ", (fewest, widest): "shallow and wide: "}
    if fewest == most or narrowest == widest:
        kinds = {}
    return {
        label: f"{label} ({kinds.get((layers, width), '')}{count(layers, 'layer')}, context {width})"
        for label, layers, width in shapes.itertuples()
    }


def answers(runs: pd.DataFrame, summary: dict[str, Any]) -> Iterable[str]:
    names = describe(runs)
    shapes = len(runs.groupby(["num_layers", "context_dim"]))
    lead = LEAD if shapes > 1 or len(names) == 1 else "**Which is better?** "
    if len(names) == 1:
        yield f"{lead}Only {names[runs['experiment'].iloc[0]]} has been run: there is nothing to compare it with."
    for pair in summary["crossovers"]:  # one entry a pair
        a, b = pair["a"], pair["b"]
        differences = [d for d in summary["paired_differences"] if (d["a"], d["b"]) == (a, b)]
        yield lead + verdict(names, a, b, differences)
        lead = ""
    for pair in summary["unpaired"]:
        yield f"At {pair['train_tokens']:,} tokens {pair['a']} and {pair['b']} are not compared: {pair['reason']}."
    if summary["paired_differences"]:
        samples = span(d["samples"] for d in summary["paired_differences"])
        counts = [d["replicates"] for d in summary["paired_differences"]]
        varied = [what for name, what in VARIED.items() if runs[name].nunique() > 1]
        each = f"{span(runs.groupby(['experiment', 'train_tokens']).size())} for each configuration and size"
        limits = f"They do not cover the seed (runs: {each})."
        if min(counts) > 1:
            limits = f"They cover other {' and '.join(varied)} too (runs: {each}, in {span(counts)} replicates)."
        elif max(counts) > 1:
            limits = f"They cover other {' and '.join(varied)} only where both have several replicates (runs: {each})."
        yield (
            f"These intervals cover the choice of the {samples} validation samples (on the test text, of its samples), "
            f"on which both configurations were judged token by token. {limits}"
        )


def unconverged(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs whose Phase 1 ran out of iterations."""
    runs = with_phase1(runs)
    return runs[runs["phase1_converged_ratio"] < runs["phase1_min_converged_ratio"]]


def _unfinished(runs: pd.DataFrame) -> str:
    """What runs must be read with: a Phase 1 that ran out of iterations, a Phase 2 that had not come to its stop."""
    labels, going = " and ".join(sorted(unconverged(runs)["experiment"].unique())), len(runs) - len(stopped(runs))
    text = f" Phase 1 of {labels} ran out of iterations before it converged." if labels else ""
    return text + (f" {going} of the runs had not come to their early stop." if going else "")


def verdict(names: dict[str, str], a: str, b: str, differences: list[dict[str, Any]]) -> str:
    """Which of `a` and `b`, called by their `names`, is better at which sizes, by validation and by test text.

    `differences` are those of `scaling.with_tests` for the pair.
    """
    if not differences:
        return f"{names[a]} and {names[b]} cannot be compared: no amount of training text was given to both."
    said = (
        f"{_winners(names, a, b, differences)}. Validation PPL of {a} against {b}, with 95 % intervals (below 0, {a} "
        f"is better): {_values(differences)} tokens."
    )
    return f"{said} {tested[0].upper()}{tested[1:]}." if (tested := on_test(a, b, differences)) else said


def on_test(a: str, b: str, differences: list[dict[str, Any]]) -> str:
    """What the test text says of the same runs, without a full stop; nothing where they were not judged on one."""
    tested = [d | d["test"] for d in differences if d["test"]]
    known = [d for d in tested if d["interval"]]
    plain = [d for d in tested if not d["interval"]]
    without = f"without intervals: {_values(plain, change_if_known)} tokens"
    if not known:
        return f"on the test text, {without}" if plain else ""
    which = f"on the test text ({span(d['samples'] for d in known)} samples, which decided nothing)"
    said = f"{which} {_winners({a: a, b: b}, a, b, known)}: {_values(known)} tokens"
    return f"{said}; {without}" if plain else said


def _values(differences: list[dict[str, Any]], text: Callable[..., str] = change) -> str:
    return "; ".join(f"{text(d['log_ppl'], d['interval'])} at {d['train_tokens']:,}" for d in differences)


def _winners(names: dict[str, str], a: str, b: str, differences: list[dict[str, Any]]) -> str:
    """Which of the two is better at which sizes, without a full stop."""
    single = SINGLE if min(d["replicates"] for d in differences) == 1 else ""
    won = {label: [d["train_tokens"] for d in differences if winner(d) == label] for label in (a, b, None)}
    undecided = won.pop(None)
    winners = sorted((label for label in won if won[label]), key=lambda label: won[label][0])
    tied = f"; at {sizes_text(undecided)} they cannot be told apart" if undecided else ""
    if not winners:
        return f"{names[a]} and {names[b]} **cannot be told apart** at {sizes_text(undecided)}: no interval excludes 0"
    if len(winners) == 1:
        other = b if winners == [a] else a
        rest = tied or (", every size that both were judged on" if len(differences) > 1 else "")
        better = "did better, in single runs, than" if single else "is better than"
        return f"{names[winners[0]]} **{better}** {names[other]} at {sizes_text(won[winners[0]])}{rest}"
    both = ", ".join(f"{names[label]} is better at {sizes_text(won[label])}" for label in winners)
    return f"**It depends on the amount of text**{single}: {both}{tied}"


def _crossover(pair: dict[str, Any], laws: dict[str, Any], tested: dict[str, Any]) -> str:
    a, b = pair["a"], pair["b"]
    if pair["tokens"] is None:
        return f"**Crossover.** None can be claimed between {a} and {b}: {pair['reason']}."
    low = max(laws[label]["tokens_min"] for label in (a, b))
    high = min(laws[label]["tokens_max"] for label in (a, b))
    below, above = (a, b) if laws[a]["alpha"] > laws[b]["alpha"] else (b, a)
    where = f"inside the measured range ({low:,} to {high:,})"
    if pair["extrapolated"]:
        where = f"extrapolated from {low:,} to {high:,}" if low <= high else "extrapolated, for no size of both is near"
    meet = f"the fitted laws of {a} and {b} meet at about {tokens_text(pair['tokens'])} tokens, {where}"
    why = tested.get("refused")
    if tested.get("slope_interval") and not steeper(tested):
        why = f"{slope_verdict(tested)} (p {p_text(tested['p_value'])})"
    elif not why and min(laws[label]["residual_dof"] for label in (a, b)) == 0:
        why = "nothing says how surely: the laws have no degrees of freedom"
    if why:
        return f"**Crossover.** None can be claimed: {meet}, but {why}."
    return (
        f"**Crossover.** {meet[0].upper()}{meet[1:]}: by them, {below} is better below, {above} above. How well it is "
        "known is said under “How sure are the laws?”."
    )


def audited(audit: pd.DataFrame) -> str:
    """How many of the study's claims hold, and which do not."""
    counts = audit["verdict"].value_counts()
    said = {
        "holds": "hold to the printed digit",
        "rounding": "are off by rounding",
        "does not follow": "do not follow from its own tables",
        "cannot be tested": "cannot be tested with them",
    }
    parts = [f"{counts[verdict]} {words}" for verdict, words in said.items() if verdict in counts]
    wrong = audit.loc[audit["verdict"] == "does not follow"]
    which = [f"{row.claim}: {as_printed(row.published)}" for row in wrong.itertuples()]
    sentence = f"**The audit.** Of {len(audit)} claims, {'; '.join(parts)}."
    return sentence + (f" What does not follow: {'; '.join(which)}." if which else "")


def as_printed(published: str) -> str:
    """A value of the study, minus signs and digits set as the report sets its own."""
    return re.sub(r"(?<![\d.])\d{4,}", lambda digits: f"{int(digits[0]):,}", published.replace("-", "−"))
