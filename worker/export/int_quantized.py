"""compressed-tensors, `int-quantized`: integer weights and activations, such as W8A8 (docs/formats.md).

Weights are symmetric per channel. Inputs are symmetric, with a scale for each token, found when the layer runs,
or one static scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantry.families import Family
from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.affine import QuantizedLayer
from worker.errors import ExportError
from worker.export.compressed_tensors import LABEL, config_of, integers
from worker.export.formats import Provenance, Stored, refuse_positions


class IntQuantized:
    """weight int8 (out, in), weight_scale (out, 1); input_scale (1,) where it is static.

    quantizers: by place, `<layer>.input` for every layer. Of a family whose layers run on (tokens, width),
    transformers would take one dynamic scale for all tokens ("token" means the first two dimensions): there a
    scale for each group of `width` columns is written, which is the same as one for each token.
    """

    own_layers = False

    def __init__(self, quantizers: Mapping[str, ActivationQuantizer], family: Family) -> None:
        if family.transposed:
            raise ExportError(
                f"{family.model_type} stores its weights transposed (Conv1D), which {LABEL} does not read; use "
                "format `quantry`"
            )
        for place in quantizers:
            if not place.endswith(".input"):
                raise ExportError(f"`{place}`: {LABEL} has no place for it; use format `quantry`")
        self._quantizers, self._family = quantizers, family
        self._inputs: dict[str, dict[str, Any]] = {}

    def encode(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        weight = layer.weight
        refuse_positions(name, layer, f"{LABEL} int-quantized")
        if not weight.symmetric or weight.group_size is not None:
            raise ExportError(
                f"layer `{name}`: int-quantized weights are symmetric with a scale per channel here: quantize "
                "so, or use format `quantry`"
            )
        quantizer = self._quantizer(name)
        self._inputs[name] = self._scheme(name, quantizer, weight.codes.shape[1])
        middle = 2 ** (weight.bits - 1)
        tensors = {
            f"{name}.weight": (weight.codes.to(torch.int16) - middle).to(torch.int8),
            f"{name}.weight_scale": weight.scale,
        }
        if isinstance(quantizer, UniformQuantizer):
            tensors[f"{name}.input_scale"] = quantizer.scale.float().view(1)
        return tensors

    def finish(self) -> dict[str, Tensor]:
        return {}

    def quantization_config(
        self, stored: Sequence[Stored], dense: Sequence[str], provenance: Provenance
    ) -> dict[str, Any]:
        groups: list[tuple[dict[str, Any], dict[str, Any] | None, list[str]]] = []
        for layer in stored:
            schemes = (integers(layer.bits, "channel"), self._inputs[layer.name])
            names = next((names for *known, names in groups if tuple(known) == schemes), None)
            if names is None:
                groups.append((*schemes, names := []))
            names.append(layer.name)
        return config_of("int-quantized", groups, dense, provenance)

    def _quantizer(self, name: str) -> ActivationQuantizer:
        if f"{name}.input" not in self._quantizers:
            raise ExportError(f"layer `{name}`: its input has no quantizer, int-quantized wants one")
        return self._quantizers[f"{name}.input"]

    def _scheme(self, name: str, quantizer: ActivationQuantizer, columns: int) -> dict[str, Any]:
        """`input_activations` of a layer. Raises ExportError for a quantizer that has no counterpart."""
        if isinstance(quantizer, TokenQuantizer) and quantizer.symmetric:
            if name.endswith(tuple(f".{layer}" for layer in self._family.flattened)):
                return integers(quantizer.bits, "group", group_size=columns, dynamic=True)
            return integers(quantizer.bits, "token", dynamic=True)
        if (
            isinstance(quantizer, UniformQuantizer)
            and not quantizer.shape
            and float(quantizer.zero_point) == 2 ** (quantizer.bits - 1)
        ):
            return integers(quantizer.bits, "tensor")
        raise ExportError(
            f"layer `{name}`: int-quantized holds symmetric inputs with a scale per token or tensor, not "
            f"{quantizer.describe()}; use format `quantry`"
        )
