"""The three products of a fixed-point layer on integers: int8 codes in, int32 sums, one folded scale out.

forward y = (s_x s_w) X W^T, weight gradient (s_g s_x) G^T X, input gradient (s_g s_w) G W, with X, W, G the codes. A
convolution is the product of its patches (im2col). Codes of unsigned 8-bit inputs are stored less 128, and the
missing 128 times the sum of the other operand is added. What is kept for the backward pass is int8, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import fold, pad

from worker.training.gradient import GradientQuantizer

_EXACT_FLOAT32 = 2**24  # whole numbers below are exact


@dataclass(frozen=True)
class Geometry:
    """Of a convolution without groups and dilation."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def int_product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n), both int8: int32. Pads to what a GPU's tensor cores take."""
    if a.device.type != "cuda":
        return torch._int_mm(_plain(a), _plain(b))
    m, n = a.shape[0], b.shape[1]
    rows = max(32, m + -m % 8) - m
    inner = -a.shape[1] % 8
    product = torch._int_mm(pad(a, (0, inner, 0, rows)), pad(b, (0, -n % 8, 0, inner)))
    return product[:m, :n]


def _plain(codes: Tensor) -> Tensor:
    """A copy of a matrix with one row or column: torch trusts its strides, and there they may be anything."""
    return codes.clone(memory_format=torch.contiguous_format) if 1 in codes.shape else codes


def to_codes(x_hat: Tensor, scale: Tensor, offset: int = 0) -> Tensor:
    """int8 codes, less `offset`, of values that lie on the grid."""
    return (x_hat / scale).round_().sub_(offset).to(torch.int8)


def patches(codes: Tensor, shape: Geometry, zero: int) -> Tensor:
    """im2col: codes (N, C, H, W) to (N * H' * W', C * kh * kw); `zero` is the code that pads."""
    (kh, kw), (sh, sw), (ph, pw) = shape.kernel, shape.stride, shape.padding
    padded = pad(codes, (pw, pw, ph, ph), value=zero)
    windows = padded.unfold(2, kh, sh).unfold(3, kw, sw)  # (N, C, H', W', kh, kw)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, codes.shape[1] * kh * kw)


class _IntegerProduct(torch.autograd.Function):
    """y = x W^T (+ b) for x (n, in) or a convolution of x (N, C, H, W), all on codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Tensor,
        w_hat: Tensor,
        bias: Tensor | None,
        scales: tuple[Tensor, Tensor],
        offset: int,
        geometry: Geometry | None,
        gradient: GradientQuantizer,
    ) -> Tensor:
        x_scale, w_scale = scales
        x, w = to_codes(x_hat, x_scale, offset), to_codes(w_hat, w_scale).flatten(1)
        rows = x if geometry is None else patches(x, geometry, -offset)
        total = int_product(rows, w.t())
        if offset:
            total = total + offset * w.sum(1, dtype=torch.int32)
        y = total.to(x_hat.dtype) * (x_scale * w_scale)
        y = y if bias is None else y + bias
        ctx.save_for_backward(x, w, x_scale, w_scale)
        ctx.facts = offset, geometry, gradient, w_hat.shape, bias is not None
        return y if geometry is None else _as_images(y, x.shape, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, x_scale, w_scale = ctx.saved_tensors
        offset, geometry, gradient, kernel_shape, biased = ctx.facts
        codes, step = gradient.codes(grad)
        g = codes.to(torch.int8)
        g = g if geometry is None else g.flatten(2).transpose(1, 2).flatten(0, 1)  # (n, out)
        rows = x if geometry is None else patches(x, geometry, -offset)
        of_weight = int_product(g.t().contiguous(), rows)
        if offset:
            of_weight = of_weight + offset * g.sum(0, dtype=torch.int32).unsqueeze(1)
        of_rows = int_product(g, w)
        dtype = grad.dtype
        of_input = of_rows.to(dtype) if geometry is None else _folded(of_rows, x.shape, geometry, dtype)
        of_bias = g.sum(0, dtype=torch.int32).to(dtype) * step if biased else None
        weight_gradient = (of_weight.to(dtype) * (step * x_scale)).view(kernel_shape)
        return of_input * (step * w_scale), weight_gradient, of_bias, None, None, None, None


def integer_product(
    x_hat: Tensor,
    w_hat: Tensor,
    bias: Tensor | None,
    *,
    scales: tuple[Tensor, Tensor],
    offset: int,
    geometry: Geometry | None,
    gradient: GradientQuantizer,
) -> Tensor:
    """The layer's output, whose backward pass multiplies the codes of `gradient` by those of input and weight.

    Args:
        x_hat, w_hat: on their grids; differentiable. geometry: None for a linear layer of x_hat (n, in).
        scales: of x_hat and w_hat. offset: 128 where the codes of x_hat reach 255, else 0.
    """
    parts = (x_hat, w_hat, bias, scales, offset, geometry, gradient)
    return _IntegerProduct.apply(*parts)  # type: ignore[no-any-return, no-untyped-call]


def _as_images(y: Tensor, input_shape: torch.Size, shape: Geometry) -> Tensor:
    """(N * H' * W', out) to (N, out, H', W')."""
    height, width = _output_size(input_shape, shape)
    return (
        y.view(input_shape[0], height * width, -1).transpose(1, 2).reshape(input_shape[0], -1, height, width)
    )


def _output_size(input_shape: torch.Size, shape: Geometry) -> tuple[int, int]:
    sizes = zip(input_shape[2:], shape.kernel, shape.stride, shape.padding, strict=True)
    height, width = ((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)
    return height, width


def _folded(rows: Tensor, input_shape: torch.Size, shape: Geometry, dtype: torch.dtype) -> Tensor:
    """col2im of int32 (N * H' * W', C * kh * kw): sums of whole numbers, exact in a wide enough float."""
    overlap = shape.kernel[0] * shape.kernel[1]
    wide = torch.float64 if int(rows.abs().amax()) * overlap >= _EXACT_FLOAT32 else torch.float32
    columns = rows.view(input_shape[0], -1, rows.shape[1]).transpose(1, 2).to(wide)
    sizes = (input_shape[2], input_shape[3])
    return fold(columns, sizes, shape.kernel, padding=shape.padding, stride=shape.stride).to(dtype)
