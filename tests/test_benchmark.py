"""The benchmark counts what torch multiplies."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ctxlm.analysis import benchmark
from ctxlm.analysis.benchmark import cost, flops_per_token
from ctxlm.config import Experiment
from tests.conftest import refusal, tiny


@pytest.mark.parametrize(
    ("model", "kept", "waiting"),
    [("context", 16, 3), ("lstm", 2 * 3 * 8, 3), ("mingru", 3 * 8, 0), ("transformer", 32, 0)],
)
def test_what_a_model_keeps_and_waits_for_is_known(model, kept, waiting, monkeypatch):
    monkeypatch.setattr(benchmark, "VOCABULARY", 60)
    shape = {"num_layers": 3, "context_dim": 16, "hidden_dim": 8, "num_heads": 2, "window": 32, "embed_dim": 8}
    costs = cost(Experiment.from_mapping(shape, {"model": model}))
    assert (costs["numbers kept"], costs["layers that wait"]) == (kept, waiting)


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
