"""Triangular products and inverses against dense ones, across block edges."""

from __future__ import annotations

import pytest
import torch

from worker.methods.triangular import BLOCK, invert_upper, times_transpose, times_upper


def upper(n: int) -> torch.Tensor:
    """A well-conditioned upper triangular matrix with rubbish nowhere."""
    torch.manual_seed(n)
    return torch.triu(torch.randn(n, n, dtype=torch.float64) / n**0.5) + torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_products_and_inverse_are_the_dense_ones(n: int) -> None:
    u = upper(n)
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(times_upper(x, u), x @ u)
    torch.testing.assert_close(times_transpose(x, u), x @ u.T)
    inverse = u.clone()
    invert_upper(inverse)
    torch.testing.assert_close(inverse @ u, torch.eye(n, dtype=torch.float64))
    assert not inverse.tril(-1).any()
