"""The `quantry` format: any bits, truly packed, symmetric or not, with every bias that a method can add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantry.layers.linear import pack_weight
from quantry.quantizers.affine import QuantizedLayer
from worker.export.formats import Provenance, Stored

FORMAT_VERSION = 1
_SCALE_NAMES = {torch.float16: "float16", torch.float32: "float32"}


class QuantryFormat:
    """The tensors of `quantry.layers.linear.QuantizedLinear`."""

    own_layers = True

    def encode(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        tensors = {f"{name}.{key}": tensor for key, tensor in pack_weight(layer.weight).items()}
        if layer.position_bias is not None:
            tensors[f"{name}.position_bias"] = layer.position_bias.float()
        return tensors

    def finish(self) -> dict[str, Tensor]:
        return {}

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
            **provenance.as_json(),
        }


def _grid(layer: Stored) -> tuple[tuple[str, Any], ...]:
    """What layers usually share."""
    return (
        ("bits", layer.bits),
        ("group_size", layer.group_size),
        ("symmetric", layer.symmetric),
        ("scale_dtype", _SCALE_NAMES[layer.scale_dtype]),
    )
