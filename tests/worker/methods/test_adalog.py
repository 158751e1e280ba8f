"""AdaLog: bases, scales and ranges searched for the least error of the output they are used for."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.logarithmic import LogQuantizer
from quantry.recipe import AdalogStep, RtnStep
from worker.errors import NonFiniteError
from worker.methods import adalog
from worker.methods.activations import Images, observe, quantized
from worker.methods.adalog import (
    calibrate,
    log_space,
    output_root,
    sampled_attention,
    search,
    search_product,
    uniform_space,
)
from worker.models.vision import VisionModel

FAST = {"candidates": 9, "rounds": 1}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adalog, "REFINEMENTS", 2)


def load(folder: Path, name: str = "vit") -> VisionModel:
    return VisionModel(factories.write_classifier(folder, name), device=torch.device("cpu"))


def images(model: VisionModel, count: int = 8) -> Images:
    pixels = torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(1))
    return Images(pixels, 0, RtnStep(bits=4))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("make", [uniform_space, log_space])
def test_no_candidate_is_better_than_what_is_found(bits: int, make: type) -> None:
    x = draw(500, 3) ** 3 + torch.tensor([0.0, 1.0, 5.0])
    space = make(x, bits, [3], 30)

    def errors(quantizer: ActivationQuantizer) -> Tensor:
        return (quantizer(x) - x).square().sum(0)

    best = errors(space.make(*search(space, errors, 3)))
    for a, b in torch.cartesian_prod(space.first, space.second):
        assert (best <= errors(space.make(a.expand(3), b.expand(3)))).all()


def test_a_uniform_search_never_loses_to_the_whole_range() -> None:
    x = draw(500, 1)
    space = uniform_space(x, 4, [], 25)

    def errors(quantizer: ActivationQuantizer) -> Tensor:
        return (quantizer(x) - x).square().sum().view(1)

    plain = UniformQuantizer.covering(x.amin(), x.amax(), 4)
    assert errors(space.make(*search(space, errors, 1))) < errors(plain)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bases_are_powers_of_two_to_a_37th_and_the_least_value_is_exact(bits: int) -> None:
    x = torch.nn.functional.gelu(draw(1000, 1) * 3)
    space = log_space(x, bits, [], 50)
    for a, b in torch.cartesian_prod(space.first, space.second):
        quantizer = space.make(a.view(1), b.view(1))
        assert isinstance(quantizer, LogQuantizer)
        k = float(quantizer.exponent) * 37
        assert k >= 0.999
        assert k == pytest.approx(round(k), abs=1e-4)
        assert quantizer(x).min() == x.min()


@pytest.mark.parametrize("shape", [(7, 20), (60, 20), (20, 20)])
def test_a_root_measures_the_change_of_the_output(shape: tuple[int, int]) -> None:
    weight, change = draw(*shape), draw(30, shape[1])
    root = output_root(weight)
    assert len(root) == min(shape)
    torch.testing.assert_close((change @ root.T).square().sum(), (change @ weight.T).square().sum())


def test_later_rounds_never_raise_the_error() -> None:
    p, v = (draw(4, 2, 10, 10) * 3).softmax(-1), draw(4, 2, 10, 8)
    rows = p.transpose(0, 1).reshape(2, -1).T
    columns = v.transpose(0, 1).reshape(2, -1).T
    errors = []
    for rounds in (1, 2, 4):
        spaces = log_space(rows, 3, [2, 1, 1], 16), uniform_space(columns, 3, [2, 1, 1], 16)
        left, right = search_product(p, v, *spaces, rounds)
        errors.append((left(p) @ right(v) - p @ v).square().sum((0, 2, 3)))
    assert (errors[1] <= errors[0]).all()
    assert (errors[2] <= errors[1]).all()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_samples_of_the_four_operands_belong_together(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adalog, "PAIRS", 3000)
    monkeypatch.setattr(adalog, "QUERIES", 3)
    model = load(tmp_path, name)
    modules = [operand.layers[0] for operand in model.operands if operand.kind == "query"]
    found = dict(sampled_attention(model, images(model, 40), modules))
    assert list(found) == modules
    for sample in found.values():
        n, heads, t, tokens = sample.probabilities.shape
        assert sample.query.shape == (n, heads, t, sample.key.shape[-1])
        assert sample.key.shape == sample.value.shape
        assert t == 3
        assert n * heads * t * tokens <= 2 * 3000
    if name == "vit":  # Swin adds positions to the scores
        scores = sample.query @ sample.key.transpose(2, 3) * sample.key.shape[-1] ** -0.5
        torch.testing.assert_close(scores.softmax(-1), sample.probabilities)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "swin"])
def test_every_operand_but_the_images_gets_a_static_grid(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    calibration = images(model)
    before = model.logits(calibration.pixels)
    found = calibrate(model, calibration, AdalogStep(bits=4, softmax_bits=6, **FAST)).quantizers
    torch.testing.assert_close(model.logits(calibration.pixels), before, atol=1e-4, rtol=1e-4)
    operands = {operand.name: operand for operand in model.operands if operand.kind != "image"}
    assert found.keys() == operands.keys()
    for operand in operands.values():
        quantizer = found[operand.name]
        logarithmic = operand.kind in ("probabilities", "post_activation")
        assert isinstance(quantizer, LogQuantizer if logarithmic else UniformQuantizer)
        assert quantizer.bits == (6 if operand.kind == "probabilities" else 4)
        per_head = operand.kind in ("query", "key", "value", "probabilities")
        assert len(getattr(quantizer, "shape")) == (3 if per_head else 0)  # noqa: B009


def test_more_bits_come_closer(tmp_path: Path) -> None:
    errors = []
    for bits in (3, 6):
        model = load(tmp_path)
        calibration = images(model)
        exact = model.logits(calibration.pixels)
        found = calibrate(model, calibration, AdalogStep(bits=bits, **FAST)).quantizers
        with quantized(model, found):
            errors.append(float((model.logits(calibration.pixels) - exact).square().mean()))
    assert errors[0] > 16 * errors[1]


def test_the_same_seed_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adalog, "ROWS", 20)  # so that rows and images are drawn
    monkeypatch.setattr(adalog, "PAIRS", 2000)
    results = []
    for _ in range(2):
        model = load(tmp_path)
        found = calibrate(model, images(model, 40), AdalogStep(bits=4, **FAST)).quantizers
        results.append({name: quantizer.state_dict() for name, quantizer in found.items()})
    first, second = results
    assert all(torch.equal(first[n][key], second[n][key]) for n in first for key in first[n])


def test_nothing_stays_on_the_network(tmp_path: Path) -> None:
    model = load(tmp_path)
    calibrate(model, images(model), AdalogStep(bits=4, **FAST))
    hooks = [m for m in model.network.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks == []
    seen: list[Tensor] = []
    observe(model, images(model).pixels, {"vit.layers.0.mlp.fc2.input": seen.append})
    assert len(seen) == 1


def test_infinite_scores_are_named(tmp_path: Path) -> None:
    model = load(tmp_path)
    model.network.vit.layers[0].attention.v_proj.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0"):
        calibrate(model, images(model), AdalogStep(bits=4, **FAST))
