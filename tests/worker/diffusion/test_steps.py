"""Steps as linear maps: the scheduler's own `step`, trajectory by trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from worker.diffusion.steps import read_steps
from worker.errors import ModelError, RecipeError

SHAPE = (2, 1, 5, 3)


def output_of(x: Tensor, timestep: int) -> Tensor:
    """A stand-in for a network: bounded, and different at every step."""
    return torch.sin(3 * x + timestep) + 0.1 * x


def noise_of(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + index))


def assert_same_trajectory(scheduler: Any, count: int, eta: float = 0.0) -> None:
    steps = read_steps(scheduler, count, eta=eta)
    scheduler.set_timesteps(count)
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    ours = theirs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for index, (step, timestep) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        ours = step.advance(ours, output_of(ours, step.timestep), noise_of(index))
        output = output_of(theirs, int(timestep))
        if isinstance(scheduler, DDIMScheduler):
            noise = {"eta": eta, "variance_noise": noise_of(index)} if eta else {}
        else:
            noise = {"generator": torch.Generator().manual_seed(100 + index)}
        theirs = scheduler.step(output, timestep, theirs, **noise).prev_sample
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)
        ours = theirs  # the stand-in is chaotic: each step is compared from the same latent


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 7, 20, 100])
def test_ddim_agrees_with_the_scheduler(prediction: str, spacing: str, count: int) -> None:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction, timestep_spacing=spacing)
    assert_same_trajectory(scheduler, count)
    assert_same_trajectory(scheduler, count, eta=0.7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_ddpm_agrees_with_the_scheduler(prediction: str, variance: str, count: int) -> None:
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDPMScheduler(
            clip_sample=False, prediction_type=prediction, variance_type=variance, timestep_spacing=spacing
        )
        assert_same_trajectory(scheduler, count)


def test_other_schedules_agree_too() -> None:
    assert_same_trajectory(
        DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", num_train_timesteps=97), 10, eta=1
    )
    assert_same_trajectory(DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), 30)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert_same_trajectory(DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **zero_snr), 10)


def test_whole_trajectories_agree_where_the_network_is_smooth() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    steps = read_steps(scheduler, 50)
    scheduler.set_timesteps(50)
    ours = theirs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for step in steps:
        ours = step.advance(ours, torch.tanh(ours))
        theirs = scheduler.step(torch.tanh(theirs), step.timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_scheduler_is_left_alone() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    before = scheduler.timesteps.clone()
    read_steps(scheduler, 5)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "clip_sample"),
        (DDPMScheduler(clip_sample=False, thresholding=True), "thresholding"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), "learned_range"),
        (
            DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "v_prediction",
        ),
    ],
)
def test_schedulers_without_a_linear_step_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_steps(scheduler, 10)


@pytest.mark.parametrize(
    ("count", "eta", "message"),
    [(0, 0.0, "steps: 0"), (1001, 0.0, "1000"), (10, -0.1, "eta"), (10, 3.0, "use at most 1")],
)
def test_steps_that_cannot_be_taken_are_refused(count: int, eta: float, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_steps(DDIMScheduler(clip_sample=False), count, eta=eta)


def test_steps_that_the_scheduler_does_not_have_are_refused() -> None:
    with pytest.raises(RecipeError, match="DDPM"):
        read_steps(DDPMScheduler(clip_sample=False), 10, eta=0.5)
    with pytest.raises(RecipeError, match="steps_offset"):
        read_steps(DDIMScheduler(clip_sample=False, steps_offset=1), 1000)


def test_a_spacing_that_makes_another_number_of_steps_is_refused() -> None:
    """diffusers rounds 61 trailing steps over 1000 to 62, the last at timestep -1."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    with pytest.raises(
        RecipeError, match=r"trailing spacing of 61 steps over 1000 gives 62 timesteps, down to -1"
    ):
        read_steps(scheduler, 61)
    assert len(read_steps(scheduler, 60)) == 60


def test_all_of_the_noise_is_not_more_than_there_is() -> None:
    """Without signal at the start, eta 1 leaves nothing of the noise but a rounding error."""
    scheduler = DDIMScheduler(
        num_train_timesteps=100,
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    assert all(step.sigma >= 0 for step in read_steps(scheduler, 7, eta=1.0))
