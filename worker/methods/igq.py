"""IGQ-ViT: a few grids per operand, which every image deals its channels and softmax rows out to.

Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024, arXiv:2404.00928.
Bounds minimise the squared distance to the ranges seen in calibration, by alternating assignments and means; the grids
of the groups are the bounds, as published, or reach further.
The number of grids is the same everywhere, or chosen for each operand by integer programming within a budget of
bit operations: those of the same number everywhere, or what the user states. Q, K and V get one static grid a
head; the head's input, a single token, one in all. In Swin's attention a window is grouped as an image is elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.grouped import ChannelQuantizer, GroupedQuantizer, extent
from quantry.recipe import IgqStep
from quantry.vision_products import group_counts, shortfall
from worker.errors import CalibrationError, NonFiniteError, RecipeError
from worker.methods.activations import (
    Calibrated,
    Images,
    Tell,
    logits,
    observe,
    part_of,
    quantized,
    silent,
)
from worker.methods.bops import AXES, model_products
from worker.methods.igq_bounds import fit_bounds, widen
from worker.models.vision import Operand, VisionModel

Candidates = Mapping[int, GroupedQuantizer]  # one operand's quantizers by number of groups


@torch.no_grad()
def calibrate(model: VisionModel, images: Images, step: IgqStep) -> Calibrated:
    """Quantizers for every operand but the image. Nothing is random.

    Raises: CalibrationError without images, RecipeError for a budget that the fewest groups exceed, NonFiniteError
    for NaN or infinity.
    """
    budget = budget_of(model, images, step) if step.allocation == "ilp" else None
    images.begin("ranges")
    ranges = collect(model, images.pixels, images.tell)
    static = {o.name: _static(ranges[o.name], step) for o in model.operands if o.kind not in (*AXES, "image")}
    images.begin("bounds")
    grouped = _candidates(model, ranges, step, images.tell)
    if step.bounds == "widened":
        images.begin("grids")
        grouped = _widened(model, images, grouped, ranges)
    groups = dict.fromkeys(grouped, step.groups)
    if budget is not None:
        groups = _allocated(model, images, grouped, budget)
    return Calibrated(static | {name: grouped[name][groups[name]] for name in grouped})


@torch.no_grad()
def upper_bound(model: VisionModel, images: Images, step: IgqStep) -> Calibrated:
    """What more groups approach: a grid for each channel and row of an image, found when it runs. To compare."""
    plain = {"groups": 1, "bounds": "mean", "allocation": "uniform", "overhead_max": None}
    quantizers = calibrate(model, images, step.model_copy(update=plain)).quantizers
    for operand in model.operands:
        if operand.kind in AXES:
            bits = quantizers[operand.name].bits
            per_row = AXES[operand.kind] == "rows"
            quantizers[operand.name] = TokenQuantizer(bits) if per_row else ChannelQuantizer(bits)
    return Calibrated(quantizers)


def collect(model: VisionModel, pixels: Tensor, tell: Tell = silent) -> dict[str, Tensor]:
    """The ranges that one float forward shows, (min, max) along the last dimension, float32, by operand.

    Grouped operands: (points, 2), a point for each channel or row of each image. Q, K, V: (heads, 1, 1, 2)
    over all images. The head's input: (2).
    """
    if not len(pixels):
        raise CalibrationError("IGQ needs at least one calibration image: give more samples")
    operands = [operand for operand in model.operands if operand.kind != "image"]
    seen: dict[str, list[Tensor]] = {operand.name: [] for operand in operands}

    def see(operand: Operand, x: Tensor) -> None:
        found = _ranges(x, operand)
        if not torch.isfinite(found).all():
            raise NonFiniteError(f"{operand.name} holds NaN or infinity for a calibration image")
        seen[operand.name].append(found)

    observe(model, pixels, {operand.name: partial(see, operand) for operand in operands}, tell)
    return {o.name: _joined(seen[o.name], grouped=o.kind in AXES) for o in operands}


def _ranges(x: Tensor, operand: Operand) -> Tensor:
    if operand.kind in AXES:
        return torch.stack(extent(x, AXES[operand.kind]), -1).flatten(0, -2)
    if operand.kind == "head_input":
        return torch.stack(x.float().aminmax())
    dims = (0, 2, 3)  # all but the heads
    return torch.stack((x.float().amin(dims), x.float().amax(dims)), -1)[:, None, None]


def _joined(ranges: list[Tensor], *, grouped: bool) -> Tensor:
    """One tensor of the batches': points side by side, or the range that holds them all."""
    if grouped:
        return torch.cat(ranges)
    low, high = torch.stack(ranges).unbind(-1)
    return torch.stack((low.amin(0), high.amax(0)), -1)


def _static(extremes: Tensor, step: IgqStep) -> ActivationQuantizer:
    low, high = extremes.unbind(-1)
    return UniformQuantizer.covering(low, high, step.bits)


def _candidates(
    model: VisionModel, ranges: Mapping[str, Tensor], step: IgqStep, tell: Tell
) -> dict[str, Candidates]:
    """The quantizers of every operand that is grouped, a few numbers of groups each."""
    operands, counts = [o for o in model.operands if o.kind in AXES], group_counts(step)
    grouped: dict[str, dict[int, GroupedQuantizer]] = {operand.name: {} for operand in operands}
    for done, (operand, groups) in enumerate(itertools.product(operands, counts), 1):
        grouped[operand.name][groups] = _grouped(operand, ranges[operand.name], groups, step)
        tell(done, len(operands) * len(counts))
    return dict(grouped)


def _grouped(operand: Operand, points: Tensor, groups: int, step: IgqStep) -> GroupedQuantizer:
    bits = step.softmax_bits or step.bits if operand.kind == "probabilities" else step.bits
    bounds, _ = fit_bounds(points, groups, step.iterations)
    quantizer = GroupedQuantizer(bits, groups, AXES[operand.kind]).to(points.device)
    return quantizer.fill(low=bounds[:, 0], high=bounds[:, 1])


def _widened(
    model: VisionModel, images: Images, grouped: Mapping[str, Candidates], ranges: Mapping[str, Tensor]
) -> dict[str, Candidates]:
    fitted = {name: tuple(counts.values()) for name, counts in grouped.items()}
    found = widen(model, images.pixels, fitted, ranges, images.tell)
    return {name: dict(zip(counts, found[name], strict=True)) for name, counts in grouped.items()}


@dataclass(frozen=True)
class Budget:
    """limit: bit operations that finding grids may take in an image. costs: by operand, for each of `group_counts`."""

    limit: float
    costs: Mapping[str, tuple[int, ...]]


def budget_of(model: VisionModel, images: Images, step: IgqStep) -> Budget:
    """What groups cost in an image of the size given, and what they may. Raises RecipeError if that is too little."""
    counts = group_counts(step)
    products = model_products(model, tuple(images.pixels.shape[1:]))
    costs = {
        p.operand: tuple(
            p.overhead({p.operand: GroupedQuantizer(step.bits, groups, AXES[p.kind])}) for groups in counts
        )
        for p in products
        if p.kind in AXES
    }
    if step.overhead_max is None:
        column = counts.index(step.groups)
        return Budget(float(sum(cost[column] for cost in costs.values())), costs)
    softmax_bits = step.softmax_bits or step.bits
    base = sum(p.operations(images.weights.bits, step.bits, softmax_bits) for p in products)
    least = sum(cost[0] for cost in costs.values())
    reason = shortfall(step, least / base)
    if reason:
        raise RecipeError(f"igq.overhead_max: {reason}")
    return Budget(step.overhead_max * base, costs)


def _allocated(
    model: VisionModel, images: Images, grouped: Mapping[str, Candidates], budget: Budget
) -> dict[str, int]:
    """Groups by operand: the least summed perturbation within the budget."""
    counts = list(next(iter(grouped.values())))
    costs = np.array([budget.costs[name] for name in grouped], dtype=np.float64)
    columns = allocate(perturbations(model, images, grouped), costs, budget.limit)
    return {name: counts[column] for name, column in zip(grouped, columns, strict=True)}


def perturbations(
    model: VisionModel, images: Images, grouped: Mapping[str, Candidates]
) -> npt.NDArray[np.float64]:
    """Omega (operands, candidates): mean KL of the predictions with one operand quantized from the float ones."""
    trials = [(name, quantizer) for name, counts in grouped.items() for quantizer in counts.values()]
    forwards = (1 + len(trials)) * len(images.pixels)  # of one image each
    images.begin("perturbations")
    expected = logits(model, images.pixels, part_of(images.tell, 0, forwards)).double().log_softmax(-1)
    omega: list[float] = []
    for name, quantizer in trials:
        done = (1 + len(omega)) * len(images.pixels)
        with quantized(model, {name: quantizer}):
            found = logits(model, images.pixels, part_of(images.tell, done, forwards))
        found = found.double().log_softmax(-1)
        omega.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    return np.array(omega).reshape(len(grouped), -1)


def allocate(
    omega: npt.NDArray[np.float64], costs: npt.NDArray[np.float64], budget: float
) -> npt.NDArray[np.intp]:
    """The candidate of each operand, (operands): min sum of omega, sum of costs <= budget (to a millionth).

    omega, costs: (operands, candidates). Raises: CalibrationError if the budget allows no choice.
    """
    operands, candidates = omega.shape
    unit = 1e4 / max(float(np.abs(omega).max()), 1e-300)  # the solver stops within 1e-6 of the least sum
    one_each = LinearConstraint(np.kron(np.eye(operands), np.ones(candidates)), 1, 1)
    affordable = LinearConstraint((costs / budget).reshape(1, -1), -np.inf, 1)
    solved = milp(
        (omega * unit).ravel(),
        integrality=np.ones(omega.size),
        bounds=Bounds(0, 1),
        constraints=[one_each, affordable],
        options={"mip_rel_gap": 0},
    )
    if solved.x is None:
        raise CalibrationError(f"no allocation of groups fits the bit operations: {solved.message}")
    chosen: npt.NDArray[np.intp] = solved.x.reshape(omega.shape).argmax(1)
    return chosen
