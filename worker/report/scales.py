"""Axes: from values to places in a drawing, and the ticks between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LogScale:
    """Maps [low, high], both > 0, to [start, end] by the logarithm; values outside are held at the ends."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


@dataclass(frozen=True)
class LinearScale:
    """Maps [low, high] to [start, end]; values outside are held at the ends."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def positive(values: Sequence[float | None]) -> list[float]:
    """The values that a logarithmic axis can show."""
    return [v for v in values if v is not None and v > 0 and math.isfinite(v)]


def log_bounds(values: Sequence[float]) -> tuple[float, float]:
    """The nearest 1, 2 or 5 times a power of ten below and above; at least one such step apart."""
    low, high = min(values), max(values)
    steps = _steps(low / 10, high * 10)
    below = max(s for s in steps if s <= low * 1.000001)
    above = min(s for s in steps if s >= high * 0.999999)
    if below == above:
        below, above = max(s for s in steps if s < below), min(s for s in steps if s > above)
    return below, above


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten where they are few, else powers of ten alone; eight at most."""
    steps = [s for s in _steps(low, high) if low * 0.999999 <= s <= high * 1.000001]
    if len(steps) <= 8:
        return steps
    powers = [s for s in steps if abs(math.log10(s) - round(math.log10(s))) < 1e-9]
    every = math.ceil(len(powers) / 7)
    return powers[::every]


def index_ticks(count: int, most: int) -> list[int]:
    """Whole numbers from 0 to count - 1, evenly, `most` or so of them."""
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if count / step <= most:
            return list(range(0, count, step))
    return [0, count - 1]


def tick_text(value: float) -> str:
    """A tick of a logarithmic axis: 0.05, 20, 1e-05."""
    return f"{value:g}"


def _steps(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [float(f"{m}e{p}") for p in range(first, last + 1) for m in (1, 2, 5)]
