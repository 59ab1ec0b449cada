"""The algorithm once more, slow and literal, one token at a time: an oracle that shares no code with `ctxlm`.

Written from the algorithm's description alone. `settings` is a mapping of parameters under the study's names
(`Experiment.model_dump()` will do). L layers, context width C, embedding width d, n input tokens, V tokens in all.
A Linear reads the context first, then the tokens, oldest first.
"""

import math

import torch
import torch.nn.functional as F


class Weights:
    """Copies of every weight.

    A layer is a dict of `weight` [out, in], `bias` [out], `norm_weight` [out] and `norm_bias` [out], and, where its
    residual has a Linear, `residual_weight` [out, in] and `residual_bias` [out]. In the `constant` design a context
    layer maps C + n·d to C, the first token layer C + n·d to d and the others C + d to d; in the `arithmetic` design
    the first context layer alone reads the tokens. `embedding` is [V, d], and the head too.
    """

    def __init__(self, context_layers, token_layers, embedding):
        self.context_layers, self.token_layers = context_layers, token_layers
        self.embedding = embedding.detach().clone()


def copied(model):
    """Copies of a `ContextLM`'s weights."""

    def layers(block):
        copies = []
        for index, (left, residual, norm) in enumerate(
            zip(block.from_context, block.residuals, block.norms, strict=True)
        ):
            right = block.from_other[index] if index < len(block.from_other) else None
            weight = left.weight if right is None else torch.cat([left.weight, right.weight], dim=1)
            layer = {"weight": weight, "bias": (left if right is None else right).bias}
            layer |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
            if hasattr(residual, "weight"):
                layer |= {"residual_weight": residual.weight, "residual_bias": residual.bias}
            copies.append({name: tensor.detach().clone() for name, tensor in layer.items()})
        return copies

    return Weights(layers(model.context_block), layers(model.token_block), model.embedding)


def token_input(embedding, tokens, t, n):
    """u_t = (x_{t-n+1}, …, x_t), [n·d]: normalised embeddings, zeros before the stream."""
    d = embedding.shape[1]
    parts = []
    for position in range(t - n + 1, t + 1):
        if position < 0:
            parts.append(embedding.new_zeros(d))
            continue
        parts.append(F.layer_norm(embedding[tokens[position]], (d,), eps=1e-5))
    return torch.cat(parts)


def _layer(layer, residual, read):
    """LayerNorm(residual + ReLU(Linear(read))); the residual keeps its last entries, or goes through its Linear."""
    if "residual_weight" in layer:
        residual = layer["residual_weight"] @ residual + layer["residual_bias"]
    else:
        residual = residual[-len(layer["bias"]) :]
    out = residual + torch.relu(layer["weight"] @ read + layer["bias"])
    return F.layer_norm(out, out.shape, layer["norm_weight"], layer["norm_bias"], eps=1e-5)


def context_step(weights, c, u):
    """ContextBlock on one token: c [C], u [n·d] → every layer's output, L times [C]; the last is the new context."""
    outputs = []
    for layer in weights.context_layers:
        reads_tokens = layer["weight"].shape[1] == len(c) + len(u)
        c = _layer(layer, c, torch.cat([c, u]) if reads_tokens else c)
        outputs.append(c)
    return outputs


def token_step(weights, contexts, u):
    """TokenBlock on one token: layer l reads `contexts[l]` [C]; u [n·d] gives h [d]."""
    h = u
    for layer, c in zip(weights.token_layers, contexts, strict=True):
        h = _layer(layer, h, torch.cat([c, h]))
    return h


def zero_context(weights):
    """The context before the stream, [C]."""
    return torch.zeros_like(weights.context_layers[-1]["bias"])


@torch.no_grad()
def run_contexts(weights, tokens, n, embedding=None):
    """c_t = ContextBlock(c_{t-1}, u_t) along the stream: every layer's output at every token, T lists of L."""
    embedding = weights.embedding if embedding is None else embedding
    c = zero_context(weights)
    contexts = []
    for t in range(len(tokens)):
        outputs = context_step(weights, c, token_input(embedding, tokens, t, n))
        contexts.append(outputs)
        c = outputs[-1]
    return contexts


def phase1(weights, tokens, n, settings, noise):
    """Train the ContextBlock in place: contexts that stay where they are (fixed point) and differ (diversity).

    `noise(iteration, block, (rows, C))` gives standard normal draws; iterations count from 1, blocks from 0.
    Returns the records of the iterations after the first, which is the recurrence, and the last one's (noisy) contexts
    [T, C].
    """
    w = settings["dist_reg_weight"]
    rows = settings["phase1_batch_size"]
    parameters = [tensor for layer in weights.context_layers for tensor in layer.values()]
    for tensor in parameters:
        tensor.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=settings["phase1_learning_rate"])
    starts = range(0, len(tokens), rows)

    previous = torch.stack([outputs[-1] for outputs in run_contexts(weights, tokens, n)])
    records = []
    for iteration in range(2, settings["phase1_max_iterations"] + 1):
        contexts, fixed_point_sum, diversity_sum, converged = [], 0.0, 0.0, 0
        optimiser.zero_grad()
        for block, start in enumerate(starts):
            positions = range(start, min(start + rows, len(tokens)))
            draws = noise(iteration, block, (len(positions), previous.shape[1]))
            outputs = []
            for row, t in enumerate(positions):
                read = previous[t - 1] + settings["phase1_context_noise"] * draws[row]  # t = 0 reads the last context
                outputs.append(context_step(weights, read, token_input(weights.embedding, tokens, t, n))[-1])
            out = torch.stack(outputs)
            squared = (out - previous[start : positions[-1] + 1]) ** 2
            fixed_point = squared.mean()
            diversity = -((out - out.mean(dim=0)) ** 2).sum().sqrt() / len(positions)
            loss = (1 - w) * fixed_point + w * diversity
            (loss / len(starts)).backward()
            fixed_point_sum += fixed_point.item()
            diversity_sum += diversity.item()
            converged += int((squared.mean(dim=1) < settings["phase1_convergence_threshold"]).sum())
            contexts.append(out.detach())
        torch.nn.utils.clip_grad_norm_(parameters, settings["phase1_gradient_clip"])
        optimiser.step()
        previous = torch.cat(contexts)  # as they were before the step
        ratio = converged / len(tokens)
        record = {"iteration": iteration, "converged_tokens": converged, "converged_ratio": ratio}
        record["fixed_point_loss"] = fixed_point_sum / len(starts)
        record["diversity_loss"] = diversity_sum / len(starts)
        records.append(record)
        if iteration >= settings["phase1_min_iterations"] and ratio >= settings["phase1_min_converged_ratio"]:
            break
    for tensor in parameters:
        tensor.requires_grad_(False)
    return records, previous


def phase2(weights, train_tokens, val_tokens, n, settings, order=None):
    """Train the TokenBlock in place to predict the next token from frozen contexts; the best epoch's weights are kept.

    Returns a dict: `epochs` (a record each), `steps` (every update's training loss), `best_epoch` (from 1) and
    `val_losses` (the best epoch's, one for each validation target, [N - 1]).
    With `phase2_context_window` the ContextBlock is trained too, through so many tokens at a time from the context held
    before them; an epoch begins with contexts folded anew, and what is validated has contexts of its own weights.
    With `output_bias` unigram a bias of the logits is trained, which starts at the log frequencies. With
    `phase2_shuffle` an epoch reads its positions in the order that `order(epoch)` gives.
    """
    snapshot = weights.embedding.detach().clone()  # contexts keep Phase 1's embedding
    parameters = [tensor for layer in weights.token_layers for tensor in layer.values()]
    window = settings["phase2_context_window"]
    if window:
        parameters += [tensor for layer in weights.context_layers for tensor in layer.values()]
    if not settings["phase2_freeze_embedding"]:
        parameters.append(weights.embedding)
    bias = torch.zeros(len(snapshot))
    if settings["output_bias"] == "unigram":
        counts = torch.ones(len(snapshot))
        for token in train_tokens:
            counts[token] += 1
        bias = (counts / counts.sum()).log()
        parameters.append(bias)
    for tensor in parameters:
        tensor.requires_grad_(True)
    groups = [
        {"params": [x for x in parameters if x.ndim == 2], "weight_decay": settings["weight_decay"]},
        {"params": [x for x in parameters if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings["phase2_learning_rate"])

    def predict(tokens, t, contexts):
        h = token_step(weights, contexts, token_input(weights.embedding, tokens, t, n))
        return settings["logit_scale"] * (weights.embedding @ h) + bias

    train_contexts = run_contexts(weights, train_tokens, n, snapshot)
    val_contexts = run_contexts(weights, val_tokens, n, snapshot)
    targets = len(train_tokens) - 1
    epochs, steps, best, best_tensors = [], [], None, None
    for epoch in range(1, settings["phase2_epochs"] + 1):
        loss_sum, hits, c = 0.0, 0, zero_context(weights)
        if window:
            held = [outputs[-1] for outputs in run_contexts(weights, train_tokens, n, snapshot)]
        for start in range(0, targets, settings["phase2_batch_size"]):
            positions = range(start, min(start + settings["phase2_batch_size"], targets))
            if settings["phase2_shuffle"]:
                positions = [order(epoch)[place] for place in positions]
            rows, anew = [], {}
            for t in positions:
                contexts = train_contexts[t]
                if window:
                    if t % window == 0:
                        c = held[t - 1] if t else zero_context(weights).detach()
                    contexts = context_step(weights, c, token_input(snapshot, train_tokens, t, n))
                    c = contexts[-1]
                    anew[t] = c.detach()
                rows.append(predict(train_tokens, t, contexts))
            logits = torch.stack(rows)
            following = torch.as_tensor([int(train_tokens[t + 1]) for t in positions])
            loss = F.cross_entropy(logits, following)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings["phase2_gradient_clip"])
            optimiser.step()
            for t, context in anew.items():
                held[t] = context
            steps.append(loss.item())
            loss_sum += loss.item() * len(positions)
            hits += int((logits.argmax(dim=1) == following).sum())
        if window:
            val_contexts = run_contexts(weights, val_tokens, n, snapshot)
        with torch.no_grad():
            judged = range(len(val_tokens) - 1)
            logits = torch.stack([predict(val_tokens, t, val_contexts[t]) for t in judged])
            following = torch.as_tensor([int(token) for token in val_tokens[1:]])
            val_losses = F.cross_entropy(logits, following, reduction="none")
        record = {"train_loss": loss_sum / targets, "train_accuracy": hits / targets}
        record["val_loss"] = val_losses.mean().item()
        record["val_accuracy"] = (logits.argmax(dim=1) == following).double().mean().item()
        epochs.append(record)
        if best is None or record["val_loss"] < best["val_loss"]:
            best = {"best_epoch": epoch, "val_loss": record["val_loss"], "val_losses": val_losses}
            best_tensors = [tensor.detach().clone() for tensor in parameters]
        elif epoch - best["best_epoch"] >= settings["phase2_patience"]:
            break
    for tensor, kept in zip(parameters, best_tensors, strict=True):
        tensor.requires_grad_(False)
        tensor.copy_(kept)
    return {"epochs": epochs, "steps": steps, "best_epoch": best["best_epoch"], "val_losses": best["val_losses"]}


def effective_rank(matrix):
    """exp(H(p)), p the singular values over their sum, the matrix not centred (Roy & Vetterli, 2007)."""
    values = torch.linalg.svdvals(matrix)
    p = values / values.sum()
    return math.exp(-sum(float(share) * math.log(float(share)) for share in p if share > 0))
