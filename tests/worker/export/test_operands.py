"""Language models whose checkpoint carries activation quantizers and softmax biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from torch import Tensor

import quantry
from quantry.layers.operands import ATTENTION, attach, set_probability_bias, use_quantized_attention
from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from worker.errors import ExportError
from worker.export.quantry_format import Operands
from worker.export.verify import verify

Build = Callable[..., Any]
ATTENTIONS = {"llama": "self_attn", "opt": "self_attn", "gpt2": "attn", "gpt_neox": "attention"}


def dress(model: Any, name: str, heads: int = 4) -> Operands:
    """Quantizers before every layer and on the probabilities of every attention, a bias on each of them."""
    quantizers: dict[str, ActivationQuantizer] = {
        f"{layer}.input": TokenQuantizer(6) for layer in model.layers
    }
    biases: dict[str, Tensor] = {}
    use_quantized_attention(model.model)
    for path, _ in model.model.named_modules():
        if path.endswith(f".{ATTENTIONS[name]}"):
            low, high = torch.zeros(heads, 1, 1), torch.linspace(0.5, 1, heads).view(-1, 1, 1)
            quantizers[f"{path}.probabilities"] = UniformQuantizer.covering(low, high, 4)
            quantizers[f"{path}.key"] = TokenQuantizer(6, symmetric=True)
            biases[path] = torch.linspace(-0.01, 0.02, heads).view(-1, 1, 1)
    for operand, quantizer in quantizers.items():
        attach(model.model, operand, copy.deepcopy(quantizer))
    for attention, bias in biases.items():
        set_probability_bias(model.model, attention, bias.clone())
    return Operands(quantizers, biases)


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_what_loads_computes_what_was_in_memory(name: str, tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny(name, added=".")
    operands = dress(model, name)
    model.export(tmp_path / "source", tmp_path / "out", "quantry", operands=operands)
    loaded: Any = quantry.load(tmp_path / "out", dtype=torch.float32)
    assert loaded.config._attn_implementation == ATTENTION
    with torch.no_grad():
        got = loaded(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, model.logits(ids), atol=1e-5, rtol=1e-5)
        loaded.save_pretrained(tmp_path / "again")
        again: Any = quantry.load(tmp_path / "again", dtype=torch.float32)
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, got, atol=0, rtol=0)


def test_a_clean_process_agrees(tiny: Build, tmp_path: Path) -> None:
    model = tiny("llama")
    operands = dress(model, "llama")
    model.export(tmp_path / "source", tmp_path / "out", "quantry", operands=operands)
    result = verify(tmp_path / "out", "quantry", model.reference(tmp_path / "reference.safetensors"))
    assert float(result["max_abs_difference"]) < 1e-5


def test_keys_that_are_masked_stay_at_zero(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    """With a bias on every probability, padding and the tokens to come must not be seen all the same.

    No quantizers here: where two ways to compute one number differ in the last digit, those make it a step.
    """
    model = tiny("llama")
    operands = Operands(probability_bias=dress(model, "llama").probability_bias)
    model.export(tmp_path / "source", tmp_path / "out", "quantry", operands=operands)
    loaded: Any = quantry.load(tmp_path / "out", dtype=torch.float32)
    text, pad = ids[:1], 3
    padded = torch.cat([torch.full((1, pad), 5), text], dim=1)
    mask = torch.tensor([[0] * pad + [1] * text.shape[1]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = loaded(input_ids=text, use_cache=False).logits
        got = loaded(input_ids=padded, attention_mask=mask, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(got[:, pad:], whole, atol=1e-5, rtol=1e-5)
        other = text.clone()
        other[:, 5:] += 1
        torch.testing.assert_close(loaded(other, use_cache=False).logits[:, :5], whole[:, :5])
        cache, steps = None, []
        for token in text.T:
            logits, cache = factories.next_token(loaded, token.unsqueeze(0), cache)
            steps.append(logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_bias_alone_needs_no_quantizer(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny("opt")
    use_quantized_attention(model.model)
    attention, bias = "model.decoder.layers.1.self_attn", torch.full((1, 1, 1), 0.02)
    set_probability_bias(model.model, attention, bias)
    operands = Operands(probability_bias={attention: bias})
    model.export(tmp_path / "source", tmp_path / "out", "quantry", operands=operands)
    loaded: Any = quantry.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.logits(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gguf"])
def test_formats_without_a_place_for_them_refuse(format: str, tiny: Build, tmp_path: Path) -> None:
    model = tiny("llama")
    operands = dress(model, "llama")
    with pytest.raises(ExportError, match="no place for what quantizes activations"):
        model.export(tmp_path / "source", tmp_path / "out", format, operands=operands)
