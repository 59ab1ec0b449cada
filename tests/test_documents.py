"""What docs/findings.md and the README state in tables, against the committed results."""

import json
import math
import re

import pytest

from ctxlm.analysis import proposals, recipe, scaling
from ctxlm.config import BASELINES, Experiment
from ctxlm.files import ROOT

RESULTS = ROOT / "data" / "results" / "protocol-1"
FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
SIZES = (86_925, 183_620)
MODELS = {
    "A, the study's settings": "study/A_train_tokens-{}_seed-42",
    "B, the study's settings": "study/B_train_tokens-{}_seed-42",
    "Kneser-Ney of order 2": "baselines/KN-2_train_tokens-{}",
    "Kneser-Ney of order 4": "baselines/KN-4_train_tokens-{}",
    "Kneser-Ney of order 4, counting the second half too": "baselines/KN-4-second-half_train_tokens-{}",
    "Transformer": "networks/Transformer_train_tokens-{}",
    "LSTM": "networks/LSTM_train_tokens-{}",
    "Transformer with a slow context": "networks/Transformer-slow_train_tokens-{}",
    "LSTM with a slow context": "networks/LSTM-slow_train_tokens-{}",
    "A, tuned recipe": "tuned/tuned-A_train_tokens-{}",
    "B, tuned recipe": "tuned/tuned-B_train_tokens-{}",
    "A, joint recipe": "joint/joint-A_train_tokens-{}",
    "A, slow recipe": "slow/slow-A_train_tokens-{}",
    "B, slow recipe": "slow/slow-B_train_tokens-{}",
    "A, lean recipe": "lean/lean-A_train_tokens-{}",
    "A, tuned recipe, on a random embedding": "random/tuned-A-random_train_tokens-{}",
    "A, slow recipe, on a random embedding": "random/slow-A-random_train_tokens-{}",
}
"""Rows of the table of models, and the runs they are about."""


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, without bold and without the line under the heading."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.replace("**", "").strip("|\n").split("|")] for line in table.splitlines()]
        for table in found
    ]


def the_table(heading: str) -> list[list[str]]:
    """The one table whose first line begins so, without that line and the one under it."""
    (found,) = [table for table in tables(FINDINGS) if " | ".join(table[0]).strip().startswith(heading)]
    return found[2:]


def number(cell: str) -> float:
    return float(re.match(r"[−+]?[\d.,]+", cell)[0].replace("−", "-").replace(",", ""))


def metrics(run: str) -> dict:
    return json.loads((RESULTS / run / "metrics.json").read_text(encoding="utf-8"))


def test_the_table_of_models_is_that_of_the_runs():
    stated = {}
    for name, *cells in the_table("model | 86,925 tokens: validation"):
        for size, (val, test, over) in zip(SIZES, (cells[:3], cells[3:6]), strict=True):
            run = MODELS[name].format(size)
            stated[run] = val
            assert (val == "not run") == (not (RESULTS / run).exists()), run
            if val == "not run":
                continue
            known = metrics(run)
            assert (val, test) == (f"{known['val_ppl']:.1f}", f"{known['test_ppl']:.1f}"), run
            assert over == "" or number(over) == pytest.approx(100 * known["overfit_rate"], abs=0.51), run
    assert {run.partition("/")[0] for run in stated} >= {"study", "baselines", "networks", "tuned", "joint", "slow"}


def test_the_table_of_sizes_is_that_of_the_runs():
    grids = [scaling.read_grid(f"protocol-1/{name}") for name in ("sizes", "study")]
    runs, _, val_by_sample = proposals.with_study(*grids)
    gaps = {gap["train_tokens"]: gap for gap in scaling.differences(val_by_sample)[0]}
    rows = the_table("training tokens | A | B")
    assert len(rows) == len(gaps) == 5
    for size, *cells in rows:
        own = runs[runs["train_tokens"] == number(size)].set_index("experiment")
        assert cells[:2] == [f"{own.loc[label, 'val_ppl']:.1f}" for label in "AB"]
        gap = gaps[number(size)]
        found = [100 * math.expm1(nats) for nats in (gap["log_ppl"], *gap["interval"])]
        assert [number(part) for part in re.findall(r"[−+][\d.]+", cells[2])] == pytest.approx(found, abs=0.051)
        over = [100 * own.loc[label, "overfit_rate"] for label in "AB"]
        assert [number(cell) for cell in cells[3:]] == pytest.approx(over, abs=0.51)


def test_the_table_of_learning_rates_is_that_of_the_runs():
    label, size = "", ""
    rows = the_table("| training tokens | rate")
    assert len(rows) == 12
    for first, tokens, rate, ppl, change, epochs, over in rows:
        label, size = first or label, tokens.replace(",", "") or size
        run = f"lr/{label}_train_tokens-{size}_phase2_learning_rate-{rate}"
        usual = metrics(f"study/{label}_train_tokens-{size}_seed-42")
        known = usual if rate == "0.002" else metrics(run)
        assert ppl == f"{known['val_ppl']:.1f}" and epochs == f"{known['best_epoch']} of {known['epochs_run']}"
        assert number(over) == pytest.approx(100 * known["overfit_rate"], abs=0.51)
        if change:
            assert number(change) == pytest.approx(100 * (known["val_ppl"] / usual["val_ppl"] - 1), abs=0.051)


def test_the_table_of_ingredients_is_that_of_the_runs():
    tuned, without = (scaling.read_grid(f"protocol-1/{name}") for name in ("tuned", "tuned-ablations"))
    found = recipe.ingredients(tuned, without)
    rows = the_table("instead of the recipe's")
    assert sorted(number(ppl) for _, ppl, _ in rows) == sorted(round(ppl, 1) for ppl in found["val_ppl"])
    changes = sorted(100 * math.expm1(effect.estimate) for effect in found["effect"])
    assert sorted(number(change) for *_, change in rows) == pytest.approx(changes, abs=0.051)


def test_falling_widths_at_full_size_are_those_of_the_runs():
    rows = {name: cells for name, *cells in the_table("| 86,925 tokens | 183,620 tokens")}
    for size, column in zip(SIZES, range(2), strict=True):
        small = metrics(f"designs-full/B-arithmetic-small_train_tokens-{size}")
        assert rows["PPL: B-arithmetic-small"][column] == f"{small['val_ppl']:.1f}"
        for label in "AB":
            (against,) = [cells[column] for name, cells in rows.items() if name.startswith(f"against {label}")]
            usual = metrics(f"study/{label}_train_tokens-{size}_seed-42")
            assert number(against) == pytest.approx(100 * (small["val_ppl"] / usual["val_ppl"] - 1), abs=0.051)


@pytest.mark.parametrize("grid", sorted(path.name for path in RESULTS.iterdir()))
def test_all_committed_runs_are_read_and_are_what_their_names_say(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    read = [scaling.read_grid(f"protocol-1/{grid}", models=models)[0] for models in (["context"], BASELINES)]
    names = [run for runs in read for run in (runs["run"] if len(runs) else [])]
    assert sorted(names) == sorted(path.name for path in (RESULTS / grid).iterdir()) != []
    parameters = "|".join(sorted(Experiment.model_fields, key=len, reverse=True))
    for run in names:
        known = metrics(f"{grid}/{run}")
        label, *said = re.split(rf"_({parameters})-", run)
        assert label == known["experiment"] and "protocol" not in known
        assert [str(known[name]) for name in said[::2]] == said[1::2]
        # a run that could keep losses by test sample has them committed, too
        assert (RESULTS / grid / run / "test_by_sample.csv").exists() == ("data_hash" in known)
