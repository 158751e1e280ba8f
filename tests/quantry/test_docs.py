"""What the documentation shows must work as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantry.diffusion import PIPELINES
from quantry.diffusion_checks import DIFFUSION_METHODS
from quantry.requests import JobRequest
from quantry.training import FixedPointTrainingStep, GradientGrid
from quantry.training_planning import TRAINED_FAMILIES
from quantry.vision import VISION_FAMILIES
from quantry.vision_planning import VISION_METHODS
from quantry.wording import METHODS

DOCS = Path(__file__).parents[2] / "docs"
DIFFUSION = (DOCS / "diffusion.md").read_text(encoding="utf-8")
TRAINING = (DOCS / "training.md").read_text(encoding="utf-8")
VISION = (DOCS / "vision.md").read_text(encoding="utf-8")
REQUESTS = re.findall(r"```json\n(.*?)```", VISION, re.S)


@pytest.mark.parametrize("text", REQUESTS)
def test_the_requests_of_vision_md_are_accepted(text: str) -> None:
    spec = JobRequest.model_validate(json.loads(text)).resolve()
    assert {step.method for step in spec.recipe} <= set(VISION_METHODS)


def test_the_spec_file_of_vision_md_is_accepted() -> None:
    found = re.search(r"echo '(\{.*\})' > w8a8\.json", VISION)
    assert found is not None
    spec = JobRequest.model_validate({"model": "local:deit-small", **json.loads(found[1])}).resolve()
    assert [step.method for step in spec.recipe] == ["gptq", "uniform"]


@pytest.mark.parametrize("text", re.findall(r"```json\n(.*?)```", DIFFUSION, re.S))
def test_the_requests_of_diffusion_md_are_accepted(text: str) -> None:
    spec = JobRequest.model_validate(json.loads(text)).resolve()
    assert {step.method for step in spec.recipe} <= set(DIFFUSION_METHODS)


def test_diffusion_md_names_every_pipeline_step_and_paper() -> None:
    for name in (*PIPELINES, *DIFFUSION_METHODS):
        assert f"`{name}`" in DIFFUSION
    for method in DIFFUSION_METHODS:
        url = METHODS[method].url
        assert url is None or url in DIFFUSION


def test_vision_md_names_every_family_step_and_paper() -> None:
    assert len(REQUESTS) == 4
    for name in (*VISION_FAMILIES, *VISION_METHODS):
        assert f"`{name}`" in VISION
    for method in VISION_METHODS:
        url = METHODS[method].url
        assert url is None or method == "gptq" or url in VISION


@pytest.mark.parametrize("text", re.findall(r"```json\n(.*?)```", TRAINING, re.S))
def test_the_requests_of_training_md_are_accepted(text: str) -> None:
    spec = JobRequest.model_validate(json.loads(text)).resolve()
    assert isinstance(spec.training_step, FixedPointTrainingStep)


def test_training_md_names_every_family_and_option() -> None:
    for name in TRAINED_FAMILIES:
        assert f"`{name}`" in TRAINING
    options = {*FixedPointTrainingStep.model_fields, *GradientGrid.model_fields} - {"method"}
    assert {name for name in options if f"`{name}" not in TRAINING and f"{name}`" not in TRAINING} <= {
        "gradient"
    }
    assert METHODS["fixed_point_training"].url in TRAINING
