"""Fixed point: x ~ scale * q with q a whole number of few bits and no zero-point, so that zero is exact.

Signed codes are -(2**(bits-1) - 1) to 2**(bits-1) - 1, one short of two's complement, so that both sides are alike;
unsigned codes are 0 to 2**bits - 1. This is what `fixed_point_training` trains with (Kim et al. 2024,
arXiv:2407.12637, section 6 of its code's forward quantizers) and what its checkpoints run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """The least and the largest code."""
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return (-top if signed else 0), top


def nearest_codes(x: Tensor, scale: Tensor, bits: int, *, signed: bool) -> Tensor:
    """The codes of the nearest grid points, as whole numbers in the dtype of x; `scale` broadcasts against it."""
    low, high = code_range(bits, signed=signed)
    return (x / scale).clamp_(low, high).round_()


class FixedPointQuantizer(ActivationQuantizer):
    """A static grid without zero-point for a whole tensor. scale: () float32, the step of the grid."""

    kind = "fixed_point"
    fields = ("signed",)

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__(bits)
        self.signed = signed
        self.register_buffer("scale", torch.ones(()))

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        return nearest_codes(values, self.scale, self.bits, signed=self.signed).mul_(self.scale).to(x.dtype)
