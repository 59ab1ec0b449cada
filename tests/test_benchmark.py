"""The benchmark counts what torch multiplies."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ctxlm.analysis import benchmark
from ctxlm.analysis.benchmark import cost, flops_per_token
from ctxlm.config import Experiment, read_yaml
from tests.conftest import refusal, tiny


@pytest.mark.parametrize(
    ("file", "parameters", "kept", "waiting"),
    [
        ("A", 10_630_656 + 7_681_536, 768, 6),
        ("B", 14_169_600 + 5_905_152, 1536, 3),
        ("baselines/lstm", 18_312_320, 2 * 1712, 1),
        ("baselines/mingru", 18_301_794, 3 * 1622, 0),
        ("baselines/transformer", 19_768_576, 128, 0),
    ],
)
def test_what_a_model_costs_is_known(file, parameters, kept, waiting, monkeypatch):
    monkeypatch.setattr(benchmark, "VOCABULARY", 60)
    costs = cost(Experiment.from_mapping(read_yaml("params/base.yaml"), read_yaml(f"params/{file}.yaml")))
    assert [costs[name] for name in ("parameters", "numbers kept", "layers that wait")] == [parameters, kept, waiting]
    assert costs["FLOPs a token"] == pytest.approx(2 * (parameters + 60 * 768), rel=0.01)


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

    with torch.no_grad():
        before = contexts()

    def logits():
        return F.linear(model.token_block(inputs, before), model.embedding)

    assert flops_per_token(Experiment.from_mapping(shape)) == {
        "recurrence": counted(contexts),
        "phase1_step": counted(lambda: contexts()[-1].sum().backward()),
        "phase2_epoch": counted(lambda: logits().sum().backward()),
        "evaluation": counted(logits),
    }


UNCOUNTED = {"design": "arithmetic", "phase2_freeze_embedding": False, "phase2_context_window": 1}
UNCOUNTED |= {"slow_decay": 0.9, "dropout": 0.1}


@pytest.mark.parametrize(("name", "value"), UNCOUNTED.items())
def test_what_the_floor_does_not_count_is_refused(name, value):
    assert refusal(benchmark.measure_apart, Experiment.from_mapping({name: value})).startswith(f"{name} = {value!r}")


@pytest.mark.parametrize(("stderr", "last"), [("", "killed"), ("a\nMemoryError\n\n", "MemoryError")])
def test_a_measurement_apart_is_a_process_whose_last_line_counts(stderr, last, monkeypatch):
    process = Mock(returncode=0, stdout='a warning\n{"threads": 2}\n', stderr=stderr)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: process)
    assert benchmark.measure_apart(Experiment()) == {"threads": 2}
    process.returncode = -9
    with pytest.raises(RuntimeError, match=f"^{last}$"):
        benchmark.measure_apart(Experiment())
