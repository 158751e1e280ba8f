"""Bit operations of a classifier for one image, and what finding grids at run time adds to them.

A product of (N, C) by (C, D) with factors of b_x and b_w bits takes N C D b_w b_x. Grouping by channels adds
(G-1) N D additions of partial sums, 2 N C comparisons for ranges and 4 C G operations for distances; grouping
softmax rows, whose scale leaves the sum, only N C comparisons and 2 N G operations. Each is counted with 32
bits. For DeiT-B's linear layers at 4 bits that is 1.70, 2.49, 3.28 % for G = 8, 12, 16.
A grid for each token adds the comparisons for its range, 2 a value. Of V, whose tokens are summed over, the
scale stays inside the sum: N C D multiplications more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantry.base import FLOAT_BITS
from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer
from quantry.quantizers.grouped import Axis, GroupedQuantizer
from quantry.vision_products import IMAGE_BITS
from worker.methods.activations import observe
from worker.models.vision import Operand, VisionModel

AXES: dict[str, Axis] = {  # how an operand is grouped, by its kind; the others have one static grid
    "post_norm": "channels",
    "attention_output": "channels",
    "post_activation": "channels",
    "probabilities": "rows",
}


@dataclass(frozen=True)
class Product:
    """The products that one operand enters on the left: `instances` times (rows, inner) @ (inner, columns).

    operand, kind: as in `Operand`. instances: 1, or windows (times heads in attention). columns: outputs of
    all layers that share the operand. right: the operand on the right, the keys of queries or the values of
    probabilities; None: weights.
    """

    operand: str
    kind: str
    instances: int
    rows: int
    inner: int
    columns: int
    right: str | None = None

    def operations(self, weight_bits: int, bits: int, softmax_bits: int) -> int:
        """Bit operations of the products alone. Q K^T and P V multiply two activations."""
        left = {"image": IMAGE_BITS, "probabilities": softmax_bits}.get(self.kind, bits)
        right = bits if self.right else weight_bits
        return self._multiplications * left * right

    def overhead(self, quantizers: Mapping[str, ActivationQuantizer]) -> int:
        """Bit operations that finding the grids of both operands takes, and using what was found."""
        total = 0
        left = quantizers.get(self.operand)
        if left is not None:
            total += left.operations((self.instances, self.rows, self.inner))
        if isinstance(left, GroupedQuantizer) and left.axis == "channels":
            total += FLOAT_BITS * (left.groups - 1) * self.instances * self.rows * self.columns
        right = quantizers.get(self.right) if self.right else None
        if right is not None:
            total += right.operations((self.instances, self.columns, self.inner))
        if isinstance(right, TokenQuantizer) and self.kind == "probabilities":
            total += FLOAT_BITS * self._multiplications
        return total

    @property
    def _multiplications(self) -> int:
        return self.instances * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class BitOperations:
    """Of one image. base: the products. overhead: what finding grids at run time adds to them."""

    base: int
    overhead: int

    @property
    def share(self) -> float:
        """The overhead as a share of the base."""
        return self.overhead / self.base


def count(
    products: Iterable[Product],
    quantizers: Mapping[str, ActivationQuantizer],
    *,
    weight_bits: int,
    bits: int,
    softmax_bits: int | None = None,
) -> BitOperations:
    """Sum over products. quantizers: by operand; static ones add nothing."""
    listed = tuple(products)
    base = sum(product.operations(weight_bits, bits, softmax_bits or bits) for product in listed)
    return BitOperations(base, sum(product.overhead(quantizers) for product in listed))


def model_products(model: VisionModel, shape: tuple[int, ...] | None = None) -> tuple[Product, ...]:
    """Every product of the network, one for each of `model.operands` but keys and values (right factors).

    shape: channels, height and width of an image, where they are not the config's (DINOv2 takes any). The
    operands' shapes are seen while one black image passes, so that windows and merged tokens count as
    they run.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str, x: Tensor) -> None:
        shapes[name] = tuple(x.shape)

    pixels = torch.zeros(1, *(shape or model.image_shape))
    observe(model, pixels, {operand.name: partial(see, operand.name) for operand in model.operands})
    left = (operand for operand in model.operands if operand.kind not in ("key", "value"))
    return tuple(_product(model, operand, shapes) for operand in left)


def _product(model: VisionModel, operand: Operand, shapes: Mapping[str, tuple[int, ...]]) -> Product:
    name, kind, shape = operand.name, operand.kind, shapes[operand.name]
    if kind in ("query", "probabilities"):
        right = f"{operand.layers[0]}.{'key' if kind == 'query' else 'value'}"
        columns = shapes[right][-2] if kind == "query" else shapes[right][-1]
        return Product(name, kind, shape[0] * shape[1], shape[2], shape[3], columns, right)
    columns = sum(len(model.layer(layer).weight) for layer in operand.layers)
    if kind == "image":  # a convolution whose patches do not overlap: each is a row
        inner = model.columns(operand.layers[0])
        return Product(name, kind, 1, torch.Size(shape).numel() // inner, inner, columns)
    rows = torch.Size(shape[1:-1]).numel()
    return Product(name, kind, shape[0], rows, shape[-1], columns)


def block_products(tokens: int, width: int, hidden: int, heads: int, depth: int) -> tuple[Product, ...]:
    """The products of `depth` encoder blocks of a plain ViT, from its sizes; DeiT-B is 197, 768, 3072, 12, 12."""
    products: list[Product] = []
    for i in range(depth):
        products += [
            Product(f"{i}.qkv", "post_norm", 1, tokens, width, 3 * width),
            Product(f"{i}.query", "query", heads, tokens, width // heads, tokens, f"{i}.key"),
            Product(
                f"{i}.probabilities", "probabilities", heads, tokens, tokens, width // heads, f"{i}.value"
            ),
            Product(f"{i}.o_proj", "attention_output", 1, tokens, width, width),
            Product(f"{i}.fc1", "post_norm", 1, tokens, width, hidden),
            Product(f"{i}.fc2", "post_activation", 1, tokens, hidden, width),
        ]
    return tuple(products)
