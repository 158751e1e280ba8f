"""Attention of diffusers with quantizers on its operands: a processor that computes where they can be reached."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quantry.layers.operands import ROLES, AttentionOperands, quantized_attention

_STOCK = (AttnProcessor, AttnProcessor2_0)


class OperandAttention:
    """Computes what diffusers' own processors do, through `quantry.layers.operands.quantized_attention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            _heads(layer(x), attn.heads)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        mask = attention_mask
        if mask is not None:
            batch, keys = context.shape[:2]
            mask = attn.prepare_attention_mask(mask, keys, batch).view(batch, attn.heads, -1, keys)
        output = _attend(attn, query, key, value, mask)
        output = attn.to_out[1](attn.to_out[0](output.flatten(2)))
        if residual.ndim == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        result: Tensor = output / attn.rescale_output_factor
        return result


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, tokens, heads, width); by the fused kernel where nobody asks for the probabilities."""
    operands: AttentionOperands | None = getattr(attn, "operands", None)
    if operands is None or operands.needs_probabilities:
        return quantized_attention(attn, query, key, value, mask, scaling=attn.scale)[0]
    q, k, v = (operands.apply_to(role, x) for role, x in zip(ROLES, (query, key, value), strict=False))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale).transpose(1, 2)


def attentions(network: nn.Module) -> dict[str, Any]:
    """The attention modules of a denoiser, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Attention)}


def use_operand_attention(network: nn.Module) -> None:
    """Let every attention module compute here. Raises ValueError for one that computes in a way of its own."""
    for name, module in attentions(network).items():
        if isinstance(module.processor, OperandAttention):
            continue
        if type(module.processor) not in _STOCK:
            raise ValueError(
                f"`{name}` computes attention by {type(module.processor).__name__}, which has no quantizers"
            )
        module.set_processor(OperandAttention())


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * width) as (batch, heads, tokens, width)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
