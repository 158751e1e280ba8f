"""Bias compensation of the products of attention: a constant for each entry of what they give.

Gong et al., "Minimize Quantization Output Error with Bias Compensation", 2024, arXiv:2404.01892, as its scripts for
vision transformers correct Q K^T and P V: over every axis but the images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer


class ProductBias(ActivationQuantizer):
    """Adds `bias`, float32 of `shape`, to a product (images, heads, tokens, columns), the same for every image.

    In Swin's attention a window is what an image is elsewhere. Rounds nothing; it takes the place of a quantizer, on
    the roles `scores` and `context` of an attention module.
    """

    kind = "product_bias"
    fields = ("shape",)

    def __init__(self, bits: int, shape: list[int]) -> None:
        super().__init__(bits)
        self.shape = list(shape)
        self.register_buffer("bias", torch.zeros(self.shape))

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if list(x.shape[1:]) != self.shape:
            raise ValueError(
                f"the biases of this attention are for {self.shape[1]} tokens, and these images have {x.shape[2]}: "
                "give images of the size that was calibrated"
            )
        return x + self.bias.to(x.dtype)
