"""What is counted in a text: n-grams, to set beside a run, and how much of it repeats what is trained on."""

from typing import Any

import numpy as np
import pandas as pd

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Split, load_corpus, split
from ctxlm.metrics import REPEATED, perplexity, repeated
from ctxlm.ngrams import KneserNey


def compare_test_ppl(settings: Experiment, test_ppl: float, streams: Split) -> pd.DataFrame:
    """A run's test PPL beside that of n-grams, counted on the same training tokens, and of a uniform guess."""
    rows = {f"{settings.experiment} (this run)": test_ppl}
    for name, order in (("Kneser-Ney 4-gram", 4), ("unigram", 1)):
        counted = KneserNey(streams.train.tokens, order, VOCABULARY)
        rows[name] = perplexity(counted.losses(streams.test.tokens).mean())
    return pd.DataFrame({"test PPL": rows | {"uniform": float(VOCABULARY)}}).round(1)


def repeat_shares(corpus: str, **sizes: Any) -> pd.Series:
    """How much of a text repeats what is trained on: shares of its validation targets, by the classes of `REPEATED`.

    A second, without a model or an embedding. The index is named `step`, as in histories.

    Args:
        corpus: as the parameter.
        sizes: parameters of the split, as `train_tokens`; more of it repeats more. By default all validation samples.

    Raises:
        ConfigError: as `corpus.split`.
    """
    usual = {"corpus": corpus, "val_samples": load_corpus(corpus).region, "development_samples": 1, "test_samples": 1}
    streams = split(Experiment.from_mapping(usual, sizes))
    kinds = np.searchsorted(REPEATED, repeated(streams.val, streams.train), side="right") - 1
    return pd.Series(np.bincount(kinds, minlength=len(REPEATED)) / len(kinds), pd.Index(REPEATED, name="step"))
