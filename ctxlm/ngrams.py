"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman, 1999), to set beside the context model.

    p_k(w | h) = max(a(hw) − D(a(hw)), 0) / Σ_v a(hv) + γ(h) · p_{k-1}(w | h')

h' is h without its oldest token, p_0 is uniform over the vocabulary. a counts occurrences at the highest order and,
below it, the distinct tokens that come before; D takes three values an order (for counts of 1, 2, and 3 or more),
estimated from how many n-grams occur once to four times; γ hands on what D took.
"""

from collections.abc import Iterator

import numpy as np

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Split, load_corpus
from ctxlm.metrics import Baseline
from ctxlm.progress import track


def build(experiment: Experiment, streams: Split) -> Baseline:
    """The n-gram of an experiment, counted on its training stream."""
    ngrams = kneser_ney(experiment, streams)
    columns = {"ngrams": sum(map(len, ngrams.keys)), "trained_params": 0}
    return Baseline(ngrams.judge, columns, [], {})


def kneser_ney(experiment: Experiment, streams: Split) -> "KneserNey":
    """The n-gram of an experiment, counted on its training tokens.

    With `ngram_second_half` it counts `Corpus.second_half` too: text that the `ppmi` embedding, and with it every model
    that reads through it, has seen.
    """
    tokens = streams.train.tokens
    if experiment.ngram_second_half:
        tokens = np.concatenate([tokens, load_corpus(experiment.corpus, experiment.shuffle_samples).second_half.tokens])
    return KneserNey(tokens, experiment.ngram_order, VOCABULARY)


class KneserNey:
    """N-gram probabilities of a stream of tokens, computed for whole streams at once."""

    def __init__(self, tokens: np.ndarray, order: int, vocabulary: int):
        """Count `tokens`, int [T], one or more, all below `vocabulary`; `order` is n (1: unigrams)."""
        self.order, self.vocabulary = order, vocabulary
        self.keys: list[np.ndarray] = []
        """For each length k, the sorted keys of the k-grams seen: id of the first k - 1 tokens · V + last token."""
        tokens = tokens.astype(np.int64)
        ids, rows = np.zeros(len(tokens), np.int64), []  # the empty context has id 0
        for length in range(1, min(order, len(tokens)) + 1):
            # The (k-1)-gram that ends before each position, and the token there; positions before k - 1 have none.
            keys = ids[: len(tokens) - length + 1] * vocabulary + tokens[length - 1 :]
            seen, first, ids, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            self.keys.append(seen)
            rows.append((first, ids, counts))
        self.levels = []
        for k, (_, ids, counts) in enumerate(rows):
            if k + 1 < len(rows):  # distinct longer n-grams, by the k-gram they end in (one position further on)
                counts = np.bincount(ids[rows[k + 1][0] + 1], minlength=len(counts))
            self.levels.append(_Level(self.keys[k] // vocabulary, counts))

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """p(token_t | the tokens before it in `tokens`), float64 [T], t = 0 without a context."""
        p = np.full(len(tokens), 1 / self.vocabulary)
        for k, (contexts, grams) in enumerate(self._ids(tokens)):
            p[k:] = self.levels[k].interpolate(p[k:], contexts[:-1], grams)
        return p

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Of all of `tokens` [T] but the first, given those before them, nats, float64 [T - 1]."""
        return -np.log(self.probabilities(tokens)[1:])

    def distribution(self, history: np.ndarray) -> np.ndarray:
        """p(w | history) of every token w, float64 [V]."""
        p = np.full(self.vocabulary, 1 / self.vocabulary)
        for k, (level, context) in enumerate(zip(self.levels, [c[-1] for c, _ in self._ids(history)], strict=False)):
            if context < 0 or context >= len(level.handed_on) or not np.isfinite(level.handed_on[context]):
                break  # a longer context is not known either
            first, last = np.searchsorted(self.keys[k], [context * self.vocabulary, (context + 1) * self.vocabulary])
            p *= level.handed_on[context]
            p[self.keys[k][first:last] % self.vocabulary] += level.share[first:last]
        return p

    def _ids(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For k = 0, 1, … the ids of the k-grams that end before each of `tokens` [T] and after the last, [T - k + 1],
        and of the (k+1)-grams that they go on to, [T - k]; -1: never seen."""
        contexts = np.zeros(len(tokens) + 1, np.int64)  # the empty context has id 0
        for k, keys in enumerate(self.keys[: len(tokens) + 1]):
            wanted = np.where(contexts[:-1] < 0, -1, contexts[:-1] * self.vocabulary + tokens[k:])
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            grams = np.where(keys[at] == wanted, at, -1)
            yield contexts, grams
            contexts = grams

    def judge(self, tokens: np.ndarray) -> tuple[np.ndarray, float]:
        """Every target's loss, nats, float32 [T - 1], and the share of targets that were the most probable token."""
        losses = self.losses(tokens).astype(np.float32)
        hits, best, reach = 0, {}, self.order - 1
        for t in track(range(1, len(tokens)), f"{self.order}-gram"):
            history = tuple(tokens[max(t - reach, 0) : t].tolist()) if reach else ()
            if history not in best:
                best[history] = int(self.distribution(np.array(history, np.int64)).argmax())
            hits += best[history] == tokens[t]
        return losses, hits / (len(tokens) - 1)


class _Level:
    """Counts of one order: discounted shares of the n-grams, and what their contexts hand on."""

    def __init__(self, contexts: np.ndarray, counts: np.ndarray):
        size = contexts.max() + 1
        discounts = _discounts(counts)
        total = np.bincount(contexts, counts, size)
        taken = discounts[np.minimum(counts, 3)]
        with np.errstate(invalid="ignore", divide="ignore"):
            self.share = np.maximum(counts - taken, 0) / total[contexts]
            self.handed_on = np.bincount(contexts, np.minimum(taken, counts), size) / total

    def interpolate(self, lower: np.ndarray, contexts: np.ndarray, grams: np.ndarray) -> np.ndarray:
        """p of this order from that of the one below; contexts and n-grams never seen are -1."""
        known = (contexts >= 0) & (contexts < len(self.handed_on))
        handed_on = self.handed_on[np.where(known, contexts, 0)]
        known &= np.isfinite(handed_on)  # a context that only ended the text was never continued
        share = np.where(grams >= 0, self.share[np.maximum(grams, 0)], 0.0)
        return np.where(known, share + handed_on * lower, lower)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts of 0, 1, 2 and 3 or more.

    It cannot be estimated where no n-gram occurs once, or none twice, three or four times; and an estimate of 0 or less
    would leave nothing for words never seen: then it is 0.5, 1 and 1.5.
    """
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimated = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimated > 0).all():
            return np.append(0, estimated)
    return np.array([0, 0.5, 1, 1.5])
