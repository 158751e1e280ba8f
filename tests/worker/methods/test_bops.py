"""Bit operations: the published share for DeiT-B, and shapes as a network runs them."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch

from worker.methods.bops import Product, block_products, count, model_products
from worker.models.vision import VisionModel

LINEAR = ("post_norm", "attention_output", "post_activation")


@pytest.mark.parametrize(("groups", "share"), [(8, 0.0170), (12, 0.0249), (16, 0.0328)])
def test_grouping_a_deit_b_costs_what_is_published(groups: int, share: float) -> None:
    products = block_products(tokens=197, width=768, hidden=3072, heads=12, depth=12)
    linear = [product for product in products if product.kind in LINEAR]
    everywhere = {product.operand: groups for product in products}
    assert count(linear, everywhere, weight_bits=4, bits=4).share == pytest.approx(share, abs=5e-5)
    assert count(products, everywhere, weight_bits=4, bits=4).share < 0.04


def test_a_product_counts_bits_of_both_factors() -> None:
    linear = Product("x", "post_norm", 1, 10, 6, 4)
    assert linear.operations(weight_bits=3, bits=5, softmax_bits=8) == 10 * 6 * 4 * 3 * 5
    assert linear.overhead(2) == 32 * (10 * 4 + 2 * 10 * 6 + 4 * 6 * 2)
    attention = Product("p", "probabilities", 2, 10, 10, 4)
    assert attention.operations(weight_bits=3, bits=5, softmax_bits=8) == 2 * 10 * 10 * 4 * 8 * 5
    assert attention.overhead(2) == 2 * 32 * (100 + 2 * 10 * 2)
    assert Product("i", "image", 1, 10, 6, 4).operations(3, 5, 5) == 10 * 6 * 4 * 3 * 8
    assert Product("h", "head_input", 1, 1, 6, 4).overhead(8) == 0


def test_operands_without_groups_add_nothing() -> None:
    products = block_products(tokens=5, width=8, hidden=16, heads=2, depth=1)
    assert count(products, {}, weight_bits=4, bits=4).overhead == 0
    one = count(products, {"0.fc1": 2}, weight_bits=4, bits=4)
    assert one.overhead == next(p for p in products if p.operand == "0.fc1").overhead(2)


def test_a_network_has_the_products_of_its_sizes(tmp_path: Path) -> None:
    model = VisionModel(factories.write_classifier(tmp_path, "vit"), device=torch.device("cpu"))
    products = model_products(model)
    blocks = [product for product in products if product.kind not in ("image", "head_input")]
    expected = block_products(tokens=17, width=32, hidden=48, heads=4, depth=2)
    assert [_sizes(product) for product in blocks] == [_sizes(product) for product in expected]
    assert _sizes(products[0]) == ("image", 1, 16, 48, 32)  # 4 x 4 patches of 4 x 4 x 3
    assert _sizes(products[-1]) == ("head_input", 1, 1, 32, 5)


def test_windows_are_instances(tmp_path: Path) -> None:
    model = VisionModel(factories.write_classifier(tmp_path, "swin"), device=torch.device("cpu"))
    by_name = {product.operand: product for product in model_products(model)}
    qkv = next(p for name, p in by_name.items() if name.endswith("blocks.0.attention.q_proj.input"))
    rows = next(p for name, p in by_name.items() if name.endswith("blocks.0.attention.probabilities"))
    assert _sizes(qkv) == ("post_norm", 16, 4, 16, 48)  # 8 x 8 patches in windows of 2 x 2
    assert _sizes(rows) == ("probabilities", 16 * 2, 4, 4, 8)


def _sizes(product: Product) -> tuple[str, int, int, int, int]:
    return product.kind, product.instances, product.rows, product.inner, product.columns
