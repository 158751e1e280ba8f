"""RepQ-ViT's grids after softmax: powers of sqrt(2), as published, or evenly spaced where the product errs less.

The relative step of a logarithmic grid does not shrink with the bits: 8 of them reach further down, and no closer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.logarithmic import LogQuantizer
from worker.methods.activations import Images, observe
from worker.models.vision import VisionModel

Grids = tuple[LogQuantizer, UniformQuantizer]


def of_least_error(
    model: VisionModel, images: Images, grids: Mapping[str, Grids]
) -> dict[str, ActivationQuantizer]:
    """For each operand of probabilities P the grid with the least squared error of P V, in one float forward."""
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in grids}
    values: dict[str, Tensor] = {}

    def see_value(name: str, value: Tensor) -> None:
        values[name] = value

    def see_probabilities(name: str, p: Tensor) -> None:
        value = values.pop(name)
        for trial, grid in enumerate(grids[name]):
            errors[name][trial] += ((grid(p) - p) @ value).square_().sum(dtype=torch.float64).cpu()

    watched = {}
    for name in grids:
        watched[f"{name.removesuffix('probabilities')}value"] = partial(see_value, name)
        watched[name] = partial(see_probabilities, name)
    observe(model, images.pixels, watched)
    return {name: grids[name][int(errors[name].argmin())] for name in grids}
