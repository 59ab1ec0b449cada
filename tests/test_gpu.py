"""On a GPU: every stage gives what it gives on the CPU, and no update waits for the GPU. Marked `gpu`.

Where there is none, updates run on torch's device `meta`, whose tensors have shapes but no numbers: a tensor left on
the CPU, or a number read back, is found there too.
"""

from contextlib import nullcontext

import pytest
import torch

from ctxlm.config import Experiment
from ctxlm.metrics import singular_values
from ctxlm.networks import NeuralLM, Windows
from ctxlm.phase1 import train_context_block
from ctxlm.phase2 import Phase2
from ctxlm.recurrence import Contexts, chunked
from ctxlm.trainer import Trainer
from tests.conftest import stream, tiny, train_token_block

V = 300
NETWORKS = {kind: {"model": kind, "num_layers": 2, "hidden_dim": 24, "window": 16} for kind in ("lstm", "mingru")}
NETWORKS["transformer"] = {"model": "transformer", "num_layers": 2, "hidden_dim": 32, "num_heads": 4, "window": 16}
TRAINING = {"phase2_batch_size": 64, "phase2_epochs": 2, "dtype": "float32"}
RECIPE = {"output_bias": "unigram", "phase2_freeze_embedding": False}
RECIPE |= {"dropout": 0.2, "weight_decay": 0.1}


def gpu_test(function):
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.mark.gpu(no_gpu(function))


torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # it would round what is compared


def agree(build):
    """What `build` gives is the same on the CPU and on the GPU."""
    for pair in zip(build(torch.device("cpu")), build(torch.device("cuda")), strict=True):
        here, there = (torch.as_tensor(part).detach().cpu().double() for part in pair)
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def network(kind, **parameters):
    e = Experiment.from_mapping({"embed_dim": 16}, TRAINING, NETWORKS[kind], parameters)
    embedding = 0.3 * torch.randn(V, 16, generator=torch.Generator().manual_seed(3))
    return e, NeuralLM(e, embedding)


def settings(**parameters):
    return Experiment.from_mapping({"train_tokens": 100, "phase1_context_noise": 0.0}, TRAINING, parameters)


@gpu_test
@pytest.mark.parametrize("design", ["constant", "arithmetic"])
def test_the_recurrence_and_phase1_are_the_cpus(design):
    e, tokens = settings(phase1_batch_size=500, phase1_max_iterations=4), stream(2000, V)

    def shaped(device):
        model = tiny(V, design=design).to(device)
        contexts = chunked(model, tokens.to(device)).values
        before = contexts.clone()
        history = train_context_block(model, tokens.to(device), contexts, e)
        losses = [row["value"] for row in history if row["metric"].endswith("_loss")]
        return [before, contexts, losses, singular_values(contexts)]

    agree(shaped)


@gpu_test
@pytest.mark.parametrize("parameters", [{}, RECIPE, RECIPE | {"phase2_context_window": 4}])
def test_phase2_is_the_cpus(parameters):
    e, train, val = settings(**parameters), stream(1001, V), stream(400, V, 1)

    def trained(device):
        model = tiny(V, **parameters).to(device)
        contexts = [chunked(model, tokens.to(device)) for tokens in (train, val)]
        result = train_token_block(model, *contexts, e)
        return [result.val_losses, [row["value"] for row in result.history if row["metric"] == "train_loss"]]

    agree(trained)


@gpu_test
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_networks_are_the_cpus(kind):
    train, val = stream(1001, V), stream(400, V, 1)

    def trained(device):
        e, model = network(kind, output_bias="unigram", weight_decay=0.1)
        draws = Trainer(Windows(model.to(device), train.to(device), val.to(device), e, torch.float32), e).run()
        return [draws.val_losses]

    agree(trained)


@gpu_test
@pytest.mark.parametrize("kind", ["study", "recipe", *NETWORKS])
def test_no_update_waits_for_the_gpu(kind):
    device, tokens = torch.device("cuda"), stream(2001, V).cuda()
    if kind in NETWORKS:
        e, model = network(kind, dropout=0.2)
        task = Windows(model.to(device), tokens, tokens, e, torch.float32)
    else:
        e = settings(**({} if kind == "study" else RECIPE))
        model = tiny(V, **({} if kind == "study" else RECIPE | {"dropout": 0.2})).to(device)
        task = Phase2(model, chunked(model, tokens), chunked(model, tokens), e, torch.float32)
    trainer = Trainer(task, e)
    trainer.run_epoch()  # once, so that everything lazy is made
    model.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in task.batches(2):
            trainer.optimiser.zero_grad()
            task.loss(batch)[0].backward()
            torch.nn.utils.clip_grad_norm_(task.weights.values(), 1.0)
            trainer.optimiser.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Without one: on the device `meta`


@pytest.fixture
def meta(monkeypatch):
    """Its name; what torch does not have for it, rounding and counting tokens, is left out."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())
    for module in ("phase2", "networks"):
        monkeypatch.setattr(f"ctxlm.{module}.set_frequencies", lambda *_: None)
    return torch.device("meta")


def meta_task(kind, e, model, device):
    tokens, dtype = torch.empty(200, dtype=torch.int64, device=device), torch.bfloat16
    if kind in NETWORKS:
        return Windows(model.to(device), tokens, tokens, e, dtype)
    *inner, last = (torch.empty(200, width, device=device) for width in model.context_block.widths)
    contexts = Contexts(tokens, last, None, 0.0, 0, inner=inner)
    return Phase2(model.to(device), contexts, contexts, e, dtype)


@pytest.mark.parametrize("kind", ["constant", "arithmetic", *NETWORKS])
def test_an_update_reads_no_number_back_and_all_of_it_stays_on_the_device(kind, meta):
    beyond = {"output_bias": "unigram", "phase2_freeze_embedding": False, "dropout": 0.2}
    e, model = network(kind, **beyond) if kind in NETWORKS else (settings(), tiny(V, design=kind, **beyond))
    task = meta_task(kind, e, model, meta)
    for batch in task.batches(1):
        result = task.loss(batch)
        result[0].backward()
        gradients = [weight.grad for weight in task.weights.values()]
        assert {x.device for x in (*result, *gradients)} == {meta}


def test_a_tensor_left_on_the_cpu_is_found(meta):
    model = tiny(V)
    task = meta_task("study", settings(), model, meta)
    layers = task.train.unrolled(model, torch.arange(22, device=meta), 4)
    assert {(len(layer), layer.device) for layer in layers} == {(22, meta)}
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        model.context_block(torch.empty(20, 12, device=meta), [torch.empty(20, 12)] * 3)
