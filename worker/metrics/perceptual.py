"""Measures whose networks no worker brings along: LPIPS and the Frechet distance in Inception's features.

`pip install quantry[perceptual]` brings the packages, the operator the weights (docs/diffusion.md). What is missing is
refused by name: a measure that was asked for is never left out.
"""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from worker.errors import ModelError, RecipeError
from worker.metrics.images import BATCH, frechet_distance, to_bytes
from worker.models.source import reason_of

WIDTH = 2048  # of Inception's last pooling
SMALLEST = 32  # pixels of a side that AlexNet's poolings leave something of

# Of images (N, C, H, W) in [-1, 1] and full precision's from the same seeds.
Measure = Callable[[Tensor, Tensor], float]


def load_measure(metric: str, image: Tensor, inception_weights: Path | None) -> tuple[Measure, str]:
    """`lpips` or `frechet_inception`, ready to measure, and by what it measures.

    Args: image: one of those that will come, (1, C, H, W).
    Raises: RecipeError where a package or weights are not installed, or for images that these networks cannot look at;
        ModelError for weights of something else.
    """
    _, channels, *sides = image.shape
    if channels not in (1, 3):
        raise RecipeError(
            f"evaluation.metrics: {metric} is of grey or coloured pictures, and samples have {channels} channels: "
            "leave it out"
        )
    if metric == "frechet_inception":
        return _load_inception(inception_weights)
    if min(sides) < SMALLEST:
        raise RecipeError(
            f"evaluation.metrics: lpips needs {SMALLEST} pixels a side, and samples are {sides[0]}x{sides[1]}: leave "
            "it out"
        )
    return _load_lpips()


def _load_inception(weights: Path | None) -> tuple[Measure, str]:
    """Szegedy et al. 2015, arXiv:1512.00567, in the form that Heusel et al. 2017, arXiv:1706.08500 measure with."""
    package = _package("torch_fidelity", "frechet_inception")
    if weights is None or not weights.is_file():
        raise RecipeError(
            "evaluation.metrics: frechet_inception needs Inception v3's weights, and QUANTRY_INCEPTION_WEIGHTS names "
            "no file on this worker: install them as docs/diffusion.md says, or leave it out"
        )
    content = io.BytesIO()  # torch-fidelity reads pickles; this one is written here, of safetensors
    try:
        torch.save(load_file(weights), content)
        content.seek(0)
        network = package.FeatureExtractorInceptionV3(
            "inception", [str(WIDTH)], feature_extractor_weights_path=content
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = reason_of(error, weights.parent)
        raise ModelError(f"evaluation.metrics: {weights.name} does not fit Inception v3: {reason}") from error
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return partial(_inception, network), f"features of Inception v3 ({weights.name}, sha256 {digest[:12]})"


@torch.no_grad()
def _inception(network: Any, images: Tensor, reference: Tensor) -> float:
    features = []
    for side in (images, reference):
        pictures = torch.from_numpy(to_bytes(_coloured(side))).permute(0, 3, 1, 2)
        features.append(torch.cat([network(part)[0] for part in torch.split(pictures, BATCH)]))
    return frechet_distance(*features)


def _load_lpips() -> tuple[Measure, str]:
    """Zhang et al. 2018, arXiv:1801.03924, version 0.1 on AlexNet."""
    package, models = _package("lpips", "lpips"), _package("torchvision.models", "lpips")
    name = str(models.AlexNet_Weights.IMAGENET1K_V1.url).rpartition("/")[2]
    if not (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file():
        raise RecipeError(
            f"evaluation.metrics: lpips needs AlexNet's weights, and this worker has no {name} in the folder "
            "`checkpoints` of torch.hub (TORCH_HOME/hub): put it there, or leave lpips out"
        )
    try:
        network = package.LPIPS(net="alex", verbose=False)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        reason = reason_of(error, Path(torch.hub.get_dir()))
        raise ModelError(f"evaluation.metrics: {name} does not fit AlexNet: {reason}") from error
    return partial(_lpips, network), f"LPIPS 0.1 on AlexNet ({name})"


@torch.no_grad()
def _lpips(network: Any, images: Tensor, reference: Tensor) -> float:
    """The mean distance of the pairs."""
    sides = (torch.split(_coloured(side), BATCH) for side in (images, reference))
    return float(torch.cat([network(a, b).double().flatten() for a, b in zip(*sides, strict=True)]).mean())


def _coloured(images: Tensor) -> Tensor:
    """Grey images as coloured ones, float32 on the CPU."""
    return images.float().cpu().expand(-1, 3, -1, -1)


def _package(name: str, metric: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"evaluation.metrics: {metric} needs a package that this worker has not: pip install quantry[perceptual], "
            "or leave it out"
        ) from error
