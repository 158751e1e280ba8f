"""How wide the grid of a layer's gradient is: c = gamma * max|g|, and the rules that find gamma.

The large-gradient rule (Kim et al. 2024, arXiv:2407.12637) bounds the error of the largest gradients, the top share
alpha, by U(gamma) = [(alpha - R) gamma / (2**b - 2) + R (1 - gamma)] / alpha, where R is the share that is clipped.
U is least where R = alpha / (2**b - 1): more clipped, and gamma grows by beta; less, and it shrinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA_MIN = 0.001
WARM_MOMENTUM = 0.999
_BINS = 2048
_CANDIDATES = 100


def largest_of(g: Tensor) -> Tensor:
    """max|g|, without a copy of g."""
    low, high = g.aminmax()
    return torch.maximum(-low, high)


def clipped_share(g: Tensor, half_width: Tensor) -> Tensor:
    """R, the share of |g| > half_width, in float64.

    Compared in place: a mask of its own and its count take three times as long on a CPU.
    """
    return g.abs().gt_(half_width).sum().double() / g.numel()


def target_share(alpha: float, bits: int) -> float:
    """The clipped share at which the bound is least."""
    return float(alpha / (2**bits - 1))


def bound(gamma: float, share: float, alpha: float, bits: int) -> float:
    """U(gamma), in units of max|g|, for round to nearest; 1 / (2**bits - 1) wherever `share` is the target."""
    return float(((alpha - share) * gamma / (2**bits - 2) + share * (1 - gamma)) / alpha)


def stepped(gamma: Tensor, share: Tensor, *, alpha: float, beta: float, bits: int) -> Tensor:
    """gamma for the next iteration, from the share that this one clipped."""
    sign = torch.sign(share - target_share(alpha, bits)).to(gamma.dtype)
    return (gamma + beta * sign).clamp(GAMMA_MIN, 1.0)


def warm_start(g: Tensor, *, alpha: float, beta: float, bits: int) -> Tensor:
    """gamma after the first iteration: from 1 down by beta until the running mean of R passes the target.

    The mean starts at 0 with momentum 0.999 and lags, so gamma overshoots and climbs back in training, as published.
    """
    steps = int((1 - GAMMA_MIN) / beta)
    gammas = 1 - beta * torch.arange(steps + 1, dtype=torch.float64)
    ratio = g.detach().abs().flatten().double() / largest_of(g).double()
    edges = gammas.flip(0).to(g.device)
    below = torch.bincount(torch.bucketize(ratio, edges), minlength=steps + 2).cumsum(0)[: steps + 1]
    shares = (1 - below.double() / g.numel()).flip(0).cpu()  # of |g| > gamma, for each gamma
    mean, target = 0.0, target_share(alpha, bits)
    for gamma, share in zip(gammas.tolist(), shares.tolist(), strict=True):
        mean = WARM_MOMENTUM * mean + (1 - WARM_MOMENTUM) * share
        if mean > target:
            return torch.tensor(max(gamma, GAMMA_MIN), dtype=torch.float32, device=g.device)
    return torch.tensor(GAMMA_MIN, dtype=torch.float32, device=g.device)


def least_squares(g: Tensor, bits: int) -> Tensor:
    """The gamma of least expected squared error over ALL gradients under stochastic rounding: the usual rule.

    Searched over 100 candidates on a histogram of |g| / max|g| with 2048 bins. Inside the interval a value that lies
    at share f between two levels s apart has the variance s^2 f (1 - f); outside it is clipped.
    """
    counts = torch.histc((g.abs() / largest_of(g)).float(), _BINS, 0.0, 1.0).double()
    centres = (torch.arange(_BINS, dtype=torch.float64, device=g.device) + 0.5) / _BINS
    gammas = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64, device=g.device).unsqueeze(1) / _CANDIDATES
    step = gammas / (2 ** (bits - 1) - 1)
    place = centres / step
    part = place - place.floor()
    inside = step**2 * part * (1 - part)
    error = torch.where(centres <= gammas, inside, (centres - gammas) ** 2) @ counts
    return gammas[error.argmin(), 0].float()


def errors(g: Tensor, g_hat: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mean |g - g_hat| / max|g| over the top share alpha by magnitude, and over all; float32, 0-dimensional."""
    magnitude = g.abs().flatten()
    error = (g - g_hat).abs_().flatten()
    count = max(1, round(alpha * g.numel()))
    largest, places = magnitude.topk(count, sorted=False)
    top = largest.amax().float()
    return error[places].float().mean() / top, error.mean(dtype=torch.float32) / top
