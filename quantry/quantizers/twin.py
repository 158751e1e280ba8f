"""Twin uniform grids for activations with a dense and a sparse range (PTQ4ViT: Yuan et al. 2022, arXiv:2111.12293).

A code of k bits is one bit that names the range and a magnitude of k - 1 bits; qmax = 2**(k - 1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer

GELU_MINIMUM = -0.1699712075  # of x * Phi(x), where x = -0.7518


def twin_softmax(p: Tensor, split: Tensor, bits: int, form: Literal["nearest", "sum"]) -> Tensor:
    """Probabilities on two grids of 2**(bits-1) levels each, over [0, split] and over [0, 1].

    p: float32 in [0, 1]; split: broadcast against it, in (0, 1]; the result has their common shape.
    nearest: the closer point of the two grids, so that the map is monotone and 0 and 1 are exact.
    sum: as published: both grids are added, each fed the part of p in its range, [0, split] and [split, 1].
    """
    levels: int = 2 ** (bits - 1) - 1
    dense = (p.minimum(split) * (levels / split)).round_() * (split / levels)
    if form == "sum":
        return dense + (p.clamp(max=1).maximum(split) * levels).round_() / levels
    sparse = (p.clamp(max=1) * levels).round_() / levels
    return torch.where((p - dense).abs_() <= (p - sparse).abs_(), dense, sparse)


def twin_gelu(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Outputs of GELU: steps of `scale` above 0 (eq. 2), of -GELU_MINIMUM / qmax below, where the range is known.

    x: float32; scale: > 0, broadcast against it. No point of one side is closest to a value of the other.
    """
    qmax: int = 2 ** (bits - 1)
    step = -GELU_MINIMUM / qmax
    positive = (x / scale).round_().clamp_(0, qmax - 1) * scale
    return positive + (x / step).round_().clamp_(-qmax, 0) * step


class TwinSoftmax(ActivationQuantizer):
    """Probabilities of attention: see `twin_softmax`. split: (), one for all heads."""

    kind = "twin_softmax"
    fields = ("form",)

    def __init__(self, bits: int, form: Literal["nearest", "sum"] = "nearest") -> None:
        super().__init__(bits)
        self.form: Literal["nearest", "sum"] = form
        self.register_buffer("split", torch.ones(()))

    split: Tensor

    def forward(self, p: Tensor) -> Tensor:
        return twin_softmax(p.float(), self.split, self.bits, self.form).to(p.dtype)


class TwinGelu(ActivationQuantizer):
    """Outputs of GELU: see `twin_gelu`. scale: (), the step of the positive range."""

    kind = "twin_gelu"

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("scale", torch.ones(()))

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return twin_gelu(x.float(), self.scale, self.bits).to(x.dtype)
