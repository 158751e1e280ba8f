"""Where the grid of a weight lies: the range of each row or group, whole or clipped.

Clip search as in GPTQ's `mse` option (Frantar et al. 2022), with the error of column j weighted by H_jj.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def minmax_grid(w: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid that covers every value. w: (rows, groups, columns of a group)."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    return _grid(low, high, bits, symmetric)


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
    best: Grid | None = None
    least: Tensor | None = None
    for candidate in _candidates(low, high, bits, symmetric, steps):
        error = _error(w, candidate, weight)
        if best is None or least is None:
            best, least = candidate, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, best.scale)
        best = Grid(scale, torch.where(better, candidate.zero_point, best.zero_point), bits, symmetric)
    assert best is not None
    return best


def _candidates(low: Tensor, high: Tensor, bits: int, symmetric: bool, steps: int) -> list[Grid]:
    least = _LEAST[bits]
    shrinks = [1 - (1 - least) * i / (steps - 1) for i in range(steps)]
    if not symmetric:
        return [_grid(p * low, p * high, bits, False) for p in shrinks]
    half = 2 ** (bits - 1)
    reach = torch.maximum(high, -low)
    reach = torch.where(reach > 0, reach, torch.ones_like(reach))
    zero = torch.full_like(reach, half)
    signs = (1.0, -1.0) if bits <= 5 else (1.0,)
    top = half - 0.5 if bits > 2 else half - 0.25  # beyond this the longer side leaves no code unused
    return [Grid(store_scale(s * p * reach / top), zero, bits, True) for p in shrinks for s in signs]


def _error(w: Tensor, grid: Grid, weight: Tensor | None) -> Tensor:
    """Squared rounding error of w on the grid, summed over each group: (rows, groups)."""
    scale, zero = grid.scale.unsqueeze(-1), grid.zero_point.unsqueeze(-1)
    q = (w / scale).round_().add_(zero).clamp_(0, 2**grid.bits - 1)
    error = q.sub_(zero).mul_(scale).sub_(w).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)
