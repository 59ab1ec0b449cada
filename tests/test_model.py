"""The model's known answers: parameter counts, shapes, initialisation, determinism, and the machine it runs on."""

import pytest
import torch

from ctxlm.config import ConfigError, Experiment
from ctxlm.device import emulate_bfloat16, generator, resolve_device, resolve_dtype
from ctxlm.model import ContextLM
from tests.conftest import tiny


@pytest.mark.parametrize(
    ("design", "layers", "width", "n", "counts"),
    [  # at d = 768; of n = 2 the first and second columns of the constant design are the study's own table
        ("constant", 6, 768, 2, (10_630_656, 10_630_656, 7_681_536)),
        ("constant", 3, 1536, 2, (14_169_600, 7_084_800, 5_905_152)),
        ("constant", 6, 1152, 1, (13_291_776, 8_861_184, 8_861_184)),
        ("arithmetic", 6, 768, 2, (27_296_768, 26_240_512, 26_240_512)),
        ("arithmetic", 3, 1536, 2, (28_598_272, 14_692_352, 14_692_352)),
        ("arithmetic", 6, 768, 1, (15_394_304, 8_566_272, 8_566_272)),  # of n = 1 they are its author's later tables
        ("arithmetic", 3, 1536, 1, (20_730_880, 5_905_152, 5_905_152)),
    ],
)
def test_parameter_counts_are_the_published_ones(design, layers, width, n, counts):
    shape = {"num_layers": layers, "context_dim": width, "num_input_tokens": n, "design": design}
    model = ContextLM(Experiment.from_mapping(shape), torch.zeros(10, 768))
    names = ["context_block_params", "token_block_params_published", "token_block_params_trained"]
    assert model.parameter_counts() == dict(zip(names, counts, strict=True))
    if (design, layers, n) == ("arithmetic", 6, 2):
        assert model.context_block.widths == [2048, 1792, 1536, 1280, 1024, 768]
        assert model.token_block.widths == [1408, 1280, 1152, 1024, 896, 768]


@pytest.mark.parametrize("std", [0.1, 0.02])
def test_initialisation_has_the_designs_spread(std):
    model = tiny(embed_dim=64, context_dim=128, num_layers=2, phase1_init_std=std / 2, phase2_init_std=std)
    for block, spread in ((model.context_block, std / 2), (model.token_block, std)):
        for left, right, norm in zip(block.from_context, block.from_other, block.norms, strict=True):
            assert left.weight.std().item() == pytest.approx(spread, rel=0.03)
            assert right.weight.std().item() == pytest.approx(spread, rel=0.03)
            assert right.bias.std().item() == pytest.approx(spread / 10, rel=0.3)
            assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_each_purpose_has_draws_of_its_own():
    purposes = [(1,), (2,), (1, "a"), (1, "b"), (1, "a", 1)]
    draws = [tuple(torch.randn(4, generator=generator(*purpose)).tolist()) for purpose in purposes]
    assert len({*draws}) == len(draws)
    same, again, other = (tiny(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["context_block.from_other.0.weight"], other["context_block.from_other.0.weight"])
    # and the number of layers of one block shifts no draw of the other
    deeper = tiny(seed=1, context_dim=12, num_layers=1).state_dict()
    assert torch.equal(deeper["token_block.from_other.0.weight"], same["token_block.from_other.0.weight"])


def test_flops_are_those_of_the_shapes():
    model = tiny(num_layers=2, context_dim=12, embed_dim=8, num_input_tokens=2)
    context = 2 * 12 * (12 + 16)  # two layers of (C + n·d) → C
    predict = 8 * (12 + 16) + 8 * (12 + 8)
    head = 60 * 8
    cost = model.cost(100, iterations=3, epochs=2.5)
    assert cost["flops_per_token"] == 2 * (context + predict + head)
    # three passes of the ContextBlock that learn cost nine, less the first one, which only reads, twice in all
    assert cost["training_flops"] == 100 * 2 * (8 * context + 2.5 * (3 * predict + 2 * head))
    assert cost["trained_params"] == context + predict + 3 * 2 * (12 + 8)  # with norms and biases
    untrained = model.cost(100, iterations=1, epochs=1)
    assert untrained["trained_params"] == predict + 3 * 2 * 8
    learning = tiny(num_layers=2, context_dim=12, embed_dim=8, num_input_tokens=2, phase2_context_window=4)
    both = learning.cost(100, iterations=1, epochs=1)  # contexts are made anew before an epoch
    assert both["training_flops"] - untrained["training_flops"] == 100 * 4 * 2 * context
    assert both["trained_params"] == cost["trained_params"]
    whole = tiny(num_layers=2, context_dim=12, embed_dim=8, num_input_tokens=2, phase2_freeze_embedding=False)
    assert whole.cost(100, iterations=1, epochs=1)["training_flops"] - untrained["training_flops"] == 100 * 2 * head


def test_a_gpu_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device(Experiment()) == torch.device("cuda")
    assert resolve_device(Experiment(model="kneser-ney")) == torch.device("cpu")  # nothing of it runs on a GPU
    with pytest.raises(ConfigError, match=r"device = 'cuda:1'"):
        resolve_device(Experiment.from_mapping({"device": "cuda:1"}))


def test_bfloat16_is_chosen_where_the_cpu_has_it_and_emulated_where_it_is_asked_for_and_missing(monkeypatch):
    cpu, emulated = torch.device("cpu"), []
    monkeypatch.setattr("ctxlm.device.emulate_bfloat16", lambda: emulated.append(1))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        chosen = [resolve_dtype(Experiment(dtype=name), cpu) for name in ("auto", "float32", "bfloat16")]
        assert chosen == [torch.bfloat16 if native else torch.float32, torch.float32, torch.bfloat16]
        assert len(emulated) == 1  # once without it, not again with it


def test_emulated_bfloat16_is_a_sum_rounded_once_and_leaves_float32_alone(monkeypatch):
    draws = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=draws).bfloat16() for shape in ((2, 31, 70), (2, 70, 23), (23,))]

    def products(dtype) -> list[torch.Tensor]:
        x, y, z = (value.to(dtype).clone().requires_grad_() for value in values)
        product = x[0] @ y[0]
        gradients = torch.autograd.grad(product.sum(), (x, y))
        with torch.no_grad():
            out = torch.mm(x[0], y[0], out=x.new_empty(31, 23))
            scaled = torch.addmm(z, x[0], y[0], beta=2, alpha=0.5)
            return [product, *gradients, out, scaled, torch.nn.functional.linear(x, y[0].T, z), x @ y]

    exact, float32 = products(torch.float64), products(torch.float32)
    kernels, widened, addmm = emulate_bfloat16.__wrapped__(), [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: widened.append(a[1].dtype) or addmm(*a, **k))
    for value, before in zip(products(torch.float32), float32, strict=True):
        assert torch.equal(value, before)
    widened.clear()
    for value, expected in zip(products(torch.bfloat16), exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert ((value - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()  # half a unit in the last place
    assert torch.float32 in widened
    del kernels  # torch's own are back
