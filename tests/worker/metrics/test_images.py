"""Closeness of images: closed forms, and what must not change a figure."""

from __future__ import annotations

import math

import pytest
import torch

from worker.metrics.images import frechet_distance, psnr, ssim, to_bytes


def pictures(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_psnr_of_a_constant_error() -> None:
    x = pictures()
    assert psnr(x + 0.02, x).tolist() == pytest.approx([10 * math.log10(4 / 0.02**2)] * 3, rel=1e-4)
    assert psnr(x, x).isinf().all()


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    x = pictures()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values = [float(ssim(x + scale * noise, x).mean()) for scale in (0.0, 0.1, 0.5, 2.0)]
    assert values[0] == pytest.approx(1)
    assert values == sorted(values, reverse=True)
    assert torch.allclose(ssim(x, x + 0.1 * noise), ssim(x + 0.1 * noise, x))


def test_ssim_of_constant_images_is_its_luminance_term() -> None:
    one, other = torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), 0.25)
    c = (0.01 * 2) ** 2
    expected = (2 * 0.5 * 0.25 + c) / (0.5**2 + 0.25**2 + c)
    assert float(ssim(one, other)) == pytest.approx(expected, rel=1e-6)


def test_ssim_takes_images_smaller_than_its_window() -> None:
    assert float(ssim(pictures(side=6), pictures(side=6)).min()) == pytest.approx(1)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)  # covariance exactly 1
    shift, scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 1.5
    expected = float(shift.square().sum()) + 3 * (1 - scale) ** 2
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_works_with_fewer_samples_than_features() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 20, generator=generator), torch.randn(6, 20, generator=generator)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6)


def test_pictures_are_made_as_diffusers_makes_them() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 1, 4)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255]
