"""What works on a denoiser's activations by sampling step: tables with a row for some consecutive steps.

Whoever runs the network sets `index`, the present step, on every `StepDependent` before each forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer


class StepDependent(ActivationQuantizer):
    """Base: `rows` rows, one for every `steps_per_row` steps."""

    def __init__(self, bits: int, rows: int, steps_per_row: int) -> None:
        super().__init__(bits)
        self.rows, self.steps_per_row = rows, steps_per_row
        self.index = 0

    @property
    def row(self) -> int:
        return self.index // self.steps_per_row


class StepTable(StepDependent):
    """x ~ scale * (q - zero_point) per tensor, q in [0, 2**bits - 1].

    split: channels of the deep and the skip half of a concatenated tensor (batch, channels, ...), each with a column
    of its own. scale, zero_point: (rows, 1 or 2) float32.
    """

    kind = "step_table"
    fields = ("rows", "steps_per_row", "split")

    def __init__(self, bits: int, rows: int, steps_per_row: int, split: list[int] | None = None) -> None:
        super().__init__(bits, rows, steps_per_row)
        self.split = None if split is None else list(split)
        columns = 1 if split is None else 2
        self.register_buffer("scale", torch.ones(rows, columns))
        self.register_buffer("zero_point", torch.zeros(rows, columns))

    scale: Tensor
    zero_point: Tensor

    def forward(self, x: Tensor) -> Tensor:
        moved = [
            _nearest(part, self.scale[self.row, half], self.zero_point[self.row, half], self.bits)
            for half, part in enumerate(channel_halves(x, self.split))
        ]
        return moved[0] if len(moved) == 1 else torch.cat(moved, dim=1)


class StepProbabilities(StepDependent):
    """Attention probabilities (batch, heads, queries, keys) on a grid from 0, and the bias that gives them mass back.

    Pandey et al. 2023, arXiv:2309.01729, for each group of steps. heads: of the attention, or 1 for all.
    scale, bias: (rows, heads) float32; the bias is the real-valued part of the grid's offset.
    """

    kind = "step_probabilities"
    fields = ("rows", "steps_per_row", "heads")

    def __init__(self, bits: int, rows: int, steps_per_row: int, heads: int) -> None:
        super().__init__(bits, rows, steps_per_row)
        self.heads = heads
        self.register_buffer("scale", torch.ones(rows, heads))
        self.register_buffer("bias", torch.zeros(rows, heads))

    scale: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = (values[self.row].view(-1, 1, 1) for values in (self.scale, self.bias))
        codes = (x.detach().float() / scale).round_().clamp_(0, 2**self.bits - 1)
        moved = codes.mul_(scale).add_(bias).to(x.dtype)
        return (
            x + (moved - x.detach()) if x.requires_grad else moved
        )  # a gradient passes as if nothing were rounded


class StepBias(StepDependent):
    """Adds a constant to each output channel of a layer: bias compensation, for each group of steps.

    Gong et al. 2024, arXiv:2404.01892. channels: of the output, axis 1 of an image and the last of anything else.
    bias: (rows, channels) float32.
    """

    kind = "step_bias"
    fields = ("rows", "steps_per_row", "channels")

    def __init__(self, bits: int, rows: int, steps_per_row: int, channels: int) -> None:
        super().__init__(bits, rows, steps_per_row)
        self.channels = channels
        self.register_buffer("bias", torch.zeros(rows, channels))

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias[self.row].to(x.dtype)
        return x + (bias[:, None, None] if x.ndim == 4 else bias)


def channel_halves(x: Tensor, split: tuple[int, int] | list[int] | None) -> tuple[Tensor, ...]:
    """The deep and the skip half of x (batch, channels, ...); all of it where nothing was concatenated."""
    return (x,) if split is None else torch.split(x, list(split), dim=1)


def _nearest(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    codes = (x.float() / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).to(x.dtype)
