"""IGQ-ViT: what groups buy, allocation by integer programming, and whole networks."""

from __future__ import annotations

import itertools
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
from torch import Tensor

from quantry.layers.operands import attached
from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.grouped import ChannelQuantizer, GroupedQuantizer, extent
from quantry.recipe import IgqStep, RtnStep
from quantry.vision_products import group_counts
from worker.errors import CalibrationError, NonFiniteError, RecipeError
from worker.methods.activations import Images, quantized
from worker.methods.bops import AXES, count, model_products
from worker.methods.igq import (
    allocate,
    calibrate,
    collect,
    perturbations,
    upper_bound,
)
from worker.methods.igq_bounds import fit_bounds
from worker.models.vision import VisionModel


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(folder: Path, name: str = "vit") -> VisionModel:
    return VisionModel(factories.write_classifier(folder, name), device=torch.device("cpu"))


def pictures(model: VisionModel, count: int = 6) -> Images:
    pixels = torch.randn(count, *model.image_shape, generator=draws(7))
    return Images(pixels, seed=0, weights=RtnStep(bits=4))


def test_more_groups_come_closer_to_a_grid_for_each_channel() -> None:
    g = draws(11)
    scale = torch.randn(96, generator=g).mul(0.8).exp()

    def instances(count: int) -> Tensor:
        jitter = torch.randn(count, 1, 96, generator=g).mul(0.3).exp()
        return torch.randn(count, 50, 96, generator=g) * scale * jitter

    seen, unseen = instances(16), instances(8)
    points = torch.stack(extent(seen, "channels"), -1).flatten(0, -2)
    ratios = []
    for groups in (1, 2, 4, 8, 16):
        bounds, _ = fit_bounds(points, groups, 30)
        quantizer = GroupedQuantizer(4, groups, "channels").fill(low=bounds[:, 0], high=bounds[:, 1])
        ratios.append(sqnr(unseen, quantizer))
    assert ratios == sorted(ratios)
    assert ratios[3] > ratios[0] + 10
    assert ratios[-1] < sqnr(unseen, ChannelQuantizer(4)) < ratios[-1] + 4


def sqnr(x: Tensor, quantizer: ActivationQuantizer) -> float:
    """Decibels."""
    return float(10 * (x.square().sum() / (quantizer(x) - x).square().sum()).log10())


def brute_force(omega: np.ndarray, costs: np.ndarray, budget: float) -> float:
    rows = np.arange(len(omega))
    choices = (np.array(c) for c in itertools.product(range(omega.shape[1]), repeat=len(omega)))
    return min(float(omega[rows, c].sum()) for c in choices if costs[rows, c].sum() <= budget)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("unit", [1e-5, 1.0])
def test_allocation_is_the_best_of_all_choices(seed: int, unit: float) -> None:
    chance = np.random.default_rng(seed)
    omega = -np.sort(-chance.random((4, 3)), axis=1) * unit  # fewer groups perturb more
    costs = np.sort(chance.integers(1, 1000, (4, 3)), axis=1) * 1e5
    budget = float(costs[:, 1].sum())
    rows, chosen = np.arange(4), allocate(omega, costs, budget)
    assert omega[rows, chosen].sum() == pytest.approx(brute_force(omega, costs, budget), rel=1e-9)
    assert costs[rows, chosen].sum() <= budget
    for i in np.flatnonzero(chosen < 2):  # what is left buys no further group: the budget is tight
        raised = costs[rows, chosen].sum() - costs[i, chosen[i]] + costs[i, chosen[i] + 1]
        assert raised > budget


def test_a_budget_below_every_choice_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no allocation"):
        allocate(np.ones((2, 2)), np.full((2, 2), 3.0), budget=5.0)


def test_candidates_surround_the_uniform_number() -> None:
    assert group_counts(IgqStep(bits=4, groups=8)) == (8,)
    assert group_counts(IgqStep(bits=4, groups=8, allocation="ilp")) == (2, 4, 6, 8, 10, 12, 16)
    assert group_counts(IgqStep(bits=4, groups=12, allocation="ilp")) == (3, 6, 9, 12, 15, 18, 24)
    assert group_counts(IgqStep(bits=4, groups=1, allocation="ilp")) == (1, 2)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "swin"])
def test_every_operand_but_the_image_is_quantized(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    images = pictures(model)
    expected = model.logits(images.pixels)
    step = IgqStep(bits=8, softmax_bits=6, groups=24)
    found = calibrate(model, images, step).quantizers
    assert set(found) == {operand.name for operand in model.operands if operand.kind != "image"}
    for operand in model.operands[1:]:
        quantizer = found[operand.name]
        assert isinstance(quantizer, GroupedQuantizer if operand.kind in AXES else UniformQuantizer)
        assert quantizer.bits == (6 if operand.kind == "probabilities" else 8)
    assert not list(attached(model.network))
    assert torch.equal(model.logits(images.pixels), expected)
    with quantized(model, found):
        error = model.logits(images.pixels) - expected
    assert 0 < float(error.norm() / expected.norm()) < 0.3


def test_bounds_are_of_images_and_of_heads(tmp_path: Path) -> None:
    model = load(tmp_path)
    images = pictures(model)
    ranges = collect(model, images.pixels)
    by_kind = {
        operand.kind: ranges[operand.name].shape for operand in model.operands if operand.name in ranges
    }
    assert by_kind["post_activation"] == (6 * 48, 2)  # a point for each channel of each image
    assert by_kind["probabilities"] == (6 * 4 * 17, 2)
    assert by_kind["key"] == (4, 1, 1, 2)
    assert by_kind["head_input"] == (2,)
    again = collect(model, images.pixels.flip(0))
    name = next(operand.name for operand in model.operands if operand.kind == "value")
    torch.testing.assert_close(again[name], ranges[name])


def test_calibration_is_deterministic(tmp_path: Path) -> None:
    model = load(tmp_path)
    images, step = pictures(model), IgqStep(bits=4, groups=3)
    first, second = calibrate(model, images, step), calibrate(model, images, step)
    for name, quantizer in first.quantizers.items():
        for key, value in quantizer.state_dict().items():
            assert torch.equal(value, second.quantizers[name].state_dict()[key])


def test_allocated_groups_are_never_worse_than_uniform_ones(tmp_path: Path) -> None:
    model = load(tmp_path)
    told: list[tuple[int, int]] = []
    plain = pictures(model)
    begun: list[tuple[str, int]] = []
    images = Images(
        plain.pixels,
        0,
        plain.weights,
        lambda done, total: told.append((done, total)),
        lambda what: begun.append((what, len(told))),
    )
    step = IgqStep(bits=4, groups=4, allocation="ilp")
    chosen = calibrate(model, images, step).quantizers
    uniform = calibrate(model, images, IgqStep(bits=4, groups=4)).quantizers
    names = [operand.name for operand in model.operands if operand.kind in AXES]
    total = {
        label: float(perturbations(model, plain, {name: {4: found[name]} for name in names}).sum())
        for label, found in (("ilp", chosen), ("uniform", uniform))
    }
    assert total["ilp"] <= total["uniform"]
    assert len({int(chosen[name].describe()["groups"]) for name in names}) > 1
    products = model_products(model)
    spent = count(products, chosen, weight_bits=4, bits=4).overhead
    allowed = count(products, uniform, weight_bits=4, bits=4).overhead
    assert 0 < spent <= allowed
    trials = len(names) * 7
    assert begun[:4] == [("ranges", 0), ("bounds", 1), ("grids", 1 + trials), ("perturbations", 2 + trials)]
    assert told[0] == told[1 + trials] == (6, 6)
    assert told[1 : 1 + trials] == [(i + 1, trials) for i in range(trials)]
    forwards = 6 * (1 + trials)  # of six images, in one batch
    assert told[2 + trials : 3 + 2 * trials] == [(6 * (i + 1), forwards) for i in range(1 + trials)]


def test_a_stated_budget_holds_and_more_of_it_perturbs_less(tmp_path: Path) -> None:
    model = load(tmp_path)
    images = pictures(model)
    names = [operand.name for operand in model.operands if operand.kind in AXES]
    products = model_products(model)
    spent, perturbed = [], []
    for share in (0.8, 1.2, 50):
        step = IgqStep(bits=4, groups=4, allocation="ilp", overhead_max=share)
        found = calibrate(model, images, step).quantizers
        operations = count(products, found, weight_bits=4, bits=4)
        assert operations.share <= share * (1 + 1e-6)
        spent.append(operations.share)
        trials = {name: {1: found[name]} for name in names}
        perturbed.append(float(perturbations(model, images, trials).sum()))
    assert spent == sorted(spent)
    assert perturbed == sorted(perturbed, reverse=True)


def test_a_budget_that_no_assignment_meets_is_refused_before_anything_is_fitted(tmp_path: Path) -> None:
    model = load(tmp_path)
    begun: list[str] = []
    plain = pictures(model)
    images = Images(plain.pixels, 0, plain.weights, begin=begun.append)
    step = IgqStep(bits=4, groups=8, allocation="ilp", overhead_max=0.001)
    with pytest.raises(RecipeError, match=r"igq\.overhead_max: 0\.10% .* 2 groups of every operand"):
        calibrate(model, images, step)
    assert not begun


def test_every_batch_of_a_pass_is_told(tmp_path: Path) -> None:
    model, told = load(tmp_path), list[tuple[int, int]]()
    images = pictures(model, 70)
    plain = collect(model, images.pixels)
    found = collect(model, images.pixels, lambda done, total: told.append((done, total)))
    assert told == [(32, 70), (64, 70), (70, 70)]
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_perturbations_vanish_without_quantization_and_shrink_with_groups(tmp_path: Path) -> None:
    model = load(tmp_path)
    images = pictures(model)
    steps = [IgqStep(bits=4, groups=groups) for groups in (1, 16)]
    few, many = (calibrate(model, images, step).quantizers for step in steps)
    names = [operand.name for operand in model.operands if operand.kind in AXES]
    omega = perturbations(model, images, {name: {1: few[name], 16: many[name]} for name in names})
    assert (omega >= 0).all()
    assert omega[:, 1].sum() < omega[:, 0].sum()


def test_the_upper_bound_has_a_grid_for_each_channel_and_row(tmp_path: Path) -> None:
    model = load(tmp_path)
    images = pictures(model)
    expected = model.logits(images.pixels)
    errors = []
    for find in (calibrate, upper_bound):
        with quantized(model, find(model, images, IgqStep(bits=6, groups=1)).quantizers):
            errors.append(float((model.logits(images.pixels) - expected).norm()))
    assert errors[1] < errors[0]


def test_calibration_needs_finite_images(tmp_path: Path) -> None:
    model = load(tmp_path)
    images, step = pictures(model), IgqStep(bits=4)
    none = Images(images.pixels[:0], 0, images.weights)
    with pytest.raises(CalibrationError, match="at least one calibration image"):
        calibrate(model, none, step)
    images.pixels[2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        calibrate(model, images, step)
