"""Second moments of bfloat16 inputs: as exact as float32 sums of exact products."""

from __future__ import annotations

import pytest
import torch

from worker.calibration.statistics import PRODUCT_TOKENS, InputStatistics, bfloat16_products


def gathered(x_q: torch.Tensor, x_f: torch.Tensor) -> InputStatistics:
    found = InputStatistics.zeros(
        x_q.shape[-1], hessian=True, cross=True, positions=None, device=torch.device("cpu")
    )
    found.update(x_q, x_f)
    return found.mean("layer")


def test_one_large_direction_does_not_drown_the_small_eigenvalues() -> None:
    torch.manual_seed(0)
    tokens, n = PRODUCT_TOKENS + 100, 96
    x = 0.1 * torch.randn(tokens, n) + torch.randn(tokens, 1) * torch.randn(n)
    x = x.bfloat16()
    found = gathered(x.unsqueeze(0), x.unsqueeze(0))
    assert found.hessian is not None
    exact = x.double().T @ x.double() / tokens
    least = torch.linalg.eigvalsh(exact)[0]
    assert float(torch.linalg.matrix_norm(found.hessian.double() - exact, 2)) < 0.1 * float(least)


def test_moments_are_those_of_the_values() -> None:
    torch.manual_seed(1)
    x_q = torch.randn(3, 700, 520).bfloat16()
    x_f = (x_q.float() + 0.1 * torch.randn(3, 700, 520)).bfloat16()
    found = gathered(x_q, x_f)
    q, f = (x.double().flatten(0, 1) for x in (x_q, x_f))
    assert found.hessian is not None
    assert found.cross is not None
    torch.testing.assert_close(found.hessian.double(), q.T @ q / len(q), rtol=1e-5, atol=1e-5)
    cross = (f - q).T @ q / len(q)
    assert float((found.cross - cross).norm() / cross.norm()) < 0.01
    torch.testing.assert_close(found.sum_q, q.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum_f, f.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moment_of_the_outputs_is_exact(dtype: torch.dtype) -> None:
    """A difference of two large moments is taken of it: what it loses, the target loses."""
    torch.manual_seed(2)
    x_q, y_f = torch.randn(2, 1500, 48).to(dtype), 20 * torch.randn(2, 1500, 8).to(dtype)
    found = InputStatistics.zeros(
        48, hessian=True, cross=True, positions=None, device=torch.device("cpu"), outputs=8
    )
    found.update(x_q, x_q, y_f)
    found = found.mean("layer")
    exact = y_f.double().flatten(0, 1).T @ x_q.double().flatten(0, 1) / 3000
    assert found.cross is None
    assert found.outputs is not None
    torch.testing.assert_close(found.outputs.double(), exact, rtol=1e-5, atol=1e-5)
    part = found.of_rows(slice(2, 5)).outputs
    assert part is not None
    torch.testing.assert_close(part.double(), exact[2:5], rtol=1e-5, atol=1e-5)


def test_the_precision_of_products_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with bfloat16_products(True):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
