"""Uniform grids: ranges from calibration, read off histograms, or per token."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from quantry.quantizers.activation import TokenQuantizer, UniformQuantizer
from quantry.recipe import RtnStep, UniformStep
from worker.errors import CalibrationError, NonFiniteError
from worker.methods.activations import Images, observe, quantized
from worker.methods.uniform import BINS, SHRINKS, calibrate, mse_range, percentile_range, ranges_of
from worker.models.vision import VisionModel


@pytest.fixture(params=["vit", "dinov2", "swin"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> VisionModel:
    return VisionModel(factories.write_classifier(tmp_path, request.param), device=torch.device("cpu"))


def images(model: VisionModel, count: int = 40) -> Images:
    pixels = torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(1))
    return Images(pixels, 0, RtnStep(bits=4))


def test_every_operand_but_the_images_gets_a_grid_that_covers_it(model: VisionModel) -> None:
    found = calibrate(model, images(model), UniformStep(bits=4, softmax_bits=8)).quantizers
    kinds = {operand.name: operand.kind for operand in model.operands}
    assert set(found) == {name for name, kind in kinds.items() if kind != "image"}
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    observe(model, images(model).pixels, {name: seen[name].append for name in found})
    for name, quantizer in found.items():
        assert quantizer.bits == (8 if kinds[name] == "probabilities" else 4)
        assert isinstance(quantizer, UniformQuantizer)
        for x in seen[name]:
            assert ((quantizer(x) - x).abs() <= quantizer.scale + 1e-6).all()


def test_sixteen_bits_leave_the_logits_as_they_are(model: VisionModel) -> None:
    pixels = images(model).pixels
    before = model.logits(pixels)
    for options in ({}, {"granularity": "token"}):
        step = UniformStep.model_construct(bits=16, **options)
        with quantized(model, calibrate(model, images(model), step).quantizers):
            torch.testing.assert_close(model.logits(pixels), before, atol=0.02, rtol=0.01)
    torch.testing.assert_close(model.logits(pixels), before)


def test_tokens_need_no_calibration(model: VisionModel) -> None:
    found = calibrate(model, images(model), UniformStep(bits=6, granularity="token")).quantizers
    assert {type(quantizer) for quantizer in found.values()} == {TokenQuantizer}


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_ranges_from_histograms_lie_within_what_was_seen(model: VisionModel, kind: str) -> None:
    whole = calibrate(model, images(model), UniformStep(bits=4)).quantizers
    step = UniformStep.model_validate({"bits": 4, "range": kind})
    for name, quantizer in calibrate(model, images(model), step).quantizers.items():
        assert quantizer.get_buffer("scale") <= whole[name].get_buffer("scale") * (1 + 1e-5)


@pytest.mark.parametrize(("kind", "passes"), [("min_max", 1), ("percentile", 2), ("mse", 2)])
def test_every_batch_of_a_pass_is_told(kind: str, passes: int, tmp_path: Path) -> None:
    model = VisionModel(factories.write_classifier(tmp_path, "vit"), device=torch.device("cpu"))
    told: list[tuple[int, int] | str] = []
    heard = Images(
        images(model, 40).pixels,
        0,
        RtnStep(bits=4),
        lambda done, total: told.append((done, total)),
        told.append,
    )
    calibrate(model, heard, UniformStep.model_validate({"bits": 4, "range": kind}))
    expected = ["ranges", (32, 40), (40, 40), "histograms", (32, 40), (40, 40)]
    assert told == expected[: 3 * passes]


def test_batches_do_not_change_a_range(model: VisionModel) -> None:
    pixels = images(model, 40).pixels  # two batches
    both = ranges_of(model, model.operands, pixels)
    parts = [ranges_of(model, model.operands, part) for part in pixels.split(20)]
    for name, (low, high) in both.items():
        torch.testing.assert_close(low, torch.minimum(*(part[name][0] for part in parts)))
        torch.testing.assert_close(high, torch.maximum(*(part[name][1] for part in parts)))


def histogram(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(), x.amax()
    return torch.histc(x, BINS, low.item(), high.item()).double(), low, high


def test_a_percentile_leaves_its_share_out_on_either_side() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    low, high = percentile_range(*histogram(x), bits=4)
    width = (x.amax() - x.amin()) / BINS
    torch.testing.assert_close(low, torch.quantile(x[:].double(), 1e-4).float(), atol=float(width), rtol=0)
    torch.testing.assert_close(high, torch.quantile(x.double(), 1 - 1e-4).float(), atol=float(width), rtol=0)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_mse_range_is_the_best_of_its_grid(bits: int) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).exp() - 1  # skewed, with outliers
    counts, low, high = histogram(x)

    def error(low: Tensor, high: Tensor) -> float:
        return float((UniformQuantizer.covering(low, high, bits)(x) - x).square().mean())

    best = error(*mse_range(counts, low, high, bits=bits))
    tried = [
        error(low * i / SHRINKS, high * j / SHRINKS)
        for i in range(1, SHRINKS + 1)
        for j in range(1, SHRINKS + 1)
    ]
    assert best == pytest.approx(min(tried), rel=0.02)
    assert best < error(low, high)


def test_a_constant_operand_is_kept() -> None:
    x = torch.full((100,), 3.0)
    counts = torch.zeros(BINS, dtype=torch.float64)
    counts[0] = 100
    for fit in (percentile_range, mse_range):
        low, high = fit(counts, x.amin(), x.amax(), bits=4)
        torch.testing.assert_close(UniformQuantizer.covering(low, high, 4)(x), x)


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    model = VisionModel(factories.write_classifier(tmp_path, "vit"), device=torch.device("cpu"))
    none = Images(torch.empty(0, *model.image_shape), 0, RtnStep(bits=4))
    with pytest.raises(CalibrationError, match="at least one"):
        calibrate(model, none, UniformStep(bits=4))
    broken = Images(torch.full((2, *model.image_shape), torch.nan), 0, RtnStep(bits=4))
    with pytest.raises(NonFiniteError, match="NaN"):
        calibrate(model, broken, UniformStep(bits=4))
