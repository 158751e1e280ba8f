"""Bias compensation by groups of steps: mean errors vanish where the method says so, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from quantry.layers.operands import attached, detach_all
from worker.calibration.hooks import outputs_of
from worker.diffusion.compensation import Targets, compensate
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import Latents
from worker.diffusion.unet import UNetLayer, layers_of
from worker.diffusion.weights import quantize_weight, set_weights
from worker.models.network import channels_last

MakeUNet = Callable[..., Any]
STEPS = read_steps(DDIMScheduler(num_train_timesteps=100, clip_sample=False), 4)


def latents(first: int = 0) -> list[Latents]:
    generator = torch.Generator().manual_seed(first)
    return [
        Latents(index, torch.randn(2, 2, 8, 8, generator=generator)) for index in range(4) for _ in range(2)
    ]


def pair(make_unet: MakeUNet) -> tuple[StepNetwork, StepNetwork, tuple[UNetLayer, ...]]:
    unet = make_unet()
    layers = layers_of(unet)
    rounded = copy.deepcopy(unet)
    set_weights(
        rounded,
        {m.name: quantize_weight(unet.get_submodule(m.name).weight, 3, split=m.split) for m in layers},
    )
    return StepNetwork(unet, STEPS), StepNetwork(rounded, STEPS), layers


def mean_errors(
    full: StepNetwork, other: StepNetwork, layers: tuple[UNetLayer, ...], row: int
) -> list[float]:
    """The largest mean error of a channel, of each layer, over the latents of one group of two steps."""
    means: list[dict[str, list[Tensor]]] = [{}, {}]
    for side, network in enumerate((full, other)):
        modules = {layer.name: network.unet.get_submodule(layer.name) for layer in layers}

        def see(name: str, output: Tensor, side: int = side, modules: dict[str, Any] = modules) -> None:
            values = channels_last(modules[name], output).flatten(0, -2)
            means[side].setdefault(name, []).append(values.double().mean(0))

        with outputs_of(modules, see):
            for index, x, _ in latents():
                if index // 2 == row:
                    network(x, index)
    wanted, found = ({n: torch.stack(v).mean(0) for n, v in side.items()} for side in means)
    return [float((wanted[layer.name] - found[layer.name]).abs().max()) for layer in layers]


def test_mean_errors_of_the_running_network_vanish_in_every_group(make_unet: MakeUNet) -> None:
    full, quantized, layers = pair(make_unet)
    before = mean_errors(full, quantized, layers, 0)
    compensate(full, quantized, layers, latents(), steps_per_row=2, targets="sequential")
    corrected = StepNetwork(quantized.unet, STEPS)
    for row in range(2):
        assert max(mean_errors(full, corrected, layers, row)) < 1e-5
    assert max(before) > 1e-2


@pytest.mark.parametrize("targets", ["sequential", "published"])
def test_nothing_is_added_where_nothing_is_quantized(targets: Targets, make_unet: MakeUNet) -> None:
    full, _, layers = pair(make_unet)
    same = StepNetwork(copy.deepcopy(full.unet), STEPS)
    compensate(full, same, layers, latents(), steps_per_row=4, targets=targets)
    tables = [m for name, m in attached(same.unet) if name.endswith(".output")]
    assert len(tables) == len(layers)
    assert max(float(table.get_buffer("bias").abs().max()) for table in tables) < 1e-7


def test_published_targets_are_those_of_float_inputs(make_unet: MakeUNet) -> None:
    full, quantized, layers = pair(make_unet)
    rounded = {layer.name: quantized.unet.get_submodule(layer.name).weight.clone() for layer in layers}
    compensate(full, quantized, layers, latents(), steps_per_row=4, targets="published")
    name = "down_blocks.1.resnets.0.time_emb_proj"
    inputs: list[Tensor] = []
    layer = full.unet.get_submodule(name)
    with layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        for index, x, _ in latents():
            full(x, index)
    mean = torch.cat(inputs).double().mean(0)
    expected = (layer.weight - rounded[name]).double() @ mean
    found = quantized.unet.get_submodule(name).output_correction.bias[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_detaching_leaves_the_network_as_it_was(make_unet: MakeUNet) -> None:
    full, quantized, layers = pair(make_unet)
    x = latents()[0].x
    before = quantized(x, 0)
    compensate(full, quantized, layers, latents(), steps_per_row=2, targets="published")
    assert not torch.equal(StepNetwork(quantized.unet, STEPS)(x, 0), before)
    detach_all(quantized.unet)
    assert torch.equal(quantized(x, 0), before)
