"""The machine a run takes place on: its device, the type of its products, and where random numbers are drawn."""

import hashlib
import warnings
from functools import cache

import torch
from torch import Tensor

from ctxlm.config import ConfigError, Experiment
from ctxlm.corpus import Split


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each purpose, so that a draw skipped in one place shifts none in another.

    Weights, and the order of a network's windows, are drawn on the CPU, the same for every device. Noise and other
    permutations are drawn where they are used, since a GPU would wait for them: there they are of the
    CPU's distribution, not its bits.
    """
    name = repr((seed, *purpose)).encode()
    return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "little"))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, from the CPU, on the device; to a GPU from pinned memory, for from any other the host waits for the GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def tokens_on(device: torch.device, streams: Split) -> list[Tensor]:
    """The tokens of training, validation, development and test, int64 [N], on a device."""
    return [torch.from_numpy(stream.tokens).long().to(device) for stream in vars(streams).values()]


def resolve_device(experiment: Experiment) -> torch.device:
    """The device that `device` names; `auto` is the first GPU where there is one. An n-gram is counted on the CPU.

    Raises:
        ConfigError: a CUDA device is asked for that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if experiment.device == "auto":
        return torch.device("cuda" if count and experiment.model != "kneser-ney" else "cpu")
    device = torch.device(experiment.device)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device = {experiment.device!r}: torch sees {count} CUDA device(s) here; use auto or cpu")
    return device


def resolve_dtype(experiment: Experiment, device: torch.device) -> torch.dtype:
    """The type of the matrix products; `auto` is bfloat16 where the processor or the GPU computes it natively.

    It is a property of the machine, so that runs of one machine share it. Asked for elsewhere, bfloat16 is emulated.
    """
    native = has_bfloat16(device)
    if experiment.dtype == "bfloat16" and not native and device.type == "cpu":
        emulate_bfloat16()
    if experiment.dtype != "auto":
        return getattr(torch, experiment.dtype)
    return torch.bfloat16 if native else torch.float32


@cache
def emulate_bfloat16() -> torch.library.Library:
    """From now on the CPU multiplies bfloat16 matrices by way of float32; torch's own way can be 30 times slower.

    Both add exact products up in float32 and round the sum once, as processors with bfloat16 do. `mm.out` is
    there for `ctxlm.loss`; other forms with `out`, which the rest are made of, stay torch's.

    Returns:
        what the kernels are registered with; they go with it.
    """

    def widened(product, *factors, **scales):
        if len({factor.dtype for factor in factors}) > 1:
            raise RuntimeError(f"factors are of several types: {', '.join(str(factor.dtype) for factor in factors)}")
        wide = [factor.float() if factor.dtype == torch.bfloat16 else factor for factor in factors]
        return product(*wide, **scales, out=wide[-1].new_empty(0)).to(factors[-1].dtype)

    kernels = {
        "mm": lambda a, b: widened(torch.addmm, a.new_zeros(()), a, b, beta=0),
        "mm.out": lambda a, b, out: out.copy_(a @ b),
        "addmm": lambda c, a, b, beta=1, alpha=1: widened(torch.addmm, c, a, b, beta=beta, alpha=alpha),
        "bmm": lambda a, b: widened(torch.bmm, a, b),
    }
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings(action="ignore"):  # torch's, that a kernel is replaced
        for name, kernel in kernels.items():
            library.impl(name, kernel)
    return library


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor or the GPU computes bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, and absent from some versions
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = True) -> torch.autocast:
    """Matrix products in `dtype`; nothing is rounded where that is float32. `cache` keeps rounded weights."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)
