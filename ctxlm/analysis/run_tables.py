"""What ends one run: how well it predicts beside simpler models, and where it lies."""

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Split
from ctxlm.metrics import perplexity
from ctxlm.ngrams import KneserNey


def compare_test_ppl(settings: Experiment, test_ppl: float, streams: Split) -> pd.DataFrame:
    """A run's test PPL beside that of n-grams, counted on the same training tokens, and of a uniform guess."""
    rows = {f"{settings.experiment} (this run)": test_ppl}
    for name, order in (("Kneser-Ney 4-gram", 4), ("unigram", 1)):
        counted = KneserNey(streams.train.tokens, order, VOCABULARY)
        rows[name] = perplexity(counted.losses(streams.test.tokens).mean())
    return pd.DataFrame({"test PPL": rows | {"uniform": float(VOCABULARY)}}).round(1)


@dataclass(frozen=True)
class FolderLink:
    """A link to a run's folder from where the notebook runs."""

    folder: Path

    def _repr_markdown_(self) -> str:
        path = Path(os.path.relpath(self.folder)).as_posix()
        return f"[{path}]({path}/)"
