"""The invariants of methods/bias-compensation.md, section 10."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quantry.recipe import RtnStep
from worker.methods.bias_compensation import channel_bias, position_bias
from worker.methods.rtn import rtn


def quantized_copy(layer: nn.Linear, bits: int) -> nn.Linear:
    quantized = copy.deepcopy(layer)
    quantized.weight.data = rtn(layer.weight.data, RtnStep.model_validate({"bits": bits})).dequantize()
    return quantized


def means(inputs: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, -2) for x in inputs]).double().mean(0)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8).requires_grad_(False)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mean_output_error_vanishes_over_unequal_batches(layer: nn.Linear, bits: int) -> None:
    quantized = quantized_copy(layer, bits)
    inputs = [torch.rand(4, 7, 16), torch.rand(1, 3, 16)]  # unequal: the mean is over tokens
    mean = means(inputs)

    quantized.bias.data += channel_bias(layer.weight.data, quantized.weight.data, mean, mean)

    errors = torch.cat([(layer(x) - quantized(x)).flatten(0, -2) for x in inputs])
    torch.testing.assert_close(errors.mean(0), torch.zeros(8), atol=1e-6, rtol=0)


def test_sequential_targets_remove_what_the_prefix_added_too(layer: nn.Linear) -> None:
    quantized = quantized_copy(layer, 3)
    x_f = torch.rand(50, 16)
    x_q = x_f + 0.3 + 0.1 * torch.randn(50, 16)  # the quantized prefix drifts

    bias = channel_bias(layer.weight.data, quantized.weight.data, x_f.double().mean(0), x_q.double().mean(0))
    quantized.bias.data += bias

    torch.testing.assert_close((layer(x_f) - quantized(x_q)).mean(0), torch.zeros(8), atol=1e-6, rtol=0)


def test_calibration_error_drops_by_exactly_the_squared_bias(layer: nn.Linear) -> None:
    """L(0) - L(b*) = mean(b*^2): equation 3."""
    layer, quantized = layer.double(), quantized_copy(layer, 2).double()
    x = torch.rand(64, 16, dtype=torch.float64)
    error = layer(x) - quantized(x)
    bias = channel_bias(layer.weight.data, quantized.weight.data, x.mean(0), x.mean(0)).double()
    drop = error.square().mean() - (error - bias).square().mean()
    torch.testing.assert_close(drop, bias.square().mean(), rtol=1e-5, atol=0)


def test_finer_biases_never_fit_worse(layer: nn.Linear) -> None:
    """none >= channel >= position_channel in calibration error, and each position's mean error is 0."""
    quantized = quantized_copy(layer, 2)
    x = torch.rand(6, 5, 16) + torch.linspace(0, 1, 5).view(1, 5, 1)
    error = layer(x) - quantized(x)
    w, w_q = layer.weight.data, quantized.weight.data
    channel = channel_bias(w, w_q, means([x]), means([x]))
    position = position_bias(w, w_q, x.double().mean(0), x.double().mean(0))
    assert position.shape == (5, 8)
    none, coarse, fine = (float((error - b).square().mean()) for b in (0.0, channel, position))
    assert none > coarse > fine
    torch.testing.assert_close((error - position).mean(0), torch.zeros(5, 8), atol=1e-6, rtol=0)


def test_an_exact_layer_needs_no_bias_and_a_second_pass_adds_none(layer: nn.Linear) -> None:
    x = torch.rand(40, 16)
    mean = x.double().mean(0)
    w = layer.weight.data
    assert torch.equal(channel_bias(w, w, mean, mean), torch.zeros(8))
    quantized = quantized_copy(layer, 3)
    quantized.bias.data += channel_bias(w, quantized.weight.data, mean, mean)
    again = (layer(x) - quantized(x)).mean(0)
    torch.testing.assert_close(again, torch.zeros(8), atol=1e-6, rtol=0)


def test_the_bias_is_the_minimum(layer: nn.Linear) -> None:
    quantized = quantized_copy(layer, 2)
    x = torch.rand(80, 16)
    error = layer(x) - quantized(x)
    bias = channel_bias(layer.weight.data, quantized.weight.data, x.double().mean(0), x.double().mean(0))
    least = (error - bias).square().mean()
    for seed in range(10):
        nearby = bias + 0.01 * torch.randn(8, generator=torch.Generator().manual_seed(seed))
        assert (error - nearby).square().mean() > least
