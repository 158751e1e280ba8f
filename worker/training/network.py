"""The network that is trained: from a checkpoint, from random weights, or from another job's artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

import quantry.cifar_resnet  # noqa: F401  (registers it)
from quantry.layers.linear import QuantizedLinear
from quantry.quantizers.activation import UniformQuantizer
from quantry.quantizers.fixed_point import FixedPointQuantizer, code_range
from quantry.training_planning import classifier_family_of
from worker.errors import ModelError, NonFiniteError
from worker.models.source import refusing
from worker.models.vision import load_classifier
from worker.training.layers import FixedPointLayer, fixed_point_layers


def random_network(folder: Path, seed: int) -> Any:
    """The network of config.json with weights drawn as transformers draws them (convolutions: Kaiming's)."""
    with refusing(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.architectures is None:  # DeiT has two heads for images: transformers chooses by this
        config.architectures = [classifier_family_of(config.to_dict()).architecture]
    torch.manual_seed(seed)
    with refusing(folder, "config.json"):
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)


def checkpoint_network(folder: Path) -> Any:
    """The network of a checkpoint, in float32. Raises ModelError, NonFiniteError."""
    network = load_classifier(folder)
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"{name} holds NaN or infinity: the checkpoint is damaged")
    return network


def artifact_network(folder: Path, artifact: Path) -> tuple[Any, nn.Module]:
    """The dense network that an artifact of ours stands for, without its quantizers, and the artifact as it loads.

    Raises ModelError where the artifact is of another architecture, or holds what a dense layer cannot.
    """
    packed = load_classifier(artifact)
    network = random_network(folder, 0)
    state = network.state_dict()
    found = {name: value for name, value in packed.state_dict().items() if name in state}
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            if module.position_bias is not None:
                raise ModelError(
                    f"recipe.0.init: {name} has a bias per position, which training cannot take over"
                )
            if module.bias is not None and f"{name}.bias" not in state:
                raise ModelError(
                    f"recipe.0.init: {name} has a bias that compensation added, and the model has no place for it"
                )
            found[f"{name}.weight"] = module.dequantize()
    for name, value in state.items():
        if name not in found or found[name].numel() != value.numel():
            raise ModelError(
                f"recipe.0.init: the artifact's {name} is not that of the model: both must be of one architecture"
            )
        found[name] = found[name].view_as(value)
    network.load_state_dict(found)
    return network, packed


def take_ranges(network: nn.Module, packed: nn.Module) -> None:
    """Start from an artifact's ranges: of inputs with a static grid a tensor, of weights with one scale a layer.

    What has neither starts as published: from deviations, those of inputs on the first batch.
    """
    for name, layer in fixed_point_layers(network).items():
        stored = packed.get_submodule(name)
        found = _input_range(getattr(stored, "input_quantizer", None))
        if found is not None:
            limit, layer.signed = found
            layer.input_range.data.copy_(limit)
        if isinstance(stored, QuantizedLinear) and stored.form.symmetric and stored.form.bits == layer.bits:
            scale = stored.weight_scale.float().abs()
            if bool((scale == scale.flatten()[0]).all()):
                layer.weight_range.data.copy_(scale.flatten()[0] * code_range(layer.bits, signed=True)[1])


def _input_range(quantizer: Any) -> tuple[Tensor, bool] | None:
    """The range of a grid, and whether it has a sign."""
    if isinstance(quantizer, FixedPointQuantizer):
        return quantizer.scale * code_range(quantizer.bits, signed=quantizer.signed)[1], quantizer.signed
    if isinstance(quantizer, UniformQuantizer) and not quantizer.shape:
        below = quantizer.scale * quantizer.zero_point
        above = quantizer.scale * (2**quantizer.bits - 1) - below
        signed = bool(below > 0)
        return (torch.maximum(below, above) if signed else above), signed
    return None


def dense_copy(folder: Path, trained: nn.Module) -> Any:
    """The trained network as the checkpoint's class has it, without quantizers, on the CPU."""
    network = random_network(folder, 0)
    state = trained.state_dict()
    network.load_state_dict({name: state[name].cpu() for name in network.state_dict()})
    return network.eval()


def quantized_parts(trained: nn.Module) -> dict[str, FixedPointLayer]:
    """The fixed-point layers that a batch has passed through. Raises ModelError for one that no image reaches."""
    layers = fixed_point_layers(trained)
    unused = next((name for name, layer in layers.items() if layer.signed is None), None)
    if unused is not None:
        raise ModelError(
            f"{unused} is not part of the network's forward pass: it has no range to quantize with"
        )
    return layers
