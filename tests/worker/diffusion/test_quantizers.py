"""Step quantizers: the gradient of a step size, rows by step, halves by channel, ranges from observation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from quantry.layers.operands import detach_all
from worker.diffusion.quantizers import (
    StepNetwork,
    StepQuantizer,
    attach_quantizers,
    fake_quantize,
    trainable,
)
from worker.diffusion.ranges import attention_sites, fit_quantizers
from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import Latents, SeededNoise, trajectory
from worker.diffusion.unet import image_shape, layers_of
from worker.errors import NonFiniteError

MakeUNet = Callable[..., Any]


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The same quantizer, its gradient left to autograd."""
    steps = x / scale
    rounded = steps + (steps.round() - steps).detach()
    return scale * ((rounded + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_is_that_of_learned_step_sizes(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator, dtype=torch.float64)
    zero = torch.tensor(2.0 ** (bits - 1) - 1, dtype=torch.float64)
    weights = torch.randn(500, generator=generator, dtype=torch.float64)
    found = []
    for function in (fake_quantize, straight_through):
        y = x.clone().requires_grad_()
        scale = torch.tensor(3.0 / 2**bits, dtype=torch.float64, requires_grad=True)
        moved = function(y, scale, zero, bits)
        (moved * weights).sum().backward()
        found.append((moved.detach(), y.grad, scale.grad))
    assert 0 < int((found[0][1] == 0).sum()) < 500  # some are clipped, some are not
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_each_step_has_its_row_and_each_half_its_column() -> None:
    scale = torch.tensor([[0.5, 2.0], [0.25, 1.0]])
    quantizer = StepQuantizer(8, scale, torch.full((2, 2), 128.0), steps_per_row=3, split=(2, 1))
    x = torch.full((1, 3, 2, 2), 0.9)
    for index, expected in ((0, (1.0, 0.0)), (2, (1.0, 0.0)), (3, (1.0, 1.0)), (5, (1.0, 1.0))):
        quantizer.index = index
        moved = quantizer(x)
        torch.testing.assert_close(moved[:, :2], torch.full((1, 2, 2, 2), expected[0]))
        torch.testing.assert_close(moved[:, 2:], torch.full((1, 1, 2, 2), expected[1]))


def test_only_the_present_row_is_trained() -> None:
    quantizer = StepQuantizer(4, torch.full((3, 1), 0.1), torch.full((3, 1), 8.0), steps_per_row=1)
    quantizer.index = 1
    with trainable([quantizer]) as (parameter,):
        quantizer(torch.randn(100, 1, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        assert parameter.grad is not None
        assert parameter.grad[1] != 0
        assert parameter.grad[0] == parameter.grad[2] == 0
    assert not quantizer.log_scale.requires_grad
    assert quantizer.log_scale.grad is None


def test_the_dtype_is_kept() -> None:
    quantizer = StepQuantizer(8, torch.tensor([[0.01]]), torch.tensor([[128.0]]), steps_per_row=1)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert quantizer(torch.randn(3, 3).to(dtype)).dtype == dtype


def observed(
    unet: Any, count: int = 4, width: int = 8, **options: Any
) -> tuple[StepNetwork, dict[str, StepQuantizer]]:
    steps = read_steps(DDIMScheduler(clip_sample=False), count)
    network = StepNetwork(unet, steps)

    def latents() -> Iterator[Latents]:
        generator = torch.Generator().manual_seed(0)
        for index in range(count):
            yield Latents(index, (1 + index) * torch.randn(3, *image_shape(unet), generator=generator))

    layers = layers_of(unet)
    bits = {layer.name: width for layer in layers}
    return network, fit_quantizers(network, layers, latents, bits=bits, **options)


def test_grids_follow_the_steps_of_their_row(make_unet: MakeUNet) -> None:
    unet = make_unet()
    _, rows = observed(unet, steps_per_row=2, clip="none")
    _, shared = observed(unet, steps_per_row=4, clip="none")
    layers = layers_of(unet)
    for layer in layers:
        found = rows[layer.name].scale
        expected = {"time": 4, "first": 1}.get(layer.role, 2)
        assert found.shape == (expected, 2 if layer.split else 1)
        assert rows[layer.name].learned == (layer.role in ("inner", "last"))
    torch.testing.assert_close(rows["conv_in"].scale, shared["conv_in"].scale)
    skip = next(layer.name for layer in layers if layer.name.endswith("conv_shortcut") and layer.split)
    assert rows[skip].scale[1, 1] > 1.2 * rows[skip].scale[0, 1]  # later latents are larger here
    assert rows[skip].scale[1, 1] <= shared[skip].scale[0, 1]


def test_eight_bits_change_little_and_four_more(make_unet: MakeUNet) -> None:
    errors = {}
    for bits, clip in ((8, "mse"), (8, "none"), (4, "mse")):
        unet = make_unet()
        x = torch.randn(4, *image_shape(unet), generator=torch.Generator().manual_seed(9))
        network, quantizers = observed(unet, steps_per_row=2, clip=clip, width=bits)
        before = network(x, 1)
        attach_quantizers(unet, quantizers)
        changed = StepNetwork(unet, network.steps)
        assert set(changed.quantizers) == set(quantizers)
        errors[bits, clip] = float((changed(x, 1) - before).square().mean() / before.square().mean())
        detach_all(unet)
        assert torch.equal(StepNetwork(unet, network.steps)(x, 1), before)
    assert errors[8, "mse"] < 1e-3
    assert errors[8, "none"] < 1e-3
    assert 10 * errors[8, "mse"] < errors[4, "mse"] < 0.5


def test_a_copied_network_has_quantizers_of_its_own(make_unet: MakeUNet) -> None:
    unet = make_unet()
    network, quantizers = observed(unet, steps_per_row=4)
    attach_quantizers(unet, quantizers)
    twin = StepNetwork(copy.deepcopy(unet), network.steps)
    assert not {id(q) for q in twin.quantizers.values()} & {id(q) for q in quantizers.values()}


def test_queries_keys_and_values_are_quantized_like_inputs(make_unet: MakeUNet) -> None:
    unet = make_unet()
    x = torch.randn(2, *image_shape(unet), generator=torch.Generator().manual_seed(1))
    before = unet(x, 3).sample
    layers = attention_sites(unet)
    assert [layer.name.rpartition(".")[2] for layer in layers[:3]] == ["query", "key", "value"]
    steps = read_steps(DDIMScheduler(clip_sample=False), 4)
    network = StepNetwork(unet, steps)
    noise = SeededNoise((0, 1), image_shape(unet), torch.device("cpu"))
    bits = {layer.name: 3 for layer in layers}
    found = fit_quantizers(
        network, layers, lambda: trajectory(network, steps, noise), bits=bits, steps_per_row=2
    )
    torch.testing.assert_close(
        unet(x, 3).sample, before, rtol=1e-5, atol=1e-6
    )  # watching leaves nothing behind
    attach_quantizers(unet, found)
    quantized = StepNetwork(unet, steps)
    assert set(quantized.quantizers) == set(bits)
    values: list[Tensor] = []
    table = found[layers[0].name]
    with table.register_forward_hook(lambda module, inputs, output: values.append(output)):
        quantized(x, 0)
    assert len(values[0].unique()) <= 8


def test_broken_activations_are_refused_by_name(make_unet: MakeUNet) -> None:
    unet = make_unet()
    unet.conv_in.weight[:] = torch.inf
    with pytest.raises(NonFiniteError, match="down_blocks"):
        observed(unet, steps_per_row=4)
