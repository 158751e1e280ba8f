"""The `quantry` format: any bits, truly packed, symmetric or not, with every bias that a method can add.

It also holds what works on activations: quantizers of any kind, and the bias of softmax bias correction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantry.layers.linear import pack_weight
from quantry.layers.operands import ROLES
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedLayer
from worker.errors import ExportError
from worker.export.formats import Provenance, Stored

FORMAT_VERSION = 1
_SCALE_NAMES = {torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Operands:
    """What works on the activations of a network.

    quantizers: by operand name, an entry for each place: `<q_proj>.input`, `<k_proj>.input`, ...,
    `<attention>.query`, `<attention>.probabilities`. probability_bias: (H, 1, 1) or (1, 1, 1) by attention module.
    """

    quantizers: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    probability_bias: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.quantizers or self.probability_bias)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state of everything, under its names in the network. Raises ExportError for what is not finite."""
        for operand, quantizer in self.quantizers.items():
            for key, value in quantizer.state_dict().items():
                yield f"{_module_of(operand)}.{key}", _finite(operand, value)
        for attention, bias in self.probability_bias.items():
            yield f"{attention}.operands.probability_bias", _finite(attention, bias.float())

    def entries(self) -> dict[str, Any]:
        """What `quantization_config` says of them."""
        activations = {name: quantizer.describe() for name, quantizer in self.quantizers.items()}
        heads = {attention: len(bias) for attention, bias in self.probability_bias.items()}
        found = {"activations": activations, "probability_bias": heads}
        return {key: value for key, value in found.items() if value}


class QuantryFormat:
    """The tensors of `quantry.layers.linear.QuantizedLinear`, and those of `operands`."""

    own_layers = True

    def __init__(self, operands: Operands | None = None) -> None:
        self._operands = operands or Operands()

    def encode(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        tensors = {f"{name}.{key}": tensor for key, tensor in pack_weight(layer.weight).items()}
        if layer.position_bias is not None:
            tensors[f"{name}.position_bias"] = layer.position_bias.float()
        return tensors

    def finish(self) -> dict[str, Tensor]:
        return dict(self._operands.tensors())

    def quantization_config(
        self, stored: Sequence[Stored], dense: Sequence[str], provenance: Provenance
    ) -> dict[str, Any]:
        common = Counter(_grid(layer) for layer in stored).most_common(1)[0][0]
        layers: dict[str, dict[str, Any]] = {}
        for layer in stored:
            grid = {key: value for key, value in _grid(layer) if (key, value) not in common}
            rows = {"positions": layer.positions} if layer.positions else {}
            layers[layer.name] = {**grid, "bias": layer.bias, **rows}
        return {
            "quant_method": "quantry",
            "format_version": FORMAT_VERSION,
            **dict(common),
            "layers": layers,
            **self._operands.entries(),
            **provenance.as_json(),
        }


def _module_of(operand: str) -> str:
    """The path of an operand's quantizer in the network: where `quantry.layers.operands.attach` puts it."""
    module, _, role = operand.rpartition(".")
    if role == "input":
        return f"{module}.input_quantizer"
    if role == "output":
        return f"{module}.output_correction"
    if role in ROLES:
        return f"{module}.operands.{role}"
    raise ExportError(
        f"`{operand}` is not an operand: the role is `input`, `output` or one of {', '.join(ROLES)}"
    )


def _finite(name: str, value: Tensor) -> Tensor:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ExportError(f"`{name}`: its quantizer holds NaN or infinity, every activation would be lost")
    return value


def _grid(layer: Stored) -> tuple[tuple[str, Any], ...]:
    """What layers usually share."""
    return (
        ("bits", layer.bits),
        ("group_size", layer.group_size),
        ("symmetric", layer.symmetric),
        ("scale_dtype", _SCALE_NAMES[layer.scale_dtype]),
    )
