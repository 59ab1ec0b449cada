"""How sure the findings are and what explains them, in sentences: every number in them is computed from the runs.

Effects are on log PPL and are given as per cent of PPL; every one comes with its n, its degrees of freedom, its 95 %
interval and what that was drawn over.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ctxlm.analysis import explain, variance
from ctxlm.analysis.findings import unconverged
from ctxlm.analysis.phrases import (
    SINGLE,
    count,
    drawn_over,
    effect_text,
    magnitude,
    p_text,
    percent,
    percents,
    side,
    signed,
    span,
    tokens_text,
    winner,
)
from ctxlm.analysis.replicates import student
from ctxlm.analysis.scaling import Grid, differences, effective
from ctxlm.memory import FORGOTTEN

SAMPLES = 50
"""Validation samples of the study."""
WORTH = 0.01
"""Nats: a loss that is surely closer than this (1 % of PPL) to another is called as good."""
ABLATIONS = {
    "without-phase1": ("Phase 1 left out", "Phase 1 lowers PPL", "Phase 1 raises PPL"),
    "zero": ("contexts of zeros", "contexts lower PPL", "contexts raise PPL"),
    "random": ("contexts of shuffled tokens", "a text's own contexts are better", "a text's own contexts are worse"),
}
"""Suffix of the label → what was done, and what follows where PPL is then higher, and where it is lower."""
DRAWN_SIGNS = ", signs drawn"
OVERFITTING = "log last / best PPL"
"""A response of ablations that is no column of the runs."""


def slope_verdict(found: dict[str, Any]) -> str:
    steeper = found["b"] if found["slope_difference"] < 0 else found["a"]
    here, anywhere = (side(found[name]) for name in ("slope_interval", "bootstrap_slope"))
    if here and anywhere:
        return f"{steeper} gains more from more text"
    if here:
        return f"{steeper} gains more on this validation text, but on another it may not"
    return f"the slopes of {found['a']} and {found['b']} cannot be told apart"


def signs(drawn: Grid, fixed: Grid) -> str:
    """What random signs of the embedding's dimensions do to PPL, in pairs with runs of `fixed`, and to the gap."""
    effects, gaps, as_before = signs_effects(drawn, fixed)
    if not effects:
        return ""
    verdicts = "they raise it", "they lower it"
    parts = [f"{e.name} {effect_text(e)} {drawn_over(e)}: {effect_verdict(e, *verdicts)}" for e in effects]
    text = (
        "**The embedding's signs.** A singular vector may be turned round, so that the signs of ppmi's dimensions are "
        "arbitrary; a convention fixes them in all other grids. Signs drawn at random, others in every replicate, "
        f"change PPL, in pairs of equal size, seed and text, by {'; '.join(parts)}.{scatter(drawn[0], fixed[0])}"
    )
    if not gaps:
        return text
    a, b, runs = gaps[0]["a"], gaps[0]["b"], count(gaps[0]["replicates"], "replicate")
    then, before = (
        "; ".join(
            f"{percent(math.expm1(g['log_ppl']))} ({percents(g['interval'])}) at {g['train_tokens']:,}" for g in some
        )
        for some in (gaps, as_before)
    )
    won = {winner(gap) for gap in gaps}
    verdict = f": with drawn signs {won.pop()} is better" if len(won) == 1 and None not in won else ""
    return (
        f"{text} PPL of {a} against {b} is then {then} tokens (95 % intervals, {runs} crossed with "
        f"{gaps[0]['samples']} validation samples); with the convention, over all its runs, {before} tokens{verdict}."
    )


def signs_effects(drawn: Grid, fixed: Grid) -> tuple[list[explain.Effect], list[dict[str, Any]], list[dict[str, Any]]]:
    """Effects of drawn signs by configuration, and the gaps between configurations with drawn and with fixed ones."""
    if drawn[0].empty or fixed[0].empty:
        return [], [], []
    key = ["seed", "data_seed"]
    replicate = fixed[0].drop_duplicates(key).set_index(key)["replicate"]
    pairs = pd.MultiIndex.from_frame(drawn[0][key])
    here = drawn[0].assign(replicate=replicate.reindex(pairs).to_numpy(), run="drawn/" + drawn[0]["run"])
    here["experiment"] += DRAWN_SIGNS
    val = [drawn[2].assign(run="drawn/" + drawn[2]["run"]), fixed[2]]
    runs, val_by_sample = pd.concat([here.dropna(subset="replicate"), fixed[0]]), pd.concat(val)
    effects = []
    for label in sorted(drawn[0]["experiment"].unique()):
        with contextlib.suppress(ValueError):  # no two that belong together, or judged on other text
            found = explain.paired_effect(runs, label + DRAWN_SIGNS, label, val_by_sample=val_by_sample)
            effects.append(replace(found, name=label))
    sizes = set(drawn[0]["train_tokens"])
    gaps = [differences(grid[2])[0] for grid in (drawn, fixed)]
    return effects, gaps[0], [gap for gap in gaps[1] if gap["train_tokens"] in sizes]


def scatter(drawn: pd.DataFrame, fixed: pd.DataFrame) -> str:
    """How far PPL lies apart between replicates with drawn signs, and with fixed ones for the same seeds and texts."""
    said, key = [], ["experiment", "train_tokens", "seed", "data_seed"]
    both = drawn.merge(fixed, on=key, suffixes=("_drawn", "_fixed"))
    for label, runs in both.groupby("experiment"):
        means = runs.groupby("seed")[["val_loss_drawn", "val_loss_fixed"]].mean()  # over the sizes
        apart, before = means.std()
        n = len(means)
        if n < 2 or not before:
            continue
        if n < 3:
            said.append(f"{magnitude(apart)} instead of {magnitude(before)} for {label}")
            continue
        # of the same seeds and texts, so that the two are no independent samples (Pitman, 1939; Morgan, 1939)
        sums, differences = means.sum(axis=1), means["val_loss_drawn"] - means["val_loss_fixed"]
        p = stats.pearsonr(sums, differences).pvalue if differences.std() > 1e-9 else 1.0
        how = f"(n = {n} pairs, Pitman-Morgan, p {p_text(p)})"
        said.append(f"{magnitude(apart)} instead of {magnitude(before)} for {label} {how}")
    if not said:
        return ""
    return f" Between replicates, PPL over all sizes then scatters (standard deviation) by {'; '.join(said)}."


def chance(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    """What the spread between runs of one configuration and size comes from."""
    try:
        found = variance.components(runs, val_by_sample).set_index("source")
        ratio = variance.ratio_interval(runs)
    except ValueError as error:
        return f"**Chance.** Not taken apart: {error}."

    def sure(source: str, how: str) -> str:
        low, high = map(magnitude, found.loc[source, ["low", "high"]])
        dof = f"{found.loc[source, 'dof']:.1f}".removesuffix(".0")
        return f"{magnitude(found.loc[source, 'sd'])} ({dof} d.o.f., 95 % interval {low} to {high}, {how})"

    verdict = "which of the two is larger cannot be told"
    if not ratio[0] <= 1 <= ratio[1]:
        verdict = "training text matters more" if ratio[0] > 1 else "initialisation matters more"
    verdict += f" (variance of text over that of initialisation {ratio[0]:.1f} to {ratio[1]:.1f}, F, approximate)"
    sizes = []
    for _, own in runs.groupby("train_tokens"):
        with contextlib.suppress(ValueError):  # too few runs of that size
            sizes.append(variance.components(own, val_by_sample).set_index("source").loc["run", "sd"])
    unequal = f", size by size by {magnitude(min(sizes))} to {magnitude(max(sizes))}" if len(sizes) > 1 else ""
    return (
        f"**Chance.** Standard deviations of PPL, nested analysis of variance within configuration and size (n = "
        f"{len(runs)} runs): initialisation {sure('seed', 'chi-square')}, training text "
        f"{sure('data_seed', 'Williams')}: {verdict}. Together a run scatters by {sure('run', 'Satterthwaite')}"
        f"{unequal}. "
        f"Another choice of validation samples would move PPL by {sure('validation', 'chi-square, approximate')}, most "
        "of it alike for all runs."
    )


def slopes(found: dict[str, Any]) -> str:
    """Do two laws differ in slope, and where do they meet? From one entry of `crossing.errors`' `pooled`."""
    a, b = found["a"], found["b"]
    lead = f"**Slopes of {a} and {b}.**"
    if found["refused"]:
        return f"{lead} Not compared: {found['refused']}."
    difference, n, dof = signed(found["slope_difference"]), found["n"], found["dof"]
    if found["slope_interval"] is None:
        return (
            f"{lead} α of {b} minus α of {a} is {difference} (n = {n}, no error can be estimated): no test can be made."
        )
    low, high = found["slope_interval"]
    verdict = slope_verdict(found)
    robust = found["slope_interval_robust"]
    fit, basis = "with interaction", f"{count(found['replicates'], 'replicate')}, {dof} d.o.f."
    drawn = "replicates and validation samples"
    if found["replicates"] == 1:
        basis, drawn = f"taken as independent, {dof} d.o.f.", "validation samples alone"
        if found["pairs"]:
            fit, basis = "of differences", f"in {found['pairs']} pairs of equal size, seed and text, {basis}"
    drawn = f"bootstrap over {drawn} {_range(found['bootstrap_slope'])}" if found["bootstrap_slope"] else "no bootstrap"
    return (
        f"{lead} Least squares {fit}: α of {b} minus α of {a} is {difference} (n = {n} runs, {basis}; 95 % "
        f"interval {_range((low, high))}{f', with HC3 errors {_range(robust)}' if robust else ''}; {drawn}; "
        f"t test, p {p_text(found['p_value'])}): {verdict}. "
        f"{_meeting(found)}"
    )


def crossovers(grids: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Where the laws of two configurations meet, grid beside grid, from `crossing.errors`' `pooled` of each."""
    said = []
    for grid, pairs in grids:
        for found in pairs:
            where = f"{found['a']} and {found['b']} of grid {grid}"
            if found["refused"] or found["crossover_tokens"] is None:
                said.append(f"{where}: none ({found['refused'] or found['reason']})")
                continue
            text = f"{where}: {tokens_text(found['crossover_tokens'])} tokens (n = {found['n']} runs, "
            if found["slope_interval"] is None:
                said.append(text + "no error can be given)")
                continue
            drawn = found["bootstrap_crossover"] if found["fieller"] == "bounded" else None
            text += f"bootstrap {_tokens(drawn)}, " if drawn else ""
            text += f"{100 * found['bootstrap_without']:.1f} % of the bootstrap's draws have none)"
            said.append(f"{text}: {slope_verdict(found)}")
    return f"**Crossovers side by side**, by the fitted laws. {'; '.join(said)}." if said else ""


def _meeting(found: dict[str, Any]) -> str:
    ends = found["fieller_interval"]
    intervals = {
        "bounded": lambda: f"Fieller {_tokens(ends)}",
        "outside": lambda: f"Fieller: anywhere but between {_tokens(ends, ' and ')}",
        "unbounded": lambda: "Fieller: anywhere, the data do not bound it",
    }[found["fieller"]]()
    if found["delta_interval"]:
        intervals += f"; delta method {_tokens(found['delta_interval'])}"
    share = f"{100 * found['bootstrap_without']:.1f} % of the bootstrap's draws have none"
    if found["bootstrap_crossover"] and found["fieller"] == "bounded":  # else the draws left out would have bounded it
        intervals += f"; bootstrap {_tokens(found['bootstrap_crossover'])}"
    intervals += f"; {share}"
    if found["crossover_tokens"] is None:
        return f"A crossover is not located: {found['reason']} (95 %: {intervals})."
    low, high = found["slope_interval"]
    lines = "The fitted lines" if low <= 0 <= high else "They"
    return f"{lines} meet at {tokens_text(found['crossover_tokens'])} tokens (95 %: {intervals})."


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
        verdict = f"by AICc a third parameter gains nothing that counts ({signed(gain, 1)}, runs taken as independent)"
    shape = f"floor {bent['floor']:.2f} nats, β = {bent['beta']:.2f}" if bent["bends"] else "it finds no floor"
    return f"{label}: {verdict} ({shape}; n = {bent['n']}, {bent['residual_dof']} d.o.f.){held}"


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
        verdict = "exceeds that" if larger == len(limits) else "does not exceed that"
        verdicts.append(f"{text} {verdict if larger in (0, len(limits)) else 'lies between'}")
    return (
        f"**Resolution.** In pairs, {SAMPLES} validation samples of some {length:,.0f} tokens, as ours, tell {a} from "
        f"{b} where the observed difference is {span(limits, magnitude)} or more (95 % interval, "
        f"Student's, seeds not counted; their lengths differ so much that they weigh as {weigh:.0f} equal ones, which "
        f"leaves {weigh - 1:.0f} d.o.f.). The study's samples have some {theirs:,.0f} "
        f"tokens; if errors fall with the square root of length, it takes {span(limits_there, magnitude)} there. Of "
        f"its gaps, {' and '.join(verdicts)}."
    )


def overfitting(runs: pd.DataFrame, history: pd.DataFrame, val_by_sample: pd.DataFrame) -> list[str]:
    """What over-fitting depends on, how wide the gap is, and where within the epochs the best point lies."""
    said = []
    try:
        effects = explain.overfitting_effects(runs)
        left_out = runs.drop(explain.stopped(runs).index)
        out = ""
        if len(left_out):
            rates = " and ".join(
                f"{n} at a rate of {rate:g}" for rate, n in left_out["phase2_learning_rate"].value_counts().items()
            )
            out = f" {len(left_out)} of {len(runs)} runs had not stopped at their last epoch and are left out: {rates}."
        said.append(
            f"**What over-fitting depends on.** Last PPL / best PPL, by least squares on its logarithm "
            f"{_how(effects)}: {'; '.join(map(_named, effects))}.{out}"
        )
        cures = explain.overfitting_effects(runs, True, val_by_sample)
        cures = [effect for effect in cures if effect.name.startswith("a ")]
        said.append(
            f"**What the best PPL depends on**, by the same model of all runs {_how(cures)}: "
            f"{'; '.join(map(_named, cures))} (plus: worse)."
        )
    except ValueError as error:
        said.append(f"**What over-fitting depends on.** Not modelled: {error}.")
    gaps = explain.generalisation(history, runs)
    if len(gaps) > 2:
        parts = [
            f"{label} {g['best_gap'].mean():.2f} nats after the best epoch and {g['last_gap'].mean():.2f} after the "
            f"last ({span(g['params_per_token'], '{:,.0f}'.format)} trained parameters a token, n = {len(g)})"
            for label, g in gaps.groupby("configuration")
        ]
        r = np.corrcoef(np.log(gaps["params_per_token"]), gaps["last_gap"])[0, 1]
        said.append(
            "**The gap**, validation loss minus the training loss measured after the same epoch: "
            f"{'; '.join(parts)}. With the logarithm of parameters a token the last gap correlates at r = "
            f"{signed(r, 2)} ({len(gaps)} runs; a description, no test)."
        )
    between = explain.between_epochs(history, runs)
    if len(between):
        parts = [
            f"{label} at a rate of {rate:g} after {span(g['epochs'], '{:,.1f}'.format)} epochs, "
            f"{magnitude(g['gain'].mean())} better than the best epoch's end (n = {len(g)})"
            for (label, rate), g in between.groupby(["configuration", "phase2_learning_rate"])
        ]
        said.append(
            f"**Within epochs.** Looked for between epochs too, the best point lies: {'; '.join(parts)}. Part of that "
            "gain is luck: it is the least of several looks at one text."
        )
    return said


def memory(runs: pd.DataFrame, history: pd.DataFrame) -> list[str]:
    """How far back contexts reach, before and after training, and how many tokens are enough."""
    if "horizon" not in runs:
        return []
    parts, means = [], {}
    for label, group in runs.groupby("experiment"):
        never = int(group[["horizon_init", "horizon"]].isna().any(axis=1).sum())
        if never:
            parts.append(f"{label} more than can be told in {never} of {len(group)} runs")
            continue
        own = group.groupby("replicate")[["horizon_init", "horizon"]].mean()
        means[label] = own["horizon"]
        interval = student(own["horizon"].to_numpy())
        sure = f", 95 % interval {interval[0]:.1f} to {interval[1]:.1f}" if interval else ", no interval"
        parts.append(
            f"{label} {own['horizon_init'].mean():.1f} tokens before training and {own['horizon'].mean():.1f} after it "
            f"(n = {len(group)} runs in {count(len(own), 'replicate')}{sure})"
        )
    text = f"**Memory horizon.** Of a disturbance, {100 * FORGOTTEN:.0f} % is left after: {'; '.join(parts)}."
    if len(means) == 2 == runs["experiment"].nunique():
        a, b = means
        gap = (means[a] - means[b]).dropna().to_numpy()
        interval = student(gap)
        if interval and not interval[0] <= 0 <= interval[1]:
            longer, sign = (a, 1) if gap.mean() > 0 else (b, -1)
            low, high = sorted(sign * end for end in interval)
            text += (
                f" {longer} remembers longer, by {sign * gap.mean():.1f} tokens ({low:.1f} to {high:.1f}, Student's "
                f"over {count(len(gap), 'replicate')} in pairs)."
            )
    parts = []
    for label, rows in explain.recency(history).groupby("experiment"):
        rows = rows.set_index("k")
        costs = (
            f"{percent(math.expm1(row.extra_loss))} for {k} ({percents((row.low, row.high))})"
            for k, row in rows.loc[:8].iterrows()
        )
        good = (rows["low"] > -WORTH) & (rows["high"] < WORTH)
        good = rows.index[good[::-1].cummin()[::-1]]  # and at every larger k
        parts.append(
            f"{label} {', '.join(costs)} (n = {rows['n'].min():.0f} replicates)"
            + (f"; {good[0]} tokens are as good as all, to 1 %" if len(good) else "")
        )
    if not parts:
        return [text]
    return [
        text,
        "**The last k tokens.** PPL when contexts have read only those, against the whole stream, mean over replicates "
        f"with Student's interval: {'. '.join(parts)}.",
    ]


def ablations(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> list[str]:
    """What Phase 1 and the contexts contribute, from runs with and without them in pairs."""
    said = []
    for suffix, (what, *meaning) in ABLATIONS.items():
        effects = ablated(runs, suffix, val_by_sample=val_by_sample)
        if effects:
            parts = [f"{e.name} {effect_text(e)} {drawn_over(e)}: {effect_verdict(e, *meaning)}" for e in effects]
            text = (
                f"**{what[0].upper()}{what[1:]}**, in pairs of equal size, seed and text: PPL changes, of "
                f"{'; '.join(parts)}."
            )
            if rates := ablated(runs, suffix, OVERFITTING):
                how = "Student's over replicates" if max(e.replicates for e in rates) > 1 else "single runs"
                text += f" Over-fitting (last PPL / best PPL; {how}) changes, of "
                text += f"{'; '.join(f'{e.name} {effect_text(e)}' for e in rates)}."
            said.append(text)
    shuffled = {effect.name: effect for effect in ablated(runs, "random", val_by_sample=val_by_sample)}
    burdened = [
        zero.name
        for zero in ablated(runs, "zero", val_by_sample=val_by_sample)
        if zero.name in shuffled and side(zero.interval) < 0 < side(shuffled[zero.name].interval)
    ]
    if burdened:
        said.append(
            f"**Together**, for {' and '.join(burdened)}: the TokenBlock does better without contexts, reading its "
            "input tokens alone, than with them, and worse with contexts that are not the text's own. Why was not "
            "tested: learning rates, for one, are the same with contexts and without."
        )
    bases = runs[runs["experiment"].isin([e.name for e in ablated(runs, "without-phase1")])]
    short = unconverged(bases)
    if len(short):
        counts = ", ".join(f"{n} runs of {label}" for label, n in short["experiment"].value_counts().items())
        said.append(f"Phase 1 ran out of iterations in {counts}: what a finished one does there is not known.")
    return said


def ablation_effects(
    runs: pd.DataFrame, column: str = "val_loss", val_by_sample: pd.DataFrame | None = None
) -> dict[str, list[explain.Effect]]:
    """Configuration → the effects of its ablations on `column`, named after what was done."""
    found: dict[str, list[explain.Effect]] = {}
    for suffix, (what, *_) in ABLATIONS.items():
        for effect in ablated(runs, suffix, column, val_by_sample):
            found.setdefault(effect.name, []).append(replace(effect, name=f"{effect.name}: {what}"))
    return found


def as_group(
    model: Callable[[pd.DataFrame], list[explain.Effect]], runs: pd.DataFrame
) -> dict[str, list[explain.Effect]]:
    """What a model finds in the runs, as one group for `plots.plot_effects`; none where it cannot be fitted."""
    try:
        return {"": model(runs)}
    except ValueError:
        return {}


def ablated(
    runs: pd.DataFrame, suffix: str, column: str = "val_loss", val_by_sample: pd.DataFrame | None = None
) -> list[explain.Effect]:
    """The effect of one ablation, labelled `<configuration>-<suffix>`, on every configuration that has it.

    `column` is one of the runs' or `OVERFITTING`; with `val_by_sample` it is `val_loss`, and samples are drawn too.
    """
    if column == OVERFITTING and len(runs):
        runs = explain.stopped(runs)
        runs = runs.assign(**{OVERFITTING: np.log1p(runs["overfit_rate"])})
    labels, found = set(runs["experiment"]) if len(runs) else set(), []
    for base in sorted(label for label in labels if f"{label}-{suffix}" in labels):
        try:
            effect = explain.paired_effect(runs, f"{base}-{suffix}", base, column, val_by_sample)
            found.append(replace(effect, name=base))
        except ValueError:  # runs of both, but no two that belong together yet, or judged on other text
            continue
    return found


def effect_verdict(effect: explain.Effect, higher: str, lower: str) -> str:
    """What follows from PPL being higher, or lower, with something left out; or that it is the same, or unknown."""
    if effect.interval is not None and max(map(abs, effect.interval)) < WORTH:
        return "the same to 1 %"
    verdict = {0: "no effect can be told", 1: higher, -1: lower}[side(effect.interval)]
    return verdict + (SINGLE if effect.replicates == 1 and side(effect.interval) else "")


def depth_and_width(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> list[str]:
    """Main effects and interaction of depth and width on PPL, over-fitting and the horizon."""
    responses = {"PPL": runs["val_loss"], "over-fitting (last PPL / best PPL)": np.log1p(runs["overfit_rate"])}
    if "horizon" in runs and runs["horizon"].notna().all():
        responses["the memory horizon"] = np.log(runs["horizon"])
    said = []
    for what, values in responses.items():
        try:
            drawn = val_by_sample if what == "PPL" else None
            effects = explain.factorial_effects(runs.assign(response=values), "response", drawn)
        except ValueError as error:
            return [f"**Depth and width.** Not taken apart: {error}."]
        said.append(f"**Depth, width and {what}** {_how(effects)}: {'; '.join(map(_named, effects))}.")
    return said


def _how(effects: Sequence[explain.Effect]) -> str:
    first = effects[0]
    if first.replicates > 1:
        over = f"Student's over {first.replicates} replicates"
        if first.samples:
            over = f"{first.replicates} replicates crossed with {first.samples} validation samples drawn again"
            dofs = span([effect.dof for effect in effects], "{:,.1f}".format)
            return f"(n = {first.n} runs, {over}, {dofs} d.o.f. by Satterthwaite)"
        return f"(n = {first.n} runs, {over}, {first.dof} d.o.f.)"
    return f"(n = {first.n} runs taken as independent, HC3 errors, {first.dof} d.o.f.)"


def _named(effect: explain.Effect) -> str:
    return f"{effect.name} {effect_text(effect)}"


def _range(interval: Sequence[float]) -> str:
    return " to ".join(signed(x) for x in interval)


def _tokens(interval: Sequence[float | None], between: str = " to ") -> str:
    low, high = interval
    return (
        ("below 1" if low is None else tokens_text(low))
        + between
        + ("beyond 10¹⁵" if high is None else tokens_text(high))
    )
