"""Corrections of what a quantized network predicts: output' = gain output + shift, for each step and channel.

`ptqd`: He et al., "PTQD: Accurate Post-Training Quantization for Diffusion Models", 2023, arXiv:2305.10657. The error
is a part proportional to the output, a bias for each channel, and noise, which stochastic sampling takes in.
`tac`: Yao et al., "Timestep-Aware Correction for Quantized Diffusion Models", 2024, arXiv:2407.03917, its noise
estimation reconstruction only: a factor for each channel, the minimum of absolute and relative error mixed.
Both are fitted along the trajectory of the quantized network, each step corrected before the next is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker.diffusion.steps import Denoiser, Step
from worker.diffusion.trajectory import Conditioned, SeededNoise, bound
from worker.errors import NonFiniteError

RELATIVE = 0.5  # share of the relative error in TAC's objective
PULL = 0.1  # TAC's weight of (gain - 1)^2
DEVIATION = 1.0  # relative errors above do not count


@dataclass(frozen=True)
class Correction:
    """Of one step, float32: gain and shift (C,), noise () the standard deviation of what no correction takes away."""

    gain: Tensor
    shift: Tensor
    noise: Tensor

    def cpu(self) -> Correction:
        return Correction(self.gain.cpu(), self.shift.cpu(), self.noise.cpu())


# From a quantized and a full-precision output at the same latents, each (samples, C, H, W), float64.
Rule = Callable[[Tensor, Tensor], Correction]


@dataclass(frozen=True)
class corrected:  # noqa: N801  # reads as the function it stands for
    """The denoiser with its output corrected at every step."""

    denoiser: Denoiser
    corrections: Sequence[Correction]

    def __call__(self, x: Tensor, index: int) -> Tensor:
        return _apply(self.corrections[index], self.denoiser(x, index))

    def of(self, seeds: Sequence[int]) -> Denoiser:
        """The same, for batches of these samples."""
        inner = self.denoiser
        return corrected(inner.of(seeds) if isinstance(inner, Conditioned) else inner, self.corrections)


def _apply(correction: Correction, output: Tensor) -> Tensor:
    return output * correction.gain[:, None, None] + correction.shift[:, None, None]


@torch.no_grad()
def fit_corrections(
    full: Denoiser,
    quantized: Denoiser,
    steps: Sequence[Step],
    noise: SeededNoise,
    rule: Rule,
    *,
    absorb: bool = False,
    batch: int = 64,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Correction]:
    """A correction for each step, by `ptqd` or `tac`. Raises NonFiniteError.

    absorb: the steps that lead to the next one add as much less noise. tell: hears (done, total) steps.
    """
    x = noise.start()
    found = []
    for index, step in enumerate(steps):
        parts = list(zip(torch.split(x, batch), noise.batches(batch), strict=True))
        output = torch.cat([bound(quantized, samples)(part, index) for part, samples in parts])
        wanted = torch.cat([bound(full, samples)(part, index) for part, samples in parts])
        if not (torch.isfinite(output).all() and torch.isfinite(wanted).all()):
            raise NonFiniteError(f"step {index}: the network's output holds NaN or infinity")
        found.append(rule(output.double(), wanted.double()))
        moving = absorb_noise([step], found[-1:])[0] if absorb else step
        x = moving.advance(x, _apply(found[-1], output), noise.at(moving, index))
        tell(index + 1, len(steps))
    return found


def ptqd(output: Tensor, wanted: Tensor) -> Correction:
    """output' = (output - bias) / (1 + k): k the slope of the error on `wanted`, used where positive."""
    error = output - wanted
    centred = wanted - wanted.mean()
    power = centred.square().sum()
    k = ((error * centred).sum() / power).clamp(min=0) if power > 0 else power
    rest = error - k * wanted
    bias = rest.mean((0, 2, 3))
    spread = (rest - bias[:, None, None]).square().mean().sqrt()
    gain = 1 / (1 + k)
    return Correction((gain + 0 * bias).float(), (-gain * bias).float(), (gain * spread).float())


def tac(output: Tensor, wanted: Tensor) -> Correction:
    """output' = K output, K minimising the mean over samples and pixels of a channel of

    (1 - RELATIVE) (K output - wanted)^2 + RELATIVE ((K output - wanted) / wanted)^2, plus PULL (K - 1)^2.
    """
    ratio = output / wanted
    counts = (ratio - 1).abs() <= DEVIATION  # False for 0 / 0 too
    ratio = torch.where(counts, ratio, torch.zeros_like(ratio))
    dims = (0, 2, 3)
    top = (1 - RELATIVE) * (output * wanted).mean(dims) + RELATIVE * ratio.mean(dims) + PULL
    bottom = (1 - RELATIVE) * output.square().mean(dims) + RELATIVE * ratio.square().mean(dims) + PULL
    gain = top / bottom
    spread = (gain[:, None, None] * output - wanted).square().mean().sqrt()
    return Correction(gain.float(), torch.zeros_like(gain).float(), spread.float())


def absorb_noise(steps: Sequence[Step], corrections: Sequence[Correction]) -> tuple[Step, ...]:
    """Steps that add less noise by what quantization adds: sigma'^2 = max(0, sigma^2 - (b noise)^2).

    So the variance of a next latent is full precision's. Deterministic steps stay as they are. PTQD, section 3.4.
    """
    absorbed = []
    for step, correction in zip(steps, corrections, strict=True):
        left = step.sigma**2 - (step.b * float(correction.noise)) ** 2
        absorbed.append(replace(step, sigma=math.sqrt(max(0.0, left))))
    return tuple(absorbed)


RULES: dict[str, Rule] = {"ptqd": ptqd, "tac": tac}
