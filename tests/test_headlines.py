"""The report's first lines from planted grids: planted the other way round, they say the other thing."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from ctxlm.analysis import headlines
from ctxlm.analysis.crossing import errors
from ctxlm.analysis.scaling import read_grid, summarise
from tests.planted import NESTED, effects_of, noise, planted


def test_chance_is_cautioned_of_where_it_was_measured(outputs):
    laws = {"A": (-0.3, 800), "B": (-0.3, 800)}
    chance = effects_of(np.random.default_rng(5), 0.03, 0.03)
    runs, _, val_by_sample = planted(outputs, laws, chance=chance, pairs=NESTED)
    assert "PPL scatters about its mean by" in headlines._caution(runs, val_by_sample)
    one = runs[runs["seed"] % 2 == 0]
    assert headlines._caution(one, val_by_sample) == headlines._caution(runs.iloc[:0], val_by_sample) == ""


def test_what_is_said_of_a_halved_rate_belongs_to_it(outputs):
    nothing = tuple(pd.DataFrame() for _ in range(3))
    one = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 850)}, seeds=(1, 2))
    rates = [
        one[0],
        one[0].assign(phase2_learning_rate=0.001, run=one[0]["run"] + "-low", val_loss=one[0]["val_loss"] + 0.1),
    ]
    losses = pd.concat(
        [one[2], one[2].assign(run=one[2]["run"] + "-low", loss_sum=one[2]["loss_sum"] + 0.1 * one[2]["tokens"])]
    )

    def said(last_epoch):
        runs = pd.concat([rates[0], rates[1].assign(best_epoch=last_epoch)])
        grids = dict.fromkeys(
            ("variance", "ablations", "ablations-full", "study", "baselines", "factorial", "signs"), nothing
        )
        return headlines.headlines({"paired_differences": []}, [], grids | {"overfitting": (runs, one[1], losses)})

    assert "a halved learning rate (which changes the best PPL by +10.5 % (" in said(3)
    assert "which changes the best PPL" not in said(5) and "a doubling of the training tokens changes last PPL" in said(
        5
    )


@pytest.mark.parametrize("first", ["A", "B"])
def test_the_answer_follows_whoever_wins(outputs, first):
    second = "B" if first == "A" else "A"
    options = {"pairs": NESTED, "chance": effects_of(np.random.default_rng(0), 0.01, 0.01)}
    variance_grid = planted(outputs, {first: (-0.40, 800), second: (-0.30, 900)}, **options)
    runs, _, val_by_sample = variance_grid
    shapes = dict.fromkeys(("A", "A-without-phase1", "A-zero"), (6, 128))
    laws = {"A": (-0.3, 800), "A-without-phase1": (-0.3, 900), "A-zero": (-0.3, 1600)}
    grids = {"variance": variance_grid, "overfitting": variance_grid}
    grids["ablations"] = planted(outputs, laws, shapes=shapes, seeds=(1, 2))
    grids["ablations-full"] = planted(outputs, {"A": (-0.3, 800), "A-zero": (-0.3, 600)}, shapes=shapes)
    grids["study"] = planted(outputs, {"A": (-0.3, 800), "B": (-0.3, 900)})
    options = {"shapes": dict.fromkeys(("KN-3", "KN-4"), (1, 1)), "model": "kneser-ney"}
    planted(outputs, {"KN-3": (-0.3, 640), "KN-4": (-0.3, 700)}, **options)
    grids["baselines"] = read_grid("planted", models=["kneser-ney"])
    crossed = {f"L{depth}-C{width}": (depth, width) for depth, width in itertools.product((3, 6), (128, 256))}
    laws = {label: (-0.3, 800 * (0.9 if depth == 6 else 1)) for label, (depth, _) in crossed.items()}
    grids["factorial"] = planted(outputs, laws, shapes=crossed, seeds=(1, 2), chance=noise(0.001))
    grids["signs"] = planted(outputs, {first: (-0.40, 880), second: (-0.30, 900)}, pairs=NESTED[::2], embedding_seed=1)
    summary = summarise("planted", runs, val_by_sample)
    pooled = errors(runs, val_by_sample)["pooled"]
    answer, _, whence, _, *lines = headlines.headlines(summary, pooled, grids).splitlines()
    assert answer.startswith(
        f"**{first} is better than {second} at every one of 4 sizes, each size tested by itself. PPL of A against B, "
    )
    assert whence == "What other grids of this repository say:" and len(lines) == 5
    assert lines[0].startswith(
        "- At the quick scale (A 6 layers of 128, B 3 layers of 256): much is chance: with other"
    )
    assert "PPL scatters about its mean by" in lines[0] and "80 runs)" in lines[0]
    assert "random signs of the embedding's dimensions, which are arbitrary, change PPL by " in lines[0]
    assert re.search(rf"change PPL by .*?\+(9|1\d)\.\d % \([^)]*\) \({first}: ", lines[0])
    assert "; between replicates, PPL over all sizes then scatters (standard deviation) by " in lines[0]
    assert lines[1].startswith(
        "- At the quick scale: with depth and width crossed (32 runs in 2 replicates), PPL changes"
    )
    assert "by −10.0 % (" in lines[1] and "with 6 layers against 3 and" in lines[1]
    assert f"; {first} gains more from more text (p < 0.001, 80 runs in 5 replicates)" in lines[1]
    assert "a doubling of the training tokens changes last PPL / best PPL by −" in lines[2]
    assert "without the contexts it is above its best by +6.0 % instead of +6.0 % (A)" in lines[2]
    assert "with Phase 1 left out, PPL changes by +12.5 % (" in lines[3] and "(A): Phase 1 lowers PPL" in lines[3]
    assert "with contexts of zeros, PPL changes by +100.0 % (" in lines[3]
    single = "; at full size (single runs, seeds not covered): with contexts of zeros, PPL changes by −25.0 % ("
    assert single in lines[3] and lines[3].endswith("(A): single runs, no verdict.")
    over = "(single runs, seeds not covered, 20 validation samples drawn again)"
    assert f": the best of 2 ordinary models changes PPL against A {over} by: KN-3 −20.0 % (" in lines[4]
    empty = {name: (pd.DataFrame(), pd.DataFrame(), pd.DataFrame()) for name in grids}
    assert headlines.headlines(summarise("planted", *empty["variance"][::2]), [], empty) == ""
