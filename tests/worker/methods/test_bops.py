"""Bit operations: the published share for DeiT-B, and shapes as a network runs them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import factories
import pytest
import torch

from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.grouped import GroupedQuantizer
from quantry.recipe import IgqStep
from quantry.vision import vision_family_of
from quantry.vision_products import least_overhead, products
from worker.methods.bops import AXES, Product, block_products, count, model_products
from worker.models.vision import VisionModel

LINEAR = ("post_norm", "attention_output", "post_activation")


def grouped(products: Iterable[Product], groups: int) -> dict[str, ActivationQuantizer]:
    """A grouped quantizer for every operand that IGQ groups."""
    return {p.operand: GroupedQuantizer(4, groups, AXES[p.kind]) for p in products if p.kind in AXES}


@pytest.mark.parametrize(("groups", "share"), [(8, 0.0170), (12, 0.0249), (16, 0.0328)])
def test_grouping_a_deit_b_costs_what_is_published(groups: int, share: float) -> None:
    blocks = block_products(tokens=197, width=768, hidden=3072, heads=12, depth=12)
    linear = [product for product in blocks if product.kind in LINEAR]
    everywhere = grouped(blocks, groups)
    assert count(linear, everywhere, weight_bits=4, bits=4).share == pytest.approx(share, abs=5e-5)
    assert count(blocks, everywhere, weight_bits=4, bits=4).share < 0.04


def test_a_product_counts_bits_of_both_factors() -> None:
    linear = Product("x", "post_norm", 1, 10, 6, 4)
    assert linear.operations(weight_bits=3, bits=5, softmax_bits=8) == 10 * 6 * 4 * 3 * 5
    assert linear.overhead(grouped([linear], 2)) == 32 * (10 * 4 + 2 * 10 * 6 + 4 * 6 * 2)
    attention = Product("p", "probabilities", 2, 10, 10, 4, "v")
    assert attention.operations(weight_bits=3, bits=5, softmax_bits=8) == 2 * 10 * 10 * 4 * 8 * 5
    assert attention.overhead(grouped([attention], 2)) == 2 * 32 * (100 + 2 * 10 * 2)
    assert Product("i", "image", 1, 10, 6, 4).operations(3, 5, 5) == 10 * 6 * 4 * 3 * 8


def test_static_grids_add_nothing() -> None:
    blocks = block_products(tokens=5, width=8, hidden=16, heads=2, depth=1)
    static = {name: UniformQuantizer(4, []) for p in blocks for name in (p.operand, p.right) if name}
    assert count(blocks, {}, weight_bits=4, bits=4).overhead == 0
    assert count(blocks, static, weight_bits=4, bits=4).overhead == 0
    fc1 = next(p for p in blocks if p.operand == "0.fc1")
    one = count(blocks, {"0.fc1": GroupedQuantizer(4, 2, "channels")}, weight_bits=4, bits=4)
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


SIZES: list[tuple[str, dict[str, object]]] = [
    ("vit", {}),
    ("vit", {"image_size": 18, "num_channels": 1, "num_labels": 1}),
    ("deit", {"image_size": [16, 24], "head_dim": 12}),
    ("dinov2", {}),
    ("swin", {}),
    ("swin", {"image_size": 15, "mlp_ratio": 1.5}),
    ("swin", {"image_size": [30, 18], "window_size": 3, "depths": [1, 1, 1], "num_heads": [2, 2, 4]}),
    ("swin", {"image_size": [16, 24], "patch_size": [2, 4], "window_size": 3}),
]


@pytest.mark.parametrize(("name", "changes"), SIZES)
def test_products_from_the_config_are_those_of_the_network(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """Patches, windows that are padded or wider than the map, merged patches: what the planner counts is what runs."""
    folder = factories.write_classifier(tmp_path, name, **changes)
    config = json.loads((folder / "config.json").read_text())
    model = VisionModel(folder, device=torch.device("cpu"))
    found = [(p.kind, p.instances, p.rows, p.inner, p.columns) for p in model_products(model)]
    assert found == [tuple(p) for p in products(vision_family_of(config), config)]


def test_the_least_overhead_from_the_config_is_that_of_the_worker(tmp_path: Path) -> None:
    folder = factories.write_classifier(tmp_path, "swin")
    model = VisionModel(folder, device=torch.device("cpu"))
    step = IgqStep(bits=4, softmax_bits=6, groups=8, allocation="ilp")
    config = json.loads((folder / "config.json").read_text())
    counted = list(model_products(model))
    grids = {p.operand: GroupedQuantizer(4, 2, AXES[p.kind]) for p in counted if p.kind in AXES}
    expected = count(counted, grids, weight_bits=3, bits=4, softmax_bits=6).share
    assert least_overhead(products(vision_family_of(config), config), step, 3) == pytest.approx(
        expected, rel=1e-12
    )
