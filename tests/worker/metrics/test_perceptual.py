"""Measures by packages and weights that no worker brings along: refused by name without them, and with them.

The weights here are random, in the layout of the true ones: no value is compared with a published one.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.errors import ModelError, QuantizationError, RecipeError
from worker.metrics.perceptual import load_measure

LARGE = torch.zeros(1, 3, 64, 64)


def package(name: str) -> Any:
    """An optional package, or the test is skipped."""
    return pytest.importorskip(name, reason="the extra `perceptual` is not installed")


def installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("metric", "shape", "message"),
    [
        ("lpips", (1, 5, 64, 64), "lpips is of grey or coloured pictures, and samples have 5 channels"),
        ("frechet_inception", (1, 2, 8, 8), "samples have 2 channels"),
        ("lpips", (1, 1, 28, 40), "lpips needs 32 pixels a side, and samples are 28x40"),
    ],
)
def test_images_that_are_no_pictures_are_refused(metric: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_measure(metric, torch.zeros(shape), None)


@pytest.mark.parametrize(("metric", "name"), [("lpips", "lpips"), ("frechet_inception", "torch_fidelity")])
def test_what_is_not_installed_is_named(metric: str, name: str, tmp_path: Path) -> None:
    wanted = (
        "QUANTRY_INCEPTION_WEIGHTS|alexnet-owt" if installed(name) else r"pip install quantry\[perceptual\]"
    )
    with pytest.raises(RecipeError, match=rf"evaluation.metrics: {metric} needs .*({wanted})"):
        load_measure(metric, LARGE, tmp_path / "none.safetensors")


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of random weights in Inception's layout."""
    kind = package("torch_fidelity").FeatureExtractorInceptionV3
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda *args: None)
        network = kind("inception", ["2048"], feature_extractor_weights_path=empty)
    file = tmp_path / "inception.safetensors"
    save_file(network.state_dict(), file)
    return file


def test_inception_tells_samples_apart_and_is_named_by_its_file(inception: Path) -> None:
    measure, title = load_measure("frechet_inception", LARGE, inception)
    assert title.startswith("features of Inception v3 (inception.safetensors, sha256 ")
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert measure(images, images) == pytest.approx(0, abs=1e-6)
    near, far = measure(0.9 * images, images), measure(0.2 * images, images)
    assert 0 < near < far
    assert measure(images.expand(-1, 3, -1, -1), images) == pytest.approx(0, abs=1e-6)


def test_other_weights_are_not_taken_for_inception(inception: Path, tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text"):
        with pytest.raises(ModelError, match=f"{name}.safetensors does not fit Inception v3"):
            load_measure("frechet_inception", LARGE, tmp_path / f"{name}.safetensors")


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_lpips_is_no_distance_of_equals_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("lpips")
    models = package("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    name = models.AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(models.alexnet(weights=None).state_dict(), folder / name)
    measure, title = load_measure("lpips", LARGE, None)
    assert title == f"LPIPS 0.1 on AlexNet ({name})"
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert measure(images, images) == 0
    assert 0 < measure(images + 0.01, images) < measure(images.flip(-1), images)
    torch.save({}, folder / name)
    with pytest.raises(QuantizationError, match="does not fit AlexNet"):
        load_measure("lpips", LARGE, None)
