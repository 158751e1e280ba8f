"""Twin grids: the nearest point of both, the published sum, and the signs of GELU."""

from __future__ import annotations

import pytest
import torch

from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.kinds import from_description
from quantry.quantizers.twin import GELU_MINIMUM, TwinGelu, TwinSoftmax, twin_gelu, twin_softmax

UNIT = torch.linspace(0, 1, 4001)


def softmax_levels(bits: int, split: float) -> torch.Tensor:
    magnitudes = torch.arange(2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
    return torch.cat([magnitudes * split, magnitudes]).unique()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m", [0, 1, 3, 8, 19])
def test_a_probability_goes_to_the_nearest_point_of_both_grids(bits: int, m: int) -> None:
    split = torch.tensor(2.0**-m)
    quantized = twin_softmax(UNIT, split, bits, "nearest")
    distances = (UNIT[:, None] - softmax_levels(bits, 2.0**-m)).abs()
    torch.testing.assert_close((UNIT - quantized).abs(), distances.amin(1), atol=1e-6, rtol=0)
    assert (quantized.diff() >= 0).all()
    assert quantized[0] == 0
    assert quantized[-1] == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_the_nearest_form_is_never_worse_than_a_range_for_each_side_of_the_split(bits: int, m: int) -> None:
    split, top = 2.0**-m, 2 ** (bits - 1) - 1
    selected = torch.where(
        split <= UNIT, (UNIT * top).round() / top, (UNIT / split * top).round() * split / top
    )
    error = (UNIT - twin_softmax(UNIT, torch.tensor(split), bits, "nearest")).abs()
    assert (error <= (UNIT - selected).abs() + 1e-6).all()
    assert (error <= torch.where(split <= UNIT, 1 / top, split / top) / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_split_at_one_is_a_plain_grid_of_one_bit_less(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    plain = (UNIT * top).round() / top
    torch.testing.assert_close(twin_softmax(UNIT, torch.tensor(1.0), bits, "nearest"), plain)


def test_the_published_sum_adds_the_split_to_what_lies_above_it() -> None:
    p, split = torch.tensor([0.0, 1.0]), torch.tensor(1 / 8)
    torch.testing.assert_close(twin_softmax(p, split, 4, "sum"), torch.tensor([1 / 7, 1.125]))
    fine = torch.tensor(2.0**-10)  # rounds to 0 in the coarse range: small values are not moved
    torch.testing.assert_close(twin_softmax(p, fine, 4, "sum"), torch.tensor([0.0, 1 + 2.0**-10]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gelu_errors_are_half_a_step_and_signs_stay(bits: int) -> None:
    qmax = 2 ** (bits - 1)
    scale = 3.0 / (qmax - 0.5)
    x = torch.linspace(GELU_MINIMUM, (qmax - 0.5) * scale, 5000)
    quantized = twin_gelu(x, torch.tensor(scale), bits)
    step = torch.where(x < 0, -GELU_MINIMUM / qmax, scale)
    assert ((x - quantized).abs() <= step / 2 + 1e-6).all()
    assert (quantized * x >= 0).all()
    assert len(quantized.unique()) == 2**bits
    assert twin_gelu(torch.tensor(-9.0), torch.tensor(scale), bits) == pytest.approx(GELU_MINIMUM)


def test_the_minimum_is_gelus() -> None:
    x = torch.linspace(-2, 0, 200_001, dtype=torch.float64)
    assert pytest.approx(float(torch.nn.functional.gelu(x).min()), abs=1e-8) == GELU_MINIMUM


@pytest.mark.parametrize(
    "quantizer",
    [
        TwinSoftmax(4).fill(split=torch.tensor(2.0**-5)),
        TwinSoftmax(8, "sum").fill(split=torch.tensor(2.0**-3)),
        TwinGelu(6).fill(scale=torch.tensor(0.07)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_description_and_buffers_are_the_whole_of_a_quantizer(
    quantizer: ActivationQuantizer, dtype: torch.dtype
) -> None:
    again = from_description(quantizer.describe())
    again.load_state_dict(quantizer.state_dict())
    p = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert again(p).dtype == dtype
    assert torch.equal(again(p), quantizer(p))
