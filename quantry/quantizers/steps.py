"""Quantizers of a denoiser's activations: a table of grids, a row for some consecutive sampling steps."""

from __future__ import annotations

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer


class StepTable(ActivationQuantizer):
    """x ~ scale * (q - zero_point) per tensor, q in [0, 2**bits - 1], by step.

    A row for every `steps_per_row` steps; split: channels of the deep and the skip half of a concatenated tensor
    (batch, channels, ...), each with a column of its own. scale, zero_point: (rows, 1 or 2) float32. `index` is the
    present step: whoever runs the network sets it.
    """

    kind = "step_table"
    fields = ("rows", "steps_per_row", "split")

    def __init__(self, bits: int, rows: int, steps_per_row: int, split: list[int] | None = None) -> None:
        super().__init__(bits)
        self.rows, self.steps_per_row = rows, steps_per_row
        self.split = None if split is None else list(split)
        columns = 1 if split is None else 2
        self.register_buffer("scale", torch.ones(rows, columns))
        self.register_buffer("zero_point", torch.zeros(rows, columns))
        self.index = 0

    scale: Tensor
    zero_point: Tensor

    def forward(self, x: Tensor) -> Tensor:
        row = self.index // self.steps_per_row
        moved = [
            _nearest(part, self.scale[row, half], self.zero_point[row, half], self.bits)
            for half, part in enumerate(channel_halves(x, self.split))
        ]
        return moved[0] if len(moved) == 1 else torch.cat(moved, dim=1)


def channel_halves(x: Tensor, split: tuple[int, int] | list[int] | None) -> tuple[Tensor, ...]:
    """The deep and the skip half of x (batch, channels, ...); all of it where nothing was concatenated."""
    return (x,) if split is None else torch.split(x, list(split), dim=1)


def _nearest(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    codes = (x.float() / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).to(x.dtype)
