"""Second moments of bfloat16 inputs: as exact as float32 sums of exact products."""

from __future__ import annotations

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


def test_the_precision_of_products_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with bfloat16_products(True):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
