"""What n-grams tell: how well a run predicts beside them, and how far back a text must be read."""

from typing import Any

import pandas as pd

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Split, load_corpus, split
from ctxlm.metrics import perplexity
from ctxlm.ngrams import KneserNey


def compare_test_ppl(settings: Experiment, test_ppl: float, streams: Split) -> pd.DataFrame:
    """A run's test PPL beside that of n-grams, counted on the same training tokens, and of a uniform guess."""
    rows = {f"{settings.experiment} (this run)": test_ppl}
    for name, order in (("Kneser-Ney 4-gram", 4), ("unigram", 1)):
        counted = KneserNey(streams.train.tokens, order, VOCABULARY)
        rows[name] = perplexity(counted.losses(streams.test.tokens).mean())
    return pd.DataFrame({"test PPL": rows | {"uniform": float(VOCABULARY)}}).round(1)


def order_gain(corpus: str, **sizes: Any) -> float:
    """What a Kneser-Ney 4-gram gains on a bigram, nats a token of the development text.

    About 0 where the next token hangs on the one before it alone. A second, without a model or an embedding.

    Args:
        corpus: as the parameter.
        sizes: parameters of the split, as `train_tokens`; the gain grows with it. By default all development samples.

    Raises:
        ConfigError: as `corpus.split`.
    """
    usual = {"corpus": corpus, "val_samples": 1, "development_samples": load_corpus(corpus).region, "test_samples": 1}
    streams = split(Experiment.from_mapping(usual, sizes))
    few, many = (KneserNey(streams.train.tokens, order, VOCABULARY) for order in (2, 4))
    judged = streams.development.tokens
    return float(few.losses(judged).mean() - many.losses(judged).mean())
