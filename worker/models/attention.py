"""Causal attention in tiles of queries, for bfloat16 on a CPU.

torch's fused kernel spends most of its time outside of matrix products there. In tiles the products run at
the processor's own rate and what the mask closes is, up to half a tile, never computed. Scores are rounded to
bfloat16 before the softmax, as in transformers' `eager` attention; the softmax itself runs in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TILED = "quantry-tiled"
TILE = 128  # queries


def use_tiles(model: PreTrainedModel) -> None:
    """Let a bfloat16 model on a CPU attend in tiles, where it would call torch's fused attention."""
    if model.config._attn_implementation == "sdpa" and model.dtype == torch.bfloat16:
        model.set_attn_implementation(TILED)


def tiled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(Q K^T scaling) V, each query seeing the keys up to its own; other masks go to torch's kernel.

    query (batch, heads, queries, width); key and value may have fewer heads (grouped queries).
    """
    count, width = query.shape[-2:]
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    if attention_mask is not None or not causal or count != key.shape[-2] or kwargs.get("dropout"):
        fused = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return cast(tuple[Tensor, None], fused)
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, dim=1).transpose(-1, -2).contiguous()
    values = value.repeat_interleave(groups, dim=1)
    query = query * (width**-0.5 if scaling is None else scaling)
    out = query.new_empty(len(query), count, query.shape[1], values.shape[-1])
    closed = torch.full((TILE, TILE), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    for start in range(0, count, TILE):
        stop = min(start + TILE, count)
        scores = query[:, :, start:stop] @ keys[..., :stop]
        scores[..., start:] += closed[: stop - start, : stop - start]
        out[:, start:stop] = (scores.softmax(-1) @ values[:, :, :stop]).transpose(1, 2)
    return out, None


AttentionInterface.register(TILED, tiled_attention)
AttentionMaskInterface.register(TILED, sdpa_mask)
