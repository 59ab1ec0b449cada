"""Protocol 3: what is trained on and what is judged never meet, in any run of any grid and on any corpus."""

import re
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm import corpus as corpus_module
from ctxlm.config import ConfigError, Experiment, load_grid
from ctxlm.corpus import LEAST_SAMPLES, PROTOCOL, REGION, WINDOWS, Corpus, check_data, load_corpus, split
from ctxlm.files import ROOT

GRIDS = sorted(path.stem for path in (ROOT / "params" / "grids").glob("*.yaml"))
DATA = "corpus train_tokens train_samples data_seed val_samples development_samples test_samples max_sample_tokens"
DATA = [*DATA.split(), "held_out_tokens"]
PARTS = ("val", "development", "test")


@pytest.fixture(scope="module")
def chitchat():
    return load_corpus("chitchat")


@pytest.fixture(scope="module")
def runs():
    """The runs of all grids, by grid and name."""
    return {(grid, name): run for grid in GRIDS for name, run in load_grid(grid).runs.items()}


@pytest.fixture(scope="module")
def splits(runs, chitchat):
    """The streams of all runs, by their data parameters; the experiment that stands for them comes first."""
    kinds = {tuple(getattr(run, name) for name in DATA): run for run in runs.values() if run.corpus == "chitchat"}
    return {kind: (run, split(run, chitchat)) for kind, run in kinds.items()}


def counting(lengths, name="counting.txt"):
    """A corpus of samples of these lengths whose tokens count up from 0, so that a token tells where it lies."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(name, np.arange(starts[-1], dtype=np.int32), starts)


def of_samples(**parameters):
    """An experiment that fits a small corpus."""
    judged = {f"{part}_samples": 1 for part in PARTS}
    return Experiment.from_mapping(judged, {"max_sample_tokens": None}, parameters)


def beginnings(corpus, first, count, longest):
    """The first tokens of so many samples, sample by sample."""
    found = []
    for sample in range(first, first + count):
        found += range(int(corpus.starts[sample]), int(corpus.starts[sample + 1]))[:longest]
    return found


# All grids


def test_no_run_of_any_grid_is_judged_on_what_any_run_is_trained_on(splits):
    train, val, development, test = set(), set(), set(), set()
    for run, streams in splits.values():
        train |= set(streams.train.samples.tolist())
        if not run.held_out_tokens:  # there it is training text that stands in for validation
            val |= set(streams.val.samples.tolist())
        development |= set(streams.development.samples.tolist())
        test |= set(streams.test.samples.tolist())
    assert train and max(train) < 1354
    assert (val, development, test) == tuple(set(range(first, first + 200)) for first in (1354, 1554, 1754))


def test_what_is_held_out_is_training_text_of_no_test(splits):
    found = [(run, streams) for run, streams in splits.values() if run.held_out_tokens]
    assert found
    for run, streams in found:
        assert len(streams.val) == run.held_out_tokens
        assert len(streams.train) == run.train_tokens - run.held_out_tokens
        assert streams.val.samples.max() < 1354 <= streams.test.samples.min()


def test_every_judged_sample_is_the_beginning_of_its_sample(splits, chitchat):
    for run, streams in splits.values():
        parts = [streams.development, streams.test, *([] if run.held_out_tokens else [streams.val])]
        for part in parts:
            samples, counts = np.unique(part.samples, return_counts=True)
            assert counts.max() <= run.max_sample_tokens
            for sample, count in zip(samples, counts, strict=True):
                own = chitchat.tokens[chitchat.starts[sample] : chitchat.starts[sample + 1]]
                assert count == min(len(own), run.max_sample_tokens)
                assert np.array_equal(part.tokens[part.samples == sample], own[:count])


NOT_TOGETHER = {"chance", "signs"}
"""Grids that cross seeds, texts and signs, or turn signs that are given: what they ask is what each of these does."""


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid not in NOT_TOGETHER])
def test_replicates_are_drawn_together_and_from_texts_apart(grid, runs, chitchat, monkeypatch):
    own = [run for (of, _), run in runs.items() if of == grid]
    triples = {(run.seed, run.data_seed, run.embedding_seed) for run in own}
    if len({run.seed for run in own}) > 1 or len(triples) > 1:
        assert [len(set(column)) for column in zip(*triples, strict=True)] == [len(triples)] * 3
        assert all(embedding_seed for _, _, embedding_seed in triples)  # each has signs that are drawn
        for label in {run.experiment for run in own}:  # and every model has all of them
            assert {(r.seed, r.data_seed, r.embedding_seed) for r in own if r.experiment == label} == triples
    if {run.corpus for run in own} == {"ultrachat"}:  # which the hub has
        places = Corpus("ultrachat", np.zeros(3_480_000, np.int32), np.arange(20_001) * 174)
        monkeypatch.setattr(corpus_module, "load_corpus", lambda name: places)
    if {run.corpus for run in own} == {"chitchat"}:
        monkeypatch.setattr(corpus_module, "load_corpus", lambda name: chitchat)
    check_data(own)


def test_grids_without_replicates_are_few(runs):
    single = [grid for grid in GRIDS if len({run.seed for (of, _), run in runs.items() if of == grid}) == 1]
    known = ["logit-scale", "playground", "sizes-largest"]
    assert sorted(single) == known


# Chitchat


def test_chitchats_parts_have_the_known_sizes(chitchat):
    assert PROTOCOL == 3
    assert (chitchat.half, chitchat.region, chitchat.capacity) == (1754, 200, 1354)
    assert chitchat.starts[1354] == 1_133_776
    streams = split(Experiment(), chitchat)
    assert [len(stream) for stream in vars(streams).values()] == [86_925, 45_354, 44_023, 42_008]
    assert streams.train.samples[0] == 0
    for part, first in (("val", 1354), ("development", 1554), ("test", 1754)):
        samples = getattr(streams, part).samples
        assert (samples[0], samples[-1]) == (first, first + 199)
    assert len(chitchat.second_half) == len(chitchat.tokens) - chitchat.starts[1954] == 1_386_029
    streams = split(Experiment(val_samples=100, development_samples=200, max_sample_tokens=128), chitchat)
    assert [len(stream) for stream in (streams.val, streams.development)] == [12_171, 24_445]
    assert (streams.val.samples[-1], streams.development.samples[-1]) == (1453, 1753)


def test_null_means_whole_samples(chitchat):
    streams = split(Experiment(max_sample_tokens=None), chitchat)
    for part, first in ((streams.val, 1354), (streams.development, 1554), (streams.test, 1754)):
        whole = chitchat.stream(first, first + 200)
        assert np.array_equal(part.tokens, whole.tokens) and np.array_equal(part.samples, whole.samples)


@pytest.mark.parametrize("longest", [128, 256, None])
@pytest.mark.parametrize("part", PARTS)
def test_fewer_samples_are_a_prefix_of_more(chitchat, part, longest):
    def judged(samples):
        return getattr(split(Experiment(max_sample_tokens=longest, **{f"{part}_samples": samples}), chitchat), part)

    whole = judged(200)
    for samples in (1, 20, 50, 100, 199):
        fewer = judged(samples)
        assert np.array_equal(fewer.tokens, whole.tokens[: len(fewer)])
        assert np.array_equal(fewer.samples, whole.samples[: len(fewer)])
        assert len(np.unique(fewer.samples)) == samples and whole.samples[len(fewer)] != fewer.samples[-1]


def test_what_a_run_is_judged_on_depends_on_nothing_but_its_own_parameters(chitchat):
    one = split(Experiment(), chitchat)
    others = [
        {"train_tokens": 1234},
        {"train_tokens": None, "train_samples": 7},
        {"data_seed": 33},
        {"embedding": "random", "embedding_seed": 9},
        {"embedding": "gpt2"},
        {"seed": 7, "num_layers": 3, "context_dim": 5, "embed_dim": 9, "dtype": "float32"},
        {"model": "kneser-ney"},
    ]
    for parameters in others:
        other = split(Experiment(**parameters), chitchat)
        for part in PARTS:
            assert np.array_equal(getattr(one, part).tokens, getattr(other, part).tokens)
            assert np.array_equal(getattr(one, part).samples, getattr(other, part).samples)
    for parameters in others[3:]:
        assert np.array_equal(one.train.tokens, split(Experiment(**parameters), chitchat).train.tokens)


@pytest.mark.parametrize(
    ("tokens", "seeds"),
    [(183_620, (0, 12, 24, 36, 48)), (367_240, (0, 20, 40)), (86_925, (0, 7, 15, 22, 30, 37, 45, 52))],
)
def test_windows_of_the_studys_sizes_share_no_token(tokens, seeds, chitchat, monkeypatch):
    experiments = [Experiment(train_tokens=tokens, data_seed=seed) for seed in seeds]
    places = Corpus("places", np.arange(len(chitchat.tokens), dtype=np.int32), chitchat.starts)
    windows = [split(experiment, places).train.tokens for experiment in experiments]
    assert [len(window) for window in windows] == [tokens] * len(seeds)
    assert len(np.unique(np.concatenate(windows))) == tokens * len(seeds)
    assert max(window.max() for window in windows) < 1_133_776
    monkeypatch.setattr(corpus_module, "load_corpus", lambda name: chitchat)
    check_data(experiments)


def test_chitchat_has_room_for_its_capacity_and_for_no_more(chitchat):
    full = split(Experiment(train_tokens=1_133_776), chitchat)
    assert full.train.samples[-1] + 1 == full.val.samples[0] == 1354
    with pytest.raises(ConfigError, match=r"train_tokens = 1133777 is more than the training capacity of 1,133,776 to"):
        split(Experiment(train_tokens=1_133_777), chitchat)
    assert split(Experiment(train_tokens=None, train_samples=1354), chitchat).train.samples[-1] == 1353
    with pytest.raises(ConfigError, match=r"train_samples = 1355 is more than the training capacity of 1,354 samples"):
        split(Experiment(train_tokens=None, train_samples=1355), chitchat)


# Any corpus


@st.composite
def cases(draw, least=1):
    """A corpus and an experiment that fits it, unless a part is left a single token; with `least` 2 none is.

    Of six samples or more (fewer have no room for three parts), some much longer than others.
    """
    lengths = st.integers(least, 9) | st.integers(10, 300)
    corpus = counting(draw(st.lists(lengths, min_size=6, max_size=60)))
    parameters = {
        **{f"{part}_samples": draw(st.integers(1, corpus.region)) for part in PARTS},
        "max_sample_tokens": draw(st.none() | st.integers(least, 12) | st.integers(13, 320)),
        "data_seed": draw(st.integers(0, WINDOWS - 1)),
    }
    if draw(st.booleans()):
        parameters |= {"train_samples": draw(st.integers(1, corpus.capacity)), "train_tokens": None}
    else:
        parameters["train_tokens"] = draw(st.integers(least, int(corpus.starts[corpus.capacity])))
    return corpus, Experiment(**parameters)


@given(st.integers(0, 10_000))
def test_a_corpus_is_a_capacity_three_equal_regions_and_what_the_embedding_reads(samples):
    corpus = Corpus("any", np.zeros(samples, np.int32), np.arange(samples + 1))
    assert corpus.region == min(200, max(1, samples // 2 // 8))
    assert corpus.capacity == samples // 2 - 2 * corpus.region
    assert (corpus.region == REGION) == (samples >= 3200)
    if samples >= LEAST_SAMPLES:
        assert corpus.capacity > 0 and len(corpus.second_half) == samples - samples // 2 - corpus.region > 0


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_split_is_exact_and_overlaps_nowhere(case):
    corpus, e = case
    region, capacity = corpus.region, corpus.capacity
    judged = [
        beginnings(corpus, capacity + i * region, getattr(e, f"{part}_samples"), e.max_sample_tokens)
        for i, part in enumerate(PARTS)
    ]
    # The window begins at the sample nearest to its share of the capacity, and is exact.
    end = int(corpus.starts[capacity])
    distances = [abs(60 * int(start) - end * e.data_seed) for start in corpus.starts[:capacity]]
    first = distances.index(min(distances))
    length = e.train_tokens
    if length is None:
        length = sum(int(np.diff(corpus.starts)[(first + i) % capacity]) for i in range(e.train_samples))
    train = [(int(corpus.starts[first]) + i) % end for i in range(length)]
    if min(length, *map(len, judged)) < 2:
        with pytest.raises(ConfigError, match="leaves a single token, and nothing to predict from it"):
            split(e, corpus)
        return
    streams = split(e, corpus)
    for stream, expected in zip(vars(streams).values(), (train, *judged), strict=True):
        assert stream.tokens.dtype == stream.samples.dtype == np.int32
        assert len(stream.tokens) == len(stream.samples) == len(stream)
        assert stream.tokens.tolist() == expected
        where = np.searchsorted(corpus.starts, stream.tokens, side="right") - 1
        assert np.array_equal(where, stream.samples)
    assert len(set(train)) == length
    for before, after in pairwise(vars(streams).values()):
        assert max(before.samples) < min(after.samples)
    assert max(streams.development.samples) < corpus.half <= min(streams.test.samples)
    assert max(streams.test.samples) < min(corpus.second_half.samples)
    steps = {after - before for before, after in pairwise(train)}
    assert steps <= {1, 1 - end} and sum(after < before for before, after in pairwise(train)) <= 1
    assert train[0] in corpus.starts and (train[0] == 0 or e.data_seed)


@settings(max_examples=100, deadline=None)
@given(cases(least=2), st.data())
def test_a_longer_training_run_begins_with_the_shorter_one(case, data):
    corpus, e = case
    sizes = sorted(data.draw(st.lists(st.integers(2, int(corpus.starts[corpus.capacity])), min_size=2, max_size=2)))
    short, long = (
        split(e.model_copy(update={"train_tokens": tokens, "train_samples": None}), corpus).train for tokens in sizes
    )
    assert [len(short), len(long)] == sizes
    assert np.array_equal(long.tokens[: len(short)], short.tokens)


@settings(max_examples=100, deadline=None)
@given(cases(least=2), st.data())
def test_held_out_tokens_are_the_windows_last_uncut_and_replace_validation(case, data):
    corpus, e = case
    whole = split(e, corpus)
    held_out = data.draw(st.integers(1, len(whole.train)))
    cut = e.model_copy(update={"held_out_tokens": held_out})
    if not 2 <= held_out <= len(whole.train) - 2:
        with pytest.raises(ConfigError, match=rf"held_out_tokens = {held_out} of {len(whole.train):,} training tokens"):
            split(cut, corpus)
        return
    found = split(cut, corpus)
    for name in ("tokens", "samples"):
        joined = np.concatenate([getattr(found.train, name), getattr(found.val, name)])
        assert np.array_equal(joined, getattr(whole.train, name))
        for part in ("development", "test"):
            assert np.array_equal(getattr(getattr(found, part), name), getattr(getattr(whole, part), name))
    assert len(found.val) == held_out


def test_data_seeds_rotate_the_training_window_over_the_whole_capacity():
    corpus = counting([10] * 40)  # a capacity of 16 samples
    trains = [split(of_samples(data_seed=seed, train_tokens=155), corpus).train.tokens for seed in range(60)]
    assert {int(tokens[0]) for tokens in trains} == set(range(0, 160, 10))
    assert [int(trains[seed][0]) for seed in (0, 1, 2, 15, 30, 45)] == [0, 0, 10, 40, 80, 120]
    wrapped = next(tokens for tokens in trains if tokens[0] == 150)
    assert np.array_equal(wrapped, [*range(150, 160), *range(145)])


# What is refused


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"train_tokens": 161},
            r"^train_tokens = 161 is more than the training capacity of 160 tokens .*: lower it, or",
        ),
        (
            {"train_tokens": None, "train_samples": 17},
            r"^train_samples = 17 is more than .* of 16 samples .*: lower it",
        ),
        ({"train_tokens": 10**7}, r"has 40 samples; .* 4 samples of the first are kept .* or use a longer corpus$"),
        (
            {"val_samples": 3, "train_tokens": 5},
            r"^val_samples = 3 is more than the 2 samples .*: lower it, or use a l",
        ),
        (
            {"test_samples": 3, "train_tokens": 5},
            r"^test_samples = 3 is more than the 2 samples .*: lower it, or use a",
        ),
        ({"train_tokens": 1}, r"^train_tokens = 1 leaves a single token, and nothing to predict from it: raise it$"),
        (
            {"train_tokens": 5, "max_sample_tokens": 1},
            r"^val_samples = 1 leaves a single token, and nothing to predict",
        ),
        (
            {"train_tokens": 5, "max_sample_tokens": 1, "val_samples": 2},
            r"^development_samples = 1 leaves a single token, and nothing to predict from it: raise it$",
        ),
        ({"train_tokens": 5, "held_out_tokens": 4}, r"^held_out_tokens = 4 of 5 training tokens: it must leave two or"),
        (
            {"train_tokens": 5, "held_out_tokens": 1},
            r"^held_out_tokens = 1 of 5 training tokens: .* and hold two or mo",
        ),
    ],
)
def test_a_split_that_does_not_fit_is_refused_in_one_sentence(parameters, message, monkeypatch):
    corpus = counting([10] * 40)
    with pytest.raises(ConfigError, match=message) as caught:
        split(of_samples(**parameters), corpus)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(corpus_module, "load_corpus", lambda name: corpus)
    with pytest.raises(ConfigError, match=message):  # and before a grid's first run
        check_data([of_samples(**parameters)])


def test_a_stream_of_one_token_has_nothing_to_predict():
    corpus = counting([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    for size in ("train_tokens", "train_samples"):
        own = {"train_tokens": None} | {size: 1}
        with pytest.raises(ConfigError, match=f"^{size} = 1 leaves a single token, and nothing to predict from it: "):
            split(of_samples(**own), corpus)
        assert len(split(of_samples(**own | {size: 2}), corpus).train) in (2, 3)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", ["train_tokens", "train_samples"])
def test_a_corpus_too_short_for_all_parts_can_only_be_made_longer(samples, size):
    corpus = counting([10] * samples)
    with pytest.raises(ConfigError, match=rf"^{size} = 2 .* capacity of 0 .* has {samples} samples; .* longer corpus$"):
        split(of_samples(**{"train_tokens": None} | {size: 2}), corpus)


def test_six_samples_are_enough():
    corpus = counting([3] * 6)
    parts = [part.tokens.tolist() for part in vars(split(of_samples(train_tokens=3), corpus)).values()]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert corpus.second_half.tokens.tolist() == [12, 13, 14, 15, 16, 17]


@settings(max_examples=200, deadline=None)
@given(cases(least=2), st.integers(0, WINDOWS - 1), st.integers(0, WINDOWS - 1))
def test_windows_that_share_a_token_are_refused_with_a_seed_that_shares_none(case, one, other):
    corpus, e = case
    pair = [e.model_copy(update={"data_seed": seed}) for seed in (one, other)]
    seen = [set(split(own, corpus).train.tokens.tolist()) for own in pair]
    with mock.patch.object(corpus_module, "load_corpus", return_value=corpus):
        if one != other and e.train_samples is not None:
            with pytest.raises(ConfigError, match="give train_tokens instead"):
                check_data(pair)
            return
        if one == other or not seen[0] & seen[1]:
            return check_data(pair)
        with pytest.raises(ConfigError) as refused:
            check_data(pair)
        assert f"data_seed = {max(one, other)} and {min(one, other)} have " in str(refused.value)
        assert f"have {len(seen[0] & seen[1]):,} training tokens in common" in str(refused.value)
        kept = e.model_copy(update={"data_seed": min(one, other)})
        free = [e.model_copy(update={"data_seed": seed}) for seed in range(WINDOWS)]
        own = set(split(kept, corpus).train.tokens.tolist())
        free = [x.data_seed for x in free if not own & set(split(x, corpus).train.tokens.tolist())]
        found = re.search(r"use data_seed = (\d+) in place of (\d+)", str(refused.value))
        assert (found is None) == (not free)
        if found:
            assert (int(found[1]), int(found[2])) == (free[0], max(one, other))
            check_data([kept, e.model_copy(update={"data_seed": int(found[1])})])
        else:
            assert "lower the number of tokens" in str(refused.value)


def test_a_seed_is_free_beside_all_other_windows(monkeypatch):
    corpus = counting([10] * 40)  # a capacity of 160 tokens
    monkeypatch.setattr(corpus_module, "load_corpus", lambda name: corpus)
    seeds = [of_samples(train_tokens=40, data_seed=seed) for seed in (0, 15, 31, 40)]
    with pytest.raises(
        ConfigError, match=r"^data_seed = 40 and 31 have 10 training .*: use data_seed = 44 in place of"
    ):
        check_data(seeds)
    check_data([*seeds[:3], seeds[3].model_copy(update={"data_seed": 44})])
    longer = seeds[1].model_copy(update={"train_tokens": 50})  # the longest window of a seed counts
    with pytest.raises(ConfigError, match=r"^data_seed = 31 and 15 have 10 training tokens in common"):
        check_data([*seeds[:2], longer, seeds[2]])


@pytest.mark.parametrize("second", [{}, {"train_tokens": 20, "train_samples": None}])
@pytest.mark.parametrize("swapped", [False, True])
def test_windows_of_unequal_size_are_refused(second, swapped, monkeypatch):
    corpus = counting([10] * 40)
    monkeypatch.setattr(corpus_module, "load_corpus", lambda name: corpus)
    one = of_samples(train_tokens=None, train_samples=4)
    check_data([one, one.model_copy(update={"seed": 1})])
    pair = [one, one.model_copy(update={"data_seed": 30} | second)]
    with pytest.raises(ConfigError, match=r"with train_samples = 4: .*: give train_tokens instead$") as refused:
        check_data(pair[::-1] if swapped else pair)
    assert re.match(r"data_seed = (0 and 30|30 and 0) ", str(refused.value))


def test_every_place_of_a_window_may_be_asked_for_and_no_other():
    assert Experiment(data_seed=WINDOWS - 1).data_seed == WINDOWS - 1
    with pytest.raises(ConfigError, match=f"data_seed = {WINDOWS} is not possible"):
        Experiment.from_mapping({"data_seed": WINDOWS})
