"""N-grams beside a run, and how much of a text repeats what is trained on."""

import numpy as np
import pytest

from ctxlm.analysis.beside_ngrams import compare_test_ppl, repeat_shares
from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Split, Stream, split
from ctxlm.metrics import losses_by_repeat, perplexity
from ctxlm.ngrams import KneserNey
from tests.conftest import stream


def test_n_grams_beside_a_run_are_counted_on_its_training_text_and_judged_on_its_test_text():
    train, val, development, test = (
        Stream(stream(n, 40, seed=n).numpy(), np.zeros(n, np.int32)) for n in (300, 20, 30, 60)
    )
    table = compare_test_ppl(Experiment(), 12.34, Split(train, val, development, test))["test PPL"]
    counted = [perplexity(KneserNey(train.tokens, n, VOCABULARY).losses(test.tokens).mean()) for n in (4, 1)]
    assert table.tolist() == pytest.approx([12.3, *counted, VOCABULARY], abs=0.06)


def test_shares_of_a_text_are_those_of_its_validation_targets(text):
    sizes = {"train_tokens": 400, "val_samples": 3, "development_samples": 1, "test_samples": 1}
    streams = split(Experiment.from_mapping({"corpus": str(text)}, sizes))
    rows = losses_by_repeat(np.zeros(len(streams.val) - 1), streams.val, streams.train)
    targets = {row["step"]: row["value"] for row in rows if row["metric"] == "targets"}
    shares = repeat_shares(str(text), **sizes)
    assert (shares * (len(streams.val) - 1)).to_dict() == pytest.approx(targets)
