"""The layers of a language model, by its config.json and the headers of its tensors. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import check_blocks, check_float, size_of
from quantry.families import Family, bias_slots
from quantry.headers import TensorInfo
from quantry.reports import LayerPlan

_TIED_BY_DEFAULT = ("opt", "gemma", "gemma2", "gemma3_text", "gpt2")  # transformers' config classes
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_TOKENS = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|lm_head|embed_out)\.weight$")
_UNKNOWN = ("", None)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_positions|embed_in|wte|wpe)\.weight$")


@dataclass(frozen=True)
class Layer:
    """One linear layer that will be quantized: `rows` outputs, `columns` inputs, however it is stored."""

    name: str
    rows: int
    columns: int
    had_bias: bool
    dtype: str


def canonical_tensors(
    family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors that the model reads, by their name in the causal LM.

    Raises SpecError without an output head, or where a table of tokens is not of the vocabulary's size.
    """
    named = {family.canonical(name): info for name, info in tensors.items() if not family.is_ignored(name)}
    vocabulary = size_of(config, "vocab_size")
    for name, info in named.items():
        if vocabulary and _TOKENS.search(name) and info.shape[:1] != (vocabulary,):
            raise SpecError(
                "model",
                f"{name} has the shape {list(info.shape)}, config.json says a vocabulary of {vocabulary}",
            )
    if config.get("tie_word_embeddings", family.model_type in _TIED_BY_DEFAULT):
        return {name: info for name, info in named.items() if not is_head(name)}
    if not any(is_head(name) for name in named):
        raise SpecError(
            "model",
            "the checkpoint has no output head (lm_head), and its config does not tie it to the embeddings",
        )
    return named


def linear_layers(
    family: Family, config: Mapping[str, Any], named: Mapping[str, TensorInfo]
) -> Iterator[Layer]:
    """The layers to quantize, block by block, in the order they run; each is there and has a sane shape.

    Raises SpecError, naming the tensor.
    """
    count = size_of(config, "num_hidden_layers", "n_layer", "num_layers")
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")
    check_blocks(count, {int(match.group(1)) for name in named if (match := pattern.match(name))})
    slots = bias_slots(family, config)
    inputs, outputs = _widths(family, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(count or 0):
        for linear in family.linears:
            name = f"{family.blocks}.{block}.{linear}"
            info = named.get(f"{name}.weight")
            if info is None:
                raise SpecError("model", f"the checkpoint lacks {name}.weight")
            if len(info.shape) != 2 or 0 in info.shape:
                raise SpecError("model", f"{name}.weight should be a matrix, its shape is {list(info.shape)}")
            if shapes.setdefault(linear, info.shape) != info.shape:
                raise SpecError(
                    "model",
                    f"{name}.weight has the shape {list(info.shape)}, block 0 has {list(shapes[linear])}",
                )
            check_float(f"{name}.weight", info)
            rows, columns = reversed(info.shape) if family.transposed else info.shape
            for noun, size, (key, width) in (
                ("columns", columns, inputs.get(linear, _UNKNOWN)),
                ("rows", rows, outputs.get(linear, _UNKNOWN)),
            ):
                if width is not None and size != width:
                    raise SpecError("model", f"{name} has {size} {noun}, config.json says {key} {width}")
            if (f"{name}.bias" in named) != slots[linear]:
                holds, says = ("lacks", "has one") if slots[linear] else ("holds", "has none")
                raise SpecError(
                    "model", f"the checkpoint {holds} {name}.bias, by config.json the layer {says}"
                )
            yield Layer(name, rows, columns, slots[linear], info.dtype)


def _widths(
    family: Family, config: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, int | None]], dict[str, tuple[str, int | None]]]:
    """What config.json says of the inputs and of the outputs of a block's layers: the key and its value."""
    hidden = ("a hidden size of", hidden_size(config))
    inner = ("an MLP width of", size_of(config, "intermediate_size", "ffn_dim", "n_inner"))
    first, attention, *_, up, down = family.groups
    inputs = {**dict.fromkeys((*first, *up), hidden), **dict.fromkeys(down, inner)}
    outputs = {**dict.fromkeys((*attention, *down), hidden), **dict.fromkeys(up, inner)}
    return inputs, outputs


def layer_plans(
    family: Family, quantized: tuple[Layer, ...], kept: Mapping[str, TensorInfo]
) -> tuple[LayerPlan, ...]:
    """Every matrix of the model: whether it is quantized, and if not, why."""
    plans = [
        LayerPlan(name=layer.name, shape=(layer.rows, layer.columns), quantized=True) for layer in quantized
    ]
    for name, info in kept.items():
        if len(info.shape) == 2:
            if is_head(name):
                reason = "the output head stays in full precision"
            elif is_embedding(name):
                reason = "embeddings stay in full precision"
            else:
                reason = f"not one of the linear layers of a {family.model_type} block"
            shape = (info.shape[0], info.shape[1])
            plans.append(
                LayerPlan(name=name.removesuffix(".weight"), shape=shape, quantized=False, reason=reason)
            )
    return tuple(plans)


def is_head(name: str) -> bool:
    """Whether a tensor is the output head."""
    return bool(_HEAD.search(name))


def is_embedding(name: str) -> bool:
    """Whether a tensor embeds tokens or positions."""
    return bool(_EMBEDDING.search(name))


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model can look at; None where its config does not bound them."""
    return size_of(config, "max_position_embeddings", "n_positions")


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of the residual stream. Raises SpecError."""
    width = size_of(config, "hidden_size", "n_embd")
    if width is None:
        raise SpecError("model", "config.json does not say the hidden size")
    return width


def vocabulary_size(kept: Mapping[str, TensorInfo]) -> int:
    """Rows of the embeddings and of the head, padding included."""
    return max((info.shape[0] for name, info in kept.items() if _TOKENS.search(name)), default=0)
