"""Where PTQ4ViT looks for a grid: the candidates of each kind of tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.twin import TwinGelu, TwinSoftmax, twin_gelu, twin_softmax
from quantry.recipe import RtnStep
from worker.methods.grids import minmax_grid, store_scale
from worker.methods.rtn import by_group, rtn

ALPHA, BETA = 0.01, 1.2  # candidates, as shares of the scale that covers the range
SPLITS = 20  # m = 0 .. 19 of the softmax split 2**-m


@dataclass(frozen=True)
class Space:
    """Where the grids of a tensor are searched. U: grids chosen apart (heads, output channels, or 1).

    candidates: (n, U, parameters). incumbent: (U, parameters), what is used before a search.
    quantize: x and (n, U, parameters) to (n, *x.shape).
    """

    candidates: Tensor
    incumbent: Tensor
    quantize: Callable[[Tensor, Tensor], Tensor]

    def quantize_one(self, x: Tensor, parameters: Tensor) -> Tensor:
        """x on the grids (U, parameters)."""
        return self.quantize(x, parameters.unsqueeze(0))[0]


@dataclass(frozen=True)
class OperandSpace(Space):
    """Of an activation: `build` makes its quantizer of (U, parameters)."""

    build: Callable[[Tensor], ActivationQuantizer]


def unquantized(device: torch.device) -> Space:
    """Of a tensor that is left as it is: no candidate."""
    return Space(
        torch.empty(0, 1, 0, device=device),
        torch.empty(1, 0, device=device),
        lambda x, parameters: x.expand(len(parameters), *x.shape),
    )


def shares(count: int, device: torch.device) -> Tensor:
    """alpha + i (beta - alpha) / n for i = 0 .. n - 1: (n, 1, 1)."""
    return (ALPHA + torch.arange(count, device=device) * ((BETA - ALPHA) / count)).view(-1, 1, 1)


def uniform_space(low: Tensor, high: Tensor, bits: int, count: int) -> OperandSpace:
    """Parameters (scale, zero_point), of symmetric and of asymmetric grids. low, high: () or (H, 1, 1)."""
    shape, device, half = list(low.shape), low.device, 2 ** (bits - 1)
    covering = UniformQuantizer.covering(low, high, bits)
    reach = torch.maximum(high, -low).clamp(min=1e-30)
    scales = torch.stack([reach / (half - 0.5), covering.scale]).view(2, -1)
    zeros = torch.stack([torch.full_like(reach, half), covering.zero_point]).view(2, -1)
    grids = torch.stack([scales, zeros], -1)  # (2, U, 2)
    factors = torch.cat([shares(count, device), torch.ones_like(shares(count, device))], -1)
    candidates = (grids.unsqueeze(1) * factors.unsqueeze(0)).flatten(0, 1)

    def quantize(x: Tensor, parameters: Tensor) -> Tensor:
        scale, zero = (_beside(parameters[..., i], x) for i in (0, 1))
        codes = (x / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
        return codes.sub_(zero).mul_(scale)

    def build(parameters: Tensor) -> ActivationQuantizer:
        scale, zero = parameters.unbind(-1)
        quantizer = UniformQuantizer(bits, shape).to(device)
        return quantizer.fill(scale=scale.view(shape), zero_point=zero.view(shape))

    return OperandSpace(candidates, grids[1], quantize, build)


def gelu_space(high: Tensor, bits: int, count: int) -> OperandSpace:
    """Parameter (scale of the positive range). high: ()."""
    base = (high.clamp(min=1e-30) / (2 ** (bits - 1) - 0.5)).view(1, 1)
    return OperandSpace(
        shares(count, high.device) * base,
        base,
        lambda x, parameters: twin_gelu(x, _beside(parameters[..., 0], x), bits),
        lambda parameters: TwinGelu(bits).to(high.device).fill(scale=parameters.view(())),
    )


def softmax_space(bits: int, form: Literal["nearest", "sum"], device: torch.device) -> OperandSpace:
    """Parameter (split), one for all heads."""
    splits = (2.0 ** -torch.arange(SPLITS, device=device)).view(-1, 1, 1)
    return OperandSpace(
        splits,
        splits[0],
        lambda p, parameters: twin_softmax(p, _beside(parameters[..., 0], p), bits, form),
        lambda parameters: TwinSoftmax(bits, form).to(device).fill(split=parameters.view(())),
    )


def weight_space(w: Tensor, step: RtnStep, count: int) -> Space:
    """Parameters (scale of each group, zero-point of each group), for each output channel of w (out, in).

    Candidates are shares of the grid that covers each group; the incumbent is that of `rtn`.
    """
    covering = minmax_grid(by_group(w, step.group_size), step.bits, symmetric=step.symmetric)
    scale = store_scale(shares(count, w.device) * covering.scale)
    plain = rtn(w, step)

    top, half = 2**step.bits - 1, 2 ** (step.bits - 1)

    def quantize(w: Tensor, parameters: Tensor) -> Tensor:
        scale, zero = (part.unsqueeze(-1) for part in parameters.chunk(2, dim=-1))
        codes = (w.view(len(w), scale.shape[-2], -1) / scale).round_()  # less the zero-point
        codes = codes.clamp_(-half, half - 1) if step.symmetric else codes.clamp_(-zero, top - zero)
        return codes.mul_(scale).flatten(2)

    candidates = torch.cat([scale, covering.zero_point.expand_as(scale)], -1)
    return Space(candidates, torch.cat([plain.scale.float(), plain.zero_point.float()], -1), quantize)


def _beside(parameter: Tensor, x: Tensor) -> Tensor:
    """(n, U) so that it broadcasts against x: (T, width) with U = 1, or (B, heads, N, width)."""
    return parameter[:, :, None] if x.dim() == 2 else parameter[:, None, :, None, None]
