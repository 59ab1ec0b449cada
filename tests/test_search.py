"""The search for hyper-parameters: a planted best is found, nothing runs twice, and all models get the same."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from ctxlm import search
from ctxlm.config import ConfigError, read_yaml
from ctxlm.corpus import load_corpus
from ctxlm.files import ROOT, atomic
from ctxlm.model import ContextLM
from ctxlm.networks import NeuralLM
from ctxlm.search import LAG, Search, main, run_notebook
from tests.conftest import rewrite, short_paragraphs

OURS = sorted(path.stem for path in (ROOT / "params" / "search").glob("*.yaml"))
CODE = "0123456789abcdef"
SPACE = {
    "phase2_learning_rate": {"low": 0.0002, "high": 0.004, "log": True},
    "logit_spread": [0.5, 1.0],
    "phase2_token_dropout": [0.0, 0.1, 0.2],
    "phase2_final_rate, phase2_epochs": [[1.0, 10], [0.1, 6]],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small corpus, whose tokens are cached beside."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXLM_CACHE", str(folder / "cache"))
        load_corpus(str(short_paragraphs(folder / "text.txt")))
        yield str(folder / "text.txt")


@pytest.fixture
def file(tmp_path, text, outputs, monkeypatch):
    """Writes the search `tiny` of an LSTM, some keys of it changed; its table is in the same folder."""
    monkeypatch.setattr(search, "TABLES", tmp_path)
    monkeypatch.setattr(search, "code_hash", lambda model: CODE)
    common = dict.fromkeys(("val_samples", "development_samples", "test_samples"), 2) | {"train_tokens": 600}
    common |= {"model": "lstm", "embed_dim": 32, "corpus": text, "held_out_tokens": 100, "embedding": "random"}

    def written(space=SPACE, **keys):
        content = {"title": "Tiny", "trials": 24, "seed": 1, "common": common, "full": {"embed_dim": 512}}
        content = {name: value for name, value in (content | {"space": space} | keys).items() if value is not ...}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(path)

    return written


class Planted:
    """In place of a run: a loss that is known, the least at rate 0.001, spread 0.5, dropout 0.1, final rate 0.1."""

    def __init__(self, fails=None, stops=None):
        """`fails`: which experiments' loss is not finite; `stops`: the names of trials at which all comes to an end."""
        self.ran, self.fails, self.stops = [], fails or (lambda e: False), stops or []

    @staticmethod
    def loss(e):
        choices = (e.logit_scale > 0.5 * math.sqrt(128 / e.embed_dim) + 1e-9, e.phase2_token_dropout != 0.1)
        return 5 + 0.2 * abs(math.log(e.phase2_learning_rate / 0.001)) + 0.3 * (sum(choices) + e.phase2_final_rate)

    def __call__(self, e, folder):
        self.ran.append((folder.name, e))
        if folder.name in self.stops:
            raise ConfigError(f"{folder}: Kernel died")
        if self.fails(e):
            return "NonFiniteLoss: Phase 2's loss is nan"
        loss = self.loss(e)
        metrics = {"val_loss": loss, "val_ppl": math.exp(loss), "total_seconds": 1.25, "code_hash": CODE}
        with atomic(folder / "metrics.json") as path:  # others read while this one writes
            path.write_text(json.dumps(e.model_dump() | metrics), encoding="utf-8")
        return ""

    @property
    def names(self):
        return [name for name, _ in self.ran]


def table(tmp_path):
    return pd.read_csv(tmp_path / "tiny.csv")


# What is found


def test_the_planted_best_is_found(tmp_path, file):
    space = {line: given for line, given in SPACE.items() if line != "logit_spread"}
    assert main([file(space), "--jobs", "1"], Planted()) == 0
    trials = table(tmp_path)
    best = trials.loc[trials["value"].idxmin()]
    assert (best["phase2_token_dropout"], best["phase2_epochs"]) == (0.1, 6)
    assert 0.0005 < best["phase2_learning_rate"] < 0.002
    assert best["value"] < trials["value"][: search.AT_RANDOM + LAG - 1].min()  # of those that were drawn at random
    assert trials["value"][12:].mean() < trials["value"][:12].mean()


def test_the_table_holds_every_trial_as_it_was(tmp_path, file):
    planted = Planted()
    assert main([file(trials=5), "--jobs", "1"], planted) == 0
    trials = table(tmp_path)
    names = ["phase2_learning_rate", "logit_spread", "phase2_token_dropout", "phase2_final_rate", "phase2_epochs"]
    assert [*trials] == ["scale", "trial", "value", "val_ppl", *names, "seconds", "state"]
    assert trials["trial"].tolist() == [0, 1, 2, 3, 4] and planted.names == [f"trial-00{k}" for k in range(5)]
    assert (
        set(trials["scale"]) == {"quick"} and set(trials["state"]) == {"finished"} and set(trials["seconds"]) == {1.25}
    )
    for row, (_, e) in zip(trials.itertuples(), planted.ran, strict=True):
        assert row.value == pytest.approx(planted.loss(e), rel=1e-5)
        assert row.val_ppl == pytest.approx(math.exp(row.value), rel=1e-4)
        assert e.logit_scale == pytest.approx(row.logit_spread * 2)
        for name in {*names} - {"logit_spread"}:
            assert getattr(row, name) == getattr(e, name)  # to the last digit
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tiny")]


def test_neither_how_many_run_at_a_time_nor_an_interruption_changes_anything(tmp_path, outputs, file, capsys):
    planted = Planted()
    assert main([file(trials=15), "--jobs", "1"], planted) == 0
    whole = (tmp_path / "tiny.csv").read_bytes()
    (outputs / "search").rename(tmp_path / "first")
    stopped = Planted(stops=["trial-007"])
    assert main([file(trials=15), "--jobs", "3"], stopped) == 1
    assert "trial-007: Kernel died" in capsys.readouterr().err
    over = {path.parent.name for path in outputs.glob("search/tiny/*/metrics.json")}
    assert len(over) >= 7 and "trial-007" not in over
    again = Planted()
    assert main([file(trials=15), "--jobs", "3"], again) == 0
    assert {*again.names} == {*planted.names} - over and len(again.names) == 15 - len(over)
    assert (tmp_path / "tiny.csv").read_bytes() == whole
    assert main([file(trials=15)], Planted(stops=planted.names)) == 0  # nothing is left to be run


def test_only_what_is_missing_is_run(tmp_path, outputs, file):
    assert main([file(trials=6)], Planted()) == 0
    for name in ("metrics.json", "trial.json"):
        next(outputs.glob(f"search/tiny/trial-00{len(name) % 5}/{name}")).unlink()  # of two trials
    again = Planted()
    assert main([file(trials=7)], again) == 0
    assert sorted(again.names) == ["trial-000", "trial-002", "trial-006"]
    assert table(tmp_path)["trial"].tolist() == [*range(7)]


def test_a_failed_trial_counts_and_is_not_run_again(tmp_path, file, capsys):
    planted = Planted(fails=lambda e: e.phase2_final_rate == 1)
    assert main([file(), "--jobs", "1"], planted) == 0
    trials = table(tmp_path)
    failed = trials["state"] == "failed"
    assert len(trials) == 24 and failed.sum() > 0 and trials["value"].isna().equals(failed)
    assert (failed == (trials["phase2_final_rate"] == 1)).all() and not trials["seconds"].isna().any()
    assert failed[12:].sum() < failed[:12].sum()  # the sampler has learnt from them
    assert main([file()], Planted(stops=planted.names)) == 0
    assert "nan, best 5." in capsys.readouterr().out


def test_the_best_are_run_at_full_size(tmp_path, file, capsys):
    assert main([file(trials=6), "--top", "2"], Planted()) == 1
    assert "6 of 6 trials are not over: search without --top first" in capsys.readouterr().err
    quick = Planted(fails=lambda e: e.phase2_final_rate == 0.1)
    assert main([file(trials=6)], quick) == 0
    full = Planted(stops=["full-000"])
    assert main([file(trials=6), "--top", "2", "--jobs", "1"], full) in (0, 1)
    again = Planted()
    assert main([file(trials=6), "--top", "2"], again) == 0
    trials = table(tmp_path)
    best = trials[trials["scale"] == "quick"].nsmallest(2, "value")["trial"].tolist()
    rows = trials[trials["scale"] == "full"]
    assert sorted(rows["trial"]) == sorted(best) and len(trials) == 8
    experiments = dict(full.ran) | dict(again.ran)
    for row in rows.itertuples():
        e, before = experiments[f"full-{row.trial:03d}"], dict(quick.ran)[f"trial-{row.trial:03d}"]
        assert (e.embed_dim, before.embed_dim) == (512, 32)
        assert e.logit_scale == pytest.approx(before.logit_scale / 4) == pytest.approx(row.logit_spread / 2)
        same = {"embed_dim", "logit_scale", "dtype"}
        assert e.model_dump(exclude=same) == before.model_dump(exclude=same)


# What is refused


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        *(({"trials": count}, "trials = ") for count in (0, 10**30, "24")),
        ({"trails": 9}, "trails = 9"),
        ({"full": ...}, "full"),
        ({"space": {}}, "space = {}"),
        ({"space": {"slow_decay": []}}, "space, slow_decay = []"),
        ({"space": {"slow_decay": {"low": 0.9}}}, "space, slow_decay = {'low': 0.9}"),
        ({"space": {"slow_decay": {"low": 0, "high": 0.9, "log": True}}}, "space, slow_decay"),
        *(({"space": {"slow_decay": {"low": low, "high": 0.1}}}, "slow_decay") for low in (0.9, math.nan, "a")),
        ({"space": {"slow_decay": [0.0, 0.9, 0.9]}}, "0.9 twice"),
        ({"space": {"slow_decay": [0.0], "slow_decay, window": [[0.0, 32]]}}, "slow_decay twice"),
        ({"space": {"slow_decay, window": [[0.0, 32], 0.9]}}, "slow_decay, window"),
        ({"space": {"embed_dim": [32]}}, "embed_dim = 32"),
        ({"space": {"slow_decai": [0.9]}}, "slow_decai = 0.9"),
        ({"space": {"logit_spread": ["big"]}}, "logit_spread = 'big'"),
        ({"space": {"logit_spread": [0.0]}}, "logit_scale = 0.0"),
        ({"space": {"window": [16, 32], "phase2_batch_size": [512, 16]}}, "phase2_batch_size = 16 and window = 32"),
        ({"common": {"held_out_tokens": 0}}, "held_out_tokens = 0"),
        ({"full": {"held_out_tokens": 600}}, "held_out_tokens = 600"),
        ({"common": "params/nowhere.yaml"}, "params/nowhere.yaml"),
        ({"full": {"corpus": "gone.txt"}}, "gone.txt"),
        ({"\x1b[31m": {}}, "tiny.yaml"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(outputs, file, capsys, keys, named):
    planted = Planted()
    assert main([file(**keys)], planted) == 1
    message = capsys.readouterr().err.strip()
    assert named in message and "tiny.yaml: " in message and message.isprintable()
    assert not planted.ran and not outputs.exists()


def test_a_command_line_that_asks_for_nothing_is_refused(file, capsys):
    assert main([file(), "--jobs", "0"], Planted()) == 1 and "--jobs 0 is not possible" in capsys.readouterr().err
    assert main([file(), "--top", "-1"], Planted()) == 1 and "--top -1" in capsys.readouterr().err
    assert main(["params/search/nowhere.yaml"], Planted()) == 1 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lstm", "a b", ".hidden", "-x", "a;b"])
def test_a_file_of_ones_own_whose_name_is_ours_or_no_folders_is_refused(tmp_path, file, name):
    path = Path(file()).rename(tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match=re.escape(name)):
        Search(path)


def test_trials_of_another_search_are_not_gone_on_with(file, outputs, capsys):
    assert main([file(trials=4)], Planted()) == 0
    other = read_yaml(file())["common"] | {"num_layers": 2}
    fewer = SPACE | {"phase2_token_dropout": [0.3]}
    for keys, name in (({"common": other}, "num_layers"), ({"space": fewer}, "(space|phase2_token_dropout)")):
        assert main([file(trials=4, **keys)], Planted(stops=["trial-004"])) == 1
        assert re.search(f"was made with another {name} than tiny.yaml gives it: undo", capsys.readouterr().err)
    trial = outputs / "search" / "tiny" / "trial-001"
    rewrite(trial / "metrics.json", code_hash="0" * 16)
    assert main([file(trials=4)], Planted()) == 0  # all are there
    assert main([file(trials=5)], Planted()) == 1 and "trial-" in capsys.readouterr().err
    for content in ("", "[]", "{}", '{"drawn": 3}'):
        (trial / "trial.json").write_text(content, encoding="utf-8")
        assert main([file(trials=4)], Planted()) == 1 and "trial-001" in capsys.readouterr().err


# How a run is carried out


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", ""),
        ("NonFiniteLoss: Phase 2's loss is nan", "NonFiniteLoss: Phase 2's loss is nan"),
        ("ValueError: test_ppl = inf is not finite: the run is not written", "ValueError: test_ppl"),
        ("ConfigError: no", ConfigError),
        ("DeadKernelError: Kernel died; twice", ConfigError),
    ],
)
def test_only_what_was_tried_makes_a_trial_fail(tmp_path, file, monkeypatch, line, why):
    e = Search(file()).experiment({line: 0.001 if isinstance(SPACE[line], dict) else 0 for line in SPACE}, "quick")
    given = []

    def execute(*arguments):
        given.extend(arguments)
        return line

    monkeypatch.setattr(search, "execute", execute)
    if why is ConfigError:
        with pytest.raises(ConfigError, match=line):
            run_notebook(e, tmp_path)
    else:
        assert run_notebook(e, tmp_path).startswith(why)
    assert given[0] == "notebooks/03_baseline.ipynb" and given[2] == tmp_path / "metrics.json"
    assert given[3] == e.for_notebook() | {"output_dir": str(tmp_path)}


# Ours


@pytest.fixture(scope="module")
def ours():
    """Our searches by name; whether their text is there is another matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "check_data", lambda experiments: None)
        return {name: Search(f"params/search/{name}.yaml") for name in OURS}


def test_our_searches_are_the_same_for_all_models(ours):
    assert {*ours} == {"context", "lstm", "transformer"}
    files = [one.file for one in ours.values()]
    assert {(file.trials, file.seed) for file in files} == {(24, 61)}
    lines = [[*file.space.items()] for file in files]
    assert lines[0][:8] == lines[1][:8] == lines[2][:8] and {*map(len, lines)} == {9, 10}
    over = {name: {} for name in ours}
    for number in range(search.AT_RANDOM + LAG - 1):  # those at random are the same too
        drawn = {name: one.draw(number, over[name]) for name, one in ours.items()}
        for name, point in drawn.items():
            over[name][number] = {"value": 5.0, "drawn": point}
        first, *others = ([*point.items()][:8] for point in drawn.values())
        assert all(other == first for other in others)


def test_every_point_of_oneis_an_experiment(ours):
    rng = np.random.default_rng(0)
    for one in ours.values():
        for scale, _ in itertools.product(("quick", "full"), range(200)):
            drawn = {
                line: rng.choice([given["low"], given["high"]]) if isinstance(given, dict) else rng.integers(len(given))
                for line, given in one.file.space.items()
            }
            e = one.experiment({line: value.item() for line, value in drawn.items()}, scale)
            assert e.held_out_tokens == {"quick": 4000, "full": 8000}[scale]
            assert e.logit_scale == pytest.approx(one.point(drawn)["logit_spread"] * math.sqrt(128 / e.embed_dim))


def test_what_is_known_of_each_model_is_in_its_space(ours):
    """The recipe as it is, and the networks' own settings, could be drawn."""
    for name, file in {"context": "tuned", "lstm": "baselines/lstm", "transformer": "baselines/transformer"}.items():
        known = read_yaml("params/base.yaml") | read_yaml(f"params/{file}.yaml")
        for line, given in ours[name].file.space.items():
            names = [part.strip() for part in line.split(",")]
            if isinstance(given, dict):
                assert given["low"] < known[line] < given["high"]
            elif line != "logit_spread":
                values = [known[name] for name in names]
                assert (values if len(names) > 1 else values[0]) in given


@pytest.mark.parametrize("name", ["context", "lstm", "transformer"])
def test_what_a_search_found_is_its_best_trial(name):
    """At full size, where the best three have been run there."""
    table = pd.read_csv(ROOT / "data" / "search" / f"{name}.csv", keep_default_na=False)
    assert len(table[table["scale"] == "quick"]) == 24
    rows = table[table["scale"] == ("full" if "full" in {*table["scale"]} else "quick")]
    best = rows.assign(value=rows["value"].astype(float)).sort_values("value").iloc[0]
    searched = read_yaml(f"params/searched/{name}.yaml")
    wanted = {column: best[column] for column in table.columns[4:-2]}
    assert searched["logit_scale"] == pytest.approx(wanted.pop("logit_spread") * math.sqrt(128 / 768), rel=1e-12)
    assert {key: searched[key] for key in wanted} == wanted


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_the_networks_have_as_many_trained_parameters_as_a(ours, scale):
    e = {name: one.experiment(one.draw(0, {}), scale) for name, one in ours.items()}
    study = e["context"].model_copy(update={"num_input_tokens": 2})
    blocks = ContextLM(study, torch.zeros(2, study.embed_dim)).parameter_counts()
    wanted = blocks["context_block_params"] + blocks["token_block_params_trained"]

    def trained(e, **changed):
        changed |= {"phase2_freeze_embedding": True, "output_bias": "none", "slow_decay": 0.0}
        model = NeuralLM(e.model_copy(update=changed), torch.zeros(2, e.embed_dim))
        return sum(p.numel() for p in model.trained().values())

    assert trained(e["lstm"]) == pytest.approx(wanted, rel=3e-4)
    widths = [e["transformer"].hidden_dim + step for step in (-8, 0, 8)]
    off = [abs(trained(e["transformer"], hidden_dim=width) - wanted) for width in widths]
    assert min(off) == off[1] < 0.05 * wanted
