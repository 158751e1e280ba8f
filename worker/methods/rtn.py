"""Round to nearest: every weight to the nearest point of its grid. No calibration data."""

from __future__ import annotations

from torch import Tensor

from quantry.quantizers.affine import QuantizedWeight, quantize_to_grid
from quantry.recipe import RtnStep
from worker.methods.grids import Grid, fit_grid


def rtn(w: Tensor, step: RtnStep) -> QuantizedWeight:
    """Quantize w (out, in) float32 to the step's grid."""
    grid = fit_grid(by_group(w, step.group_size), step)
    return on_grid(quantize_to_grid(w, grid.scale, grid.zero_point, grid.bits), grid, step.group_size)


def by_group(w: Tensor, group_size: int | None) -> Tensor:
    """w (out, in) as (out, groups, columns of a group)."""
    return w.view(len(w), -1, group_size or w.shape[1])


def on_grid(codes: Tensor, grid: Grid, group_size: int | None) -> QuantizedWeight:
    """Codes (out, in) uint8 and their grid as a value that can be packed."""
    return QuantizedWeight(
        codes, grid.scale.half(), grid.zero_point.to(codes.dtype), grid.bits, group_size, grid.symmetric
    )
