"""Bit operations: the published share for DeiT-B, and shapes as a network runs them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import factories
import pytest
import torch

from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.grouped import GroupedQuantizer
from worker.methods.bops import AXES, Product, block_products, count, model_products
from worker.models.vision import VisionModel

LINEAR = ("post_norm", "attention_output", "post_activation")


def grouped(products: Iterable[Product], groups: int) -> dict[str, ActivationQuantizer]:
    """A grouped quantizer for every operand that IGQ groups."""
    return {p.operand: GroupedQuantizer(4, groups, AXES[p.kind]) for p in products if p.kind in AXES}


@pytest.mark.parametrize(("groups", "share"), [(8, 0.0170), (12, 0.0249), (16, 0.0328)])
def test_grouping_a_deit_b_costs_what_is_published(groups: int, share: float) -> None:
    products = block_products(tokens=197, width=768, hidden=3072, heads=12, depth=12)
    linear = [product for product in products if product.kind in LINEAR]
    everywhere = grouped(products, groups)
    assert count(linear, everywhere, weight_bits=4, bits=4).share == pytest.approx(share, abs=5e-5)
    assert count(products, everywhere, weight_bits=4, bits=4).share < 0.04


def test_a_product_counts_bits_of_both_factors() -> None:
    linear = Product("x", "post_norm", 1, 10, 6, 4)
    assert linear.operations(weight_bits=3, bits=5, softmax_bits=8) == 10 * 6 * 4 * 3 * 5
    assert linear.overhead(grouped([linear], 2)) == 32 * (10 * 4 + 2 * 10 * 6 + 4 * 6 * 2)
    attention = Product("p", "probabilities", 2, 10, 10, 4, "v")
    assert attention.operations(weight_bits=3, bits=5, softmax_bits=8) == 2 * 10 * 10 * 4 * 8 * 5
    assert attention.overhead(grouped([attention], 2)) == 2 * 32 * (100 + 2 * 10 * 2)
    assert Product("i", "image", 1, 10, 6, 4).operations(3, 5, 5) == 10 * 6 * 4 * 3 * 8


def test_static_grids_add_nothing() -> None:
    products = block_products(tokens=5, width=8, hidden=16, heads=2, depth=1)
    static = {name: UniformQuantizer(4, []) for p in products for name in (p.operand, p.right) if name}
    assert count(products, {}, weight_bits=4, bits=4).overhead == 0
    assert count(products, static, weight_bits=4, bits=4).overhead == 0
    fc1 = next(p for p in products if p.operand == "0.fc1")
    one = count(products, {"0.fc1": GroupedQuantizer(4, 2, "channels")}, weight_bits=4, bits=4)
    assert one.overhead == fc1.overhead(grouped([fc1], 2)) > 0


def test_a_grid_for_each_token_costs_its_range() -> None:
    linear = Product("x", "post_norm", 1, 10, 6, 4)
    assert linear.overhead({"x": TokenQuantizer(8)}) == 32 * 2 * 10 * 6  # the least and the largest value
    assert linear.overhead({"x": TokenQuantizer(8, symmetric=True)}) == 32 * 10 * 6
    scores = Product("q", "query", 2, 10, 6, 7, "k")
    assert scores.overhead({"q": TokenQuantizer(8), "k": TokenQuantizer(8)}) == 32 * 2 * 2 * (10 * 6 + 7 * 6)


def test_a_scale_for_each_token_of_v_stays_inside_the_sum() -> None:
    product = Product("p", "probabilities", 2, 10, 7, 6, "v")
    ranges = 32 * 2 * 2 * 7 * 6
    assert product.overhead({"v": TokenQuantizer(8)}) == ranges + 32 * 2 * 10 * 7 * 6


def test_a_network_has_the_products_of_its_sizes(tmp_path: Path) -> None:
    model = VisionModel(factories.write_classifier(tmp_path, "vit"), device=torch.device("cpu"))
    products = model_products(model)
    blocks = [product for product in products if product.kind not in ("image", "head_input")]
    expected = block_products(tokens=17, width=32, hidden=48, heads=4, depth=2)
    assert [_sizes(product) for product in blocks] == [_sizes(product) for product in expected]
    assert _sizes(products[0]) == ("image", 1, 16, 48, 32)  # 4 x 4 patches of 4 x 4 x 3
    assert _sizes(products[-1]) == ("head_input", 1, 1, 32, 5)
    right = {product.kind: product.right for product in products}
    assert right["query"] == "vit.layers.1.attention.key"
    assert right["probabilities"] == "vit.layers.1.attention.value"
    assert {right[kind] for kind in ("image", "head_input", *LINEAR)} == {None}


def test_windows_are_instances(tmp_path: Path) -> None:
    model = VisionModel(factories.write_classifier(tmp_path, "swin"), device=torch.device("cpu"))
    by_name = {product.operand: product for product in model_products(model)}
    qkv = next(p for name, p in by_name.items() if name.endswith("blocks.0.attention.q_proj.input"))
    rows = next(p for name, p in by_name.items() if name.endswith("blocks.0.attention.probabilities"))
    assert _sizes(qkv) == ("post_norm", 16, 4, 16, 48)  # 8 x 8 patches in windows of 2 x 2
    assert _sizes(rows) == ("probabilities", 16 * 2, 4, 4, 8)


def _sizes(product: Product) -> tuple[str, int, int, int, int]:
    return product.kind, product.instances, product.rows, product.inner, product.columns
