"""PPMI against its definition, the truncated SVD against the full one, planted meanings, sources and their faults."""

import hashlib
import subprocess
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from ctxlm import embeddings
from ctxlm.config import Experiment
from ctxlm.corpus import VOCABULARY, Corpus, load_corpus, split, tokenizer
from ctxlm.embeddings import GPT2, GPT2_REVISION, GPT2_STD, NOISE, WINDOW, data_hash, load_embedding, ppmi_svd, signs
from ctxlm.files import digest
from tests.conftest import refusal, short_paragraphs


def corpus_of(*samples):
    """A corpus of samples given as lists of tokens."""
    starts = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])])
    return Corpus("planted.txt", np.concatenate(samples).astype(np.int32), starts.astype(np.int64))


def stream_of(*samples):
    return corpus_of(*samples).stream(0, len(samples))


def random_samples(tokens=30, samples=20, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, tokens, draw.integers(1, 30)) for _ in range(samples)]


def spread(rows):
    return np.sqrt(np.square(rows, dtype=np.float64).mean(axis=-1))


# PPMI and its SVD


def literal_ppmi(samples):
    """The definition, pair by pair."""
    seen = sorted({int(token) for sample in samples for token in sample})
    counts = np.zeros((len(seen), len(seen)))
    for sample in samples:
        for i, token in enumerate(sample):
            for j in range(max(0, i - WINDOW), min(len(sample), i + WINDOW + 1)):
                if i != j:
                    counts[seen.index(token), seen.index(sample[j])] += 1
    marginal = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(counts * counts.sum() / np.outer(marginal, marginal))
    return seen, np.where(counts > 0, np.maximum(pmi, 0), 0)


samples = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=6)


@given(samples)
def test_ppmi_is_its_definition_within_samples(samples):
    seen, matrix = embeddings._ppmi(stream_of(*samples))
    expected_seen, expected = literal_ppmi(samples)
    assert seen.tolist() == expected_seen
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-5, atol=1e-6)


def planted_matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    draw = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(draw.standard_normal((len(values), len(values))))
    return (vectors * values) @ vectors.T, vectors


def test_the_truncated_svd_agrees_with_the_full_one():
    planted, vectors = planted_matrix(np.append([9, -8, 7, 6, -5, 4, 3, 2], np.linspace(-0.01, 0.01, 192)))
    rows, magnitudes = embeddings._truncated_svd(scipy.sparse.csr_array(planted.astype(np.float32)), 8)
    np.testing.assert_allclose(magnitudes, [9, 8, 7, 6, 5, 4, 3, 2], rtol=1e-4)
    np.testing.assert_allclose(np.abs(vectors[:, :8].T @ rows), np.eye(8), atol=1e-3)


def test_the_truncated_svd_of_a_flat_spectrum_holds_nearly_all_that_can_be_held():
    values = np.arange(1, 1501) ** -0.25 * np.random.default_rng(1).choice([-1, 1], 1500)  # as in a PPMI matrix
    planted, _ = planted_matrix(values)
    rows, magnitudes = embeddings._truncated_svd(scipy.sparse.csr_array(planted.astype(np.float32)), 60)
    np.testing.assert_allclose(rows.T @ rows, np.eye(60), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(rows.T @ planted, axis=1), magnitudes, rtol=1e-4)  # each has its own
    best = np.sort(np.abs(values))[::-1][:60]
    # Six plain power iterations with M hold 97 % of the best approximation's energy and miss values by 25 %.
    assert np.square(rows.T @ planted).sum() > 0.99 * np.square(best).sum()
    np.testing.assert_allclose(magnitudes, best, rtol=0.03)


def test_the_embedding_does_not_depend_on_the_number_of_threads():
    stream, made = stream_of(*random_samples(tokens=3000, samples=900)), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            made.append((*embeddings._truncated_svd(embeddings._ppmi(stream)[1], 64), ppmi_svd(stream, 64)))
    assert all(np.array_equal(*pair) for pair in zip(*made, strict=True))
    # and entries are rounded to a grain that float32 holds exactly
    assert np.array_equal(made[0][2] * 2**20, np.round(made[0][2].astype(np.float64) * 2**20))


def test_tokens_in_the_same_contexts_are_neighbours():
    draw = np.random.default_rng(0)
    groups = [range(10, 15), range(20, 25), range(30, 35)]  # a group's members are interchangeable between 0, 1 and 2
    sentences = [[g, draw.choice(groups[g]), g, draw.choice(groups[g])] for g in draw.integers(0, 3, 900)]
    embedding = ppmi_svd(stream_of(*sentences), 4)
    members = embedding[[token for group in groups for token in group]]
    directions = members / np.linalg.norm(members, axis=1, keepdims=True)
    cosines = directions @ directions.T
    same = np.kron(np.eye(3), np.ones((5, 5))) == 1
    assert cosines[same].min() > cosines[~same].max() + 0.3


def test_seen_and_random_tokens_have_gpt2s_spread_and_unseen_ones_a_twentieth_of_it():
    stream = stream_of(*random_samples())
    embedding = ppmi_svd(stream, 16)
    assert embedding.shape == (VOCABULARY, 16) and embedding.dtype == np.float32
    seen = np.unique(stream.tokens)
    np.testing.assert_allclose(spread(embedding[seen]), GPT2_STD, rtol=1e-5)
    unseen = np.delete(embedding, seen, axis=0)
    assert spread(unseen.ravel()) == pytest.approx(NOISE * GPT2_STD, rel=0.01)
    assert len(np.unique(embedding, axis=0)) == VOCABULARY  # no two tokens are alike
    random = load_embedding(Experiment(embedding="random", embed_dim=32))
    assert random.shape == (VOCABULARY, 32) and random.dtype == np.float32
    assert random.std() == pytest.approx(GPT2_STD, rel=0.01) and abs(random.mean()) < 1e-3


@pytest.mark.parametrize(
    "samples",
    [[[5]], [[5], [6], [7]], [[5, 5, 5, 5]], random_samples(tokens=12)],
    ids=["one token", "no pairs", "one type", "rank below dim"],
)
def test_a_small_corpus_gives_a_usable_embedding(samples):
    embedding = ppmi_svd(stream_of(*samples), 24)
    assert embedding.shape == (VOCABULARY, 24) and np.isfinite(embedding).all()
    assert spread(embedding).min() > 0.1 * NOISE * GPT2_STD  # every row stands clear of LayerNorm's epsilon
    assert spread(embedding).max() <= GPT2_STD * 1.01
    assert len(np.unique(embedding, axis=0)) == VOCABULARY


# What is asked for


PLANTED = corpus_of(*random_samples(samples=21))


def loaded(**parameters):
    return load_embedding(Experiment.from_mapping({"embed_dim": 8}, parameters), PLANTED)


def test_ppmi_reads_the_second_half_alone_and_no_test_text_and_belongs_to_no_run(empty_cache, tmp_path):
    expected = ppmi_svd(PLANTED.stream(11, 21), 8)  # sample 10 is the test's
    assert np.array_equal(loaded(), expected)
    assert np.array_equal(loaded(seed=7, data_seed=3, train_tokens=5, num_layers=2), expected)
    assert np.array_equal(*(loaded(embedding="random", seed=seed) for seed in (1, 2)))
    path = str(short_paragraphs(tmp_path / "text.txt", count=30, length=12))
    for shuffled in (False, True):  # each has a second half of its own
        e = Experiment(embed_dim=4, corpus=path, shuffle_samples=shuffled)
        expected = ppmi_svd(load_corpus(path, shuffled=shuffled).second_half, 4)
        assert np.array_equal(load_embedding(e), expected)


def test_ppmi_train_reads_the_training_text_alone(empty_cache, tmp_path):
    path = str(short_paragraphs(tmp_path / "text.txt", count=60, length=40))
    sizes = {"corpus": path, "val_samples": 2, "development_samples": 2, "test_samples": 2, "embed_dim": 4}
    e = Experiment.from_mapping(sizes, {"embedding": "ppmi-train", "train_tokens": 200, "held_out_tokens": 50})
    text = split(e).train
    assert len(text.tokens) == 150 and np.array_equal(load_embedding(e), ppmi_svd(text, 4))
    other = load_embedding(e.model_copy(update={"data_seed": 30}))
    assert not np.array_equal(other, load_embedding(e))


def test_drawn_signs_turn_dimensions_round_and_change_nothing_else(empty_cache, tmp_path):
    fixed = loaded()
    one, same, other = (loaded(embedding_seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert one.dtype == np.float32 and np.array_equal(one, fixed * signs(8, 1)) and {*signs(8, 1)} == {-1, 1}
    assert np.array_equal(signs(8, 1, 3), signs(8, 1) * signs(8, 0, 3))
    assert np.array_equal(loaded(embedding_turned=1), fixed * np.float32([1, -1, 1, 1, 1, 1, 1, 1]))
    save_file({"wte.weight": fixed}, tmp_path / "model.safetensors")
    assert np.array_equal(loaded(embedding=str(tmp_path / "model.safetensors"), embedding_seed=1), one)
    random = (np.abs(loaded(embedding="random", embedding_seed=seed)) for seed in (0, 1))
    assert not np.array_equal(*random)


def test_rows_may_be_centred_or_of_one_length(empty_cache, tmp_path):
    name = str(tmp_path / "model.safetensors")
    rows = np.random.default_rng(0).standard_normal((VOCABULARY, 8), dtype=np.float32)
    rows = (rows + 0.5) * np.linspace(0.1, 3, VOCABULARY, dtype=np.float32)[:, None]
    save_file({"transformer.wte.weight": rows, "wpe.weight": rows[:2]}, name)
    given, centred, unit = (loaded(embedding=name, embedding_rows=kind) for kind in ("given", "centred", "unit"))
    assert np.array_equal(given, rows) and given.dtype == centred.dtype == unit.dtype == np.float32
    np.testing.assert_allclose(centred, given - given.mean(0, dtype=np.float64), atol=1e-5)
    lengths = np.linalg.norm(given.astype(np.float64), axis=1)
    np.testing.assert_allclose(unit / lengths.mean(), given / lengths[:, None], atol=1e-5)
    signed = loaded(embedding=name, embedding_rows="unit", embedding_turned=1)
    assert np.array_equal(signed, unit * signs(8, 0, 1))


def test_a_matrix_is_computed_once_for_its_text_width_and_code(empty_cache, monkeypatch):
    first = loaded()
    monkeypatch.setattr(embeddings, "ppmi_svd", lambda _, dim: np.zeros((9, dim)))
    assert np.array_equal(loaded(), first) and not loaded(embed_dim=4).any()
    assert not load_embedding(Experiment(embed_dim=8), corpus_of(*random_samples(seed=1))).any()
    monkeypatch.setattr(embeddings, "source_hash", lambda *_: "of other code")
    assert not loaded().any()


# SmolLM2


@pytest.fixture
def planted(empty_cache, monkeypatch):
    """A GGUF file of eight tokens of four dimensions: bytes, one merge, and a name that GPT-2 has, too; its rows."""
    empty_cache.mkdir()
    path, rows = empty_cache / "smollm2.gguf", np.arange(32, dtype=np.float32).reshape(8, 4) / 8
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b", "c", "Ġ", "ab", "Ġthe", "the", "<|endoftext|>"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(embeddings, "SMOLLM2_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return rows


def test_a_token_has_its_row_or_the_mean_of_its_pieces_or_of_all_in_principal_directions(planted):
    whole = loaded(embedding="smollm2", embed_dim=4)
    assert whole.shape == (VOCABULARY, 4) and whole.dtype == np.float32
    for name, pieces in (("Ġthe", [5]), ("Ġcab", [3, 2, 4]), ("Q", slice(None))):  # Ġ, c, ab
        assert np.array_equal(whole[tokenizer().token_to_id(name)], planted[pieces].mean(0))
    narrow = loaded(embedding="smollm2", embed_dim=2)
    left, values, _ = np.linalg.svd(whole.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(narrow), np.abs(left[:, :2] * values[:2]), atol=2e-6)
    signed = loaded(embedding="smollm2", embed_dim=2, embedding_seed=1)
    assert np.array_equal(signed, narrow * signs(2, 1))


@pytest.mark.slow
def test_smollm2s_embedding_is_known_and_fetched_once(monkeypatch):
    whole = load_embedding(Experiment(embedding="smollm2", embed_dim=576))
    assert digest(whole.tobytes()) == "a7d66523f13c4c72"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    narrow = load_embedding(Experiment(embedding="smollm2", embed_dim=32))
    squares = np.linalg.eigvalsh(whole.T @ whole.astype(np.float64))  # of the singular values, the least first
    assert np.square(narrow, dtype=np.float64).sum() == pytest.approx(squares[-32:].sum(), rel=1e-5)


# Files and the hub


def test_another_text_or_embedding_file_has_another_data_hash(tmp_path, empty_cache):
    text, judged, file = tmp_path / "text.txt", tmp_path / "judged.txt", tmp_path / "model.safetensors"
    hashes = set()
    for words, others, rows in (("one", "a", 0), ("two", "a", 0), ("one", "b", 0), ("one", "a", 1)):
        text.write_text(words + "\n\nand more" * 5)
        judged.write_text(others + "\n\nand more" * 5)
        save_file({"wte.weight": np.full((VOCABULARY, 2), rows, dtype=np.float32)}, file)
        hashes.add(data_hash(str(text), str(judged), str(file)))
    assert len(hashes) == 4


def test_gpt2_is_fetched_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "VOCABULARY", 10)  # the whole would be 154 MB
    path, e = str(tmp_path / "model.safetensors"), Experiment(embedding="gpt2")
    save_file({"wte.weight": np.arange(7680, dtype=np.float32).reshape(10, 768)}, path)
    fetch = Mock(side_effect=[path, ConnectionError("a long\nstory")])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert load_embedding(e).ravel().tolist() == list(range(7680))
    fetch.assert_called_with(GPT2, "model.safetensors", revision=GPT2_REVISION, repo_type="model")
    assert "embedding = 'gpt2'" in refusal(load_embedding, e)
