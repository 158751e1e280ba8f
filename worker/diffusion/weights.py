"""Weights of a UNet on their grids: a grid for each output channel, or for each half of a concatenated input.

Split shortcuts: Li et al., "Q-Diffusion: Quantizing Diffusion Models", 2023, arXiv:2302.04304, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quantry.quantizers.affine import QuantizedWeight, quantize_to_grid
from quantry.quantizers.steps import channel_halves
from worker.errors import NonFiniteError
from worker.methods.grids import Grid, clipped_grid, minmax_grid
from worker.methods.rtn import on_grid

Clip = Literal["none", "mse"]
SEARCH = 48  # ranges tried for each row


@dataclass(frozen=True)
class UNetWeight:
    """A weight on its grids.

    parts: for each half of the input channels, or for all, the flattened (out, in * kernel) weight.
    shape: of the whole weight, (out, in) or (out, in, height, width).
    """

    parts: tuple[QuantizedWeight, ...]
    shape: torch.Size

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return torch.cat([part.dequantize() for part in self.parts], dim=1).view(self.shape)

    def storage_bits(self) -> int:
        return sum(part.storage_bits() for part in self.parts)


def halves(weight: Tensor, split: tuple[int, int] | None) -> tuple[Tensor, ...]:
    """The flattened parts of a weight (out, in, ...) that have grids of their own, each (out, columns), float32."""
    return tuple(part.flatten(1).float() for part in channel_halves(weight, split))


def fit_weight_grid(part: Tensor, bits: int, clip: Clip, *, symmetric: bool = False) -> Grid:
    """The grid of each row of a part (out, columns): scale and zero_point (out, 1)."""
    if clip == "mse":
        return clipped_grid(part.unsqueeze(1), bits, symmetric=symmetric, steps=SEARCH)
    return minmax_grid(part.unsqueeze(1), bits, symmetric=symmetric)


def quantize_weight(
    weight: Tensor,
    bits: int,
    *,
    split: tuple[int, int] | None = None,
    clip: Clip = "mse",
    symmetric: bool = False,
) -> UNetWeight:
    """Round `weight` (out, in, ...) to the nearest points.

    split: channels of each half of a concatenated input. clip: cover each row (`none`) or search the range of
    least squared error. Raises NonFiniteError.
    """
    if not torch.isfinite(weight).all():
        raise NonFiniteError("a weight holds NaN or infinity")
    parts = []
    for part in halves(weight.detach(), split):
        grid = fit_weight_grid(part, bits, clip, symmetric=symmetric)
        parts.append(on_grid(quantize_to_grid(part, grid.scale, grid.zero_point, bits), grid, None))
    return UNetWeight(tuple(parts), weight.shape)


@torch.no_grad()
def set_weights(network: nn.Module, weights: Mapping[str, UNetWeight]) -> None:
    """Write the values of quantized weights into the layers of a network, by layer name."""
    for name, weight in weights.items():
        target = network.get_submodule(name).get_parameter("weight")
        target.copy_(weight.dequantize())
