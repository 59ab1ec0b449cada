"""Kneser-Ney against a literal one made of dictionaries, and against what probabilities must be."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, load_corpus, split
from ctxlm.ngrams import KneserNey, kneser_ney
from tests.conftest import SMALL, short_paragraphs


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


orders = st.integers(1, 5)
seeds = st.integers(0, 1000)


@settings(max_examples=25)
@given(length=st.integers(1, 150), order=orders, vocabulary=st.integers(2, 12), seed=seeds)
def test_probabilities_are_the_literal_ones(length, order, vocabulary, seed):
    train, read = text(length, vocabulary, seed), text(40, vocabulary, seed + 1)
    literal = Literal(train.tolist(), order, vocabulary)
    expected = [literal.p(word, read[:t].tolist()) for t, word in enumerate(read.tolist())]
    assert KneserNey(train, order, vocabulary).probabilities(read) == pytest.approx(np.array(expected), abs=1e-12)


@settings(max_examples=25)
@given(st.integers(1, 300), orders, st.integers(2, 30), seeds, st.lists(st.integers(0, 29), max_size=6))
def test_a_distribution_holds_the_probabilities_and_sums_to_one(length, order, vocabulary, seed, history):
    model = KneserNey(text(length, vocabulary, seed), order, vocabulary)
    before = np.array(history, int) % vocabulary
    expected = np.array([model.probabilities(np.append(before, word))[-1] for word in range(vocabulary)])
    assert expected.sum() == pytest.approx(1, abs=1e-9) and expected.min() > 0
    assert model.distribution(before) == pytest.approx(expected, abs=1e-12)


def test_the_second_half_is_counted_too_where_it_is_asked_for(empty_cache, tmp_path):
    path = str(short_paragraphs(tmp_path / "text.txt"))
    values = SMALL | {"model": "kneser-ney", "ngram_order": 2, "corpus": path}
    streams, read = split(Experiment.from_mapping(values)), load_corpus(path).tokens[:300]
    counted = {False: streams.train.tokens}
    counted[True] = np.concatenate([streams.train.tokens, load_corpus(path).second_half.tokens])
    for second_half, tokens in counted.items():
        e = Experiment.from_mapping(values, {"ngram_second_half": second_half})
        expected = KneserNey(tokens, 2, VOCABULARY).probabilities(read)
        assert np.array_equal(kneser_ney(e, streams).probabilities(read), expected)


def test_judging_gives_losses_and_the_share_of_first_guesses():
    model, read = KneserNey(text(500, 12, 0), 3, 12), text(60, 12, 1)
    losses, accuracy = model.judge(read)
    assert losses == pytest.approx(-np.log(model.probabilities(read)[1:]), rel=1e-6)
    guesses = [model.distribution(read[:t]).argmax() for t in range(1, 60)]
    assert accuracy == np.mean(guesses == read[1:])
