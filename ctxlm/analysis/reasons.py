"""How sure the findings are and what explains them, in sentences: every number in them is computed from the runs.

Effects are on log PPL and are given as per cent of PPL; every one comes with its n, its degrees of freedom, its 95 %
interval and what that was drawn over.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ctxlm.analysis import explain, variance
from ctxlm.analysis.explain import Effect
from ctxlm.analysis.phrases import (
    SINGLE,
    magnitude,
    p_text,
    percent,
    side,
    signed,
    span,
    steeper,
)
from ctxlm.analysis.replicates import together
from ctxlm.analysis.scaling import Grid, differences, effective

SAMPLES = 50
"""Validation samples of the study."""
WORTH = 0.01
"""Nats: a loss that is surely closer than this (1 % of PPL) to another is called as good."""
DRAWN = "signs drawn"
"""The effect of an embedding whose signs are drawn."""
ABLATIONS = {
    "without-phase1": ("Phase 1 left out", "Phase 1 lowers PPL", "Phase 1 raises PPL"),
    "zero": ("contexts of zeros", "contexts lower PPL", "contexts raise PPL"),
    "random": ("contexts of shuffled tokens", "a text's own contexts are better", "a text's own contexts are worse"),
}
"""Suffix of the label → what was done, and what follows where PPL is then higher, and where it is lower."""


def slope_verdict(found: dict[str, Any]) -> str:
    if label := steeper(found):
        return f"{label} gains more from more text"
    if here := side(found["slope_interval"]):
        return f"{found['b' if here < 0 else 'a']} gains more on this validation text, but on another it may not"
    return f"the slopes of {found['a']} and {found['b']} cannot be told apart"


def signs(drawn: Grid, fixed: Grid) -> dict[str, list[Effect]]:
    """What random signs of the embedding's dimensions do to PPL, in pairs with runs of `fixed`, and the gaps between
    configurations with drawn and with fixed signs."""
    if drawn[0].empty or fixed[0].empty:
        return {}
    # what differs in a pair is no reason to call its runs independent
    runs, _, val_by_sample = together([(grid[0].drop(columns="embedding_seed"), *grid[1:]) for grid in (drawn, fixed)])
    runs.loc[runs["grid"] == 0, "experiment"] += "-drawn"
    found = explain.variants(runs, {"drawn": DRAWN}, val_by_sample=val_by_sample)
    for how, (_, _, losses) in (("drawn", drawn), ("fixed", fixed)):
        gaps = [gap for gap in differences(losses)[0] if gap["train_tokens"] in set(drawn[0]["train_tokens"])]
        names = [f"{gap['a']} against {gap['b']} at {gap['train_tokens']:,} tokens" for gap in gaps]
        columns = ("log_ppl", "interval", "replicates", "replicates", "dof", "samples")
        found[f"signs {how}"] = [Effect(n, *map(g.get, columns)) for n, g in zip(names, gaps, strict=True)]
    return found


def scatter(drawn: pd.DataFrame, fixed: pd.DataFrame) -> str:
    """How far PPL lies apart between replicates with drawn signs, and with fixed ones for the same seeds and texts."""
    if drawn.empty or fixed.empty:
        return ""
    said, key = [], ["experiment", "train_tokens", "seed", "data_seed"]
    both = drawn.merge(fixed, on=key, suffixes=("_drawn", "_fixed"))
    for label, runs in both.groupby("experiment"):
        means = runs.groupby("seed")[["val_loss_drawn", "val_loss_fixed"]].mean()  # over the sizes
        apart, before = means.std()
        if len(means) < 3 or not before:
            continue
        # of the same seeds and texts, so that the two are no independent samples (Pitman, 1939; Morgan, 1939)
        sums, differences = means.sum(axis=1), means["val_loss_drawn"] - means["val_loss_fixed"]
        p = stats.pearsonr(sums, differences).pvalue if differences.std() > 1e-9 else 1.0
        how = f"(n = {len(means)} pairs, Pitman-Morgan, p {p_text(p)})"
        said.append(f"{magnitude(apart)} instead of {magnitude(before)} for {label} {how}")
    lead = "With signs drawn, PPL over all sizes scatters between replicates (standard deviation) by"
    return f"{lead} {'; '.join(said)}." if said else ""


def forms(found: dict[str, dict[str, Any]]) -> str:
    """Is a power law enough, and does it foretell larger sizes? From `crossing.errors`' `forms`."""
    said = [_form(label, form) for label, form in found.items()]
    return f"**Form.** The power law against loss = E + b · tokens⁻ᵝ. {'. '.join(said)}." if said else ""


def _form(label: str, form: dict[str, Any]) -> str:
    errors = "; ".join(f"{row['form']} {percent(row['error'])} at {row['tokens']:,}" for row in form["extrapolated"])
    held = f"; fitted without the largest sizes, PPL foretold there is off by: {errors} tokens" if errors else ""
    bent = form["saturating"]
    if bent is None:
        return f"{label}: only the power law ({form['reason']}){held}"
    if bent["aicc"] is None or bent["aicc_power_law"] is None:
        return f"{label}: too few runs to compare by AICc{held}"
    gain = bent["aicc_power_law"] - bent["aicc"]
    verdict = f"AICc prefers {'the saturating form' if gain > 0 else 'the power law'} by {abs(gain):.1f}"
    if -4 < gain <= 2:  # about what the third parameter costs, whatever the data
        verdict = f"a third parameter changes AICc by {signed(-gain, 1)}, which counts for nothing"
    shape = f"floor {bent['floor']:.2f} nats, β = {bent['beta']:.2f}" if bent["bends"] else "it finds no floor"
    return (
        f"{label}: {verdict} ({shape}; n = {bent['n']}, {bent['residual_dof']} d.o.f., runs taken as independent){held}"
    )


def resolved(val_by_sample: pd.DataFrame, published: pd.DataFrame, a: str = "A", b: str = "B") -> str:
    """What differences the study's number of validation samples can resolve, and which published gaps exceed that."""
    if val_by_sample.empty:
        return ""
    of_a, of_b = (val_by_sample[val_by_sample["experiment"] == label] for label in (a, b))
    limits = [
        variance.resolution(*(table[table["train_tokens"] == size] for table in (of_a, of_b)), samples=SAMPLES)
        for size in sorted(set(of_a["train_tokens"]) & set(of_b["train_tokens"]))
    ]
    if not limits:
        return ""
    lengths = val_by_sample.groupby("sample")["tokens"].first()
    length, weigh = lengths.mean(), SAMPLES * effective(lengths) / len(lengths)
    theirs = (published["train_tokens"] / published["train_samples"]).mean()
    limits_there = [limit * math.sqrt(max(length / theirs, 1)) for limit in limits]
    ppl = published.pivot(index="train_tokens", columns="experiment", values="val_ppl")
    gaps = {size: math.log(row[a] / row[b]) for size, row in ppl.iterrows()}
    said = [f"{percent(math.expm1(gap))} at {size:,} tokens" for size, gap in gaps.items()]
    verdicts = []
    for text, gap in zip(said, gaps.values(), strict=True):
        larger = sum(abs(gap) > limit for limit in limits_there)
        verdict = {0: "is below that", len(limits): "exceeds that"}.get(larger, "is at the edge of that")
        verdicts.append(f"{text} {verdict}")
    return (
        f"**Resolution.** In pairs, {SAMPLES} validation samples of some {length:,.0f} tokens, as ours, tell {a} from "
        f"{b} where the observed difference is {span(limits, magnitude)} or more (95 % interval, "
        f"Student's, seeds not counted; their lengths differ so much that they weigh as {weigh:.0f} equal ones, which "
        f"leaves {weigh - 1:.0f} d.o.f.). The study's samples have some {theirs:,.0f} "
        f"tokens; if errors fall with the square root of length, it takes {span(limits_there, magnitude)} there. Of "
        f"its gaps, {' and '.join(verdicts)}."
    )


def overfitting(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> dict[str, list[Effect]]:
    """What over-fitting, and the best PPL itself, depend on."""
    model = explain.overfitting_effects
    return {"last PPL / best PPL": told(model, runs), "best PPL": told(model, runs, True, val_by_sample)}


def gap(gaps: pd.DataFrame) -> str:
    """Whether over-fitting goes with trained parameters a token, from `explain.generalisation`."""
    if len(gaps) < 3:
        return ""
    r = np.corrcoef(np.log(gaps["params_per_token"]), gaps["last_gap"])[0, 1]
    return (
        "**The gap** between validation and training loss after the last epoch correlates with the logarithm "
        f"of trained parameters a training token at r = {signed(r, 2)} ({len(gaps)} runs; a description, no test)."
    )


def depth_and_width(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> dict[str, list[Effect]]:
    """Main effects and interaction of depth and width on PPL, over-fitting and the horizon."""
    found = {"PPL": told(explain.factorial_effects, runs, val_by_sample=val_by_sample)}
    responses = {"last PPL / best PPL": np.log1p(runs["overfit_rate"])}
    if "horizon" in runs and runs["horizon"].notna().all():
        responses["memory horizon"] = np.log(runs["horizon"])
    for what, values in responses.items():
        found[what] = told(explain.factorial_effects, runs.assign(response=values), "response")
    return found


def told(model: Callable[..., list[Effect]], *arguments: Any, **options: Any) -> list[Effect]:
    """What a model finds; nothing where it cannot be fitted."""
    try:
        return model(*arguments, **options)
    except ValueError:
        return []


def ablations(
    runs: pd.DataFrame, val_by_sample: pd.DataFrame | None = None, overfitting: bool = False
) -> dict[str, list[Effect]]:
    """Configuration → what leaving out each part does to PPL or, of runs that stopped, to last PPL / best PPL."""
    parts = {suffix: what for suffix, (what, *_) in ABLATIONS.items()}
    if not overfitting or runs.empty:
        return explain.variants(runs, parts, val_by_sample=val_by_sample)
    ended = explain.stopped(runs)
    return explain.variants(ended.assign(rise=np.log1p(ended["overfit_rate"])), parts, "rise")


def effect_verdict(effect: Effect, higher: str, lower: str) -> str:
    """What follows from PPL being higher, or lower, with something left out; or that it is the same, or unknown."""
    if effect.interval is None:
        return "no interval, no verdict"
    if max(map(abs, effect.interval)) < WORTH:
        return "the same to 1 %"
    verdict = {0: "no effect can be told", 1: higher, -1: lower}[side(effect.interval)]
    return verdict + (SINGLE if effect.replicates == 1 and side(effect.interval) else "")
