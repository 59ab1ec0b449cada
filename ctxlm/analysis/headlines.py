"""The report's first lines: what other grids know, a question a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ctxlm.analysis import explain, proposals, ranking, reasons, recipe, variance
from ctxlm.analysis.findings import on_test, shapes_text, verdict
from ctxlm.analysis.phrases import (
    change,
    count,
    effect_text,
    magnitude,
    p_text,
    percent,
    percents,
    sizes_of,
    span,
    steeper,
    winner,
)
from ctxlm.analysis.reasons import ABLATIONS
from ctxlm.analysis.runs import load_table
from ctxlm.analysis.scaling import CELL, PROTOCOL_1, Grid, differences, with_tests
from ctxlm.memory import FORGOTTEN

ORDINARY = ("LSTM", "Transformer", "KN-4", "KN-4-second-half")
"""What a user would otherwise pick, of grids networks and baselines."""
LEARNING = "small contexts that skip Phase 1 and are trained in Phase 2"
SLOW = "a slow context and a fifth of the input tokens blanked in training"
LEAN = "one input token instead of two and no warm-up"
IN_ITS_PLACE = "the context model in the LSTM's place, both with a slow context"


def elsewhere(pooled: Sequence[dict[str, Any]], grids: Mapping[str, Grid]) -> pd.DataFrame:
    """What the grids of this repository know: a row a question that can be answered.

    Args:
        pooled: of `crossing.errors`, from the runs that say most about slopes (grid variance's).
        grids: of the names study, sizes, baselines, networks, tuned, joint, slow, lean, variance, signs, overfitting,
            ablations, ablations-full and factorial, each as protocol 1 judged its runs.
    """
    many, _, many_val = grids["variance"]
    study = grids["study"]
    slopes = "; ".join(filter(None, map(_slopes, pooled)))
    ordinary, parts = ("baselines", "networks"), "What do Phase 1 and the contexts contribute{}?"
    memories = (("joint", "slow"), "slow", SLOW), (("networks",), "-slow", "a slow context")
    memories += ((("slow", "networks"), "slow-A", IN_ITS_PLACE),)
    leaner = (("slow", "lean"), "lean", LEAN), (("lean", "networks"), "lean-A", IN_ITS_PLACE)
    sized = proposals.with_study(grids["sizes"], study) if len(grids["sizes"][0]) else study
    longer, fewer = ("; ".join(filter(None, (_step(grids, *step) for step in steps))) for steps in (memories, leaner))
    rows = [
        (
            "Deep and narrow, or shallow and wide?",
            _gaps(sized, ""),
            "full",
            ("study", "sizes"),
        ),
        ("And with other seeds and texts?", _gaps(grids["variance"], f"{PROTOCOL_1}variance"), "quick", ("variance",)),
        ("How much is chance?", _caution(many, many_val), "quick", ("variance",)),
        (
            "Do the signs of the embedding matter?",
            _signs(grids["signs"], grids["variance"]),
            "quick",
            ("signs", "variance"),
        ),
        ("What are depth and width worth?", _crossed(grids["factorial"]), "quick", ("factorial",)),
        ("Do the curves cross?", slopes, "quick", ("variance",)),
        ("Does Phase 2 over-fit?", _overfitting(grids["overfitting"]), "quick", ("overfitting",)),
        ("Does it over-fit without the contexts?", _without_contexts(grids["ablations"][0]), "quick", ("ablations",)),
        ("How far back do contexts reach?", _reach(many), "quick", ("variance",)),
        (parts.format(""), _ablations(grids["ablations"]), "quick", ("ablations",)),
        (parts.format(" at full size"), _ablations(grids["ablations-full"]), "full", ("ablations-full",)),
        (
            "What would a user otherwise pick?",
            _beside_a(study, [grids[name] for name in ordinary], ORDINARY),
            "full",
            ("study", *ordinary),
        ),
        ("What does another recipe for Phase 2 do?", _beside_a(study, [grids["tuned"]]), "full", ("study", "tuned")),
        (
            "And if contexts learn to predict, too?",
            _step(grids, ("tuned", "joint"), "joint", LEARNING),
            "full",
            ("tuned", "joint"),
        ),
        ("What does a longer memory bring?", longer, "full", ("joint", "slow", "networks")),
        ("And a single input token?", fewer, "full", ("slow", "lean", "networks")),
    ]
    said = [
        (
            question,
            f"{text[0].upper()}{text[1:].rstrip('.')}.",
            f"{scale}: {', '.join(n for n in names if len(grids[n][0]))}",
        )
        for question, text, scale, names in rows
        if text
    ]
    return pd.DataFrame(said, columns=["Question", "Answer", "Scale: grids"])


def scales(grids: Mapping[str, Grid]) -> str:
    """What A and B are at the two scales of `elsewhere`, as its heading; grids as there."""
    known = {"quick": grids["variance"][0], "full": grids["study"][0]}
    said = "; ".join(f"{scale}: {shapes_text(runs)}" for scale, runs in known.items() if len(runs))
    return f"**What the grids of this repository say**{said and f' ({said})'}:"


def _caution(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    """What a reader of single runs must know of chance: nothing where it has not been measured."""
    if runs.empty:
        return ""
    try:
        sds = [
            variance.components(own, val_by_sample[val_by_sample["run"].isin(own["run"])]).set_index("source")["sd"]
            for _, own in runs.groupby("train_tokens")
        ]
    except ValueError:
        return ""
    scatter = span([sd["run"] for sd in sds], magnitude)
    text = (
        f"with other seeds and training texts, PPL scatters about its mean by {scatter} "
        f"(standard deviation, size by size, {len(runs)} runs)"
    )
    losses = runs.pivot_table(index=CELL, columns="experiment", values="val_loss").dropna()
    if losses.shape[1] != 2:
        return text
    a, b = losses
    apart = (losses[a] - losses[b]).groupby("train_tokens").std()
    return f"{text}, PPL of {a} against {b}, of equal seed and text, by {span(apart, magnitude)}"


def _gaps(grid: Grid, name: str) -> str:
    """Which of two configurations is better, and their PPL in pairs, size by size, or in short where none is.

    Losses by test sample are looked for in the grid of this `name`.
    """
    gaps = differences(grid[2])[0] if len(grid[0]) else []
    if not gaps:
        return ""
    gaps = with_tests(gaps, grid[0], load_table(name, "test_by_sample.csv") if name else None)
    a, b = gaps[0]["a"], gaps[0]["b"]
    if any(map(winner, gaps)):
        return verdict({label: label for label in (a, b)}, a, b, gaps).replace("**", "")
    found, ends = [gap["log_ppl"] for gap in gaps], [end for gap in gaps for end in gap["interval"] or ()]
    estimates = percents((min(found), max(found)))
    within = f"intervals within {percents((min(ends), max(ends)))}; " if ends else ""
    runs = f"{count(len(grid[0]), 'run')} in {count(grid[0]['replicate'].nunique(), 'replicate')}"
    tested = on_test(a, b, gaps).replace("**", "")
    return (
        f"on {span(d['samples'] for d in gaps)} validation samples {a} and {b} cannot be told apart at any of "
        f"{count(len(gaps), 'size')} ({estimates}; {within}{runs}){tested and f'; {tested}'}"
    )


def _signs(drawn: Grid, fixed: Grid) -> str:
    verdicts = "PPL is higher with them", "PPL is lower with them"
    changes = [
        f"{label} {effect_text(effect)}, {reasons.effect_verdict(effect, *verdicts)}"
        for label, effects in reasons.signs(drawn, fixed).items()
        for effect in effects
        if effect.name == reasons.DRAWN
    ]
    scatter = reasons.scatter(drawn[0], fixed[0]).rstrip(".")
    what = "random signs of the embedding's dimensions, which are arbitrary, change PPL"
    return f"{what}: {'; '.join([*changes, scatter[:1].lower() + scatter[1:]])}".rstrip("; ") if changes else ""


def _crossed(grid: Grid) -> str:
    runs, _, val_by_sample = grid
    try:
        depth, width, *_ = explain.factorial_effects(runs, val_by_sample=val_by_sample)
    except (ValueError, KeyError):
        return ""
    parts = " and ".join(f"{effect_text(effect)} with {effect.name}" for effect in (depth, width))
    runs_in = f"{depth.n} runs in {count(depth.replicates, 'replicate')}"
    return f"with depth and width crossed ({runs_in}), PPL changes by {parts} (plus: worse)"


def _slopes(found: dict[str, Any]) -> str:
    if found.get("slope_interval") is None:
        return ""
    tested = f"p {p_text(found['p_value'])}, {found['n']} runs in {count(found['replicates'], 'replicate')}"
    no = "" if steeper(found) else ": no crossover can be claimed"
    return f"{reasons.slope_verdict(found)} ({tested}){no}"


def _overfitting(grid: Grid) -> str:
    if grid[0].empty:
        return ""
    ended = explain.stopped(grid[0])
    ended = ended[ended["phase2_learning_rate"] == proposals.RATE]
    rates = ended.groupby("configuration")["overfit_rate"].mean()
    above = ", ".join(f"{label} {percent(rate)}" for label, rate in rates.items())
    runs = f"{count(len(ended), 'run')} on {sizes_of(ended)}"
    return f"when it stops at the study's learning rate ({runs}), PPL is above its best: {above}" if above else ""


def _without_contexts(runs: pd.DataFrame) -> str:
    rates = runs.groupby("experiment")["overfit_rate"].mean() if len(runs) else pd.Series()
    pairs = {label.removesuffix("-zero"): rate for label, rate in rates.items() if label.endswith("-zero")}
    parts = [f"{x} {percent(rate)} instead of {percent(rates[x])}" for x, rate in pairs.items() if x in rates]
    if not parts:
        return ""
    return f"with zeros in their place, PPL ends above its best on {sizes_of(runs)}: {', '.join(parts)}"


def _reach(runs: pd.DataFrame) -> str:
    if "horizon" not in runs or runs["horizon"].isna().any():
        return ""
    spans = runs.groupby("experiment")["horizon"].mean()
    reach = ", ".join(f"{label} {tokens:.1f} tokens" for label, tokens in spans.items())
    return f"{reach}, until {100 * FORGOTTEN:.0f} % of a disturbance is left"


def _ablations(grid: Grid) -> str:
    runs, _, val_by_sample = grid
    meaning = {what: own for what, *own in ABLATIONS.values()}
    parts = [
        f"of {label} with {effect.name} {effect_text(effect)}: {reasons.effect_verdict(effect, *meaning[effect.name])}"
        for label, effects in reasons.ablations(runs, val_by_sample).items()
        for effect in effects
    ]
    return f"PPL changes, {'; '.join(parts)}" if parts else ""


def _beside_a(study: Grid, others: Sequence[Grid], labels: Sequence[str] = ()) -> str:
    """Models of other grids, all or those of these `labels`, at every size of the study, against A."""
    if study[0].empty:
        return ""
    ranked = ranking.ranking([grid[::2] for grid in (study, *others)])
    ranked = ranked[~ranked["experiment"].isin(study[0]["experiment"])]
    if labels:
        ranked = ranked[ranked["experiment"].isin(labels)]
    if ranked.empty:
        return ""
    parts = []
    for label, own in sorted(ranked.groupby("experiment"), key=lambda found: found[1]["ppl"].min()):
        known = ", ".join(
            f"{change(row.difference, row.interval)} at {row.train_tokens:,} tokens" for row in own.itertuples()
        )
        parts.append(f"{label}{' (counts more text)' if own['reads_more'].any() else ''} {known}")
    over = f"{ranked['samples'].max()} validation samples drawn again"
    over += "" if ranked["replicates"].min() > 1 else "; single runs, seeds not covered"
    return f"PPL against A: {'; '.join(parts)} ({over})"


def _step(grids: Mapping[str, Grid], names: Sequence[str], part: str, what: str) -> str:
    """What `part` of a label in `recipe.BEFORE` does, in pairs of runs of the grids `names` with and without it."""
    found = recipe.counterparts([grids[name] for name in names], part)
    parts = [
        f"{row.experiment} {change(row.difference.log_ppl, row.difference.interval)} against {row.against} at "
        f"{row.train_tokens:,}"
        for row in found.itertuples()
    ]
    if not parts:
        return ""
    fewest = min(difference.replicates for difference in found["difference"])
    alone = "" if fewest > 1 else " (single runs, seeds not covered)"
    return f"PPL with {what}: {', '.join(parts)} tokens{alone}"
