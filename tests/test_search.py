"""The search for hyper-parameters: a planted best is found, nothing runs twice, and all models get the same."""

import json
import math
import shutil
import threading

import pandas as pd
import pytest
import torch
import yaml

from ctxlm import search
from ctxlm.config import ConfigError, Experiment, load_grid, read_yaml
from ctxlm.files import ROOT, atomic
from ctxlm.model import ContextLM
from ctxlm.networks import NeuralLM
from ctxlm.search import AT_RANDOM, Search, main

OURS = ("A", "B", "echo", "lstm", "mingru", "transformer")
SPACE = {
    "phase2_learning_rate": {"low": 0.0002, "high": 0.004, "log": True},
    "logit_spread": [0.5, 1.0],
    "dropout": [0.0, 0.1, 0.2],
    "weight_decay, phase2_epochs": [[1.0, 10], [0.1, 6]],
}
COMMON = dict.fromkeys(("val_samples", "development_samples", "test_samples"), 2) | {
    "train_tokens": 600, "held_out_tokens": 100, "model": "lstm", "embedding": "random", "embed_dim": 32
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def file(tmp_path, text, outputs, monkeypatch):
    """Writes the search `tiny` of an LSTM, some keys of it changed; its table is in the same folder."""
    monkeypatch.setattr(search, "TABLES", tmp_path)

    def written(**keys):
        content = {"title": "Tiny", "trials": 48, "seed": 1, "turns": "logit_spread", "space": SPACE}
        content |= {"common": [COMMON, {"corpus": str(text)}], "full": {"embed_dim": 512, "held_out_tokens": 0}} | keys
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(path)

    return written


@pytest.fixture
def planted(monkeypatch):
    """Puts a `Planted` in the place of runs, and returns it."""

    def place(**options):
        monkeypatch.setattr(search, "run_apart", one := Planted(**options))
        return one

    return place


class Planted:
    """In place of `run_apart`: a loss that is known, the least at rate 0.001, spread 0.5, dropout 0.1, decay 0.1."""

    def __init__(self, fails=lambda e: False, stops=None, together=1):
        """`fails`: which experiments do not learn; `stops`: at which run all ends; `together`: so many run at once."""
        self.ran, self.fails, self.stops = {}, fails, stops
        self.barrier, self.lock = threading.Barrier(together), threading.Lock()

    @staticmethod
    def loss(e):
        choices = (e.logit_scale > 0.5 * math.sqrt(128 / e.embed_dim) + 1e-9, e.dropout != 0.1, e.weight_decay != 0.1)
        return 5 + 0.2 * abs(math.log(e.phase2_learning_rate / 0.001)) + 0.3 * sum(choices)

    def __call__(self, e, folder):
        done = folder / "metrics.json"
        if done.exists():
            return json.loads(done.read_bytes())
        with self.lock:
            assert folder.name not in self.ran
            self.ran[folder.name] = e
            number = len(self.ran)
        self.barrier.wait(timeout=60)
        if number == self.stops:
            raise ConfigError(f"{folder}: it was killed")
        if self.fails(e):
            return {}
        judged = "val" if e.held_out_tokens else "development"
        metrics = {f"{judged}_loss": self.loss(e), f"{judged}_ppl": math.exp(self.loss(e)), "total_seconds": 1.25}
        with atomic(done) as path:
            path.write_text(json.dumps(e.model_dump() | metrics), encoding="utf-8")
        return metrics


@pytest.fixture
def table(tmp_path):
    return lambda: pd.read_csv(tmp_path / "tiny.csv")


def test_the_planted_best_is_found_and_the_table_holds_every_trial_also_those_that_do_not_learn(file, planted, table):
    one = planted(fails=lambda e: e.dropout == 0)
    assert main([file(), "--jobs", "1"]) == 0
    trials = table()
    best = trials.loc[trials["value"].idxmin()]
    assert (best["logit_spread"], best["dropout"], best["phase2_epochs"]) == (0.5, 0.1, 6)
    assert 0.0005 < best["phase2_learning_rate"] < 0.002
    assert best["value"] < trials["value"][:AT_RANDOM].min()
    assert trials["value"][24:].mean() < 5.45  # at random 5.51 to 5.61, of three seeds
    failed = trials["state"] == "failed"
    assert trials["value"].isna().equals(failed) and failed.equals(trials["dropout"] == 0)
    assert failed[24:].sum() < failed[:24].sum()  # what does not learn is learnt from
    assert trials["logit_spread"].tolist() == [0.5, 1.0] * 24
    for _, turn in trials.groupby("logit_spread"):  # also the worse one's choices are learnt
        assert turn["value"][AT_RANDOM // 2 :].mean() < turn["value"][: AT_RANDOM // 2].mean() - 0.05
    names = ["phase2_learning_rate", "logit_spread", "dropout", "weight_decay", "phase2_epochs"]
    assert [*trials] == ["scale", "trial", "value", "ppl", *names, "seconds", "state"]
    assert trials["trial"].tolist() == [*range(48)] and [*one.ran] == [f"quick-{k:03d}" for k in range(48)]
    assert {*trials["scale"]} == {"quick"} and {*trials["state"]} == {"failed", "finished"}
    for row, e in zip(trials.itertuples(), one.ran.values(), strict=True):
        assert e.logit_scale == pytest.approx(row.logit_spread * 2)
        for name in {*names} - {"logit_spread"}:
            assert getattr(row, name) == getattr(e, name)  # to the last digit
        if row.state == "finished":
            assert row.value == pytest.approx(one.loss(e), rel=1e-5)
            assert row.ppl == pytest.approx(math.exp(row.value), rel=1e-4) and row.seconds == 1.25


def test_a_search_that_was_stopped_goes_on_where_it_was(file, planted, table, capsys):
    stopped = planted(stops=6)
    assert main([file(trials=12), "--jobs", "2"]) == 1
    assert [*stopped.ran][5] in capsys.readouterr().err
    for _ in range(3):
        Search(file(trials=12)).studies[0].ask()  # as if a process had been killed before it had drawn
    again = planted()
    assert main([file(trials=12), "--jobs", "2"]) == 0
    (same,) = {*again.ran} & {*stopped.ran}  # in the same folder, from its checkpoint on
    assert again.ran[same] == stopped.ran[same] and len({*again.ran, *stopped.ran}) == 12
    trials, experiments = table(), stopped.ran | again.ran
    assert len(trials) == 12 and {*trials["state"]} == {"finished"}
    assert trials["logit_spread"].value_counts().tolist() == [6, 6]  # a turn's is no one's that was lost
    for row in trials.itertuples():
        assert row.value == pytest.approx(Planted.loss(experiments[f"quick-{row.trial:03d}"]), rel=1e-5)
    more = planted(together=2)  # each waits for another
    assert main([file(trials=12)]) == 0 and not more.ran
    assert main([file(trials=14), "--jobs", "2"]) == 0 and len(more.ran) == 2


def test_a_trial_that_fails_twice_is_given_up(file, planted, table, monkeypatch):
    one = planted()

    def run(e, folder):
        if folder.name == "quick-002":
            raise ConfigError("no memory")
        return one(e, folder)

    monkeypatch.setattr(search, "run_apart", run)
    assert [main([file(trials=6), "--jobs", "1"]) for _ in range(3)] == [1, 1, 0]
    assert len(table()) == 6 and 2 not in table()["trial"].tolist()


def test_a_trial_that_is_interrupted_twice_has_not_failed(file, planted, table, monkeypatch):
    begun, interrupted = threading.Event(), threading.Event()

    class Pool(search.ThreadPoolExecutor):
        def shutdown(self, wait=True, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            interrupted.set()
            super().shutdown()

    def run(_e, _folder):  # its process gets the interrupt, too
        begun.set()
        interrupted.wait()
        raise ConfigError("interrupted")

    def interrupt(_trials):
        begun.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "run_apart", run)
        patch.setattr(search, "as_completed", interrupt)
        patch.setattr(search, "ThreadPoolExecutor", Pool)
        for _ in range(2):
            begun.clear(), interrupted.clear()
            assert main([file(trials=3), "--jobs", "1"]) == 130
    planted()
    assert main([file(trials=3), "--jobs", "1"]) == 0 and table()["trial"].tolist() == [0, 1, 2]


def test_the_best_are_run_at_full_size(outputs, file, planted, table, capsys):
    one = planted()
    assert main([file(trials=6), "--top", "2"]) == 1 and not one.ran
    assert "6" in capsys.readouterr().err
    quick = planted(fails=lambda e: e.dropout == 0)
    assert main([file(trials=6), "--jobs", "1"]) == 0  # of two, draws would differ from time to time
    shutil.rmtree(outputs)  # another machine has the table alone
    full = planted()
    assert main([file(trials=6), "--top", "2"]) == 0
    trials = table()
    best = trials[trials["scale"] == "quick"].nsmallest(2, "value")["trial"].tolist()
    rows = trials[trials["scale"] == "full"]
    assert sorted(rows["trial"]) == sorted(best) and len(trials) == 8
    for row in rows.itertuples():
        e, before = full.ran[f"full-{row.trial:03d}"], quick.ran[f"quick-{row.trial:03d}"]
        assert (e.embed_dim, before.embed_dim) == (512, 32)
        assert e.logit_scale == pytest.approx(before.logit_scale / 4) == pytest.approx(row.logit_spread / 2)
        same = {"embed_dim", "logit_scale", "held_out_tokens"}
        assert e.model_dump(exclude=same) == before.model_dump(exclude=same)
        assert row.value == pytest.approx(Planted.loss(e), rel=1e-5)
    planted(stops=2)
    assert main([file(trials=6), "--jobs", "1"]) == 1 and table().equals(trials)  # searched anew, and stopped
    planted()
    assert main([file(trials=6), "--jobs", "1"]) == 0
    assert table()["scale"].tolist() == [*["quick"] * 6, *["full"] * 2] and table()[6:].equals(trials[6:])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"trails": 9}, "trails = 9"),
        ({"turns": "phase2_learning_rate"}, "turns = 'phase2_learning_rate'"),
        ({"turns": "window"}, "turns = 'window'"),
        ({"space": {"dropout": {"low": 0.1, "high": 0.8, "lgo": True}}}, "space, dropout: "),
        ({"space": {"dropout, window": [[0.0]]}}, "tiny.yaml: "),
        ({"space": {"logit_spread": ["big"]}}, "tiny.yaml: "),
        ({"space": {"dropout": {"low": 0.1, "high": 1.5}}}, "dropout = 1.5"),
        ({"space": {"dropout, window": [[0.0, 32], [0.9, 48]]}}, "window = 48"),
        ({"space": {"dropuot": [0.9]}}, "dropuot = 0.9"),
        ({"space": {"held_out_tokens": [100, 0]}}, "held_out_tokens = 0"),
        ({"full": {"held_out_tokens": 600}}, "held_out_tokens = 600"),
        ({"full": {"corpus": "gone.txt"}}, "gone.txt"),
        ({"common": "params/nowhere.yaml"}, "params/nowhere.yaml"),
        ({"space": {"context_dim": [32, 64]}}, "context_dim = 32"),
        ({"space": {"model, trained_params": [["context", 9000]]}}, "trained_params: model = 'context'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_before_any_work(outputs, file, planted, capsys, keys, named):
    one = planted()
    assert main([file(**keys)]) == 1
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1 and not one.ran and not outputs.exists()


def test_trials_of_another_search_are_not_gone_on_with(file, planted, text, capsys, monkeypatch):
    planted()
    assert main([file(trials=3)]) == 0
    assert main([file(trials=4, full={"embed_dim": 64}, title="Another")]) == 0  # is the same search
    one = planted()
    longer = COMMON | {"corpus": str(text), "train_tokens": 610}
    for keys in ({"seed": 2}, {"space": SPACE | {"dropout": [0.3]}}, {"common": longer}):
        assert main([file(trials=9, **keys)]) == 1
        assert "outputs/search/tiny" in capsys.readouterr().err
    monkeypatch.setattr(search, "code_hash", lambda model: "another")
    assert main([file(trials=9)]) == 1 and not one.ran


def trained(e, **changed):
    """Trained parameters of a network, embedding and output bias apart."""
    changed |= {"phase2_freeze_embedding": True, "output_bias": "none"}
    with torch.device("meta"):  # shapes alone
        model = NeuralLM(e.model_copy(update=changed), torch.zeros(2, e.embed_dim))
    return sum(p.numel() for p in model.trained().values())


@pytest.mark.parametrize("name", ["A", "B", "LSTM", "minGRU", "Transformer", "echo"])
def test_what_grids_compare_is_what_our_searches_found(name, monkeypatch):
    file = name if name in "AB" else name.lower()
    monkeypatch.setattr(search, "check_data", lambda experiments: None)
    ours, trials = Search(f"params/search/{file}.yaml"), pd.read_csv(search.TABLES / f"{file}.csv")
    best = trials.loc[trials["value"].where(trials["scale"] == "quick").idxmin()]
    drawn = {line: best[line] if line in best else [*best[line.split(", ")]] for line in ours.file.space}
    expected = ours.experiment(drawn, "quick").for_notebook()

    def changes(grid):
        runs = [run.for_notebook() for run in load_grid(grid).runs.values() if run.experiment.partition("-")[0] == name]
        assert runs
        return {key for run in runs for key, value in run.items() if value != expected[key]}

    judged = {"seed", "data_seed", "embedding_seed", "train_tokens", "held_out_tokens", "test_samples", "dtype"}
    assert changes("searched-quick") == judged
    if name == "A":
        file = [read_yaml(f"params/{one}.yaml") for one in ("A", "search-quick", "searched-A")]
        file = Experiment.from_mapping(*file, {"context_dim": 128}).for_notebook()
        assert {key for key in file if file[key] != expected[key]} == {"logit_scale"}  # 0.5 for 0.49
    if name not in ("Transformer", "echo"):  # whose best window is not its list's longest, or that has none
        assert changes("search-ends") == {"experiment", "phase2_context_window" if name in "AB" else "window"}


def test_our_searches_are_the_same_for_all_models(monkeypatch):
    monkeypatch.setattr(search, "check_data", lambda experiments: None)  # whether their text is here is another matter
    assert {*OURS} == {path.stem for path in (ROOT / "params" / "search").glob("*.yaml")}
    ours = {name: Search(f"params/search/{name}.yaml") for name in OURS}
    assert len({(one.file.trials, one.file.seed, one.file.turns) for one in ours.values()}) == 1
    lines = {name: [*one.file.space.items()] for name, one in ours.items()}
    assert all(of_one[:5] == lines["A"][:5] for of_one in lines.values())
    assert {len(of_one) for name, of_one in lines.items() if name != "echo"} == {7}

    for scale in ("quick", "full"):  # and the networks have as many trained parameters as A, at every depth
        study = ours["A"].experiment(ours["A"].first, scale).model_copy(update={"num_input_tokens": 2})
        with torch.device("meta"):
            blocks = ContextLM(study, torch.zeros(2, study.embed_dim)).parameter_counts()
        wanted = blocks["context_block_params"] + blocks["token_block_params_trained"]
        for name in ("lstm", "mingru", "transformer"):
            for layers in ours[name].file.space["num_layers"]:
                e = ours[name].experiment(ours[name].first | {"num_layers": layers}, scale)
                step = e.num_heads if name == "transformer" else 1
                off = [abs(trained(e, hidden_dim=e.hidden_dim + by) - wanted) for by in (-step, 0, step)]
                assert min(off) == off[1], (name, scale, layers)
                bound = {("lstm", 1): 3e-4, ("transformer", 6): 0.05}.get((name, layers), 0.08)
                assert off[1] < bound * wanted, (name, scale, layers)
