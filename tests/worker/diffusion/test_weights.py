"""Weights on their grids, with grids of their own for the halves of a concatenated input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker.diffusion.unet import layers_of
from worker.diffusion.weights import quantize_weight, set_weights
from worker.errors import NonFiniteError

MakeUNet = Callable[..., Any]


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3, 3)])
def test_every_weight_moves_by_half_a_step_at_most(bits: int, shape: tuple[int, ...]) -> None:
    weight = random_weight(*shape)
    quantized = quantize_weight(weight, bits, split=(3, 7), clip="none")
    for part, whole in zip(quantized.parts, weight.split((3, 7), dim=1), strict=True):
        error = (part.dequantize() - whole.flatten(1)).abs()
        assert (error <= part.scale.float().abs() * 0.51).all()
    assert quantized.dequantize().shape == weight.shape


def test_a_loud_half_does_not_spoil_a_quiet_one() -> None:
    weight = torch.cat([random_weight(6, 3, 1, 1) * 100, random_weight(6, 5, 1, 1)], dim=1)
    error = {
        split: (quantize_weight(weight, 4, split=split).dequantize() - weight)[:, 3:].square().mean()
        for split in (None, (3, 5))
    }
    assert error[(3, 5)] < error[None] / 20


def test_the_search_clips_where_that_pays() -> None:
    weight = random_weight(8, 40, 3, 3)
    covered = (quantize_weight(weight, 3, clip="none").dequantize() - weight).square().mean()
    searched = (quantize_weight(weight, 3).dequantize() - weight).square().mean()
    assert searched < 0.8 * covered


def test_weights_are_written_into_the_network(make_unet: MakeUNet) -> None:
    unet = make_unet()
    layers = layers_of(unet)
    weights = {
        layer.name: quantize_weight(unet.get_submodule(layer.name).weight, 4, split=layer.split)
        for layer in layers
    }
    set_weights(unet, weights)
    for layer in layers:
        module = unet.get_submodule(layer.name)
        assert torch.equal(module.weight, weights[layer.name].dequantize())
        parts = 2 if layer.split else 1
        assert all(
            len(row.unique()) <= 16 * parts for row in module.weight.flatten(1)
        )  # 4 bits a half, and no more


def test_broken_weights_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="NaN"):
        quantize_weight(torch.full((2, 2), torch.nan), 4)
