"""The benchmark counts what a model multiplies."""

import pytest

from ctxlm.analysis import benchmark
from ctxlm.analysis.benchmark import cost, flops_per_token
from ctxlm.config import Experiment
from tests.conftest import refusal


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
def test_the_floor_counts_the_products_of_a_token(layers, c, d, n, monkeypatch):
    vocabulary = 60
    monkeypatch.setattr(benchmark, "VOCABULARY", vocabulary)
    shape = {"num_layers": layers, "context_dim": c, "embed_dim": d, "num_input_tokens": n}
    contexts = 2 * layers * c * (c + n * d)
    token_block = 2 * d * (c + n * d) + (layers - 1) * 2 * d * (c + d)
    head = 2 * d * vocabulary
    assert flops_per_token(Experiment.from_mapping(shape)) == {
        "recurrence": contexts,
        # forward, weight gradients, and what passes back through all layers but the first
        "phase1_step": 2 * contexts + (layers - 1) * 2 * c * c,
        # the block's forward pass, weight gradients and what passes back; the head there and back; contexts are there
        "phase2_epoch": 2 * token_block + (layers - 1) * 2 * d * d + 2 * head,
        "evaluation": token_block + head,
    }


UNCOUNTED = {"design": "arithmetic", "phase2_freeze_embedding": False, "phase2_context_window": 1, "dropout": 0.1}


@pytest.mark.parametrize(("name", "value"), UNCOUNTED.items())
def test_what_the_floor_does_not_count_is_refused(name, value):
    assert refusal(benchmark.measure_apart, Experiment.from_mapping({name: value})).startswith(f"{name} = {value!r}")
