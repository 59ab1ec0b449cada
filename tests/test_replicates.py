"""Which runs are independent, on grids of every kind."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ctxlm.analysis.replicates import balanced, each, replicate_of, student


def grid(pairs, sizes=(10, 20), labels="AB") -> pd.DataFrame:
    rows = [(label, size, *pair) for label, size, pair in itertools.product(labels, sizes, pairs)]
    return pd.DataFrame(rows, columns=["experiment", "train_tokens", "seed", "data_seed"])


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        ([(42, 0)], 1),
        ([(42, 0), (43, 0), (44, 0)], 3),  # seeds on one text
        ([(42, 0), (42, 1)], 2),  # texts from one set of weights
        ([(42, 0), (43, 1), (44, 2)], 3),
        ([(42, 0), (43, 0), (44, 1), (45, 1)], 2),  # windows, each with seeds of its own
        (list(itertools.product((42, 43), (0, 1))), 1),  # crossed: nothing is independent of anything
        ([(42, 0), (43, 0), (43, 1), (44, 2)], 2),  # 43 ties two windows together
    ],
)
def test_replicates_share_neither_seed_nor_text(pairs, count):
    runs = grid(pairs)
    runs["replicate"] = replicate_of(runs)
    assert runs["replicate"].nunique() == count and set(runs["replicate"]) == set(range(count))
    assert (runs.groupby(["seed", "data_seed"])["replicate"].nunique() == 1).all()
    if runs["data_seed"].nunique() > 1 and runs["seed"].nunique() > 1:
        assert (runs.groupby("seed")["replicate"].nunique() == 1).all()
        assert (runs.groupby("data_seed")["replicate"].nunique() == 1).all()


@pytest.mark.parametrize(
    ("triples", "count"),
    [
        ([(42, 0, 0), (42, 0, 1), (42, 0, 2)], 3),  # draws of the embedding alone
        ([(42, 0, 1), (43, 1, 2)], 2),
        ([(42, 0, 1), (43, 1, 1), (44, 2, 2)], 2),  # a draw ties two texts together
        ([(42, 0, 5), (43, 1, 5)], 2),  # the same for all: held fixed
    ],
)
def test_runs_that_share_a_draw_of_the_embedding_are_not_independent(triples, count):
    runs = pd.DataFrame(triples, columns=["seed", "data_seed", "embedding_seed"])
    assert replicate_of(runs).nunique() == count


def test_balance_is_equal_numbers_of_every_size():
    runs = grid([(42, 0), (43, 1)])
    runs["replicate"] = replicate_of(runs)
    assert balanced(runs, "experiment", "train_tokens")
    assert not balanced(runs.iloc[1:], "experiment", "train_tokens")
    assert not balanced(runs[runs["replicate"] == 0], "experiment", "train_tokens")
    assert not balanced(pd.concat([runs, runs.iloc[:1]]), "experiment", "train_tokens")
    assert each(runs.assign(y=runs["seed"] * 1.0), lambda part: part["y"].mean()).tolist() == [42, 43]


def test_students_interval():
    values = np.array([1.0, 2.0, 4.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert student(values) == pytest.approx((expected.low, expected.high))
    assert student(values[:1]) is None and student(values[:0]) is None
