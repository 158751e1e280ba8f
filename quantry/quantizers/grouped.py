"""Quantizers that each image deals its channels, or its attention rows, out to: IGQ-ViT.

Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024, arXiv:2404.00928.
G grids per operand are fixed by calibration; which channel takes which is decided when the network runs, by
the nearest bounds (Eqs. 4, 5 for channels, 8 for softmax rows). The leading index of a tensor is what is
looked at together: an image, or in Swin's attention one window of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantry.base import FLOAT_BITS
from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.affine import QuantizedWeight

Axis = Literal["channels", "rows"]
_TINY = 2.0**-100  # a range of zeros: any step will do


def bounds_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of x ~ scale * (q - zero_point), q in [0, 2**bits - 1], over [low, high].

    Widened to hold 0, so that zero stays exact and the zero-point is a code. Bounds that leave 0 out are means
    of one-sided channels and clip half of them: measured, the wider grid is no worse than the exact one.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_TINY)
    return scale, (-low / scale).round()


class GroupedQuantizer(ActivationQuantizer):
    """G grids; each channel (or row) of an image takes the one whose bounds are nearest to its own range.

    axis: `channels` of (images, ..., tokens, channels), a channel's range being over all tokens of the image;
    `rows` of the softmax output, told apart by their maximum: their lower bound is 0.
    widened: whether a grid reaches further than the bounds that its channels are dealt by.
    Buffers: low and high, float32 (G), the bounds l and u; if widened grid_low and grid_high, where grids end.
    """

    kind = "grouped"
    fields = ("groups", "axis", "widened")

    def __init__(self, bits: int, groups: int, axis: Axis, widened: bool = False) -> None:
        super().__init__(bits)
        self.groups, self.axis, self.widened = groups, axis, widened
        for name in ("low", "high", *(("grid_low", "grid_high") if widened else ())):
            self.register_buffer(name, torch.zeros(groups))

    low: Tensor
    high: Tensor
    grid_low: Tensor
    grid_high: Tensor

    def grids(self) -> tuple[Tensor, Tensor]:
        """Scale and zero-point of every group, (G)."""
        if self.widened:
            return bounds_grid(self.grid_low, self.grid_high, self.bits)
        return bounds_grid(self.low, self.high, self.bits)

    def assign(self, x: Tensor) -> Tensor:
        """The group of each channel, (images, 1, channels), or row, (..., 1): int64, to broadcast against x."""
        return self.nearest(*extent(x, self.axis))

    def nearest(self, low: Tensor, high: Tensor) -> Tensor:
        """The group of each range, whatever their shape: int64."""
        distance = (high.unsqueeze(-1) - self.high).square_()
        if self.axis == "channels":
            distance += (low.unsqueeze(-1) - self.low).square_()
        return distance.argmin(-1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of x, integers in float32, and the groups that they count in, as `assign` gives them."""
        group = self.assign(x)
        scale, zero_point = self.grids()
        codes = (x.float() / scale[group]).add_(zero_point[group])
        return codes.round_().clamp_(0, 2**self.bits - 1), group

    def forward(self, x: Tensor) -> Tensor:
        codes, group = self.encode(x)
        scale, zero_point = self.grids()
        return codes.sub_(zero_point[group]).mul_(scale[group]).to(x.dtype)

    def operations(self, shape: tuple[int, ...]) -> int:
        """Its ranges, then the distances to every grid.

        Channels: 2 comparisons a value, 4 operations a channel and grid. Rows: one, and 2 a row and grid.
        """
        values = torch.Size(shape).numel()
        if self.axis == "rows":
            return FLOAT_BITS * (values + 2 * self.groups * values // shape[-1])
        return FLOAT_BITS * (2 * values + 4 * self.groups * shape[0] * shape[-1])


class ChannelQuantizer(ActivationQuantizer):
    """A grid for every channel of every image, from its own range: what grouping can reach at best.

    No integer product can run it, since the scale changes along the sum; it is a bound to compare with.
    """

    kind = "channel"

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = bounds_grid(*extent(x, "channels"), self.bits)
        codes = (x.float() / scale).add_(zero_point).round_().clamp_(0, 2**self.bits - 1)
        return codes.sub_(zero_point).mul_(scale).to(x.dtype)

    def operations(self, shape: tuple[int, ...]) -> int:
        return 2 * FLOAT_BITS * torch.Size(shape).numel()


def extent(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Bounds of each channel over an image's tokens, (images, 1, channels), or of each row, (..., 1); float32.

    Raises: ValueError for channels of a tensor without tokens.
    """
    if axis == "rows":
        high = x.float().amax(-1, keepdim=True)
        return torch.zeros_like(high), high
    if x.dim() < 3:
        raise ValueError(
            f"channels are ranged over tokens: x is (images, ..., channels), not {tuple(x.shape)}"
        )
    tokens = tuple(range(1, x.dim() - 1))
    return x.float().amin(tokens, keepdim=True), x.float().amax(tokens, keepdim=True)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of integers: exact, in float64, which every device multiplies and which holds them up to 2**53."""
    return a.double() @ b.double()


def integer_linear(
    x: Tensor, quantizer: GroupedQuantizer, weight: QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias as one integer product per group, whose partial sums are added in floating point.

        y_nk = sum_i s_i (sum_c q_nc w_kc - z_i sum_c w_kc) s_k,  c over the channels of group i

    Args:
        x: (images, tokens, in). quantizer: of axis `channels`. weight: (out, in), one scale a row.
    Returns: (images, tokens, out) float32: what the linear layer gives for the fake-quantized x and weight.
    Raises: ValueError for a weight with more than one scale a row.
    """
    if weight.scale.shape[1] != 1:
        raise ValueError(f"an integer product takes one weight scale a row, not {weight.scale.shape[1]}")
    codes, group = quantizer.encode(x)
    scale, zero_point = quantizer.grids()
    w = (weight.codes.int() - weight.zero_point.int()).T  # (in, out)
    total = torch.zeros(*x.shape[:-1], len(weight.codes), device=x.device)
    for i in range(quantizer.groups):
        mine = (group == i).float()  # a kernel would gather these channels; the others are zeros here
        partial = integer_product(codes * mine, w) - zero_point[i] * integer_product(mine, w)
        total += (scale[i] * partial).float()
    y = total * weight.scale.float().squeeze(1)
    return y if bias is None else y + bias


def integer_attention(p: Tensor, rows: GroupedQuantizer, value: Tensor, values: UniformQuantizer) -> Tensor:
    """P V as one integer product; the scale of a row of P is applied to the row of the output.

    Args:
        p: (images, heads, queries, keys), quantizer of axis `rows`; value: (images, heads, keys, width).
        values: per head or per tensor, so that its scale does not change along the keys.
    Returns: (images, heads, queries, width) float32.
    """
    codes, group = rows.encode(p)
    scale, zero_point = rows.grids()
    v = (value.float() / values.scale + values.zero_point).round_().clamp_(0, 2**values.bits - 1)
    product = integer_product(codes - zero_point[group], v - values.zero_point)
    return (product * (scale[group] * values.scale)).float()
