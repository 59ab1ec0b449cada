"""The search for hyper-parameters: a planted best is found, nothing runs twice, and all models get the same."""

import itertools
import json
import math
import re

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
from ctxlm.results import sealed_metrics
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
    common = {
        "model": "lstm",
        "embed_dim": 32,
        "val_samples": 2,
        "development_samples": 2,
        "test_samples": 2,
        "train_tokens": 600,
    }
    common |= {"corpus": text, "held_out_tokens": 100, "embedding": "random"}

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
        found = {"val_loss": loss, "val_ppl": math.exp(loss), "val_tokens": 100, "total_seconds": 1.25}
        found |= e.model_dump() | {"protocol": 2, "code_hash": CODE}
        with atomic(folder / "metrics.json") as path:  # others read while this one writes
            path.write_text(json.dumps(sealed_metrics(found, {})), encoding="utf-8")
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
    found = table(tmp_path)
    best = found.loc[found["value"].idxmin()]
    assert (best["phase2_token_dropout"], best["phase2_epochs"]) == (0.1, 6)
    assert 0.0005 < best["phase2_learning_rate"] < 0.002
    assert best["value"] < found["value"][: search.AT_RANDOM + LAG - 1].min()  # of those that were drawn at random
    assert found["value"][12:].mean() < found["value"][:12].mean()


def test_the_table_holds_every_trial_as_it_was(tmp_path, file):
    planted = Planted()
    assert main([file(trials=5), "--jobs", "1"], planted) == 0
    found = table(tmp_path)
    names = ["phase2_learning_rate", "logit_spread", "phase2_token_dropout", "phase2_final_rate", "phase2_epochs"]
    assert [*found] == ["scale", "trial", "value", "val_ppl", *names, "seconds", "state"]
    assert found["trial"].tolist() == [0, 1, 2, 3, 4] and planted.names == [f"trial-00{k}" for k in range(5)]
    assert set(found["scale"]) == {"quick"} and set(found["state"]) == {"finished"} and set(found["seconds"]) == {1.25}
    for row, (_, e) in zip(found.itertuples(), planted.ran, strict=True):
        assert row.value == pytest.approx(planted.loss(e), rel=1e-5)
        assert row.val_ppl == pytest.approx(math.exp(row.value), rel=1e-4)
        assert e.logit_scale == pytest.approx(row.logit_spread * 2) and e.dtype in ("float32", "bfloat16")
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
    found = table(tmp_path)
    failed = found["state"] == "failed"
    assert len(found) == 24 and failed.sum() > 0 and found["value"].isna().equals(failed)
    assert (failed == (found["phase2_final_rate"] == 1)).all() and not found["seconds"].isna().any()
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
    found = table(tmp_path)
    best = found[found["scale"] == "quick"].nsmallest(2, "value")["trial"].tolist()
    rows = found[found["scale"] == "full"]
    assert sorted(rows["trial"]) == sorted(best) and len(found) == 8
    experiments = dict(full.ran) | dict(again.ran)
    for row in rows.itertuples():
        e, before = experiments[f"full-{row.trial:03d}"], dict(quick.ran)[f"trial-{row.trial:03d}"]
        assert (e.embed_dim, before.embed_dim) == (512, 32)
        assert e.logit_scale == pytest.approx(before.logit_scale / 4) == pytest.approx(row.logit_spread / 2)
        same = {"embed_dim", "logit_scale", "dtype"}
        assert e.model_dump(exclude=same) == before.model_dump(exclude=same)


# What is refused


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"trials": 0}, "trials = 0 is not possible: it should be greater than or equal to 1"),
        ({"trails": 9}, "trails = 9 is not possible: it is no key of a search"),
        ({"full": ...}, "full is not possible: it is missing"),
        ({"full": 768}, "full, 0 = 768 is not possible"),
        ({"space": {}}, "space = {} is not possible: give a list of values"),
        ({"space": {"slow_decay": 0.9}}, "space, slow_decay = 0.9 is not possible: give a list of values"),
        ({"space": {"slow_decay": []}}, "space, slow_decay = [] is not possible: give a list of values"),
        ({"space": {"slow_decay": {"low": 0.9}}}, "space, slow_decay = {'low': 0.9} is not possible"),
        ({"space": {"slow_decay": {"low": 0, "high": 0.9, "log": True}}}, "(above 0 with log: true)"),
        ({"space": {"slow_decay": {"low": 0.9, "high": 0.1}}}, "low <= high"),
        ({"space": {"slow_decay": [0.0, 0.9, 0.9]}}, "'space' of 'slow_decay' has 0.9 twice: remove one"),
        ({"space": {"slow_decay": [0.0], "slow_decay, window": [[0.0, 32]]}}, "'space' names slow_decay twice"),
        ({"space": {"slow_decay, window": [[0.0, 32], 0.9]}}, "needs lists of 2 values each"),
        ({"space": {"slow_decay, window": {"low": 0.0, "high": 0.9}}}, "needs lists of 2 values each"),
        ({"space": {"embed_dim": [32]}}, "embed_dim = 32 would be overridden by 'space'"),
        ({"space": {"slow_decai": [0.9]}}, "slow_decai = 0.9 is not a parameter: did you mean slow_decay?"),
        ({"space": {"slow_decay": [0.0, 1.0]}}, "slow_decay = 1.0 is not possible: it should be less than 1"),
        ({"space": {"logit_spread": ["big"]}}, "logit_spread = 'big' is not possible: it should be a number"),
        ({"space": {"logit_spread": [0.0]}}, "logit_scale = 0.0 is not possible"),
        (
            {"space": {"window": [16, 32], "phase2_batch_size": [512, 16]}},
            "phase2_batch_size = 16 and window = 32: the first must be a multiple",
        ),
        ({"common": {"held_out_tokens": 0}}, "held_out_tokens = 0 at the quick scale: hold out text"),
        ({"full": {"held_out_tokens": 600}}, "held_out_tokens = 600 of 600 training tokens: it must leave two"),
        ({"common": "params/nowhere.yaml"}, "params/nowhere.yaml cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_any_work(outputs, file, capsys, keys, said):
    planted = Planted()
    assert main([file(**keys)], planted) == 1
    message = capsys.readouterr().err.strip()
    assert said in message and "tiny.yaml: " in message and "\n" not in message
    assert not planted.ran and not outputs.exists()


def test_a_command_line_that_asks_for_nothing_is_refused(file, capsys):
    assert main([file(), "--jobs", "0"], Planted()) == 1 and "--jobs 0 is not possible" in capsys.readouterr().err
    assert main([file(), "--top", "-1"], Planted()) == 1 and "--top -1" in capsys.readouterr().err
    assert main(["params/search/nowhere.yaml"], Planted()) == 1 and "cannot be read" in capsys.readouterr().err


def test_a_file_of_ones_own_with_the_name_of_ours_is_refused(tmp_path, file):
    (tmp_path / "tiny.yaml").rename(tmp_path / "lstm.yaml") if file() else None
    with pytest.raises(ConfigError, match=r"outputs/search/lstm belongs to params/search/lstm\.yaml"):
        Search(tmp_path / "lstm.yaml")


def test_trials_of_another_search_are_not_gone_on_with(file, outputs, capsys):
    assert main([file(trials=4)], Planted()) == 0
    other = read_yaml(file())["common"] | {"num_layers": 2}
    fewer = SPACE | {"phase2_token_dropout": [0.3]}
    for keys, name in (({"common": other}, "num_layers"), ({"space": fewer}, "(space|phase2_token_dropout)")):
        assert main([file(trials=4, **keys)], Planted(stops=["trial-004"])) == 1
        assert re.search(f"was made with another {name} than tiny.yaml gives it: undo", capsys.readouterr().err)
    path = outputs / "search" / "tiny" / "trial-001" / "metrics.json"
    rewrite(path, code_hash="0" * 16)
    assert main([file(trials=4)], Planted()) == 0  # all are there
    assert main([file(trials=5)], Planted()) == 1 and "made by other code" in capsys.readouterr().err
    path.write_text("{", encoding="utf-8")
    assert main([file(trials=4)], Planted()) == 1 and "trial-001/metrics.json" in capsys.readouterr().err


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
    files = [own.file for own in ours.values()]
    assert {(file.trials, file.seed) for file in files} == {(24, 61)}
    lines = [[*file.space.items()] for file in files]
    assert lines[0][:8] == lines[1][:8] == lines[2][:8] and {len(own) for own in lines} == {9, 10}
    told = {name: {} for name in ours}
    for number in range(search.AT_RANDOM + LAG - 1):  # those at random are the same too
        drawn = {name: own.draw(number, told[name]) for name, own in ours.items()}
        for name, own in drawn.items():
            told[name][number] = {"value": 5.0, "drawn": own}
        first, *others = ([*own.items()][:8] for own in drawn.values())
        assert all(other == first for other in others)


def test_every_point_of_ours_is_an_experiment(ours):
    rng = np.random.default_rng(0)
    for own in ours.values():
        for scale, _ in itertools.product(("quick", "full"), range(200)):
            drawn = {
                line: rng.choice([given["low"], given["high"]]) if isinstance(given, dict) else rng.integers(len(given))
                for line, given in own.file.space.items()
            }
            e = own.experiment({line: value.item() for line, value in drawn.items()}, scale)
            assert e.held_out_tokens == {"quick": 4000, "full": 8000}[scale]
            assert e.logit_scale == pytest.approx(own.point(drawn)["logit_spread"] * math.sqrt(128 / e.embed_dim))


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
    own = table[table["scale"] == ("full" if "full" in {*table["scale"]} else "quick")]
    best = own.assign(value=own["value"].astype(float)).sort_values("value").iloc[0]
    found = read_yaml(f"params/searched/{name}.yaml")
    wanted = {column: best[column] for column in table.columns[4:-2]}
    assert found["logit_scale"] == pytest.approx(wanted.pop("logit_spread") * math.sqrt(128 / 768), rel=1e-12)
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_the_networks_have_as_many_trained_parameters_as_a(ours, scale):
    e = {name: own.experiment(own.draw(0, {}), scale) for name, own in ours.items()}
    study = e["context"].model_copy(update={"num_input_tokens": 2})
    blocks = ContextLM(study, torch.zeros(2, study.embed_dim)).parameter_counts()
    wanted = blocks["context_block_params"] + blocks["token_block_params_trained"]

    def trained(e, **own):
        own |= {"phase2_freeze_embedding": True, "output_bias": "none", "slow_decay": 0.0}
        model = NeuralLM(e.model_copy(update=own), torch.zeros(2, e.embed_dim))
        return sum(p.numel() for p in model.trained().values())

    assert trained(e["lstm"]) == pytest.approx(wanted, rel=3e-4)
    widths = [e["transformer"].hidden_dim + step for step in (-8, 0, 8)]
    off = [abs(trained(e["transformer"], hidden_dim=width) - wanted) for width in widths]
    assert min(off) == off[1] < 0.05 * wanted
