"""What a checkpoint format is to the writer, and what is noted of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedLayer
from worker.errors import ExportError

PRODUCER = "quantry"


@dataclass(frozen=True)
class Stored:
    """One quantized layer in the file. `local`: its name inside its block."""

    name: str
    local: str
    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype
    bias: bool
    positions: int


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from: written into its config and its card."""

    base_model: str
    version: str
    recipe: tuple[Mapping[str, Any], ...]
    job: str | None

    def as_json(self) -> dict[str, Any]:
        """What goes into config.json: nothing that changes from one attempt of a job to the next."""
        return {
            "producer": {"name": PRODUCER, "version": self.version},
            "recipe": [dict(s) for s in self.recipe],
        }


class WeightFormat(Protocol):
    """Turns layers into tensors of safetensors files, and says in config.json how to read them."""

    own_layers: bool  # its loader brings layers of its own, which hold a bias whatever the architecture

    def encode(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        """The tensors of one layer, its bias left out. Raises ExportError for what the format cannot hold."""

    def finish(self) -> dict[str, Tensor]:
        """Tensors that had to wait for the last layer."""

    def quantization_config(
        self, stored: Sequence[Stored], dense: Sequence[str], provenance: Provenance
    ) -> dict[str, Any]:
        """`quantization_config` of config.json. `dense`: linear layers that are not quantized."""


def check_layer(name: str, layer: QuantizedLayer) -> None:
    """That a layer is what its fields say. Raises ExportError naming it."""
    weight = layer.weight
    rows, columns = weight.codes.shape
    groups = columns // weight.group_size if weight.group_size else 1
    if weight.group_size and columns % weight.group_size:
        raise ExportError(
            f"layer `{name}`: groups of {weight.group_size} do not divide its {columns} columns"
        )
    if weight.scale.shape != (rows, groups) or weight.zero_point.shape != (rows, groups):
        raise ExportError(
            f"layer `{name}`: scales of shape {tuple(weight.scale.shape)}, expected {(rows, groups)}"
        )
    if weight.scale.dtype not in (torch.float16, torch.float32):
        raise ExportError(f"layer `{name}`: scales are {weight.scale.dtype}, not float16 or float32")
    if not bool(torch.isfinite(weight.scale).all()):
        raise ExportError(f"layer `{name}`: a scale is not finite, its weights would be lost")
    top = 2**weight.bits - 1
    if int(weight.codes.max()) > top or int(weight.zero_point.max()) > top:
        raise ExportError(f"layer `{name}`: a code or zero-point does not fit in {weight.bits} bits")
    if weight.symmetric and not bool((weight.zero_point == 2 ** (weight.bits - 1)).all()):
        raise ExportError(f"layer `{name}`: symmetric, but its zero-points are not {2 ** (weight.bits - 1)}")
    if layer.bias is not None and layer.bias.shape != (rows,):
        raise ExportError(f"layer `{name}`: bias of shape {tuple(layer.bias.shape)}, expected {(rows,)}")


def stored_layer(name: str, local: str, layer: QuantizedLayer) -> Stored:
    """Check a layer and note what will be said of it. Raises ExportError."""
    check_layer(name, layer)
    weight = layer.weight
    return Stored(
        name=name,
        local=local,
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=weight.symmetric,
        scale_dtype=weight.scale.dtype,
        bias=layer.bias is not None,
        positions=0 if layer.position_bias is None else len(layer.position_bias),
    )


def float16_scale(name: str, layer: QuantizedLayer, label: str) -> Tensor:
    """The scales in float16, unchanged in value. Raises ExportError where that is not possible."""
    scale = layer.weight.scale
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise ExportError(
            f"layer `{name}`: {label} stores scales in float16 and these are not float16 values: quantize "
            "with float16 scales, or use format `quantry` or `compressed-tensors`"
        )
    return half


def refuse_positions(name: str, layer: QuantizedLayer, label: str) -> None:
    if layer.position_bias is not None:
        raise ExportError(
            f"layer `{name}`: {label} has no place for a bias per position; use format `quantry`"
        )
