"""Make the config of a checkpoint agree with its tensors, so that no bias is dropped by whoever loads it.

Stock loaders build the model from config.json and leave out tensors without a place in it, at most with a
warning. So a bias that compensation added needs a switch of the config, or another architecture that computes
the same and has the switches; if there is neither, the format is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantry.families import FAMILIES, Family, bias_slots, rehome_target
from worker.errors import ExportError

# What a Llama config keeps of a config whose weights compute the same.
_LLAMA_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
Config = dict[str, Any]


def config_with_slots(config: Mapping[str, Any], family: Family, biased: set[str]) -> Config:
    """A config under which every layer of `biased` has a place for its bias: its own, or that of a Llama.

    Args: biased: layer names inside a block, such as "mlp.down_proj". Raises ExportError if there is none.
    """
    opened = _open(config, family, biased)
    if opened is not None:
        return opened
    target = rehome_target(family, config)
    if target is not None:
        rehomed = _open(_as_llama(config, family), target, biased)
        if rehomed is not None:
            return rehomed
    homeless = sorted(biased - {name for name, slot in bias_slots(family, config).items() if slot})
    raise ExportError(
        f"{family.model_type} has no place for a bias on {', '.join(homeless)}, so stock loaders would drop "
        "what bias compensation put there: use format `quantry`"
    )


def _open(config: Mapping[str, Any], family: Family, biased: set[str]) -> Config | None:
    """The config with the switches that `biased` needs; None if a layer has none."""
    missing = {name for name in biased if not bias_slots(family, config)[name]}
    switches = [key for key, names in family.bias_switches.items() if missing & set(names)]
    opened = {**config, **dict.fromkeys(switches, True)}
    slots = bias_slots(family, opened)
    return opened if all(slots[name] for name in biased) else None


def _as_llama(config: Mapping[str, Any], family: Family) -> Config:
    """The same network as a Llama (Mistral and Qwen2 differ from it by biases and sliding windows only)."""
    resolved = CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    if getattr(resolved, "sliding_window", None) is not None:
        raise ExportError(
            f"this {family.model_type} attends in a window of {resolved.sliding_window} tokens, which a "
            "Llama cannot: use format `quantry`"
        )
    llama: Config = {key: getattr(resolved, key) for key in _LLAMA_KEYS if hasattr(resolved, key)}
    llama["head_dim"] = (
        getattr(resolved, "head_dim", None) or resolved.hidden_size // resolved.num_attention_heads
    )
    rope = dict(resolved.rope_parameters)
    llama["rope_parameters"] = rope
    llama["rope_theta"] = rope["rope_theta"]  # where readers before transformers 5 look
    if rope.get("rope_type", "default") != "default":
        llama["rope_scaling"] = rope
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    llama["attention_bias"] = set(qkv) <= set(family.fixed_bias)
    llama["mlp_bias"] = False
    kept = {key: config[key] for key in ("dtype", "torch_dtype", "transformers_version") if key in config}
    architecture = FAMILIES["llama"].architecture
    return {"architectures": [architecture], "model_type": "llama", **llama, **kept}


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The stock model of this config, without memory for its weights."""
    stock = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(stock)
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Every `nn.Linear` of the model, in its order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def zero_biases(
    model: nn.Module, family: Family, config: Mapping[str, Any], written: set[str], replaced: set[str]
) -> dict[str, Tensor]:
    """Biases that the stock model expects and nobody wrote, because a switch gives one to each of its layers.

    Args:
        model: `skeleton` of the config that is written. family, config: the source's.
        written: tensors of the stock model that are in the file, without the format's own ones.
        replaced: tensors of the stock model that the format stores in its own way.
    Returns: zeros by name. Raises ExportError if anything else is missing, or has no place.
    """
    expected: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    unexpected = (written | replaced) - set(expected)
    if unexpected:
        raise ExportError(
            f"{len(unexpected)} tensors have no place in the stock {config['model_type']} model and would be "
            f"dropped by loaders, such as `{min(unexpected)}`: use format `quantry`"
        )
    tied = {id(expected[name]) for name in written}
    covered = written | replaced | {name for name, tensor in expected.items() if id(tensor) in tied}
    slots = bias_slots(family, config)
    opened = tuple(f".{layer}.bias" for layer in family.linears if not slots[layer])
    missing = set(expected) - covered
    lost = {name for name in missing if not name.endswith(opened)}
    if lost:
        raise ExportError(
            f"{len(lost)} tensors of the model were not written, such as `{min(lost)}`: the source "
            "checkpoint does not fit its config.json"
        )
    return {name: torch.zeros(expected[name].shape, dtype=torch.float16) for name in sorted(missing)}
