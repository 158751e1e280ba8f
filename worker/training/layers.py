"""Linear layers and convolutions that train in fixed point: quantized weight, input and output gradient."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from quantry.training import FixedPointTrainingStep
from worker.training.forward import fake_quantize, initial_range, scale_of
from worker.training.gradient import GradientQuantizer, quantize_gradient
from worker.training.integer import Geometry, integer_product

_UNSIGNED_BYTE = 128  # what codes above 127 are stored less


class FixedPointLayer(nn.Module):
    """What both kinds of layer share.

    weight_range, input_range: 0-dimensional parameters, the learned ranges. signed: whether inputs have a sign,
    decided on the first batch with the ranges; None before. gradient: None leaves gradients as they are.
    integer: compute on int8 codes instead of simulating them; for layers without groups and dilation, whose
    gradient is quantized.
    """

    integer = False

    weight: Tensor
    bias: Any  # a Tensor or None; the stubs of the two kinds disagree
    weight_range: nn.Parameter
    input_range: nn.Parameter
    gradient: GradientQuantizer | None

    def add_quantizers(self, step: FixedPointTrainingStep) -> None:
        """Before the first batch: ranges that it will set, and the gradient's grid."""
        self.bits, self.input_bits = step.bits, step.activation_bits or step.bits
        self.signed: bool | None = None
        device = self.weight.device
        self.weight_range = nn.Parameter(initial_range(self.weight, signed=True))
        self.input_range = nn.Parameter(torch.ones((), device=device))
        grid = step.gradient
        self.gradient = None
        if grid is not None:
            rule = {"alpha": grid.alpha, "beta": grid.beta, "gamma": grid.gamma}
            self.gradient = GradientQuantizer(grid.bits or step.bits, grid.interval, **rule).to(device)

    def start(self, x: Tensor) -> None:
        """Set the range of inputs from the first batch, unless it was given."""
        self.signed = bool(x.detach().amin() < 0)
        self.input_range.data.copy_(initial_range(x, signed=self.signed))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight on their grids."""
        if self.signed is None:
            self.start(x)
        assert self.signed is not None
        w = fake_quantize(self.weight, self.weight_range.abs(), self.bits, signed=True)
        return fake_quantize(x, self.input_range.abs(), self.input_bits, signed=self.signed), w

    def scales(self) -> tuple[Tensor, Tensor]:
        """Steps of the grids of input and weight."""
        assert self.signed is not None
        of_input = scale_of(self.input_range.detach().abs(), self.input_bits, signed=self.signed)
        return of_input, scale_of(self.weight_range.detach().abs(), self.bits, signed=True)

    def on_integers(self, x_hat: Tensor, w_hat: Tensor, geometry: Geometry | None) -> Tensor:
        assert self.gradient is not None
        offset = _UNSIGNED_BYTE if self.input_bits == 8 and not self.signed else 0
        return integer_product(
            x_hat,
            w_hat,
            self.bias,
            scales=self.scales(),
            offset=offset,
            geometry=geometry,
            gradient=self.gradient,
        )

    def output(self, y: Tensor) -> Tensor:
        if self.gradient is None or not y.requires_grad:
            return y
        return quantize_gradient(y, self.gradient)


class FixedPointLinear(FixedPointLayer, nn.Linear):
    """y = x_hat W_hat^T + b, with the gradient of y quantized."""

    @classmethod
    def of(cls, dense: nn.Linear, step: FixedPointTrainingStep) -> Self:
        """Takes the parameters of `dense`, which must not be used any more."""
        layer = cls(dense.in_features, dense.out_features, bias=dense.bias is not None, device="meta")
        layer.weight, layer.bias = dense.weight, dense.bias
        layer.add_quantizers(step)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x_hat, w_hat = self.operands(x)
        if self.integer:
            y = self.on_integers(x_hat.flatten(0, -2), w_hat, None)
            return y.view(*x.shape[:-1], self.out_features)
        return self.output(linear(x_hat, w_hat, self.bias))


class FixedPointConv2d(FixedPointLayer, nn.Conv2d):
    """y = conv(x_hat, W_hat) + b, with the gradient of y quantized. Zero padding is exact: zero is a level."""

    @classmethod
    def of(cls, dense: nn.Conv2d, step: FixedPointTrainingStep) -> Self:
        """Takes the parameters of `dense`, which must not be used any more."""
        size, stride, dilation = (_pair(p) for p in (dense.kernel_size, dense.stride, dense.dilation))
        layer = cls(
            dense.in_channels,
            dense.out_channels,
            size,
            stride,
            dense.padding if isinstance(dense.padding, str) else _pair(dense.padding),
            dilation,
            dense.groups,
            bias=dense.bias is not None,
            device="meta",
        )
        layer.weight, layer.bias = dense.weight, dense.bias
        layer.add_quantizers(step)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x_hat, w_hat = self.operands(x)
        if self.integer:
            padding = (0, 0) if isinstance(self.padding, str) else _pair(self.padding)
            return self.on_integers(
                x_hat, w_hat, Geometry(_pair(self.kernel_size), _pair(self.stride), padding)
            )
        y = conv2d(x_hat, w_hat, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.output(y)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def fixed_point_layers(network: nn.Module) -> dict[str, FixedPointLayer]:
    """The layers that train in fixed point, by name, in the order of the modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, FixedPointLayer)}


def use_fixed_point(network: nn.Module, names: tuple[str, ...], step: FixedPointTrainingStep) -> None:
    """Put fixed-point layers in the place of these linear layers and convolutions, with their parameters."""
    for name in names:
        dense = network.get_submodule(name)
        if isinstance(dense, nn.Conv2d):
            network.set_submodule(name, FixedPointConv2d.of(dense, step))
        elif isinstance(dense, nn.Linear):
            network.set_submodule(name, FixedPointLinear.of(dense, step))
        else:
            raise TypeError(f"`{name}` is a {type(dense).__name__}, not a linear layer or a convolution")
