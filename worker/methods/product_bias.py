"""Bias compensation of Q K^T and P V in attention: the mean error of each entry of the product over the images.

Gong et al., "Minimize Quantization Output Error with Bias Compensation", 2024, arXiv:2404.01892, as published: both
products are fed their float operands, and every axis but the images has a bias of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from quantry.base import FLOAT_BITS
from quantry.layers.operands import AttentionOperands, watch_probabilities
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.product_bias import ProductBias
from worker.methods.activations import Tell, observe, silent
from worker.models.vision import VisionModel


class _Products:
    """One attention module: what enters it, and the summed errors of its products, float64."""

    def __init__(self, operands: AttentionOperands) -> None:
        self.operands = operands
        self.seen: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.count = 0

    def keep(self, role: str, x: Tensor) -> None:
        self.seen[role] = x

    def add(self, p: Tensor, valid: Tensor | None, value: Tensor) -> None:
        """The errors of a batch whose query and key were kept: P (batch, heads, queries, keys)."""
        query, key = self.seen.pop("query"), self.seen.pop("key")
        rounded = {
            role: self.operands.apply_to(role, x)
            for role, x in (("query", query), ("key", key), ("value", value))
        }
        scores = query @ key.transpose(2, 3) - rounded["query"] @ rounded["key"].transpose(2, 3)
        context = p @ value - self.operands.probabilities_of(p, valid) @ rounded["value"]
        for role, error in (("scores", scores), ("context", context)):
            total = error.sum(0, dtype=torch.float64)
            self.totals[role] = self.totals[role] + total if role in self.totals else total
        self.count += len(p)

    def bias(self, role: str) -> ProductBias:
        mean = (self.totals[role] / self.count).float()
        return ProductBias(FLOAT_BITS, list(mean.shape)).to(mean.device).fill(bias=mean)


@torch.no_grad()
def product_biases(
    model: VisionModel,
    pixels: Tensor,
    quantizers: Mapping[str, ActivationQuantizer],
    probability_bias: Mapping[str, Tensor],
    tell: Tell = silent,
) -> dict[str, ProductBias]:
    """The biases by place, `<attention>.scores` (heads, tokens, tokens) and `.context` (heads, tokens, width).

    Args: quantizers: by operand. probability_bias: by attention module. Both belong to the quantized P V.
    """
    modules = [o.layers[0] for o in model.operands if o.kind == "probabilities"]
    found = {name: _Products(_operands(name, quantizers, probability_bias)) for name in modules}
    watched = {
        f"{name}.{role}": partial(products.keep, role)
        for name, products in found.items()
        for role in ("query", "key")
    }
    with ExitStack() as watching:
        for name, products in found.items():
            watching.enter_context(watch_probabilities(model.network, name, products.add))
        observe(model, pixels, watched, tell)
    return {
        f"{name}.{role}": products.bias(role)
        for name, products in found.items()
        for role in ("scores", "context")
    }


def _operands(
    attention: str, quantizers: Mapping[str, ActivationQuantizer], probability_bias: Mapping[str, Tensor]
) -> AttentionOperands:
    """What is attached to an attention module of the quantized network, apart from it."""
    operands = AttentionOperands()
    for role in ("query", "key", "value", "probabilities"):
        operands.register_module(role, quantizers.get(f"{attention}.{role}"))
    operands.register_buffer("probability_bias", probability_bias.get(attention))
    return operands
