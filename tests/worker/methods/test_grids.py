"""Ranges of weights that leave the outermost out, on ramps whose percentiles are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantry.recipe import GptqStep, RtnStep, WeightGrid
from worker.calibration.statistics import InputStatistics
from worker.methods.gptq import gptq
from worker.methods.grids import CHUNK, minmax_grid, percentile_grid
from worker.methods.rtn import rtn

CLIP: dict[str, Any] = {"bits": 4, "clip": "percentile", "percentile": 80}


def ramps() -> Tensor:
    """(2, 202), two groups of 101: -25 to 75; the same reversed in sign; in tenths; only above zero."""
    ramp = torch.arange(-25.0, 76.0)
    return torch.stack([torch.cat([ramp, -ramp]), torch.cat([ramp / 10, ramp + 30])])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_asymmetric_range_goes_from_one_percentile_to_the_other(method: str) -> None:
    found = quantize(method, {**CLIP, "symmetric": False, "group_size": 101})
    # the 20th and 80th of 101 numbers are the 21st and 81st: -5 and 55; -55 and 5; -0.5 and 5.5; 0 (for 25) and 85
    assert found.scale.float().tolist() == [[4, 4], [half(0.4), half(85 / 15)]]
    assert found.zero_point.tolist() == [[1, 14], [1, 0]]
    values = found.dequantize()[0, :101]
    assert (values.min(), values.max()) == (-4, 56)  # what lies beyond goes to the ends
    assert (values[21:82] - ramps()[0, 21:82]).abs().max() <= 2


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_symmetric_range_covers_both_percentiles(method: str) -> None:
    found = quantize(method, {**CLIP, "symmetric": True, "group_size": 101})
    reach = [[-55 / 8, 55 / 8], [-5.5 / 8, -85 / 8]]  # negative: the longer side of the grid is above 0
    assert found.scale.float().tolist() == reach
    assert set(found.zero_point.flatten().tolist()) == {8}
    values = found.dequantize()[0, :101]
    assert values.max() == 55


def test_a_row_without_groups_has_its_own_percentiles() -> None:
    w = torch.stack([torch.arange(-50.0, 51.0), torch.arange(0.0, 202.0, 2)])
    grid = rtn(w, RtnStep(bits=4, symmetric=False, clip="percentile", percentile=95))
    assert grid.scale.float().tolist() == [[6], [half(190 / 15)]]
    assert grid.zero_point.tolist() == [[8], [0]]


def test_the_default_leaves_out_one_weight_in_a_thousand_on_either_side() -> None:
    w = torch.arange(-1000.0, 1001.0).unsqueeze(0)
    low, high = -998, 998
    step = RtnStep(bits=8, symmetric=False, clip="percentile")
    assert float(rtn(w, step).scale) == half((high - low) / 255)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_hundredth_percentile_is_the_whole_range(symmetric: bool) -> None:
    w = torch.randn(7, 3, 50, generator=torch.Generator().manual_seed(0)) + 0.3
    whole, all_in = (
        minmax_grid(w, 4, symmetric=symmetric),
        percentile_grid(w, 4, symmetric=symmetric, percentile=100),
    )
    assert torch.equal(whole.scale, all_in.scale)
    assert torch.equal(whole.zero_point, all_in.zero_point)


def test_parts_of_a_large_weight_are_as_the_whole() -> None:
    w = torch.randn(5, 1, CHUNK // 2, generator=torch.Generator().manual_seed(0))
    found = percentile_grid(w, 4, symmetric=False, percentile=99)
    rows = [percentile_grid(row.unsqueeze(0), 4, symmetric=False, percentile=99) for row in w]
    assert torch.equal(found.scale, torch.cat([row.scale for row in rows]))


def quantize(method: str, fields: dict[str, Any]) -> Any:
    """The ramps by either method; GPTQ of inputs that do not depend on each other is round to nearest."""
    if method == "rtn":
        return rtn(ramps(), RtnStep.model_validate(fields))
    columns = ramps().shape[1]
    seen = InputStatistics(torch.eye(columns), None, torch.zeros(columns), torch.zeros(columns), 9)
    return gptq(ramps(), seen, GptqStep.model_validate({**fields, "refinement": 0})).weight


def half(scale: float) -> float:
    """What float16 stores of it."""
    return float(torch.tensor(scale).half())


@pytest.mark.parametrize("step", [RtnStep, GptqStep])
def test_the_catalog_shows_the_setting(step: type[WeightGrid]) -> None:
    fields = step.model_json_schema()["properties"]
    assert "percentile" in fields["clip"]["enum"]
    assert fields["percentile"]["anyOf"][0] == {"exclusiveMinimum": 50, "maximum": 100, "type": "number"}
