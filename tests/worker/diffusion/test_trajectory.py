"""Trajectories: seeded, cached at group boundaries, compared step by step."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import SeededNoise, boundaries, error_curves, sample, trajectory

SHAPE = (1, 3, 5)
CPU = torch.device("cpu")
STEPS = read_steps(DDIMScheduler(clip_sample=False), 7, eta=0.6)


def full(x: Tensor, index: int) -> Tensor:
    return torch.tanh(x + 0.1 * index)


def rounded(x: Tensor, index: int) -> Tensor:
    return torch.round(full(x, index) * 8) / 8


def test_a_sample_depends_on_its_seed_and_nothing_else() -> None:
    noise = SeededNoise((3, 1, 4, 1 << 30), SHAPE, CPU)
    whole = sample(full, STEPS, noise)
    torch.testing.assert_close(sample(full, STEPS, noise, batch=2), whole)
    torch.testing.assert_close(sample(full, STEPS, noise.of([2, 0])), whole[[2, 0]])
    draws = [noise.start(), *(noise.at(step, i) for i, step in enumerate(STEPS))]
    flat = torch.cat([draw for draw in draws if draw is not None]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_boundaries_are_latents_of_the_trajectory() -> None:
    noise = SeededNoise(tuple(range(5)), SHAPE, CPU)
    latents = torch.stack([at.x for at in trajectory(full, STEPS, noise)])
    for group, kept in ((1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6, 7]), (7, [0, 7]), (10, [0, 7])):
        torch.testing.assert_close(boundaries(full, STEPS, noise, group=group, batch=2), latents[kept])


def test_gradients_are_never_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    for _, x, _ in trajectory(lambda x, i: weight * x, STEPS, SeededNoise((0,), SHAPE, CPU)):
        assert not x.requires_grad
        assert torch.is_grad_enabled()


def test_errors_are_of_one_step_and_of_all_steps_so_far() -> None:
    noise = SeededNoise(tuple(range(5)), SHAPE, CPU)
    curves = error_curves(full, rounded, STEPS, noise, batch=2)
    assert curves.single.shape == curves.accumulated.shape == (7, 5)
    torch.testing.assert_close(curves.single[0], curves.accumulated[0])
    drift = sample(rounded, STEPS, noise) - sample(full, STEPS, noise)
    torch.testing.assert_close(curves.accumulated[-1], drift.square().flatten(1).mean(1))
    latents = [at.x for at in trajectory(full, STEPS, noise)]
    for index, step in enumerate(STEPS):
        error = step.b * (rounded(latents[index], index) - full(latents[index], index))
        torch.testing.assert_close(
            curves.single[index], error.square().flatten(1).mean(1), atol=1e-9, rtol=1e-3
        )
    assert float(error_curves(full, full, STEPS, noise).accumulated.max()) == 0
