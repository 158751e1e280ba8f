"""The API keeps what its own OpenAPI document promises: every operation is called with good and bad input."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from app.main import ROUTERS
from tests.app.api.factories import Jobs, Keys

OPERATIONS = sorted(
    (route.path_format, method)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods or ()
)


LOOKED_INTO = ("/v1/jobs", "/v1/estimates", "/v1/datasets")
"""What a schema cannot say decides here: whether a model exists, whether bytes are a text."""

WITHOUT_INPUT = ("/healthz", "/readyz", "/metrics", "/v1/methods")


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        (path, method, mode)
        for path, method in OPERATIONS
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if mode == GenerationMode.POSITIVE or path not in WITHOUT_INPUT
    ],
)
def test_every_operation_keeps_its_word(
    app: FastAPI, keys: Keys, made: Jobs, path: str, method: str, mode: GenerationMode
) -> None:
    """Status, media type, headers and body of each answer are documented; bad input never passes."""
    headers = keys.make("alice")
    job = made.succeeded()
    excluded = [positive_data_acceptance] if path in LOOKED_INTO else []
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if "job_id" in case.path_parameters and len(str(case.path_parameters["job_id"])) % 2:
            case.path_parameters["job_id"] = job  # otherwise only 404 would be seen
        case.call_and_validate(headers=headers, excluded_checks=excluded)

    run()


def test_the_document_is_complete(app: FastAPI) -> None:
    with TestClient(app) as client:
        document = client.get("/openapi.json").json()
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert described == set(OPERATIONS)
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["description"]
            for status, response in operation["responses"].items():
                problem = "application/problem+json" in response.get("content", {})
                assert problem == (int(status) >= 400), (operation["operationId"], status)
    jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"]["Problem"])


def test_every_operation_but_the_probes_asks_for_a_key(app: FastAPI) -> None:
    with TestClient(app) as client:
        document = client.get("/openapi.json").json()
    open_ = {
        path
        for path, item in document["paths"].items()
        for operation in item.values()
        if not operation.get("security")
    }
    assert open_ == {"/healthz", "/readyz"}
