"""The chunked recurrence against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm.config import Experiment, read_yaml
from ctxlm.model import ContextBlock, ContextLM
from ctxlm.recurrence import CHUNKS, chunked, sequential
from tests import literal
from tests.conftest import stream, tiny


def in_chunks(length, *arguments, **options):
    """`chunked` with chunks of `length` tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNKS, "cpu", (length, 10**9))
        return chunked(*arguments, **options)


@pytest.mark.filterwarnings("ignore:the ContextBlock does not forget")  # some narrow random ones do not
@settings(max_examples=25)
@given(*(st.integers(*ends) for ends in ((1, 400), (40, 120), (1, 3), (1, 3), (0, 100))))
def test_chunks_give_the_sequential_contexts(length, chunk, layers, n, seed):
    model, tokens = tiny(num_layers=layers, num_input_tokens=n, seed=seed), stream(length, seed=seed)
    expected, chunks = sequential(model, tokens), in_chunks(chunk, model, tokens)
    assert chunks.values.shape == (length, 12)
    assert chunks.residual <= 1e-5
    assert one_step_error(model, tokens, chunks) <= 1e-4
    if chunks.warmup == 0:
        assert torch.equal(chunks.values, expected.values)


def one_step_error(model, tokens, chunks):
    """How far a context is, at most, from the block's answer to the one before it, from the zero context on.

    A narrow random block need not contract, so a rounding error may grow along the stream: only this is certified.
    """
    before, block = torch.cat([torch.zeros(1, 12), chunks.values[:-1]]), model.context_block
    with torch.no_grad():
        again = block(before, block.projections(model.context_inputs(tokens, torch.arange(len(tokens)))))[-1]
    return (again - chunks.values).abs().max().item()


def test_an_echo_state_network_is_its_equations_and_nothing_trains_it():
    leak = 0.3
    echo = read_yaml("params/echo.yaml") | {"spectral_radius": 0.5, "leak": leak, "input_scale": 0.5}
    model, tokens, context = tiny(context_dim=40, **echo), stream(300), torch.zeros(40)
    block, expected = model.context_block, []
    for t in range(300):
        read = block.from_other[0].weight @ literal.token_input(model.embedding, tokens, t, 2)
        context = (1 - leak) * context + leak * torch.tanh(block.from_context.weight @ context + read)
        expected.append(context)
    chunks = in_chunks(150, model, tokens)
    torch.testing.assert_close(chunks.values, torch.stack(expected), atol=1e-5, rtol=0)
    assert chunks.warmup > 0
    for layer in chunks.layers(block, torch.arange(0, 9)):
        torch.testing.assert_close(layer, chunks.values[:9], atol=1e-6, rtol=0)  # fewer rows, another order of sums
    assert np.abs(np.linalg.eigvals(block.from_context.weight.numpy())).max() == pytest.approx(0.5, rel=1e-5)
    wide = tiny(context_dim=400, **echo).context_block.from_other[0]
    assert wide(literal.token_input(model.embedding, tokens, 9, 2)).std().item() == pytest.approx(0.5, rel=0.15)
    assert not any(p.requires_grad for p in block.parameters())


def test_a_block_that_does_not_forget_is_run_token_by_token_with_a_warning():
    model, tokens = expanding(), stream(200)
    with pytest.warns(UserWarning, match="does not forget for certain within") as caught:
        chunks = in_chunks(60, model, tokens)
    assert len(caught) == 1
    assert torch.equal(chunks.values, sequential(model, tokens).values) and chunks.warmup == 0


@pytest.mark.parametrize(("residuals", "tried"), [((3, 2.9), (5, 20)), ((3, 1, 0.9), (5, 20, 80)), ((3,) * 9, (5, 20))])
def test_longer_chunks_are_tried_only_where_they_bring_the_runs_nearer(monkeypatch, residuals, tried):
    left, lengths = list(residuals), []

    def in_vain(model, tokens, length, *_):
        lengths.append(length)
        return None, left.pop(0)

    monkeypatch.setattr("ctxlm.recurrence._chunks", in_vain)
    with pytest.warns(UserWarning, match=f"within {tried[-1]} tokens"):
        assert in_chunks(5, tiny(), stream(200)).warmup == 0
    assert tuple(lengths) == tried


def test_a_longer_chunk_is_tried_before_the_fall_back():
    model, tokens = forgetful(), stream(2000)
    chunks = in_chunks(2, model, tokens)
    assert chunks.warmup > 2 and chunks.residual <= 1e-5
    torch.testing.assert_close(chunks.values, sequential(model, tokens).values, atol=2e-5, rtol=0)


def test_what_lies_beyond_the_text_in_the_last_chunk_does_not_count():
    model, tokens = expanding(), stream(201)
    chunks = in_chunks(200, model, tokens)  # the second chunk has one token
    assert chunks.warmup == 2
    assert one_step_error(model, tokens, chunks) <= 1e-4


def test_runs_that_rounding_keeps_apart_are_joined_all_the_same(monkeypatch):
    model, tokens = forgetful(), stream(2000)
    monkeypatch.setattr("ctxlm.recurrence.TOLERANCE", -1.0)  # nearer than two runs ever come
    chunks = in_chunks(200, model, tokens)
    assert 0 < chunks.warmup <= 400 and chunks.residual <= 1e-4
    torch.testing.assert_close(chunks.values, sequential(model, tokens).values, atol=2e-4, rtol=0)
    monkeypatch.setattr("ctxlm.recurrence.ROUNDING", -1.0)
    with pytest.warns(UserWarning, match="does not forget for certain"):
        assert in_chunks(200, model, tokens).warmup == 0


class Scripted(torch.nn.Module):
    """A ContextBlock of one entry, which each token multiplies by a number of its own; token 0 sets it to 1."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.context_dim, self.widths = torch.tensor([0, *factors]), 1, [1]
        self.from_other = [torch.nn.Linear(len(factors) + 1, len(factors) + 1, bias=False)]
        torch.nn.init.eye_(self.from_other[0].weight)

    def forward(self, context, projections):
        token = projections[0].argmax(1, keepdim=True)
        return [(context * self.factors[token] + (token == 0)).clamp(max=1)]

    projections = ContextBlock.projections


@pytest.mark.filterwarnings("ignore:the ContextBlock does not forget")
@pytest.mark.parametrize(
    ("factors", "second", "certified"),
    [
        ((2e-6, 10.0), [1] + [2] * 39, False),  # within the tolerance for a token, and apart again
        ((5e-6, 1.0), [1] + [2] * 39, True),
        ((5e-5, 1.0, 0.4), [1] + [2] * 34 + [3] + [2] * 4, False),  # within rounding, and still coming nearer
        ((5e-5, 1.0, 0.6), [1] + [2] * 34 + [3] + [2] * 4, True),
        ((1.5e-5, 1.0, 0.6), [1] + [2] * 34 + [3] + [2] * 4, False),  # within the tolerance in the end alone
    ],
)
def test_two_runs_have_met_once_they_stay_together(factors, second, certified):
    """Chunks of 40 tokens, and what each token of the second makes of the runs' difference, 1 at first."""
    settings = {"num_layers": 1, "context_dim": 2, "embed_dim": len(factors) + 1, "num_input_tokens": 1}
    model = ContextLM(Experiment.from_mapping(settings, {}), torch.eye(len(factors) + 1))
    model.context_block = Scripted(factors)
    chunks = in_chunks(40, model, torch.tensor([0] * 40 + second))
    assert (chunks.warmup > 0) == certified


def expanding():
    """A tiny model of large weights: neighbouring contexts part instead of meeting."""
    model = tiny()
    with torch.no_grad():
        for linear in model.context_block.from_context:
            linear.weight *= 30
    return model


def forgetful(**parameters):
    """A tiny model that forgets within some tens of tokens: strong inputs drown what was there before."""
    model = tiny(**parameters)
    with torch.no_grad():
        for linear in model.context_block.from_other:
            linear.weight *= 5
    return model


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [({}, torch.float32), ({"num_layers": 1}, torch.float32), ({"design": "arithmetic"}, torch.bfloat16)],
)
def test_kept_layers_are_those_computed_again(shape, dtype, monkeypatch):
    model, tokens = forgetful(**shape), stream(950)
    plain, kept = (in_chunks(100, model, tokens, keep=keep) for keep in (None, dtype))
    widths = model.context_block.widths[:-1]
    assert plain.inner is None and [(x.shape, x.dtype) for x in kept.inner] == [((950, w), dtype) for w in widths]
    assert torch.equal(plain.values, kept.values) and kept.warmup > 0
    for start, stop in ((0, 1), (0, 950), (99, 102), (900, 950)):
        pairs = [contexts.layers(model.context_block, torch.arange(start, stop)) for contexts in (plain, kept)]
        for expected, layer in zip(*pairs, strict=True):
            assert (layer.float() - expected).abs().max() <= (0.02 if dtype == torch.bfloat16 else 1e-4)
    size = 1000 * sum(widths) * dtype.itemsize
    for budget in (size, size - 1):
        monkeypatch.setattr("ctxlm.recurrence.INNER_KEPT", budget)
        assert (in_chunks(100, model, tokens, keep=dtype).inner is None) == (budget < size)
