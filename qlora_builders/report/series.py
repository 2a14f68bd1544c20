"""Curves before they are drawn: fewer points that keep every extreme, smoothing, axis ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Series:
    """One curve. Where `y` is NaN or infinite the line is broken."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dots: bool = False  # mark every point: there are few, and none between them

    def finite(self) -> list[float]:
        return [value for value in self.y if math.isfinite(value)]


def thin_out(series: Series, limit: int) -> Series:
    """At most about `limit` points: of each stretch the lowest and the highest, and both ends.

    A stretch with a value that is not finite keeps the first such value too.
    """
    size = len(series.x)
    if size <= limit:
        return series
    stretches = max(1, limit // 2 - 1)
    kept = {0, size - 1}
    for stretch in range(stretches):
        indices = range(stretch * size // stretches, (stretch + 1) * size // stretches)
        finite = [i for i in indices if math.isfinite(series.y[i])]
        if finite:
            kept |= {min(finite, key=series.y.__getitem__), max(finite, key=series.y.__getitem__)}
        if len(finite) < len(indices):
            kept.add(next(i for i in indices if not math.isfinite(series.y[i])))
    order = sorted(kept)
    return replace(series, x=[series.x[i] for i in order], y=[series.y[i] for i in order])


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and the `reach` values on both sides, so that it does not lag behind.

    Near the ends it reaches less far, the same on both sides, down to a quarter of `reach`: one
    value alone would be noise. NaN where no value in reach is finite.
    """
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    result = []
    for at in range(len(values)):
        near = max(min(reach, at, len(values) - 1 - at), reach // 4)
        first, last = max(0, at - near), min(len(values), at + near + 1)
        count = counts[last] - counts[first]
        result.append((sums[last] - sums[first]) / count if count else math.nan)
    return result


def bounds(series: Sequence[Series], *, from_zero: bool) -> tuple[float, float]:
    """The part of the y axis to show: all finite values with a margin, and never empty."""
    values = [value for one in series for value in one.finite()]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        low = 0.0
    if low == high:
        margin = abs(low) / 2 or 1.0
        return low - margin, high + margin
    margin = (high - low) / 20
    return (low if from_zero and low == 0 else low - margin), high + margin


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers inside [low, high], at most `count` + 1 of them."""
    step = (high - low) / count
    if step == 0:  # below the smallest float
        return [low]
    power = 10.0 ** math.floor(math.log10(step))
    nice = next((m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999), step)
    first = math.ceil(low / nice - 1e-9)
    last = math.floor(high / nice + 1e-9)
    return list(dict.fromkeys(k * nice for k in range(first, last + 1))) or [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], both given as logarithms; others where they are few."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 6))
    powers = [float(k) for k in range(first, last + 1, every)]
    return powers if len(powers) >= 2 else ticks(low, high, 4)


def spell_step(step: float) -> str:
    """A label below an axis, where there is little room: 20k, 1.5M."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if step >= 10**4 and step >= size:
            return f"{step / size:g}{letter}"
    return spell(step)


def spell(value: float) -> str:
    """A number as a person would write it: four digits, and a power of ten only where needed."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"
