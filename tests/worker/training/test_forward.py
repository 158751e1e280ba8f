"""The learned-range quantizers: their grids, and gradients against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantry.quantizers.activation import from_description
from quantry.quantizers.fixed_point import FixedPointQuantizer, code_range
from worker.training.forward import fake_quantize, initial_range, scale_of


def published(x: Tensor, limit: Tensor, bits: int, signed: bool) -> Tensor:
    """The formulas of the released code, with autograd through divide, clip and multiply."""

    def rounded(v: Tensor, steps: int) -> Tensor:
        return v + ((v * steps).round() / steps - v).detach()

    if signed:
        share = ((x / limit + 1) / 2).clamp(0, 1)
        return limit * (2 * rounded(share, 2**bits - 2) - 1)
    return limit * rounded((x / limit).clamp(0, 1), 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_values_and_gradients_are_the_published_ones(bits: int, signed: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=chance, dtype=torch.float64)
    weights = torch.randn(500, generator=chance, dtype=torch.float64)
    found = []
    for quantize in (
        lambda v, r: fake_quantize(v, r, bits, signed=signed),
        lambda v, r: published(v, r, bits, signed),
    ):
        v, r = x.clone().requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        y = quantize(v, r)
        (y * weights).sum().backward()
        found.append((y.detach(), v.grad, r.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_the_grid_has_all_its_levels_and_an_exact_zero(bits: int, signed: bool) -> None:
    x = torch.linspace(-2, 2, 20_001)
    levels = fake_quantize(x, torch.tensor(1.0), bits, signed=signed).unique()
    low, high = code_range(bits, signed=signed)
    assert len(levels) == high - low + 1 == (2**bits - 1 if signed else 2**bits)
    assert 0.0 in levels.tolist()
    assert levels.max() == 1.0


@pytest.mark.parametrize("signed", [True, False])
def test_what_trains_is_what_a_checkpoint_runs(signed: bool) -> None:
    x, limit = torch.randn(1000), torch.tensor(1.7)
    quantizer = from_description(FixedPointQuantizer(4, signed).describe())
    quantizer.fill(scale=scale_of(limit, 4, signed=signed))
    assert torch.equal(quantizer(x), fake_quantize(x, limit, 4, signed=signed))


def test_ranges_start_at_three_deviations() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float(initial_range(x, signed=True)) == pytest.approx(3, rel=0.01)
    assert float(initial_range(x.abs(), signed=False)) == pytest.approx(3, rel=0.01)
    assert float(initial_range(torch.zeros(8), signed=False)) == 1
