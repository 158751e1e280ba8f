"""Which timesteps the calibration latents are taken from: one rule behind one call.

`uniform`: as Q-Diffusion (arXiv:2302.04304), evenly. `normal`: Shang et al., "PTQ4DM", 2023, arXiv:2211.15736, section
3.3: t ~ N(0.4 T, (0.4 T)^2), towards the image. `density`: Liu et al., "EDA-DM", 2024, arXiv:2401.04585: by how many
other steps look alike and how little they point the same way, of the features in the middle of the network.
Every step keeps one latent at least, since each may have grids of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.trajectory import Latents

TimestepSampler = Literal["uniform", "normal", "density"]
DIVERSITY = 1.2  # weight of diversity beside density
ALIKE = 0.1  # share of the mean squared distance between steps below which two of them are alike


def allocate(sampler: TimestepSampler, steps: int, total: int, features: Callable[[], Tensor]) -> list[int]:
    """How many of `total` latents come from each step, counted from the noise; each at least 1.

    features: (steps, width), one vector a step; asked for by `density` alone.
    """
    weights = _WEIGHTS[sampler](steps, features)
    wanted = weights / weights.sum() * max(0, total - steps)
    counts = wanted.floor()
    rest = max(0, total - steps) - int(counts.sum())
    counts[(wanted - counts).argsort(descending=True, stable=True)[:rest]] += 1
    return [int(count) + 1 for count in counts]


def _uniform(steps: int, features: Callable[[], Tensor]) -> Tensor:
    return torch.ones(steps, dtype=torch.float64)


def _normal(steps: int, features: Callable[[], Tensor]) -> Tensor:
    time = torch.arange(steps - 1, -1, -1, dtype=torch.float64)  # the first step has the largest t
    return torch.exp(-0.5 * ((time - 0.4 * steps) / (0.4 * steps)) ** 2)


def _density(steps: int, features: Callable[[], Tensor]) -> Tensor:
    found = features().double()
    assert len(found) == steps, "one feature vector for each step"
    distance = (found[:, None] - found[None]).square().mean(-1)
    density = (distance <= ALIKE * distance.mean()).double().sum(1)
    diversity = (1 - cosine_similarity(found[:, None], found[None], dim=-1)).sum(1)
    return _unit(density) + DIVERSITY * _unit(diversity) + 1e-3


def _unit(values: Tensor) -> Tensor:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.ones_like(values)


_WEIGHTS: dict[TimestepSampler, Callable[[int, Callable[[], Tensor]], Tensor]] = {
    "uniform": _uniform,
    "normal": _normal,
    "density": _density,
}


@torch.no_grad()
def middle_features(network: StepNetwork, middle: str, latents: Iterable[Latents]) -> Tensor:
    """The mean output of module `middle` at each step, over a batch: (steps, width), on the CPU."""
    found: list[Tensor] = []
    everything = list(latents)  # a trajectory runs the network too, which must not be seen

    def see(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        output = output[0] if isinstance(output, tuple) else output  # a block beside its skip connections
        found.append(output.float().mean(0).flatten().cpu())

    with network.unet.get_submodule(middle).register_forward_hook(see):
        for index, x, seeds in everything:
            if index < len(network.steps):
                network.of(seeds)(x, index)
    return torch.stack(found)


def choose(latents: Iterable[Latents], counts: Sequence[int]) -> list[Latents]:
    """`counts[index]` latents of each step, of other samples at each."""
    chosen = []
    for index, x, seeds in latents:
        if index < len(counts):
            count = min(counts[index], len(x))
            places = (torch.arange(count) + index * count) % len(x)
            kept = tuple(seeds[place] for place in places.tolist()) if seeds else ()
            chosen.append(Latents(index, x[places.to(x.device)].clone(), kept))
    return chosen
