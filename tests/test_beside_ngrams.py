"""Words that hang on the one before them need no higher order, words that hang on the one before that do."""

import numpy as np

from ctxlm.analysis.beside_ngrams import order_gain

SIZES = {"train_tokens": 4000, "val_samples": 10, "development_samples": 10, "test_samples": 10}
WORDS = [" red", " blue", " green", " black"]


def gain(path, lag):
    """Of a text in which three words in four repeat the one `lag` words before."""
    draw, paragraphs = np.random.default_rng(0), []
    for _ in range(400):
        words = [*draw.integers(0, 4, 2)]
        while len(words) < 40:
            words.append(words[-lag] if draw.random() < 0.75 else draw.integers(0, 4))
        paragraphs.append("".join(WORDS[k] for k in words).strip())
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return order_gain(str(path), **SIZES)


def test_a_text_that_must_be_read_further_back_gains_by_order(tmp_path):
    near, far = (gain(tmp_path / f"{lag}.txt", lag) for lag in (1, 2))
    assert abs(near) < 0.05
    p = np.array([0.75 + 0.25 / 4, *[0.25 / 4] * 3])  # of the word that is repeated, and of each other one
    assert abs(far - (np.log(4) + (p * np.log(p)).sum())) < 0.1  # a bigram sees four words that are alike
