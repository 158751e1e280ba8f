"""Dense weights from the GPTQ and GGUF artifacts that Quantry writes, by the published layouts alone.

Independent of the code that writes them and of the packages that usually read them, so that a checkpoint can
be verified, and used, where those are not installed.
"""

from __future__ import annotations

import importlib
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

    Layout (GPTQModel, AutoGPTQ): qweight int32 (in * bits / 32, out) and qzeros int32 (groups, out * bits /
    32) are little-endian bit streams along their packed axis; W[o, i] = scales[g_idx[i], o] * (q - zero).
    """
    config = json.loads((folder / "config.json").read_text())
    grid = config["quantization_config"]
    transposed = FAMILIES[config["model_type"]].transposed
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            state.update({key: tensors.get_tensor(key) for key in list(tensors.keys())})
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


def gguf_state(folder: Path, file: Path) -> dict[str, Tensor]:
    """The state dict of the stock dense Llama, biases included, by the `gguf` package's own dequantizer.

    Raises: ImportError without that package; ValueError for a tensor that no Llama has.
    """
    reader = importlib.import_module("gguf").GGUFReader(file)
    dequantize = importlib.import_module("gguf.quants").dequantize
    config = json.loads((folder / "config.json").read_text())
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # config.json says the same
            continue
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name, count = _stock_name(tensor.name, heads)
        if count:  # neighbours back to the two halves of a head
            rows = len(values)
            values = values[torch.arange(rows).view(count, rows // count // 2, 2).transpose(1, 2).reshape(-1)]
        state[name] = values
    return state


_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _stock_name(name: str, heads: dict[str, int]) -> tuple[str, int]:
    """transformers' name, and the number of heads whose rows are interleaved (0: none)."""
    *block, layer, part = name.split(".")
    if layer not in _LLAMA_NAMES or (block and block[0] != "blk"):
        raise ValueError(f"`{name}` is no tensor of a Llama")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_LLAMA_NAMES[layer]}.{part}", heads.get(layer, 0)
