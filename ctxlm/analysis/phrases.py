"""Numbers as the report words them: per cent of PPL, intervals and their verdicts, sizes, counts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ctxlm.analysis.explain import Effect
from ctxlm.analysis.scaling import power_of_ten


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def signed(value: float, digits: int = 3) -> str:
    """With its sign, unless it rounds to 0."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def percent(fraction: float) -> str:
    return f"{signed(100 * fraction, 1)} %"


def percents(interval: Sequence[float] | None) -> str:
    """An interval in nats as one of per cent of PPL."""
    if interval is None or not all(map(math.isfinite, interval)):
        return "no interval"
    low, high = (signed(100 * math.expm1(x), 1) for x in interval)
    return f"{low} to {high} %"


def change(nats: float, interval: Sequence[float] | None) -> str:
    """A difference of log PPL as per cent of PPL, with its interval."""
    return f"{percent(math.expm1(nats))} ({percents(interval)})"


def change_if_known(nats: float, interval: Sequence[float] | None) -> str:
    """`change`, or where there is no interval the value alone."""
    return change(nats, interval) if interval else percent(math.expm1(nats))


def effect_text(effect: Effect) -> str:
    return change(effect.estimate, effect.interval)


def magnitude(nats: float) -> str:
    """A difference without its sign."""
    return f"{100 * math.expm1(abs(nats)):.1f} %"


def p_text(value: float) -> str:
    """After "p "."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


SINGLE = ", in single runs"
"""Follows a verdict that another seed may turn round."""


def side(interval: Sequence[float] | None) -> int:
    """The sign of an interval that excludes 0; otherwise 0."""
    low, high = interval or (0, 0)
    return 1 if low > 0 else -1 if high < 0 else 0


def winner(difference: dict[str, Any]) -> str | None:
    """The label whose PPL is lower by more than the interval of a paired difference; None where it includes 0."""
    return {-1: difference["a"], 1: difference["b"]}.get(side(difference["interval"]))


def steeper(found: Mapping[str, Any]) -> str | None:
    """Whose law falls faster, of a pair of `crossing.errors`, by t test and bootstrap; None: it cannot be told."""
    here, anywhere = (side(found.get(name)) for name in ("slope_interval", "bootstrap_slope"))
    if not here or here != anywhere:
        return None
    return found["b"] if here < 0 else found["a"]


def tokens_text(tokens: float) -> str:
    if tokens >= 1e9:
        mantissa, exponent = f"{tokens:.1e}".split("e+")
        return f"{mantissa} · {power_of_ten(int(exponent))}"
    return f"{float(f'{tokens:.3g}'):,.0f}"


def sizes_text(sizes: list[int]) -> str:
    words = [f"{size:,}" for size in sizes]
    return f"{', '.join(words[:-1])} and {words[-1]} tokens" if len(words) > 1 else f"{''.join(words)} tokens"


def sizes_of(runs: pd.DataFrame) -> str:
    return sizes_text(sorted(set(runs["train_tokens"])))


def span(values: Iterable[float], text: Callable[[float], str] = str) -> str:
    """One text where all values read the same, otherwise "lowest to highest"."""
    ordered = sorted(values)
    low, high = text(ordered[0]), text(ordered[-1])
    return low if low == high else f"{low} to {high}"
