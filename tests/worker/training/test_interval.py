"""The interval rule on the toy distributions of the specification: bound, steady state, errors of large gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.training.gradient import stochastic_codes
from worker.training.interval import (
    bound,
    clipped_share,
    errors,
    largest_of,
    least_squares,
    stepped,
    target_share,
    warm_start,
)

BITS, ALPHA, BETA, COUNT = 4, 1e-3, 1e-3, 1_000_000
TARGET = target_share(ALPHA, BITS)
RULE = {"alpha": ALPHA, "beta": BETA, "bits": BITS}


def gradients(name: str) -> Tensor:
    """A million draws; the tails of a distribution are where its seed shows."""
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(COUNT, generator=chance)
    if name == "gauss":
        return normal
    if name.startswith("student"):
        degrees = int(name.removeprefix("student-"))
        squares = torch.randn(degrees, COUNT, generator=chance).square_().mean(0)
        return normal / squares.sqrt()
    share = torch.rand(COUNT, generator=chance) - 0.5
    laplace = -share.sign() * torch.log1p(-2 * share.abs() + 1e-7)
    return laplace if name == "laplace" else laplace * (torch.rand(COUNT, generator=chance) < 0.3)


def settled(g: Tensor) -> tuple[float, list[float]]:
    """gamma after the warm start and 320 iterations on the same gradient, and the shares of the last 20."""
    gamma, shares = warm_start(g, **RULE), []
    magnitude = g.abs()
    large = magnitude[magnitude > 0.02 * largest_of(g)]  # all that can be clipped: the rest costs time only
    for _ in range(320):
        share = clipped_share(large, gamma * largest_of(g)) * len(large) / len(g)
        gamma = stepped(gamma, share, **RULE)
        shares.append(float(share))
    return float(gamma), shares[-20:]


def test_the_bound_is_the_same_at_the_target_for_any_gamma() -> None:
    for bits in (2, 4, 8):
        share = target_share(ALPHA, bits)
        for gamma in (0.1, 0.5, 1.0):
            assert bound(gamma, share, ALPHA, bits) == pytest.approx(1 / (2**bits - 1), rel=1e-12)


@pytest.mark.parametrize("name", ["gauss", "laplace", "student-5", "student-3", "sparse"])
def test_the_rule_settles_where_the_bound_is_least_and_protects_large_gradients(name: str) -> None:
    g = gradients(name)
    largest = largest_of(g)
    gamma, shares = settled(g)
    near = clipped_share(g, (gamma - 2 * BETA) * largest) - clipped_share(g, (gamma + 2 * BETA) * largest)
    for share in shares:  # within what one step of gamma can change
        assert abs(share - TARGET) <= max(2 / COUNT, float(near))
        assert bound(gamma, share, ALPHA, BITS) == pytest.approx(1 / 15, rel=0.3)
    squares = float(least_squares(g, BITS))
    found = {}
    for rule, width in (("rule", gamma), ("min_max", 1.0), ("mse", squares)):
        half_width = width * largest
        codes = stochastic_codes(g, half_width, BITS, torch.Generator().manual_seed(1))
        large, every = errors(g, codes * half_width / 7, ALPHA)
        found[rule] = (float(large), float(every))
    assert found["rule"][0] < found["min_max"][0]
    assert found["rule"][0] < 0.35 * found["mse"][0]
    assert found["mse"][1] < found["rule"][1] < found["min_max"][1]


# gamma, E(G_L) and the gamma of least squares, of the specification's own million draws. All three scale with one over
# the largest draw, which differs by some per cent from sample to sample; their ratios do not.
@pytest.mark.parametrize(
    ("name", "gamma", "error", "squares"),
    [("gauss", 0.840, 0.0334, 0.49), ("laplace", 0.632, 0.0310, 0.28), ("sparse", 0.614, 0.0288, 0.31)],
)
def test_the_table_of_the_specification(name: str, gamma: float, error: float, squares: float) -> None:
    g = gradients(name)
    found, _ = settled(g)
    assert found == pytest.approx(gamma, rel=0.15)
    half_width = found * largest_of(g)
    codes = stochastic_codes(g, half_width, BITS, torch.Generator().manual_seed(1))
    large, _ = errors(g, codes * half_width / 7, ALPHA)
    assert float(large) / found == pytest.approx(error / gamma, rel=0.05)
    assert float(least_squares(g, BITS)) / found == pytest.approx(squares / gamma, rel=0.1)


def test_the_warm_start_is_the_published_loop() -> None:
    g = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    gamma, mean = 1.0, 0.0
    while mean <= TARGET:
        mean = 0.999 * mean + 0.001 * float(
            (g.double().abs() > gamma * largest_of(g).double()).double().mean()
        )
        if mean > TARGET:
            break
        gamma -= BETA
    assert float(warm_start(g, **RULE)) == pytest.approx(gamma, abs=1e-6)


def test_the_least_squares_interval_beats_its_neighbours() -> None:
    g = gradients("laplace")
    best = float(least_squares(g, BITS))

    def squared(width: float) -> float:
        half_width = width * largest_of(g)
        codes = stochastic_codes(g, half_width, BITS, torch.Generator().manual_seed(1))
        return float((g - codes * half_width / 7).double().square().mean())

    assert squared(best) < min(squared(best - 0.05), squared(best + 0.05), squared(1.0))
