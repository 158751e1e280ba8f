"""Dense weights from the GPTQ and GGUF artifacts that Quantry writes, by the published layouts alone.

Independent of the code that writes them and of the packages that usually read them, so that a checkpoint can be
verified, and used, where those are not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from quantry.families import FAMILIES


def gptq_state(folder: Path) -> dict[str, Tensor]:
    """The state dict of the stock dense model, weights in float32.

    Layout (GPTQModel, AutoGPTQ): qweight int32 (in * bits / 32, out) and qzeros int32 (groups, out * bits / 32)
    are little-endian bit streams along their packed axis; W[o, i] = scales[g_idx[i], o] * (q - zero).
    """
    config = json.loads((folder / "config.json").read_text())
    grid = config["quantization_config"]
    transposed = FAMILIES[config["model_type"]].transposed
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                state[key] = tensors.get_tensor(key)
    for name in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
        parts = {part: state.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = _gptq_weight(parts, grid["bits"], grid["checkpoint_format"])
        state[f"{name}.weight"] = weight.t().contiguous() if transposed else weight
    return state


def _gptq_weight(parts: dict[str, Tensor], bits: int, checkpoint_format: str) -> Tensor:
    """(out, in) float32."""
    scales = parts["scales"].float().numpy()  # (groups, out)
    codes = _bit_stream(parts["qweight"].numpy().T, bits)  # (out, in)
    zeros = _bit_stream(parts["qzeros"].numpy(), bits)[:, : scales.shape[1]].astype(np.int32)  # (groups, out)
    if checkpoint_format == "gptq":  # version 1 stores zero - 1
        zeros += 1
    group = parts["g_idx"].numpy()
    weight = (codes.astype(np.float32) - zeros[group].T) * scales[group].T
    return torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))


def _bit_stream(words: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """(rows, words) int32 to (rows, words * 32 / bits) uint8: bit by bit, the plainest reading there is."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    count = stream.shape[1] // bits
    fields = stream[:, : count * bits].reshape(len(words), count, bits)
    return np.packbits(fields, axis=2, bitorder="little")[..., 0]
