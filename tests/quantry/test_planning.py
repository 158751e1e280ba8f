"""The dry run against models that transformers itself builds: counts, bytes, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from quantry.base import SpecError
from quantry.costs import estimate, peak_memory
from quantry.families import FAMILIES
from quantry.headers import TensorInfo
from quantry.planning import Plan, plan
from quantry.recipe import dividing_group_sizes
from quantry.requests import JobRequest

SIZES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"intermediate_size": 64, "max_position_embeddings": 64},
}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64}
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def tiny(
    model_type: str, dtype: torch.dtype = torch.float32, **extra: Any
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors of a random model, as a checkpoint would hold them (no tied copies)."""
    sizes = SIZES.get(model_type, LLAMA)
    config = AutoConfig.for_model(model_type, **{**COMMON, **sizes, "pad_token_id": 0, **extra})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = set(model.all_tied_weights_keys)
    tensors = {
        name: TensorInfo(_DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    return {**config.to_dict(), "architectures": [type(model).__name__]}, tensors


def planned(
    model_type: str,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **request: Any,
) -> Plan:
    found, tensors = tiny(model_type, dtype, **(config or {}))
    return plan(
        JobRequest(**{"model": "a/b", **({} if "recipe" in request else {"bits": 4}), **request}).resolve(),
        found,
        tensors,
    )


def refusal(model_type: str, **arguments: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        planned(model_type, **arguments)
    return caught.value


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_plans_its_own_architecture(model_type: str) -> None:
    config, tensors = tiny(model_type)
    found = plan(JobRequest(model="a/b", bits=4).resolve(), config, tensors)
    assert len(found.quantized) == 2 * len(FAMILIES[model_type].linears)
    assert found.parameters == sum(info.numel for info in tensors.values())
    assert found.fp_bytes == sum(info.nbytes for info in tensors.values())
    assert found.kept_parameters + sum(x.rows * x.columns for x in found.quantized) == found.parameters
    assert found.context == 64
    assert found.spec.calibration.sequence_length == 64
    assert found.vocabulary == 96
    assert {x.name for x in found.layers if not x.quantized} >= {
        n[:-7] for n in tensors if "embed_tokens.weight" in n
    }
    assert found.format == ("quantry" if model_type == "gpt2" else "compressed-tensors")


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("opt", {}), ("llama", {}), ("qwen2", {}), ("gpt_neox", {"attention_bias": False})],
)
def test_existing_biases_are_those_of_the_model(model_type: str, config: dict[str, Any]) -> None:
    _, tensors = tiny(model_type, **config)
    found = planned(model_type, config=config)
    assert {x.name for x in found.quantized if x.had_bias} == {
        x.name for x in found.quantized if f"{x.name}.bias" in tensors
    }


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([None, 8, 16, 32]),
    symmetric=st.booleans(),
)
def test_effective_bits_are_codes_scales_and_zeros(bits: int, group: int | None, symmetric: bool) -> None:
    found = planned("llama", bits=bits, group_size=group, symmetric=symmetric)
    weights = sum(x.rows * x.columns for x in found.quantized)
    scales = sum(x.rows * (x.columns // group if group else 1) for x in found.quantized)
    per_scale = 16 if symmetric else 16 + bits
    assert found.effective_bits == pytest.approx(bits + per_scale * scales / weights, abs=1e-4)
    kept_least = 2 * found.kept_parameters
    assert found.quantized_bytes >= kept_least + weights * bits // 8 + 2 * scales


def test_bytes_in_every_layout() -> None:
    """32 columns and 4 bits: 16 bytes of codes a row; Q4_0 takes 18 with its scale."""
    request = {"bits": 4, "group_size": 32}
    rows = sum(x.rows * x.columns // 32 for x in planned("llama", **request).quantized)
    layers = len(planned("llama").quantized)
    columns = sum(x.columns for x in planned("llama").quantized)
    kept = {  # float16 embeddings and head, float32 norms
        name: info
        for name, info in tiny("llama")[1].items()
        if "norm" in name or "embed" in name or "lm_head" in name
    }
    kept_bytes = sum(info.numel * (4 if "norm" in name else 2) for name, info in kept.items())
    written = {
        fmt: planned("llama", format=fmt, **request).quantized_bytes - kept_bytes
        for fmt in ("gguf", "quantry", "compressed-tensors")
    }
    assert written == {"gguf": 18 * rows, "quantry": 18 * rows, "compressed-tensors": 18 * rows + 16 * layers}
    gptq = planned("llama", format="gptq", symmetric=True, **request).quantized_bytes - kept_bytes
    assert gptq == 18 * rows + rows // 2 + 4 * columns


def test_compensation_stores_a_bias_only_where_there_was_none() -> None:
    plain, compensated = planned("qwen2"), planned("qwen2", correction="bias_compensation")
    new = sum(x.rows for x in plain.quantized if not x.had_bias)
    assert compensated.quantized_bytes - plain.quantized_bytes == 4 * new
    assert planned("opt").quantized_bytes == planned("opt", correction="bias_compensation").quantized_bytes


def test_a_bias_per_position_is_counted_for_each_token() -> None:
    recipe = [
        {"method": "rtn", "bits": 4},
        {"method": "bias_compensation", "granularity": "position_channel"},
    ]
    plain = planned("opt", method="rtn", format="quantry")
    found = planned("opt", recipe=recipe, calibration={"sequence_length": 16})
    assert found.format == "quantry"
    assert found.quantized_bytes - plain.quantized_bytes == 16 * 4 * sum(x.rows for x in found.quantized)
    assert any("16 positions" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("model_type", "config", "written", "architecture"),
    [
        ("opt", {}, "compressed-tensors", "OPTForCausalLM"),
        ("llama", {}, "compressed-tensors", "LlamaForCausalLM"),
        ("mistral", {"sliding_window": None}, "compressed-tensors", "LlamaForCausalLM"),
        ("mistral", {"sliding_window": 32}, "quantry", "MistralForCausalLM"),
        ("qwen2", {}, "compressed-tensors", "LlamaForCausalLM"),
        ("qwen3", {}, "quantry", "Qwen3ForCausalLM"),
        ("gemma", {}, "quantry", "GemmaForCausalLM"),
        ("gpt2", {}, "quantry", "GPT2LMHeadModel"),
        ("gpt_neox", {}, "compressed-tensors", "GPTNeoXForCausalLM"),
    ],
)
def test_auto_keeps_the_biases_that_compensation_adds(
    model_type: str, config: dict[str, Any], written: str, architecture: str
) -> None:
    found = planned(model_type, config=config, correction="bias_compensation")
    assert (found.format, found.written_family.architecture) == (written, architecture)


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "gpt2"])
def test_an_explicit_format_without_a_place_is_refused(model_type: str, fmt: str) -> None:
    error = refusal(model_type, correction="bias_compensation", format=fmt)
    assert error.path == "format"
    assert "use quantry" in error.detail


def test_gguf_is_for_llama_only() -> None:
    error = refusal("opt", format="gguf", bits=4, group_size=32)
    assert error.path == "format"
    assert "opt" in error.detail


def test_gptq_layers_must_be_multiples_of_32() -> None:
    error = refusal("llama", config={"intermediate_size": 48}, format="gptq")
    assert error.path == "format"
    assert "model.layers.0.mlp.gate_proj" in error.detail


def test_a_group_that_does_not_divide_names_the_layer_and_the_sizes_that_would() -> None:
    error = refusal("llama", config={"intermediate_size": 48}, group_size=32)
    assert error.path == "recipe.0.group_size"
    assert "48 columns of model.layers.0.mlp.down_proj" in error.detail
    assert "16, 8, 4, 2 would divide" in error.detail
    for size in (16, 8):
        assert planned("llama", config={"intermediate_size": 48}, group_size=size).quantized


@given(st.integers(8, 4096))
def test_listed_group_sizes_divide(columns: int) -> None:
    assert all(columns % size == 0 for size in dividing_group_sizes(columns))


@pytest.mark.parametrize("field", ["calibration", "evaluation"])
def test_windows_longer_than_the_context_are_refused(field: str) -> None:
    error = refusal("opt", **{field: {"sequence_length": 65}})
    assert error.path == f"{field}.sequence_length"
    assert "64" in error.detail


def test_open_settings_are_filled_in() -> None:
    found = planned("opt", calibration={"sequence_length": 48}).spec
    assert found.calibration.sequence_length == 48
    assert found.evaluation is not None
    assert found.evaluation.sequence_length == 48
    assert found.format == "compressed-tensors"


def _broken(change: Any) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    config, tensors = tiny("llama")
    change(config, tensors)
    return config, tensors


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c, t: t.pop(LAYER), f"lacks {LAYER}"),
        (lambda c, t: t.update({LAYER: TensorInfo("F32", (64,))}), "should be a matrix"),
        (lambda c, t: t.update({LAYER: TensorInfo("F32", (8, 8))}), "block 0 has"),
        (lambda c, t: t.update({LAYER: TensorInfo("I8", (64, 32))}), "is I8"),
        (lambda c, t: c.update(num_hidden_layers=3), r"says 3 blocks, the checkpoint holds 2 \(0-1\)"),
        (lambda c, t: c.update(num_hidden_layers=2**31 - 1), "says 2147483647 blocks"),
        (lambda c, t: c.update(num_hidden_layers="2"), "not a positive whole number"),
        (lambda c, t: c.update(num_hidden_layers=2**31), "at most 2147483647"),
        (lambda c, t: c.update(hidden_size=16), "hidden size of 16"),
        (
            lambda c, t: c.update(intermediate_size=96),
            "gate_proj has 64 rows, config.json says an MLP width of 96",
        ),
        (
            lambda c, t: c.update(vocab_size=95),
            r"embed_tokens.weight has the shape \[96, 32\].* a vocabulary of 95",
        ),
        (lambda c, t: c.update(mlp_bias=True), "lacks model.layers.0.mlp.gate_proj.bias"),
        (
            lambda c, t: t.update({LAYER.replace("weight", "bias"): TensorInfo("F32", (64,))}),
            "holds model.layers.1.mlp.up_proj.bias, by config.json the layer has none",
        ),
        (lambda c, t: c.pop("hidden_size"), "does not say the hidden size"),
        (lambda c, t: t.pop("lm_head.weight"), "no output head"),
        (lambda c, t: c.update(auto_map={"AutoModel": "x.Y"}), "remote code"),
        (lambda c, t: c.update(model_type="mamba"), "'mamba' is not supported"),
        (lambda c, t: c.update(model_type=["llama"]), r"\['llama'\] is not supported"),
        (lambda c, t: c.update(architectures=5), "architectures is 5, not a list"),
        (lambda c, t: c.update(architectures=["LlamaModel"]), "no language-model head"),
        (lambda c, t: c.update(quantization_config={"quant_method": "gptq"}), r"already quantized \(gptq\)"),
        (lambda c, t: c.update(quantization_config="gptq"), "already quantized"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(change: Any, fault: str) -> None:
    config, tensors = _broken(change)
    with pytest.raises(SpecError, match=fault) as caught:
        plan(JobRequest(model="a/b", bits=4).resolve(), config, tensors)
    assert caught.value.path == "model"


@pytest.mark.parametrize(
    "config", [{"do_layer_norm_before": False}, {"layer_norm_elementwise_affine": False}]
)
def test_smoothquant_is_refused_where_the_norms_take_no_scale(config: dict[str, Any]) -> None:
    recipe = [{"method": "rtn", "bits": 8}, {"method": "smoothquant"}]
    error = refusal("opt", config=config, recipe=recipe)
    assert error.path == "recipe.1"
    assert "smoothquant" in error.detail
    assert planned("opt", recipe=recipe).quantized
    assert planned("opt", config=config, recipe=recipe[:1]).quantized


def test_a_tied_head_in_the_file_is_counted_once() -> None:
    config, tensors = tiny("llama", tie_word_embeddings=True)
    spec = JobRequest(model="a/b", bits=4).resolve()
    once = plan(spec, config, tensors)
    twice = plan(spec, config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert (once.parameters, once.quantized_bytes) == (twice.parameters, twice.quantized_bytes)


def test_a_checkpoint_without_the_base_prefix_plans_the_same() -> None:
    config, tensors = tiny("opt")
    spec = JobRequest(model="a/b", bits=4).resolve()
    bare = {name.removeprefix("model."): info for name, info in tensors.items()}
    assert plan(spec, config, bare).layers == plan(spec, config, tensors).layers


def test_the_estimate_grows_with_what_is_asked() -> None:
    small = planned("opt", calibration={"samples": 8})
    large = planned("opt", calibration={"samples": 8192})
    answers = [estimate(x, threads=2, cuda=False, evaluation_bytes=100_000) for x in (small, large)]
    assert answers[0].seconds_high < answers[1].seconds_high
    assert all(x.seconds_low < x.seconds_high for x in answers)
    assert peak_memory(large, 0) > peak_memory(small, 0)


def test_an_unknown_evaluation_text_is_said_to_be_left_out() -> None:
    answer = estimate(planned("opt"), threads=2, cuda=False, evaluation_bytes=None)
    assert any("not known" in warning for warning in answer.warnings)
    none = estimate(planned("opt", evaluation=None), threads=2, cuda=False, evaluation_bytes=None)
    assert not any("not known" in warning for warning in none.warnings)
