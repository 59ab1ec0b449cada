"""Published runs, drawn and run again."""

import json
from itertools import product
from unittest.mock import Mock

import pandas as pd
import pytest

from ctxlm.analysis import reproduce
from ctxlm.analysis.reproduce import TOLERANCE, draw, main
from ctxlm.config import ConfigError, Experiment
from ctxlm.run import run
from tests.conftest import SMALL, refusal


@pytest.fixture
def published(outputs, text, empty_cache):
    """The table of the grid `mine`, of a trained model and a 3-gram."""
    rows = []
    for name, given in {"A": {"dtype": "float32", "device": "cpu"}, "K": {"model": "kneser-ney"}}.items():
        e = Experiment.from_mapping(SMALL, given, {"corpus": str(text), "ngram_order": 3, "experiment": name})
        rows.append(run(e, outputs.parent / "mine" / name).drop("versions").to_dict() | {"run": name})
    path = outputs.parent / "committed" / "mine" / "runs.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_published_runs_agree_with_themselves_and_a_number_that_was_changed_does_not(published, outputs, capsys):
    assert main(["2", "--jobs", "2"]) == 0
    table = pd.read_csv(outputs / "reproduce" / "reproduce.csv").set_index("run")
    assert sorted(table.index) == ["A", "K"] and table["agrees"].all()
    made_again = json.loads((outputs / "reproduce" / "mine" / "A" / "metrics.json").read_bytes())
    assert made_again["phase1_iterations"] > 1
    assert (table["change, %"].abs() <= 100 * TOLERANCE["float32"]).all()
    assert "2 of 2 agree" in capsys.readouterr().out

    made, rows = outputs / "reproduce" / "mine" / "A" / "metrics.json", pd.read_csv(published)
    before = made.stat().st_mtime_ns
    rows.loc[rows["run"] == "A", "test_ppl"] *= 1.001
    rows.to_csv(published, index=False)
    assert main(["2", "--jobs", "1", "--grid", "mine"]) == 1
    assert made.stat().st_mtime_ns == before  # what was run again is not run once more
    assert "1 of 2 agree" in capsys.readouterr().out
    agrees = pd.read_csv(outputs / "reproduce" / "reproduce.csv").set_index("run")["agrees"]
    assert agrees.to_dict() == {"A": False, "K": True}


def test_what_is_drawn_begins_alike(outputs, monkeypatch):
    tables = {grid: pd.DataFrame({"run": [f"{grid}{i}" for i in range(20)]}) for grid in ("one", "other")}
    monkeypatch.setattr(reproduce, "load_runs", lambda grid, committed: tables[grid])
    some, more = (draw(count, 0, ["one", "other"])["run"].tolist() for count in (5, 12))
    assert more[:5] == some and {run.rstrip("0123456789") for run in more} == {"one", "other"} and len({*more}) == 12
    assert draw(12, 1, ["one", "other"])["run"].tolist() != more
    assert "K = 21" in refusal(draw, 21, 0, ["one"]) and "K = 0" in refusal(draw, 0, 0, ["one"])
    assert "K = 1" in refusal(draw, 1, 0)  # nothing is published


@pytest.mark.parametrize(("dtype", "within"), [("bfloat16", 0.005), ("float32", 1e-4)])
def test_runs_agree_to_a_share_that_goes_by_their_type(dtype, within, outputs, monkeypatch):
    values = {"val_ppl": 200.0, "test_ppl": 300.0}
    row = pd.Series(Experiment().model_dump() | values | {"dtype": dtype, "run": "A", "grid": "g", "device_name": "x"})
    for (name, value), sign, part in product(values.items(), (1, -1), (0.9, 1.1)):
        changed = values | {name: value * (1 + sign * part * within)}
        monkeypatch.setattr(reproduce, "run_apart", lambda *_, changed=changed: changed)
        assert reproduce.again(row)["agrees"] == (part < 1)


def test_a_run_that_fails_is_said_and_does_not_agree(outputs, monkeypatch, capsys):
    row = pd.Series(Experiment().model_dump() | {"val_ppl": 200.0, "test_ppl": 300.0, "dtype": "float32"})
    row = pd.concat([row, pd.Series({"run": "A", "grid": "g", "device_name": "x"})])
    monkeypatch.setattr(reproduce, "run_apart", Mock(side_effect=ConfigError("no package index")))
    assert not reproduce.again(row)["agrees"] and "no package index" in capsys.readouterr().err


@pytest.mark.night
def test_three_published_runs_at_the_quick_scale_come_out_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_OUTPUTS", str(tmp_path))
    main(["3", "--grid", "lines"])
    table = pd.read_csv(tmp_path / "reproduce" / "reproduce.csv")
    assert len(table) == 3 and table.notna().all(axis=None)
    assert (table["agrees"] | (table["processor"] != "the same")).all()
    assert (table["change, %"].abs() < 5).all()  # on another processor, too
