"""AdaRound, block by block: learn for each weight whether it is rounded down or up.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, arXiv:2004.10568; by blocks: Li et
al., "BRECQ", 2021, arXiv:2102.05426; over timesteps, with split shortcuts: Li et al., "Q-Diffusion", 2023,
arXiv:2302.04304, whose settings these are but for fewer iterations at a higher rate. A block is fed what the network
quantized so far feeds it; its target is what it puts out in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantry.quantizers.affine import quantize_to_grid
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.trajectory import Latents
from worker.diffusion.unet import UNetLayer
from worker.diffusion.weights import Clip, UNetWeight, fit_weight_grid, halves, set_weights
from worker.errors import CalibrationError
from worker.methods.grids import Grid
from worker.methods.rtn import on_grid

LOW, HIGH = -0.1, 1.1  # ends of the stretched sigmoid


@dataclass(frozen=True)
class AdaRound:
    """Settings. iterations: for each block, of `batch` latents. regularizer: weight of the term that drives every
    rounding to 0 or 1, absent for the first `warmup` of the iterations; beta: its exponent, first and last.
    """

    iterations: int = 500
    batch: int = 16
    learning_rate: float = 1e-2
    regularizer: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    clip: Clip = "mse"
    symmetric: bool = False
    seed: int = 0


class Pieces(Protocol):
    """Blocks that are done, by number."""

    def load(self, number: int) -> tuple[dict[str, UNetWeight], BlockResult] | None: ...

    def save(self, number: int, weights: dict[str, UNetWeight], result: BlockResult) -> None: ...


@dataclass(frozen=True)
class BlockResult:
    """Mean squared error of a block's output over the latents: weights rounded to nearest, and as learned."""

    block: str
    nearest: float
    learned: float


def reconstruct(
    full: StepNetwork,
    quantized: StepNetwork,
    layers: Sequence[UNetLayer],
    latents: Sequence[Latents],
    bits: dict[str, int],
    options: AdaRound,
    tell: Callable[[int, int], None] = lambda done, total: None,
    pieces: Pieces | None = None,
) -> tuple[dict[str, UNetWeight], list[BlockResult]]:
    """Round the weights of all layers, block after block, in place in `quantized`.

    Args:
        quantized: a copy of `full`, without activation quantizers.
        latents: spread over the trajectory.
        bits: by layer name. tell: hears (done, total) blocks.
        pieces: where finished blocks are kept; those that are there already are not learned again.
    Returns: the weights by layer name, and the errors of each block. Where learning does not pay on the latents,
        weights stay rounded to nearest.
    """
    if not latents:
        raise CalibrationError("AdaRound needs at least one latent")
    assert not quantized.quantizers, "activation quantizers come after the weights"
    blocks = [(block, list(members)) for block, members in groupby(layers, key=lambda layer: layer.block)]
    weights: dict[str, UNetWeight] = {}
    results = []
    for done, (block, members) in enumerate(blocks):
        kept = pieces.load(done) if pieces is not None else None
        if kept is None:
            task = _Block(full, quantized, block, latents)
            roundings = {m.name: _Rounding(task.weight_of(m.name), m, bits[m.name], options) for m in members}
            kept = _round_block(task, roundings, options, seed=(options.seed << 16) + done)
            if pieces is not None:
                pieces.save(done, *kept)
        found, result = kept
        set_weights(quantized.unet, found)
        weights |= found
        results.append(result)
        tell(done + 1, len(blocks))
    return weights, results


def _round_block(
    task: _Block, roundings: dict[str, _Rounding], options: AdaRound, *, seed: int
) -> tuple[dict[str, UNetWeight], BlockResult]:
    nearest = {name: rounding.nearest() for name, rounding in roundings.items()}
    before = task.error({name: weight.dequantize() for name, weight in nearest.items()}, options.batch)
    _learn(task, roundings, options, torch.Generator().manual_seed(seed))
    learned = {name: rounding.learned() for name, rounding in roundings.items()}
    after = task.error({name: weight.dequantize() for name, weight in learned.items()}, options.batch)
    if not after < before:
        return nearest, BlockResult(task.name, before, before)
    return learned, BlockResult(task.name, before, after)


def _learn(task: _Block, roundings: dict[str, _Rounding], options: AdaRound, chance: torch.Generator) -> None:
    """Minimise |out - target|^2, summed over channels, mean over the rest, plus the regularizer."""
    optimizer = torch.optim.Adam([v for r in roundings.values() for v in r.v], lr=options.learning_rate)
    start = options.warmup * options.iterations
    first, last = options.beta
    for iteration in range(options.iterations):
        samples = torch.randperm(task.count, generator=chance)[: options.batch]
        optimizer.zero_grad()
        output, target = task.run({name: r.soft() for name, r in roundings.items()}, samples)
        loss = (output - target).square().mean() * target.shape[1]
        if iteration >= start:
            progress = (iteration - start) / (options.iterations - start)
            beta = last + (first - last) * (1 - progress)
            loss = loss + options.regularizer * sum(r.undecided(beta) for r in roundings.values())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class _Rounding:
    """w ~ scale * (clip(floor(w / scale) + h(v) + zero_point) - zero_point) for each part of one layer's weight."""

    def __init__(self, weight: Tensor, layer: UNetLayer, bits: int, options: AdaRound) -> None:
        self.shape = weight.shape
        self.parts = halves(weight.detach(), layer.split)
        self.grids = [
            fit_weight_grid(part, bits, options.clip, symmetric=options.symmetric) for part in self.parts
        ]
        steps = [part / grid.scale for part, grid in zip(self.parts, self.grids, strict=True)]
        self.floors = [step.floor() for step in steps]
        self.v = [
            nn.Parameter(torch.logit((step - floor - LOW) / (HIGH - LOW)))
            for step, floor in zip(steps, self.floors, strict=True)
        ]

    def soft(self) -> Tensor:
        parts = [
            grid.scale * (_clip(floor + _h(v) + grid.zero_point, grid) - grid.zero_point)
            for floor, v, grid in zip(self.floors, self.v, self.grids, strict=True)
        ]
        return torch.cat(parts, dim=1).view(self.shape)

    def undecided(self, beta: float) -> Tensor:
        """The sum over all weights of 1 - |2 h - 1|^beta: 0 when each is rounded down or up."""
        return torch.stack([(1 - (2 * _h(v) - 1).abs().pow(beta)).sum() for v in self.v]).sum()

    def nearest(self) -> UNetWeight:
        return self._weight(
            quantize_to_grid(part, g.scale, g.zero_point, g.bits)
            for part, g in zip(self.parts, self.grids, strict=True)
        )

    @torch.no_grad()
    def learned(self) -> UNetWeight:
        return self._weight(
            _clip(floor + (_h(v) >= 0.5) + g.zero_point, g).to(torch.uint8)
            for floor, v, g in zip(self.floors, self.v, self.grids, strict=True)
        )

    def _weight(self, codes: Iterable[Tensor]) -> UNetWeight:
        parts = [on_grid(code, grid, None) for code, grid in zip(codes, self.grids, strict=True)]
        return UNetWeight(tuple(parts), self.shape)


def _h(v: Tensor) -> Tensor:
    return (v.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def _clip(codes: Tensor, grid: Grid) -> Tensor:
    return codes.clamp(0, 2**grid.bits - 1)


class _Reached(Exception):
    """The block that was waited for has run."""


class _Block:
    """One block of the quantized network, its inputs there and its full-precision outputs, over all latents."""

    def __init__(
        self, full: StepNetwork, quantized: StepNetwork, name: str, latents: Sequence[Latents]
    ) -> None:
        self.name = name
        self.module = quantized.unet.get_submodule(name)
        calls = _record(quantized, name, latents)
        self.arguments, self.keywords = _join([c[0] for c in calls]), _join([c[1] for c in calls])
        self.target = torch.cat([call[2] for call in _record(full, name, latents)])
        self.count = len(self.target)

    def weight_of(self, layer: str) -> Tensor:
        weight: Tensor = self.module.get_submodule(self._inside(layer)).get_parameter("weight")
        return weight

    def _inside(self, layer: str) -> str:
        return layer.removeprefix(self.name).removeprefix(".")

    def run(self, weights: dict[str, Tensor], samples: Tensor) -> tuple[Tensor, Tensor]:
        """What the block puts out with these weights, by layer name, and what it should."""
        samples = samples.to(self.target.device)
        inside = {f"{self._inside(name)}.weight".removeprefix("."): w for name, w in weights.items()}
        arguments, keywords = _take(self.arguments, samples), _take(self.keywords, samples)
        output: Tensor = functional_call(self.module, inside, arguments, keywords)
        return output, self.target[samples]

    @torch.no_grad()
    def error(self, weights: dict[str, Tensor], batch: int) -> float:
        total = 0.0
        for samples in torch.split(torch.arange(self.count), batch):
            output, target = self.run(weights, samples)
            total += float((output - target).double().square().sum())
        return total / self.target.numel()


@torch.no_grad()
def _record(network: StepNetwork, name: str, latents: Sequence[Latents]) -> list[tuple[Any, Any, Tensor]]:
    """The arguments, keywords and output of a block for each of the latents; the network runs no further."""
    calls: list[tuple[Any, Any, Tensor]] = []

    def stop(module: nn.Module, arguments: Any, keywords: Any, output: Tensor) -> None:
        calls.append((arguments, keywords, output))
        raise _Reached

    with network.unet.get_submodule(name).register_forward_hook(stop, with_kwargs=True):
        for index, x, seeds in latents:
            try:
                network.of(seeds)(x, index)
            except _Reached:
                continue
    return calls


def _join(values: list[Any]) -> Any:
    """Tensors of all calls one after the other; what is no tensor is the same in all."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_join(list(items)) for items in zip(*values, strict=True))
    return first


def _take(value: Any, samples: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[samples]
    if isinstance(value, dict):
        return {key: _take(item, samples) for key, item in value.items()}
    return tuple(_take(item, samples) for item in value) if isinstance(value, tuple) else value
