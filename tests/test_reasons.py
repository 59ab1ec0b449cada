"""Sentences about errors and reasons from planted grids: planted the other way round, they say the other thing."""

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis import explain, plots, reasons
from ctxlm.analysis.crossing import errors
from ctxlm.analysis.scaling import effective
from ctxlm.analysis.tables import published_runs
from tests.planted import NESTED, SIZES, effects_of, noise, planted


def pair(outputs, laws, **options):
    runs, _, val_by_sample = planted(outputs, laws, **options)
    (found,) = errors(runs, val_by_sample)["pooled"]
    return reasons.slopes(found)


STEEP, FLAT = (-0.40, 830), (-0.30, 800)


def many(sd=0.005, seed=0):
    """Five replicates of every size, with errors of runs."""
    return {"pairs": [(42 + k, k) for k in range(5)], "chance": noise(sd, seed)}


@pytest.mark.parametrize(("laws", "steeper"), [({"A": FLAT, "B": STEEP}, "B"), ({"A": STEEP, "B": FLAT}, "A")])
def test_the_steeper_law_gains_more(outputs, laws, steeper):
    text = pair(outputs, laws, **many())
    assert (
        f": {steeper} gains more from more text." in text
        and "(n = 40 runs, 5 replicates, 4 d.o.f.; 95 % interval" in text
    )
    assert f"α of B minus α of A is {'−' if steeper == 'B' else '+'}0." in text and "t test, p " in text
    meets = 20_000 * (830 / 800) ** 10
    found = float(re.search(r"They meet at ([\d,]+) tokens", text)[1].replace(",", ""))
    assert found == pytest.approx(meets, rel=0.1)
    assert "bootstrap over replicates and validation samples" in text and "(95 %: Fieller" in text


def test_a_slope_that_hangs_on_the_validation_text_is_no_finding(outputs):
    runs, _, val_by_sample = planted(outputs, {"A": FLAT, "B": STEEP}, **many())
    tilted = val_by_sample["experiment"].eq("B") & val_by_sample["sample"].eq(val_by_sample["sample"].max())
    sums = val_by_sample.groupby("run")["tokens"].transform("sum")
    x = np.log(val_by_sample["train_tokens"] / 30_000)  # all of B's gain lies in a single sample
    val_by_sample["loss_sum"] += 0.1 * x * val_by_sample["experiment"].eq("B") * val_by_sample["tokens"]
    val_by_sample.loc[tilted, "loss_sum"] -= 0.1 * (x * sums)[tilted]
    (found,) = errors(runs, val_by_sample)["pooled"]
    assert "B gains more on this validation text, but on another it may not" in reasons.slopes(found)


def test_equal_slopes_cannot_be_told_apart(outputs):
    text = pair(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, **many(0.03, seed=3))
    assert "the slopes of A and B cannot be told apart" in text and "gains more" not in text
    assert "anywhere" in text  # nothing bounds the crossover


def test_without_degrees_of_freedom_nothing_is_tested(outputs):
    text = pair(outputs, {"A": FLAT, "B": STEEP}, sizes=SIZES[:2])
    assert "(n = 4, no error can be estimated): no test can be made" in text
    text = pair(outputs, {"A": FLAT, "B": STEEP}, sizes=SIZES[:1])
    assert text.startswith("**Slopes of A and B.** Not compared: A has runs of 1 size")


def test_single_runs_are_said_to_be_single(outputs):
    text = pair(outputs, {"A": FLAT, "B": STEEP}, chance=noise(0.005))
    assert "(n = 8 runs, in 4 pairs of equal size, seed and text, taken as independent, 2 d.o.f.;" in text
    assert "bootstrap over validation samples alone" in text


def bent(label, size, *_):
    """What makes a law of exponent −0.3 level off."""
    return 0.3 * math.log(size / 20_000) + 40 * (size**-0.4 - 20_000**-0.4)


@pytest.mark.parametrize("bends", [False, True])
def test_the_form_that_was_planted_is_preferred(outputs, bends):
    sizes = (10_000, 20_000, 40_000, 80_000, 160_000, 320_000)
    rough = noise(0.002)
    chance = (lambda *run: bent(*run) + rough()) if bends else rough
    runs, _, val_by_sample = planted(outputs, {"A": (-0.3, 800)}, sizes=sizes, seeds=(1, 2), chance=chance)
    text = reasons.forms(errors(runs, val_by_sample)["forms"])
    assert f"A: AICc prefers {'the saturating form' if bends else 'the power law'} by" in text
    assert re.search(r"power law [−+][\d.]+ % at 160,000; power law [−+][\d.]+ % at 320,000", text)
    assert "n = 12, 9 d.o.f." in text
    few, _, val_by_sample = planted(outputs, {"A": (-0.3, 800)}, sizes=sizes[:3], grid="planted")
    few = few[few["train_tokens"] <= 40_000]
    assert "only the power law (a law that saturates needs" in reasons.forms(errors(few, val_by_sample)["forms"])


@pytest.mark.parametrize(
    ("seed", "window", "what"),
    [
        (0.05, 0.0, "initialisation matters more"),
        (0.01, 0.08, "training text matters more"),
        (0.03, 0.03, "which of the two is larger cannot be told"),
    ],
)
def test_the_larger_source_of_chance_is_named_where_it_can_be(outputs, seed, window, what):
    chance = effects_of(np.random.default_rng(5), seed, window)
    pairs = [(42 + k, k // 2) for k in range(40 if not window else 10)]  # few windows cannot tell
    runs, _, val_by_sample = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, chance=chance, pairs=pairs)
    text = reasons.chance(runs, val_by_sample)
    assert what in text and f"(n = {len(runs)} runs)" in text
    assert text.count(" d.o.f., 95 % interval ") == 4 and "Satterthwaite" in text
    assert "variance of text over that of initialisation" in text
    assert plots.plot_components(runs, val_by_sample).axes[0].get_xlabel()
    one = runs[runs["seed"] % 2 == 0]
    assert reasons.chance(one, val_by_sample).startswith("**Chance.** Not taken apart: it takes two training windows")
    assert "cannot be taken apart" in plots.plot_components(one, val_by_sample).axes[0].texts[0].get_text()


def test_published_gaps_are_held_against_what_samples_resolve(outputs):
    laws = {"A": (-0.3, 800), "B": (-0.3, 800)}
    published = published_runs()
    _, _, fine = planted(outputs, laws, samples=50, spread=0.005)
    text = reasons.resolved(fine, published)
    weigh = 50 * effective(fine.groupby("sample")["tokens"].first()) / 50
    assert f"as {weigh:.0f} equal ones, which leaves {weigh - 1:.0f} d.o.f." in text
    assert text.endswith("Of its gaps, −5.4 % at 86,925 tokens exceeds that and +1.7 % at 183,620 tokens exceeds that.")
    theirs = (published["train_tokens"] / published["train_samples"]).mean()
    assert f"The study's samples have some {theirs:,.0f} tokens" in text
    _, _, coarse = planted(outputs, laws, samples=50, spread=0.1)
    text = reasons.resolved(coarse, published)
    assert text.endswith("does not exceed that and +1.7 % at 183,620 tokens does not exceed that.")
    _, _, between = planted(outputs, laws, samples=50, spread=0.025)
    assert reasons.resolved(between, published).endswith(
        "−5.4 % at 86,925 tokens exceeds that and +1.7 % at 183,620 tokens does not exceed that."
    )
    assert reasons.resolved(coarse.iloc[:0], published) == ""
    assert reasons.resolved(fine[fine["experiment"] == "A"], published) == ""


def test_overfitting_is_put_down_to_what_was_planted(outputs):
    runs, history, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    model, best, gap = reasons.overfitting(runs, history, val)
    assert "a doubling of the training tokens −18" in best  # the planted law: 2^-0.3
    assert (
        "(n = 16 runs, Student's over 2 replicates, 1 d.o.f.)" in model
        and "a doubling of the training tokens −" in model
        and "B against A +" in model
    )
    worst = runs.loc[(runs["experiment"] == "B") & (runs["train_tokens"] == SIZES[0]), "token_block_params_trained"]
    assert f"to {worst.iloc[0] / SIZES[0]:,.0f} trained parameters a token, n = 8" in gap
    reversed_rates = runs.assign(overfit_rate=0.5 - runs["overfit_rate"])
    model, *_ = reasons.overfitting(reversed_rates, history, val)
    assert "a doubling of the training tokens +" in model and "B against A −" in model
    assert "Not modelled" in reasons.overfitting(runs[runs["train_tokens"] == SIZES[0]], history, val)[0]
    assert plots.plot_generalisation(explain.generalisation(history, runs)).axes[0].lines
    assert plots.plot_effects({"": explain.overfitting_effects(runs)}, "change").axes[0].get_yticks().size == 2


def test_runs_that_did_not_stop_are_counted_and_left_out(outputs):
    runs, history, val = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    runs.loc[runs["train_tokens"] == SIZES[1], "best_epoch"] = 5
    text = reasons.overfitting(runs, history, val)[0]
    assert "4 of 16 runs had not stopped at their last epoch and are left out: 4 at a rate of 0.002." in text
    assert "Not modelled: 0 runs cannot tell" in reasons.overfitting(runs.assign(best_epoch=5), history, val)[0]
    assert reasons.as_group(explain.overfitting_effects, runs.assign(best_epoch=5)) == {}


def test_between_epochs_the_gain_is_said_to_be_partly_luck(outputs):
    runs, history, val = planted(outputs, {"A": (-0.3, 800)}, sizes=SIZES[:1])
    row = history[history["metric"] == "val_loss"].iloc[0].to_dict()
    updates = [{**row, "phase": "phase2_updates", "step": step, "value": 5.0} for step in (10, 20)]
    ends = [
        {**row, "phase": "phase2", "metric": "updates", "step": epoch, "value": 40 * epoch} for epoch in range(1, 6)
    ]
    history = pd.concat([history, pd.DataFrame(updates + ends)])
    text = reasons.overfitting(runs, history, val)[-1]
    assert "A at a rate of 0.002 after 0.2 epochs" in text.replace("0.25", "0.2") and "gain is luck" in text


def test_who_remembers_longest_is_read_off_the_runs(outputs):
    runs, history, _ = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    horizon, recent = reasons.memory(runs, history)
    assert "A 8.0 tokens before training and 7.0 after it" in horizon and "n = 8" in horizon
    assert "B 14.0 tokens before training and 12.0 after it" in horizon and horizon.endswith(
        "B remembers longer, by 5.0 tokens (5.0 to 5.0, Student's over 2 replicates in pairs)."
    )
    cost = math.expm1(math.exp(-1))
    assert f"A +{100 * cost:.1f} % for 1" in recent and "8 tokens are as good as all" in recent.split("B +")[0]
    assert "are as good as all" not in recent.split("B +")[1]
    swapped = runs.assign(horizon=40 - runs["horizon"])
    assert "A remembers longer, by 5.0 tokens (5.0 to 5.0, " in reasons.memory(swapped, history)[0]
    unknown = runs.assign(horizon=runs["horizon"].where((runs["experiment"] == "A") | (runs["seed"] == 1)))
    text = reasons.memory(unknown, history)[0]
    assert "B more than can be told in 4 of 8 runs" in text and "remembers longer" not in text
    assert "remembers longer" not in reasons.memory(runs[runs["seed"] == 1], history)[0]  # nothing to judge it by
    unknown = runs.assign(horizon_init=runs["horizon_init"].where(runs["experiment"] == "A"))
    assert "B more than can be told in 8 of 8 runs" in reasons.memory(unknown, history)[0]
    equal = reasons.memory(runs.assign(horizon=5 + runs["seed"] * (runs["experiment"] == "A")), history)[0]
    assert "remembers longer" not in equal
    assert reasons.memory(runs.drop(columns="horizon"), history) == []
    assert len(plots.plot_reach(history, explain.recency(history)).axes) == 2


def test_an_ablation_that_hurts_shows_that_the_part_helps(outputs):
    shapes = dict.fromkeys(("A", "A-without-phase1", "A-zero"), (6, 128))
    laws = {"A": (-0.3, 800), "A-without-phase1": (-0.3, 800), "A-zero": (-0.3, 1000)}
    options = {"shapes": shapes, "seeds": (1, 2, 3), "chance": noise(0.01)}
    runs, _, val = planted(outputs, laws, **options)
    phase1, zero = reasons.ablations(runs, val)
    assert (
        "**Phase 1 left out**" in phase1
        and ("no effect can be told" in phase1 or "the same to 1 %" in phase1)
        and "B" not in phase1
    )
    drawn = r"\(n = 12 pairs in 3 replicates, crossed with 20 validation samples drawn again, [\d.]+ d.o.f. by Satt"
    assert "**Contexts of zeros**" in zero and re.search(drawn, zero)
    assert "contexts lower PPL" in zero
    runs, _, val = planted(outputs, laws | {"A-without-phase1": (-0.3, 700)}, **options)
    assert "Phase 1 raises PPL" in reasons.ablations(runs, val)[0]
    one = reasons.ablations(runs[runs["seed"] == 1], val)[0]
    drawn = r"\(n = 4 pairs, 20 validation samples drawn again, [\d.]+ d.o.f., seeds not covered\)"
    assert re.search(rf"{drawn}: Phase 1 raises PPL, in single runs\.", one)
    assert "(last PPL / best PPL; single runs)" in one
    (axes,) = plots.plot_effects(reasons.ablation_effects(runs, val_by_sample=val), "change").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A: Phase 1 left out", "A: contexts of zeros"]
    rates = {"A": 0.5, "A-without-phase1": 0.5, "A-zero": 0.2}
    kept = runs.assign(overfit_rate=runs["experiment"].map(rates))
    phase1, zero = reasons.ablations(kept, val)
    assert "Over-fitting (last PPL / best PPL; Student's over replicates) changes, of A 0.0 %" in phase1
    assert "of A −20.0 % (−20.0 to −20.0 %)." in zero
    found = reasons.ablation_effects(kept, reasons.OVERFITTING)["A"]
    assert [effect.estimate for effect in found] == pytest.approx([0, math.log(1.2 / 1.5)])
    assert "**Together**" not in "".join(reasons.ablations(runs, val))
    apart = runs[(runs["experiment"] == "A") == (runs["seed"] == 1)]  # of each, but no two that belong together
    assert reasons.ablations(apart, val) == [] and reasons.ablation_effects(apart) == {}
    assert (
        reasons.ablation_effects(runs, val_by_sample=val.assign(tokens=val["tokens"] + (val["experiment"] == "A")))
        == {}
    )


def test_contexts_that_tell_something_may_still_cost_more(outputs):
    shapes = dict.fromkeys(("A", "A-zero", "A-random"), (6, 128))
    laws = {"A": (-0.3, 800), "A-zero": (-0.3, 700), "A-random": (-0.3, 1000)}
    options = {"shapes": shapes, "seeds": (1, 2, 3), "chance": noise(0.01)}
    zero, shuffled, together = reasons.ablations(*planted(outputs, laws, **options)[::2])
    assert "contexts raise PPL" in zero and "a text's own contexts are better" in shuffled
    assert together.startswith("**Together**, for A: the TokenBlock does better without contexts")
    assert len(reasons.ablations(*planted(outputs, laws | {"A-zero": (-0.3, 900)}, **options)[::2])) == 2


@pytest.mark.parametrize("sign", [-1, 1])
def test_depth_and_width_are_told_apart(outputs, sign):
    shapes = {f"L{depth}-C{width}": (depth, width) for depth, width in itertools.product((3, 6), (128, 256))}
    laws = {
        label: (-0.3, 800 * math.exp(sign * (0.1 * (depth == 6) - 0.05 * (width == 256))))
        for label, (depth, width) in shapes.items()
    }
    runs, _, val = planted(outputs, laws, shapes=shapes, seeds=(1, 2, 3), chance=noise(0.005))
    ppl, rates, horizon = reasons.depth_and_width(runs, val)
    up, down = ("+", "−") if sign > 0 else ("−", "+")
    assert f"6 layers against 3 {up}" in ppl and f"context 256 against 128 {down}" in ppl
    assert (
        "(n = 48 runs, 3 replicates crossed with 20 validation samples drawn again, " in ppl
        and "over-fitting (last PPL / best PPL)** (n = 48 runs, Student's over 3 replicates, 2 d.o.f.)" in rates
        and "6 layers against 3 −" in horizon
    )
    (text,) = reasons.depth_and_width(runs[runs["num_layers"] == 3], val)
    assert "Not taken apart" in text


@pytest.mark.parametrize(("first", "second"), [("A", "B"), ("B", "A")])
def test_drawn_signs_are_set_beside_the_conventions_in_pairs(outputs, first, second):
    fixed = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 800)}, pairs=NESTED, chance=noise(0.001))
    laws = {first: (-0.3, 800), second: (-0.3, 1000)}
    drawn = planted(outputs, laws, sizes=SIZES[:2], pairs=NESTED[:8:2], chance=noise(0.001, 1), embedding_seed=1)
    text = reasons.signs(drawn, fixed)
    changes = {first: r"[+−]?0\.\d %", second: r"\+2[45]\.\d %"}
    for label in "AB":
        assert re.search(rf"{label} {changes[label]} \(.*?\) \(n = 8 pairs in 4 replicates, crossed with 20", text)
    gap = "−20" if first == "A" else r"\+2[45]"
    assert re.search(
        rf"PPL of A against B is then {gap}\.\d % \(.*?\) at 20,000; {gap}", text.replace("−19.9", "−20.0")
    )
    assert text.endswith(f"with drawn signs {first} is better.") and "at 45,000" not in text
    nothing = tuple(pd.DataFrame() for _ in range(3))
    assert reasons.signs(nothing, fixed) == reasons.signs(drawn, nothing) == ""


@pytest.mark.parametrize(("spread", "sure"), [(0.2, True), (0.01, False)])
def test_what_drawn_signs_do_to_the_spread_is_tested(outputs, spread, sure):
    quiet = [0.01, -0.01, 0.005, -0.015]
    loud = [spread * x / 0.01 for x in quiet]
    laws, seeds = {"A": (-0.3, 800)}, [seed for seed, _ in NESTED[:8:2]]
    fixed, drawn = (
        planted(
            outputs,
            laws,
            sizes=SIZES[:2],
            pairs=NESTED[:8:2],
            chance=lambda label, size, seed, window, errors=errors: errors[seeds.index(seed)],
            embedding_seed=draw,
        )
        for draw, errors in enumerate((quiet, loud))
    )
    found = re.search(
        r"scatters \(standard deviation\) by ([\d.]+) % instead of ([\d.]+) % for A "
        r"\(n = 4 pairs, Pitman-Morgan, p (.*?)\)",
        reasons.signs(drawn, fixed),
    )
    assert float(found[2]) == pytest.approx(100 * math.expm1(np.std(quiet, ddof=1)), abs=0.05)
    assert float(found[1]) == pytest.approx(100 * math.expm1(np.std(loud, ddof=1)), abs=0.05)
    assert (found[3] == "< 0.001") == sure and (sure or found[3] == "= 1.000")


def test_crossovers_are_set_side_by_side_with_what_is_known_of_them(outputs):
    def found(laws, **options):
        runs, _, val_by_sample = planted(outputs, laws, **options)
        return errors(runs, val_by_sample)["pooled"]

    several = found({"A": FLAT, "B": STEEP}, **many())
    two = found({"A": STEEP, "B": FLAT}, sizes=SIZES[:2])
    text = reasons.crossovers([("mine", several), ("small", two), ("equal", found({"A": FLAT, "B": FLAT}))])
    assert re.search(r"A and B of grid mine: [\d,]+ tokens \(n = 40 runs, bootstrap .*\): B gains more from more", text)
    assert re.search(r"grid small: [\d,]+ tokens \(n = 4 runs, no error can be given\)", text)
    assert "A and B of grid equal: none (" in text and "better above" not in text
    assert reasons.crossovers([("mine", [])]) == ""


def test_every_number_follows_the_data(outputs):
    number = re.compile(r"[−+]?\d[\d,.]*\d|\d")

    def said(laws, **options):
        runs, history, val_by_sample = planted(outputs, laws, **options)
        found = errors(runs, val_by_sample)
        texts = [*map(reasons.slopes, found["pooled"]), *reasons.memory(runs, history)[:1]]
        texts += reasons.overfitting(runs, history, val_by_sample)
        return texts

    first = said({"A": FLAT, "B": STEEP}, **many())
    second = said(
        {"A": (-0.21, 700), "B": (-0.35, 741)},
        sizes=(21_000, 29_000, 46_000),
        pairs=[(1, 0), (2, 1), (3, 2)],
        shapes={"A": (5, 104), "B": (2, 160)},
        samples=23,
        chance=noise(0.006, seed=1),
    )
    assert len(first) == len(second)
    for before, after in zip(first, second, strict=True):
        fixed = r"95 %|HC3|Phase 1|p < 0.001|, 1 % is|0.0 % of"
        before, after = (number.findall(re.sub(fixed, "", text)) for text in (before, after))
        assert len(before) == len(after) > 0
        assert not [pair for pair in zip(before, after, strict=True) if pair[0] == pair[1]]
