"""The model families that Quantry knows: where their blocks are, which layers share an input, which can hold a bias.

Plain data, no torch: the server plans jobs with it, the worker runs them with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import architectures


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    groups: linear layers of a block in the order they run; the layers of one group share their input.
    norms: norm of a block -> the group that alone takes its output.
    unit_offset: its norms multiply by 1 + weight.
    flattened: layers that run on (tokens, width), without the batch.
    bias_switches: config key -> layers that get a bias when it is true; a layer in none has a fixed slot or none.
    fixed_bias: layers that always have a bias.
    transposed: weights are stored (in, out), as GPT-2's Conv1D does.
    residual_output: the last layer, if what it returns is added to the residual stream as it is.
    rehome: a `model_type` whose weights compute the same, with bias slots on every layer (if `_rehomable`).
    """

    model_type: str
    architecture: str
    base: str
    blocks: str
    groups: tuple[tuple[str, ...], ...]
    norms: Mapping[str, tuple[str, ...]]
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed_bias: tuple[str, ...] = ()
    residual_output: str | None = None
    transposed: bool = False
    unit_offset: bool = False
    flattened: tuple[str, ...] = ()
    rehome: str | None = None
    gguf: bool = False
    ignored: tuple[str, ...] = (r"rotary_emb\.(original_)?inv_freq$",)

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantized layer of a block, in the order it runs."""
        return tuple(name for group in self.groups for name in group)

    def canonical(self, name: str) -> str:
        """The tensor's name in the causal LM, for checkpoints saved with or without the base prefix."""
        if name == "embed_out.weight":  # how GPT-NeoX checkpoints call the head
            return "lm_head.weight"
        known = name.startswith((f"{self.base}.", "lm_head."))
        return name if known else f"{self.base}.{name}"

    def is_ignored(self, name: str) -> bool:
        """True for buffers that old checkpoints carry and the model computes itself."""
        return any(re.search(pattern, name) for pattern in self.ignored)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA_GROUPS = (_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",))
_LLAMA_NORMS = {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}
_SANDWICH_NORMS = {"input_layernorm": _QKV, "pre_feedforward_layernorm": _GATE_UP}


def _llama_like(
    model_type: str, architecture: str, norms: Mapping[str, tuple[str, ...]] = _LLAMA_NORMS, **extra: Any
) -> Family:
    return Family(model_type, architecture, "model", "model.layers", _LLAMA_GROUPS, norms, **extra)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "opt",
            "OPTForCausalLM",
            "model",
            "model.decoder.layers",
            (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
            {"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)},
            flattened=("fc1", "fc2"),
            bias_switches={"enable_bias": (*_QKV, "self_attn.out_proj", "fc1", "fc2")},
            residual_output="fc2",
        ),
        _llama_like(
            "llama",
            "LlamaForCausalLM",
            bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            residual_output="mlp.down_proj",
            gguf=True,
        ),
        _llama_like("mistral", "MistralForCausalLM", residual_output="mlp.down_proj", rehome="llama"),
        _llama_like(
            "qwen2", "Qwen2ForCausalLM", fixed_bias=_QKV, residual_output="mlp.down_proj", rehome="llama"
        ),
        _llama_like(
            "qwen3",
            "Qwen3ForCausalLM",
            bias_switches={"attention_bias": _ATTENTION},
            residual_output="mlp.down_proj",
        ),
        _llama_like(
            "gemma",
            "GemmaForCausalLM",
            unit_offset=True,
            bias_switches={"attention_bias": _ATTENTION},
            residual_output="mlp.down_proj",
        ),
        _llama_like(
            "gemma2",
            "Gemma2ForCausalLM",
            _SANDWICH_NORMS,
            unit_offset=True,
            bias_switches={"attention_bias": _ATTENTION},
        ),
        _llama_like(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _SANDWICH_NORMS,
            unit_offset=True,
            bias_switches={"attention_bias": _ATTENTION},
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            "transformer",
            "transformer.h",
            (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
            {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
            fixed_bias=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            residual_output="mlp.c_proj",
            transposed=True,
            ignored=(r"\.attn\.(masked_)?bias$",),
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            "gpt_neox",
            "gpt_neox.layers",
            (
                ("attention.query_key_value",),
                ("attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
            {
                "input_layernorm": ("attention.query_key_value",),
                "post_attention_layernorm": ("mlp.dense_h_to_4h",),
            },
            bias_switches={"attention_bias": ("attention.query_key_value", "attention.dense")},
            fixed_bias=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            residual_output="mlp.dense_4h_to_h",
            ignored=(r"\.attention\.(masked_)?bias$", r"rotary_emb\.(original_)?inv_freq$"),
        ),
    )
}

_SWITCH_DEFAULTS = {"enable_bias": True, "attention_bias": False, "mlp_bias": False}
_NEOX_DEFAULTS = {"attention_bias": True}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises SpecError for remote code and unknown architectures."""
    if "auto_map" in config:
        raise SpecError(
            "model",
            "config.json names remote code (`auto_map`); Quantry runs only models that transformers ships",
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SpecError(
            "model", f"architecture {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    wanted = architectures(config)
    if wanted and family.architecture not in wanted:
        raise SpecError(
            "model", f"a {wanted[0]} has no language-model head; Quantry needs a {family.architecture}"
        )
    return family


def bias_slots(family: Family, config: Mapping[str, Any]) -> dict[str, bool]:
    """Which layers of a block have a bias under this config."""
    slots = {name: name in family.fixed_bias for name in family.linears}
    defaults = _NEOX_DEFAULTS if family.model_type == "gpt_neox" else _SWITCH_DEFAULTS
    for key, names in family.bias_switches.items():
        if config.get(key, defaults[key]):
            slots.update(dict.fromkeys(names, True))
    return slots


def rehome_target(family: Family, config: Mapping[str, Any]) -> Family | None:
    """The family that computes the same with bias slots on every layer, or None where that is not exact."""
    unset = (
        4096 if family.model_type == "mistral" else None
    )  # transformers' default for a config without the key
    sliding = bool(config.get("sliding_window", unset)) and config.get("use_sliding_window", True)
    return FAMILIES[family.rehome] if family.rehome and not sliding else None


def holds_added_biases(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether stock transformers keeps a bias on every quantized layer (switched on, or re-homed)."""
    target = rehome_target(family, config) or family
    switchable = {name for names in target.bias_switches.values() for name in names}
    return set(target.linears) <= switchable | set(target.fixed_bias)


def foldable_norms(family: Family, config: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """The norms of a block into which a factor on each input of their layers folds. Raises SpecError if none."""
    if family.model_type == "opt" and not config.get("do_layer_norm_before", True):
        raise SpecError(
            "model",
            "this OPT has its norms behind the residual connections (do_layer_norm_before is false), so they "
            "feed the residual stream as well as the layers: `smoothquant` cannot fold into them",
        )
    if not config.get("layer_norm_elementwise_affine", True):
        raise SpecError(
            "model",
            "the norms of this model have no weights (layer_norm_elementwise_affine is false) that "
            "`smoothquant` could fold into",
        )
    return family.norms


def block_halves(family: Family, config: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The norm, attention and second norm of a block whose MLP reads what its attention added to the residual stream.

    None where a norm stands behind an addition, or attention and MLP read the same.
    """
    parallel = family.model_type == "gpt_neox" and config.get("use_parallel_residual", True)
    if parallel or (family.model_type == "opt" and not config.get("do_layer_norm_before", True)):
        return None
    first, second = family.norms
    return first, family.groups[0][0].rpartition(".")[0], second


def units_of(family: Family) -> dict[str, tuple[str, str]]:
    """`attention` and, where it is a module, `mlp`: the module inside a block, and its last layer."""
    layers = {"attention": family.groups[1][0], "mlp": family.groups[-1][0]}
    units = {level: (layer.rpartition(".")[0], layer) for level, layer in layers.items()}
    return {level: unit for level, unit in units.items() if unit[0]}


def block_bias_layer(family: Family, config: Mapping[str, Any]) -> str | None:
    """The layer into which a bias on the block's output merges; None where a norm follows the last layer."""
    if family.model_type == "opt" and not config.get("do_layer_norm_before", True):
        return None
    return family.residual_output
