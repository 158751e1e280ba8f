"""Logarithmic grids: which points they have, how far they move a value, what becomes of zero."""

from __future__ import annotations

import pytest
import torch

from quantry.quantizers.kinds import from_description
from quantry.quantizers.logarithmic import LogQuantizer

BITS = [2, 3, 4, 6, 8]


def quantizer(bits: int, *, scale: float = 1.0, exponent: float = 0.5, shift: float = 0.0) -> LogQuantizer:
    values = {"scale": scale, "exponent": exponent, "shift": shift}
    return LogQuantizer(bits, []).fill(**{name: torch.tensor(value) for name, value in values.items()})


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [0.25, 5 / 37])
def test_it_has_a_point_for_each_code_and_zero(bits: int, exponent: float) -> None:
    points = 0.7 * torch.exp2(-exponent * torch.arange(2.0**bits))
    log = quantizer(bits, scale=0.7, exponent=exponent)
    torch.testing.assert_close(log(points), points)
    below = float(points[-1]) * 2 ** (-0.51 * exponent)
    assert torch.equal(log(torch.tensor([0.0, 1e-38, below])), torch.zeros(3))
    between = log(torch.cat([points * share for share in torch.linspace(0.4, 1.1, 50)]))
    distance = (between - torch.cat([points, torch.zeros(1)]).view(-1, 1)).abs().amin(0)
    assert (distance <= 1e-5 * between).all()


@pytest.mark.parametrize("bits", BITS)
def test_it_moves_a_value_by_half_a_step_at_most_and_keeps_the_order(bits: int) -> None:
    log = quantizer(bits, scale=0.9, exponent=0.25)
    least = 0.9 * 2 ** (-0.25 * (2**bits - 0.5))
    x = torch.logspace(torch.tensor(least * 1.0001).log10().item(), torch.tensor(0.9).log10().item(), 999)
    moved = (log(x) / x).log2().abs()
    assert moved.max() <= 0.25 / 2 + 1e-4
    values = log(torch.linspace(0, 2, 9999))
    assert (values.diff() >= 0).all()
    assert values.max() == values[-1]
    torch.testing.assert_close(values[-1], torch.tensor(0.9))


def test_a_shift_moves_the_grid_below_zero() -> None:
    plain, shifted = quantizer(4, scale=3.0), quantizer(4, scale=3.0, shift=0.17)
    x = torch.linspace(-0.17, 4, 500)
    torch.testing.assert_close(shifted(x), plain(x + 0.17) - 0.17)
    assert shifted(torch.tensor(-0.17)) == -torch.tensor(0.17)
    assert shifted(torch.tensor(-5.0)) == -torch.tensor(0.17)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heads_have_grids_of_their_own(dtype: torch.dtype) -> None:
    heads = LogQuantizer(3, [2, 1, 1]).fill(
        scale=torch.tensor([1.0, 0.5]).view(2, 1, 1), exponent=torch.tensor([0.5, 1.0]).view(2, 1, 1)
    )
    p = torch.rand(4, 2, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = p.clone()
    out = heads(p)
    assert out.dtype == dtype
    assert torch.equal(p, before)
    assert torch.equal(out[:, 0], quantizer(3)(p[:, 0]))
    assert torch.equal(out[:, 1], quantizer(3, scale=0.5, exponent=1.0)(p[:, 1]))


def test_a_description_and_buffers_are_all_of_it() -> None:
    log = quantizer(5, scale=0.3, exponent=4 / 37, shift=0.1)
    again = from_description(log.describe())
    again.load_state_dict(log.state_dict())
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), log(x))
