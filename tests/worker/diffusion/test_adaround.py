"""AdaRound: down or up, never elsewhere, and a smaller error of every block and of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from worker.diffusion.adaround import AdaRound, reconstruct
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import Latents, SeededNoise, trajectory
from worker.diffusion.unet import image_shape, layers_of
from worker.diffusion.weights import halves, quantize_weight, set_weights
from worker.errors import CalibrationError

MakeUNet = Callable[..., Any]
STEPS = read_steps(DDIMScheduler(num_train_timesteps=100, clip_sample=False), 4)


def latents_of(network: StepNetwork, first: int, count: int) -> list[Latents]:
    noise = SeededNoise(tuple(range(first, first + count)), image_shape(network.unet), torch.device("cpu"))
    return [at for at in trajectory(network, STEPS, noise) if at.step < len(STEPS)]


def error(full: StepNetwork, other: StepNetwork, latents: list[Latents]) -> float:
    return sum(float((full(x, i) - other(x, i)).square().mean()) for i, x, _ in latents)


def test_rounding_is_learned_for_what_comes_out(make_unet: MakeUNet) -> None:
    full = StepNetwork(make_unet(), STEPS)
    layers = layers_of(full.unet)
    before = copy.deepcopy(full.unet.state_dict())
    quantized = StepNetwork(copy.deepcopy(full.unet), STEPS)
    latents = latents_of(full, 0, 8)
    told: list[tuple[int, int]] = []
    weights, results = reconstruct(
        full,
        quantized,
        layers,
        latents,
        {layer.name: 3 for layer in layers},
        AdaRound(iterations=40, learning_rate=0.05),
        lambda done, total: told.append((done, total)),
    )
    assert told == [(i, len(results)) for i in range(1, len(results) + 1)]
    assert {r.block for r in results} == {layer.block for layer in layers}
    assert sum(r.learned < 0.9 * r.nearest for r in results) > len(results) / 2
    assert all(torch.equal(value, before[key]) for key, value in full.unet.state_dict().items())

    nearest = StepNetwork(copy.deepcopy(full.unet), STEPS)
    plain = {
        m.name: quantize_weight(full.unet.get_submodule(m.name).weight, 3, split=m.split) for m in layers
    }
    set_weights(nearest.unet, plain)
    unseen = latents_of(full, 100, 8)
    assert error(full, quantized, unseen) < 0.7 * error(full, nearest, unseen)

    moved = 0
    for layer in layers:
        weight = full.unet.get_submodule(layer.name).weight
        assert torch.equal(quantized.unet.get_submodule(layer.name).weight, weights[layer.name].dequantize())
        for whole, learned, other in zip(
            halves(weight, layer.split), weights[layer.name].parts, plain[layer.name].parts, strict=True
        ):
            assert torch.equal(learned.scale, other.scale)
            steps = whole / learned.scale.float() + learned.zero_point.float()
            low, high = steps.floor().clamp(0, 7), (steps.floor() + 1).clamp(0, 7)
            assert ((learned.codes == low) | (learned.codes == high)).all()
            moved += int((learned.codes != other.codes).sum())
    assert moved > 0


def test_without_iterations_weights_are_rounded_to_nearest(make_unet: MakeUNet) -> None:
    full = StepNetwork(make_unet(), STEPS)
    quantized = StepNetwork(copy.deepcopy(full.unet), STEPS)
    layers = layers_of(full.unet)
    bits = {layer.name: 4 for layer in layers}
    weights, results = reconstruct(
        full, quantized, layers, latents_of(full, 0, 2), bits, AdaRound(iterations=0)
    )
    for layer in layers:
        plain = quantize_weight(full.unet.get_submodule(layer.name).weight, 4, split=layer.split)
        torch.testing.assert_close(weights[layer.name].dequantize(), plain.dequantize())
    assert all(r.learned == r.nearest for r in results)


def test_latents_are_needed(make_unet: MakeUNet) -> None:
    full = StepNetwork(make_unet(), STEPS)
    with pytest.raises(CalibrationError, match="at least one latent"):
        reconstruct(full, full, layers_of(full.unet), [], {}, AdaRound())
