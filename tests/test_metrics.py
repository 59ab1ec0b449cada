"""Effective rank of known matrices, losses by what repeats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm.corpus import Stream
from ctxlm.metrics import MAX_ROWS, effective_rank_pct, losses_by_repeat, repeated, singular_values
from tests import literal


def effective_rank(matrix):
    return effective_rank_pct(singular_values(matrix)) / 100 * matrix.shape[1]


def test_the_effective_rank_of_known_singular_values():
    known = [([3.0] * 8, 8), ([5.0] + [0.0] * 7, 1), ([2.0] * 4 + [0.0] * 4, 4), ([20.0, 10.0, 5.0, 5.0], 2**1.75)]
    for values, rank in known:
        assert effective_rank(torch.diag(torch.tensor(values))) == pytest.approx(rank, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 60), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_gram_matrix_gives_the_svds_rank(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    result = effective_rank(matrix)
    assert result == pytest.approx(literal.effective_rank(matrix), rel=1e-3)
    assert 1 - 1e-6 <= result <= columns + 1e-6
    assert effective_rank(7 * matrix) == pytest.approx(result, rel=1e-6)


def test_a_long_matrix_is_judged_by_a_fixed_sample_of_its_rows():
    matrix = torch.randn(2 * MAX_ROWS, 6, generator=torch.Generator().manual_seed(0))
    matrix[:MAX_ROWS, 1:] = 0  # so that neither half is like the whole
    assert torch.equal(singular_values(matrix), singular_values(matrix.clone()))
    assert effective_rank(matrix) == pytest.approx(literal.effective_rank(matrix), rel=0.01)
    whole = torch.linalg.svdvals(matrix)[0].item()
    assert singular_values(matrix)[0].item() == pytest.approx(whole / math.sqrt(2), rel=0.05)


def test_losses_are_counted_by_how_much_of_what_was_just_read_repeats_the_training_text():
    train, judged = (np.array(tokens, np.int32) for tokens in ([*range(20), 5], [9, 3, 4, 5, 6, 30, 0, 1, 2, 3, 5, 6]))
    streams = [Stream(judged, np.repeat([7, 8], [6, 6]).astype(np.int32)), Stream(train, np.zeros_like(train))]
    before = repeated(*streams)  # the first of a sample has nothing before it, and nothing is known behind a 30
    assert before.tolist() == [1, 1, 2, 3, 4, 0, 1, 2, 3, 4, 1]
    rows = losses_by_repeat(np.arange(11, dtype=np.float32), *streams)
    values = {(row["step"], row["metric"]): row["value"] for row in rows}
    assert values == {
        **{(0, "targets"): 5, (0, "nats"): 22 / 5, (2, "targets"): 2, (2, "nats"): 4.5, (3, "targets"): 4},
        **{(3, "nats"): 24 / 4, (5, "targets"): 0, (8, "targets"): 0},
    }


@given(*[st.lists(st.integers(0, 2), min_size=2, max_size=40)] * 2, st.data())
def test_repeats_are_those_of_a_plain_search(train, judged, data):
    samples = np.cumsum(data.draw(st.lists(st.integers(0, 1), min_size=len(judged), max_size=len(judged))))
    streams = [
        Stream(np.array(t, np.int32), s.astype(np.int32)) for t, s in ((judged, samples), (train, np.zeros(len(train))))
    ]
    for target, length in enumerate(repeated(*streams), start=1):
        first = samples.tolist().index(samples[target])
        runs = [judged[target - k : target] for k in range(min(8, target - first) + 1)]
        assert length == max(
            len(run) for run in runs if any(train[i : i + len(run)] == run for i in range(len(train) + 1))
        )
