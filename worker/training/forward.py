"""Forward quantizers with a learned range: round to nearest, straight through in the backward pass.

x_hat = r * R(clip(x / r, -1 or 0, 1)), with R rounding to 2**(bits-1) - 1 steps a side (signed) or 2**bits - 1 steps
(unsigned). The range r is learned: its gradient is that of the division, the clip and the multiplication
(arXiv:2407.12637 and its released code; the same as LSQ's and PACT's).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantry.quantizers.fixed_point import code_range, nearest_codes

_HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # the deviation of |x| for x ~ N(0, 1)


class _LearnedRange(torch.autograd.Function):
    """Saves x, r and x_hat. The layer's product keeps x_hat, too, so that this costs no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor, bits: int, signed: bool) -> Tensor:
        scale = scale_of(limit, bits, signed=signed)
        x_hat = nearest_codes(x, scale, bits, signed=signed).mul_(scale)
        ctx.save_for_backward(x, limit, x_hat)
        ctx.signed = signed
        return x_hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, limit, x_hat = ctx.saved_tensors
        low = -limit if ctx.signed else torch.zeros_like(limit)
        inside = x.clamp(low, limit).eq_(x)  # 1 or 0 in the dtype of x: products with bool are slower
        of_limit = None
        if ctx.needs_input_grad[1]:
            # inside: (x_hat - x) / r; outside: 1, -1, or 0 below an unsigned grid
            error = torch.addcmul(x_hat, x, inside, value=-1)
            of_limit = error.mul_(grad).sum() / limit
        return inside.mul_(grad), of_limit, None, None


def fake_quantize(x: Tensor, limit: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Move x to the grid of range `limit`, a 0-dimensional parameter > 0; differentiable in both."""
    return _LearnedRange.apply(x, limit, bits, signed)  # type: ignore[no-any-return, no-untyped-call]


def scale_of(limit: Tensor, bits: int, *, signed: bool) -> Tensor:
    """The step of the grid of range `limit`."""
    return limit / code_range(bits, signed=signed)[1]


def initial_range(x: Tensor, *, signed: bool) -> Tensor:
    """Three standard deviations of x; of what x >= 0 is half of, where the grid is unsigned. 1 if x is constant."""
    deviation = x.detach().float().std(correction=0) / (1.0 if signed else _HALF_NORMAL)
    return torch.where(deviation > 0, 3 * deviation, torch.ones_like(deviation))
