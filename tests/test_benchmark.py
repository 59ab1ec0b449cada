"""The benchmark counts what torch multiplies, and says the worse of two figures."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ctxlm.analysis import benchmark
from ctxlm.analysis.benchmark import flops_per_token, summarise
from ctxlm.config import Experiment
from tests.conftest import refusal, tiny


@pytest.mark.parametrize(("layers", "c", "d", "n"), [(3, 16, 8, 2), (1, 5, 4, 3)])
def test_the_floor_counts_the_products_that_torch_does(layers, c, d, n, monkeypatch):
    monkeypatch.setattr(benchmark, "VOCABULARY", 60)
    shape = {"num_layers": layers, "context_dim": c, "embed_dim": d, "num_input_tokens": n}
    model, rows = tiny(**shape), 7
    context, inputs = torch.randn(rows, c), torch.randn(rows, n * d)

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / rows

    def contexts():
        return model.context_block(context, model.context_block.projections(inputs))

    def logits():
        with torch.no_grad():
            before = contexts()
        return F.linear(model.token_block(inputs, before), model.embedding)

    floor, kept = (flops_per_token(Experiment.from_mapping(shape), kept=kept) for kept in (False, True))
    assert all(floor[name] - kept[name] == counted(contexts) for name in ("phase2_epoch", "evaluation"))
    assert floor == {
        "recurrence": counted(contexts),
        "phase1_step": counted(lambda: contexts()[-1].sum().backward()),
        "phase2_epoch": counted(lambda: logits().sum().backward()),
        "evaluation": counted(logits),
    }


def test_looked_up_tokens_leave_the_products_with_the_contexts():
    shape = Experiment()
    plain, saved = flops_per_token(shape), flops_per_token(shape, distinct=0)
    token_part = 2 * 6 * 768 * 2 * 768
    assert plain["recurrence"] - saved["recurrence"] == token_part
    assert plain["phase1_step"] - saved["phase1_step"] == 2 * token_part
    assert plain["phase2_epoch"] - saved["phase2_epoch"] == token_part


def test_headlines_are_the_worse_configurations_at_the_studys_size():
    rows = [
        {"experiment": label, "tokens": tokens, "stage": stage, "dtype": "float32", "share_of_floor": share}
        | {"seconds": factor * tokens**power, "tokens_per_second": 1000 / factor}
        for tokens in (20_000, 183_620, 1_000_000)
        for label, share, factor, power in (("A", 0.8, 1, 1.0), ("B", 0.7, 2, 1.1))
        for stage in ("recurrence", "phase1_step", "phase2_epoch", "evaluation")
    ]
    index = pd.MultiIndex.from_product([("A", "B"), (20_000, 1_000_000)], names=["experiment", "tokens"])
    machine = {"device": "cpu", "threads": 2, "recurrence_residual": 1e-6, "peak_gflops_float32": 9.0}
    runs = pd.DataFrame(
        [machine | {"peak_gflops_bfloat16": 30.0 + i, "peak_rss_gib": 1.0 + i} for i in range(4)], index
    )
    literal_times = pd.DataFrame({"A": {"recurrence": 0.1, "phase2_epoch": 0.5}, "B": dict.fromkeys(["recurrence"], 1)})
    summary, table = summarise(runs, pd.DataFrame(rows), literal_times)
    assert summary["tokens"] == 183_620 and len(table) == 8
    assert summary["phase2_epoch_share_of_floor"] == 0.7
    assert summary["recurrence_speedup_over_literal"] == pytest.approx(100)  # A: 100, B: 500
    assert summary["phase2_epoch_speedup_over_literal"] == pytest.approx(500)  # B was not timed
    assert summary["time_growth_exponents"] == pytest.approx({"A": 1, "B": 1.1})
    assert summary["time_growth_exponent"] == pytest.approx(1.1)
    assert summary["peak_rss_gib"] == {"20000": 3.0, "1000000": 4.0} and summary["peak_gflops_bfloat16"] == 33


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("design", "arithmetic"),
        ("phase2_freeze_embedding", False),
        ("phase2_context_window", 1),
        ("slow_decay", 0.9),
        ("dropout", 0.1),
    ],
)
def test_what_the_floor_does_not_count_is_refused(name, value):
    assert refusal(benchmark.measure_apart, Experiment.from_mapping({name: value})).startswith(f"{name} = {value!r}")


@pytest.mark.parametrize(("stderr", "last"), [("", "killed"), ("a\nMemoryError\n\n", "MemoryError")])
def test_a_measurement_apart_is_a_process_whose_last_line_counts(stderr, last, monkeypatch):
    ends = {"code": 0, "stdout": 'a warning\n{"threads": 2}\n'}

    def answer(command, **_):
        assert command[:-1] == [sys.executable, "-m", "ctxlm.analysis.benchmark"]
        assert Experiment.from_mapping(json.loads(command[-1])) == e
        return subprocess.CompletedProcess(command, ends["code"], ends["stdout"], stderr)

    monkeypatch.setattr(benchmark.subprocess, "run", answer)
    e = Experiment(num_layers=3)
    assert benchmark.measure_apart(e) == {"threads": 2}
    ends |= {"code": -9, "stdout": ""}
    with pytest.raises(RuntimeError, match=f"^{last}$"):
        benchmark.measure_apart(e)
