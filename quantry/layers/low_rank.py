"""A linear layer in two branches: a few singular directions in floats, the rest packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantry.layers.linear import LinearFormat, QuantizedLinear


class LowRankLinear(nn.Module):
    """y = x' (up down)^T + Q(x') residual^T + bias, x' = x / smooth.

    Li et al., "SVDQuant", 2025, arXiv:2411.05007. down: (rank, in), up: (out, rank), smooth: (in,), all float.
    residual: packed; its `input_quantizer` rounds what goes through it alone.
    """

    def __init__(self, in_features: int, out_features: int, form: LinearFormat, rank: int) -> None:
        super().__init__()
        self.residual = QuantizedLinear(in_features, out_features, form)
        self.register_buffer("down", torch.zeros(rank, in_features))
        self.register_buffer("up", torch.zeros(out_features, rank))
        self.register_buffer("smooth", torch.ones(in_features))

    down: Tensor
    up: Tensor
    smooth: Tensor

    @property
    def weight(self) -> Tensor:
        """The dense weight that both branches stand for, (out, in) float32, without the rounding of inputs."""
        return (self.up @ self.down + self.residual.dequantize()) / self.smooth

    def forward(self, x: Tensor) -> Tensor:
        scaled = x / self.smooth.to(x.dtype)
        branch = linear(linear(scaled, self.down.to(x.dtype)), self.up.to(x.dtype))
        result: Tensor = self.residual(scaled) + branch
        return result
