"""Quantizers in their places: before linear layers, and on the operands of attention.

An *operand* is named `<module>.<role>`: roles `input` and `output` of a linear or convolution layer, and `query`,
`key`, `value`, `probabilities` of an attention module; `scores` and `context` are its products Q K^T and P V.
Attention is reached through transformers' own attention interface, under the name `quantry`; a model whose attention
runs elsewhere is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ATTENTION = "quantry"
# Shown the probabilities (batch, heads, queries, keys) before their quantizer, which of them the mask lets
# through (broadcasts to them; None: all), and the values (batch, heads, keys, width).
ProbabilityObserver = Callable[[Tensor, Tensor | None, Tensor], None]
ROLES = ("query", "key", "value", "probabilities", "scores", "context")
CLOSED = (
    -50.0
)  # a key whose mask is below has a probability below 1e-21 (Swin closes with -100, others with -3e38)


class AttentionOperands(nn.Module):
    """The quantizers of one attention module, each optional, and the softmax bias correction.

    probability_bias: float32 (H, 1, 1) or (1, 1, 1), added to every probability that the mask lets through:
    the real-valued part of the quantizer's offset (Pandey et al. 2023, arXiv:2309.01729).
    """

    def __init__(self, bias_heads: int = 0) -> None:
        super().__init__()
        for role in ROLES:
            self.register_module(role, None)
        bias = torch.zeros(bias_heads, 1, 1) if bias_heads else None
        self.register_buffer("probability_bias", bias)
        self.observer: ProbabilityObserver | None = None

    probability_bias: Tensor | None

    @property
    def needs_probabilities(self) -> bool:
        """Whether something looks at the softmax or changes it."""
        return any(x is not None for x in (self.observer, self.probabilities, self.probability_bias))

    def apply_to(self, role: str, x: Tensor) -> Tensor:
        quantizer = getattr(self, role)
        return cast(Tensor, quantizer(x)) if quantizer is not None else x

    def probabilities_of(self, p: Tensor, valid: Tensor | None) -> Tensor:
        """Quantize p (batch, heads, queries, keys) and correct it where `valid`."""
        quantized = self.apply_to("probabilities", p)
        if valid is not None:
            quantized = quantized * valid
        if self.probability_bias is None:
            return quantized
        bias = self.probability_bias.to(p.dtype)
        return quantized + (bias if valid is None else bias * valid)


def attach(network: nn.Module, name: str, quantizer: nn.Module) -> None:
    """Put a quantizer (or anything that maps a tensor to a tensor) on an operand, in place of what is there."""
    path, _, role = name.rpartition(".")
    module = network.get_submodule(path)
    if role == "input":
        if not hasattr(module, "input_quantizer"):
            module.register_forward_pre_hook(_quantize_input)
        module.input_quantizer = quantizer
    elif role == "output":
        if not hasattr(module, "output_correction"):
            module.register_forward_hook(_correct_output)
        module.output_correction = quantizer
    elif role in ROLES:
        attention_operands(module).register_module(role, quantizer)
    else:
        raise ValueError(
            f"`{name}` is not an operand: the role is `input`, `output` or one of {', '.join(ROLES)}"
        )


def attention_operands(module: nn.Module) -> AttentionOperands:
    """The operands of an attention module, made at the first call."""
    if not hasattr(module, "operands"):
        module.operands = AttentionOperands()
    return cast(AttentionOperands, module.operands)


def set_probability_bias(network: nn.Module, attention: str, bias: Tensor | None) -> None:
    """Set the correction (H, 1, 1) or (1, 1, 1) of an attention module, or take it away."""
    attention_operands(network.get_submodule(attention)).register_buffer("probability_bias", bias)


@contextmanager
def watch_probabilities(network: nn.Module, attention: str, see: ProbabilityObserver) -> Iterator[None]:
    """Show `see` every softmax of an attention module for the length of the block; nothing stays behind."""
    module = network.get_submodule(attention)
    fresh = not hasattr(module, "operands")
    operands = attention_operands(module)
    operands.observer = see
    try:
        yield
    finally:
        operands.observer = None
        if fresh and hasattr(module, "operands"):  # not if all was detached meanwhile
            del module.operands


def attached(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every operand that has a quantizer, `(name, quantizer)`, in the order of the modules."""
    for path, module in network.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, nn.Module):
            yield f"{path}.input" if path else "input", quantizer
        correction = getattr(module, "output_correction", None)
        if isinstance(correction, nn.Module):
            yield f"{path}.output", correction
        if isinstance(module, AttentionOperands):
            for role in ROLES:
                if getattr(module, role) is not None:
                    yield f"{path.removesuffix('operands')}{role}", getattr(module, role)


def detach_all(network: nn.Module) -> None:
    """Take every quantizer and correction away: the network is as it was before the first `attach`."""
    for module in list(network.modules()):
        if hasattr(module, "input_quantizer"):
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _quantize_input:
                    del module._forward_pre_hooks[key]
            del module.input_quantizer
        if hasattr(module, "output_correction"):
            for key, after in list(module._forward_hooks.items()):
                if after is _correct_output:
                    del module._forward_hooks[key]
            del module.output_correction
        if hasattr(module, "operands") and isinstance(module.operands, AttentionOperands):
            del module.operands


def use_quantized_attention(model: Any) -> None:
    """Let a transformers model compute attention here. Raises ValueError if it cannot."""
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(f"{type(model).__name__} does not take its attention from transformers' interface")


def _quantize_input(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (module.input_quantizer(inputs[0]), *inputs[1:])


def _correct_output(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return cast(Tensor, module.output_correction(output))


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T scaling + mask) V with quantized operands; softmax in float32.

    query (batch, heads, queries, width); key and value may have fewer heads (grouped queries). A mask entry
    that is below CLOSED, or False, closes a key: its probability stays exactly 0, corrected or not.
    """
    operands: AttentionOperands | None = getattr(module, "operands", None)
    if operands is not None:
        query, key, value = (
            operands.apply_to(role, x) for role, x in zip(ROLES, (query, key, value), strict=False)
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3)
    if operands is not None:
        scores = operands.apply_to("scores", scores)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    valid = None
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[-2]]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(scores).masked_fill(~mask, torch.finfo(scores.dtype).min)
        valid = _open(mask)
        scores = scores + mask
    p = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if operands is not None:
        if operands.observer is not None:
            operands.observer(p, valid, value)
        p = operands.probabilities_of(p, valid)
    p = nn.functional.dropout(p, p=dropout, training=module.training)
    context = p @ value
    if operands is not None:
        context = operands.apply_to("context", context)
    return context.transpose(1, 2).contiguous(), p


def _open(mask: Tensor) -> Tensor | None:
    """1 where a key may be seen, in the mask's dtype; None if everywhere."""
    seen = mask > CLOSED
    return None if bool(seen.all()) else seen.to(mask.dtype)


AttentionInterface.register(ATTENTION, quantized_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
