"""What a model reads: tables and figures of a corpus, its split and its embedding. Figures are in tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctxlm.analysis.run_plots import COLOURS, REFERENCE, legend, new_figure
from ctxlm.corpus import VOCABULARY, Corpus, Split, Stream, decode

COMMON = 5000
"""Neighbours are sought among so many of the corpus's most frequent tokens: rare ones are embedded by chance."""


def sizes(corpus: Corpus, streams: Split) -> pd.DataFrame:
    """Samples, tokens, tokens a sample and different tokens, for the corpus and each part of it."""
    parts = {
        "corpus": corpus.stream(0, corpus.num_samples),
        "training capacity": corpus.stream(0, corpus.capacity),
        "training": streams.train,
        "validation": streams.val,
        "development": streams.development,
        "test": streams.test,
    }
    table = pd.DataFrame(index=list(parts))
    table["samples"] = [len(np.unique(part.samples)) for part in parts.values()]
    table["tokens"] = [len(part) for part in parts.values()]
    table["tokens a sample"] = (table["tokens"] / table["samples"]).round(1)
    table["different tokens"] = [len(np.unique(part.tokens)) for part in parts.values()]
    return table


def unseen_share(train: Stream, val: Stream, tokens: int) -> float:
    """Share of the validation stream's tokens that do not occur among the first `tokens` of training."""
    return float(np.isin(val.tokens, train.tokens[:tokens], invert=True).mean())


def examples(stream: Stream, samples: int, length: int = 160) -> pd.Series:
    """The beginning of a stream's first samples as text, by sample."""
    shown = {}
    for sample in pd.unique(stream.samples)[:samples]:
        text = decode(stream.tokens[stream.samples == sample][:length])
        shown[int(sample)] = text[:length] + ("…" if len(text) > length else "")
    return pd.Series(shown, name="text")


def common_words(corpus: Corpus, count: int) -> list[int]:
    """Some of the corpus's tokens that are words of three letters or more, from frequent to less frequent."""
    common = _by_frequency(corpus)[:COMMON]
    words = [token for token in common if (text := decode([token])).startswith(" ") and text[1:].isalpha()]
    words = [token for token in words if len(decode([token])) > 3] or list(common)
    ranks = np.geomspace(min(50, len(words)), len(words), count + 1)[:-1].astype(int) - 1
    return [int(words[rank]) for rank in dict.fromkeys(ranks.tolist())]


def neighbours(embedding: np.ndarray, corpus: Corpus, tokens: Sequence[int], count: int = 6) -> pd.DataFrame:
    """For each token, the common tokens whose embeddings [V, d] point most nearly its way (cosine), nearest first."""
    common = _by_frequency(corpus)[:COMMON]
    directions = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    rows = {}
    for token in tokens:
        others = common[common != token]
        nearest = others[np.argsort(-directions[others] @ directions[token])[:count]]
        rows[repr(decode([token]))] = [repr(decode([other])) for other in nearest]
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns=lambda column: f"{column + 1}.")


def _by_frequency(corpus: Corpus) -> np.ndarray:
    """The tokens that occur in the corpus, most frequent first."""
    counts = np.bincount(corpus.tokens, minlength=VOCABULARY)
    return np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]


def plot_split(corpus: Corpus, streams: Split, second_half: bool, judged: bool = True) -> Figure:
    """Where training and the three judged regions lie: above in all the corpus, below up to their end.

    Args:
        second_half: whether the embedding is made from it.
        judged: whether it is this corpus that is judged on.
    """
    samples = streams.train.samples  # of which each may be cut
    first = int(corpus.starts[samples[0]])
    last = int(corpus.starts[samples[-1]]) + np.count_nonzero(samples == samples[-1])
    bounds = [corpus.capacity + i * corpus.region for i in range(4)]
    end, development, test, after = (int(corpus.starts[bound]) for bound in bounds)
    # a window that runs over the end goes on at the start
    training = [(first, last)] if first < last else [(first, end), (0, last)]
    parts = {"training capacity": ([(0, end)], "0.85"), "training": (training, COLOURS[0])}
    if judged:
        parts["validation"] = [(end, development)], COLOURS[1]
        parts["development"] = [(development, test)], COLOURS[3]
        parts["test"] = [(test, after)], COLOURS[2]
    if second_half:
        parts["makes the embedding"] = [(after, len(corpus.tokens))], COLOURS[4]
    figure, ((whole,), (near,)) = new_figure(2, height=2.9)
    for axes, limit in ((whole, len(corpus.tokens)), (near, after)):
        for name, (spans, colour) in parts.items():
            widths = [(left, right - left) for left, right in spans]
            axes.broken_barh(widths, (0, 1), color=colour, edgecolor="w", label=name)
        axes.set(xlim=(0, limit), ylim=(-0.1, 1.1), yticks=[])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(visible=False)
    whole.set_title("The whole corpus", loc="left")
    near.set_title("Up to the end of the test", loc="left")
    near.set_xlabel("position in the corpus (tokens)")
    legend(figure)
    return figure


def plot_lengths(corpus: Corpus, streams: Split, judged: bool = True) -> Figure:
    """How long the corpus's samples are; ticks mark those of validation, if it is of this corpus (`judged`)."""
    lengths = np.diff(corpus.starts)
    figure, ((axes,),) = new_figure(height=3.4)
    bins = np.geomspace(lengths.min(), lengths.max() + 1, 41)
    weights = np.full(len(lengths), 100 / len(lengths))
    axes.hist(lengths, bins, weights=weights, alpha=0.6, label=_median("corpus", lengths))
    if judged:
        val = lengths[np.unique(streams.val.samples)]
        axes.plot(val, np.zeros(len(val)), "|", markersize=22, mew=1.6, label=_median("validation", val))
    axes.set(xscale="log", xlabel="length of a sample (tokens, log)", ylabel="share of samples (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(markerscale=0.5)
    return figure


def _median(name: str, lengths: np.ndarray) -> str:
    return f"{name}: {len(lengths):,} samples, median {np.median(lengths):,.0f} tokens"


def plot_frequencies(corpus: Corpus, streams: Split) -> Figure:
    """Left: frequency by rank, against Zipf's law. Right: what validation holds that training has not shown."""
    figure, ((left, right),) = new_figure(1, 2, 3.4)
    parts = (("corpus", corpus.tokens), ("training", streams.train.tokens), ("validation", streams.val.tokens))
    for (name, tokens), line in zip(parts, ("-", "--", ":"), strict=True):
        counts = np.sort(np.bincount(tokens))[::-1]
        shares = 100 * counts[counts > 0] / len(tokens)
        left.plot(np.arange(1, len(shares) + 1), shares, line, label=name)
    ends = np.array([10, VOCABULARY])
    left.plot(ends, 10 / ends, color="0.5", linewidth=1, label="Zipf: slope −1")
    left.set(xscale="log", xlabel="rank of a token (log)", yscale="log", ylabel="share of all tokens (%, log)")
    left.yaxis.set_major_formatter("{x:g}")
    left.legend()
    train = corpus.stream(0, corpus.capacity) if streams.train.samples[0] == 0 else streams.train
    steps = np.unique(np.geomspace(min(1000, len(train)), len(train), 25).astype(int))
    right.plot(steps, [100 * unseen_share(train, streams.val, step) for step in steps], color="0.5")
    here = 100 * unseen_share(streams.train, streams.val, len(streams.train))
    label = f"this run: {here:.1f} % at {len(streams.train):,} tokens"
    right.plot(len(streams.train), here, "o", color=COLOURS[1], label=label)
    right.set(xscale="log", xlabel="training tokens (log)", ylim=(0, None), ylabel="validation tokens never seen (%)")
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def plot_embedding(embedding: np.ndarray) -> Figure:
    """Singular values of the embedding [V, d]; equal ones would use all its dimensions alike."""
    figure, ((axes,),) = new_figure(height=3)
    values = np.sqrt(np.linalg.eigvalsh(embedding.T @ embedding).clip(0))[::-1]
    axes.plot(np.arange(1, len(values) + 1), values, label="the embedding")
    alike = float(np.sqrt(np.square(values).mean()))
    axes.axhline(alike, label="of the same size, all dimensions alike", **REFERENCE)
    axes.set(xlabel="number of the singular value", ylim=(0, None), ylabel="singular value")
    axes.legend()
    return figure


def spread(embedding: np.ndarray, corpus: Corpus, streams: Split) -> pd.DataFrame:
    """Root mean square of the embedding's entries, over all tokens and over those that occur in a part."""
    parts = {"training": streams.train.tokens, "validation": streams.val.tokens, "corpus": corpus.tokens}
    kinds = {name: np.unique(tokens) for name, tokens in parts.items()} | {"vocabulary": np.arange(len(embedding))}
    rows = {name: (len(ids), float(np.sqrt(np.square(embedding[ids]).mean()))) for name, ids in kinds.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["different tokens", "root mean square"]).round(4)
