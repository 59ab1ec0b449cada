"""The tuned recipe: what it sets, and what of it Phase 2 does, each against plain PyTorch.

Plain are whole logits, its own loss, Adam and no shortcuts.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from ctxlm.config import Experiment, load_grid, read_yaml
from ctxlm.device import generator
from ctxlm.model import ContextLM, own_weights
from ctxlm.phase2 import train_token_block
from ctxlm.recurrence import sequential
from tests.conftest import stream

SHAPE = {"num_layers": 2, "context_dim": 12, "embed_dim": 8, "phase2_batch_size": 32}
VOCABULARY = 40
EVERYTHING = {
    "output_bias": "unigram",
    "logit_scale": 0.5,
    "phase2_shuffle": True,
    "phase2_warmup_updates": 4,
    "phase2_final_rate": 0.1,
    "phase2_weight_average": 0.9,
    "phase2_context_window": 4,
    "phase2_token_dropout": 0.3,
    "slow_decay": 0.9,
}


def changed(run, before):
    """The parameters in which two runs differ, but for their label."""
    return [name for name, value in before.model_dump(exclude={"experiment"}).items() if getattr(run, name) != value]


def test_whatever_the_search_chose_is_left_out_once():
    runs = [run for run in load_grid("searched-ablations").runs.values() if run.seed == 42]
    (whole,) = (run for run in runs if run.experiment == "whole")
    left_out = [changed(run, whole) for run in runs if run.context_ablation == "none" and run is not whole]
    alone = [names[0] for names in left_out if len(names) == 1]
    together = {"phase1_init_std", "phase2_final_rate", "phase2_epochs", "phase2_warmup_updates"}  # chosen by the line
    chosen = {*read_yaml("params/searched/context.yaml")} - together
    assert sorted(alone) == sorted({*chosen, "phase2_shuffle"})
    assert [names for names in left_out if len(names) > 1] == [["phase1_min_iterations", "phase1_max_iterations"]]


def prepared(**parameters):
    settings = Experiment.from_mapping(SHAPE, {"phase2_epochs": 3, "phase2_patience": 3}, parameters)
    embedding = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(3))
    model = ContextLM(settings, embedding)
    train, val = (sequential(model, stream(length, VOCABULARY, seed)) for length, seed in ((200, 0), (80, 1)))
    return settings, model, train, val


def by_hand(settings, model, train, val):
    """Validation losses after every epoch, [epochs], from a plain loop."""
    e, tokens, targets = settings, train.tokens, len(train.tokens) - 1
    model.eval()  # nothing is blanked but here
    weights = [p for p in model.token_block.parameters()]
    head = model.embedding if model.head is None else model.head.weight
    bias = torch.zeros(VOCABULARY)
    if e.output_bias == "unigram":
        counts = torch.tensor([1.0 + (tokens == v).sum() for v in range(VOCABULARY)])
        bias = torch.log(counts / counts.sum())
    if e.phase2_context_window:
        weights += model.context_block.parameters()
    if e.slow_decay:
        weights.append(model.slow.gain)
    learns = e.output_bias == "unigram" or model.head is not None
    if learns:
        bias.requires_grad_(True)
        weights.append(bias)
    if model.head is not None:
        weights.append(head)
    optimiser = torch.optim.Adam(weights, lr=1.0)
    means = [w.detach().clone() for w in weights]
    updates = math.ceil(targets / e.phase2_batch_size)
    losses, update = [], 0

    if e.slow_decay:
        share = torch.tensor([1.0 + (tokens == v).sum() for v in range(VOCABULARY)])
        share /= share.sum()
        heavy = (1e-3 / (1e-3 + share))[:, None] * F.layer_norm(model.embedding, (8,))

    def slow(of):
        """The slow context after every token, one by one."""
        rows, s = [], torch.zeros(8)
        for token in of.tokens:
            s = e.slow_decay * s + heavy[token]
            rows.append(s)
        return torch.stack(rows)

    def logits(of, positions, layers=None, blank=lambda u: u):
        u = blank(model.inputs(of.tokens, positions))
        if layers is None:
            layers = of.layers(model.context_block, positions)
        h = model.token_block(u, layers)
        if e.slow_decay:
            h = h + model.slow.gain * F.layer_norm(slow(of)[positions], (8,))
        return e.logit_scale * h @ head.T + bias

    def through(at, held, window):
        """Every layer's contexts at `at`, token by token from the one held before each window; then held anew."""
        rows = []
        for t in at.tolist():
            if t % window == 0:
                c = held[t - 1 : t].clone() if t else torch.zeros(1, held.shape[1])
            inputs = model.context_inputs(tokens, torch.tensor([t]))
            rows.append(model.context_block(c, model.context_block.shares(inputs)))
            c = rows[-1][-1]
        layers = [torch.cat(layer) for layer in zip(*rows, strict=True)]
        held[at] = layers[-1].detach()
        return layers

    for epoch in range(1, e.phase2_epochs + 1):
        window = e.phase2_context_window or 1
        order = torch.arange(math.ceil(targets / window))  # of windows
        if e.phase2_shuffle:  # but for the last window where it is short
            whole = targets // window
            order[:whole] = torch.randperm(whole, generator=generator(e.seed, "phase2_order", epoch))
        held = sequential(model, tokens).values
        blanks = generator(e.seed, "phase2_token_dropout", epoch)

        def blank(u, draws=blanks):
            if not e.phase2_token_dropout:
                return u
            kept = torch.empty(len(u) * e.num_input_tokens).bernoulli_(1 - e.phase2_token_dropout, generator=draws)
            return u * kept.view(len(u), -1).repeat_interleave(8, dim=1)

        for windows in order.split(e.phase2_batch_size // window):
            at = torch.cat([torch.arange(w * window, min((w + 1) * window, targets)) for w in windows.tolist()])
            rise, total = e.phase2_warmup_updates, updates * e.phase2_epochs
            rate = e.phase2_learning_rate * min(1, (update + 1) / (rise + 1))
            cosine = (1 + math.cos(math.pi * max(update - rise, 0) / (total - rise))) / 2
            rate *= e.phase2_final_rate + (1 - e.phase2_final_rate) * cosine
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad()
            layers = through(at, held, window) if e.phase2_context_window else None
            F.cross_entropy(logits(train, at, layers, blank), tokens[at + 1]).backward()
            torch.nn.utils.clip_grad_norm_(weights, e.phase2_gradient_clip)
            optimiser.step()
            update += 1
            decay = min(e.phase2_weight_average, (1 + update) / (10 + update))
            means = [decay * mean + (1 - decay) * w.detach() for mean, w in zip(means, weights, strict=True)]
        own = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, mean in zip(weights, means, strict=True):
                w.copy_(mean)
            anew = sequential(model, val.tokens) if e.phase2_context_window else val
            judged = logits(anew, torch.arange(len(val.tokens) - 1))
            losses.append(F.cross_entropy(judged, val.tokens[1:]).item())
            for w, kept in zip(weights, own, strict=True):
                w.copy_(kept)
    return losses


@pytest.mark.parametrize(
    "own",
    [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING, EVERYTHING | {"use_weight_tying": False}],
    ids=lambda own: "+".join(own) if len(own) < 2 else f"{len(own)} together",
)
def test_phase2_is_the_plain_loops(own):
    parameters = {"phase2_learning_rate": 0.01} | own
    found = train_token_block(*(lambda s, m, t, v: (m, t, v, s))(*prepared(**parameters)))
    losses = [row["value"] for row in found.history if (row["phase"], row["metric"]) == ("phase2", "val_loss")]
    assert losses == pytest.approx(by_hand(*prepared(**parameters)), rel=2e-4)


def test_the_outputs_bias_is_trained_and_written():
    settings, model, train, val = prepared(output_bias="unigram")
    train_token_block(model, train, val, settings)
    assert "output_bias" in own_weights(model) and own_weights(model)["output_bias"].std() > 0
    assert "output_bias" not in own_weights(prepared()[1])


def test_blanks_and_order_come_from_the_seed_alone():
    def losses(torchs_own, seed=42):
        settings, model, train, val = prepared(phase2_token_dropout=0.5, phase2_shuffle=True)
        torch.manual_seed(torchs_own)
        return train_token_block(model, train, val, settings.model_copy(update={"seed": seed})).val_losses

    assert torch.equal(losses(1), losses(2)) and not torch.equal(losses(1), losses(1, seed=43))
