"""Fixed-point layers: against a backward pass written by hand, and the integer path against the simulated one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from quantry.training import FixedPointTrainingStep
from worker.training.forward import fake_quantize
from worker.training.layers import FixedPointConv2d, FixedPointLayer, FixedPointLinear, use_fixed_point


def step(bits: int = 4, **gradient: Any) -> FixedPointTrainingStep:
    return FixedPointTrainingStep.model_validate(
        {"method": "fixed_point_training", "bits": bits, "gradient": {"interval": "min_max", **gradient}}
    )


def conv(bits: int, *, stride: int = 1, bias: bool = False) -> FixedPointConv2d:
    torch.manual_seed(0)
    dense = nn.Conv2d(5, 6, 3, stride=stride, padding=1, bias=bias, dtype=torch.float64)
    return FixedPointConv2d.of(dense, step(bits)).double()


def linear(bits: int) -> FixedPointLinear:
    torch.manual_seed(0)
    return FixedPointLinear.of(nn.Linear(20, 12, dtype=torch.float64), step(bits)).double()


def passes(layer: FixedPointLayer, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of everything, for a fixed gradient of the output."""
    assert layer.gradient is not None
    layer.gradient.reseed(5)
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def test_a_convolution_is_its_backward_pass_written_by_hand() -> None:
    layer, x = conv(4, stride=2), torch.randn(3, 5, 8, 8, dtype=torch.float64)
    found = passes(layer, x)
    assert layer.gradient is not None
    assert layer.signed is True
    layer.gradient.reseed(5)
    g = torch.randn(found["y"].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    g_hat = layer.gradient(g)
    x_hat, w_hat = layer.operands(x)
    inside = x.abs() <= layer.input_range
    of_x = conv2d_input(x.shape, w_hat.detach(), g_hat, stride=2, padding=1) * inside
    torch.testing.assert_close(found["x"], of_x)
    of_w = conv2d_weight(x_hat.detach(), layer.weight.shape, g_hat, stride=2, padding=1)
    torch.testing.assert_close(found["weight"], of_w * (layer.weight.abs() <= layer.weight_range))
    w, limit = layer.weight.detach().requires_grad_(), layer.weight_range.detach().requires_grad_()
    fake_quantize(w, limit, 4, signed=True).backward(of_w)
    torch.testing.assert_close(found["weight_range"], limit.grad)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["linear", "tokens", "conv", "stride"])
def test_integers_compute_what_is_simulated(bits: int, signed: bool, kind: str) -> None:
    if kind in ("linear", "tokens"):
        layer: FixedPointLayer = linear(bits)
        x = torch.randn(*((33,) if kind == "linear" else (3, 7)), 20, dtype=torch.float64)
    else:
        layer = conv(bits, stride=2 if kind == "stride" else 1, bias=True)
        x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    x = x if signed else x.abs()
    with torch.no_grad():
        layer(x)  # the ranges of the first batch
    other = copy.deepcopy(layer)
    other.integer = True
    simulated, integers = passes(layer, x), passes(other, x)
    assert layer.signed is signed
    assert simulated.keys() == integers.keys() >= {"y", "x", "weight", "weight_range", "input_range", "bias"}
    for name, value in simulated.items():
        torch.testing.assert_close(integers[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("channels", [(1, 1), (1, 5), (9, 1), (3, 5)])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (0, 0)), ((2, 3), (1, 2))])
def test_integers_take_convolutions_of_any_shape(
    channels: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(*channels, kernel, stride, padding, dtype=torch.float64)
    layer = FixedPointConv2d.of(dense, step()).double()
    x = torch.randn(2, channels[0], 7, 11, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    other = copy.deepcopy(layer)
    other.integer = True
    simulated, integers = passes(layer, x), passes(other, x)
    for name, value in simulated.items():
        torch.testing.assert_close(integers[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_with_many_bits_training_is_full_precision_within_rounding() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(20, 12, dtype=torch.float64), torch.randn(64, 20, dtype=torch.float64)
    exact = copy.deepcopy(dense)
    layer = FixedPointLinear.of(dense, step(8)).double()
    layer.bits = layer.input_bits = 24
    assert layer.gradient is not None
    layer.gradient.bits = 24
    with torch.no_grad():
        layer(x)
        layer.weight_range.fill_(float(layer.weight.abs().max()))
        layer.input_range.fill_(float(x.abs().max()))
    y = layer(x)
    y.square().sum().backward()
    exact(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, exact.weight.grad, rtol=1e-4, atol=1e-4)


def test_layers_keep_their_parameters_and_run_without_gradients() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    weight = network[3].weight
    use_fixed_point(network, ("3",), step())
    assert isinstance(network[3], FixedPointLinear)
    assert network[3].weight is weight
    with torch.no_grad():
        assert network(torch.randn(2, 3, 6, 6)).shape == (2, 5)
    assert network[3].signed is False
    with pytest.raises(TypeError, match="ReLU"):
        use_fixed_point(network, ("1",), step())
