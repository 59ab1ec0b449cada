"""Text like the training text has no mismatch, other text has one."""

from ctxlm.analysis.mismatch import mismatch
from ctxlm.config import Experiment
from tests.conftest import short_paragraphs

SIZES = {"train_tokens": 2000, "val_samples": 10, "development_samples": 10, "test_samples": 10}


def asked(text, **parameters):
    return Experiment.from_mapping(SIZES, {"corpus": str(text)}, parameters)


def test_text_of_one_kind_is_alike_and_other_text_is_not(tmp_path):
    text = short_paragraphs(tmp_path / "text.txt", count=400)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"{k} monkeys climb {k} palms" for k in range(400)), encoding="utf-8")
    alike, apart = mismatch(asked(text)), mismatch(asked(text, judged_corpus=str(other)))
    assert abs(alike) < 0.3 < 2 < apart
