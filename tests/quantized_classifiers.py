"""Tiny classifiers of every family, quantized in memory, and what an export of them is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from factories import write_classifier
from safetensors.torch import save_file
from torch import Tensor, nn

from quantry.layers.operands import attach, set_probability_bias
from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from quantry.recipe import GptqStep, UniformStep
from quantry.reports import Manifest
from worker.export.vision import write_vision
from worker.methods.activations import names_of, observe
from worker.models.vision import VisionModel

MakeGrid = Callable[..., QuantizedWeight]  # `random_layer` of the export tests


@dataclass
class Quantized:
    """A classifier on its grids in memory (`simulated`), and what its export is given."""

    source: Path
    network: Any
    simulated: Any
    layers: dict[str, QuantizedLayer]
    quantizers: dict[str, ActivationQuantizer] = field(default_factory=dict)
    probability_bias: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        found = self.simulated(pixel_values=images).logits
        assert isinstance(found, Tensor)
        return found

    def write(self, target: Path, **options: Any) -> Manifest:
        target.mkdir()
        recipe = (GptqStep(bits=4), UniformStep(bits=4))
        parts = (self.network, self.layers.items(), self.quantizers, self.probability_bias)
        return write_vision(self.source, target, *parts, recipe, "local/tiny", **options)

    def reference(self, file: Path) -> Path:
        """The file that `verify` compares with."""
        save_file({"pixel_values": pixels(), "logits": self.logits(pixels()).contiguous()}, file)
        return file


def pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build(
    folder: Path,
    name: str,
    random_layer: MakeGrid,
    *,
    bits: int = 4,
    symmetric: bool = True,
    group_size: int | None = None,
    activations: str = "varied",
    biases: bool = False,
) -> Quantized:
    """A classifier of `factories.CLASSIFIERS`, every layer of it on a grid.

    group_size: of the layers that it divides. activations: `none`; `tensor`, one static grid each; `varied`, a
    grid for each head in attention, and for each token of its output. biases: softmax biases, and biases on
    the layers that had none.
    """
    source = write_classifier(folder, name)
    model = VisionModel(source, device=torch.device("cpu"))
    torch.manual_seed(3)
    done = Quantized(source, model.network, copy.deepcopy(model.network), {})
    for layer in model.layer_names:
        w, bias = model.weight(layer), model.bias(layer)
        size = group_size if group_size and w.shape[1] % group_size == 0 else None
        grid = random_layer(w, bits=bits, group_size=size, symmetric=symmetric, scale_dtype=torch.float16)
        bias = torch.randn(len(w)) * 0.1 if bias is None and biases else bias
        done.layers[layer] = QuantizedLayer(grid, bias)
        dense = done.simulated.get_submodule(layer)
        dense.weight.data = grid.dequantize().view_as(dense.weight)
        dense.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if activations != "none":
        done.quantizers = _quantizers(model, bits, activations == "varied")
    for operand, quantizer in done.quantizers.items():
        attach(done.simulated, operand, copy.deepcopy(quantizer))
    for index, operand in enumerate(o for o in model.operands if o.kind == "query" and biases):
        heads = model.network.get_submodule(operand.layers[0]).num_attention_heads
        bias = torch.randn(heads if index % 2 else 1, 1, 1) * 0.01
        done.probability_bias[operand.layers[0]] = bias
        set_probability_bias(done.simulated, operand.layers[0], bias.clone())
    return done


def _quantizers(model: VisionModel, bits: int, varied: bool) -> dict[str, ActivationQuantizer]:
    found: dict[str, ActivationQuantizer] = {}
    seen: dict[str, Tensor] = {}
    observe(model, pixels(), {operand.name: _keep(seen, operand.name) for operand in model.operands})
    for operand in model.operands:
        x = seen[operand.name]
        for place in names_of(operand):
            if varied and operand.kind == "attention_output":
                found[place] = TokenQuantizer(bits)
            elif varied and operand.kind in ("query", "key", "value", "probabilities"):
                low, high = (part.view(-1, 1, 1) for part in (x.amin((0, 2, 3)), x.amax((0, 2, 3))))
                found[place] = UniformQuantizer.covering(low, high, bits)
            else:
                found[place] = UniformQuantizer.covering(*x.aminmax(), bits)
    return found


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        seen[name] = x

    return see
