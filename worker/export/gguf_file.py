"""GGUF: symmetric 4 bits in groups of 32 are Q4_0, 8 bits are Q8_0, without loss (docs/formats.md).

Tensors are spooled to a file beside the target as they come, because GGUF wants their list first. Rows of q
and k are interleaved as llama.cpp's rotary embedding wants them, and so are their biases.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

import quantry
from quantry.families import Family
from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from quantry.reports import FileEntry
from worker.errors import ExportError
from worker.export.files import file_entry, write_json
from worker.export.formats import check_layer, float16_scale, refuse_positions
from worker.export.gguf_tokenizer import read_vocabulary, write_vocabulary
from worker.export.slots import config_with_slots, skeleton, zero_biases

LABEL = "GGUF"
BLOCK = 32
_ALIGNMENT = 32
_KINDS = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
_FILE_TYPES = {4: LlamaFileType.MOSTLY_Q4_0, 8: LlamaFileType.MOSTLY_Q8_0}
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama. Raises ExportError for one it does not know."""
    module, _, part = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{part}"
    pieces = module.removeprefix("model.layers.").split(".", 1)
    if len(pieces) == 2 and pieces[0].isdigit() and pieces[1] in _NAMES:
        return f"blk.{pieces[0]}.{_NAMES[pieces[1]]}.{part}"
    raise ExportError(f"`{name}` has no place in a GGUF file of the llama architecture")


class _Spool:
    """Tensor data in the order of their infos, each padded, ready to be copied behind the header."""

    def __init__(self, writer: GGUFWriter, path: Path) -> None:
        self._writer = writer
        self.path = path
        self._out = path.open("wb")

    def __enter__(self) -> _Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()

    def add(self, name: str, content: np.ndarray[Any, Any], raw: GGMLQuantizationType | None = None) -> None:
        self._writer.add_tensor_info(name, content.shape, content.dtype, content.nbytes, raw_dtype=raw)
        self._out.write(np.ascontiguousarray(content).tobytes())
        self._out.write(bytes(-content.nbytes % _ALIGNMENT))


def export_gguf(
    source: Path,
    target: Path,
    config: Mapping[str, Any],
    family: Family,
    layers: Iterable[tuple[str, QuantizedLayer]],
    kept: Iterable[tuple[str, Tensor]],
) -> list[FileEntry]:
    """Write model-Q4_0.gguf or model-Q8_0.gguf, and the config.json of the same model. Raises ExportError."""
    if not family.gguf:
        raise ExportError(f"GGUF export knows the llama architecture, not {family.model_type}")
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    final = {key: value for key, value in config.items() if key != "quantization_config"}
    vocabulary = read_vocabulary(source, config["vocab_size"])
    rope = _rope(skeleton(final).config)
    writer = GGUFWriter(None, "llama")
    with _Spool(writer, target / "tensors.partial") as spool:
        bits, weights, biases = _add_layers(spool, layers, heads)
        plain = biases | _add_kept(spool, kept, heads)
        biased = {name.removesuffix(".bias") for name in plain if name.endswith(".bias")}
        final = config_with_slots(final, family, {local for local in family.linears if _any(biased, local)})
        model = skeleton(final)
        for name, zeros in zero_biases(model, family, config, plain, weights).items():
            spool.add(gguf_name(name), zeros.float().numpy())
        if rope.factors is not None:
            spool.add("rope_freqs.weight", rope.factors)
    _describe(writer, model.config, bits, rope)
    write_vocabulary(writer, vocabulary)
    path = target / f"model-{_KINDS[bits].name}.gguf"
    _assemble(writer, path, spool.path)
    write_json(target / "config.json", final)
    return [file_entry(target, path)]


def _any(layers: set[str], local: str) -> bool:
    return any(name.endswith(f".{local}") for name in layers)


def _add_layers(
    spool: _Spool, layers: Iterable[tuple[str, QuantizedLayer]], heads: Mapping[str, int]
) -> tuple[int, set[str], set[str]]:
    """Returns the bits, and the names of the weights and biases that were added."""
    bits: set[int] = set()
    weights: set[str] = set()
    biases: set[str] = set()
    for name, layer in layers:
        check_layer(name, layer)
        refuse_positions(name, layer, LABEL)
        blocks = _blocks(name, layer, _row_order(name, len(layer.weight.codes), heads))
        bits.add(layer.weight.bits)
        spool.add(gguf_name(f"{name}.weight"), blocks, _KINDS[layer.weight.bits])
        weights.add(f"{name}.weight")
        if layer.bias is not None:
            _add_plain(spool, f"{name}.bias", layer.bias, heads)
            biases.add(f"{name}.bias")
    if len(bits) != 1:
        raise ExportError(f"a GGUF file here has one width for all quantized layers, not {sorted(bits)}")
    return bits.pop(), weights, biases


def _add_kept(spool: _Spool, kept: Iterable[tuple[str, Tensor]], heads: Mapping[str, int]) -> set[str]:
    names = set()
    for name, tensor in kept:
        _add_plain(spool, name, tensor, heads)
        names.add(name)
    return names


def _add_plain(spool: _Spool, name: str, tensor: Tensor, heads: Mapping[str, int]) -> None:
    """Vectors in float32; matrices in float16 where that is exact, else in bfloat16 or float32."""
    order = _row_order(name.rpartition(".")[0], len(tensor), heads)
    tensor = tensor.detach().cpu()[order] if order is not None else tensor.detach().cpu()
    if tensor.dim() == 1:
        spool.add(gguf_name(name), tensor.float().numpy())
    elif torch.equal(tensor.to(torch.float16).float(), tensor.float()):
        spool.add(gguf_name(name), tensor.to(torch.float16).numpy())
    elif tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        spool.add(gguf_name(name), raw, GGMLQuantizationType.BF16)
    else:
        spool.add(gguf_name(name), tensor.float().numpy())


def _row_order(layer: str, rows: int, heads: Mapping[str, int]) -> Tensor | None:
    """Where the rows of q and k go: llama.cpp rotates neighbours, transformers the two halves of a head."""
    count = heads.get(layer.rpartition(".")[2])
    if count is None:
        return None
    return torch.arange(rows).view(count, 2, rows // count // 2).transpose(1, 2).reshape(-1)


def _blocks(name: str, layer: QuantizedLayer, order: Tensor | None) -> np.ndarray[Any, Any]:
    """Rows of Q4_0 (float16 d, 16 bytes: element i low, i + 16 high) or Q8_0 (float16 d, 32 int8) blocks.

    Both stand for d * (code - 2**(bits - 1)): (out, in / 32 * bytes of a block) uint8.
    """
    weight = _checked(name, layer.weight)
    scale = float16_scale(name, layer, LABEL)
    codes = weight.codes
    if order is not None:
        codes, scale = codes[order], scale[order]
    grouped = codes.reshape(len(codes), -1, BLOCK)
    d = scale.contiguous().view(torch.uint8).view(*scale.shape, 2)
    values = (
        grouped[..., :16] | (grouped[..., 16:] << 4) if weight.bits == 4 else grouped ^ 128
    )  # int8: code - 128
    return torch.cat([d, values], dim=-1).view(len(codes), -1).numpy()


def _checked(name: str, weight: QuantizedWeight) -> QuantizedWeight:
    if not (weight.symmetric and weight.group_size == BLOCK and weight.bits in _KINDS):
        raise ExportError(
            f"layer `{name}`: GGUF Q4_0 and Q8_0 hold symmetric weights of 4 or 8 bits in groups of 32, "
            "nothing else exactly"
        )
    return weight


class _Rope:
    """How positions are scaled. `factors`: float32 (head_dim / 2), what llama.cpp divides frequencies by."""

    def __init__(self, theta: float, linear: float | None, factors: np.ndarray[Any, Any] | None) -> None:
        self.theta = theta
        self.linear = linear
        self.factors = factors


def _rope(config: Any) -> _Rope:
    """Raises ExportError for a scaling that is not written here."""
    settings = config.rope_parameters
    kind = settings.get("rope_type", "default")
    theta = float(settings["rope_theta"])
    if kind == "default":
        return _Rope(theta, None, None)
    if kind == "linear":
        return _Rope(theta, float(settings["factor"]), None)
    if kind == "llama3":
        return _Rope(theta, None, _llama3_factors(theta, _head_dim(config), settings))
    raise ExportError(f"GGUF export does not write rotary scaling of type {kind!r}; use another format")


def _llama3_factors(theta: float, head_dim: int, settings: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Llama 3.1: long waves are slowed by `factor`, short ones are not, those between gradually."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    waves = 2 * np.pi / frequencies
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    smooth = np.clip((settings["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / settings["factor"] + smooth), dtype=np.float32)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _describe(writer: GGUFWriter, config: Any, bits: int, rope: _Rope) -> None:
    """The metadata that llama.cpp builds the network from."""
    writer.add_quantization_version(2)
    writer.add_file_type(_FILE_TYPES[bits])
    writer.add_quantized_by(f"quantry {quantry.__version__}")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope.theta)
    if rope.linear is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear)


def _assemble(writer: GGUFWriter, path: Path, spool: Path) -> None:
    """Header, metadata, tensor infos, then the spooled data; the spool is removed."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as out, spool.open("rb") as data:
        out.write(bytes(-out.tell() % _ALIGNMENT))
        while piece := data.read(1 << 24):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    spool.unlink()
