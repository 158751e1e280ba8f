"""Affine quantization of weights: w ~ scale * (q - zero_point), with q an integer in [0, 2**bits - 1].

Shapes for a weight (out, in): scale and zero_point are (out, groups), where a group is `in / groups`
consecutive input columns; one group is a scale per output row (per-channel).
Symmetric grids have zero_point = 2**(bits - 1) everywhere; their scale may be negative, which turns the
longer side of the grid, [-2**(bits-1), 2**(bits-1) - 1], towards the positive weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    codes: (out, in) uint8, in [0, 2**bits - 1]. scale: (out, groups) float16 or float32, not 0.
    zero_point: (out, groups) uint8. group_size: columns of a group, None for per-channel.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int | None
    symmetric: bool

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for: (out, in) float32."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scale.shape[1], -1).float()
        values = (grouped - self.zero_point.float().unsqueeze(-1)) * self.scale.float().unsqueeze(-1)
        return values.view(rows, columns)

    def storage_bits(self) -> int:
        """Bits that the codes, scales and (if asymmetric) zero-points take when packed."""
        scale_bits = self.scale.numel() * self.scale.element_size() * 8
        zero_bits = 0 if self.symmetric else self.zero_point.numel() * self.bits
        return self.codes.numel() * self.bits + scale_bits + zero_bits


@dataclass(frozen=True)
class QuantizedLayer:
    """What replaces one linear layer.

    bias: (out,) float32, merged with whatever compensation added, or None. added_bias: the
    full-precision layer had none. position_bias: (positions, out) float32, or None.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    added_bias: bool = False
    position_bias: Tensor | None = None


def quantize_to_grid(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The codes of the nearest grid points: uint8 (out, in), for w (out, in) and (out, groups) parameters."""
    rows, columns = w.shape
    grouped = w.view(rows, scale.shape[1], -1)
    codes = (grouped / scale.float().unsqueeze(-1)).round_().add_(zero_point.float().unsqueeze(-1))
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8).view(rows, columns)
