"""The numbers of 27 November 2026, before the core was rewritten: the same parameters still give the same losses.

`tests/data/losses.json` was written by the code of commit ab6700a: float32, d 64, the first 4,000 tokens of chitchat's
training capacity and 1,500 after it, and the embedding of the whole second half, not rounded, whatever the protocol
makes of them.
"""

import json

import numpy as np
import pytest
import torch

from ctxlm import embeddings, networks, ngrams
from ctxlm.config import Experiment
from ctxlm.corpus import Corpus, Split, Stream, load_corpus
from ctxlm.embeddings import load_embedding
from ctxlm.files import ROOT
from ctxlm.model import ContextLM
from ctxlm.phase1 import train_context_block
from ctxlm.phase2 import train_token_block
from ctxlm.recurrence import chunked

BEFORE = json.loads((ROOT / "tests" / "data" / "losses.json").read_text(encoding="utf-8"))


def history(e: Experiment, train: np.ndarray, val: np.ndarray) -> list[dict]:
    """Rows phase, step, metric, value of one run."""
    if e.model == "context":
        model = ContextLM(e, torch.from_numpy(load_embedding(e)))
        tokens, judged = (torch.from_numpy(part).long() for part in (train, val))
        phase1 = train_context_block(model, tokens, chunked(model, tokens).values, e)
        return phase1.history + train_token_block(model, chunked(model, tokens), chunked(model, judged), e).history
    streams = Split(*(Stream(part, np.zeros(len(part), np.int32)) for part in (train, val, val, val)))
    found = (networks if e.model != "kneser-ney" else ngrams).build(e, streams)
    counted = [{"phase": "phase2", "step": 1, "metric": "val_loss", "value": float(found.val[0].astype(float).mean())}]
    return found.history or counted


@pytest.fixture(scope="module", autouse=True)
def embedding_of_then(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Corpus, "second_half", property(lambda corpus: corpus.stream(corpus.half, corpus.num_samples)))
        patch.setattr(embeddings, "rounded", lambda exact: exact)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("label", BEFORE["losses"])
def test_losses_are_those_from_before_the_rewrite(label, one_thread):
    common = {"embed_dim": 64, "train_tokens": 4000, "dtype": "float32", "device": "cpu"}
    e = Experiment.from_mapping(common, BEFORE["parameters"][label])
    corpus = load_corpus("chitchat")
    first = corpus.starts[1231]  # where validation began then
    rows = history(e, corpus.tokens[:4000], corpus.tokens[first : first + 1500])
    found = {f"{row['phase']} {row['step']} {row['metric']}": row["value"] for row in rows}
    assert {name: found[name] for name in BEFORE["losses"][label]} == pytest.approx(BEFORE["losses"][label], rel=1e-5)
