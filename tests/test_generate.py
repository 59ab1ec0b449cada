"""A run asked in words: its losses token by token, what it draws, what its state holds, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctxlm.config import Experiment, read_yaml
from ctxlm.corpus import decode, split, tokenizer
from ctxlm.generate import (
    ContextLanguageModel,
    LanguageModel,
    NGramLanguageModel,
    RecurrentLanguageModel,
    State,
    TransformerLanguageModel,
    changed,
    generate,
    load_run,
    next_tokens,
    surprise,
)
from ctxlm.metrics import effective_rank_pct, singular_values
from ctxlm.networks import Reader
from ctxlm.ngrams import KneserNey
from ctxlm.phase2 import Predictor
from ctxlm.run import run
from tests.conftest import SMALL, refusal, rewrite, short_paragraphs, stream, tiny
from tests.test_networks import small

COMMON = SMALL | {"dtype": "float32", "device": "cpu", "phase2_epochs": 1}
NETWORK = {"output_bias": "unigram", "hidden_dim": 16, "window": 16, "num_heads": 2, "dropout": 0.2}
RUNS = {
    "study": {},
    "echo": read_yaml("params/echo.yaml") | {"leak": 0.5},
    "tuned": read_yaml("params/searched-A.yaml") | {"phase2_context_window": 4, "dropout": 0.2},
    "LSTM": NETWORK | {"model": "lstm"},
    "Transformer": NETWORK | {"model": "transformer"},
    "KN-3": {"model": "kneser-ney", "ngram_order": 3},
}
TEXT = "the cat saw a big dog and then it ran from the house"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """The folder of the finished `RUNS`, the grid `small`; only they are to be had."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "OUTPUTS", "RESULTS"):
            patch.setenv(f"CTXLM_{name}", str(folder / name.lower()))
        for name, values in RUNS.items():
            e = Experiment.from_mapping(COMMON, values, {"corpus": str(text)})
            run(e, folder / "outputs" / "small" / name)
        yield folder / "outputs" / "small"


@pytest.fixture(scope="module")
def loaded(runs):
    return {name: load_run("small", name) for name in RUNS}


def step_by_step(model, tokens):
    """The loss of every one of `tokens`, [T], and the states before each and after the last."""
    states, losses = [model.start()], []
    for token in tokens.tolist():
        losses.append(-model.log_probs(states[-1])[token])
        states.append(model.step(states[-1], token))
    return torch.stack(losses), states


each_run = pytest.mark.parametrize("name", RUNS)


# Models


@each_run
def test_read_token_by_token_a_run_has_the_losses_it_was_judged_by(name, runs, loaded):
    metrics = json.loads((runs / name / "metrics.json").read_text(encoding="utf-8"))
    e = Experiment.from_mapping({key: metrics[key] for key in Experiment.model_fields})
    tokens = torch.from_numpy(split(e).val.tokens).long()
    losses, states = step_by_step(loaded[name], tokens)
    if e.model == "context":  # what is written of contexts is of the ContextBlock as Phase 2 left it
        train = torch.from_numpy(split(e).train.tokens).long()
        for column, read in {
            "val_er_pct": states,
            "train_er_noiseless_pct": step_by_step(loaded[name], train)[1],
        }.items():
            rank = effective_rank_pct(singular_values(torch.cat([state.hidden[-1] for state in read[1:]])))
            assert rank == pytest.approx(metrics[column], rel=1e-4)
    with np.load(runs / name / "val_losses.npz") as kept:
        np.testing.assert_allclose(losses[1:].numpy(), kept["loss"], atol=1e-4)
    assert losses[1:].mean().item() == pytest.approx(metrics["val_loss"], abs=1e-5)


def planted(kind, **parameters):
    """A model with weights as they are drawn, of 30 tokens."""
    if kind == "n-gram":
        return NGramLanguageModel(KneserNey(stream(400, 30).numpy(), 3, 30))
    if kind == "context":
        model = tiny(30, **parameters).requires_grad_(False)
        return ContextLanguageModel(model.eval(), Predictor(model, torch.float32))
    model = small(kind, **parameters)[1].eval().requires_grad_(False)
    speaker = TransformerLanguageModel if kind == "transformer" else RecurrentLanguageModel
    return speaker(model, Reader(model, torch.float32))


KINDS = [
    ("context", {"num_input_tokens": 3, "output_bias": "unigram"}),
    ("context", {"design": "arithmetic"}),
    ("lstm", {}),
    ("mingru", {}),
    ("transformer", {"window": 7, "phase2_batch_size": 21}),
    ("transformer", {"window": 1}),
    ("n-gram", {}),
]


@pytest.mark.parametrize(("kind", "parameters"), KINDS)
def test_a_long_text_at_once_is_that_text_token_by_token_of_which_a_state_of_one_size_is_kept(kind, parameters):
    # chunks of 256, a recurrent network's parts of 1,024, windows
    length = {"context": 600, "lstm": 1100, "mingru": 1100}.get(kind, 60)
    model, tokens = planted(kind, **parameters), stream(length, 30, seed=2)
    losses, states = step_by_step(model, tokens)
    for text, expected in ((tokens, losses), (tokens[:1], losses[:1])):
        torch.testing.assert_close(model.losses(text), expected.float(), atol=1e-4, rtol=0)
    state = states[-1]
    for each in (states[0], state):
        log_probs = model.log_probs(each)
        assert log_probs.dtype == torch.float32 and log_probs.shape == (30,)
        assert log_probs.double().exp().sum().item() == pytest.approx(1, abs=1e-4)
    sizes = [state.nbytes for state in states[1:]]
    assert {*sizes[9:20]} == {*sizes[-11:]}  # a window fills up, and is halved, again and again
    assert kind == "transformer" or sizes[9] == sizes[-1]
    model.step(model.step(state, 3), 4)
    assert torch.equal(model.log_probs(state), log_probs)  # a state stays as it is


# Drawing


class Fixed(LanguageModel):
    """Has one and the same distribution always, or goes through `spoken` and knows it by heart."""

    def __init__(self, log_probs=None, spoken=()):
        self.known, self.spoken = log_probs, spoken

    def step(self, state, token):
        return State((*state.recent, token))

    def log_probs(self, state):
        if self.known is not None:
            return self.known
        return F.one_hot(torch.tensor(self.spoken[len(state.recent)]), max(self.spoken) + 1).float().log()

    def losses(self, tokens):
        return torch.zeros(len(tokens))


SIX = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.15, 0.05]).log()


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 0), (1, 3), (2.0, 3), (2.0, 99)])
def test_frequencies_follow_temperature_and_top_k(temperature, top_k):
    drawn = list(generate(Fixed(SIX), "a prompt", 3000, temperature, top_k, seed=5))
    expected = (SIX / temperature).double().exp()
    if top_k == 3:
        expected[[1, 3, 5]] = 0
    counts = np.bincount([token for token, _, _ in drawn], minlength=6)
    expected = (3000 * expected / expected.sum()).numpy()
    assert not counts[expected == 0].any()
    assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.01
    for token, _, nats in drawn[:20]:  # whatever they are drawn by
        assert nats == pytest.approx(-SIX[token].item())


def test_without_temperature_the_most_probable_is_taken_and_draws_come_from_the_seed_alone():
    def drawn(*arguments):
        return [token for token, _, _ in generate(Fixed(SIX), "", 30, *arguments)]

    assert drawn(0) == drawn(1e-300) == [0] * 30
    torch.manual_seed(1)
    first, state = drawn(1.0, 0, 7), torch.random.get_rng_state()
    assert first == drawn(1.0, 0, 7) != drawn(1.0, 0, 8)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_is_likely_and_what_follows_is_so_given_the_prompt_and_what_was_drawn(loaded):
    for model in loaded.values():
        state = step_by_step(model, torch.tensor(tokenizer().encode(TEXT).ids))[1][-1]
        table, log_probs = next_tokens(model, TEXT, top=7), model.log_probs(state)
        np.testing.assert_allclose(table["probability"], log_probs.sort(descending=True)[0][:7].exp(), rtol=1e-6)
        np.testing.assert_allclose(table["probability"], log_probs.exp()[table["token"]], rtol=1e-6)
        assert table["text"].tolist() == [decode([token]) for token in table["token"]]
        for token, text, nats in generate(model, TEXT, 5, temperature=0):
            log_probs = model.log_probs(state)
            assert token == log_probs.argmax() and nats == pytest.approx(-log_probs.max().item())
            assert text == decode([token])
            state = model.step(state, token)
    assert len(next_tokens(Fixed(SIX), "", top=10)) == 6  # there are no more


# Text


def test_characters_are_joined():
    text = "naïve — “日本語” 🦜🏳️‍🌈 the end"
    spoken = tokenizer().encode(text).ids
    pieces = [piece for _, piece, _ in generate(Fixed(spoken=spoken), "", len(spoken), temperature=0)]
    assert "".join(pieces) == text and "" in pieces and not any("\ufffd" in piece for piece in pieces)
    table = surprise(Fixed(spoken=spoken), text)
    assert list(table) == ["token", "text", "nats"] and table["text"].tolist() == pieces
    assert table["token"].tolist() == spoken


@settings(max_examples=50)
@given(spoken=st.lists(st.integers(0, 255), min_size=1, max_size=30))
@example(spoken=[94, 94, 94, 126, 94])  # the fourth begins a character
def test_bytes_that_are_no_text_show_as_the_tokeniser_shows_them(spoken):
    """Tokens 0 to 255 are the single bytes: few rows of them are UTF-8, and many end within a character."""
    pieces = [piece for _, piece, _ in generate(Fixed(spoken=spoken), "", len(spoken), temperature=0)]
    assert "".join(pieces) == decode(spoken)


# What an exchanged token changes


@each_run
def test_what_a_token_changes_is_what_the_other_text_has_otherwise(name, loaded):
    model, tokens = loaded[name], tokenizer().encode(TEXT).ids
    (other,) = tokenizer().encode(" tree").ids
    table = changed(model, TEXT, " tree", 4)
    assert len(table) == 5 and table.equals(changed(model, TEXT, " tree", 99)[:5])
    true = step_by_step(model, torch.tensor(tokens))[1][-1]
    for row in table.itertuples():
        exchanged = [*tokens]
        exchanged[-1 - row.Index] = other
        state = step_by_step(model, torch.tensor(exchanged))[1][-1]
        p, q = (model.log_probs(x).double() for x in (true, state))
        assert row.kl == pytest.approx(F.kl_div(q, p, reduction="sum", log_target=True).item(), abs=1e-6)
        if true.hidden:
            distance = (true.hidden[-1] - state.hidden[-1]).norm() / true.hidden[-1].norm()
            assert row.context_distance == pytest.approx(distance.item(), rel=1e-4) and distance > 0
        else:
            assert math.isnan(row.context_distance)
    same = changed(model, TEXT, " house", 0).iloc[0]  # a token exchanged for itself
    assert same["kl"] == 0 and not same["context_distance"] > 0


def test_an_n_gram_forgets_what_it_does_not_read(loaded):
    kl = changed(loaded["KN-3"], TEXT, " tree", 99)["kl"]
    assert len(kl) == len(tokenizer().encode(TEXT).ids) and (kl > 1e-9).tolist() == [True] * 2 + [False] * (len(kl) - 2)


# What is refused


SPEAKER = Fixed(SIX)


@pytest.mark.parametrize(
    ("call", "start"),
    [
        *((lambda t=t: list(generate(SPEAKER, "", 1, t)), f"temperature = {t!r} ") for t in (-1, math.nan, math.inf)),
        (lambda: list(generate(SPEAKER, "\ud800", 1)), "prompt = '\\ud800' "),
        (lambda: next_tokens(SPEAKER, 3), "prompt = 3 "),
        (lambda: surprise(SPEAKER, ""), "text = '' "),
        (lambda: changed(SPEAKER, TEXT, " the cat", 0), "token = ' the cat' "),
    ],
)
def test_bad_values_are_refused(call, start):
    assert refusal(call).startswith(start)


@pytest.fixture
def copied(runs, tmp_path):
    """A function that copies a run into the grid `tmp_path` and changes its metrics.json; returns its folder."""

    def copy(name, **metrics):
        folder = shutil.copytree(runs / name, tmp_path / name)
        rewrite(folder / "metrics.json", **metrics)
        return folder

    return copy


def test_what_is_no_finished_run_or_has_no_weights_is_refused(tmp_path, copied):
    message = refusal(load_run, "small", "A")
    assert message.startswith("run = 'A' ") and all(name in message for name in RUNS)
    assert "make report GRID=none" in refusal(load_run, "none", "A")
    (copied("study") / "model.safetensors").unlink()  # as of committed results
    assert "weights" in refusal(load_run, str(tmp_path), "study")
    counted = copied("KN-3")  # which needs no weights
    for name in ("val_losses.npz", "model.safetensors"):
        (counted / name).unlink()
    assert isinstance(load_run(str(tmp_path), "KN-3"), NGramLanguageModel)
    copied("echo", context_ablation="zero")
    assert "context_ablation = 'zero'" in refusal(load_run, str(tmp_path), "echo")


@pytest.mark.parametrize("shape", [{"power": 2}, {"count": 200, "length": 20}], ids=["as many tokens", "fewer"])
@pytest.mark.parametrize("name", ["study", "KN-3"])
def test_a_model_whose_text_has_changed_since_it_was_judged_is_refused(name, shape, copied, tmp_path):
    copied(name, corpus=str(short_paragraphs(tmp_path / "text.txt", **shape)))
    assert "is not what it was" in refusal(load_run, str(tmp_path), name)
