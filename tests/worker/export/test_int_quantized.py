"""W8A8 checkpoints: what stock transformers loads computes what was simulated, smoothed norms and all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantry.layers.operands import attach, detach_all
from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.affine import QuantizedLayer
from quantry.recipe import RtnStep, SmoothquantStep
from worker.errors import ExportError
from worker.export.formats import Provenance
from worker.export.int_quantized import IntQuantized
from worker.export.writer import _export_safetensors
from worker.methods.rtn import rtn
from worker.methods.smoothquant import input_maxima, input_quantizers, smooth_block
from worker.models.calls import BlockCall

Build = Callable[..., Any]


def smooth_and_quantize(
    tiny: Any, ids: Tensor, step: SmoothquantStep, bits: int
) -> dict[str, ActivationQuantizer]:
    """SmoothQuant on every block of a model in memory, with its quantizers attached; returns them by place."""
    network, family = tiny.model, tiny.family
    places: dict[str, ActivationQuantizer] = {}
    for index, block in enumerate(network.get_submodule(family.blocks)):
        prefix = f"{family.blocks}.{index}"
        maxima = _maxima(network, block, family, ids)
        smoothed = smooth_block(block, family, tiny.config, maxima, step.alpha)
        for name, tensor in smoothed.norms.items():
            tiny.kept[f"{prefix}.{name}"] = tensor
        for name in family.linears:
            layer = block.get_submodule(name)
            weight = rtn(layer.weight.data, RtnStep.model_validate({"bits": bits}))
            layer.weight.data = weight.dequantize()
            bias = None if layer.bias is None else layer.bias.data
            tiny.layers[f"{prefix}.{name}"] = QuantizedLayer(weight, bias)
        for place, quantizer in input_quantizers(family, maxima, smoothed, step).items():
            attach(block, place, quantizer)
            places[f"{prefix}.{place}"] = quantizer
    return places


def _maxima(network: nn.Module, block: nn.Module, family: Any, ids: Tensor) -> dict[str, Tensor]:
    """`input_maxima` of a block on what the whole network gives it."""
    seen: list[tuple[Tensor, BlockCall]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        seen.append((hidden, BlockCall(args[1:], rest)))

    with torch.no_grad(), block.register_forward_pre_hook(keep, with_kwargs=True):
        network(input_ids=ids, use_cache=False)
    return input_maxima(block, family, seen)


def write(tiny: Any, folder: Path, quantizers: dict[str, ActivationQuantizer]) -> None:
    folder.mkdir(exist_ok=True)
    encoder = IntQuantized(quantizers, tiny.family)
    provenance = Provenance("tiny", "0", (), None)
    layers, kept = tiny.layers.items(), tiny.kept.items()
    _export_safetensors(folder, encoder, tiny.config, tiny.family, layers, kept, provenance, 1 << 30)


@pytest.mark.parametrize(("bits", "inputs"), [(8, 8), (4, 8)])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("name", ["opt", "opt-no-bias", "llama", "qwen2", "qwen3", "gemma", "gpt_neox"])
def test_stock_transformers_computes_what_was_simulated(
    name: str, granularity: str, bits: int, inputs: int, tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny(name)
    step = SmoothquantStep.model_validate({"granularity": granularity, "bits": inputs})
    places = smooth_and_quantize(model, ids, step, bits)
    write(model, tmp_path / "out", places)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        got = loaded.eval()(input_ids=ids, use_cache=False).logits
    quantized = model.logits(ids)
    off = (got - quantized).abs().amax(-1)
    # an activation halfway between two codes falls either way, by the last digit of what comes before it
    assert int((off > 1e-5).sum()) <= 1
    assert float(off.max()) < 0.02 * float(quantized.std())
    detach_all(model.model)  # so the inputs were quantized indeed
    assert float((model.logits(ids) - quantized).abs().max()) > 1e-3


def test_the_config_says_what_is_in_the_file(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny("llama")
    write(model, tmp_path / "out", smooth_and_quantize(model, ids, SmoothquantStep(), 8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert list(config["config_groups"]) == ["group_0"]
    group = config["config_groups"]["group_0"]
    assert group["format"] == "int-quantized"
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (TokenQuantizer(8), "holds symmetric inputs"),
        (UniformQuantizer(8, []), "holds symmetric inputs"),
        (UniformQuantizer(8, [64]), "holds symmetric inputs"),
    ],
)
def test_quantizers_without_a_counterpart_are_refused(
    quantizer: ActivationQuantizer, message: str, tiny: Build, tmp_path: Path
) -> None:
    model = tiny("llama", bits=8, group_size=None)
    with pytest.raises(ExportError, match=message):
        write(model, tmp_path, {f"{name}.input": quantizer for name in model.layers})


def test_what_the_format_has_no_place_for_is_refused(tiny: Build, tmp_path: Path) -> None:
    token = TokenQuantizer(8, symmetric=True)
    model = tiny("llama", bits=8, group_size=None)
    attention = {"model.layers.0.self_attn.probabilities": token}
    with pytest.raises(ExportError, match="probabilities"):
        write(model, tmp_path, attention)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="has no quantizer"):
        write(model, tmp_path, {})
    for options in ({"symmetric": False, "group_size": None}, {"group_size": 32}):
        other = tiny("llama", bits=8, **options)
        with pytest.raises(ExportError, match="scale per channel"):
            write(other, tmp_path, {f"{name}.input": token for name in other.layers})
    with pytest.raises(ExportError, match="Conv1D"):
        write(tiny("gpt2", bits=8, group_size=None), tmp_path, {})
