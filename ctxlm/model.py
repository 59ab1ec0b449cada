"""The two-phase context language model, in its designs `constant` and `arithmetic`, and with an echo state network.

Shapes: V vocabulary, d embed_dim, C context_dim, L num_layers, n num_input_tokens, B rows (any tokens, in any order),
K distinct tokens of a stream.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxlm.config import Experiment
from ctxlm.device import generator


def normalised(embedding: Tensor, tokens: Tensor) -> Tensor:
    """The embeddings [..., d] of `tokens` [...], each with mean 0 and variance 1 over its dimensions."""
    return F.layer_norm(F.embedding(tokens, embedding), embedding.shape[-1:])


def token_inputs(embedding: Tensor, tokens: Tensor, positions: Tensor, n: int) -> Tensor:
    """u_t: the normalised embeddings of the n tokens that end at each position, oldest first.

    Args:
        embedding: [V, d].
        tokens: the stream, int64 [T].
        positions: int64, any shape [...].
        n: tokens read at a time.

    Returns:
        [..., n·d]; tokens before the stream's start read as zeros.
    """
    index = positions.unsqueeze(-1) + torch.arange(1 - n, 1, device=positions.device)
    rows = normalised(embedding, tokens[index.clamp(min=0)])
    return (rows * (index >= 0).unsqueeze(-1)).flatten(-2)


class Shape(NamedTuple):
    """The widths of a layer."""

    context: int
    other: int
    """Of its other input; 0: it has none."""
    out: int
    residual: int = 0
    """Of what a Linear makes the residual from; 0: the residual is the last `out` entries, as they are."""


class _Layers(nn.Module):
    """Layers `LayerNorm(residual + ReLU(Linear(concat(context, other))))`, initialised alike.

    Where the design is `arithmetic` and the width changes, the residual goes through a Linear of its own.
    """

    def __init__(self, shapes: list[Shape], init: torch.Generator, std: float, dropout: float = 0):
        """Draw the weights.

        Args:
            shapes: of each layer.
            std: of the initial weights; of the biases a tenth of it.
            dropout: share of the new activations, ReLU(…), that training sets to zero.
        """
        super().__init__()
        # Linear(concat(context, other)) is held as two: autograd then skips the gradient of the part that needs none
        # (the tokens in Phase 1, frozen contexts in Phase 2), and the tokens' part can be had from a table.
        self.from_context = nn.ModuleList(nn.Linear(s.context, s.out, bias=not s.other) for s in shapes)
        self.from_other = nn.ModuleList(nn.Linear(s.other, s.out) for s in shapes if s.other)
        self.residuals = nn.ModuleList(nn.Linear(s.residual, s.out) if s.residual else nn.Identity() for s in shapes)
        self.norms = nn.ModuleList(nn.LayerNorm(s.out) for s in shapes)
        self.context_dim = shapes[0].context
        self.dropout = dropout
        self.widths = [s.out for s in shapes]
        for index, (context, other, out, residual) in enumerate(shapes):
            left = self.from_context[index]
            weight = torch.empty(out, context + other).normal_(std=std, generator=init)
            right = self.from_other[index] if other else left
            nn.init.normal_(right.bias, std=std / 10, generator=init)
            with torch.no_grad():
                left.weight.copy_(weight[:, :context])
                if other:
                    right.weight.copy_(weight[:, context:])
            if residual:
                nn.init.normal_(self.residuals[index].weight, std=std, generator=init)
                nn.init.normal_(self.residuals[index].bias, std=std / 10, generator=init)

    def layer(self, index: int, context: Tensor, projected: Tensor | None, before: Tensor) -> Tensor:
        """The layer's output, [B, out].

        Args:
            context: [B, the context entries that this layer reads], C but in arithmetic layers.
            projected: [B, out], its other input, by `from_other[index]`; None where it has none.
            before: [B, at least out], what the residual is taken from.
        """
        linear = self.from_context[index](context)  # with the other's, the Linear of concat(context, other)
        new = F.relu(linear if projected is None else linear + projected)
        if self.dropout:
            new = F.dropout(new, self.dropout, self.training)
        residual = self.residuals[index](before)[..., -self.widths[index] :]  # without a Linear the last entries
        # float32, though a residual's Linear gives the type of the products: only products are rounded
        return self.norms[index](residual.float() + new)


def _falling(first: int, last: int, layers: int) -> list[int]:
    """Widths that fall from `first` to `last` in an arithmetic progression, `layers` + 1 of them."""
    return [first - (first - last) * i // layers for i in range(layers + 1)]


class ContextBlock(_Layers):
    """Folds the tokens u_t into the context: c_t = ContextBlock(c_{t-1}, u_t).

    `constant`: every layer has the context's width and reads u_t. `arithmetic`: widths fall from C + n·d to C; the
    first layer alone reads u_t.
    """

    def __init__(self, e: Experiment):
        c, u = e.context_dim, e.num_input_tokens * e.embed_dim
        shapes = [Shape(c, u, c)] * e.num_layers
        if e.design == "arithmetic":
            widths = _falling(c + u, c, e.num_layers)
            shapes = [Shape(c, u, widths[1], c if widths[1] != c else 0)]
            shapes += [Shape(a, 0, b, a if a != b else 0) for a, b in itertools.pairwise(widths[1:])]
        super().__init__(shapes, generator(e.seed, "init", "context_block"), e.phase1_init_std)

    def forward(self, context: Tensor, projections: list[Tensor]) -> list[Tensor]:
        """Every layer's output, L tensors [B, width] (the last is c_t).

        Args:
            context: c_{t-1}, [B, C].
            projections: of u_t, [B, width] for every layer that reads it, from `projections` or `look_up`.
        """
        outputs = []
        for index in range(len(self.widths)):
            projected = projections[index] if index < len(projections) else None
            context = self.layer(index, context, projected, before=context)
            outputs.append(context)
        return outputs

    def projections(self, inputs: Tensor) -> list[Tensor]:
        """Of u_t, [B, n·d], by every layer that reads it, bias included: tensors [B, width]."""
        return [linear(inputs) for linear in self.from_other]


class EchoBlock(nn.Module):
    """In the ContextBlock's place an echo state network (Jaeger, 2001): a random recurrence that nothing trains.

    c_t = (1 − leak)·c_{t-1} + leak·tanh(W c_{t-1} + U u_t). W is normal, scaled to its `spectral_radius`; U is normal,
    so that U u_t has a standard deviation of `input_scale`. All layers of the TokenBlock read the same context.
    """

    def __init__(self, e: Experiment):
        super().__init__()
        c, u, draws = e.context_dim, e.num_input_tokens * e.embed_dim, generator(e.seed, "init", "context_block")
        self.from_context, self.from_other = nn.Linear(c, c, bias=False), nn.ModuleList([nn.Linear(u, c)])
        self.requires_grad_(False)
        weight = torch.empty(c, c).normal_(generator=draws)
        self.from_context.weight.copy_(weight * (e.spectral_radius / torch.linalg.eigvals(weight.double()).abs().max()))
        nn.init.normal_(self.from_other[0].weight, std=e.input_scale / u**0.5, generator=draws)
        nn.init.zeros_(self.from_other[0].bias)
        self.leak, self.context_dim, self.widths = e.leak, c, [c] * e.num_layers

    def forward(self, context: Tensor, projections: list[Tensor]) -> list[Tensor]:
        """As the ContextBlock's."""
        new = torch.tanh(self.from_context(context) + projections[0])
        return [(1 - self.leak) * context + self.leak * new] * len(self.widths)

    projections = ContextBlock.projections


class TokenBlock(_Layers):
    """Predicts from the contexts: layer l reads context layer l; h starts as the input tokens u_t.

    `constant`: h has the embedding's width from the first layer on. `arithmetic`: its width falls from n·d to d.
    """

    def __init__(self, e: Experiment, context_widths: list[int]):
        """`context_widths`: of the ContextBlock's layers."""
        widths = [e.num_input_tokens * e.embed_dim] + [e.embed_dim] * e.num_layers
        if e.design == "arithmetic":
            widths = _falling(widths[0], e.embed_dim, e.num_layers)
        shapes = [
            Shape(context, a, b, a if e.design == "arithmetic" and a != b else 0)
            for context, (a, b) in zip(context_widths, itertools.pairwise(widths), strict=True)
        ]
        super().__init__(shapes, generator(e.seed, "init", "token_block"), e.phase2_init_std, e.dropout)

    def forward(self, inputs: Tensor, contexts: list[Tensor]) -> Tensor:
        """h [B, d] from u_t [B, n·d] and every context layer, L tensors [B, width]."""
        h = inputs
        for index, context in enumerate(contexts):
            h = self.layer(index, context, self.from_other[index](h), before=h)
        return h


class DistinctTokens:
    """The distinct tokens of a stream, and where each position's u_t finds them in tables of their projections.

    A conversation repeats itself: 183,620 tokens of chitchat hold 11,067 distinct ones. Projecting those once through
    every layer and summing the n rows that a position needs replaces the ContextBlock's products with u_t, which
    are two thirds of its work in configuration A.
    """

    def __init__(self, model: "ContextLM", tokens: Tensor):
        """`tokens` are int64 [T], read as the model's ContextBlock reads them."""
        distinct, self.index = tokens.unique(return_inverse=True)
        rows = normalised(model.read_embedding, distinct)
        self.rows = torch.cat([torch.zeros_like(rows[:1]), rows])
        """[K + 1, d]: zeros, which stand before the stream, and the normalised embedding of each distinct token."""
        self.n = model.num_input_tokens

    def tables(self, block: ContextBlock) -> list[Tensor]:
        """The projection of every distinct token, at each of the n places of u_t, by every layer that reads it.

        Tensors [n·(K+1), width]. The last place, which is never before the stream, carries the bias.
        """
        tables = []
        for linear in block.from_other:
            *earlier, last = linear.weight.chunk(self.n, dim=1)
            placed = [F.linear(self.rows, weight) for weight in earlier] + [F.linear(self.rows, last, linear.bias)]
            tables.append(torch.cat(placed))
        return tables

    def table_rows(self, positions: Tensor) -> Tensor:
        """The rows of a table that sum to the projection of u_t at `positions` [B] of the stream: int64 [B, n]."""
        index = positions[:, None] + torch.arange(1 - self.n, 1, device=positions.device)
        rows = torch.where(index < 0, 0, self.index[index.clamp(min=0)] + 1)
        return rows + torch.arange(self.n, device=rows.device) * len(self.rows)


def look_up(tables: list[Tensor], rows: Tensor) -> list[Tensor]:
    """The projections of u_t, [B, width], from `DistinctTokens`' tables and their rows [B, n]."""
    return [F.embedding_bag(rows, table, mode="sum") for table in tables]


@torch.no_grad()
def set_frequencies(model: nn.Module, tokens: Tensor) -> None:
    """Start an output bias, where there is one, at the log frequencies of the training `tokens` [T].

    Every token counts once more than it occurs, so that none is impossible.
    """
    if model.output_bias is not None:
        counts = torch.bincount(tokens, minlength=len(model.embedding)) + 1.0
        model.output_bias.copy_((counts / counts.sum()).log())


class ContextLM(nn.Module):
    """ContextBlock, TokenBlock, embedding and head of one experiment."""

    def __init__(self, experiment: Experiment, embedding: Tensor):
        """`embedding` is float32 [V, d]; weights are drawn from the experiment's seed, on the CPU."""
        super().__init__()
        e = experiment
        self.num_input_tokens = e.num_input_tokens
        kept = embedding if e.phase2_freeze_embedding else embedding.clone()  # training must not change the caller's
        self.embedding = nn.Parameter(kept, requires_grad=not e.phase2_freeze_embedding)
        # What contexts are made from, also once Phase 2 has trained the embedding.
        self.register_buffer("read_embedding", embedding, persistent=False)
        self.design = e.design
        self.context_block = EchoBlock(e) if e.design == "echo" else ContextBlock(e)
        self.token_block = TokenBlock(e, self.context_block.widths)
        # Phase 2 starts it at the log frequencies of the training tokens.
        self.output_bias = nn.Parameter(torch.zeros(embedding.shape[0])) if e.output_bias == "unigram" else None
        self.logit_scale = e.logit_scale
        self.trains_contexts = bool(e.phase2_context_window)

    def inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """u_t of the TokenBlock, [..., n·d], at `positions` [...] of the stream `tokens` [T]."""
        return token_inputs(self.embedding, tokens, positions, self.num_input_tokens)

    def context_inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """u_t of the ContextBlock: as `inputs`, from the embedding as it was in Phase 1."""
        return token_inputs(self.read_embedding, tokens, positions, self.num_input_tokens)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the blocks, with the study's count of the TokenBlock beside the true one.

        In the `constant` design the study counts every TokenBlock layer as if it read all n tokens, as the first does.
        """

        def count(*parts: nn.Module) -> int:
            return sum(p.numel() for part in parts for p in part.parameters())

        block = self.token_block
        published = trained = count(block)
        if self.design == "constant":
            published = len(block.widths) * count(block.from_context[0], block.from_other[0], block.norms[0])
        return {
            "context_block_params": count(self.context_block),
            "token_block_params_published": published,
            "token_block_params_trained": trained,
        }

    def cost(self, tokens: int, iterations: int, epochs: float) -> dict[str, int]:
        """Trained parameters, and FLOPs by shape, two for each weight of a product: of one token, of all training.

        A step counts as three forward passes (gradients of inputs that need none with them), as two where weights are
        frozen. Phase 1 reads the stream once before its steps, Phase 2 once with the final ContextBlock, and before
        every epoch if it trains it. Judging, and what tables and chunks save or add, are left out.

        Args:
            tokens: of the training stream.
            iterations: of Phase 1; the first one learns nothing.
            epochs: of Phase 2.
        """
        context, head = forward_flops(self.context_block), 2 * self.embedding.numel()
        predict = forward_flops(self.token_block)
        head_step = (3 if self.embedding.requires_grad else 2) * head
        context_step = 4 * context if self.trains_contexts else 0
        training = context * (3 * iterations - 1) + epochs * (3 * predict + head_step + context_step)
        untrained = () if iterations > 1 or self.trains_contexts else ("context_block.",)
        trained = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith(untrained)]
        return {
            "trained_params": sum(p.numel() for p in trained),
            "flops_per_token": context + predict + head,
            "training_flops": round(tokens * training),
        }


def forward_flops(model: nn.Module) -> int:
    """FLOPs a token of a forward pass, by shape: two for each weight of a matrix product, the tied head's included.

    Attention's products of positions with each other, which are no weights', are left out.
    """
    added = "body.positions"  # of a Transformer
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != added)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What training made of a model: all weights and buffers but a frozen embedding, which can be loaded again."""
    kept = model.state_dict()
    if not model.embedding.requires_grad:
        del kept["embedding"]
    return kept


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a new model of the same experiment and embedding what `trained_weights` left of a trained one.

    Raises:
        RuntimeError: the weights are another model's.
    """
    model.load_state_dict({"embedding": model.embedding.detach()} | weights)
    model.eval()
