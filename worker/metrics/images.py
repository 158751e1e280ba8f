"""How close images are to those of the full-precision model: PSNR, SSIM and a Frechet distance of features.

Images are (N, C, H, W) float in [-1, 1], pairs of the same seed. Heusel et al. 2017, arXiv:1706.08500 call the Frechet
distance FID where the features are Inception's; here they are the last class token of a classifier that is named.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from transformers import AutoModelForImageClassification

from quantry.vision import vision_family_of
from worker.calibration.images import ImageSet, pixels
from worker.errors import ModelError

PEAK = 2.0  # of images in [-1, 1]
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
BATCH = 64


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise ratio of each image, (N,) in dB; infinite where both agree."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(PEAK**2 / error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, (N,) in [-1, 1]: Wang et al. 2004, Gaussian window of 11 (or the image)."""
    x, y = images.double(), reference.double()
    size = min(WINDOW, *x.shape[2:])
    size -= 1 - size % 2
    line = torch.exp(
        -0.5 * ((torch.arange(size, dtype=torch.float64, device=x.device) - size // 2) / SIGMA) ** 2
    )
    kernel = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, size, size)

    def mean(values: Tensor) -> Tensor:
        return conv2d(values, kernel, groups=values.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    found = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return found.flatten(1).mean(1)


def to_bytes(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(N, H, W, C) uint8, as the pipelines of diffusers make pictures: x / 2 + 1/2, clamped."""
    scaled = (images.float().cpu() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def class_tokens(images: Tensor, extractor: Path) -> Tensor:
    """The last class token of each image, (N, width) float64, through the classifier's own image processor.

    Raises ModelError for a classifier without a class token.
    """
    model = AutoModelForImageClassification.from_pretrained(
        extractor, dtype=torch.float32, local_files_only=True
    )
    family = vision_family_of(model.config.to_dict())
    if family.pooled == "mean":
        raise ModelError(f"{extractor.name}: a {family.architecture} has no class token to take as features")
    model.eval()
    found: list[Tensor] = []
    norm = model.get_submodule(family.norm)
    content = to_bytes(images)
    pictures = ImageSet("samples", lambda index: content[index], np.arange(len(content)), None)
    prepared = pixels(pictures, extractor, model.config.num_channels, lambda done, total: None)
    with norm.register_forward_hook(lambda module, inputs, output: found.append(output[:, 0].double())):
        for part in torch.split(prepared, BATCH):
            model(pixel_values=part)
    return torch.cat(found)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians fitted to two sets of features (N, width)."""
    a, b = first.double().cpu(), second.double().cpu()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values = scipy.linalg.eigvals(
        (ca @ cb).numpy()
    )  # of a product of two positive semidefinite matrices: real, >= 0
    root = float(np.sqrt(np.clip(values.real, 0, None)).sum())
    distance = float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace()) - 2 * root
    return max(0.0, distance)
