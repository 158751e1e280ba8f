"""The table from a weight step of the contract to the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedWeight
from quantry.recipe import GptqStep, RtnStep
from worker.calibration.statistics import InputStatistics
from worker.methods.gptq import gptq
from worker.methods.rtn import rtn


@dataclass(frozen=True)
class WeightResult:
    """The weights of a group of layers on their grids, and the damping that the Hessian needed."""

    weights: list[QuantizedWeight]
    damping: float | None = None


def _rtn(weights: list[Tensor], statistics: InputStatistics | None, step: RtnStep) -> WeightResult:
    return WeightResult([rtn(w, step) for w in weights])


def _gptq(weights: list[Tensor], statistics: InputStatistics | None, step: GptqStep) -> WeightResult:
    """The layers of a group share H, so their rows are swept together."""
    assert statistics is not None  # needs_statistics
    result = gptq(torch.cat(weights), statistics, step)
    return WeightResult(_unstack(result.weight, [len(w) for w in weights]), result.damping)


def _unstack(weight: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    parts = zip(
        torch.split(weight.codes, rows),
        torch.split(weight.scale, rows),
        torch.split(weight.zero_point, rows),
        strict=True,
    )
    return [QuantizedWeight(c, s, z, weight.bits, weight.group_size, weight.symmetric) for c, s, z in parts]


WEIGHT_STEPS: dict[type, Callable[[list[Tensor], InputStatistics | None, Any], WeightResult]] = {
    RtnStep: _rtn,
    GptqStep: _gptq,
}


def needs_statistics(step: RtnStep | GptqStep) -> bool:
    """Whether the step looks at calibration data."""
    return isinstance(step, GptqStep)
