"""The report's first lines from planted grids: planted the other way round, they say the other thing."""

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis import headlines
from ctxlm.analysis.crossing import errors
from ctxlm.analysis.phrases import winner
from ctxlm.analysis.scaling import read_grid, summarise
from tests.planted import NESTED, SIZES, effects_of, noise, planted

GRIDS = (
    "study",
    "sizes",
    "baselines",
    "networks",
    "tuned",
    "joint",
    "slow",
    "lean",
    "variance",
    "signs",
    "overfitting",
    "ablations",
    "ablations-full",
)
NOTHING = {name: tuple(pd.DataFrame() for _ in range(3)) for name in (*GRIDS, "factorial")}


def test_chance_is_cautioned_of_where_it_was_measured(outputs):
    laws = {"A": (-0.3, 800), "B": (-0.3, 800)}
    chance = effects_of(np.random.default_rng(5), 0.03, 0.03)
    runs, _, val_by_sample = planted(outputs, laws, chance=chance, pairs=NESTED)
    assert "PPL scatters about its mean by" in headlines._caution(runs, val_by_sample)
    one = runs[runs["seed"] % 2 == 0]
    assert headlines._caution(one, val_by_sample) == headlines._caution(runs.iloc[:0], val_by_sample) == ""


def test_over_fitting_is_told_at_the_studys_rate(outputs):
    one = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    lower = one[0].assign(phase2_learning_rate=0.001, run=one[0]["run"] + "-low", overfit_rate=9.0)
    grid = (pd.concat([one[0], lower]), *one[1:])
    text = headlines._overfitting(grid)
    assert text.startswith("when it stops at the study's learning rate (16 runs on 20,000, ") and "+900" not in text
    going = one[0].assign(epochs_run=one[0]["best_epoch"])
    assert headlines._overfitting((pd.concat([going, lower]), *one[1:])) == ""


@pytest.mark.parametrize("first", ["A", "B"])
def test_the_answer_follows_whoever_wins(outputs, first):
    second = "B" if first == "A" else "A"
    options = {"pairs": NESTED, "chance": effects_of(np.random.default_rng(0), 0.01, 0.01)}
    variance_grid = planted(outputs, {first: (-0.40, 800), second: (-0.30, 900)}, **options)
    runs, _, val_by_sample = variance_grid
    shapes = dict.fromkeys(("A", "A-without-phase1", "A-zero"), (6, 128))
    laws = {"A": (-0.3, 800), "A-without-phase1": (-0.3, 900), "A-zero": (-0.3, 1600)}
    grids = dict.fromkeys(("variance", "overfitting", "sizes"), variance_grid)
    grids["ablations"] = planted(outputs, laws, shapes=shapes, seeds=(1, 2))
    grids["ablations-full"] = planted(outputs, {"A": (-0.3, 800), "A-zero": (-0.3, 600)}, shapes=shapes)
    grids["study"] = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 900)})
    options = {"shapes": dict.fromkeys(("KN-3", "KN-4"), (1, 1)), "model": "kneser-ney"}
    planted(outputs, {"KN-3": (-0.3, 640), "KN-4": (-0.3, 700)}, **options)
    grids["baselines"] = read_grid("planted", models=["kneser-ney"])
    grids["networks"] = NOTHING["networks"]
    grids["tuned"] = planted(outputs, {"tuned-A": (-0.3, 500)}, shapes={"tuned-A": (6, 128)})
    grids["joint"] = planted(outputs, {"joint-A": (-0.3, 400)}, shapes={"joint-A": (6, 128)})
    grids["slow"] = planted(outputs, {"slow-A": (-0.3, 360)}, shapes={"slow-A": (6, 128)})
    grids["lean"] = planted(outputs, {"lean-A": (-0.3, 342)}, shapes={"lean-A": (6, 128)})
    crossed = {f"L{depth}-C{width}": (depth, width) for depth, width in itertools.product((3, 6), (128, 256))}
    laws = {label: (-0.3, 800 * (0.9 if depth == 6 else 1)) for label, (depth, _) in crossed.items()}
    grids["factorial"] = planted(outputs, laws, shapes=crossed, seeds=(1, 2), chance=noise(0.001))
    grids["signs"] = planted(outputs, {first: (-0.40, 880), second: (-0.30, 900)}, pairs=NESTED[::2], embedding_seed=1)
    differences = summarise("planted", runs, val_by_sample)["paired_differences"]
    assert [winner(difference) for difference in differences] == [first] * 4
    table = headlines.elsewhere(errors(runs, val_by_sample)["pooled"], grids)
    scale, names = (table["Scale: grids"].str.split(": ").str[part] for part in (0, 1))
    assert set(", ".join(names).split(", ")) == set(grids) - {"networks"}  # it has no run
    said = dict(zip(table["Question"] + " " + scale, table["Answer"], strict=True))
    assert headlines.scales(grids).endswith(
        "(quick: A 6 layers of 128, B 3 layers of 256; full: A 6 layers of 128, B 3 layers of 256):"
    )
    answer = said["Deep and narrow, or shallow and wide? full"]
    sign, number = (-1, r"−([\d.]+)") if first == "A" else (1, r"\+([\d.]+)")
    gaps = re.findall(rf"{number} % \({number} to {number} %\) at ([\d,]+)", answer)  # no interval has a 0 inside
    assert [gap[3].replace(",", "") for gap in gaps] == [f"{size}" for size in SIZES]
    planted_gaps = [100 * math.expm1(sign * (math.log(9 / 8) + 0.1 * math.log(size / 20_000))) for size in SIZES]
    assert [sign * float(gap[0]) for gap in gaps] == pytest.approx(planted_gaps, abs=1.5)
    assert answer.startswith(f"{first} is better than {second} at ") and answer.endswith(" tokens.")
    alone = headlines._gaps(grids["study"], "study")
    assert alone.startswith("A did better, in single runs, than B at ") and ": −11.1 % (" in alone
    assert said["And with other seeds and texts? quick"] == f"{answer}"
    equal = planted(outputs, dict.fromkeys("AB", (-0.3, 800)), pairs=NESTED[::2], chance=noise(0.02))
    assert re.fullmatch(
        r"on 20 validation samples A and B cannot be told apart at any of 4 sizes \([−+.\d]+ to [−+.\d]+ %; intervals "
        r"within −[.\d]+ to \+[.\d]+ %; \d+ runs in \d+ replicates\); on the test text, without intervals: .* tokens",
        headlines._gaps(equal, "planted"),
    )
    chance = said["How much is chance? quick"]
    assert "PPL scatters about its mean by" in chance and "80 runs)" in chance
    signs = said["Do the signs of the embedding matter? quick"]
    assert re.search(rf"change PPL: .*?{first} \+(9|1\d)\.\d % \([^)]*\), ", signs)
    assert "; with signs drawn, PPL over all sizes scatters between replicates (standard deviation) by " in signs
    shape = said["What are depth and width worth? quick"]
    assert shape.startswith("With depth and width crossed (32 runs in 2 replicates), PPL changes by −10.0 % (")
    assert "with 6 layers against 3 and" in shape
    more = f"{first} gains more from more text (p < 0.001, 80 runs in 5 replicates)"
    assert said["Do the curves cross? quick"].startswith(more)
    assert said["Does Phase 2 over-fit? quick"].startswith("When it stops at the study's learning rate (80 runs on ")
    assert ": A +6.0 % instead of +6.0 %." in said["Does it over-fit without the contexts? quick"]
    asked = "What do Phase 1 and the contexts contribute"
    parts, whole = (said[f"{asked}{scale}"] for scale in ("? quick", " at full size? full"))
    assert parts.startswith("PPL changes, of A with Phase 1 left out +12.5 % (") and ": Phase 1 lowers PPL; " in parts
    assert "; of A with contexts of zeros +100.0 % (" in parts
    assert whole.startswith("PPL changes, of A with contexts of zeros −25.0 % (") and whole.endswith(
        ", in single runs."
    )
    over = " tokens (20 validation samples drawn again; single runs, seeds not covered)."
    ordinary = said["What would a user otherwise pick? full"]
    assert ordinary.startswith("PPL against A: KN-4 −12.5 % (") and ordinary.endswith(over)
    assert ": tuned-A −37.5 % (" in said["What does another recipe for Phase 2 do? full"]
    joint = said["And if contexts learn to predict, too? full"]
    longer = said["What does a longer memory bring? full"]
    fewer = said["And a single input token? full"]
    assert fewer.startswith("PPL with one input token instead of two and no warm-up: lean-A −5.0 % (")
    assert longer.startswith("PPL with a slow context and ") and "blanked in training: slow-A −10.0 % (" in longer
    assert ": joint-A −20.0 % (" in joint and joint.endswith(" tokens (single runs, seeds not covered).")


def test_without_results_nothing_is_said():
    assert headlines.elsewhere([], NOTHING).empty
    assert headlines.scales(NOTHING) == "**What the grids of this repository say**:"


def test_models_are_set_against_a_by_name(outputs):
    study = planted(outputs, {"A": (-0.3, 800)}, sizes=(20_000, 30_000), pairs=NESTED[::2])
    tuned = planted(outputs, {"X": (-0.3, 500), "Y": (-0.3, 400)}, sizes=(20_000,), shapes=dict.fromkeys("XY", (1, 1)))
    more = planted(outputs, {"Z": (-0.3, 300)}, sizes=(20_000,), shapes={"Z": (1, 1)}, ngram_second_half=True)
    late = planted(outputs, {"W": (-0.3, 600)}, sizes=(30_000,), shapes={"W": (1, 1)}, pairs=NESTED[::2])
    text = headlines._beside_a(study, [tuned, more, late], ("W", "Y", "Z"))
    assert text.startswith("PPL against A: Z (counts more text) −62.5 % (") and "; Y −50.0 % (" in text
    assert "; W −25.0 % (" in text and "X" not in text
    assert text.endswith(" at 30,000 tokens (20 validation samples drawn again; single runs, seeds not covered)")
    assert headlines._beside_a(study, [late]).endswith("(20 validation samples drawn again)")
    assert headlines._beside_a(study, [late], ("X",)) == ""
