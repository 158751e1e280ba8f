"""The gradient quantizer: an unbiased grid, no trace of the loss's scale, and no gradient kept."""

from __future__ import annotations

import pytest
import torch

from worker.training.gradient import GradientQuantizer, quantize_gradient, stochastic_codes
from worker.training.interval import clipped_share, target_share


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantizer(bits: int = 4, interval: str = "large_gradient", **options: float) -> GradientQuantizer:
    found = GradientQuantizer(bits, interval, **{"alpha": 1e-2, "beta": 1e-3, **options})  # type: ignore[arg-type]
    found.reseed(3)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_is_symmetric_saturates_and_holds_zero(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = stochastic_codes(torch.linspace(-3, 3, 50_001), torch.tensor(1.0), bits, noise())
    assert codes.unique().tolist() == list(range(-top, top + 1))  # 2**bits - 1 levels
    outside = torch.tensor([-2.0, -1.0, 1.0, 2.0]).repeat(100)
    assert stochastic_codes(outside, torch.tensor(1.0), bits, noise()).abs().eq(top).all()
    assert not stochastic_codes(torch.zeros(1000), torch.tensor(1.0), bits, noise()).any()


def test_rounding_is_unbiased_inside_and_off_by_less_than_a_step() -> None:
    g = torch.tensor([-0.93, -0.31, 0.02, 0.2, 0.777], dtype=torch.float64)
    step = 1 / 7
    draws = stochastic_codes(g.expand(100_000, 5), torch.tensor(1.0, dtype=torch.float64), 4, noise()) * step
    assert (draws - g).abs().max() < step
    deviation = draws.std(0) / 100_000**0.5
    assert ((draws.mean(0) - g).abs() < 4 * deviation).all()


def test_codes_do_not_see_the_scale_of_the_loss() -> None:
    g = torch.randn(20_000, generator=noise())
    plain, scaled = quantizer(), quantizer()
    for _ in range(5):
        ours, _ = plain.codes(g)
        theirs, _ = scaled.codes(g * 1024)
        assert torch.equal(ours, theirs)
        assert torch.equal(plain.gamma, scaled.gamma)


def test_noise_is_the_seeds() -> None:
    g = torch.randn(1000, generator=noise())
    first, second, other = quantizer(), quantizer(), quantizer()
    other.reseed(4)
    assert torch.equal(first(g), second(g))
    assert not torch.equal(quantizer()(g), other(g))
    first.reseed(9)  # an epoch begins
    second.reseed(9)
    assert torch.equal(first(g), second(g))


def test_the_incoming_gradient_is_not_changed_and_the_output_is() -> None:
    x = torch.randn(64, 8, requires_grad=True, generator=noise())
    weight = torch.randn(64, 8, generator=noise(1))
    grid = quantizer(interval="min_max")
    (quantize_gradient(x * 1.0, grid) * weight).sum().backward()
    assert x.grad is not None
    levels = (x.grad / weight.abs().max() * 7).unique()
    assert len(levels) <= 15
    torch.testing.assert_close(levels, levels.round(), atol=1e-5, rtol=0)
    assert grid.gamma == 1
    assert grid.largest == weight.abs().max()


def test_the_interval_follows_the_share_that_is_clipped() -> None:
    g = torch.randn(100_000, generator=noise())
    grid = quantizer()
    grid(g)  # nothing is clipped at 1
    assert float(grid.gamma) == pytest.approx(0.999)
    grid.gamma.fill_(0.2)
    assert clipped_share(g, 0.2 * g.abs().max()) > target_share(1e-2, 4)
    grid(g)
    assert float(grid.gamma) == pytest.approx(0.201)


@pytest.mark.parametrize(("interval", "gamma"), [("min_max", 1.0), ("fixed", 0.6)])
def test_baselines_keep_their_interval(interval: str, gamma: float) -> None:
    grid = quantizer(interval=interval, gamma=0.6)
    for seed in range(3):
        grid(torch.randn(1000, generator=noise(seed)))
    assert float(grid.gamma) == pytest.approx(gamma)


def test_zero_gradients_stay_zero_and_say_nothing_about_the_interval() -> None:
    for interval in ("large_gradient", "min_max", "mse"):
        grid = quantizer(interval=interval)
        assert not grid(torch.zeros(100)).any()
        assert grid.gamma == 1
        assert grid.largest == 0


def test_a_layer_with_few_gradients_is_inactive() -> None:
    grid = quantizer(alpha=1e-2)  # 15 / 0.01 = 1500 gradients
    grid(torch.randn(1499, generator=noise()))
    assert not grid.active
    grid(torch.randn(1500, generator=noise()))
    assert grid.active


def test_the_warm_start_leaves_an_inactive_layer_its_whole_range() -> None:
    for count, gamma_is_1 in ((1499, True), (100_000, False)):
        grid = quantizer(alpha=1e-2)
        grid.warming = True
        grid(torch.randn(count, generator=noise()))
        assert bool(grid.gamma == 1) is gamma_is_1
