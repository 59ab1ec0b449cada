"""The audit of the study and of its author's later tables: known verdicts, and verdicts that follow the tables."""

import shutil
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlm.analysis.audit import FALSE, HOLDS, ROUNDED, UNTESTABLE, VERDICTS, Cell, audit, off, verdict
from ctxlm.config import ConfigError
from ctxlm.files import resolve

STUDY, LATER = "data/reference/l4-2025-11-28", "data/reference/later-2025-11"


@pytest.fixture(scope="module")
def claims():
    return audit(STUDY).set_index("claim_id")


@pytest.fixture(scope="module")
def later():
    return audit(LATER).set_index("claim_id")


@pytest.fixture
def changed(tmp_path):
    """The audit of the study after `column` of the rows of `table` that match was set to `value`."""
    folder = tmp_path / "reference"
    shutil.copytree(resolve(STUDY), folder)

    def run(table, column, value, **match):
        content = pd.read_csv(folder / f"{table}.csv", dtype=str, keep_default_na=False)
        rows = np.logical_and.reduce([content[name] == wanted for name, wanted in match.items()])
        assert rows.any()
        content.loc[rows, column] = value
        content.to_csv(folder / f"{table}.csv", index=False)
        return audit(folder).set_index("claim_id")

    return run


FOUND = {
    HOLDS: {
        "parameters_context_A": 10.630656, "parameters_trained_B": 5.905152, "minutes_A_183620": 56.8,
        "log_ppl_small_B": 6.373934, "exponent_B": -0.384632, "better_at_small": 5.419879, "better_at_large": 1.661375,
        "coefficient_ratio": 3.226076, "converged_B_86925": 97.910843, "overfitting_A_183620": 57.146371,
        "early_stopping": 2.0, "effective_rank_A": None, "effective_rank_B": None,
    },
    ROUNDED: {
        "exponent_A": -0.287716, "coefficient_A": 14622.9251, "coefficient_B": 46549.7906,
        "prediction_B_86925": 586.937175,
    },
    FALSE: {
        "parameters_token_A": 7.681536, "parameters_token_B": 5.905152, "doubling_A": 18.080195,
        "doubling_B": 23.402567, "crossover": 154470.7367, "recommendation_large": None,
    },
    UNTESTABLE: {
        "duration": 131.4 / 60, "accuracy_of_law_A": None, "steeper": None, "best_epoch": None, "learning_rate": None,
        "recommendation_small": None,
    },
}  # fmt: skip
"""By hand, from the study's printed tables: verdict → claim → its number, if it has one."""
FOUND_LATER = {
    HOLDS: {"extrapolated_better": 100 * (1 - 57 / 83)},
    ROUNDED: {"mean_alpha_tokens_2": -0.513487},
    FALSE: {
        "shallow_wide_leads": 2, "halving_layers": 100 * (672.0 / 587.0 - 1), "extrapolated_6x768x1": 78.19233,
        "extrapolated_3x1536x2": 53.01296,
    },
    UNTESTABLE: {
        "nine_layers": 100 * (768.5 / 751.4 - 1), "one_layer": 100 * (1 - 647.2 / 683.9), "depth": 5,
        "two_tokens": 15, "three_tokens": 3, "flattest": "two layers",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("study", "found", "counts"), [("claims", FOUND, [38, 7, 6, 8]), ("later", FOUND_LATER, [40, 9, 4, 6])]
)
def test_verdicts_and_numbers_are_those_found_by_hand(study, found, counts, request):
    result = request.getfixturevalue(study)
    for expected, numbers in found.items():
        assert result.loc[[*numbers], "verdict"].to_dict() == dict.fromkeys(numbers, expected)
        for claim_id, number in numbers.items():
            assert number is None or result.loc[claim_id, "recomputed"] == pytest.approx(number), claim_id
    assert result["verdict"].value_counts()[[*VERDICTS]].tolist() == counts and sum(counts) == len(result)
    assert result.index.is_unique


def test_a_percentage_is_off_by_points_and_all_else_by_per_cent(claims):
    shown = claims.loc[["doubling_B", "crossover", "better_at_large", "recommendation_large"]].apply(off, axis=1)
    assert [*shown] == ["−6.6 points", "+9.6 %", "−0.039 points", ""]


# What hangs on a cell


def differing(before, after, column):
    return {name for name in before.index if before.loc[name, column] != after.loc[name, column]}


def test_a_changed_cell_changes_what_hangs_on_it_and_nothing_else(changed, claims):
    other = changed("results", "val_ppl", "460.00", experiment="B", train_samples="1000")
    laws = {"exponent_B", "coefficient_B", "log_ppl_large_B", "log_ppl_change_B"}
    assert differing(claims, other, "recomputed") == laws | {"doubling_B", "better_at_large", "crossover"}
    assert differing(claims, other, "verdict") == laws | {"better_at_large"}
    assert other.loc["crossover", "recomputed"] > 200_000


B_86925 = {"experiment": "B", "train_tokens": "86925"}


@pytest.mark.parametrize(
    ("table", "match", "column", "value", "claim_id", "expected"),
    [
        ("claims", {"claim": "doubling the data improves A's PPL by about"}, "value", "18", "doubling_A", HOLDS),
        ("claims", {"claim": "small data: A is preferable at about"}, "value", "160000", "recommendation_small", FALSE),
        ("results", B_86925, "val_accuracy_pct", "15.00", "accuracy_86925", FALSE),
        ("results", {"experiment": "A", "train_tokens": "86925"}, "val_er_pct", "81.4", "effective_rank_A", FALSE),
    ],
)
def test_a_corrected_cell_turns_its_claim(changed, claims, table, match, column, value, claim_id, expected):
    other = changed(table, column, value, **match)
    assert other.loc[claim_id, "verdict"] == expected
    assert differing(claims, other, "verdict") == {claim_id}


def test_laws_that_do_not_meet_are_no_crossover(changed):
    for samples, of_a in (("500", "554.58"), ("1000", "447.22")):
        other = changed("results", "val_ppl", of_a, experiment="B", train_samples=samples)
    assert other.loc["crossover", "verdict"] == FALSE and np.isnan(other.loc["crossover", "recomputed"])


# What cannot be evaluated


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("recomputed", "results('A', 86925, 'val_pp')", r"results\.csv has no single val_pp of A, 86925"),
        ("recomputed", "", "so is `testable`"),
        ("published", "'about a third'", "about a third"),
        ("why", "{nothing}.", "nothing"),
    ],
    ids=["cell", "empty", "text", "name"],
)
def test_a_malformed_claim_is_refused_in_one_sentence(changed, column, value, words):
    with pytest.raises(ConfigError, match=words) as error:
        changed("audit", column, value, claim_id="doubling_A")
    message = str(error.value)
    assert "audit.csv, claim doubling_A" in message and "correct this row" in message and "\n" not in message


def test_a_cell_twice_or_no_audit_at_all_is_refused(changed):
    with pytest.raises(ConfigError, match=r"results\.csv has no single"):
        changed("results", "experiment", "A", experiment="B")
    with pytest.raises(ConfigError, match=r"audit\.csv is missing"):
        audit(resolve(STUDY).parent)


# Rounding


printed = st.decimals(-10_000, 10_000, places=2) | st.decimals(-1, 1, places=4) | st.integers(-(10**6), 10**6)


@given(printed, st.floats(-0.49, 0.49), st.floats(0.51, 3))
def test_rounding_is_by_the_printed_digits_and_then_by_one_per_cent(value, share, more):
    cell, step = Cell(str(value)), 10.0 ** Decimal(value).as_tuple().exponent
    assert verdict(cell, cell + share * step) == HOLDS
    assert verdict(cell, cell + share * step, "one seed") == UNTESTABLE
    assert verdict(cell, float("nan")) == verdict(cell, float("inf")) == FALSE
    for sign in (-1, 1):
        result, off = verdict(cell, cell + sign * more * step), more * step / abs(cell) if cell else 1
        assert result == (ROUNDED if off <= 0.0099 else FALSE if off >= 0.0101 else result)


def test_a_statement_that_the_tables_contradict_does_not_follow_even_where_they_could_not_confirm_it():
    assert verdict(Cell("1.54e5"), 154_470.7) == HOLDS  # whose last three digits are not printed
    assert verdict("A", "A") == HOLDS and verdict("A", "B") == FALSE
    assert verdict("A", "A", "one seed") == UNTESTABLE and verdict("A", "B", "one seed") == FALSE
    assert verdict("79-81", np.array([79.5, 81.4])) == HOLDS and verdict("79-81", np.array([79.5, 81.6])) == FALSE


# The author's later tables


def test_the_later_laws_are_the_author_s(later):
    laws = pd.concat([pd.read_csv(resolve(LATER) / f"power_laws_{g}.csv") for g in ("architectures", "matrix")])
    assert len(laws) == 14
    for row in laws.itertuples():
        assert later.loc[f"alpha_{row.experiment}", "recomputed"] == pytest.approx(row.alpha, abs=1.3e-4)
        assert later.loc[f"r2_{row.experiment}", "verdict"] == HOLDS
        if row.a > 0:
            assert later.loc[f"coefficient_{row.experiment}", "verdict"] == HOLDS
