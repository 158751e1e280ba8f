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
        groups = {
            f"group_{number}": _group(bits, size, ["Linear"] if len(schemes) == 1 else names)
            for number, ((bits, size), names) in enumerate(schemes.items())
        }
        return {
            "quant_method": LABEL,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dense),
            "kv_cache_scheme": None,
            **provenance.as_json(),
        }


def _group(bits: int, group_size: int | None, targets: list[str]) -> dict[str, Any]:
    """One entry of `config_groups`; without `format` in it transformers guesses."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
