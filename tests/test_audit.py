"""The audit of the study: known verdicts, and verdicts that follow the tables when those change."""

import shutil

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlm.analysis import findings, tables
from ctxlm.analysis.audit import FALSE, HOLDS, ROUNDED, UNTESTABLE, VERDICTS, _verdict, audit, write_audit
from ctxlm.files import ROOT

REFERENCE = ROOT / tables.REFERENCE


@pytest.fixture(scope="module")
def claims():
    return audit().set_index("claim_id")


@pytest.fixture
def changed(tmp_path):
    """The audit of the study's tables after `table`'s `column` of the rows that match was set to `value`."""
    folder = tmp_path / "reference"
    shutil.copytree(REFERENCE, folder)

    def run(table, column, value, **match):
        content = pd.read_csv(folder / f"{table}.csv", dtype=str)
        rows = pd.Series(True, content.index)
        for name, wanted in match.items():
            rows &= content[name] == wanted
        assert rows.any()
        content.loc[rows, column] = value
        content.to_csv(folder / f"{table}.csv", index=False)
        return audit(folder).set_index("claim_id")

    return run


@pytest.mark.parametrize(
    ("claim_id", "recomputed", "verdict"),
    [  # computed by hand from the printed tables
        ("parameters_context_A", 10.630656, HOLDS),
        ("parameters_trained_B", 5.905152, HOLDS),
        ("parameters_token_A", 7.681536, FALSE),
        ("parameters_token_B", 5.905152, FALSE),
        ("minutes_A_183620", 56.8, HOLDS),
        ("duration", 131.4 / 60, UNTESTABLE),
        ("log_ppl_small_B", 6.373934, HOLDS),
        ("exponent_A", -0.287716, ROUNDED),
        ("exponent_B", -0.384632, HOLDS),
        ("coefficient_A", 14622.9251, ROUNDED),
        ("coefficient_B", 46549.7906, ROUNDED),
        ("prediction_B_86925", 586.937175, ROUNDED),
        ("doubling_A", 18.080195, FALSE),
        ("doubling_B", 23.402567, FALSE),
        ("better_at_small", 5.419879, HOLDS),
        ("better_at_large", 1.661375, HOLDS),
        ("coefficient_ratio", 3.226076, HOLDS),
        ("crossover", 154470.7367, FALSE),
        ("converged_B_86925", 97.910843, HOLDS),
        ("overfitting_A_183620", 57.146371, HOLDS),
    ],
)
def test_numbers_are_those_computed_by_hand(claims, claim_id, recomputed, verdict):
    assert claims.loc[claim_id, "recomputed"] == pytest.approx(recomputed, rel=1e-6)
    assert claims.loc[claim_id, "verdict"] == verdict


@pytest.mark.parametrize(
    ("claim_id", "verdict"),
    [
        ("accuracy_of_law_A", UNTESTABLE),
        ("steeper", UNTESTABLE),
        ("effective_rank_A", HOLDS),
        ("effective_rank_B", HOLDS),
        ("best_epoch", UNTESTABLE),
        ("learning_rate", UNTESTABLE),
        ("recommendation_small", UNTESTABLE),
        ("recommendation_large", FALSE),
    ],
)
def test_statements_get_the_verdict_they_deserve(claims, claim_id, verdict):
    assert claims.loc[claim_id, "verdict"] == verdict


def test_every_claim_is_complete(claims):
    assert claims.index.is_unique and set(claims["verdict"]) == set(VERDICTS)
    assert (claims[["section", "claim", "published", "why"]].map(len) > 0).all().all()
    assert claims["why"].str.endswith(".").all()
    numbers = claims["difference"].dropna()
    assert (numbers.abs()[claims["verdict"] == ROUNDED] <= 0.01).all()


def test_a_changed_cell_changes_what_hangs_on_it(changed, claims):
    other = changed("results", "val_ppl", "460.00", experiment="B", train_samples="1000")
    differ = {name for name in claims.index if other.loc[name, "verdict"] != claims.loc[name, "verdict"]}
    assert {"exponent_B", "better_at_large", "log_ppl_large_B"} <= differ
    assert other.loc["crossover", "recomputed"] > 200_000
    assert other.loc["parameters_context_A", "recomputed"] == claims.loc["parameters_context_A", "recomputed"]


def test_a_corrected_claim_holds(changed):
    words = "実験Aはデータ量を2倍にすると、PPLが約22%改善"
    assert changed("claims", "value", "18", printed=words).loc["doubling_A", "verdict"] == HOLDS
    fixed = changed("claims", "value", "154471", claim="the two PPLs cross at about")
    assert fixed.loc["crossover", "verdict"] == HOLDS
    fixed = changed("about", "value", "2.2", item="duration_hours")
    assert fixed.loc["duration", "verdict"] == HOLDS
    fixed = changed("claims", "value", "160000", claim="large data: B is preferable above")
    assert fixed.loc["recommendation_large", "verdict"] == UNTESTABLE


def test_an_epoch_that_is_missing_stays_missing(changed):
    assert changed("results", "val_accuracy_pct", "15.00", experiment="B").loc["accuracy_86925", "verdict"] == FALSE
    printed = pd.read_csv(REFERENCE / "phase2_epochs.csv")
    assert sorted(printed["epoch"].unique()) == [2, 4]


@given(value=st.floats(0.001, 1e6), decimals=st.integers(0, 4))
def test_a_value_rounded_to_its_printed_digits_holds(value, decimals):
    printed = f"{value:.{decimals}f}"
    assert _verdict(printed, value) == HOLDS
    if float(printed) > 10 * 10**-decimals:
        assert _verdict(printed, 1.2 * float(printed) + 10**-decimals) == FALSE


def test_the_table_puts_first_what_does_not_hold_and_the_sentence_counts(claims, tmp_path):
    whole = claims.reset_index()
    table = tables.audit_table(whole)
    assert len(table) == len(whole) and table["Verdict"].iloc[0] == FALSE and table["Verdict"].iloc[-1] == HOLDS
    crossover = table[table["Claim"].str.contains("cross")].iloc[0]
    assert (crossover["Published"], crossover["Recomputed"], crossover["Difference, %"]) == (
        "141,000",
        "154,470.7",
        "+9.6",
    )
    sentence = findings.audited(whole)
    for verdict in VERDICTS:
        assert str((whole["verdict"] == verdict).sum()) in sentence
    assert "141,000" in sentence
    written = pd.read_csv(write_audit(whole, tmp_path))
    assert list(written.columns[:1]) == ["claim_id"] and set(written["verdict"]) == set(VERDICTS)
    assert {"claim", "published", "recomputed", "verdict", "why"} <= set(written.columns)
