"""Sampling as linear maps: x' = a x + b output + sigma z, one for each step of a diffusers scheduler.

Song et al., "Denoising Diffusion Implicit Models", 2021, arXiv:2010.02502, eq. 12 and 16; Ho et al., "Denoising
Diffusion Probabilistic Models", 2020, arXiv:2006.11239, eq. 7. `output` is what the network predicts: noise,
velocity or sample. Steps are counted by their index, 0 at the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

from quantry.diffusion_schedulers import PREDICTIONS, VARIANCES
from worker.errors import ModelError, RecipeError

# Maps a latent (batch, C, H, W) and the index of a step to the network's output, (batch, C, H, W).
Denoiser = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Step:
    """One step. timestep: what the network is told. a, b, sigma: computed in float64.

    scale: the network is fed scale * x.
    """

    timestep: float
    a: float
    b: float
    sigma: float
    scale: float = 1.0

    def advance(self, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """The next latent. noise: standard normal, in the shape of x; needed where sigma > 0."""
        moved = self.a * x + self.b * output
        if self.sigma == 0:
            return moved
        assert noise is not None, "this step adds noise"
        return moved + self.sigma * noise


def read_steps(scheduler: Any, count: int, *, eta: float = 0.0) -> tuple[Step, ...]:
    """The steps that `scheduler` takes to sample in `count` of them, spaced as its config says.

    Args:
        scheduler: a DDIMScheduler or DDPMScheduler, or for one step a CMStochasticIterativeScheduler; it is left
            as it is.
        eta: share of DDPM's noise that DDIM adds, at least 0; DDPM has its own.
    Raises:
        ModelError: another scheduler, one whose step is not linear, or coefficients that are not finite.
        RecipeError: `count` or `eta` that the scheduler cannot take.
    """
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return (_consistency_step(scheduler, count),)
    _refuse_nonlinear(scheduler)
    limit = scheduler.config.num_train_timesteps
    if not 1 <= count <= limit:
        raise RecipeError(f"steps: {count} is not between 1 and {limit}, the scheduler's training steps")
    ddim = isinstance(scheduler, DDIMScheduler)
    if eta < 0 or (eta > 0 and not ddim):
        raise RecipeError(f"eta: {eta} with {type(scheduler).__name__}; at least 0 with DDIM, 0 with DDPM")
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(count)
    times = [int(t) for t in fresh.timesteps]
    if len(times) != count or min(times) < 0:
        raise RecipeError(
            f"steps: {fresh.config.timestep_spacing} spacing of {count} steps over {limit} gives {len(times)} "
            f"timesteps, down to {min(times)}; use {count - 1} or {count + 1}"
        )
    if times[0] >= limit:
        raise RecipeError(
            f"steps: {count} steps start at timestep {times[0]}, beyond {limit - 1}; use fewer steps "
            "or a scheduler config with less `steps_offset`"
        )
    make = _ddim_step if ddim else _ddpm_step
    return tuple(make(fresh, times, index, eta) for index in range(len(times)))


def _consistency_step(scheduler: Any, count: int) -> Step:
    """The one step of a consistency model: Song et al., 2023, arXiv:2303.01469, appendix C, from unit noise.

    Samples are clamped when they become images, so the scheduler's own clamp, in the last step, changes nothing.
    """
    if count != 1:
        raise RecipeError(f"steps: {count} of a consistency model; its step is linear only alone: use 1")
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(1)
    sigma = fresh.sigmas[0].double()
    skip, out = (float(value) for value in fresh.get_scalings_for_boundary_condition(sigma))
    start = float(fresh.init_noise_sigma)
    scale = start / math.sqrt(float(sigma) ** 2 + fresh.config.sigma_data**2)
    return Step(float(fresh.timesteps[0]), start * skip, out, 0.0, scale)


def _refuse_nonlinear(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        raise ModelError(f"scheduler: {name} has no linear step; use DDIMScheduler or DDPMScheduler")
    config = scheduler.config
    for field in ("clip_sample", "thresholding"):
        if config.get(field):
            raise ModelError(
                f"scheduler_config.json: {field} bends every step of {name}; set it to false "
                "and check that the model still samples well"
            )
    if config.prediction_type not in PREDICTIONS:
        raise ModelError(f"scheduler_config.json: prediction_type {config.prediction_type!r} is not known")
    if isinstance(scheduler, DDPMScheduler) and config.variance_type not in VARIANCES:
        raise ModelError(
            f"scheduler_config.json: variance_type {config.variance_type!r} is none of {', '.join(VARIANCES)}"
        )


def _predictions(kind: str, alpha: float) -> tuple[float, float, float, float]:
    """(p, q, r, s): the sample is p x + q output, the noise r x + s output, at cumulative alpha."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "v_prediction":
        return signal, -noise, noise, signal
    if kind == "sample":
        return 0.0, 1.0, _ratio(1, noise), -_ratio(signal, noise)
    return _ratio(1, signal), -_ratio(noise, signal), 0.0, 1.0


def _ratio(above: float, below: float) -> float:
    if below == 0:
        raise ModelError(
            "scheduler_config.json: the noise schedule reaches a timestep without signal or without noise, "
            "where this prediction_type says nothing; use v_prediction or another timestep_spacing"
        )
    return above / below


def _ddim_step(scheduler: Any, times: list[int], index: int, eta: float) -> Step:
    time = times[index]
    before = time - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha = float(scheduler.alphas_cumprod[time])
    alpha_next = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod)
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    sigma = eta * math.sqrt(max(0.0, variance))
    left = 1 - alpha_next - sigma**2
    if left < -1e-12:
        raise RecipeError(f"eta: {eta} asks for more noise than timestep {time} has; use at most 1")
    left = max(0.0, left)  # with eta 1 at a timestep without signal it is 0, but for rounding
    p, q, r, s = _predictions(scheduler.config.prediction_type, alpha)
    to_sample, to_noise = math.sqrt(alpha_next), math.sqrt(left)
    return Step(time, to_sample * p + to_noise * r, to_sample * q + to_noise * s, sigma)


def _ddpm_step(scheduler: Any, times: list[int], index: int, eta: float) -> Step:
    time = times[index]
    last = index == len(times) - 1
    alpha = float(scheduler.alphas_cumprod[time])
    alpha_next = 1.0 if last else float(scheduler.alphas_cumprod[times[index + 1]])
    beta = 1 - alpha / alpha_next
    p, q, _, _ = _predictions(scheduler.config.prediction_type, alpha)
    from_sample = math.sqrt(alpha_next) * beta / (1 - alpha)
    from_latent = math.sqrt(alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)
    large = scheduler.config.variance_type == "fixed_large"
    variance = beta if large else (1 - alpha_next) / (1 - alpha) * beta
    sigma = math.sqrt(variance) if time > 0 else 0.0
    return Step(time, from_latent + from_sample * p, from_sample * q, sigma)
