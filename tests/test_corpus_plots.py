"""Where the split is drawn."""

import numpy as np
import pytest

from ctxlm.analysis.corpus_plots import plot_split
from ctxlm.config import Experiment
from ctxlm.corpus import load_corpus, split


@pytest.mark.parametrize(
    "read", [{}, {"data_seed": 55}, {"train_piece_tokens": 30}], ids=["as it stands", "over the end", "in pieces"]
)
def test_training_is_drawn_where_it_is_read(text, read):
    sizes = {"train_tokens": 600} | dict.fromkeys(("val_samples", "development_samples", "test_samples"), 2)
    e = Experiment.from_mapping({"corpus": str(text)}, sizes, read)
    corpus = load_corpus(e.corpus)
    streams = split(e, corpus)
    whole = plot_split(corpus, streams, second_half=False).axes[0]
    bands = {band.get_label(): [path.get_extents() for path in band.get_paths()] for band in whole.collections}
    drawn = {
        sample
        for box in bands["training"]
        for sample in np.flatnonzero((corpus.starts >= box.x0) & (corpus.starts < box.x1))
    }
    assert drawn == {*streams.train.samples}
    assert len(bands["training"]) == (2 if e.data_seed else 1)
