"""Axes with round tick positions and short tick labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MOST_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def position(self, value: float) -> float:
        """Return a value's relative position: 0 at `low`, 1 at `high`; a logarithmic axis clamps values below `low`."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], *, from_zero: bool, most_ticks: int = 5) -> Axis:
    """Return an axis over all values that starts and ends on a tick; tick steps are 1, 2, 2.5 or 5 times 10^k."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all equal up to rounding
        margin = 0.5 * abs(high) or 1.0
        low, high = (low, high + margin) if from_zero else (low - margin, high + margin)
    step = _round_step((high - low) / (most_ticks - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(values: Sequence[float], *, most_ticks: int = 5) -> Axis:
    """Return an axis of whole decades over all positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    last = max(last, first + 1)
    stride = math.ceil((last - first) / (most_ticks - 1))
    first = last - stride * math.ceil((last - first) / stride)
    return Axis(10.0**first, 10.0**last, [10.0**exponent for exponent in range(first, last + 1, stride)], log=True)


def step_axis(first: int, last: int, *, most_ticks: int = 6) -> Axis:
    """Return an x axis of whole training steps without margin; a single step gets half a step on either side."""
    if first == last:
        return Axis(first - 0.5, last + 0.5, [first])
    step = max(1, round(_round_step((last - first) / (most_ticks - 1))))
    ticks = list(range(step * math.ceil(first / step), last + 1, step))
    return Axis(first, last, ticks)


def level_axis(levels: Sequence[float], *, most_ticks: int = 8) -> Axis:
    """Return the x axis of a sweep, with margins; it has a tick at each level if the labels fit, else round ticks."""
    ticks: Sequence[float] = sorted(set(levels))
    if len(ticks) == 1:
        return Axis(ticks[0] - 0.5, ticks[0] + 0.5, ticks)
    span = ticks[-1] - ticks[0]
    if len(ticks) > most_ticks or min(b - a for a, b in pairwise(ticks)) < span / most_ticks:
        ticks = linear_axis(ticks, from_zero=False).ticks
    low, high = min(ticks[0], *levels), max(ticks[-1], *levels)
    return Axis(low - 0.06 * (high - low), high + 0.06 * (high - low), ticks)


def tick_labels(axis: Axis, *, percent: bool = False) -> list[str]:
    """Return labels of at most seven characters, all with the same number of decimals."""
    if axis.log:
        return [f"1e{round(math.log10(tick))}" for tick in axis.ticks]
    ticks = [100 * tick for tick in axis.ticks] if percent else list(axis.ticks)
    unit = " %" if percent else ""
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    decimals = next(
        (d for d in range(MOST_DECIMALS + 1) if all(abs(round(tick, d) - tick) < 1e-6 * step for tick in ticks)), None
    )
    if decimals is None or max(map(abs, ticks)) >= 1e5:
        return [_scientific(tick) + unit for tick in ticks]
    return [f"{tick:,.{decimals}f}{unit}" for tick in ticks]


def short(value: float) -> str:
    """Format a value in about four digits: 0.621, 23.10, 1,240, 3.1e-06; a dash if it is not finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    decimals = 0 if size >= 1000 or value == int(value) else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{decimals}f}"


def signed(value: float) -> str:
    """Format a value with its sign, such as +0.77; a dash if it is not finite."""
    return f"{value:+.2f}" if math.isfinite(value) else "–"


def _scientific(value: float) -> str:
    """Format as 2.5e-5, where Python would write 2.5e-05."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**exponent:.3g}e{exponent}"


def _round_step(at_least: float) -> float:
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= at_least * (1 - 1e-9))
