"""The quantizer of one layer's gradient, and the identity that lets it into the backward pass.

    s = 2c / (2**b - 2),  q = round(clip((g + c) / s + u, 0, 2**b - 2)),  u ~ U(-1/2, 1/2),  g_hat = q s - c

(Kim et al. 2024, arXiv:2407.12637). Here q is counted from 0: -(2**(b-1) - 1) to 2**(b-1) - 1. What the layer's
products see in the backward pass is g_hat, for the gradients of weights and of inputs alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantry.quantizers.fixed_point import code_range
from quantry.training import Interval
from worker.training.interval import (
    clipped_share,
    errors,
    largest_of,
    least_squares,
    stepped,
    warm_start,
)

MSE_PERIOD = 100  # iterations between two searches of the `mse` interval


def stochastic_codes(g: Tensor, half_width: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Codes of g on the grid of half-width c, rounded up with the probability of the part above: unbiased inside.

    The noise has 16 bits, so that the mean is exact to 2**-17 of a step.

    Returns whole numbers in the dtype of g. A tensor of zeros has c = 0 and stays zero.
    """
    _, top = code_range(bits, signed=True)
    step = gradient_scale(half_width, bits)
    noise = _sixteen_bits(g, generator).add_(0.5).mul_(2.0**-16)
    return noise.addcdiv_(g, step).round_().clamp_(-top, top)


def _sixteen_bits(g: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers in [-2**15, 2**15), all alike probable, of the shape, dtype and layout of g.

    Four of each draw of 64 bits: a third of the time of as many draws of a float on a CPU.
    """
    words = torch.empty(-(-g.numel() // 4), dtype=torch.int64, device=g.device)
    words.random_(-(2**63), None, generator=generator)
    layout = torch.empty_like(g, device="meta").stride()  # dense, whatever the strides of g
    return words.view(torch.int16).as_strided(g.shape, layout).to(g.dtype)


def gradient_scale(half_width: Tensor, bits: int) -> Tensor:
    """The step of the grid; the least positive number where the half-width is 0."""
    return (half_width / code_range(bits, signed=True)[1]).clamp(min=torch.finfo(half_width.dtype).tiny)


class GradientQuantizer(nn.Module):
    """Quantizes the gradient of one layer's output and keeps its interval.

    gamma: (), a buffer; the half-width of the grid is gamma * max|g| of the present gradient. largest: () max|g| of
    the last backward pass, for whoever looks for NaN. Both are updated inside the backward pass, so that no gradient
    is kept. In a `warming` pass gamma is 1 and the start of the large-gradient rule is found; in a `measuring` pass
    `large_error` and `error` are set.
    """

    def __init__(
        self, bits: int, interval: Interval, *, alpha: float, beta: float, gamma: float = 1.0
    ) -> None:
        super().__init__()
        self.bits, self.interval, self.alpha, self.beta = bits, interval, alpha, beta
        self.register_buffer("gamma", torch.tensor(gamma if interval == "fixed" else 1.0))
        self.register_buffer("largest", torch.zeros(()), persistent=False)
        self.warming = self.measuring = False
        self.large_error: Tensor | None = None
        self.error: Tensor | None = None
        self.count = 0  # gradients of one pass
        self.reseed(0)

    gamma: Tensor
    largest: Tensor

    def reseed(self, seed: int) -> None:
        """Start the noise again; call it at each epoch, so that a resumed epoch has the same noise."""
        self._seed, self._calls = seed, 0
        self._generator: torch.Generator | None = None

    @property
    def active(self) -> bool:
        """Whether one clipped gradient of the last pass is less than the share that the rule aims at."""
        return bool(self.count * self.alpha >= 2**self.bits - 1)

    @torch.no_grad()
    def codes(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of g (whole numbers in its dtype) and the step of their grid; gamma moves on."""
        self.largest, self.count = largest_of(g), g.numel()
        if self.interval == "mse" and self._calls % MSE_PERIOD == 0:
            self.gamma = torch.where(self.largest > 0, least_squares(g, self.bits), self.gamma)
        half_width = self.largest * self.gamma
        codes = stochastic_codes(g, half_width, self.bits, self._noise(g.device))
        step = gradient_scale(half_width, self.bits)
        if self.measuring:
            self.large_error, self.error = errors(g, codes * step, self.alpha)
        if self.interval == "large_gradient":
            self._move(g, half_width)
        self._calls += 1
        return codes, step

    def forward(self, g: Tensor) -> Tensor:
        codes, step = self.codes(g)
        return codes.mul_(step)

    def _move(self, g: Tensor, half_width: Tensor) -> None:
        rule = {"alpha": self.alpha, "beta": self.beta}
        if self.warming and not self.active:
            return  # the rule keeps the whole range
        if self.warming:
            following = warm_start(g, bits=self.bits, **rule)
        else:
            following = stepped(self.gamma, clipped_share(g, half_width), bits=self.bits, **rule)
        self.gamma = torch.where(self.largest > 0, following, self.gamma)  # a dead pass says nothing

    def _noise(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


class _Backward(torch.autograd.Function):
    """The identity, whose gradient goes through a quantizer."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, quantizer: GradientQuantizer) -> Tensor:
        ctx.quantizer = quantizer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.quantizer(grad), None


def quantize_gradient(y: Tensor, quantizer: GradientQuantizer) -> Tensor:
    """y itself; what flows back from it is quantized."""
    return _Backward.apply(y, quantizer)  # type: ignore[no-any-return, no-untyped-call]
