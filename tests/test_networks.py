"""The LSTM and the Transformer against their equations, one position at a time, and on texts that they must learn."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm.config import ConfigError, Experiment, read_yaml
from ctxlm.model import load_own_weights, own_weights
from ctxlm.networks import NeuralLM, Reader, Windows, evaluate, parts, train_network
from tests.conftest import stream

VOCABULARY = 30
SMALL = {
    "lstm": {"num_layers": 2, "hidden_dim": 12, "window": 8},
    "transformer": {"num_layers": 2, "hidden_dim": 16, "num_heads": 4, "window": 8},
}
KINDS = list(SMALL)


def small(kind, **parameters):
    values = {"model": kind, "embed_dim": 8, "phase2_batch_size": 32, "phase2_epochs": 3, "dtype": "float32"}
    e = Experiment.from_mapping(values, SMALL[kind], parameters)
    embedding = 0.3 * torch.randn(VOCABULARY, e.embed_dim, generator=torch.Generator().manual_seed(3))
    return e, NeuralLM(e, embedding)


@pytest.mark.parametrize(("name", "count"), [("lstm", 18_312_320), ("transformer", 19_768_576)])
def test_trained_parameters_are_within_a_tenth_of_a(name, count):
    e = Experiment.from_mapping(read_yaml("params/base.yaml"), read_yaml(f"params/baselines/{name}.yaml"))
    trained = NeuralLM(e, torch.zeros(5, 768)).trained()  # 5 tokens have 5 biases
    assert sum(p.numel() for p in trained.values()) == count + 5
    assert abs((count + 50_257) / (10_630_656 + 7_681_536) - 1) < 0.1


def windows(e, model, train, val=None):
    """What training is, on the stream `train`."""
    return Windows(model, train, stream(20, VOCABULARY, seed=1) if val is None else val, e, torch.float32)


def by_hand_lstm(model, tokens):
    """h [T, d] by the equations of the gates, one token at a time."""
    body, states = model.body, [(torch.zeros(12), torch.zeros(12)) for _ in range(2)]
    found = []
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
        found.append(body.out.weight @ x + body.out.bias)
    return torch.stack(found)


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


def losses_by_hand(model, h, targets):
    logits = model.logit_scale * h @ model.embedding.T
    return F.cross_entropy(
        logits if model.output_bias is None else logits + model.output_bias, targets, reduction="none"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_equations(kind):
    _, model = small(kind, output_bias="unigram", logit_scale=0.7)
    model.output_bias.data.normal_(generator=torch.Generator().manual_seed(0))
    tokens = stream(9, VOCABULARY)  # a window and its last target
    positions = torch.arange(8)[None]
    _, losses, correct = Reader(model, torch.float32)(tokens, positions, positions >= 0)
    h = (by_hand_lstm if kind == "lstm" else by_hand_transformer)(model, tokens[:-1])
    torch.testing.assert_close(losses, losses_by_hand(model, h, tokens[1:]), atol=1e-5, rtol=1e-5)
    assert correct.dtype == torch.bool and losses.requires_grad is False


def test_an_lstm_is_judged_from_a_warm_up_on():
    """Fresh weights forget within tens of tokens; ones that hardly do show what the warm-up is worth."""
    _, model = small("lstm")
    tokens = stream(2600, VOCABULARY)  # three parts
    expected = losses_by_hand(model, by_hand_lstm(model, tokens[:-1]), tokens[1:])
    losses, accuracy = evaluate(Reader(model, torch.float32), tokens)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert 0 <= accuracy <= 1
    with torch.no_grad():
        for k in range(2):
            getattr(model.body.cells, f"bias_ih_l{k}")[12:24] += 6  # forget gates
    h = by_hand_lstm(model, tokens[:-1])
    from_the_start = losses_by_hand(model, h, tokens[1:])
    losses, _ = evaluate(Reader(model, torch.float32), tokens)
    torch.testing.assert_close(losses[:1024], from_the_start[:1024], atol=1e-4, rtol=1e-4)
    late = by_hand_lstm(model, tokens[1024 - 256 : 2048])[256:]
    torch.testing.assert_close(losses[1024:2048], losses_by_hand(model, late, tokens[1025:2049]), atol=1e-4, rtol=1e-4)
    assert (losses - from_the_start)[1024:].abs().max() > 1e-2


def test_a_transformer_sees_half_a_window_or_more():
    _, model = small("transformer")
    tokens = stream(30, VOCABULARY)
    losses, _ = evaluate(Reader(model, torch.float32), tokens)
    for t in range(29):
        start = max(4 * (t // 4) - 4, 0)  # parts of 4 targets, read on from 4 positions before
        h = by_hand_transformer(model, tokens[start : t + 1])[-1:]
        torch.testing.assert_close(
            losses[t : t + 1], losses_by_hand(model, h, tokens[t + 1 : t + 2]), atol=1e-5, rtol=1e-5
        )


@given(targets=st.integers(1, 300), part=st.integers(1, 40), warmup=st.integers(0, 40))
def test_parts_score_every_target_once_after_its_warmup(targets, part, warmup):
    positions, scored = parts(targets, part, warmup)
    assert positions[scored].tolist() == list(range(targets))
    for row, counted in zip(positions, scored, strict=True):
        first = int(row[counted][0])
        assert row[0] == max(first - warmup, 0) and (row[: int(counted.nonzero()[-1]) + 1].diff() == 1).all()


@settings(deadline=None, max_examples=50)
@given(targets=st.integers(1, 400), kind=st.sampled_from(KINDS), epoch=st.integers(1, 3))
def test_an_epoch_scores_every_target_once(targets, kind, epoch):
    e, model = small(kind)
    found, sizes = [], []
    task = windows(e, model, stream(targets + 1, VOCABULARY))
    for positions, scored in task.batches(epoch):
        found += positions[scored].tolist()
        sizes.append(positions.numel())
        assert positions.min() >= 0 and positions.max() < targets and positions.shape[1] <= 8
        for row, counted in zip(positions, scored, strict=True):
            assert (row[counted].diff() == 1).all()
    assert sorted(found) == list(range(targets)) and max(sizes) <= 32
    if kind == "lstm":
        assert task.updates == len(sizes)
    else:  # the shift of the first window decides, and tells by one batch at most
        assert task.updates == math.ceil((targets + 8) / 32) >= len(sizes) >= task.updates - 1


def test_a_transformers_windows_move_from_epoch_to_epoch():
    e, model = small("transformer")
    task = windows(e, model, stream(301, VOCABULARY))
    first, again, second = ([p.tolist() for p, _ in task.batches(epoch)] for epoch in (1, 1, 2))
    assert first == again != second
    starts = [{row[0] % 8 for batch in epoch for row in batch} - {0} for epoch in (first, second)]
    assert starts[0] != starts[1]  # their joints
    assert [row[0] for batch in first for row in batch] != sorted(row[0] for batch in first for row in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_blanked_tokens_read_as_zeros_in_training_alone(kind):
    _, model = small(kind, phase2_token_dropout=0.4)
    tokens, positions = stream(17, VOCABULARY), torch.arange(16).view(2, 8)
    scored = positions < 14
    reader = Reader(model, torch.float32)

    def losses():
        reader.state = None
        return reader(tokens, positions, scored)[1]

    model.eval()
    plain, whole = losses(), model.inputs(tokens, positions)
    model.train()
    model.blank.begin(1, torch.device("cpu"))
    kept = (model.inputs(tokens, positions) != 0).any(-1)
    assert whole.shape == (2, 8, 8) and 0 < kept.sum() < 16
    model.blank.begin(1, torch.device("cpu"))
    blanked = losses()
    assert not torch.equal(losses(), losses())  # every batch has draws of its own
    model.eval()
    assert torch.equal(losses(), plain)
    model.inputs = lambda *_: whole * kept.unsqueeze(-1)
    torch.testing.assert_close(losses(), blanked, atol=1e-6, rtol=1e-6)
    assert (blanked - plain).abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_networks_head_reads_the_slow_context_too(kind, frozen):
    e, model = small(kind, slow_decay=0.9, phase2_freeze_embedding=frozen)
    before, tokens = model.embedding.detach().clone(), stream(150, VOCABULARY)
    train_network(model, tokens, stream(60, VOCABULARY, seed=1), e)
    assert "slow.gain" in model.trained() and (model.slow.gain != 0.07).all()
    shares = (torch.bincount(tokens, minlength=VOCABULARY) + 1) / (150 + VOCABULARY)
    torch.testing.assert_close(model.slow.weights, 1e-3 / (1e-3 + shares))
    assert torch.equal(model.embedding, before) == frozen
    s, rows = torch.zeros(8), []
    for token in tokens[:8]:
        s = 0.9 * s + model.slow.weights[token] * F.layer_norm(before[token], (8,))
        rows.append(F.layer_norm(s, (8,)))
    by_hand = by_hand_lstm if kind == "lstm" else by_hand_transformer
    h = by_hand(model, tokens[:8]) + model.slow.gain * torch.stack(rows)
    positions = torch.arange(8).view(1, 8)
    _, losses, _ = Reader(model, torch.float32)(tokens, positions, positions < 8)
    torch.testing.assert_close(losses, losses_by_hand(model, h, tokens[1:9]), atol=1e-5, rtol=1e-5)
    new = small(kind, slow_decay=0.9, phase2_freeze_embedding=frozen)[1]
    load_own_weights(new, own_weights(model))
    _, again, _ = Reader(new, torch.float32)(tokens, positions, positions < 8)
    torch.testing.assert_close(again, losses)


def test_gradients_end_at_the_window():
    e, model = small("lstm")
    task = windows(e, model, stream(101, VOCABULARY))
    first, second, *_ = task.batches(1)
    task.loss(first)
    assert not any(x.requires_grad for x in task.reader.state)
    task.loss(second)[0].backward()  # the first batch's graph is not needed


def test_an_lstm_carries_its_state_from_window_to_window():
    e, model = small("lstm")
    tokens = stream(101, VOCABULARY)
    task, found = windows(e, model, tokens), torch.empty(100)
    with torch.no_grad():
        for epoch in (1, 2):  # and begins every epoch without one
            for positions, scored in task.batches(epoch):
                found[positions[scored]] = task.loss((positions, scored))[1]
    for start in range(0, 100, 25):  # four stretches of 25, read in windows of 8
        expected = losses_by_hand(
            model, by_hand_lstm(model, tokens[start : start + 25]), tokens[start + 1 : start + 26]
        )
        torch.testing.assert_close(found[start : start + 25], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_periodic_text_is_learnt_by_heart(kind):
    """Of a period of 7 tokens in which no pair repeats but the tokens do, nothing is left to guess."""
    tokens = torch.tensor([1, 2, 3, 1, 4, 2, 1] * 60)  # what follows 1 and 2 depends on what came before
    e, model = small(kind, phase2_epochs=60, phase2_patience=60, phase2_learning_rate=0.02, output_bias="unigram")
    found = train_network(model, tokens, tokens[:211], e)
    assert found.val_losses[8:].exp().mean() < 1.05 and found.val_accuracy > 0.95
    judged, _ = evaluate(Reader(model, torch.float32), tokens[:211])
    torch.testing.assert_close(judged, found.val_losses)
    assert "embedding" not in own_weights(model) and "output_bias" in own_weights(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_embedding_is_read_and_predicted_through(kind):
    e, model = small(kind, phase2_freeze_embedding=False, output_bias="unigram")
    assert {"embedding", "output_bias"} < set(model.trained()) and "embedding" in own_weights(model)
    tokens, positions = stream(9, VOCABULARY), torch.arange(8)[None]
    Reader(model, torch.float32)(tokens, positions, positions >= 0)[0].backward()
    found, model.embedding.grad = model.embedding.grad, None
    h = (by_hand_lstm if kind == "lstm" else by_hand_transformer)(model, tokens[:-1])
    losses_by_hand(model, h, tokens[1:]).mean().backward()
    torch.testing.assert_close(found, model.embedding.grad, atol=1e-5, rtol=1e-4)
    before = model.embedding.detach().clone()
    train_network(model, stream(150, VOCABULARY), stream(60, VOCABULARY, seed=1), e)
    assert not torch.equal(before, model.embedding)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_order_come_from_the_seed_alone(kind):
    def losses(torchs_own, seed=42):
        torch.manual_seed(torchs_own)
        e, model = small(kind, seed=seed, phase2_token_dropout=0.2)
        return train_network(model, stream(150, VOCABULARY), stream(60, VOCABULARY, seed=1), e).val_losses

    first = losses(1)
    state = torch.random.get_rng_state()
    assert torch.equal(first, losses(2)) and not torch.equal(first, losses(1, seed=43))
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())  # and torch's own generator is left alone


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gives_nearly_the_same(kind):
    _, model = small(kind, slow_decay=0.9)
    tokens = stream(60, VOCABULARY)
    exact, rounded = (evaluate(Reader(model, dtype), tokens)[0] for dtype in (torch.float32, torch.bfloat16))
    assert exact.mean().item() == pytest.approx(rounded.mean().item(), rel=0.02)
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        e, model = small(kind, phase2_epochs=2, phase2_learning_rate=0.01)
        ends.append(train_network(model, stream(300, VOCABULARY), stream(60, VOCABULARY, seed=1), e, dtype).val_losses)
    assert ends[0].mean().item() == pytest.approx(ends[1].mean().item(), rel=0.02)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"model": "transformer", "hidden_dim": 30}, "hidden_dim = 30 and num_heads = 8: the first must divide"),
        ({"model": "lstm", "window": 30}, "phase2_batch_size = 512 and window = 30: the first must be a multiple"),
        (
            {"model": "lstm", "use_weight_tying": False},
            "use_weight_tying = False and model = 'lstm': .* set it to True",
        ),
        ({"model": "lstm", "phase2_init_std": 0.01}, "phase2_init_std = 0.01 and model = 'lstm': .* set it to 0.1"),
        ({"model": "lstm", "phase2_context_window": 8}, "phase2_context_window = 8 and model = 'lstm': .* set it to 0"),
        (
            {"model": "transformer", "phase2_shuffle": True},
            "phase2_shuffle = True and model = 'transformer': .* to Fal",
        ),
        (
            {"model": "lstm", "design": "arithmetic"},
            "design = 'arithmetic' and model = 'lstm': .* set it to 'constant'",
        ),
        (
            {"model": "lstm", "context_ablation": "zero"},
            "context_ablation = 'zero' and model = 'lstm': .* to 'none'",
        ),
        ({"model": "lstm", "ngram_second_half": True}, "ngram_second_half = True and model = 'lstm': .* to false"),
        ({"model": "rnn"}, "model = 'rnn' is not possible: choose 'context', 'kneser-ney', 'lstm' or 'transformer'"),
    ],
)
def test_what_a_network_cannot_be_is_one_sentence(parameters, sentence):
    with pytest.raises(ConfigError) as error:
        Experiment.from_mapping({"window": 32, "hidden_dim": 64}, parameters)
    assert re.match(sentence, str(error.value)) and "\n" not in str(error.value)
