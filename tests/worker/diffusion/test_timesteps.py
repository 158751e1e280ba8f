"""Where calibration latents come from, and what happens when memory runs out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.diffusion.memory import halving
from worker.diffusion.timesteps import TimestepSampler, allocate, choose
from worker.diffusion.trajectory import Latents
from worker.errors import OutOfMemory


def no_features() -> Tensor:
    raise AssertionError("only density looks at features")


@pytest.mark.parametrize("sampler", ["uniform", "normal", "density"])
@pytest.mark.parametrize(("steps", "total"), [(10, 100), (7, 50), (5, 3)])
def test_every_step_gets_a_latent_and_all_are_dealt_out(
    sampler: TimestepSampler, steps: int, total: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = allocate(sampler, steps, total, lambda: torch.randn(steps, 6, generator=generator))
    assert len(counts) == steps
    assert min(counts) >= 1
    assert sum(counts) == max(steps, total)


def test_uniform_deals_evenly() -> None:
    assert allocate("uniform", 5, 20, no_features) == [4] * 5


def test_normal_peaks_at_two_fifths_of_the_way_to_the_noise() -> None:
    counts = allocate("normal", 100, 10_000, no_features)
    assert counts[59] == max(counts)  # t = 40, counted from the noise
    assert counts[99] / counts[59] == pytest.approx(0.6065, rel=0.02)  # one standard deviation away


def test_density_prefers_steps_that_many_others_resemble() -> None:
    features = torch.zeros(10, 4)
    features[:, 0] = 1.0
    features[:3] = torch.tensor([[0.0, 40, 0, 0], [0, 0, 40, 0], [0, 0, 0, 40]])
    counts = allocate("density", 10, 200, lambda: features)
    crowd, lonely = counts[3:], counts[:3]
    assert len(set(crowd)) <= 2  # they differ by rounding alone
    assert min(crowd) != min(lonely)


def test_steps_take_different_samples() -> None:
    latents = [Latents(index, torch.arange(6.0)[:, None] + 10 * index, tuple(range(6))) for index in range(3)]
    chosen = choose([*latents, Latents(3, torch.zeros(6, 1))], [2, 3, 6])
    assert [(index, [int(v) for v in x.flatten()], list(seeds)) for index, x, seeds in chosen] == [
        (0, [0, 1], [0, 1]),
        (1, [13, 14, 15], [3, 4, 5]),
        (2, [20, 21, 22, 23, 24, 25], [0, 1, 2, 3, 4, 5]),
    ]


def fits(limit: int, seen: list[int]) -> object:
    def work(batch: int) -> int:
        seen.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    return work


@pytest.mark.parametrize(("limit", "tried"), [(8, [8]), (4, [8, 4])])
def test_what_does_not_fit_is_tried_once_at_half(limit: int, tried: list[int]) -> None:
    seen: list[int] = []
    warnings: list[str] = []
    assert halving(fits(limit, seen), 8, "calibration", warnings.append) == tried[-1]  # type: ignore[arg-type]
    assert seen == tried
    assert len(warnings) == len(tried) - 1


@pytest.mark.parametrize(("batch", "tried"), [(8, [8, 4]), (1, [1])])
def test_then_the_job_ends_with_a_typed_error(batch: int, tried: list[int]) -> None:
    seen: list[int] = []
    with pytest.raises(OutOfMemory, match=r"accuquant\.batch"):
        halving(fits(0, seen), batch, "accuquant.batch", lambda text: None)  # type: ignore[arg-type]
    assert seen == tried
