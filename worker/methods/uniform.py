"""Uniform asymmetric grids on every activation: static, from the range seen in calibration, or per token.

Static ranges: all that was seen; percentiles of it; or the range of least squared rounding error. The last
two are read off a histogram.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.recipe import UniformStep
from worker.errors import CalibrationError, NonFiniteError
from worker.methods.activations import Calibrated, Images, Tell, observe, silent
from worker.models.vision import Operand, VisionModel

BINS = 2048
TAIL = 1e-4  # share of the values outside a percentile range, on each side
SHRINKS = 20  # ends tried on each side of a range


def calibrate(model: VisionModel, images: Images, step: UniformStep) -> Calibrated:
    """A grid for each tensor (static) or each token (dynamic) of every operand but the images."""
    operands = [operand for operand in model.operands if operand.kind != "image"]
    bits = {o.name: bits_of(o, step.bits, step.softmax_bits) for o in operands}
    images.begin("ranges")
    ranges = ranges_of(model, operands, images.pixels, tell=images.tell)  # of tokens: for its refusals alone
    if step.granularity == "token":
        return Calibrated({name: TokenQuantizer(bits[name]) for name in bits})
    if step.range != "min_max":
        images.begin("histograms")
        counts = histograms(model, ranges, images.pixels, images.tell)
        fit = percentile_range if step.range == "percentile" else mse_range
        ranges = {n: fit(counts[n], *ranges[n], bits=bits[n]) for n in bits}
    quantizers: dict[str, ActivationQuantizer] = {
        name: UniformQuantizer.covering(*ranges[name], bits[name]) for name in bits
    }
    return Calibrated(quantizers)


def bits_of(operand: Operand, bits: int, softmax_bits: int | None) -> int:
    """The bit-width of an operand: attention probabilities may have their own."""
    return softmax_bits or bits if operand.kind == "probabilities" else bits


def ranges_of(
    model: VisionModel,
    operands: Iterable[Operand],
    pixels: Tensor,
    *,
    by_head: bool = False,
    tell: Tell = silent,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and largest value of each operand, float32: (), or (H, 1, 1) of queries, keys and values.

    Raises: CalibrationError without images, NonFiniteError for an operand that holds NaN or infinity.
    """
    if len(pixels) == 0:
        raise CalibrationError("activation ranges need at least one calibration image")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, dims: tuple[int, ...], x: Tensor) -> None:
        low, high = x.float().amin(dims), x.float().amax(dims)
        if name in seen:
            low, high = low.minimum(seen[name][0]), high.maximum(seen[name][1])
        seen[name] = low, high

    watchers = {}
    for operand in operands:
        heads = by_head and operand.kind in ("query", "key", "value")
        watchers[operand.name] = partial(see, operand.name, (0, 2, 3) if heads else ())
    observe(model, pixels, watchers, tell)
    for name, (low, high) in seen.items():
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity on the calibration images")
    return {n: (a[:, None, None], b[:, None, None]) if a.dim() else (a, b) for n, (a, b) in seen.items()}


def histograms(
    model: VisionModel, ranges: dict[str, tuple[Tensor, Tensor]], pixels: Tensor, tell: Tell = silent
) -> dict[str, Tensor]:
    """How many values of each operand fall in each of BINS equal parts of its range: (BINS,) float64."""
    counts = {
        name: torch.zeros(BINS, dtype=torch.float64, device=low.device) for name, (low, _) in ranges.items()
    }

    def see(name: str, low: float, high: float, x: Tensor) -> None:
        counts[name] += torch.histc(x.float(), BINS, low, high)

    observe(model, pixels, {n: partial(see, n, a.item(), b.item()) for n, (a, b) in ranges.items()}, tell)
    return counts


def percentile_range(counts: Tensor, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """The range that leaves TAIL of the values out on either side, to the width of a bin; the same at any width.

    counts: (BINS,) over [low, high].
    """
    width = (high - low) / len(counts)
    below = counts.cumsum(0)
    allowed = TAIL * below[-1]
    first = (below <= allowed).sum()  # bins that are left out
    last = (counts.flip(0).cumsum(0) <= allowed).sum()
    return low + first * width, high - last * width


def mse_range(counts: Tensor, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """The range of least squared rounding error among SHRINKS x SHRINKS, each end between its own and 0.

    counts: (BINS,) over [low, high]; the values of a bin are taken to lie in its middle.
    """
    width = (high - low) / len(counts)
    middles = low + width * (torch.arange(len(counts), device=low.device) + 0.5)
    shares = torch.linspace(1, 1 / SHRINKS, SHRINKS, device=low.device)
    lows = (shares * low.clamp(max=0)).repeat_interleave(SHRINKS)
    highs = (shares * high.clamp(min=0)).repeat(SHRINKS)
    grid = UniformQuantizer.covering(lows[:, None], highs[:, None], bits)
    error = (grid(middles.expand(len(lows), -1)) - middles).square_()
    best = (error.double() @ counts).argmin()
    return lows[best], highs[best]
