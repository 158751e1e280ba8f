"""The GPTQ layout: 2, 3, 4 or 8 bits, symmetric or not (docs/formats.md).

Version 1 (`checkpoint_format: "gptq"`) stores zero - 1, which is what every reader knows. It cannot say that
a zero-point is 0: readers add the 1 to whole words, where it would carry into the next field. So zero-points
wait until the last layer is known, and a checkpoint with a 0 among them is written as version 2 ("gptq_v2"),
which stores the zero-points themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedLayer
from quantry.quantizers.packing import pack, unpack
from worker.errors import ExportError
from worker.export.formats import Provenance, Stored, float16_scale, refuse_positions

LABEL = "GPTQ"
BITS = (2, 3, 4, 8)


class Gptq:
    """qweight int32 (in * bits / 32, out), qzeros int32 (groups, out * bits / 32), scales float16 (groups,
    out), g_idx int32 (in,). Memory: the packed zero-points of all layers.
    """

    own_layers = False

    def __init__(self) -> None:
        self._zeros: dict[str, Tensor] = {}  # (groups, out) packed along out, as version 2 stores them
        self._bits = 0
        self.version = 1

    def encode(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        weight = layer.weight
        rows, columns = weight.codes.shape
        refuse_positions(name, layer, LABEL)
        if weight.bits not in BITS:
            raise ExportError(
                f"layer `{name}`: the {LABEL} layout holds 2, 3, 4 or 8 bits, not {weight.bits}"
            )
        if rows % 32 or columns % 32:
            raise ExportError(
                f"layer `{name}` is {rows} x {columns}: the {LABEL} layout packs 32 at a time both ways; use "
                "format `quantry` or `compressed-tensors`"
            )
        self._bits = weight.bits
        self._zeros[name] = pack(weight.zero_point.t(), weight.bits)
        if bool((weight.zero_point == 0).any()):
            self.version = 2
        group = weight.group_size or columns
        return {
            f"{name}.qweight": pack(weight.codes.t(), weight.bits, dim=0),
            f"{name}.scales": float16_scale(name, layer, LABEL).t(),
            f"{name}.g_idx": torch.arange(columns, dtype=torch.int32).div_(group, rounding_mode="floor"),
        }

    def finish(self) -> dict[str, Tensor]:
        return {f"{name}.qzeros": self._stored(zeros) for name, zeros in self._zeros.items()}

    def _stored(self, zeros: Tensor) -> Tensor:
        if self.version == 2:
            return zeros
        count = zeros.shape[1] * 32 // self._bits
        return pack(unpack(zeros, self._bits, count) - 1, self._bits)

    def quantization_config(
        self, stored: Sequence[Stored], dense: Sequence[str], provenance: Provenance
    ) -> dict[str, Any]:
        grids = {(layer.bits, layer.group_size, layer.symmetric) for layer in stored}
        if len(grids) > 1:
            raise ExportError(f"a {LABEL} checkpoint has one grid for all layers; use format `quantry`")
        ((bits, group_size, symmetric),) = grids
        blocks = {layer.name.removesuffix(layer.local) for layer in stored}
        inside = [name for name in dense if name.startswith(tuple(blocks))]
        if inside or len(stored) != len(blocks) * len({layer.local for layer in stored}):
            raise ExportError(
                f"a {LABEL} checkpoint quantizes every linear layer of its blocks, but "
                f"`{(inside or ['some'])[0]}` stayed dense; use format `quantry` or `compressed-tensors`"
            )
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size or -1,
            "sym": symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"quantry:{provenance.version}"], **provenance.as_json()},
        }
