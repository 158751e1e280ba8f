"""The GPTQ layout, read by an unpacker of its own and by `quantry.load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantry
from worker.errors import ExportError

Build = Callable[..., Any]


def field(words: Tensor, index: int, bits: int) -> int:
    """Field `index` of a little-endian bit stream of int32 words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return (stream >> (index * bits)) & (2**bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_published_layout(
    bits: int, symmetric: bool, group_size: int | None, tiny: Build, tmp_path: Path
) -> None:
    model = tiny("llama", bits=bits, symmetric=symmetric, group_size=group_size)
    model.export(tmp_path / "source", tmp_path / "out", "gptq")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert settings == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (bits, group_size or -1, symmetric)
    assert (settings["checkpoint_format"], settings["desc_act"]) == ("gptq", False)
    name = "model.layers.0.mlp.down_proj"
    weight = model.layers[name].weight
    rows, columns = weight.codes.shape
    groups = weight.scale.shape[1]
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    assert qweight.shape == (columns * bits // 32, rows)
    assert qzeros.shape == (groups, rows * bits // 32)
    assert torch.equal(tensors[f"{name}.scales"], weight.scale.t())
    assert tensors[f"{name}.scales"].dtype == torch.float16
    assert tensors[f"{name}.g_idx"].tolist() == [
        column // (group_size or columns) for column in range(columns)
    ]
    for row in (0, 1, rows - 1):
        assert [field(qweight[:, row], i, bits) for i in range(columns)] == weight.codes[row].tolist()
        for group in range(groups):
            assert field(qzeros[group], row, bits) + 1 == int(weight.zero_point[row, group])


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2", "gpt2", "gpt_neox"])
def test_loads_with_added_biases(name: str, tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny(name, bits=3, symmetric=False, added=".")
    model.export(tmp_path / "source", tmp_path / "out", "gptq")
    with torch.no_grad():
        got = (
            quantry.load(tmp_path / "out", dtype=torch.float32).eval()(input_ids=ids, use_cache=False).logits
        )
    torch.testing.assert_close(got, model.logits(ids), atol=1e-5, rtol=1e-5)


def test_a_zero_point_of_0_needs_version_2(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny("llama", symmetric=False)
    name = "model.layers.0.self_attn.q_proj"
    weight = model.layers[name].weight
    zero_point = weight.zero_point.clone()
    zero_point[3, 1] = 0
    changed = replace(weight, zero_point=zero_point)
    model.layers[name] = replace(model.layers[name], weight=changed)
    model.model.get_submodule(name).weight.data = changed.dequantize()
    model.export(tmp_path / "source", tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    qzeros = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.qzeros"]
    assert [field(qzeros[1], row, 4) for row in range(64)] == zero_point[:, 1].tolist()
    with torch.no_grad():
        got = quantry.load(tmp_path / "out", dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(got, model.logits(ids), atol=1e-5, rtol=1e-5)


def test_what_the_layout_cannot_hold_is_refused(tiny: Build, tmp_path: Path) -> None:
    def refused(model: Any, words: str) -> None:
        with pytest.raises(ExportError, match=words):
            model.export(tmp_path / "source", tmp_path / "out", "gptq")
        assert list((tmp_path / "out").iterdir()) == []

    refused(tiny("llama", bits=5), "2, 3, 4 or 8 bits, not 5")
    refused(tiny("llama", scale_dtype=torch.float32), "float16")
    refused(tiny("llama", positions=8), "bias per position")
    mixed = tiny("llama")
    mixed.layers.update({key: value for key, value in tiny("llama", bits=8).layers.items() if "mlp" in key})
    refused(mixed, "one grid for all layers")
    partial = tiny("llama")
    name = "model.layers.1.mlp.up_proj"
    partial.kept[f"{name}.weight"] = partial.layers.pop(name).weight.dequantize()
    refused(partial, "up_proj` stayed dense")
