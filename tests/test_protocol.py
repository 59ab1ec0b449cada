"""Protocol 3: what is trained on and what is judged never meet, in any run of any grid and on any corpus."""

from functools import cache
from itertools import chain, groupby, pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlm import corpus as corpus_module
from ctxlm.config import DATA_PARAMETERS, ConfigError, Experiment, load_grid
from ctxlm.corpus import PROTOCOL, WINDOWS, Corpus, check_data, load_corpus, split
from ctxlm.files import ROOT
from tests.conftest import refusal

GRIDS = sorted(path.stem for path in (ROOT / "params" / "grids").glob("*.yaml"))
PARTS = ("val", "development", "test")
READ = DATA_PARAMETERS | {"train_tokens", "data_seed", "held_out_tokens"}
"""Parameters by which text is read."""


@pytest.fixture(scope="module")
def runs():
    """The runs of all grids, by grid and name."""
    return {(grid, name): run for grid in GRIDS for name, run in load_grid(grid).runs.items()}


def counting(lengths, name="counting.txt", first=0):
    """A corpus of samples of these lengths whose tokens count up, so that a token tells where it lies."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(name, np.arange(first, first + starts[-1], dtype=np.int32), starts)


def of_samples(**parameters):
    """An experiment that fits a small corpus."""
    judged = {f"{part}_samples": 1 for part in PARTS}
    return Experiment.from_mapping(judged, {"max_sample_tokens": None}, parameters)


def given_as(*corpora):
    """Has `load_corpus` give these, by their names."""
    by_name = {corpus.name: corpus for corpus in corpora}
    by_name.setdefault("chitchat", corpora[0])
    return mock.patch.object(corpus_module, "load_corpus", lambda name, shuffled=False: by_name[name])


# All grids


def test_no_grid_has_a_run_twice(runs):
    unnamed = {(grid, run.model_copy(update={"experiment": "any"})) for (grid, _), run in runs.items()}
    assert len(unnamed) == len(runs)


NOT_TOGETHER = {"chance", "depth-members", "signs"}
"""Grids that cross seeds, texts and signs, or turn signs that are given: what they ask is what each of these does."""
OF_ONE_SEED = {"depth-rates", "playground", "search-ends", "searched-three", "sizes-largest"}
"""Grids that choose, or cost too much."""


@pytest.fixture(scope="module")
def read_once():
    """Grids share corpora, which take seconds to read."""
    with mock.patch.object(corpus_module, "load_corpus", cache(load_corpus)):
        yield


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid not in NOT_TOGETHER])
def test_replicates_are_drawn_together_and_from_texts_apart(grid, runs, read_once):
    of_grid = [run for (of, _), run in runs.items() if of == grid]
    drawn = {(run.seed, run.data_seed, run.embedding_seed) for run in of_grid}
    seeds, windows, signs = map(set, zip(*drawn, strict=True))
    assert len({(seed, sign) for seed, _, sign in drawn}) == len(seeds) == len(signs)
    assert len({(seed, window) for seed, window, _ in drawn}) == len(windows)  # no two seeds share one
    if len(seeds) > 1:
        assert all(signs)  # each has signs that are drawn
    else:
        assert grid in OF_ONE_SEED
    for corpus in {run.corpus for run in of_grid}:  # in another the same seed may have another window
        of_corpus = [run for run in of_grid if run.corpus == corpus]
        triples = {(run.seed, run.data_seed, run.embedding_seed) for run in of_corpus}
        assert [len(set(column)) for column in zip(*triples, strict=True)] == [len(triples)] * 3
        for label in {run.experiment for run in of_corpus}:  # every model has all of them
            assert {(r.seed, r.data_seed, r.embedding_seed) for r in of_corpus if r.experiment == label} == triples
    corpora = {run.corpus for run in of_grid}
    if corpora == {"ultrachat"}:  # which the hub has
        with given_as(Corpus("ultrachat", np.zeros(3_480_000, np.int32), np.arange(20_001) * 174)):
            check_data(of_grid)
    else:
        check_data({tuple(run.model_dump(include=READ).values()): run for run in of_grid}.values())


def test_models_that_are_asked_together_are_of_one_replicate_and_unlike_in_seed_alone(runs):
    replicates = {
        (run.seed, run.data_seed, run.embedding_seed) for (grid, _), run in runs.items() if grid == "depth-best"
    }
    of_grid = [run for (grid, _), run in runs.items() if grid == "depth-members"]
    for label in {run.experiment for run in of_grid}:
        drawn = {(run.seed, run.data_seed, run.embedding_seed) for run in of_grid if run.experiment == label}
        assert drawn == {(seed + more, *rest) for seed, *rest in replicates for more in (0, 100, 200)}
        assert len({seed for seed, _, _ in drawn}) == 3 * len(replicates)
        alike = [run.model_copy(update={"seed": 0}) for run in of_grid if run.experiment == label]
        assert len(set(alike)) == len(replicates)


# Chitchat


def test_chitchats_parts_have_the_known_sizes():
    chitchat = load_corpus("chitchat")
    assert PROTOCOL == 3
    assert (chitchat.half, chitchat.region, chitchat.capacity) == (1754, 200, 1354)
    assert chitchat.starts[1354] == 1_133_776
    streams = split(Experiment(), chitchat)
    assert [len(stream) for stream in vars(streams).values()] == [86_925, 45_354, 44_023, 42_008]
    ends = [(stream.samples[0], stream.samples[-1]) for stream in (streams.val, streams.development, streams.test)]
    assert streams.train.samples[0] == 0 and ends == [(1354, 1553), (1554, 1753), (1754, 1953)]
    assert len(chitchat.second_half) == len(chitchat.tokens) - chitchat.starts[1954] == 1_386_029
    streams = split(Experiment(val_samples=100, development_samples=200, max_sample_tokens=128), chitchat)
    assert [len(stream) for stream in (streams.val, streams.development)] == [12_171, 24_445]


# Any corpus


OF_NO_DATA = [{}, {"seed": 7, "embedding": "random", "embedding_seed": 9}, {"model": "kneser-ney", "dtype": "float32"}]
"""What no stream depends on."""


@st.composite
def cases(draw, least=1):
    """A corpus, the one that is judged, and an experiment that fits, unless a part is left a single token (`least` 1).

    Of six samples or more (fewer have no room for three parts), some much longer than others.
    """
    lengths = st.integers(least, 9) | st.integers(10, 300)
    several = st.lists(lengths, min_size=6, max_size=60)
    corpus = counting(draw(several))
    judged = counting(draw(several), "judged.txt", first=10**6) if draw(st.booleans()) else None
    longest = draw(st.none() | st.integers(least, 12) | st.integers(13, 320))
    parameters = {f"{part}_samples": draw(st.integers(1, (judged or corpus).region)) for part in PARTS}
    parameters |= draw(st.sampled_from(OF_NO_DATA)) | {
        "judged_corpus": judged and judged.name,
        "max_sample_tokens": draw(st.none() | st.integers(least, 12) | st.integers(13, 320)),
        "train_sample_tokens": longest,
        "data_seed": draw(st.integers(0, WINDOWS - 1)),
    }
    parameters["train_tokens"] = draw(st.integers(least, sum(map(len, capacity(corpus, longest)))))
    return corpus, judged or corpus, Experiment(**parameters)


def cut(corpus, first, count, longest):
    """The first tokens of so many samples, [[token, …], …]."""
    return [sample[:longest].tolist() for sample in corpus.samples()[first : first + count]]


def capacity(corpus, longest):
    return cut(corpus, 0, corpus.capacity, longest)


def read(case, **changed):
    """The streams of a case."""
    corpus, judged, e = case
    with given_as(corpus, judged):
        return split(Experiment.from_mapping(e.model_dump(), changed), corpus)


@settings(max_examples=150)
@given(cases())
def test_a_split_is_exact_and_overlaps_nowhere(case):
    corpus, judged, e = case
    samples = capacity(corpus, e.train_sample_tokens)
    stream, starts = [*chain(*samples)], np.cumsum([0, *map(len, samples)])
    # The window begins at the sample nearest to its share of the capacity, is exact, and goes on at the first one.
    distances = [abs(60 * int(start) - len(stream) * e.data_seed) for start in starts[:-1]]
    first = distances.index(min(distances))
    expected = [[stream[(starts[first] + i) % len(stream)] for i in range(e.train_tokens)]]
    for i, part in enumerate(PARTS):
        at = judged.capacity + i * judged.region, getattr(e, f"{part}_samples")
        expected.append([*chain(*cut(judged, *at, e.max_sample_tokens))])
    if min(map(len, expected)) < 2:
        with pytest.raises(ConfigError, match="single token"):
            read(case)
        return
    streams = read(case)
    for i, (part, tokens) in enumerate(zip(vars(streams).values(), expected, strict=True)):
        assert part.tokens.dtype == part.samples.dtype == np.int32
        assert part.tokens.tolist() == tokens and len(part.samples) == len(part) == len(tokens)
        of = judged if i else corpus
        assert np.array_equal(np.searchsorted(of.starts, part.tokens - of.tokens[0], side="right") - 1, part.samples)
    assert len(set(expected[0])) == e.train_tokens and max(streams.train.samples) < corpus.capacity
    for before, after in pairwise([streams.val, streams.development, streams.test, judged.second_half]):
        assert max(before.samples) < min(after.samples)
    assert judged.capacity <= min(streams.val.samples)
    assert max(streams.development.samples) < judged.half <= min(streams.test.samples)


@settings(max_examples=100)
@given(cases(least=2), st.data())
def test_held_out_tokens_are_the_windows_last_and_replace_validation(case, data):
    whole = read(case)
    held_out = data.draw(st.integers(1, len(whole.train)))
    if not 2 <= held_out <= len(whole.train) - 2:
        with pytest.raises(ConfigError, match=f"held_out_tokens = {held_out} "):
            read(case, held_out_tokens=held_out)
        return
    held = read(case, held_out_tokens=held_out)
    for name in ("tokens", "samples"):
        joined = np.concatenate([getattr(held.train, name), getattr(held.val, name)])
        assert np.array_equal(joined, getattr(whole.train, name))
        for part in ("development", "test"):
            assert np.array_equal(getattr(getattr(held, part), name), getattr(getattr(whole, part), name))
    assert len(held.val) == held_out


@given(cases(least=2), st.integers(1, 40))
def test_pieces_are_the_same_training_text_in_another_order(case, longest):
    corpus = case[0]
    whole, read_in_pieces = read(case), read(case, train_piece_tokens=longest)

    def pieces(stream):
        """(sample, number) and tokens of every piece; tokens count up, so that they tell their place in the sample."""
        numbers = (stream.tokens - corpus.starts[stream.samples]) // longest
        runs = groupby(zip(stream.samples, numbers, stream.tokens, strict=True), key=lambda token: token[:2])
        return [(piece, [token for *_, token in run]) for piece, run in runs]

    assert sorted(pieces(read_in_pieces.train)) == sorted(pieces(whole.train))  # every piece once, and whole
    assert len(pieces(whole.train)) < 8 or read_in_pieces.train.tokens.tolist() != whole.train.tokens.tolist()
    assert all(np.array_equal(getattr(whole, part).tokens, getattr(read_in_pieces, part).tokens) for part in PARTS)


# What is refused


@pytest.mark.parametrize(
    "parameters",
    [
        {"train_tokens": 161},
        {"train_tokens": 1},
        {"val_samples": 1, "max_sample_tokens": 1},
        {"val_samples": 9, "development_samples": 9, "test_samples": 9, "train_tokens": 161},  # all are named at once
    ],
    ids=str,
)
def test_a_split_that_does_not_fit_is_refused_in_one_sentence(parameters):
    corpus, e = counting([10] * 40), of_samples(**{"train_tokens": 5} | parameters)
    message = refusal(split, e, corpus)
    names = [name for name in parameters if name != "max_sample_tokens"]
    for name, why in zip(names, message.split("; ")[: len(names)], strict=True):
        assert why.startswith((f"{name} = {getattr(e, name)} ", f"{name} = {getattr(e, name)}: "))
    with given_as(corpus):
        assert refusal(check_data, [e]) == message  # and before a grid's first run


@settings(max_examples=100)
@given(cases(least=2), st.integers(0, WINDOWS - 1), st.integers(0, WINDOWS - 1))
def test_windows_that_share_a_token_are_refused(case, one, other):
    corpus, judged, e = case
    e = e.model_copy(update={"corpus": corpus.name})
    pair = [e.model_copy(update={"data_seed": seed}) for seed in (one, other)]
    shared = set.intersection(*(set(read(case, data_seed=seed).train.tokens.tolist()) for seed in (one, other)))
    with given_as(corpus, judged):
        if one == other or not shared:
            return check_data(pair)
        with pytest.raises(ConfigError, match=f"data_seed = {one} and {other} "):
            check_data(pair)


def test_the_longest_window_of_a_seed_counts():
    seeds = [of_samples(train_tokens=40, data_seed=seed) for seed in (0, 15, 31)]
    longer = seeds[1].model_copy(update={"train_tokens": 50})
    with given_as(counting([10] * 40)):  # a capacity of 160 tokens
        check_data(seeds)
        assert "data_seed = 15 and 31 " in refusal(check_data, [*seeds[:2], longer, seeds[2]])
        apart = {"train_sample_tokens": 5}  # are windows of another text
        check_data([*seeds[:2], longer, seeds[2].model_copy(update=apart)])
