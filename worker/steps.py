"""The table from a weight step of the contract to the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedWeight
from quantry.recipe import GptqStep, RtnStep, WeightStep
from worker.calibration.statistics import InputStatistics
from worker.methods.gptq import factorize, gptq
from worker.methods.rtn import rtn

CPU_ROWS = 1536  # swept together: a few copies of them are alive, and more would not be quicker


@dataclass(frozen=True)
class WeightResult:
    """The weights of a group of layers on their grids, and the damping that the Hessian needed."""

    weights: list[QuantizedWeight]
    damping: float | None = None


def _rtn(weights: list[Tensor], statistics: InputStatistics | None, step: RtnStep) -> WeightResult:
    return WeightResult([rtn(w, step) for w in weights])


def _gptq(weights: list[Tensor], statistics: InputStatistics | None, step: GptqStep) -> WeightResult:
    """The layers of a group share H, so their rows are swept together, as many at a time as stay small."""
    assert statistics is not None  # needs_statistics
    assert statistics.hessian is not None
    factor = factorize(statistics.hessian, damping=step.damping, act_order=step.act_order == "static")
    rows = torch.cat(weights)
    at_once = CPU_ROWS if rows.device.type == "cpu" else len(rows)
    parts = [slice(start, start + at_once) for start in range(0, len(rows), at_once)]
    swept = [gptq(rows[part], statistics.of_rows(part), step, factor).weight for part in parts]
    return WeightResult(_unstack(swept, [len(w) for w in weights]), factor.damping)


def _unstack(swept: list[QuantizedWeight], rows: list[int]) -> list[QuantizedWeight]:
    first = swept[0]
    codes, scale, zero = (
        torch.split(torch.cat(parts), rows)
        for parts in zip(*((w.codes, w.scale, w.zero_point) for w in swept), strict=True)
    )
    return [
        QuantizedWeight(c, s, z, first.bits, first.group_size, first.symmetric)
        for c, s, z in zip(codes, scale, zero, strict=True)
    ]


WEIGHT_STEPS: dict[type, Callable[[list[Tensor], InputStatistics | None, Any], WeightResult]] = {
    RtnStep: _rtn,
    GptqStep: _gptq,
}


def needs_statistics(step: WeightStep) -> bool:
    """Whether the step looks at calibration data."""
    return isinstance(step, GptqStep)
