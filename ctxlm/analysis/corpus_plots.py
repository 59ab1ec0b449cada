"""What a model reads: tables and figures of a corpus, its split and its embedding. Figures are in tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctxlm.analysis.run_plots import COLOURS, NARROW, legend, new_figure
from ctxlm.corpus import Corpus, Split, Stream, decode

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


def examples(stream: Stream, samples: int) -> pd.Series:
    """The beginning of a stream's first samples as text, by sample."""
    shown = {}
    for sample in pd.unique(stream.samples)[:samples]:
        text = decode(stream.tokens[stream.samples == sample][:160])
        shown[int(sample)] = text[:160] + ("…" if len(text) > 160 else "")
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
    tokens, counts = np.unique(corpus.tokens, return_counts=True)
    return tokens[np.argsort(-counts, kind="stable")]


def plot_split(corpus: Corpus, streams: Split, second_half: bool, judged: bool = True) -> Figure:
    """Where training and the three judged regions lie: above in all the corpus, below up to their end.

    Args:
        second_half: whether the embedding is made from it.
        judged: whether it is this corpus that is judged on.
    """
    read = np.unique(streams.train.samples)  # a window that runs over the end goes on at the start
    spans = np.split(read, np.flatnonzero(np.diff(read) > 1) + 1)
    training = [(int(corpus.starts[some[0]]), int(corpus.starts[some[-1] + 1])) for some in spans]
    bounds = [corpus.capacity + i * corpus.region for i in range(4)]
    end, development, test, after = (int(corpus.starts[bound]) for bound in bounds)
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
    return legend(figure)


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


def plot_unseen(corpus: Corpus, streams: Split) -> Figure:
    """The share of validation tokens that do not occur in training, by how long that is."""
    train = corpus.stream(0, corpus.capacity)  # of which this run may read the first tokens
    if not np.array_equal(train.tokens[: len(streams.train)], streams.train.tokens):
        train = streams.train
    steps = np.unique(np.geomspace(min(1000, len(train)), len(train), 25).astype(int)).tolist()
    shares = {n: 100 * np.isin(streams.val.tokens, train.tokens[:n], invert=True).mean() for n in steps}
    here = 100 * np.isin(streams.val.tokens, streams.train.tokens, invert=True).mean()
    figure, ((axes,),) = new_figure(height=3.2, width=NARROW)
    axes.plot([*shares], [*shares.values()], color="0.5")
    label = f"this run: {here:.1f} % at {len(streams.train):,} tokens"
    axes.plot(len(streams.train), here, "o", color=COLOURS[1], label=label)
    axes.set(xscale="log", xlabel="training tokens (log)", ylim=(0, None), ylabel="validation tokens never seen (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    return figure
