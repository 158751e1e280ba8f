"""IGQ-ViT's bounds: the fit of the means, and grids that reach further."""

from __future__ import annotations

import itertools
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from quantry.quantizers.grouped import GroupedQuantizer
from quantry.recipe import IgqStep, RtnStep
from worker.methods.activations import Images, observe
from worker.methods.bops import AXES
from worker.methods.igq import calibrate, collect
from worker.methods.igq_bounds import fit_bounds, group_errors
from worker.models.vision import VisionModel


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_the_objective_never_rises_and_ends_at_means(groups: int, seed: int) -> None:
    high = torch.randn(400, generator=draws(seed)).exp()
    points = torch.stack((-high * torch.rand(400, generator=draws(seed + 9)), high), 1)
    bounds, objective = fit_bounds(points, groups, 200)
    assert all(after <= before for before, after in itertools.pairwise(objective))
    nearest = torch.cdist(points.double(), bounds).argmin(1)
    means = torch.stack([points[nearest == i].double().mean(0) for i in range(groups)])
    torch.testing.assert_close(bounds, means)


def test_separated_clusters_are_found_exactly() -> None:
    centres = torch.tensor([[-1.0, 1.0], [0.0, 9.0], [-30.0, 2.0], [-2.0, 60.0]])
    points = centres.repeat_interleave(torch.tensor([20, 3, 50, 7]), dim=0)
    shuffled = points[torch.randperm(len(points), generator=draws())]
    bounds, objective = fit_bounds(shuffled, 4, 30)
    assert objective[-1] == 0
    found, wanted = sorted(bounds.tolist()), sorted(centres.tolist())
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


def test_an_empty_group_takes_a_far_point() -> None:
    points = torch.tensor([[0.0, 1.0]]).repeat(60, 1)  # the first parts all have the same mean
    points[-2:] = torch.tensor([[0.0, 5.0], [-4.0, 5.0]])
    bounds, objective = fit_bounds(points, 6, 30)
    assert objective[-1] == pytest.approx(0, abs=1e-12)
    assert {(0.0, 1.0), (0.0, 5.0), (-4.0, 5.0)} == {tuple(bound) for bound in bounds.tolist()}


def test_more_groups_than_points_is_no_error() -> None:
    bounds, objective = fit_bounds(torch.tensor([[-1.0, 1.0], [0.0, 3.0]]), 5, 10)
    assert bounds.isfinite().all()
    assert objective[-1] == 0


def load(folder: Path, name: str = "vit") -> VisionModel:
    return VisionModel(factories.write_classifier(folder, name), device=torch.device("cpu"))


def pictures(model: VisionModel, count: int = 6) -> Images:
    return Images(torch.randn(count, *model.image_shape, generator=draws(7)), 0, RtnStep(bits=4))


def grouped(model: VisionModel, images: Images, step: IgqStep) -> dict[str, GroupedQuantizer]:
    found = calibrate(model, images, step).quantizers
    return {name: q for name, q in found.items() if isinstance(q, GroupedQuantizer)}


def errors(model: VisionModel, pixels: Tensor, quantizers: dict[str, GroupedQuantizer]) -> dict[str, float]:
    """Squared error of each operand, over all images."""
    found = dict.fromkeys(quantizers, 0.0)

    def watch(name: str, x: Tensor) -> None:
        found[name] += float((quantizers[name](x) - x).square().sum(dtype=torch.float64))

    observe(model, pixels, {name: lambda x, name=name: watch(name, x) for name in quantizers})
    return found


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_widened_grids_err_no_more_than_means_and_deal_alike(name: str, bits: int, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    images = pictures(model, 40)
    means = grouped(model, images, IgqStep(bits=bits, groups=3, bounds="mean"))
    wide = grouped(model, images, IgqStep(bits=bits, groups=3))
    before, after = (errors(model, images.pixels, found) for found in (means, wide))
    for operand in before:
        assert torch.equal(wide[operand].low, means[operand].low)
        assert torch.equal(wide[operand].high, means[operand].high)
        assert (wide[operand].grid_low <= means[operand].low).all()
        assert (wide[operand].grid_high >= means[operand].high).all()
        assert after[operand] <= before[operand] * (1 + 1e-6)
    if bits == 8:  # clipping is nearly all of the error there
        assert sum(after.values()) < 0.1 * sum(before.values())


def test_every_group_has_the_grid_of_least_error(tmp_path: Path) -> None:
    model = load(tmp_path)
    images = pictures(model)
    step = IgqStep(bits=4, groups=3)
    ranges = collect(model, images.pixels)
    wide = grouped(model, images, step)
    seen: dict[str, Tensor] = {}
    observe(model, images.pixels, {name: lambda x, name=name: seen.update({name: x}) for name in wide})
    for name, quantizer in wide.items():
        low, high = ranges[name].unbind(1)
        dealt = quantizer.nearest(low, high)
        least = group_errors(quantizer, seen[name])
        for group, share in itertools.product(range(3), (0, 0.25, 0.5, 0.75, 1)):
            if not (dealt == group).any():
                continue
            other = GroupedQuantizer(4, 3, quantizer.axis, widened=True)
            other.load_state_dict(quantizer.state_dict())
            ends = torch.minimum(low[dealt == group].amin(), quantizer.low[group])
            other.grid_low[group] = quantizer.low[group].lerp(ends, share)
            ends = torch.maximum(high[dealt == group].amax(), quantizer.high[group])
            other.grid_high[group] = quantizer.high[group].lerp(ends, share)
            assert least[group] <= group_errors(other, seen[name])[group] * (1 + 1e-6)


def test_means_are_the_grids_that_were_published(tmp_path: Path) -> None:
    model = load(tmp_path)
    images = pictures(model)
    ranges = collect(model, images.pixels)
    for operand in model.operands:
        if operand.kind not in AXES:
            continue
        found = grouped(model, images, IgqStep(bits=4, groups=3, bounds="mean"))[operand.name]
        bounds, _ = fit_bounds(ranges[operand.name], 3, 30)
        plain = GroupedQuantizer(4, 3, AXES[operand.kind]).fill(low=bounds[:, 0], high=bounds[:, 1])
        assert not found.widened
        for name, value in plain.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)


def test_errors_are_counted_by_group() -> None:
    x = torch.randn(3, 11, 24, generator=draws()) * torch.randn(24, generator=draws(1)).exp()
    quantizer = GroupedQuantizer(3, 2, "channels")
    quantizer.fill(low=torch.tensor([-1.0, -4.0]), high=torch.tensor([1.0, 4.0]))
    error, mine = (quantizer(x) - x).square(), quantizer.assign(x).expand(x.shape)
    by_hand = torch.stack([error[mine == group].double().sum() for group in range(2)])
    torch.testing.assert_close(group_errors(quantizer, x), by_hand, rtol=1e-5, atol=0)
