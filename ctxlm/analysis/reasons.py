"""How sure the findings are and what explains them, in sentences: every number in them is computed from the runs.

Effects are on log PPL and are given as per cent of PPL; every one comes with its n, its degrees of freedom, its 95 %
interval and the test that was used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ctxlm.analysis import explain, variance
from ctxlm.analysis.findings import percent, signed, tokens_text, winner
from ctxlm.memory import FORGOTTEN

SAMPLES = 50
"""Validation samples of the study."""
WORTH = 0.01
"""Nats: a loss that is closer than this (1 % of PPL) to another is called as good."""


def slopes(found: dict[str, Any]) -> str:
    """Do two laws differ in slope, and where do they meet? From one entry of `crossing.errors`' `pooled`."""
    a, b = found["a"], found["b"]
    lead = f"**Slopes of {a} and {b}.**"
    if found["residual_dof"] is None:
        return f"{lead} Not compared: {found['reason']}."
    difference, n, dof = signed(found["slope_difference"]), found["n"], found["residual_dof"]
    if found["slope_interval"] is None:
        return (
            f"{lead} α of {b} minus α of {a} is {difference} (n = {n}, {dof} d.o.f., no interval): no test can be made."
        )
    low, high = found["slope_interval"]
    steeper = b if found["slope_difference"] < 0 else a
    verdict = "the slopes cannot be told apart" if low <= 0 <= high else f"{steeper} gains more from more text"
    robust = found["slope_interval_robust"]
    drawn = "runs and validation samples" if found["bootstrap_runs"] else "validation samples alone, one run a size,"
    return (
        f"{lead} Pooled least squares with interaction: α of {b} minus α of {a} is {difference} (n = {n}, {dof} "
        f"d.o.f.; 95 % interval {_range((low, high))}{f'; with HC3 errors {_range(robust)}' if robust else ''}; "
        f"bootstrap over {drawn} {_range(found['bootstrap_slope'])}; t test, p {_p(found['p_value'])}): {verdict}. "
        f"{_meeting(found)}"
    )


def _meeting(found: dict[str, Any]) -> str:
    if found["crossover_tokens"] is None:
        return f"No crossover: {found['reason']}."
    ends = found["fieller_interval"]
    intervals = {
        "bounded": lambda: f"Fieller {_tokens(ends)}",
        "outside": lambda: f"Fieller: anywhere but between {_tokens(ends, ' and ')}",
        "unbounded": lambda: "Fieller: anywhere, the data do not bound it",
    }[found["fieller"]]()
    if found["delta_interval"]:
        intervals += f"; delta method {_tokens(found['delta_interval'])}"
    if found["bootstrap_crossover"]:
        intervals += f"; bootstrap {_tokens(found['bootstrap_crossover'])}"
    return (
        f"They meet at {tokens_text(found['crossover_tokens'])} tokens (95 %: {intervals}; "
        f"{100 * found['bootstrap_without']:.1f} % of its draws have no crossover)."
    )


def forms(found: dict[str, dict[str, Any]]) -> str:
    """Is a power law enough, and does it foretell larger sizes? From `crossing.errors`' `forms`."""
    said = [_form(label, form) for label, form in found.items()]
    return f"**Form.** The power law against loss = E + B · tokens^−β. {'. '.join(said)}." if said else ""


def _form(label: str, form: dict[str, Any]) -> str:
    bent = form["saturating"]
    if bent is None:
        return f"{label}: only the power law ({form['reason']})"
    errors = "; ".join(f"{row['form']} {percent(row['error'])} at {row['tokens']:,}" for row in form["extrapolated"])
    held = f"; fitted without the largest sizes, PPL foretold there is off by: {errors} tokens" if errors else ""
    if bent["aicc"] is None or bent["aicc_power_law"] is None:
        return f"{label}: too few runs to compare by AICc{held}"
    gain = bent["aicc_power_law"] - bent["aicc"]
    shape = f"floor {bent['floor']:.2f} nats, β = {bent['beta']:.2f}" if bent["bends"] else "it finds no floor"
    return (
        f"{label}: AICc prefers {'the saturating form' if gain > 0 else 'the power law'} by {abs(gain):.1f} "
        f"({shape}; n = {bent['n']}, {bent['residual_dof']} d.o.f.){held}"
    )


def chance(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    """What the spread between runs of one configuration and size comes from."""
    try:
        found = variance.components(runs, val_by_sample).set_index("source")
    except ValueError as error:
        return f"**Chance.** Not taken apart: {error}."
    sd, dof = found["sd"], found["dof"]

    def tested(source: str) -> str:
        return f"{_size(sd[source])} ({dof[source]} d.o.f., F test, p {_p(found.loc[source, 'p_value'])})"

    single = math.sqrt(sum(sd[source] ** 2 for source in ("seed", "data_seed", "residual")))
    return (
        f"**Chance.** Standard deviations of PPL by two-way analysis of variance within configuration and size "
        f"(n = {len(runs)}): initialisation {tested('seed')}, training text {tested('data_seed')}, both together and "
        f"the rest {_size(sd['residual'])} ({dof['residual']} d.o.f.). "
        f"{'Initialisation' if sd['seed'] > sd['data_seed'] else 'Training text'} matters more. Together they move a "
        f"run by {_size(single)}; the configurations of a size lie {_size(sd['configuration'])} from their mean, "
        f"{'more' if sd['configuration'] > single else 'less'} than that. The choice of validation samples moves all "
        f"runs alike, by {_size(sd['validation'])}."
    )


def in_short(summary: dict[str, Any], pooled: Sequence[dict[str, Any]], grids: Mapping[str, Any]) -> str:
    """The answer in five lines, those that can be given.

    Args:
        summary: `scaling.summarise` of the grid that is reported.
        pooled: of `crossing.errors`, from the runs that say most about slopes.
        grids: name → what `scaling.read_grid` gave, of the grids that explain.
    """
    lines = [_verdicts(summary["paired_differences"])]
    runs, _, val_by_sample = grids["variance"]
    lines += [caution(runs, val_by_sample)]
    lines += [_slopes_in_short(found) for found in pooled if len(pooled) == 1]
    tried, _, _ = grids["overfitting"]
    try:
        effects = {effect.name: effect for effect in explain.overfitting_effects(tried)}
        rates = tried.groupby("configuration")["overfit_rate"].mean()
        climbs = " and ".join(f"{percent(rate)} ({label})" for label, rate in rates.items())
        lines.append(
            f"Phase 2 over-fits: by its last epoch PPL is {climbs} above its best; "
            + " and ".join(
                f"{name} changes that ratio by {_effect(effects[name])}" for name in HALVINGS if name in effects
            )
        )
    except (KeyError, ValueError):
        pass
    if "horizon" in runs:
        spans = runs.groupby("experiment")["horizon"].mean()
        reach = " and ".join(f"{tokens:.1f} tokens ({label})" for label, tokens in spans.items())
        parts = [f"Contexts reach back {reach}, until {FORGOTTEN:.0%} of a disturbance is left"]
        for suffix, what in (("without-phase1", "without Phase 1"), ("zero", "without contexts")):
            found = _ablated(grids["ablations"][0], suffix)
            if found:
                parts.append(
                    f"{what} PPL is " + " and ".join(f"{percent(math.expm1(e.estimate))} ({e.name})" for e in found)
                )
        lines.append("; ".join(parts))
    return "\n".join(f"- {line.rstrip('.')}." for line in lines if line)


HALVINGS = ("a halved learning rate", "a doubling of the training tokens")


def _verdicts(differences: Sequence[dict[str, Any]]) -> str:
    """Who wins how often, for a single pair."""
    if len({(d["a"], d["b"]) for d in differences}) != 1:
        return ""
    a, b = differences[0]["a"], differences[0]["b"]
    won = [winner(d) for d in differences]
    low, high = min(d["log_ppl"] for d in differences), max(d["log_ppl"] for d in differences)
    return (
        f"{a} is better than {b} at {won.count(a)} of {len(won)} sizes, {b} than {a} at {won.count(b)}; PPL of {a} "
        f"against {b}: {percent(math.expm1(low))} to {percent(math.expm1(high))}"
    )


def _slopes_in_short(found: dict[str, Any]) -> str:
    interval = found.get("slope_interval")
    if interval is None:
        return ""
    a, b = found["a"], found["b"]
    if interval[0] <= 0 <= interval[1]:
        return (
            f"The laws of {a} and {b} do not differ in slope as far as {found['n']} runs can tell "
            f"(p {_p(found['p_value'])}): no crossover can be claimed"
        )
    steeper = b if found["slope_difference"] < 0 else a
    where = (
        ""
        if found["crossover_tokens"] is None
        else f"; the laws meet at {tokens_text(found['crossover_tokens'])} tokens"
    )
    return f"{steeper} gains more from more text than the other (p {_p(found['p_value'])}, {found['n']} runs){where}"


def caution(runs: pd.DataFrame, val_by_sample: pd.DataFrame) -> str:
    """What a reader of single runs must know of chance: nothing where it has not been measured."""
    try:
        sd = variance.components(runs, val_by_sample).set_index("source")["sd"]
    except (KeyError, ValueError):
        return ""
    return (
        f"How much is chance: at the quick scale, another seed moves a run's PPL by {_size(sd['seed'])} and other "
        f"training text by {_size(sd['data_seed'])} (standard deviations, {len(runs)} runs; see “Chance” below)."
    )


def resolved(val_by_sample: pd.DataFrame, published: pd.DataFrame, a: str = "A", b: str = "B") -> str:
    """What differences the study's number of validation samples can resolve, and which published gaps exceed that."""
    of_a, of_b = (val_by_sample[val_by_sample["experiment"] == label] for label in (a, b))
    limits = [
        variance.resolution(*(table[table["train_tokens"] == size] for table in (of_a, of_b)), samples=SAMPLES)
        for size in sorted(set(of_a["train_tokens"]) & set(of_b["train_tokens"]))
    ]
    if not limits:
        return ""
    length = val_by_sample.groupby("run")["tokens"].mean().iloc[0]
    theirs = (published["train_tokens"] / published["train_samples"]).mean()
    ppl = published.pivot(index="train_tokens", columns="experiment", values="val_ppl")
    gaps = {size: math.log(row[a] / row[b]) for size, row in ppl.iterrows()}
    said = [
        f"{percent(math.expm1(gap))} at {size:,} tokens {'exceeds' if abs(gap) > max(limits) else 'does not exceed'} it"
        for size, gap in gaps.items()
    ]
    return (
        f"**Resolution.** In pairs, {SAMPLES} validation samples of some {length:,.0f} tokens tell {a} from {b} "
        f"where PPL differs by {_size(min(limits))} to {_size(max(limits))} or more (95 % interval, Student's with "
        f"{SAMPLES - 1} d.o.f.; seeds not counted). The study's samples have some {theirs:,.0f} tokens, which resolves "
        f"less. Of its gaps, {' and '.join(said)}."
    )


def overfitting(runs: pd.DataFrame, history: pd.DataFrame) -> list[str]:
    """What over-fitting depends on, how wide the gap is, and where within the epochs the best point lies."""
    try:
        effects = explain.overfitting_effects(runs)
    except ValueError as error:
        return [f"**What over-fitting depends on.** Not modelled: {error}."]
    said = [
        f"**What over-fitting depends on.** Last PPL / best PPL, by least squares on its logarithm {_how(effects)}: "
        f"{'; '.join(map(_named, effects))}."
    ]
    gaps = explain.generalisation(history, runs)
    if len(gaps) > 1:
        parts = [
            f"{label} {g['best_gap'].mean():.2f} nats after the best epoch and {g['last_gap'].mean():.2f} after the "
            f"last ({_between(g['params_per_token'])} trained parameters a token, n = {len(g)})"
            for label, g in gaps.groupby("experiment")
        ]
        r = np.corrcoef(np.log(gaps["params_per_token"]), gaps["last_gap"])[0, 1]
        said.append(
            "**The gap**, validation loss minus the training loss measured after the same epoch: "
            f"{'; '.join(parts)}. Over all runs it goes with the logarithm of parameters a token at r = {signed(r, 2)}."
        )
    between = explain.between_epochs(history, runs)
    if len(between):
        parts = [
            f"{label} at a rate of {rate:g} after {_between(g['epochs'], 1)} epochs, {_size(g['gain'].mean())} better "
            f"than the best epoch's end (n = {len(g)})"
            for (label, rate), g in between.groupby(["experiment", "phase2_learning_rate"])
        ]
        said.append(f"**Within epochs.** Looked for between epochs too, the best point lies: {'; '.join(parts)}.")
    return said


def memory(runs: pd.DataFrame, history: pd.DataFrame) -> list[str]:
    """How far back contexts reach, before and after Phase 1, and how many tokens are enough."""
    if "horizon" not in runs:
        return []
    horizons = runs.groupby("experiment")[["horizon_init", "horizon"]].agg(["mean", "std", "count"])
    parts = [
        f"{label} {row['horizon_init', 'mean']:.1f} tokens before Phase 1 and {row['horizon', 'mean']:.1f} after it "
        f"(sd {row['horizon', 'std']:.1f}, n = {row['horizon', 'count']:.0f})"
        for label, row in horizons.iterrows()
    ]
    said = [
        f"**Memory horizon.** Of a disturbance, {FORGOTTEN:.0%} is left after: {'; '.join(parts)}. "
        f"{horizons['horizon', 'mean'].idxmax()} remembers longest."
    ]
    parts = []
    for label, rows in explain.recency(history).groupby("experiment"):
        rows = rows.set_index("k")
        costs = (
            f"{percent(math.expm1(row.extra_loss))} for {k} ({_percents((row.low, row.high))})"
            for k, row in rows.loc[:8].iterrows()
        )
        enough = rows.index[rows["extra_loss"] < WORTH]
        parts.append(
            f"{label} {', '.join(costs)} (n = {rows['n'].min():.0f})"
            + (f"; {enough[0]} tokens are as good as all, to 1 %" if len(enough) else "")
        )
    if parts:
        said.append(
            "**The last k tokens.** PPL when contexts have read only those, against the whole stream, mean over runs "
            f"with Student's interval: {'. '.join(parts)}."
        )
    return said


def ablations(runs: pd.DataFrame) -> list[str]:
    """What Phase 1 and the contexts contribute, from runs with and without them in pairs."""
    kinds = {
        "without-phase1": ("Phase 1 left out", "Phase 1"),
        "zero": ("Contexts of zeros", "the context"),
        "random": ("Contexts of shuffled tokens", "what was read before"),
    }
    said = []
    for suffix, (what, thing) in kinds.items():
        effects = _ablated(runs, suffix)
        if effects:
            parts = [f"{effect.name} {_effect(effect)}: {_verdict(effect, thing)}" for effect in effects]
            n = f"n = {effects[0].n}, {effects[0].residual_dof} d.o.f., Student's paired interval"
            said.append(f"**{what}**, in pairs of equal size and seed ({n}), changes PPL of {'; '.join(parts)}.")
    return said


def _ablated(runs: pd.DataFrame, suffix: str) -> list[explain.Effect]:
    """The effect of one ablation, labelled `<configuration>-<suffix>`, on every configuration that has it."""
    labels = set(runs["experiment"]) if len(runs) else set()
    bases = sorted(label for label in labels if f"{label}-{suffix}" in labels)
    return [replace(explain.paired_effect(runs, f"{base}-{suffix}", base), name=base) for base in bases]


def _verdict(effect: explain.Effect, thing: str) -> str:
    if effect.interval is None or effect.interval[0] <= 0 <= effect.interval[1]:
        return "no effect can be told"
    return f"{thing} helps" if effect.estimate > 0 else f"{thing} harms"


def depth_and_width(runs: pd.DataFrame) -> list[str]:
    """Main effects and interaction of depth and width on PPL, over-fitting and the horizon."""
    responses = {"PPL": runs["val_loss"], "over-fitting (last PPL / best PPL)": np.log1p(runs["overfit_rate"])}
    if "horizon" in runs and runs["horizon"].notna().all():
        responses["the memory horizon"] = np.log(runs["horizon"])
    said = []
    for what, values in responses.items():
        try:
            effects = explain.factorial_effects(runs.assign(response=values), "response")
        except ValueError as error:
            return [f"**Depth and width.** Not taken apart: {error}."]
        said.append(f"**Depth, width and {what}** {_how(effects)}: {'; '.join(map(_named, effects))}.")
    return said


def _how(effects: Sequence[explain.Effect]) -> str:
    return f"(HC3 errors, n = {effects[0].n}, {effects[0].residual_dof} d.o.f.)"


def _named(effect: explain.Effect) -> str:
    return f"{effect.name} {_effect(effect)}"


def _effect(effect: explain.Effect) -> str:
    return f"{percent(math.expm1(effect.estimate))} ({_percents(effect.interval)})"


def _percents(interval: Sequence[float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return "no interval"
    return " to ".join(percent(math.expm1(x)) for x in interval)


def _size(nats: float) -> str:
    """A difference without its sign."""
    return f"{100 * math.expm1(abs(nats)):.1f} %"


def _range(interval: Sequence[float]) -> str:
    return " to ".join(signed(x) for x in interval)


def _tokens(interval: Sequence[float], between: str = " to ") -> str:
    return between.join(tokens_text(x) for x in interval)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _between(values: pd.Series, digits: int = 0) -> str:
    low, high = (f"{x:,.{digits}f}" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
