"""Calibration over groups of steps: its two gradients against autograd, its memory, and what training does."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from worker.diffusion.accuquant import (
    AccuQuant,
    Gradient,
    Group,
    backward,
    calibrate,
    group_steps,
    train,
)
from worker.diffusion.quantizers import StepNetwork, fake_quantize, trainable
from worker.diffusion.steps import Step, read_steps
from worker.diffusion.trajectory import SeededNoise, error_curves
from worker.errors import NonFiniteError, RecipeError

MakePair = Callable[..., Any]
SILENT = SeededNoise((), (), torch.device("cpu"))


def learned(network: StepNetwork) -> list[Any]:
    return [quantizer for quantizer in network.quantizers.values() if quantizer.learned]


def gradients(pair: Any, indices: range, gradient: Gradient, start: Tensor, target: Tensor) -> Tensor:
    with trainable(learned(pair.quantized)) as parameters:
        backward(pair.quantized, pair.steps, indices, start, target, pair.noise, gradient=gradient)
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def unrolled(pair: Any, indices: range, start: Tensor, target: Tensor) -> Tensor:
    """The same gradient by autograd through all steps at once."""
    with trainable(learned(pair.quantized)) as parameters:
        x = start
        for index in indices:
            z = pair.noise.at(pair.steps[index], index)
            x = pair.steps[index].advance(x, pair.quantized(x, index), z)
        (x - target).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("gradient", ["accuquant", "exact"])
def test_one_step_is_ordinary_reconstruction(make_pair: MakePair, gradient: Gradient) -> None:
    pair = make_pair(group=1, dtype=torch.float64)
    for index, step in enumerate(pair.steps):
        start, target = pair.bounds[index], pair.bounds[index + 1]
        found = gradients(pair, range(index, index + 1), gradient, start, target)
        with trainable(learned(pair.quantized)) as parameters:
            error = pair.quantized(start, index) - pair.full(start, index)
            (step.b**2 * error.square().mean()).backward()
            expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("gradient", ["accuquant", "exact"])
def test_quantizers_of_32_bits_leave_nothing_to_learn(make_pair: MakePair, gradient: Gradient) -> None:
    pair = make_pair(bits=32, dtype=torch.float64)
    with trainable(learned(pair.quantized)) as parameters:
        loss = backward(
            pair.quantized,
            pair.steps,
            range(2),
            pair.bounds[0],
            pair.bounds[1],
            pair.noise,
            gradient=gradient,
        )
        assert loss < 1e-16
        assert max(float(p.grad.abs().max()) for p in parameters if p.grad is not None) < 1e-10


@pytest.mark.parametrize(("group", "eta"), [(1, 0.0), (2, 0.0), (4, 0.0), (4, 0.8)])
def test_exact_is_autograd_through_all_steps(make_pair: MakePair, group: int, eta: float) -> None:
    pair = make_pair(group=group, eta=eta, dtype=torch.float64)
    for g, indices in enumerate(group_steps(4, group)):
        start, target = pair.bounds[g], pair.bounds[g + 1]
        found = gradients(pair, indices, "exact", start, target)
        expected = unrolled(pair, indices, start, target)
        assert float(expected.norm()) > 0
        assert float((found - expected).norm() / expected.norm()) < 1e-9


def test_identity_is_autograd_where_every_jacobian_is_the_identity() -> None:
    steps = read_steps(DDIMScheduler(clip_sample=False), 20)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(20, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def denoiser(x: Tensor, index: int) -> Tensor:
        step = steps[index]
        return (1 - step.a) / step.b * x + offsets[index]

    start, target = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    found = []
    for gradient in ("accuquant", "exact"):
        offsets.grad = None
        backward(denoiser, steps, range(4, 11), start, target, SILENT, gradient=gradient)
        found.append(offsets.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


class Linear:
    """The optimal denoiser of Gaussian data with a power-law spectrum, its weights on 4 bits.

    eps(x, t) = sqrt(1 - alpha_t) (alpha_t S + (1 - alpha_t) I)^-1 x, S the covariance, mean variance 0.25.
    """

    def __init__(self, steps: tuple[Step, ...], alphas: Tensor, width: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        spectrum = torch.arange(1, width + 1, dtype=torch.float64).pow(-1.5)
        spectrum *= 0.25 / spectrum.mean()
        weights = []
        for step in steps:
            alpha = alphas[step.timestep].double()
            gain = (1 - alpha).sqrt() / (alpha * spectrum + 1 - alpha)
            weights.append(basis * gain @ basis.T)
        self.weights = torch.stack(weights)
        self.moved = self.weights.clone().requires_grad_()

    def full(self, x: Tensor, index: int) -> Tensor:
        return x @ self.weights[index].T

    def quantized(self, x: Tensor, index: int) -> Tensor:
        weight = self.moved[index]
        scale = weight.detach().abs().max() / 7
        return x @ fake_quantize(weight, scale, scale.new_tensor(8.0), 4).T


def test_identity_is_close_to_exact_for_linear_denoisers() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    steps = read_steps(scheduler, 100)
    model = Linear(steps, scheduler.alphas_cumprod)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bounds = [x]
    with torch.no_grad():
        for index, step in enumerate(steps):
            x = step.advance(x, model.full(x, index))
            if index % 10 == 9:
                bounds.append(x)
    cosines, ratios = [], []
    for indices, (start, target) in zip(group_steps(100, 10), pairwise(bounds), strict=True):
        found = []
        for gradient in ("accuquant", "exact"):
            model.moved.grad = None
            backward(model.quantized, steps, indices, start, target, SILENT, gradient=gradient)
            assert model.moved.grad is not None
            found.append(model.moved.grad.flatten())
        cosines.append(float(torch.cosine_similarity(*found, dim=0)))
        ratios.append(float(found[0].norm() / found[1].norm()))
    assert sum(cosines) / 10 > 0.99
    assert min(cosines) > 0.98
    assert 0.98 < min(ratios) <= max(ratios) < 1.25


class SavedBytes:
    """The most bytes that autograd has kept for a backward pass at any time."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def pack(self, x: Tensor) -> Any:
        class Holder:
            value = x

        holder = Holder()
        size = x.numel() * x.element_size()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(holder, self.forget, size)
        return holder

    def forget(self, size: int) -> None:
        self.alive -= size

    @staticmethod
    def unpack(holder: Any) -> Tensor:
        value: Tensor = holder.value
        return value


def test_memory_does_not_grow_with_the_steps_of_a_group(make_pair: MakePair) -> None:
    pair = make_pair(count=16, group=16)
    start, target = pair.bounds
    most: dict[tuple[str, int], int] = {}
    for group in (1, 4, 16):
        for mode in ("accuquant", "exact", "unrolled"):
            saved = SavedBytes()
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                if mode == "unrolled":
                    unrolled(pair, range(group), start, target)
                else:
                    gradients(pair, range(group), mode, start, target)  # type: ignore[arg-type]
            most[mode, group] = saved.most
    for mode in ("accuquant", "exact"):
        assert most[mode, 4] <= 1.05 * most["unrolled", 1]
        assert most[mode, 16] <= 1.05 * most[mode, 4]
    assert most["unrolled", 16] > 3.5 * most["unrolled", 4] > 10 * most["unrolled", 1]


def test_training_pays_and_leaves_time_layers_alone(make_pair: MakePair) -> None:
    options = AccuQuant(group=2, iterations=15, batch=4, learning_rate=0.05)
    pair = make_pair().spoil()
    fixed = {n: q.scale.clone() for n, q in pair.quantized.quantizers.items() if not q.learned}
    told: list[tuple[int, int]] = []
    results = calibrate(
        pair.quantized, pair.bounds, pair.noise, options, lambda done, total: told.append((done, total))
    )
    assert told == [(i, 30) for i in range(1, 31)]
    assert [(r.first, r.last) for r in results] == [(0, 2), (2, 4)]
    assert all(r.loss_after < 0.85 * r.loss_before for r in results)
    assert fixed
    for name, scale in fixed.items():
        assert torch.equal(pair.quantized.quantizers[name].scale, scale)
    assert not any(p.requires_grad for p in pair.quantized.unet.parameters())


@pytest.mark.parametrize("gradient", ["accuquant", "exact"])
def test_groups_may_be_trained_in_any_order(make_pair: MakePair, gradient: Gradient) -> None:
    options = AccuQuant(group=2, gradient=gradient, iterations=5, batch=4, learning_rate=0.05)
    found = []
    for order in ((0, 1), (1, 0)):
        pair = make_pair(count=3).spoil()
        groups = [Group(r, *ends) for r, ends in zip(group_steps(3, 2), pairwise(pair.bounds), strict=True)]
        before = pair.step_sizes()
        for g in order:
            train(pair.quantized, [groups[g]], pair.noise, options)
        assert not torch.equal(pair.step_sizes(), before)
        found.append(pair.step_sizes())
    assert torch.equal(found[0], found[1])
    pair = make_pair(count=3).spoil()
    calibrate(pair.quantized, pair.bounds, pair.noise, options)
    assert torch.equal(pair.step_sizes(), found[0])


def test_step_sizes_may_be_shared_by_all_groups(make_pair: MakePair) -> None:
    pair = make_pair(shared=True).spoil()
    options = AccuQuant(group=2, per_group=False, iterations=15, batch=4, learning_rate=0.05)
    results = calibrate(pair.quantized, pair.bounds, pair.noise, options)
    assert sum(r.loss_after / r.loss_before for r in results) < 0.85 * len(results)


def test_a_progressive_start_is_where_the_groups_before_arrive(make_pair: MakePair) -> None:
    pair = make_pair().spoil()
    options = AccuQuant(group=2, start="progressive", iterations=8, batch=4, learning_rate=0.02)
    results = calibrate(pair.quantized, pair.bounds, pair.noise, options)
    curves = error_curves(pair.full, pair.quantized, pair.steps, pair.noise)
    assert results[-1].loss_after == pytest.approx(float(curves.accumulated[-1].mean()), rel=1e-4)


def test_training_that_does_not_pay_is_undone(make_pair: MakePair) -> None:
    pair = make_pair()
    before = pair.step_sizes()
    options = AccuQuant(group=2, iterations=3, batch=2, learning_rate=1e4)
    results = calibrate(pair.quantized, pair.bounds, pair.noise, options)
    assert torch.equal(pair.step_sizes(), before)
    assert all(r.loss_after == r.loss_before for r in results)


def test_settings_that_cannot_be_are_refused(make_pair: MakePair) -> None:
    pair = make_pair()
    for group in (0, 5):
        with pytest.raises(RecipeError, match="steps simulated"):
            calibrate(pair.quantized, pair.bounds, pair.noise, AccuQuant(group=group))
    options = AccuQuant(group=2, start="progressive", per_group=False)
    with pytest.raises(RecipeError, match="progressive"):
        calibrate(pair.quantized, pair.bounds, pair.noise, options)
    with pytest.raises(NonFiniteError, match="steps from 0"):
        calibrate(pair.quantized, pair.bounds * math.nan, pair.noise, AccuQuant(group=2))
