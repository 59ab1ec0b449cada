"""How much of a text repeats what is trained on, where that is known."""

import numpy as np
import pytest

from ctxlm.analysis.beside_ngrams import compare_test_ppl, repeat_shares
from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Split, Stream
from ctxlm.metrics import perplexity
from ctxlm.ngrams import KneserNey
from tests.conftest import stream

SIZES = {"train_tokens": 400, "val_samples": 20, "development_samples": 1, "test_samples": 1}
DIGITS = " zero one two three four five six seven eight nine".split()


def test_n_grams_beside_a_run_are_counted_on_its_training_text_and_judged_on_its_test_text():
    train, val, development, test = (
        Stream(stream(n, 40, seed=n).numpy(), np.zeros(n, np.int32)) for n in (300, 20, 30, 60)
    )
    table = compare_test_ppl(Experiment(), 12.34, Split(train, val, development, test))["test PPL"]
    counted = [perplexity(KneserNey(train.tokens, n, VOCABULARY).losses(test.tokens).mean()) for n in (4, 1)]
    assert table.tolist() == pytest.approx([12.3, *counted, VOCABULARY], abs=0.06)


def shares(path, paragraph):
    path.write_text("\n\n".join(paragraph(k) for k in range(400)), encoding="utf-8")
    return repeat_shares(str(path), **SIZES)


def test_a_text_of_one_line_repeats_it_and_one_of_new_numbers_repeats_nothing_long(tmp_path):
    line = "".join(f" {word}" for word in DIGITS)  # ten tokens: its second target follows one, and so on
    same = shares(tmp_path / "same.txt", lambda _: line.strip())
    first = 1 / (20 * len(DIGITS) - 1)  # the last target of the 20 lines is the first of none
    assert abs(same.sum() - 1) < 1e-12
    assert abs(same[8] - 2 / 10) < 2 * first and abs(same[5] - 3 / 10) < 2 * first and abs(same[0] - 2 / 10) < 2 * first
    other = shares(tmp_path / "other.txt", lambda k: " ".join(DIGITS[int(d)] for d in f"{k * 7919 % 10**8:08d}"))
    assert other[5] + other[8] < 0.05 < other[0]
