"""Sampling from seeds, in full precision and quantized, and how far the two drift apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from worker.diffusion.steps import Denoiser, Step


@dataclass(frozen=True)
class SeededNoise:
    """The noise of one sample for each seed: the same in any batch, at any time, on any device.

    shape: (C, H, W) of a latent.
    """

    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    device: torch.device

    def start(self) -> Tensor:
        """The latents that sampling starts from: (seeds, C, H, W) float32."""
        return self._draw(0)

    def at(self, step: Step, index: int) -> Tensor | None:
        """What step `index` adds, (seeds, C, H, W) float32; None where it adds nothing."""
        return None if step.sigma == 0 else self._draw(index + 1)

    def of(self, samples: Sequence[int]) -> SeededNoise:
        """The noise of some of the samples, by position."""
        return SeededNoise(tuple(self.seeds[i] for i in samples), self.shape, self.device)

    def batches(self, size: int) -> Iterator[SeededNoise]:
        """The samples in their order, `size` at a time."""
        for first in range(0, len(self.seeds), size):
            yield SeededNoise(self.seeds[first : first + size], self.shape, self.device)

    def _draw(self, number: int) -> Tensor:
        draws = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed((seed << 16) + number)
            draws.append(torch.randn(self.shape, generator=generator))
        return torch.stack(draws).to(self.device)


class Latents(NamedTuple):
    """Latents x (samples, C, H, W) before step number `step`, and the seeds of their samples."""

    step: int
    x: Tensor
    seeds: tuple[int, ...] = ()


@runtime_checkable
class Conditioned(Protocol):
    """A denoiser whose prediction may depend on the sample."""

    def of(self, seeds: Sequence[int]) -> Denoiser: ...


def bound(denoiser: Denoiser, noise: SeededNoise) -> Denoiser:
    """The denoiser as it predicts for these samples."""
    return denoiser.of(noise.seeds) if isinstance(denoiser, Conditioned) else denoiser


@torch.no_grad()
def trajectory(denoiser: Denoiser, steps: Sequence[Step], noise: SeededNoise) -> Iterator[Latents]:
    """The latents before every step, and at last the samples, under the number `len(steps)`."""
    run = bound(denoiser, noise)
    x = noise.start()
    yield Latents(0, x, noise.seeds)
    for index, step in enumerate(steps):
        x = step.advance(x, run(x, index), noise.at(step, index))
        yield Latents(index + 1, x, noise.seeds)


def sample(denoiser: Denoiser, steps: Sequence[Step], noise: SeededNoise, *, batch: int = 64) -> Tensor:
    """The samples of all seeds: (seeds, C, H, W) float32."""
    found = []
    for part in noise.batches(batch):
        for latents in trajectory(denoiser, steps, part):
            last = latents.x
        found.append(last)
    return torch.cat(found)


def boundaries(
    denoiser: Denoiser, steps: Sequence[Step], noise: SeededNoise, *, group: int, batch: int = 64
) -> Tensor:
    """The latents before each group of `group` steps, and the samples: (groups + 1, seeds, C, H, W) float32."""
    kept = []
    for part in noise.batches(batch):
        run = trajectory(denoiser, steps, part)
        kept.append(torch.stack([at.x for at in run if at.step % group == 0 or at.step == len(steps)]))
    return torch.cat(kept, dim=1)


@dataclass(frozen=True)
class Curves:
    """Squared errors of the latent after each step, mean over its elements: (steps, seeds) float32.

    single: one quantized step from the full-precision latent. accumulated: every step quantized. final, reference: the
    samples (seeds, C, H, W), with every step quantized and in full precision.
    """

    single: Tensor
    accumulated: Tensor
    final: Tensor
    reference: Tensor


@torch.no_grad()
def error_curves(
    full: Denoiser,
    quantized: Denoiser,
    steps: Sequence[Step],
    noise: SeededNoise,
    *,
    quieter: Sequence[Step] = (),
    batch: int = 64,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Curves:
    """Both errors along the trajectories of all seeds. Use seeds that calibration has not seen.

    quieter: the steps of the quantized denoiser, where they are others. tell: hears (done, total) steps of batches.
    """
    single, accumulated = [], []
    final, reference = [], []
    total = len(steps) * -(-len(noise.seeds) // batch)
    for part in noise.batches(batch):
        x = drifted = part.start()
        f, q = bound(full, part), bound(quantized, part)
        for index, (step, ours) in enumerate(zip(steps, quieter or steps, strict=True)):
            z = part.at(step, index)
            once = ours.advance(x, q(x, index), z)
            drifted = ours.advance(drifted, q(drifted, index), z)
            x = step.advance(x, f(x, index), z)
            single.append(_squared(once - x))
            accumulated.append(_squared(drifted - x))
            tell(len(single), total)
        final.append(drifted)
        reference.append(x)
    return Curves(
        _by_step(single, len(steps)),
        _by_step(accumulated, len(steps)),
        torch.cat(final),
        torch.cat(reference),
    )


def _squared(error: Tensor) -> Tensor:
    return error.float().square().flatten(1).mean(1)


def _by_step(errors: list[Tensor], steps: int) -> Tensor:
    """Errors of all steps of each batch, in this order, as (steps, seeds)."""
    parts = [torch.stack(errors[i : i + steps]) for i in range(0, len(errors), steps)]
    return torch.cat(parts, dim=1)
