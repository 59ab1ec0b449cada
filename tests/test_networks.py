"""LSTM, minGRU and Transformer against their equations, one position at a time, and on a text that they must learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm.config import Experiment
from ctxlm.device import autocast
from ctxlm.model import forward_flops, load_weights, trained_weights
from ctxlm.networks import BODIES, NeuralLM, Reader, Windows, evaluate, min_gru
from ctxlm.trainer import Trainer
from tests.conftest import stream

VOCABULARY = 30
SMALL = {
    "lstm": {"num_layers": 2, "hidden_dim": 12, "window": 8},
    "mingru": {"num_layers": 2, "hidden_dim": 12, "window": 8},
    "transformer": {"num_layers": 2, "hidden_dim": 16, "num_heads": 4, "window": 8},
}
KINDS = list(BODIES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def small(kind, **parameters):
    values = {"model": kind, "embed_dim": 8, "phase2_batch_size": 32, "phase2_epochs": 3, "dtype": "float32"}
    e = Experiment.from_mapping(values, SMALL[kind], parameters)
    embedding = 0.3 * torch.randn(VOCABULARY, e.embed_dim, generator=torch.Generator().manual_seed(3))
    return e, NeuralLM(e, embedding)


def train(model, tokens, val, e, dtype=torch.float32):
    return Trainer(Windows(model, tokens, val, e, dtype), e).run()


def windows(e, model, train):
    """What training is, on the stream `train`."""
    return Windows(model, train, stream(20, VOCABULARY, seed=1), e, torch.float32)


# Equations


def by_hand_lstm(model, tokens):
    """h [T, d] by the equations of the gates, one token at a time."""
    body, states = model.body, [(torch.zeros(12), torch.zeros(12)) for _ in range(2)]
    rows = []
    for token in tokens:
        x = F.layer_norm(model.embedding[token], (8,))
        for k, (h, c) in enumerate(states):
            w, u, b, v = (
                getattr(body.cells, f"{name}_l{k}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            i, f, g, o = (w @ x + b + u @ h + v).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            states[k] = (x, c)
        rows.append(body.out.weight @ x + body.out.bias)
    return torch.stack(rows)


def by_hand_mingru(model, tokens):
    """h [T, d] by the equations of the gates, one token at a time, without a logarithm."""
    body, states, rows = model.body, [torch.full((12,), 0.5)] * 2, []
    for token in tokens:
        x = body.into(F.layer_norm(model.embedding[token], (8,)))
        for k, (norm, gates) in enumerate(zip(body.norms, body.gates, strict=True)):
            z, new = gates(norm(x)).chunk(2)
            g = torch.where(new >= 0, new + 0.5, new.sigmoid())
            states[k] = (1 - z.sigmoid()) * states[k] + z.sigmoid() * g
            x = x + states[k]
        rows.append(body.out(body.norm(x)))
    return torch.stack(rows)


def by_hand_transformer(model, tokens):
    """h [T, d] of at most a window, every head of every position by itself."""
    body, heads, width = model.body, 4, 16
    x = [body.into(F.layer_norm(model.embedding[token], (8,))) + body.positions[k] for k, token in enumerate(tokens)]
    for layer in body.layers:
        normed = [layer.norm1(row) for row in x]
        attention = layer.self_attn
        q, k, v = (
            [part @ row + bias for row in normed]
            for part, bias in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        )
        mixed = []
        for t in range(len(x)):
            of_heads = []
            for head in range(heads):
                at = slice(head * width // heads, (head + 1) * width // heads)
                weights = torch.stack([q[t][at] @ k[s][at] / math.sqrt(width / heads) for s in range(t + 1)]).softmax(0)
                of_heads.append(sum(w * v[s][at] for s, w in enumerate(weights)))
            mixed.append(attention.out_proj(torch.cat(of_heads)))
        x = [row + new for row, new in zip(x, mixed, strict=True)]
        x = [row + layer.linear2(F.gelu(layer.linear1(layer.norm2(row)))) for row in x]
    return torch.stack([body.out(body.norm(row)) for row in x])


BY_HAND = {"lstm": by_hand_lstm, "mingru": by_hand_mingru, "transformer": by_hand_transformer}


def losses_by_hand(model, h, targets):
    bias = 0 if model.output_bias is None else model.output_bias
    return F.cross_entropy(model.logit_scale * h @ model.embedding.T + bias, targets, reduction="none")


@each_kind
@pytest.mark.parametrize("frozen", [True, False])
def test_what_was_trained_is_the_equations_and_so_are_its_gradients(kind, frozen):
    more = {"output_bias": "unigram", "logit_scale": 0.7, "phase2_freeze_embedding": frozen}
    (e, model), (_, new) = small(kind, **more), small(kind, **more)
    read, tokens, positions = model.embedding.detach().clone(), stream(150, VOCABULARY), torch.arange(8)[None]
    train(model, tokens, stream(60, VOCABULARY, seed=1), e)
    assert torch.equal(read, model.embedding) == frozen == ("embedding" not in trained_weights(model))

    model.zero_grad()
    loss, losses, _ = Reader(model, torch.float32)(tokens, positions, positions >= 0)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.trained().items()}
    model.zero_grad()
    expected = losses_by_hand(model, BY_HAND[kind](model, tokens[:8]), tokens[1:9])
    expected.mean().backward()
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    for name, weight in model.trained().items():
        torch.testing.assert_close(gradients[name], weight.grad, atol=1e-6, rtol=1e-3)
        assert gradients[name].abs().max() > 0, name

    load_weights(new, trained_weights(model))
    torch.testing.assert_close(Reader(new, torch.float32)(tokens, positions, positions >= 0)[1], losses)


each_recurrent = pytest.mark.parametrize("kind", ["lstm", "mingru"])


@each_recurrent
def test_a_recurrent_network_is_judged_from_a_warm_up_on(kind):
    """Fresh weights forget within tens of tokens; ones that hardly do show what the warm-up is worth."""
    _, model = small(kind)
    tokens = stream(1400, VOCABULARY)  # two parts
    with torch.no_grad():
        for k in range(2):
            if kind == "lstm":
                getattr(model.body.cells, f"bias_ih_l{k}")[12:24] += 6  # forget gates
            else:
                model.body.gates[k].bias[:12] -= 6
    from_the_start = losses_by_hand(model, BY_HAND[kind](model, tokens[:-1]), tokens[1:])
    losses, _ = evaluate(Reader(model, torch.float32), tokens)
    torch.testing.assert_close(losses[:1024], from_the_start[:1024], atol=1e-4, rtol=1e-4)
    late = BY_HAND[kind](model, tokens[1024 - 256 : -1])[256:]
    torch.testing.assert_close(losses[1024:], losses_by_hand(model, late, tokens[1025:]), atol=1e-4, rtol=1e-4)
    assert (losses - from_the_start)[1024:].abs().max() > 1e-2


@settings(max_examples=30)
@given(length=st.integers(1, 40), cut=st.integers(0, 40), spread=st.sampled_from([1.0, 40.0, 1000.0]))
def test_a_mingru_at_once_is_token_by_token(length, cut, spread):
    """Also where gates are shut or open but for e**-1000, and states are none that float32 has a logarithm of."""
    draws = torch.Generator().manual_seed(length)
    z, new = spread * torch.randn(2, 3, length, 5, generator=draws)
    h, rows = torch.rand(3, 5, generator=draws), []
    start = h
    for t in range(length):
        g = torch.where(new[:, t] >= 0, new[:, t] + 0.5, new[:, t].sigmoid())
        h = (1 - z[:, t].sigmoid()) * h + z[:, t].sigmoid() * g
        rows.append(h)
    expected, whole = torch.stack(rows, 1), min_gru(z, new, start)
    torch.testing.assert_close(whole, expected, atol=2e-6 * spread, rtol=1e-4)
    if 0 < cut < length:  # the state is all that a later window needs
        later = min_gru(z[:, cut:], new[:, cut:], min_gru(z[:, :cut], new[:, :cut], start)[:, -1])
        torch.testing.assert_close(later, whole[:, cut:], atol=2e-6 * spread, rtol=1e-4)


def test_a_transformers_positions_are_no_product():
    _, model = small("transformer")
    layers = [layer.self_attn.in_proj_weight.numel() for layer in model.body.layers]
    layers += [module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert forward_flops(model) == 2 * (sum(layers) + model.embedding.numel())


def test_a_transformer_sees_half_a_window_or_more():
    _, model = small("transformer")
    tokens = stream(30, VOCABULARY)
    losses, _ = evaluate(Reader(model, torch.float32), tokens)
    for t in range(29):
        start = max(4 * (t // 4) - 4, 0)  # parts of 4 targets, read on from 4 positions before
        h = by_hand_transformer(model, tokens[start : t + 1])[-1:]
        expected = losses_by_hand(model, h, tokens[t + 1 : t + 2])
        torch.testing.assert_close(losses[t : t + 1], expected, atol=1e-5, rtol=1e-5)


@each_kind
def test_dropout_is_the_equations_in_training_alone(kind):
    _, model = small(kind, dropout=0.4, num_layers=1)
    inputs, body = torch.randn(40, 8, 8, generator=torch.Generator().manual_seed(0)), model.body

    def h(training, seed=1):
        torch.manual_seed(seed)
        return model.train(training).body(inputs, body.start(len(inputs)))[0]

    def kept(values, seed=1):
        torch.manual_seed(seed)
        return F.dropout(values, 0.4)

    assert torch.equal(h(True), h(True)) and not torch.equal(h(True), h(True, seed=2))
    plain = small(kind, num_layers=1)[1].eval().body
    torch.testing.assert_close(h(False), plain(inputs, plain.start(len(inputs)))[0])
    if kind == "lstm":  # of what it hands out, not of its state, and from layer to layer
        torch.testing.assert_close(h(True), body.out(kept(body.cells(inputs)[0])))
        assert small("lstm", dropout=0.4)[1].body.cells.dropout == 0.4
    elif kind == "mingru":  # of what a layer adds to the token, not of its state
        x = body.into(inputs)
        added = min_gru(*body.gates[0](body.norms[0](x)).chunk(2, -1), torch.full((40, 12), 0.5))
        torch.testing.assert_close(h(True), body.out(body.norm(x + kept(added))))
        assert torch.equal(body.train()(inputs, body.start(len(inputs)))[1][0][0], added[:, -1])
    else:
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {body.layers[0].self_attn.dropout} == {0.4}


# Windows


@settings(max_examples=50)
@given(targets=st.integers(1, 400), kind=st.sampled_from(KINDS), epoch=st.integers(1, 3))
def test_an_epoch_scores_every_target_once(targets, kind, epoch):
    e, model = small(kind)
    places, sizes = [], []
    task = windows(e, model, stream(targets + 1, VOCABULARY))
    for positions, scored in task.batches(epoch):
        places += positions[scored].tolist()
        sizes.append(positions.numel())
        assert positions.min() >= 0 and positions.max() < targets and positions.shape[1] <= 8
        for row, counted in zip(positions, scored, strict=True):
            assert (row[counted].diff() == 1).all()
    assert sorted(places) == list(range(targets)) and max(sizes) <= 32
    # where a Transformer's first window begins decides on one batch more
    assert task.targets == targets and 0 <= len(sizes) - math.ceil(targets / 32) <= (kind == "transformer")


def test_a_transformers_windows_move_from_epoch_to_epoch():
    e, model = small("transformer")
    task = windows(e, model, stream(301, VOCABULARY))
    first, again, second = ([p.tolist() for p, _ in task.batches(epoch)] for epoch in (1, 1, 2))
    assert first == again != second
    starts = [{row[0] % 8 for batch in epoch for row in batch} - {0} for epoch in (first, second)]
    assert starts[0] != starts[1]  # their joints
    assert [row[0] for batch in first for row in batch] != sorted(row[0] for batch in first for row in batch)


@each_recurrent
def test_a_state_is_carried_from_window_to_window_without_gradients(kind):
    e, model = small(kind)
    tokens = stream(101, VOCABULARY)
    task, losses = windows(e, model, tokens), torch.empty(100)
    for epoch in (1, 2):  # and begins every epoch without one
        for positions, scored in task.batches(epoch):
            loss, losses[positions[scored]], _ = task.loss((positions, scored))
            loss.backward()  # the graph of the batch before, which is gone, is not needed
    for start in range(0, 100, 25):  # four stretches of 25, read in windows of 8
        h = BY_HAND[kind](model, tokens[start : start + 25])
        expected = losses_by_hand(model, h, tokens[start + 1 : start + 26])
        torch.testing.assert_close(losses[start : start + 25], expected, atol=1e-5, rtol=1e-5)


# Training


@each_kind
def test_bfloat16_gives_nearly_the_same(kind):
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        e, model = small(kind, phase2_epochs=2, phase2_learning_rate=0.01)
        ends.append(train(model, stream(300, VOCABULARY), stream(60, VOCABULARY, seed=1), e, dtype).val_losses)
    assert ends[0].mean().item() == pytest.approx(ends[1].mean().item(), rel=0.02)
    assert not torch.equal(*ends)  # it was not left out


def test_of_a_mingru_bfloat16_rounds_products_only():
    body = small("mingru")[1].body
    inputs = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))

    def product(linear, x):
        return F.linear(x.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16()).float()

    x, states = product(body.into, inputs), []
    for norm, gates in zip(body.norms, body.gates, strict=True):
        h = min_gru(*product(gates, norm(x)).chunk(2, -1), torch.full((3, 12), 0.5))
        states.append(h[:, -1])
        x = x + h
    with autocast(inputs.device, torch.bfloat16):
        h, (last,) = body(inputs, body.start(3))
    torch.testing.assert_close(last, torch.stack(states), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(h.float(), product(body.out, body.norm(x)), atol=1e-6, rtol=1e-6)


@each_kind
def test_a_periodic_text_is_learnt_by_heart(kind):
    """Of a period of 7 tokens in which no pair repeats but the tokens do, nothing is left to guess."""
    tokens = torch.tensor([1, 2, 3, 1, 4, 2, 1] * 60)  # what follows 1 and 2 depends on what came before
    e, model = small(kind, phase2_epochs=15, phase2_patience=15, phase2_learning_rate=0.02, output_bias="unigram")
    trained = train(model, tokens, tokens[:106], e)
    assert trained.val_losses[8:].exp().mean() < 1.05 and trained.val_accuracy > 0.95
