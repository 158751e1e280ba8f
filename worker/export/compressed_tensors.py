"""compressed-tensors, `pack-quantized`: what stock transformers and vLLM read (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedLayer
from quantry.quantizers.packing import pack
from worker.errors import ExportError
from worker.export.formats import Provenance, Stored, refuse_positions

LABEL = "compressed-tensors"


class CompressedTensors:
    """weight_packed int32 (out, words), weight_scale (out, groups), weight_shape int64 (2,)."""

    own_layers = False

    def encode(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        weight = layer.weight
        refuse_positions(name, layer, LABEL)
        if not weight.symmetric:
            raise ExportError(
                f"layer `{name}`: packed asymmetric compressed-tensors do not load in transformers; quantize "
                "symmetrically, or use format `gptq` or `quantry`"
            )
        return {  # codes are stored with an offset of 2**(bits - 1), which is how our symmetric codes are
            f"{name}.weight_packed": pack(weight.codes, weight.bits),
            f"{name}.weight_scale": weight.scale,
            f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }

    def finish(self) -> dict[str, Tensor]:
        return {}

    def quantization_config(
        self, stored: Sequence[Stored], dense: Sequence[str], provenance: Provenance
    ) -> dict[str, Any]:
        schemes: dict[tuple[int, int | None], list[str]] = {}
        for layer in stored:
            schemes.setdefault((layer.bits, layer.group_size), []).append(layer.name)
        groups = [
            (integers(bits, "group" if size else "channel", group_size=size), None, names)
            for (bits, size), names in schemes.items()
        ]
        return config_of("pack-quantized", groups, dense, provenance)


def config_of(
    format: str,
    groups: Sequence[tuple[dict[str, Any], dict[str, Any] | None, list[str]]],
    dense: Sequence[str],
    provenance: Provenance,
) -> dict[str, Any]:
    """`quantization_config`. groups: how weights and inputs are quantized, and the layers of each.

    The format stands in every group as well: without it transformers guesses.
    """
    entries = {
        f"group_{number}": {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "format": format,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }
        for number, (weights, inputs, names) in enumerate(groups)
    }
    return {
        "quant_method": LABEL,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": entries,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        **provenance.as_json(),
    }


def integers(
    bits: int, strategy: str, *, group_size: int | None = None, dynamic: bool = False
) -> dict[str, Any]:
    """Symmetric signed integers of `bits`, with a scale for each part that `strategy` names."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
