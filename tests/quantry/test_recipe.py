"""What a recipe refuses, and the path that it names."""

from __future__ import annotations

from typing import Any

import pytest

from quantry.base import SpecError
from quantry.families import FAMILIES
from quantry.levels import check_levels, is_compensated
from quantry.recipe import BiasCompensationStep, GptqStep, RtnStep
from quantry.requests import JobRequest


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


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"method": "ptq4vit", "bits": 4}], "no nodes for the grids of `ptq4vit`"),
        ([{"method": "uniform", "bits": 8, "granularity": "token"}], "no nodes for the grids of `uniform`"),
        ([{"method": "softmax_bias", "range": "max"}], "one scale for the softmax"),
    ],
)
def test_onnx_takes_static_uniform_grids_alone(steps: list[dict[str, Any]], message: str) -> None:
    request = JobRequest.model_validate(
        {"model": "bundled/vit-tiny", "format": "onnx", "recipe": [{"method": "rtn", "bits": 8}, *steps]}
    )
    with pytest.raises(SpecError, match=message) as caught:
        request.resolve()
    assert caught.value.path == "format"


@pytest.mark.parametrize(
    ("config", "levels", "message"),
    [
        ({"model_type": "opt"}, ["mlp"], "no module"),
        ({"model_type": "opt", "do_layer_norm_before": False}, ["block"], "a norm follows"),
        ({"model_type": "llama"}, ["module", "model"], "head of a language model"),
    ],
)
def test_levels_need_a_layer_to_merge_into(config: dict[str, Any], levels: list[str], message: str) -> None:
    step = BiasCompensationStep.model_validate({"levels": levels})
    with pytest.raises(SpecError, match=message) as caught:
        check_levels("recipe.1.levels", step, FAMILIES[config["model_type"]], config)
    assert caught.value.path == "recipe.1.levels"


def test_levels_say_which_layers_are_compensated() -> None:
    def touched(*levels: str) -> set[str]:
        step = BiasCompensationStep.model_validate({"levels": levels})
        names = ("layers.0.attention.q_proj", "layers.0.attention.o_proj", "layers.0.mlp.fc2", "classifier")
        return {name for name in names if is_compensated(step, name)}

    assert touched("attention") == {"layers.0.attention.o_proj"}
    assert touched("block", "model") == {"layers.0.mlp.fc2", "classifier"}
    assert len(touched("module")) == 4
