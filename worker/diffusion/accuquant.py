"""AccuQuant: fit activation step sizes to the latent that several denoising steps arrive at.

Lee et al., "AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models", 2025, arXiv:2510.20348.
The steps are cut into groups of M; from a full-precision latent the quantized network runs a group, and
L = ||x~ - x||^2 / |x| is compared at its end. Only one step's activations are alive at a time.
`gradient="accuquant"` is the paper's: dL/dx~ at the end of the group stands for that at the end of every step
(identity Jacobian). `"exact"` carries it back through every step, recomputing each from its stored latent.
What the paper does not say (which parameters, their sharing, the schedule) is chosen here: the step sizes of
activations, a set for each group, Adam on their logarithms with cosine decay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from worker.diffusion.quantizers import StepNetwork, StepQuantizer, trainable
from worker.diffusion.steps import Denoiser, Step
from worker.diffusion.trajectory import SeededNoise, bound
from worker.errors import NonFiniteError, RecipeError

Gradient = Literal["accuquant", "exact"]
TINY = 1e-30  # a loss below is none


@dataclass(frozen=True)
class AccuQuant:
    """Settings.

    group: M, steps simulated together; 1 calibrates every step by itself. per_group: a set of step sizes for each
    group, or one for all. start: groups start from full-precision latents (`fp`), or from those that the groups
    before, already calibrated, arrive at (`progressive`). iterations: for each group. batch: samples of an
    iteration. learning_rate: of log step size, so relative; falls to 0 along a cosine. seed: of the batches.
    """

    group: int
    gradient: Gradient = "accuquant"
    per_group: bool = True
    start: Literal["fp", "progressive"] = "fp"
    iterations: int = 500
    batch: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class GroupResult:
    """L over all calibration samples at the initial and at the trained step sizes. first, last: steps [first, last).

    seconds: of wall time; of one for all groups where they share step sizes.
    """

    first: int
    last: int
    loss_before: float
    loss_after: float
    seconds: float = 0.0


class Pieces(Protocol):
    """Tables of log step sizes by layer, as they are once group `number` is done."""

    def load(self, number: int) -> tuple[dict[str, Tensor], list[GroupResult]] | None: ...

    def save(self, number: int, tables: dict[str, Tensor], results: list[GroupResult]) -> None: ...


@dataclass(frozen=True)
class Group:
    """Consecutive steps, and the latents of all samples before them and, in full precision, after them."""

    steps: range
    start: Tensor
    target: Tensor


def group_steps(count: int, group: int) -> list[range]:
    """The steps of each group: `group` consecutive ones, fewer in the last. Raises RecipeError."""
    if not 1 <= group <= count:
        raise RecipeError(f"accuquant.group: {group} steps simulated together, of {count}; use 1 to {count}")
    return [range(first, min(first + group, count)) for first in range(0, count, group)]


@torch.no_grad()
def roll(
    denoiser: Denoiser, steps: Sequence[Step], indices: range, start: Tensor, noise: SeededNoise
) -> list[Tensor]:
    """The latents from `start` (batch, C, H, W) on, before each step of `indices` and after the last."""
    latents = [start]
    denoiser = bound(denoiser, noise)
    for index in indices:
        x = latents[-1]
        latents.append(steps[index].advance(x, denoiser(x, index), noise.at(steps[index], index)))
    return latents


def backward(
    denoiser: Denoiser,
    steps: Sequence[Step],
    indices: range,
    start: Tensor,
    target: Tensor,
    noise: SeededNoise,
    *,
    gradient: Gradient,
    weight: float = 1.0,
) -> float:
    """Add the gradient of weight * L to every parameter that asks for one; returns L, the mean over the batch.

    Args:
        indices: the steps of the group. start: latents before it, (batch, C, H, W).
        target: full-precision latents after it. noise: of the same samples.
    """
    latents = roll(denoiser, steps, indices, start, noise)
    error = latents.pop() - target
    v = 2 * weight / error.numel() * error
    exact = gradient == "exact"
    denoiser = bound(denoiser, noise)
    for index in reversed(indices):
        x = latents.pop().detach().requires_grad_(exact and index != indices[0])
        moved = steps[index].advance(x, denoiser(x, index), noise.at(steps[index], index))
        moved.backward(v)  # type: ignore[no-untyped-call]
        if x.grad is not None:
            v = x.grad
    return float(error.double().square().mean())


def calibrate(
    network: StepNetwork,
    bounds: Tensor,
    noise: SeededNoise,
    options: AccuQuant,
    tell: Callable[[int, int], None] = lambda done, total: None,
    pieces: Pieces | None = None,
) -> list[GroupResult]:
    """Train the step sizes of the network's quantizers in place, group after group; see `train`.

    Args:
        network: with its quantizers attached: `options.group` steps a row, or all in one unless `per_group`.
        bounds: full-precision latents at the boundaries of the groups, from `trajectory.boundaries`:
            (groups + 1, samples, C, H, W).
        noise: that `bounds` were sampled from. tell: hears (done, total) after each iteration.
        pieces: where finished groups are kept; those that are there already are not trained again.
    Raises: RecipeError for settings that contradict each other, NonFiniteError.
    """
    ranges = group_steps(len(network.steps), options.group)
    progressive = options.start == "progressive"
    if progressive and not options.per_group:
        raise RecipeError("accuquant.start: `progressive` needs step sizes for each group; set per_group")
    assert len(bounds) == len(ranges) + 1, "bounds are not those of these groups"
    groups = [Group(r, bounds[g], bounds[g + 1]) for g, r in enumerate(ranges)]
    total = len(groups) * options.iterations
    shared = [groups] if not options.per_group else [[group] for group in groups]
    results: list[GroupResult] = []
    reached = bounds[0]
    for number, members in enumerate(shared):
        if progressive:
            members = [replace(members[0], start=reached)]
        before = number * options.iterations
        kept = pieces.load(number) if pieces is not None else None
        if kept is not None:
            found = _restore(network, *kept)
            tell(before + len(members) * options.iterations, total)
        else:
            found = train(network, members, noise, options, lambda done, n=before: tell(n + done, total))  # type: ignore[misc]
            if pieces is not None:
                pieces.save(number, _tables(network), found)
        results += found
        if progressive:
            reached = _arrive(network, members[0], noise, options.batch)
    return results


def _tables(network: StepNetwork) -> dict[str, Tensor]:
    return {name: q.log_scale.detach().clone() for name, q in _learned(network).items()}


def _restore(
    network: StepNetwork, tables: dict[str, Tensor], results: list[GroupResult]
) -> list[GroupResult]:
    for name, quantizer in _learned(network).items():
        quantizer.log_scale.data.copy_(tables[name])
    return results


def _learned(network: StepNetwork) -> dict[str, StepQuantizer]:
    return {n: q for n, q in network.quantizers.items() if isinstance(q, StepQuantizer) and q.learned}


def train(
    network: StepNetwork,
    groups: Sequence[Group],
    noise: SeededNoise,
    options: AccuQuant,
    tell: Callable[[int], None] = lambda done: None,
) -> list[GroupResult]:
    """Train the step sizes that these groups use, on batches of one group at a time.

    Each group's L counts in units of its value before. Where that does not get less, summed over the groups,
    the step sizes are left as they were. Groups with step sizes of their own and full-precision starts know
    nothing of each other: trained one at a time, any order gives the same. tell: hears the iterations done.
    Raises: NonFiniteError.
    """
    began = time.perf_counter()
    quantizers = list(_learned(network).values())
    before = [_loss(network, group, noise, options.batch) for group in groups]
    if not all(map(math.isfinite, before)):
        raise NonFiniteError(f"steps from {groups[0].steps[0]} on: quantized latents hold NaN or infinity")
    kept = [q.log_scale.detach().clone() for q in quantizers]
    chance = torch.Generator().manual_seed((options.seed << 20) + groups[0].steps[0])
    iterations = options.iterations * len(groups)
    with trainable(quantizers) as parameters:
        optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations))
        for done in range(iterations):
            g = int(torch.randint(len(groups), (), generator=chance))
            samples = torch.randperm(len(noise.seeds), generator=chance)[: options.batch]
            optimizer.zero_grad()
            _backward_on(network, groups[g], samples, noise, options.gradient, 1 / max(before[g], TINY))
            optimizer.step()
            schedule.step()
            tell(done + 1)
    after = [_loss(network, group, noise, options.batch) for group in groups]
    if not sum(a / max(b, TINY) for a, b in zip(after, before, strict=True)) < len(groups):
        after = before
        for quantizer, value in zip(quantizers, kept, strict=True):
            quantizer.log_scale.data.copy_(value)
    spent = time.perf_counter() - began
    return [
        GroupResult(g.steps[0], g.steps[-1] + 1, b, a, spent)
        for g, b, a in zip(groups, before, after, strict=True)
    ]


def _backward_on(
    network: StepNetwork,
    group: Group,
    samples: Tensor,
    noise: SeededNoise,
    gradient: Gradient,
    weight: float,
) -> None:
    chosen = samples.to(group.start.device)
    backward(
        network,
        network.steps,
        group.steps,
        group.start[chosen],
        group.target[chosen],
        noise.of(samples.tolist()),
        gradient=gradient,
        weight=weight,
    )


def _loss(network: StepNetwork, group: Group, noise: SeededNoise, batch: int) -> float:
    """L over all samples of a group."""
    error = _arrive(network, group, noise, batch) - group.target
    return float(error.double().square().mean())


def _arrive(network: StepNetwork, group: Group, noise: SeededNoise, batch: int) -> Tensor:
    """Where the quantized network takes all samples of a group: (samples, C, H, W)."""
    parts = zip(torch.split(group.start, batch), noise.batches(batch), strict=True)
    return torch.cat([roll(network, network.steps, group.steps, x, z)[-1] for x, z in parts])
