"""Attention in tiles against torch's own, and who gets it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.factories import ARCHITECTURES
from worker.models.attention import TILE, TILED, tiled_attention, use_tiles

SCALE = 0.3


class Causal(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def operands(queries: int, heads: int = 4, kept: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries)
    shapes = ((2, heads, queries, 16), (2, kept, queries, 16), (2, kept, queries, 24))
    q, k, v = (torch.randn(shape).bfloat16() for shape in shapes)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    out = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, is_causal=mask is None, scale=SCALE, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("queries", [1, 7, TILE, TILE + 1, 3 * TILE - 5])
def test_tiles_compute_causal_attention(queries: int) -> None:
    q, k, v = operands(queries)
    out, _ = tiled_attention(Causal(), q, k, v, None, scaling=SCALE)
    wanted = exact(q, k, v)
    assert out.shape == wanted.shape
    assert float((out - wanted).norm() / wanted.norm()) < 0.01


def test_a_later_token_changes_nothing_before_it() -> None:
    q, k, v = operands(2 * TILE)
    before, _ = tiled_attention(Causal(), q, k, v, None)
    k[:, :, TILE + 3] += 5
    v[:, :, TILE + 3] -= 5
    after, _ = tiled_attention(Causal(), q, k, v, None)
    assert torch.equal(before[:, : TILE + 3], after[:, : TILE + 3])
    assert not torch.equal(before[:, TILE + 3 :], after[:, TILE + 3 :])


def test_other_masks_go_to_the_fused_kernel() -> None:
    q, k, v = operands(40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril() & ~torch.ones(40, 40, dtype=torch.bool).tril(-8)
    out, _ = tiled_attention(Causal(), q, k, v, mask, scaling=SCALE)
    wanted = exact(q, k, v, mask)
    assert float((out - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize(
    ("dtype", "asked", "given"),
    [(torch.bfloat16, None, TILED), (torch.float32, None, "sdpa"), (torch.bfloat16, "eager", "eager")],
)
def test_only_fused_attention_in_bfloat16_is_replaced(
    dtype: torch.dtype, asked: str | None, given: str
) -> None:
    config = CONFIG_MAPPING["llama"](**ARCHITECTURES["llama"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=asked)
    use_tiles(model)
    assert model.config._attn_implementation == given
