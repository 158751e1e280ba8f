"""Logarithmic grids for tensors with a peak at one end: softmax outputs, and GELU outputs moved above zero."""

from __future__ import annotations

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer


class LogQuantizer(ActivationQuantizer):
    """x ~ scale * 2**(-exponent * q) - shift, q the integer nearest to -log2((x + shift) / scale) / exponent.

    Codes of 2**bits and above stand for 0, as in RepQ-ViT (arXiv:2212.08254, exponent 1/2: base sqrt(2)) and
    AdaLog (exponent k / 37): so the grid has 2**bits points and, beside them, the exact zero (-shift).
    Values above `scale - shift` become `scale - shift`, values below `-shift` become `-shift`.

    shape: of scale, exponent and shift, float32, broadcast against the tensor: [] per tensor, [H, 1, 1] per
    head. scale and exponent are positive; shift is not negative.
    """

    kind = "log"
    fields = ("shape",)

    def __init__(self, bits: int, shape: list[int]) -> None:
        super().__init__(bits)
        self.shape = list(shape)
        self.register_buffer("scale", torch.ones(self.shape))
        self.register_buffer("exponent", torch.full(self.shape, 0.5))
        self.register_buffer("shift", torch.zeros(self.shape))

    scale: Tensor
    exponent: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        ratio = (x.float() + self.shift).clamp_(min=0).div_(self.scale)
        q = ratio.log2_().div_(-self.exponent).round_().clamp_(min=0)  # infinite for a ratio of 0
        points = torch.exp2(-self.exponent * q).mul_(self.scale)
        return points.masked_fill_(q >= 2**self.bits, 0).sub_(self.shift).to(x.dtype)
