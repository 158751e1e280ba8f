"""What the short form of a request may say, and what it stands for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quantry.contract import DatasetRef, JobSpec
from quantry.requests import JobRequest


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bundled/pydoc", {"source": "bundled", "id": "bundled/pydoc"}),
        ("ds_01", {"source": "upload", "id": "ds_01"}),
        ("local:texts/a.txt", {"source": "local", "id": "texts/a.txt"}),
        ("/texts/a.txt", {"source": "local", "id": "/texts/a.txt"}),
        ("hub:owner/name:a.parquet", {"source": "hub", "id": "owner/name", "file": "a.parquet"}),
    ],
)
def test_a_dataset_may_be_named(name: str, fields: dict[str, Any]) -> None:
    body = {"model": "bundled/opt-tiny", "bits": 4, "evaluation": {"dataset": name}}
    spec = JobRequest.model_validate({**body, "calibration": {"dataset": name}}).resolve()
    assert spec.calibration.dataset == DatasetRef(**fields) == DatasetRef.parse(name)
    assert spec.evaluation is not None
    assert spec.evaluation.dataset == DatasetRef(**fields)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("name", ["", "local:", "hub:", "a\x00b", 3, None])
def test_what_names_no_dataset_is_refused_at_its_field(name: object) -> None:
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate({"model": "bundled/opt-tiny", "bits": 4, "calibration": {"dataset": name}})
    assert {error["loc"][:2] for error in caught.value.errors()} == {("calibration", "dataset")}


def test_the_schema_of_a_request_says_that_a_dataset_may_be_named() -> None:
    schema = JobRequest.model_json_schema()["$defs"]["Calibration"]["properties"]["dataset"]
    assert {"string", None} == {one.get("type") for one in schema["anyOf"]}
