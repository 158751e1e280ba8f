"""A convolution whose kernel stays packed in memory, as the rows of a linear layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from quantry.layers.linear import LinearFormat, QuantizedLinear
from quantry.layers.positions import Locator, position_bias_of


class QuantizedConv2d(QuantizedLinear):
    """Takes the place of `dense`: what is stored is its kernel flattened to (out, in * kh * kw).

    A position of the position bias is a place of the output, row by row. Raises ValueError for a padding that
    is not a number of zeros: none that embeds patches has one.
    """

    def __init__(self, dense: nn.Conv2d, form: LinearFormat, positions: Locator | None = None) -> None:
        super().__init__(dense.weight[0].numel(), dense.out_channels, form, positions)
        if dense.padding_mode != "zeros" or isinstance(dense.padding, str):
            raise ValueError(f"a packed convolution pads with a number of zeros, not `{dense.padding}`")
        self.kernel_shape = tuple(dense.weight.shape)  # (out, in / groups, kh, kw)
        self.kernel_size = self.kernel_shape[2:]
        self.stride, self.padding = _pair(dense.stride), _pair(dense.padding)
        self.dilation, self.groups = _pair(dense.dilation), dense.groups
        # Its dtype is the model's; transformers' classifiers cast pixels to that of this layer's weight
        self.register_buffer("empty", torch.empty(0, dtype=dense.weight.dtype), persistent=False)

    empty: Tensor

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in / groups, kh, kw), in the model's dtype."""
        return self.kernel(self.empty.dtype)

    def kernel(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype).view(self.kernel_shape)

    def dense(self) -> nn.Conv2d:
        """A dense convolution of the same geometry, its weights not set."""
        out, inputs, height, width = self.kernel_shape
        size, bias = (height, width), self.bias is not None
        return nn.Conv2d(
            inputs * self.groups, out, size, self.stride, self.padding, self.dilation, self.groups, bias
        )

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = conv2d(x, self.kernel(x.dtype), bias, self.stride, self.padding, self.dilation, self.groups)
        return y if self.position_bias is None else y + self._position_bias(y)

    def _position_bias(self, y: Tensor) -> Tensor:
        """(1, out, height, width), for the output y before it."""
        height, width = y.shape[2:]
        places = torch.arange(height * width, device=y.device).unsqueeze(0)
        assert self.position_bias is not None
        bias = position_bias_of(self.position_bias, places)
        return bias.transpose(1, 2).reshape(1, -1, height, width).to(y.dtype)


class SplitConv2d(nn.Module):
    """Takes the place of a convolution behind a concatenation, whose halves of the input have grids of their own.

    split: channels of the deep and of the skip half. The dense kernel is both halves side by side.
    """

    def __init__(self, dense: nn.Conv2d, form: LinearFormat, split: tuple[int, int]) -> None:
        super().__init__()
        self.split = split
        self.deep = QuantizedConv2d(_part(dense, split[0]), form)
        self.skip = QuantizedConv2d(_part(dense, split[1]), replace(form, bias=False))

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in, kh, kw), in the model's dtype."""
        return self.kernel(self.deep.empty.dtype)

    def kernel(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.deep.kernel(dtype), self.skip.kernel(dtype)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.deep.bias is None else self.deep.bias.to(x.dtype)
        return conv2d(x, self.kernel(x.dtype), bias, self.deep.stride, self.deep.padding, self.deep.dilation)


def _part(dense: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution of the same geometry that reads so many channels, without memory for its weights."""
    with torch.device("meta"):
        return nn.Conv2d(
            channels,
            dense.out_channels,
            _pair(dense.kernel_size),
            _pair(dense.stride),
            dense.padding if isinstance(dense.padding, str) else _pair(dense.padding),
            _pair(dense.dilation),
            padding_mode=dense.padding_mode,
        )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]
