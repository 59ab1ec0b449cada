"""Runs asked together: the mean of their probabilities."""

import pandas as pd
import pytest
import torch
import yaml

from ctxlm.analysis.ensemble import ask_together, average, read_ensembles
from ctxlm.analysis.estimates import paired
from ctxlm.analysis.runs import read_runs
from ctxlm.config import load_grid
from ctxlm.run import run
from tests.conftest import SMALL, refusal


def test_models_that_give_a_token_1_in_2_and_1_in_10_together_give_it_3_in_10():
    losses = -torch.tensor([[0.5, 1e-30], [0.1, 3e-30]], dtype=torch.float64).log()
    torch.testing.assert_close((-average(losses)).exp(), torch.tensor([0.3, 2e-30], dtype=torch.float64))
    assert torch.equal(average(losses[:1]), losses[0])  # one alone is itself
    assert (average(losses) <= losses.mean(0)).all()  # Jensen


def test_runs_unlike_in_seed_alone_are_one_ensemble_which_pairs_with_a_run_of_its_first_seed(
    tmp_path, monkeypatch, text
):
    for name in ("CACHE", "OUTPUTS", "RESULTS"):
        monkeypatch.setenv(f"CTXLM_{name}", str(tmp_path / name.lower()))
    common = SMALL | {"corpus": str(text), "dtype": "float32", "device": "cpu", "phase2_epochs": 1}
    drawn = [[1, 0, 1], [7, 0, 1], [2, 1, 2], [8, 1, 2]]
    file = tmp_path / "members.yaml"
    file.write_text(
        yaml.safe_dump(
            {"common": [common], "experiments": {"L2": []}, "sweep": {"seed, data_seed, embedding_seed": drawn}}
        )
    )
    runs = load_grid(str(file)).runs
    assert "GRID=" in refusal(ask_together, str(file))
    for name, e in runs.items():
        run(e, tmp_path / "outputs" / "members" / name)
    ask_together(str(file))
    together, apart = read_ensembles("members"), read_runs("members")
    assert [*together["experiment"]] == ["2 L2"] * 2 and [*together["seed"]] == [1, 2]
    for row in together.itertuples():
        members = apart[apart["data_seed"] == row.data_seed]
        assert row.test_tokens == members["test_tokens"].iloc[0]
        assert row.log_ppl < members["test_loss"].mean()
    estimate = paired(pd.concat([apart, together]), {"experiment": "2 L2"}, {"experiment": "L2"})[0]
    first = apart[apart["seed"].isin([1, 2])]["test_loss"].mean()
    assert estimate.value == pytest.approx(together["log_ppl"].mean() - first) and estimate.replicates == 2
