"""Kneser-Ney against a literal one made of dictionaries, and against what probabilities must be."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm import networks, ngrams
from ctxlm.config import BASELINES, Experiment
from ctxlm.corpus import split
from ctxlm.metrics import Alternative
from ctxlm.ngrams import KneserNey, _discounts, kneser_ney


class Literal:
    """Chen & Goodman (1999), equations for interpolated modified Kneser-Ney, one n-gram at a time."""

    def __init__(self, tokens, order, vocabulary):
        self.vocabulary = vocabulary
        grams = {k: Counter(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)) for k in range(1, order + 1)}
        self.order = max(k for k in grams if grams[k])
        self.counts = {}
        for k in range(1, self.order + 1):
            if k == self.order:
                self.counts[k] = dict(grams[k])
            else:
                before = defaultdict(set)
                for longer in grams[k + 1]:
                    before[longer[1:]].add(longer[0])
                self.counts[k] = {gram: len(before[gram]) for gram in grams[k]}

    def discount(self, k, count):
        n = [sum(c == i for c in self.counts[k].values()) for i in range(5)]
        if count == 0:
            return 0
        i, fixed = min(count, 3), {1: 0.5, 2: 1, 3: 1.5}
        if min(n[1:]) == 0:
            return fixed[i]
        y = n[1] / (n[1] + 2 * n[2])
        estimated = {j: j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3)}
        return estimated[i] if min(estimated.values()) > 0 else fixed[i]

    def p(self, word, history, k=None):
        k = min(self.order, len(history) + 1) if k is None else k
        if k == 0:
            return 1 / self.vocabulary
        context = tuple(history[len(history) - k + 1 :])
        following = {gram[-1]: c for gram, c in self.counts[k].items() if gram[:-1] == context}
        total = sum(following.values())
        lower = self.p(word, history, k - 1)
        if total == 0:
            return lower
        count = following.get(word, 0)
        gamma = sum(min(self.discount(k, c), c) for c in following.values()) / total
        return max(count - self.discount(k, count), 0) / total + gamma * lower


def text(length, vocabulary, seed):
    """Tokens with something to learn: each one likes some followers, frequent ones most."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        follows = (tokens[-1] * 3 + int(rng.geometric(0.4))) % vocabulary
        tokens.append(follows if rng.random() < 0.7 else int(rng.integers(vocabulary)))
    return np.array(tokens)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 150),
    order=st.integers(1, 5),
    vocabulary=st.integers(2, 12),
    seed=st.integers(0, 1000),
)
def test_probabilities_are_the_literal_ones(length, order, vocabulary, seed):
    train, read = text(length, vocabulary, seed), text(40, vocabulary, seed + 1)
    literal = Literal(train.tolist(), order, vocabulary)
    expected = [literal.p(word, read[:t].tolist()) for t, word in enumerate(read.tolist())]
    assert KneserNey(train, order, vocabulary).probabilities(read) == pytest.approx(np.array(expected), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 300),
    order=st.integers(1, 5),
    vocabulary=st.integers(2, 30),
    seed=st.integers(0, 1000),
    history=st.lists(st.integers(0, 29), max_size=6),
)
def test_probabilities_of_all_followers_sum_to_one(length, order, vocabulary, seed, history):
    model = KneserNey(text(length, vocabulary, seed), order, vocabulary)
    before = np.array(history, int) % vocabulary
    last = [model.probabilities(np.append(before, word))[-1] for word in range(vocabulary)]
    assert sum(last) == pytest.approx(1, abs=1e-9) and min(last) > 0


def test_no_word_is_impossible_where_an_estimated_discount_is_not_above_0():
    model = KneserNey(text(46, 23, 50), 2, 23)
    assert model.distribution(np.array([5])).min() > 0
    # 2 once, 1 twice, 3 three times, 1 four times: 2 − 3 · (1/2) · 3/1 is below 0
    assert _discounts(np.array([1, 1, 2, 3, 3, 3, 4])).tolist() == [0, 0.5, 1, 1.5]


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 300),
    order=st.integers(1, 5),
    vocabulary=st.integers(2, 30),
    seed=st.integers(0, 1000),
    history=st.lists(st.integers(0, 29), max_size=6),
)
def test_a_distribution_holds_the_probabilities(length, order, vocabulary, seed, history):
    model = KneserNey(text(length, vocabulary, seed), order, vocabulary)
    before = np.array(history, int) % vocabulary
    expected = [model.probabilities(np.append(before, word))[-1] for word in range(vocabulary)]
    assert model.distribution(before) == pytest.approx(np.array(expected), abs=1e-12)


def test_judging_gives_losses_and_the_share_of_first_guesses():
    train, read = text(500, 12, 0), text(60, 12, 1)
    for order in (1, 3):
        model = KneserNey(train, order, 12)
        losses, accuracy = model.judge(read)
        assert losses == pytest.approx(-np.log(model.probabilities(read)[1:]), rel=1e-6)
        guesses = [model.distribution(read[:t]).argmax() for t in range(1, 60)]
        assert accuracy == np.mean(guesses == read[1:])


def test_the_second_half_is_counted_when_asked():
    data = {
        "model": "kneser-ney",
        "train_tokens": 2000,
        "val_samples": 1,
        "development_samples": 1,
        "test_samples": 1,
        "ngram_order": 2,
    }
    plain = Experiment.from_mapping(data)
    streams = split(plain)
    small = kneser_ney(plain, streams)
    large = kneser_ney(Experiment.from_mapping(data, {"ngram_second_half": True}), streams)
    assert len(large.keys[1]) > 50 * len(small.keys[1])
    assert large.judge(streams.val.tokens[:300])[0].mean() < small.judge(streams.val.tokens[:300])[0].mean()


@pytest.mark.parametrize("model", BASELINES)
def test_validation_is_that_of_the_weights_that_are_kept(model):
    data = {
        "model": model,
        "train_tokens": 600,
        "val_samples": 1,
        "development_samples": 1,
        "test_samples": 1,
        "num_layers": 1,
        "hidden_dim": 8,
    }
    data |= {"num_heads": 2, "embedding": "random", "embed_dim": 8, "phase2_epochs": 3, "phase2_weight_average": 0.9}
    experiment = Experiment.from_mapping(data | {"phase2_learning_rate": 0.1, "device": "cpu", "dtype": "float32"})
    streams = split(experiment)
    found = (ngrams if model == "kneser-ney" else networks).build(experiment, streams)
    assert isinstance(found, Alternative) and len(found.val[0]) == len(streams.val) - 1
    assert bool(found.weights) == bool(found.history) == (model != "kneser-ney")
    assert (found.columns["trained_params"] > 0) == (model != "kneser-ney")
    if model != "kneser-ney":  # the weights at the end are not those that are kept
        assert found.columns["best_epoch"] < found.columns["epochs_run"]
    losses, accuracy = found.judge(streams.val.tokens)
    assert losses == pytest.approx(found.val[0], abs=1e-5) and accuracy == pytest.approx(found.val[1], abs=1e-3)
    assert len(losses) == len(streams.val) - 1


def test_text_is_learnt_and_longer_contexts_help():
    train, held_out = text(20_000, 40, 0), text(3_000, 40, 1)
    losses = [-np.log(KneserNey(train, order, 40).probabilities(held_out)).mean() for order in (1, 2, 3)]
    assert losses[1] < losses[0] - 0.3 and losses[2] < losses[1] + 0.15  # the text looks back one token
    assert losses[0] < np.log(40) + 0.01


def test_discounts_of_a_known_text():
    # 4 pairs once, 2 twice, 1 three times, 1 four times: y = 4 / (4 + 2·2) = 1/2
    assert _discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4])) == pytest.approx([0, 0.5, 2 - 3 * 0.5 / 2, 3 - 4 * 0.5])


@pytest.mark.parametrize(("tokens", "order"), [([], 3), ([1, 2], 0)])
def test_nothing_to_count_is_refused(tokens, order):
    with pytest.raises(ValueError, match="needs an order of 1 and a token, or more"):
        KneserNey(np.array(tokens), order, 5)
