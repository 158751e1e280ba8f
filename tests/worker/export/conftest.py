"""Tiny random models of every family, quantized in memory, to be written and read back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from quantry.families import Family, family_of
from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight, quantize_to_grid
from quantry.reports import Manifest
from worker.export import export

_SMALL = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_LLAMA = {**_SMALL, **_HEADS, "pad_token_id": None}
_OPT: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", **_OPT},
    "opt-post-ln": {
        "model_type": "opt",
        **_OPT,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "opt-no-bias": {"model_type": "opt", **_OPT, "enable_bias": False},
    "llama": {"model_type": "llama", **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": None, "head_dim": 24},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16},
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 16, "pad_token_id": 0},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "head_dim": 16, "pad_token_id": 0},
    "gemma3_text": {"model_type": "gemma3_text", **_LLAMA, "head_dim": 16, "pad_token_id": 0},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_SMALL, "num_attention_heads": 4, "max_position_embeddings": 64},
}


@dataclass(frozen=True)
class Tiny:
    """A float32 model on its grid in memory, and what an export of it is given."""

    model: nn.Module
    config: dict[str, Any]
    family: Family
    layers: dict[str, QuantizedLayer]
    kept: dict[str, Tensor]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        found = self.model(input_ids=ids, use_cache=False).logits
        assert isinstance(found, Tensor)
        return found

    def reference(self, file: Path) -> Path:
        """The file that `verify` compares with."""
        from safetensors.torch import save_file

        ids = token_ids()
        save_file({"input_ids": ids, "logits": self.logits(ids).float().contiguous()}, file)
        return file

    def export(self, source: Path, target: Path, format: str, **options: Any) -> Manifest:
        target.mkdir(parents=True, exist_ok=True)
        source.mkdir(parents=True, exist_ok=True)
        return export(
            source,
            target,
            format=format,  # type: ignore[arg-type]
            config=self.config,
            family=self.family,
            layers=self.layers.items(),
            kept=self.kept.items(),
            **options,
        )


def token_ids() -> Tensor:
    return torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(7))


def random_layer(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """Round a weight (out, in) to a grid of its range; every third symmetric scale is negative."""
    rows, columns = weight.shape
    groups = columns // group_size if group_size else 1
    grouped = weight.view(rows, groups, -1)
    middle = 2 ** (bits - 1)
    if symmetric:
        scale = grouped.abs().amax(-1) / middle
        scale.view(-1)[::3] *= -1
        zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round().to(torch.uint8)
    scale = scale.to(scale_dtype)
    codes = quantize_to_grid(weight, scale, zero, bits)
    return QuantizedWeight(codes, scale, zero, bits, group_size, symmetric)


def build(
    name: str,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    added: str = "",
    positions: int = 0,
) -> Tiny:
    """A model of CONFIGS on its grid; layers whose name matches `added` get a new bias."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[CONFIGS[name]["model_type"]](**CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    raw = json.loads(config.to_json_string())
    raw["architectures"] = [type(model).__name__]
    family = family_of(raw)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * 0.1
        parameter.data = parameter.data + noise if parameter.dim() == 1 else noise
    layers: dict[str, QuantizedLayer] = {}
    for path, module in list(model.named_modules()):
        if path.startswith(family.blocks) and path.endswith(family.linears):
            layers[path] = _quantize(path, module, added, positions, bits, group_size, symmetric, scale_dtype)
    gone = {f"{path}.{part}" for path in layers for part in ("weight", "bias")}
    tied = {id(model.get_input_embeddings().weight)} if config.tie_word_embeddings else set()
    kept = {
        key: tensor.detach()
        for key, tensor in model.state_dict(keep_vars=True).items()
        if key not in gone and not (key == "lm_head.weight" and id(tensor) in tied)
    }
    return Tiny(model, raw, family, layers, kept)


def _quantize(
    path: str,
    module: nn.Module,
    added: str,
    positions: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> QuantizedLayer:
    """Put a layer of the model in memory on its grid."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.data.t() if transposed else module.weight.data
    grid = random_layer(
        weight.contiguous(),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    dense = grid.dequantize()
    module.weight.data = dense.t().contiguous() if transposed else dense
    had = module.bias is not None
    bias = module.bias.data.clone() if had else None
    if added and re.search(added, path):
        bias = torch.randn(len(dense)) * 0.3
        module.bias = nn.Parameter(bias)
    layer = QuantizedLayer(grid, bias, added_bias=not had and bias is not None)
    if positions:
        layer = replace(layer, position_bias=torch.randn(positions, len(dense)) * 0.3)
    return layer


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Tiny]:
    return build


@pytest.fixture(scope="session", name="random_layer")
def _random_layer() -> Callable[..., QuantizedWeight]:
    return random_layer


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return token_ids()
