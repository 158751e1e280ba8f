"""What the documentation shows must work as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantry.contract import JobRequest
from quantry.vision import VISION_FAMILIES
from quantry.vision_planning import VISION_METHODS
from quantry.wording import METHODS

VISION = (Path(__file__).parents[2] / "docs" / "vision.md").read_text(encoding="utf-8")
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


def test_vision_md_names_every_family_step_and_paper() -> None:
    assert len(REQUESTS) == 3
    for name in (*VISION_FAMILIES, *VISION_METHODS):
        assert f"`{name}`" in VISION
    for method in VISION_METHODS:
        url = METHODS[method].url
        assert url is None or method == "gptq" or url in VISION
