"""Where the grid of a weight lies: the range of each row or group, whole or clipped.

Clip search as in GPTQ's `mse` option (Frantar et al. 2022), with the error of column j weighted by H_jj.
Percentile ranges as IGQ-ViT takes them for its weights (Moon et al. 2024, supplement A.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantry.recipe import WeightGrid

CHUNK = 1 << 17  # weights searched at once: a few copies of them stay in the processor's cache


@dataclass(frozen=True)
class Grid:
    """Parameters of w ~ scale * (q - zero_point): scale (out, groups) float32, zero_point (out, groups) float32.

    `scale` holds values that float16 can store exactly, so that what is stored is what was optimised.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool


def store_scale(scale: Tensor) -> Tensor:
    """`scale` rounded to what the checkpoint stores: float16, kept away from 0 and from infinity."""
    magnitude = scale.abs().clamp(2.0**-24, torch.finfo(torch.float16).max)
    return torch.where(scale < 0, -magnitude, magnitude).half().float()


def fit_grid(w: Tensor, step: WeightGrid, *, weight: Tensor | None = None, steps: int = 24) -> Grid:
    """The grid that a step's `clip` asks for. w: (rows, groups, columns of a group).

    weight, steps: of the search for the least squared error, see `clipped_grid`; the others do not look at them.
    """
    if step.clip == "mse":
        return clipped_grid(w, step.bits, symmetric=step.symmetric, weight=weight, steps=steps)
    if step.clip == "percentile":
        return percentile_grid(w, step.bits, symmetric=step.symmetric, percentile=step.upper_percentile)
    return minmax_grid(w, step.bits, symmetric=step.symmetric)


def minmax_grid(w: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid that covers every value. w: (rows, groups, columns of a group)."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    return _grid(low, high, bits, symmetric)


def percentile_grid(w: Tensor, bits: int, *, symmetric: bool, percentile: float) -> Grid:
    """The grid that covers each group from its (100 - percentile)-th to its percentile-th percentile, and 0.

    w: (rows, groups, columns of a group). percentile: above 50, at most 100; between two weights it is
    interpolated. What lies beyond is rounded to the ends of the grid.
    """
    shares = torch.tensor([(100 - percentile) / 100, percentile / 100], dtype=w.dtype, device=w.device)
    rows = max(1, CHUNK // w[0].numel())
    parts = [torch.quantile(part, shares, dim=-1) for part in torch.split(w, rows)]
    low, high = torch.cat(parts, dim=1)
    return _grid(low.clamp(max=0), high.clamp(min=0), bits, symmetric)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """Symmetric: [-2^(b-1), 2^(b-1) - 1] * scale, its longer side towards the larger value."""
    if symmetric:
        half = 2 ** (bits - 1)
        flip = high > -low
        reach = torch.maximum(high, -low)
        other = torch.minimum(high, -low)
        scale = torch.maximum(reach / half, other / (half - 1))
        scale = torch.where(flip, -scale, scale)
        scale = torch.where(reach > 0, scale, torch.ones_like(scale))
        return Grid(store_scale(scale), torch.full_like(scale, half), bits, True)
    span = high - low
    scale = store_scale(torch.where(span > 0, span / (2**bits - 1), torch.ones_like(span)))
    return Grid(scale, (-low / scale).round().clamp(0, 2**bits - 1), bits, False)


def clipped_grid(
    w: Tensor, bits: int, *, symmetric: bool, weight: Tensor | None = None, steps: int = 24
) -> Grid:
    """The grid of least squared error among shrunk ranges, per row and group.

    Args:
        w: (rows, groups, columns of a group).
        weight: (groups, columns of a group), the importance of each column, such as diag(H); None: equal.
        steps: ranges tried, from the whole range down to the least that pays at this bit-width.
    """
    rows = max(1, CHUNK // w[0].numel())
    parts = [_search(part, bits, symmetric, weight, steps) for part in torch.split(w, rows)]
    return Grid(
        torch.cat([p.scale for p in parts]), torch.cat([p.zero_point for p in parts]), bits, symmetric
    )


_LEAST = {2: 0.3, 3: 0.45, 4: 0.6, 5: 0.7, 6: 0.8, 8: 0.9}


def _search(w: Tensor, bits: int, symmetric: bool, weight: Tensor | None, steps: int) -> Grid:
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    least = _LEAST[bits]
    shrinks = [1 - (1 - least) * i / (steps - 1) for i in range(steps)]
    if symmetric:
        return _search_symmetric(w, torch.maximum(high, -low), bits, weight, shrinks)
    best: Grid | None = None
    lowest: Tensor | None = None
    for shrink in shrinks:
        candidate = _grid(shrink * low, shrink * high, bits, False)
        error = _error(w, candidate, weight)
        if best is None or lowest is None:
            best, lowest = candidate, error
            continue
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale = torch.where(better, candidate.scale, best.scale)
        best = Grid(scale, torch.where(better, candidate.zero_point, best.zero_point), bits, False)
    assert best is not None
    return best


def _error(w: Tensor, grid: Grid, weight: Tensor | None) -> Tensor:
    """Squared rounding error of w on the grid, summed over each group: (rows, groups)."""
    scale, zero = grid.scale.unsqueeze(-1), grid.zero_point.unsqueeze(-1)
    q = (w / scale).round_().add_(zero).clamp_(0, 2**grid.bits - 1)
    error = q.sub_(zero).mul_(scale).sub_(w).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)


def _search_symmetric(
    w: Tensor, reach: Tensor, bits: int, weight: Tensor | None, shrinks: list[float]
) -> Grid:
    """Symmetric ranges, with the spare code on either side. reach: largest magnitude, (rows, groups).

    Everything is measured in units of `reach`, so that a candidate is one number for all groups.
    """
    half = 2 ** (bits - 1)
    reach = torch.where(reach > 0, reach, torch.ones_like(reach))
    unit = w / reach.unsqueeze(-1)
    top = half - 0.5 if bits > 2 else half - 0.25  # beyond this the longer side leaves no code unused
    signs = (1, -1) if bits <= 5 else (1,)
    best, lowest = torch.empty_like(reach), torch.full_like(reach, torch.inf)
    for shrink in shrinks:
        scaled = unit * (top / shrink)
        rounded = scaled.round()
        for sign in signs:
            ends = (-half, half - 1) if sign > 0 else (1 - half, half)
            error = rounded.clamp(*ends).sub_(scaled)
            squared = error.square_() if weight is None else torch.mul(error, weight).mul_(error)
            total = squared.sum(-1).mul_((shrink / top) ** 2)
            better = total < lowest
            lowest = torch.where(better, total, lowest)
            best = torch.where(better, sign * shrink / top, best)
    return Grid(store_scale(best * reach), torch.full_like(reach, half), bits, True)
