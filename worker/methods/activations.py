"""What a method that quantizes a classifier's activations takes and gives; helpers to look at operands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantry.layers.operands import attach, detach_all
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedWeight
from quantry.recipe import WeightStep
from worker.models.vision import Operand, VisionModel


@dataclass
class Calibrated:
    """What a method found.

    quantizers: by operand name; one operand of q, k and v stands for all three layers. weights: layers whose
    grid the method chose itself, by full name; used where the weight step is `rtn`.
    """

    quantizers: dict[str, ActivationQuantizer]
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)


Tell = Callable[[int, int], None]  # hears (done, total)


def silent(done: int, total: int) -> None:
    """Where nobody waits for progress."""


@dataclass(frozen=True)
class Images:
    """What a method calibrates on. pixels: (N, C, H, W) float32. seed: of everything random.

    weights: the job's weight step, for methods that look at quantized weights. tell: hears `(done, total)` of
    what is counted at present. begin: hears what is counted from now on, before its first `tell`.
    """

    pixels: Tensor
    seed: int
    weights: WeightStep
    tell: Tell = silent
    begin: Callable[[str], None] = lambda what: None


class _Seer(nn.Module):
    """Passes a tensor on and shows it."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def forward(self, x: Tensor) -> Tensor:
        self._see(x.detach())
        return x


def observe(
    model: VisionModel, pixels: Tensor, see: Mapping[str, Callable[[Tensor], None]], tell: Tell = silent
) -> None:
    """Run the float network on `pixels` and show each operand to its function, batch by batch.

    tell: hears how many of the images are done, after each batch.
    """
    for name, function in see.items():
        attach(model.network, name, _Seer(function))
    try:
        logits(model, pixels, tell)
    finally:
        detach_all(model.network)


def logits(model: VisionModel, pixels: Tensor, tell: Tell) -> Tensor:
    """As `model.logits`; `tell` hears how many of the images are done, after each batch."""
    parts: list[Tensor] = []
    for part in torch.split(pixels, model.images_at_once):
        parts.append(model.logits(part))
        tell(min(len(parts) * model.images_at_once, len(pixels)), len(pixels))
    return torch.cat(parts)


def part_of(tell: Tell, before: int, whole: int) -> Tell:
    """For a part of what `tell` counts: `before` of `whole` are done when the part begins."""
    return lambda done, total: tell(before + done, whole)


def attach_all(
    model: VisionModel, quantizers: Mapping[str, nn.Module], operands: Iterable[Operand] | None = None
) -> None:
    """Attach a copy of each quantizer to its operand; an input that q, k and v share, to all three."""
    for operand in model.operands if operands is None else operands:
        if operand.name in quantizers:
            for name in names_of(operand):
                attach(model.network, name, copy.deepcopy(quantizers[operand.name]))


@contextmanager
def quantized(model: VisionModel, quantizers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The network with these quantizers on, for the length of the block."""
    attach_all(model, quantizers)
    try:
        yield
    finally:
        detach_all(model.network)


def names_of(operand: Operand) -> tuple[str, ...]:
    """Every place of an operand: `layer.input` for each layer that takes it, or its own name."""
    if operand.name.endswith(".input"):
        return tuple(f"{layer}.input" for layer in operand.layers)
    return (operand.name,)
