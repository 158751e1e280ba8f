"""Corrections of the predicted noise: exact where the error is of their form, fitted along the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from worker.diffusion.correctors import (
    Correction,
    Rule,
    absorb_noise,
    corrected,
    fit_corrections,
    ptqd,
    tac,
)
from worker.diffusion.steps import Step, read_steps
from worker.diffusion.trajectory import SeededNoise, error_curves, trajectory
from worker.errors import NonFiniteError

SCHEDULER = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
STEPS = read_steps(SCHEDULER, 5)
NOISE = SeededNoise(tuple(range(40)), (2, 6, 6), torch.device("cpu"))
UNSEEN = SeededNoise(tuple(range(100, 120)), (2, 6, 6), torch.device("cpu"))


def full(x: Tensor, index: int) -> Tensor:
    return torch.tanh(x + 0.1 * index)


def with_gain(x: Tensor, index: int) -> Tensor:
    return full(x, index) * (1.1 + 0.05 * index)


def with_bias(x: Tensor, index: int) -> Tensor:
    return with_gain(x, index) + 0.1 * torch.tensor([[[1.0]], [[-2.0]]])


def last_error(denoiser: Any) -> float:
    return float(error_curves(full, denoiser, STEPS, UNSEEN).accumulated[-1].mean())


def test_errors_of_the_corrected_form_vanish() -> None:
    found = fit_corrections(full, with_bias, STEPS, NOISE, ptqd)
    assert last_error(corrected(with_bias, found)) < 1e-4 * last_error(with_bias)
    for index, correction in enumerate(found):
        torch.testing.assert_close(
            correction.gain, torch.full((2,), 1 / (1.1 + 0.05 * index)), rtol=0.02, atol=0
        )
        assert float(correction.noise) < 0.02


def test_a_wrong_gain_is_mostly_taken_back() -> None:
    found = fit_corrections(full, with_gain, STEPS, NOISE, tac)
    assert last_error(corrected(with_gain, found)) < 0.1 * last_error(with_gain)


@pytest.mark.parametrize("rule", [ptqd, tac])
def test_what_is_right_stays(rule: Rule) -> None:
    for correction in fit_corrections(full, full, STEPS, NOISE, rule):
        torch.testing.assert_close(correction.gain, torch.ones(2))
        torch.testing.assert_close(correction.shift, torch.zeros(2))


def test_the_factor_is_the_minimum_of_its_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(8, 1, 5, 5, generator=generator, dtype=torch.float64)
    wanted = wanted.sign() * (0.5 + wanted.abs())
    output = 0.8 * wanted + 0.1 * torch.randn(wanted.shape, generator=generator, dtype=torch.float64)

    def objective(gain: float) -> float:
        error = gain * output - wanted
        mixed = 0.5 * error.square() + 0.5 * (error / wanted).square()
        return float(mixed.mean()) + 0.1 * (gain - 1) ** 2

    best = float(tac(output, wanted).gain)
    assert objective(best) < min(objective(best - 0.01), objective(best + 0.01))
    assert best != pytest.approx(1 / 0.8, abs=1e-3)


def test_each_step_is_fitted_where_the_corrected_steps_before_arrive() -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor, index: int) -> Tensor:
        seen.append(x)
        return with_bias(x, index)

    found = fit_corrections(full, watched, STEPS, NOISE, ptqd)
    x = NOISE.start()
    for index, step in enumerate(STEPS):
        torch.testing.assert_close(seen[index], x)
        x = step.advance(x, corrected(with_bias, found)(x, index))


def test_zeros_do_not_break_a_fit() -> None:
    zero = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for rule in (ptqd, tac):
        correction = rule(zero, zero)
        assert torch.isfinite(correction.gain).all()
        assert torch.isfinite(correction.shift).all()


def test_noise_of_quantization_takes_the_place_of_noise() -> None:
    steps = read_steps(SCHEDULER, 5, eta=1.0)
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, index: int) -> Tensor:
        return full(x, index) + 0.1 * torch.randn(x.shape, generator=generator)

    found = fit_corrections(full, noisy, steps, NOISE, ptqd)
    absorbed = absorb_noise(steps, found)
    for step, less, correction in zip(steps, absorbed, found, strict=True):
        assert float(correction.noise) == pytest.approx(0.1, rel=0.2)
        added = (step.b * float(correction.noise)) ** 2
        assert less.sigma**2 + added == pytest.approx(max(step.sigma**2, added))
    assert 0 < absorbed[0].sigma < steps[0].sigma
    assert absorb_noise(STEPS, found) == STEPS


def test_variance_is_that_of_the_sampler_where_quantization_takes_a_part() -> None:
    """Of sigma z + b e: closed form for e of unit variance, and where e is more than the sampler adds."""
    steps = (Step(1.0, 0.5, -0.8, 1.0), Step(0.0, 0.5, -0.8, 0.5), Step(0.0, 1.0, -0.8, 0.0))
    correction = Correction(torch.ones(1), torch.zeros(1), torch.tensor(1.0))
    less = absorb_noise(steps, [correction] * 3)
    assert less[0].sigma == pytest.approx(0.6)  # 1 - 0.8^2 = 0.6^2
    assert less[1].sigma == less[2].sigma == 0
    generator = torch.Generator().manual_seed(0)
    x, e, z = (torch.randn(100_000, generator=generator) for _ in range(3))
    for wanted, found in zip(steps[:1], less, strict=False):
        noisy = found.advance(x, x + e, z)
        assert float(noisy.var()) == pytest.approx(float(wanted.advance(x, x, z).var()), rel=0.02)


def test_corrections_are_fitted_where_less_noise_leads() -> None:
    steps = read_steps(SCHEDULER, 5, eta=1.0)
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []

    def noisy(x: Tensor, index: int) -> Tensor:
        seen.append(x)
        return full(x, index) + 0.1 * torch.randn(x.shape, generator=generator)

    outputs = [fit_corrections(full, noisy, steps, NOISE, ptqd, absorb=absorb) for absorb in (False, True)]
    assert torch.equal(outputs[0][0].gain, outputs[1][0].gain) is False  # other draws
    whole, less = seen[1], seen[len(steps) + 1]
    assert float(less.var()) < float(whole.var())
    assert float(less.var()) == pytest.approx(float(reference(steps)[1].var()), rel=0.02)


def reference(steps: Sequence[Step]) -> list[Tensor]:
    return [latents.x for latents in trajectory(full, steps, NOISE)]


def test_broken_outputs_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="step 0"):
        fit_corrections(full, lambda x, i: x / 0, STEPS, NOISE, ptqd)
