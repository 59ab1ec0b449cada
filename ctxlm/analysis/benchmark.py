"""What the stages of a run cost, against the machine's own matrix products: `notebooks/10_benchmark.ipynb` shows it.

`python -m ctxlm.analysis.benchmark '{"num_layers": 6, …}'` measures one experiment in a process of its own, so that
its peak memory is its own, and prints the result as JSON.
"""

import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import VOCABULARY, split
from ctxlm.device import resolve_device, resolve_dtype
from ctxlm.embeddings import load_embedding
from ctxlm.files import ROOT
from ctxlm.model import ContextLM, forward_flops
from ctxlm.networks import NeuralLM
from ctxlm.phase1 import train_context_block
from ctxlm.phase2 import Phase2, Predictor, evaluate
from ctxlm.recurrence import chunked
from ctxlm.trainer import Trainer

EVALUATED = 20_000
"""Tokens that the evaluation is timed on, at most."""


def flops_per_token(experiment: Experiment) -> dict[str, int]:
    """Floating-point operations a token in the matrix products of each stage, as torch counts them by shape.

    A product [a, b] · [b, c] counts 2·a·b·c. Training counts the products of the forward pass, of every trained
    weight's gradient, and of the gradients that pass from layer to layer. Of the `constant` design with a frozen
    embedding.
    """
    model = ContextLM(experiment, torch.zeros(VOCABULARY, experiment.embed_dim)).to("meta")
    context = torch.empty(1, experiment.context_dim, device="meta")
    inputs = torch.empty(1, experiment.num_input_tokens * experiment.embed_dim, device="meta")

    def contexts() -> list[torch.Tensor]:
        return model.context_block(context, model.context_block.projections(inputs))

    with torch.no_grad():
        before = contexts()  # Phase 2 trains no contexts

    def logits() -> torch.Tensor:
        return F.linear(model.token_block(inputs, before), model.embedding)

    stages = {
        "recurrence": contexts,
        "phase1_step": lambda: contexts()[-1].sum().backward(),
        "phase2_epoch": lambda: logits().sum().backward(),
        "evaluation": logits,
    }
    counts = {}
    for name, stage in stages.items():
        with FlopCounterMode(display=False) as counter:
            stage()
        counts[name] = counter.get_total_flops()
    return counts


def cost(e: Experiment) -> dict[str, int]:
    """What any of the neural models costs a reader, by shape.

    Returns:
        parameters without embedding and output bias; FLOPs of a prediction; numbers that it keeps from one token to the
        next, but for input tokens and a slow context; and its layers that must wait for the token before (0: it reads
        the tokens of a text side by side).
    """
    model = (ContextLM if e.model == "context" else NeuralLM)(e, torch.zeros(VOCABULARY, e.embed_dim))
    cells = e.num_layers * e.hidden_dim
    kept = {"context": e.context_dim, "lstm": 2 * cells, "mingru": cells, "transformer": e.window}
    waiting = {"context": 1 if e.design == "echo" else e.num_layers, "lstm": e.num_layers}
    return {
        "parameters": sum(p.numel() for p in model.parameters() if len(p) != VOCABULARY),
        "FLOPs a token": forward_flops(model),
        "numbers kept": kept[e.model],
        "layers that wait": waiting.get(e.model, 0),
    }


def peak_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest matrix product this machine does now in `dtype`, of a small one and three of the study's shapes.

    Returns:
        10⁹ operations a second.
    """
    best = 0.0
    for a, b, c in ((256, 768, 768), (4096, 2304, 768), (4096, 1536, 1536), (512, 768, VOCABULARY)):
        factors = {
            "left": torch.randn(a, b, device=device).to(dtype),
            "right": torch.randn(c, b, device=device).to(dtype),
        }
        timer = Timer("left @ right.T", globals=factors, num_threads=torch.get_num_threads())
        best = max(best, 2 * a * b * c / min(timer.blocked_autorange(min_run_time=0.1).times) / 1e9)
    return best


def measure(experiment: Experiment) -> dict[str, Any]:
    """Seconds of each stage on `experiment.train_tokens` tokens, the peaks beside them, and the peak memory.

    The second step of Phase 1, one recurrence, one epoch of Phase 2, one evaluation, in a run's order. The peaks are
    measured before and after every stage, and the best ones count, so that another's load does not flatter a share.
    """
    device = resolve_device(experiment)
    dtype = resolve_dtype(experiment, device)
    peaks = {torch.float32: 0.0, dtype: 0.0}
    seconds: dict[str, float] = {}

    def update_peaks():
        for kind in peaks:
            peaks[kind] = max(peaks[kind], peak_gflops(kind, device))

    @contextmanager
    def stage(name: str):
        update_peaks()
        began = _now(device)
        yield
        seconds[name] = _now(device) - began
        update_peaks()

    tokens = torch.from_numpy(split(experiment).train.tokens.astype(np.int64)).to(device)
    model = ContextLM(experiment, torch.from_numpy(load_embedding(experiment))).to(device)
    few = chunked(model, tokens[:2])
    steps = Experiment.from_mapping(experiment.model_dump(), {"phase1_max_iterations": 3, "phase2_epochs": 1})
    values = chunked(model, tokens).values
    with stage("phase1"):
        history = train_context_block(model, tokens, values, steps, dtype)
    del values
    with stage("recurrence"):
        contexts = chunked(model, tokens, keep=dtype)
    with stage("phase2"):
        phase2 = Trainer(Phase2(model, contexts, few, steps, dtype), steps).run()
    last = {(row["phase"], row["metric"]): row["value"] for row in history + phase2.history}
    seconds["phase1_step"] = last["phase1", "seconds"]
    seconds["phase2_epoch"] = last["phase2", "seconds"]
    part = chunked(model, tokens[: EVALUATED + 1], keep=dtype)
    with stage("evaluation"):
        evaluate(Predictor(model, dtype), part)
    unit = 1 if sys.platform == "darwin" else 1024  # of what the kernel says
    rows = []
    for name, plain in flops_per_token(experiment).items():
        kind = torch.float32 if name == "recurrence" else dtype
        count = len(part.tokens) if name == "evaluation" else len(tokens)
        floor = count / (peaks[kind] * 1e9)
        rows.append(
            {
                "experiment": experiment.experiment,
                "tokens": len(tokens),
                "stage": name,
                "dtype": str(kind).removeprefix("torch."),
                "seconds": seconds[name],
                "tokens_per_second": count / seconds[name],
                "mflop_per_token": plain / 1e6,
                "share_of_floor": plain * floor / seconds[name],
            }
        )
    return {
        "stages": rows,
        "distinct_tokens": len(contexts.distinct.rows) - 1,
        "recurrence_residual": contexts.residual,
        "recurrence_warmup": contexts.warmup,
        **{f"peak_gflops_{str(kind).removeprefix('torch.')}": peak for kind, peak in peaks.items()},
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def measure_apart(experiment: Experiment) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        ConfigError: the floor of its design, embedding, dropout or trained contexts is not counted.
        RuntimeError: it failed; the message is its last line.
    """
    for name in ("design", "phase2_freeze_embedding", "phase2_context_window", "dropout"):
        given, counted = getattr(experiment, name), Experiment.model_fields[name].default
        if given != counted:
            raise ConfigError(f"{name} = {given!r}: the benchmark counts the products of {counted!r} only")
    command = [sys.executable, "-m", "ctxlm.analysis.benchmark", json.dumps(experiment.model_dump())]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError((process.stderr.strip() or "killed").splitlines()[-1])
    return json.loads(process.stdout.splitlines()[-1])


def literal_seconds(literal: ModuleType, experiment: Experiment, count: int) -> dict[str, float]:
    """Seconds a token of the literal twin, which goes token by token on the CPU in float32.

    Args:
        literal: `tests.literal` (the module knows nothing of `ctxlm`, and `ctxlm` nothing of the tests).
        experiment: as for `measure`.
        count: tokens it is timed on.

    Returns:
        `recurrence` and `phase2_epoch`, as the stages of `measure`.
    """
    tokens = split(experiment).train.tokens[:count].tolist()
    weights = literal.copied(ContextLM(experiment, torch.from_numpy(load_embedding(experiment))))
    began = time.perf_counter()
    literal.run_contexts(weights, tokens, experiment.num_input_tokens)
    recurrence = (time.perf_counter() - began) / len(tokens)
    began = time.perf_counter()
    settings = experiment.model_dump() | {"phase2_epochs": 1}
    literal.phase2(weights, tokens, tokens[:2], experiment.num_input_tokens, settings)
    epoch = time.perf_counter() - began - recurrence * (len(tokens) + 2)  # it makes the contexts first
    return {"recurrence": recurrence, "phase2_epoch": epoch / (len(tokens) - 1)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    print(json.dumps(measure(Experiment.from_mapping(json.loads(sys.argv[1])))))
