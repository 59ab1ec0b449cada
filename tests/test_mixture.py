"""A model and an n-gram in equal shares, or with a cache: the mean of their probabilities, token by token."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlm.analysis import mixture, recipe
from ctxlm.analysis.runs import check_runs
from ctxlm.analysis.scaling import read_grid
from ctxlm.config import ConfigError
from ctxlm.corpus import Corpus
from tests.planted import plant

SIZES = (20_000, 40_000)


@pytest.fixture
def planted(outputs):
    """A grid of A, one of two n-grams, and what each gave to every validation token."""
    plant(outputs, {"A": (-0.3, 800)}, SIZES)
    shapes = {"KN-3": (1, 1), "KN-4": (1, 1)}
    ngrams = {"KN-3": (-0.3, 900), "KN-4": (-0.3, 850)}
    plant(outputs, ngrams, SIZES, "ngrams", shapes=shapes, model="kneser-ney", ngram_order=4, total_seconds=2.0)
    return outputs


def leave_losses(folder, seed):
    """Write val_losses.npz beside a planted run, with its lengths of samples; returns the tokens' probabilities."""
    table = pd.read_csv(folder / "val_by_sample.csv")
    sample = np.repeat(table["sample"], table["tokens"]).to_numpy(np.int32)
    p = np.random.default_rng(seed).uniform(1e-6, 1, len(sample))
    np.savez_compressed(folder / "val_losses.npz", loss=-np.log(p).astype(np.float32), sample=sample)
    return p, sample


def grids():
    return [("planted", read_grid("planted"))], ("ngrams", read_grid("ngrams", models=["kneser-ney"]))


def test_probabilities_are_averaged_token_by_token(planted):
    p, sample = leave_losses(planted / "planted" / "A_train_tokens-20000_seed-42", 1)
    q, _ = leave_losses(planted / "ngrams" / "KN-4_train_tokens-20000_seed-42", 2)
    leave_losses(planted / "ngrams" / "KN-3_train_tokens-20000_seed-42", 3)  # not asked for
    leave_losses(planted / "ngrams" / "KN-4_train_tokens-40000_seed-42", 4)  # A's of that size are not kept
    runs, history, by_sample = mixture.mixtures(*grids(), ["KN-4"])
    assert runs[["experiment", "train_tokens"]].to_numpy().tolist() == [["A + KN-4", 20_000]] and history.empty
    surprise = -np.log((p + q) / 2)
    assert runs["val_ppl"].item() == pytest.approx(np.exp(surprise.mean()), rel=1e-5)
    sums = [surprise[sample == s].sum() for s in by_sample["sample"]]
    np.testing.assert_allclose(by_sample["loss_sum"], sums, rtol=1e-5)
    assert by_sample["tokens"].sum() == len(p) and runs[list(mixture.UNKNOWN)].isna().all(axis=None)


def test_a_mixture_is_set_against_each_of_its_parts(planted):
    leave_losses(planted / "planted" / "A_train_tokens-20000_seed-42", 1)
    leave_losses(planted / "ngrams" / "KN-4_train_tokens-20000_seed-42", 2)
    models, ngrams = grids()
    mixed = mixture.mixtures(models, ngrams, ["KN-4"])
    [row] = recipe.mixtures_table(mixed, [models[0][1], ngrams[1]]).to_dict("records")
    assert row["Mixture"] == "A + KN-4" and row["Training tokens"] == "20,000" and row["Runs"] == 1
    for part, alone in (("model", models[0][1]), ("n-gram", ngrams[1])):
        before = alone[0].set_index(["experiment", "train_tokens"])["val_ppl"]
        change = mixed[0]["val_ppl"].item() / before[("A", 20_000) if part == "model" else ("KN-4", 20_000)] - 1
        assert row[f"Against the {part} alone"].startswith(f"{100 * change:.1f} %* (".replace("-", "−"))
    assert recipe.mixtures_table(mixed, [])["Against the model alone"].tolist() == [""]
    row = recipe.beside([mixed], [models[0][1]], ["A"]).iloc[0]
    assert "Last PPL above best" not in row  # it has no epochs


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.floats(0.3, 1))
def test_a_cache_is_the_weighted_share_of_what_was_read(tokens, decay):
    found = mixture.cache_probabilities(np.array(tokens, np.int32), decay)
    for position in range(1, len(tokens)):
        weights = [decay ** (position - i) for i in range(position)]
        same = [w for w, token in zip(weights, tokens, strict=False) if token == tokens[position]]
        assert found[position - 1] == pytest.approx(sum(same) / sum(weights), abs=1e-12)


def test_a_cache_is_mixed_in_by_its_share(planted, monkeypatch):
    folder = planted / "planted" / "A_train_tokens-20000_seed-42"
    p, sample = leave_losses(folder, 1)
    tokens = np.random.default_rng(0).integers(0, 9, len(sample) + 1, dtype=np.int32)
    starts = np.flatnonzero(np.diff(sample, prepend=-1))
    starts[1:] += 1  # the stream's first token is not predicted
    corpus = Corpus(
        "chitchat", np.concatenate([np.zeros(7, np.int32), tokens]), np.r_[range(7), 7 + starts, 7 + len(tokens)]
    )
    monkeypatch.setattr(mixture, "load_corpus", lambda name: corpus)
    models = [grids()[0][0]]
    runs, history, by_sample = mixture.cached(models, decay=0.9, share=0.2)
    assert runs[["experiment", "train_tokens"]].to_numpy().tolist() == [["A + cache", 20_000]] and history.empty
    surprise = -np.log(0.8 * p + 0.2 * mixture.cache_probabilities(tokens, 0.9))
    assert runs["val_ppl"].item() == pytest.approx(np.exp(surprise.mean()), rel=1e-5)
    assert by_sample["loss_sum"].sum() == pytest.approx(surprise.sum(), rel=1e-5)
    cached = mixture.cached(models)
    table = recipe.counterparts_table(recipe.counterparts([models[0][1], cached], mixture.CACHED))
    assert table[["Model", "Counterpart"]].to_numpy().tolist() == [["A + cache", "A"]]
    assert "Last PPL above best" not in table
    monkeypatch.setattr(mixture, "load_corpus", lambda name: Corpus(name, corpus.tokens[:-1], corpus.starts))
    assert mixture.cached(models)[0].empty  # other text than the run was judged on


def test_nothing_is_mixed_without_both_or_on_other_tokens(planted):
    assert all(table.empty for table in mixture.mixtures(*grids(), ["KN-4"]))
    assert recipe.mixtures_table(mixture.mixtures(*grids(), ["KN-4"]), []).empty
    leave_losses(planted / "planted" / "A_train_tokens-20000_seed-42", 1)
    folder = planted / "ngrams" / "KN-4_train_tokens-20000_seed-42"
    _, sample = leave_losses(folder, 2)
    np.savez_compressed(folder / "val_losses.npz", loss=np.ones(len(sample)), sample=sample[::-1])
    assert mixture.mixtures(*grids(), ["KN-4"])[0].empty


def flipped(content):
    """One bit in the middle of an array, whose length and names stay as they are."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"no zip", flipped]
)
def test_a_damaged_file_is_named(planted, damage):
    leave_losses(planted / "planted" / "A_train_tokens-20000_seed-42", 1)
    path = planted / "ngrams" / "KN-4_train_tokens-20000_seed-42" / "val_losses.npz"
    leave_losses(path.parent, 2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ConfigError, match=r"KN-4_train_tokens-20000_seed-42/val_losses.npz of grid ngrams is damaged .*: delete it,"
    ):
        mixture.mixtures(*grids(), ["KN-4"])
    with pytest.raises(ConfigError, match=r"val_losses.npz of grid ngrams is damaged"):  # before new runs are paid for
        check_runs("ngrams")
