"""What a recipe refuses, and the path that it names."""

from __future__ import annotations

from typing import Any

import pytest

from quantry.base import SpecError
from quantry.contract import JobRequest
from quantry.recipe import GptqStep, RtnStep


@pytest.mark.parametrize("step", [{"method": "rtn"}, {"method": "gptq"}, {"method": "rtn", "clip": "none"}])
def test_a_percentile_without_its_clip_is_refused(step: dict[str, Any]) -> None:
    request = JobRequest.model_validate(
        {"model": "bundled/vit-tiny", "recipe": [{**step, "bits": 4, "percentile": 99}]}
    )
    with pytest.raises(SpecError, match="set clip to `percentile`") as caught:
        request.resolve()
    assert caught.value.path == "recipe.0.percentile"


@pytest.mark.parametrize("percentile", [50, 100.1, 0.999])
def test_a_percentile_is_above_the_median(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        RtnStep(bits=4, clip="percentile", percentile=percentile)


def test_a_spec_that_was_stored_reads_back() -> None:
    step = GptqStep(bits=4, clip="percentile")
    request = JobRequest(model="bundled/vit-tiny", recipe=(step,))
    spec = request.resolve()
    assert spec.weight_step.upper_percentile == 99.9
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
