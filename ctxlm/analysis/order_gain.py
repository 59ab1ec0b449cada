"""How far back a text must be read, known before anything is trained."""

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, split
from ctxlm.ngrams import KneserNey


def order_gain(experiment: Experiment, low: int = 2, high: int = 4) -> float:
    """What a Kneser-Ney n-gram of order `high` gains on one of order `low`, nats a token of the development text.

    About 0 where the next token hangs on the one before it alone. A second, without a model or an embedding.

    Raises:
        ConfigError: as `corpus.split`.
    """
    streams = split(experiment)
    few, many = (KneserNey(streams.train.tokens, order, VOCABULARY) for order in (low, high))
    judged = streams.development.tokens
    return float(few.losses(judged).mean() - many.losses(judged).mean())
