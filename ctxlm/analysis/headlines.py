"""The report's first lines: the answer of its own grid, and what the other grids know, each in a line."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ctxlm.analysis import explain, ranking, reasons, variance
from ctxlm.analysis.findings import shapes_text
from ctxlm.analysis.phrases import (
    count,
    effect_text,
    magnitude,
    p_text,
    percent,
    percents,
    sizes_of,
    tokens_text,
    winner,
)
from ctxlm.analysis.reasons import ABLATIONS, OVERFITTING
from ctxlm.analysis.scaling import Grid
from ctxlm.config import Experiment
from ctxlm.memory import FORGOTTEN


def headlines(summary: dict[str, Any], pooled: Sequence[dict[str, Any]], grids: Mapping[str, Grid]) -> str:
    """The answer of the grid that is reported, and below it in five lines what the other grids know; what can be given.

    Args:
        summary: `scaling.summarise` of the grid that is reported.
        pooled: of `crossing.errors`, from the runs that say most about slopes.
        grids: of the names study, baselines, variance, signs, overfitting, ablations, ablations-full and factorial.
    """
    many, _, many_val = grids["variance"]
    quick = [
        [_caution(many, many_val), _signs(grids["signs"], grids["variance"])],
        [_crossed(grids["factorial"]), *(_slopes(found) for found in pooled if len(pooled) == 1)],
        [_overfitting(grids["overfitting"], grids["ablations"][0])],
        [_contexts(many, grids["ablations"])],
    ]
    lines = ["; ".join(filter(None, parts)) for parts in quick]
    shapes = _shapes(many)
    lines = [line and f"at the quick scale{shapes if not n else ''}: {line}" for n, line in enumerate(lines)]
    at_full_size = _ablations(grids["ablations-full"])
    if at_full_size:
        alone = "" if grids["ablations-full"][0]["replicate"].nunique() > 1 else " (single runs, seeds not covered)"
        lines[-1] = "; ".join(filter(None, [lines[-1], f"at full size{alone}: {at_full_size}"]))
    others = _others(grids["study"], grids["baselines"])
    lines.append(others and f"at full size{_shapes(grids['study'][0])}: {others}")
    bullets = [f"- {line[0].upper()}{line[1:].rstrip('.')}." for line in lines if line]
    answer = _verdicts(summary["paired_differences"])
    answer = [f"**{answer[0].upper()}{answer[1:]}.**"] if answer else []
    besides = ["What other grids of this repository say:", "", *bullets] if bullets else []
    return "\n".join([*answer, *([""] if answer and besides else []), *besides])


def _shapes(runs: pd.DataFrame) -> str:
    """What the configurations are, in brackets."""
    return f" ({shapes_text(runs)})" if len(runs) else ""


def _verdicts(differences: Sequence[dict[str, Any]]) -> str:
    if len({(d["a"], d["b"]) for d in differences}) != 1:
        return ""
    a, b = differences[0]["a"], differences[0]["b"]
    won, gaps = [winner(d) for d in differences], [percent(math.expm1(d["log_ppl"])) for d in differences]
    several = min(d["replicates"] for d in differences) > 1
    better = "is better" if several else "did better"
    answer = f"{a} {better} than {b} at {won.count(a)} of {len(won)} sizes, {b} than {a} at {won.count(b)}"
    every = "every one of " if len(won) > 1 else ""
    if not any(won):
        answer = f"{a} and {b} cannot be told apart at {every and 'any of '}{count(len(won), 'size')}"
    elif len(set(won)) == 1:
        other = b if won[0] == a else a
        answer = f"{won[0]} {better} than {other} at {every}{count(len(won), 'size')}"
    tested = "" if len(won) == 1 else ", each size tested by itself"
    alone = "" if several else "; single runs, so that another seed may say otherwise"
    order = "" if len(won) == 1 else ", from the smallest size to the largest"
    return f"{answer}{tested}{alone}. PPL of {a} against {b}{order}: {', '.join(gaps)}"


def _caution(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    """What a reader of single runs must know of chance: nothing where it has not been measured."""
    if runs.empty:
        return ""
    try:
        sd = variance.components(runs, val_by_sample).set_index("source")["sd"]
    except ValueError:
        return ""
    return (
        f"much is chance: with other seeds and training texts, PPL scatters about its mean by {magnitude(sd['run'])} "
        f"(standard deviation, {len(runs)} runs), the difference of two single runs that share neither by "
        f"{magnitude(math.sqrt(2) * sd['run'])}"
    )


def _signs(drawn: Grid, fixed: Grid) -> str:
    effects, gaps, _ = reasons.signs_effects(drawn, fixed)
    verdicts = "PPL is higher with them", "PPL is lower with them"
    changes = " and ".join(f"{effect_text(e)} ({e.name}: {reasons.effect_verdict(e, *verdicts)})" for e in effects)
    if not changes:
        return ""
    text = f"random signs of the embedding's dimensions, which are arbitrary, change PPL by {changes}"
    scatter = reasons.scatter(drawn[0], fixed[0]).strip().rstrip(".")
    text += f"; {scatter[0].lower()}{scatter[1:]}" if scatter else ""
    if not gaps:
        return text
    said = ", ".join(f"{percent(math.expm1(g['log_ppl']))} ({percents(g['interval'])})" for g in gaps)
    sizes = ", ".join(f"{g['train_tokens']:,}" for g in gaps)
    return f"{text}; PPL of {gaps[0]['a']} against {gaps[0]['b']} is then {said} at {sizes} tokens"


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
    interval = found.get("slope_interval")
    if interval is None:
        return ""
    a, b = found["a"], found["b"]
    tested = f"p {p_text(found['p_value'])}, {found['n']} runs in {count(found['replicates'], 'replicate')}"
    verdict = reasons.slope_verdict(found)
    if not verdict.endswith("from more text"):
        return f"{verdict} ({tested}): no crossover can be claimed"
    where = ""
    if found["crossover_tokens"] is not None:
        where = f"; the laws of {a} and {b} meet at {tokens_text(found['crossover_tokens'])} tokens"
    return f"{verdict} ({tested}){where}"


def _overfitting(grid: Grid, ablated: pd.DataFrame) -> str:
    runs, _, val_by_sample = grid
    if runs.empty or explain.stopped(runs).empty:
        return ""
    ended = explain.stopped(runs)
    study = ended["phase2_learning_rate"] == Experiment.model_fields["phase2_learning_rate"].default
    if study.any():  # other rates are a treatment
        ended = ended[study]
    rates = ended.groupby("configuration")["overfit_rate"].mean()
    at = " at the study's learning rate" if study.any() else ""
    said = [
        f"Phase 2 over-fits: when it stops{at} ({count(len(ended), 'run')} on {sizes_of(ended)}), "
        "PPL is above its best by " + " and ".join(f"{percent(rate)} ({label})" for label, rate in rates.items())
    ]
    with contextlib.suppress(ValueError):  # runs that cannot tell the effects apart
        best = {effect.name: effect for effect in explain.overfitting_effects(runs, True, val_by_sample)}
        for effect in explain.overfitting_effects(runs):  # of one rate alone, if no run of the others has stopped
            too = ""
            if effect.name == explain.HALVED:
                too = f" (which changes the best PPL by {effect_text(best[effect.name])})"
            if effect.name.startswith("a "):
                said.append(f"{effect.name}{too} changes last PPL / best PPL by {effect_text(effect)}")
    zeros = [effect.name for effect in reasons.ablated(ablated, "zero", OVERFITTING)]
    if zeros:
        rates = ablated.groupby("experiment")["overfit_rate"].mean()
        parts = [f"{percent(rates[f'{label}-zero'])} instead of {percent(rates[label])} ({label})" for label in zeros]
        said.append(f"without the contexts it is above its best by {' and '.join(parts)}, on {sizes_of(ablated)}")
    return "; ".join(said)


def _contexts(runs: pd.DataFrame, ablated: Grid) -> str:
    parts = []
    if "horizon" in runs and runs["horizon"].notna().all():
        spans = runs.groupby("experiment")["horizon"].mean()
        reach = " and ".join(f"{tokens:.1f} tokens ({label})" for label, tokens in spans.items())
        parts.append(f"contexts reach back {reach}, until {100 * FORGOTTEN:.0f} % of a disturbance is left")
    parts.append(_ablations(ablated))
    return "; ".join(filter(None, parts))


def _ablations(grid: Grid) -> str:
    runs, _, val_by_sample = grid
    parts = []
    for suffix, (what, *meaning) in ABLATIONS.items():
        found = reasons.ablated(runs, suffix, val_by_sample=val_by_sample)
        if found:
            changes = " and ".join(f"{effect_text(effect)} ({effect.name})" for effect in found)
            verdicts = {effect.name: reasons.effect_verdict(effect, *meaning) for effect in found}
            said = "; ".join(dict.fromkeys(verdicts.values()))
            if len(set(verdicts.values())) > 1:
                said = ", ".join(f"{verdict} ({name})" for name, verdict in verdicts.items())
            parts.append(f"with {what}, PPL changes by {changes}: {said}")
    return "; ".join(parts)


def _others(study: Grid, others: Grid) -> str:
    """The best ordinary model that read the same training tokens, against A at full size."""
    if study[0].empty or others[0].empty:
        return ""
    ranked = ranking.ranking([study[::2], others[::2]])
    ranked = ranked[~ranked["reads_more"] & ~ranked["experiment"].isin(study[0]["experiment"])]
    parts = []
    for size, group in ranked.groupby("train_tokens"):
        best = group.iloc[0]
        gap = f"{percent(math.expm1(best['difference']))} ({percents(best['interval'])})"
        parts.append(f"{best['experiment']} {gap} at {size:,}")
    if not parts:
        return ""
    alone = "" if study[0]["replicate"].nunique() > 1 else "single runs, seeds not covered, "
    over = f"{alone}{ranked['samples'].max()} validation samples drawn again"
    models = ranked["experiment"].nunique()
    return f"the best of {models} ordinary models changes PPL against A ({over}) by: {', '.join(parts)} tokens"
