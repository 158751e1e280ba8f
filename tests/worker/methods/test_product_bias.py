"""Bias compensation of Q K^T and P V: the mean error of each entry, on float operands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor, nn

from quantry.layers.operands import attach, attached, detach_all, watch_probabilities
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.product_bias import ProductBias
from quantry.recipe import RtnStep, UniformStep
from quantry.vision import vision_family_of
from quantry.vision_products import attentions
from worker.methods import uniform
from worker.methods.activations import Images, observe
from worker.methods.product_bias import product_biases
from worker.models.vision import VisionModel


def load(folder: Path, name: str) -> VisionModel:
    return VisionModel(factories.write_classifier(folder, name), device=torch.device("cpu"))


def pixels(model: VisionModel, count: int = 9) -> Tensor:
    return torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(3))


def grids(model: VisionModel, bits: int = 3) -> dict[str, ActivationQuantizer]:
    return uniform.calibrate(
        model, Images(pixels(model), 0, RtnStep(bits=4)), UniformStep(bits=bits)
    ).quantizers


def attention_operands(model: VisionModel, attention: str) -> dict[str, Tensor]:
    """The float Q, K, P and V of an attention module, over all images (or windows)."""
    seen: dict[str, Tensor] = {}
    roles = ("query", "key", "probabilities", "value")
    observe(
        model,
        pixels(model),
        {f"{attention}.{role}": lambda x, role=role: seen.update({role: x}) for role in roles},
    )
    return seen


def modules(model: VisionModel) -> list[str]:
    return [operand.layers[0] for operand in model.operands if operand.kind == "probabilities"]


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin"])
def test_a_bias_is_the_mean_error_of_its_entry_and_lowers_the_error_by_its_square(
    name: str, tmp_path: Path
) -> None:
    model = load(tmp_path, name)
    found = grids(model)
    biases = product_biases(model, pixels(model), found, {})
    assert not list(attached(model.network))
    for attention in modules(model):
        x = attention_operands(model, attention)
        rounded = {role: found[f"{attention}.{role}"](value) for role, value in x.items()}
        errors = {
            "scores": x["query"] @ x["key"].mT - rounded["query"] @ rounded["key"].mT,
            "context": x["probabilities"] @ x["value"] - rounded["probabilities"] @ rounded["value"],
        }
        for role, error in errors.items():
            bias = biases[f"{attention}.{role}"].bias
            torch.testing.assert_close(bias, error.mean(0), atol=1e-5, rtol=1e-4)
            gain = error.square().mean() - (error - bias).square().mean()
            torch.testing.assert_close(gain, bias.square().mean(), rtol=1e-3, atol=1e-7)


def test_the_first_attention_then_gives_what_the_float_network_gives_on_average(tmp_path: Path) -> None:
    """Its operands are float there, so that the correction is seen by itself."""
    model = load(tmp_path, "vit")
    first = modules(model)[0]
    found = {name: grid for name, grid in grids(model).items() if name in (f"{first}.query", f"{first}.key")}
    biases = product_biases(model, pixels(model), found, {})
    corrected = {**found, f"{first}.scores": biases[f"{first}.scores"]}
    plain, rounded, corrected_mean = (mean_scores(model, first, parts) for parts in ({}, found, corrected))
    assert (rounded - plain).abs().max() > 1e-2
    torch.testing.assert_close(corrected_mean, plain, atol=1e-4, rtol=1e-4)


def mean_scores(model: VisionModel, attention: str, parts: Mapping[str, nn.Module]) -> Tensor:
    """The mean over images of what enters the softmax: the logarithm of P, centred in each row."""
    scores: list[Tensor] = []
    for place, part in parts.items():
        attach(model.network, place, part)
    try:
        with watch_probabilities(model.network, attention, lambda p, valid, value: scores.append(p.log())):
            model.logits(pixels(model))
    finally:
        detach_all(model.network)
    logs = torch.cat(scores)
    return (logs - logs.mean(-1, keepdim=True)).mean(0)


def test_exact_products_have_no_bias_and_any_batches_give_the_same(tmp_path: Path) -> None:
    model = load(tmp_path, "swin")
    for bias in product_biases(model, pixels(model), {}, {}).values():
        assert not bias.bias.any()
    found = grids(model)
    together = product_biases(model, pixels(model), found, {})
    model.images_at_once = 2
    parted = product_biases(model, pixels(model), found, {})
    for place, bias in together.items():
        torch.testing.assert_close(parted[place].bias, bias.bias, atol=1e-5, rtol=1e-4)


def test_the_softmax_correction_belongs_to_the_product(tmp_path: Path) -> None:
    model = load(tmp_path, "vit")
    attention, found = modules(model)[0], grids(model)
    beta = torch.full((4, 1, 1), 0.01)
    plain = product_biases(model, pixels(model), found, {})[f"{attention}.context"].bias
    corrected = product_biases(model, pixels(model), found, {attention: beta})[f"{attention}.context"].bias
    value = found[f"{attention}.value"](attention_operands(model, attention)["value"])
    torch.testing.assert_close(
        plain - corrected, (beta * value.sum(-2, keepdim=True)).mean(0).expand_as(plain), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_planner_knows_their_shapes(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    biases = list(product_biases(model, pixels(model, 2), {}, {}).values())
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = [
        ((heads, n, n), (heads, n, width)) for heads, n, width in attentions(vision_family_of(config), config)
    ]
    assert [tuple(bias.shape) for bias in biases] == [shape for pair in shapes for shape in pair]


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="are for 5 tokens, and these images have 7"):
        ProductBias(32, [2, 5, 5])(torch.zeros(1, 2, 7, 7))
