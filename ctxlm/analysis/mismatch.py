"""How far judged text is from training text, told before anything is trained."""

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, split
from ctxlm.ngrams import KneserNey

HELD_OUT = 0.1
"""The share of the training text, its end, that the judged text is set against."""


def mismatch(experiment: Experiment) -> float:
    """How much harder the development text is than more of the training text, for a bigram of the rest of that.

    Nats a token; 0: they are alike. A few seconds, without a model or an embedding.

    Raises:
        ConfigError: as `corpus.split`.
    """
    streams = split(experiment)
    tokens = streams.train.tokens
    cut = len(tokens) - max(2, round(HELD_OUT * len(tokens)))
    counted = KneserNey(tokens[:cut], 2, VOCABULARY)
    return float(counted.losses(streams.development.tokens).mean() - counted.losses(tokens[cut:]).mean())
