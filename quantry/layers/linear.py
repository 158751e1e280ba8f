"""A linear layer that stays packed in memory and makes its weight when it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantry.layers.positions import Locator, position_bias_of
from quantry.quantizers.affine import QuantizedWeight
from quantry.quantizers.packing import pack, packed_words, unpack

_CHUNK = 1 << 24  # weights made at a time: 64 MiB in float32


@dataclass(frozen=True)
class LinearFormat:
    """What is stored for one layer. `positions`: rows of the position bias, 0 for none."""

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype
    bias: bool
    positions: int = 0


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that `QuantizedLinear` reads, by their names in it."""
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits),
        "weight_scale": weight.scale.contiguous(),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = pack(weight.zero_point, weight.bits)
    return tensors


class QuantizedLinear(nn.Module):
    """y = x W^T + bias (+ position bias), W = scale * (code - zero_point).

    Buffers: weight_packed int32 (out, words), weight_scale (out, groups), weight_zero_point int32 (out,
    words) unless symmetric, bias float32 (out,), position_bias float32 (positions, out). W is made in float32
    and rounded once to the dtype of x; never more than 64 MiB of it exist at a time for wide layers.
    """

    def __init__(
        self, in_features: int, out_features: int, form: LinearFormat, positions: Locator | None = None
    ) -> None:
        super().__init__()
        if form.group_size is not None and in_features % form.group_size:
            raise ValueError(f"groups of {form.group_size} do not divide {in_features} input columns")
        self.in_features = in_features
        self.out_features = out_features
        self.form = form
        self.positions = positions
        groups = in_features // form.group_size if form.group_size else 1
        words = packed_words(in_features, form.bits)
        self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=form.scale_dtype))
        zero_words = packed_words(groups, form.bits)
        zero = None if form.symmetric else torch.zeros(out_features, zero_words, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero)
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if form.bias else None)
        table = torch.zeros(form.positions, out_features, dtype=torch.float32) if form.positions else None
        self.register_buffer("position_bias", table)

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    position_bias: Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """The dense weight of these output rows: (rows, in)."""
        codes = unpack(self.weight_packed[rows], self.form.bits, self.in_features)
        scale = self.weight_scale[rows].float().unsqueeze(-1)
        values = codes.view(len(codes), scale.shape[1], -1).float()
        del codes
        if self.weight_zero_point is None:
            values -= float(2 ** (self.form.bits - 1))
        else:
            zero = unpack(self.weight_zero_point[rows], self.form.bits, scale.shape[1])
            values -= zero.unsqueeze(-1).float()
        values *= scale
        return values.view(len(values), -1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        step = max(1, _CHUNK // self.in_features)
        if step >= self.out_features:
            y = linear(x, self.dequantize(x.dtype), bias)
        else:
            parts = [slice(start, start + step) for start in range(0, self.out_features, step)]
            y = torch.cat([self._part(x, bias, part) for part in parts], dim=-1)
        return y if self.position_bias is None else y + self._position_bias(x)

    def _part(self, x: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        return linear(x, self.dequantize(x.dtype, rows), None if bias is None else bias[rows])

    def _position_bias(self, x: Tensor) -> Tensor:
        """The bias of each token of x, (batch, sequence, in) or flattened to (batch * sequence, in)."""
        if self.positions is None or self.position_bias is None:
            raise RuntimeError(
                "a layer with a bias per position runs only inside the model it was loaded with"
            )
        bias = position_bias_of(self.position_bias, self.positions.of(x)).to(x.dtype)
        if x.dim() == 3:
            return bias
        sequence = bias.shape[1]
        return bias.expand(x.shape[0] // sequence, -1, -1).reshape(x.shape[0], -1)

    def extra_repr(self) -> str:
        form = self.form
        return f"{self.in_features}, {self.out_features}, bits={form.bits}, group_size={form.group_size}"
