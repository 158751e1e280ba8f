"""Every family, width and grid: what stock transformers loads computes what was quantized in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantry
from worker.errors import ExportError

Build = Callable[..., Any]
# Families in which stock transformers has a place for a bias on every quantized layer.
EVERYWHERE = ["opt", "opt-post-ln", "opt-no-bias", "llama", "mistral", "qwen2", "gpt_neox"]
ATTENTION_ONLY = ["qwen3", "gemma", "gemma2", "gemma3_text"]
ALL = [*EVERYWHERE, *ATTENTION_ONLY, "gpt2"]


def load(folder: Path) -> nn.Module:
    """As a user would, and nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert isinstance(model, nn.Module)
    return model.eval()


def assert_same(tiny: Any, folder: Path, ids: Tensor) -> None:
    with torch.no_grad():
        got = load(folder)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, tiny.logits(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["compressed-tensors", "quantry"])
@pytest.mark.parametrize("name", ALL)
def test_families_without_added_biases(
    name: str, format: str, tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny(name)
    if name == "gpt2" and format == "compressed-tensors":
        with pytest.raises(ExportError, match=r"Conv1D.*quantry"):
            model.export(tmp_path / "source", tmp_path / "out", format)
        assert list((tmp_path / "out").iterdir()) == []
        return
    model.export(tmp_path / "source", tmp_path / "out", format)
    assert_same(model, tmp_path / "out", ids)


@pytest.mark.parametrize("name", ALL)
def test_quantry_keeps_added_biases_in_every_family(
    name: str, tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny(name, added=".", symmetric=False, bits=3, group_size=None)
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    assert_same(model, tmp_path / "out", ids)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model.config["model_type"]
    )


@pytest.mark.parametrize("name", EVERYWHERE)
def test_compressed_tensors_keeps_added_biases(name: str, tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny(name, added=".")
    model.export(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    assert_same(model, tmp_path / "out", ids)


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("llama", r"down_proj"),
        ("llama", r"layers\.1\.self_attn\.q_proj"),
        ("qwen2", "o_proj"),
        ("qwen3", "self_attn"),
    ],
)
def test_layers_that_share_a_switch_get_zeros(
    name: str, added: str, tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny(name, added=added)
    model.export(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    assert_same(model, tmp_path / "out", ids)


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_a_bias_without_a_place_is_refused(name: str, tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"mlp\.down_proj.*use format `quantry`"):
        tiny(name, added="down_proj").export(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sliding_window_is_never_rehomed(tiny: Build, tmp_path: Path) -> None:
    model = tiny("mistral", added="down_proj")
    for window in ({"sliding_window": 32}, {}):  # a config without the key means 4096
        config = {**{k: v for k, v in model.config.items() if k != "sliding_window"}, **window}
        model.config.clear()
        model.config.update(config)
        with pytest.raises(ExportError, match="use format `quantry`"):
            model.export(tmp_path / "source", tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0},
    ],
)
def test_rehoming_keeps_the_rotary_embedding(
    rope: dict[str, Any], tiny: Build, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__("sys").modules[type(tiny("opt")).__module__]
    monkeypatch.setitem(module.CONFIGS, "mistral", {**module.CONFIGS["mistral"], "rope_parameters": rope})
    model = tiny("mistral", added=".")
    model.export(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    assert_same(model, tmp_path / "out", ids)


@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 32), (3, 32), (3, None), (4, None), (5, None), (6, 32), (8, 32), (8, None)]
)
@pytest.mark.parametrize("format", ["compressed-tensors", "quantry", "quantry-asymmetric"])
def test_widths_and_groups(
    format: str, group_size: int | None, bits: int, tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    symmetric = format != "quantry-asymmetric"
    scale_dtype = torch.float32 if bits in (3, 8) else torch.float16
    model = tiny("llama", bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    model.export(tmp_path / "source", tmp_path / "out", format.removesuffix("-asymmetric"))
    assert_same(model, tmp_path / "out", ids)


def test_negative_scales_load_bit_exactly(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny("llama", bits=3, group_size=32)
    name = "model.layers.1.mlp.up_proj"
    assert bool((model.layers[name].weight.scale < 0).any())
    for format in ("compressed-tensors", "quantry"):
        model.export(tmp_path / "source", tmp_path / format, format)
        loaded = load(tmp_path / format)
        loaded(input_ids=ids)  # compressed-tensors unpacks in the first forward
        layer = loaded.get_submodule(name)
        weight = layer(torch.eye(layer.in_features)).t()  # an identity through the layer shows its weight
        torch.testing.assert_close(weight, model.layers[name].weight.dequantize(), atol=0, rtol=0)


def test_scales_and_biases_keep_their_precision_in_a_bfloat16_model(tiny: Build, tmp_path: Path) -> None:
    model = tiny("llama", added=".")
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, layer in model.layers.items():
        module = loaded.get_submodule(name)
        assert module.weight_scale.dtype == torch.float16
        torch.testing.assert_close(module.weight_scale, layer.weight.scale, atol=0, rtol=0)
        torch.testing.assert_close(module.bias, layer.bias, atol=0, rtol=0)


def test_several_grids_in_one_model(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    mixed, other = tiny("llama", bits=4), tiny("llama", bits=3, group_size=None)
    for name in [name for name in mixed.layers if "down_proj" in name]:
        mixed.layers[name] = other.layers[name]
        mixed.model.get_submodule(name).weight.data = other.layers[name].weight.dequantize()
    for format in ("compressed-tensors", "quantry"):
        mixed.export(tmp_path / "source", tmp_path / format, format)
        assert_same(mixed, tmp_path / format, ids)


def test_packed_layers_stay_packed_and_dense_ones_come_on_request(
    tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    for name in ("llama", "gpt2"):
        model = tiny(name, added=".", bits=3, symmetric=False)
        model.export(tmp_path / "source", tmp_path / name, "quantry")
        packed = quantry.load(tmp_path / name, dtype=torch.float32)
        layer = packed.get_submodule(next(iter(model.layers)))
        assert layer.weight_packed.dtype == torch.int32
        assert not hasattr(layer, "weight")
        dense = quantry.load(tmp_path / name, dtype=torch.float32, dequantize=True)
        dense.save_pretrained(tmp_path / f"{name}-dense")  # and the biases survive being saved dense
        for found in (packed, dense, load(tmp_path / f"{name}-dense")):
            with torch.no_grad():
                got = found(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, model.logits(ids), atol=1e-5, rtol=1e-5)
