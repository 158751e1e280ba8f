"""IGQ-ViT's bounds: where the groups of an operand lie, and how far the grid of each reaches.

The published bounds are means of the ranges in a group, so half of its channels reach beyond them, and are clipped
whatever the bits. Widened, they still deal the channels out, and a grid of its own for each group ends between them and
the outermost range that was dealt to it, where the squared error of the calibration images is least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from quantry.quantizers.grouped import GroupedQuantizer
from worker.methods.activations import Tell, observe
from worker.models.vision import VisionModel

SHARES = (0, 0.25, 0.5, 0.75, 1)  # of the way from the means to the extremes


def fit_bounds(points: Tensor, groups: int, iterations: int) -> tuple[Tensor, list[float]]:
    """Minimise sum_p min_i |p - (l_i, u_i)|^2 by alternating assignments (E) and means (M).

    Starts from equal parts of the points in order of their widths; ends early when no assignment changes.

    Args:
        points: (P, 2), the (min, max) of channels; of softmax rows, (0, max).
    Returns: the bounds (l, u), (groups, 2) float64, and the objective after each E-step, which never rises.
    """
    points = points.double()
    order = (points[:, 1] - points[:, 0]).argsort(stable=True)
    group = torch.empty_like(order)
    group[order] = torch.arange(len(points), device=points.device) * groups // len(points)
    objective: list[float] = []
    for _ in range(iterations):
        bounds = _means(points, group, groups)
        distance = (points[:, :1] - bounds[:, 0]).square_() + (points[:, 1:] - bounds[:, 1]).square_()
        nearest = distance.min(1)
        objective.append(float(nearest.values.sum()))
        if torch.equal(nearest.indices, group):
            break
        group = nearest.indices
    return bounds, objective


def _means(points: Tensor, group: Tensor, groups: int) -> Tensor:
    """The mean of each group's points; an empty group takes a point that lies farthest from its mean."""
    member = torch.nn.functional.one_hot(group, groups).T.double()
    size = member.sum(1, keepdim=True)
    means = (member @ points) / size.clamp(min=1)
    empty = (size.squeeze(1) == 0).nonzero().squeeze(1)
    if len(empty):
        distance = (points - means[group]).square().sum(1)
        farthest = distance.argsort(descending=True, stable=True)
        means[empty] = points[farthest[torch.arange(len(empty), device=points.device) % len(points)]]
    return means


def widen(
    model: VisionModel,
    pixels: Tensor,
    fitted: Mapping[str, Sequence[GroupedQuantizer]],
    ranges: Mapping[str, Tensor],
    tell: Tell,
) -> dict[str, list[GroupedQuantizer]]:
    """The quantizers of each operand with the grids of least squared error, found in one float forward.

    Which channel is in which group does not change, so each group has its own least error: it is never above that
    of the means.

    Args:
        fitted: with the bounds of `fit_bounds`. ranges: the points that they were fitted to, (P, 2), by operand.
    """
    trials = {name: [_trials(q, ranges[name]) for q in given] for name, given in fitted.items()}
    errors = {name: [_zeros(tried) for tried in lists] for name, lists in trials.items()}

    def see(name: str, x: Tensor) -> None:
        for tried, error in zip(trials[name], errors[name], strict=True):
            for row, quantizer in zip(error, tried, strict=True):
                row += group_errors(quantizer, x)

    observe(model, pixels, {name: partial(see, name) for name in fitted}, tell)
    return {
        name: [_best(tried, error) for tried, error in zip(trials[name], errors[name], strict=True)]
        for name in fitted
    }


def group_errors(quantizer: GroupedQuantizer, x: Tensor) -> Tensor:
    """Squared error of x by the group that it is counted in: (groups,) float64."""
    group = quantizer.assign(x)
    summed = -1 if quantizer.axis == "rows" else tuple(range(1, x.dim() - 1))
    error = (quantizer(x) - x).square_().sum(summed, keepdim=True, dtype=torch.float64)
    return torch.zeros(quantizer.groups, dtype=torch.float64, device=x.device).index_add_(
        0, group.flatten(), error.flatten()
    )


def _trials(fitted: GroupedQuantizer, points: Tensor) -> list[GroupedQuantizer]:
    """`fitted` with the grids that each of SHARES gives."""
    least, most = _extremes(fitted, points)
    return [
        GroupedQuantizer(fitted.bits, fitted.groups, fitted.axis, widened=True)
        .to(points.device)
        .fill(
            low=fitted.low,
            high=fitted.high,
            grid_low=fitted.low.lerp(least, share),
            grid_high=fitted.high.lerp(most, share),
        )
        for share in SHARES
    ]


def _extremes(fitted: GroupedQuantizer, points: Tensor) -> tuple[Tensor, Tensor]:
    """The outermost (min, max) dealt to each group, and its bounds where they lie further out: (groups,) each."""
    low, high = points.float().unbind(1)
    group = fitted.nearest(low, high)
    least = fitted.low.clone().scatter_reduce_(0, group, low, "amin")
    most = fitted.high.clone().scatter_reduce_(0, group, high, "amax")
    return least, most


def _zeros(tried: Sequence[GroupedQuantizer]) -> Tensor:
    return torch.zeros(len(tried), tried[0].groups, dtype=torch.float64, device=tried[0].low.device)


def _best(tried: Sequence[GroupedQuantizer], errors: Tensor) -> GroupedQuantizer:
    """The quantizer whose groups each have the grid of least error; `errors`: (trials, groups)."""
    chosen = errors.argmin(0, keepdim=True)
    lows = torch.stack([quantizer.grid_low for quantizer in tried])
    highs = torch.stack([quantizer.grid_high for quantizer in tried])
    return tried[0].fill(grid_low=lows.gather(0, chosen)[0], grid_high=highs.gather(0, chosen)[0])
