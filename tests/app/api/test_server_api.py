"""Probes, metrics, the catalog and the dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from starlette.testclient import TestClient

from quantry.contract import MethodPage
from quantry.diffusion import PIPELINES
from quantry.diffusion_checks import DIFFUSION_METHODS
from quantry.families import FAMILIES
from quantry.jobs import State
from quantry.planning import LANGUAGE_METHODS
from quantry.recipe import TRAINING_METHODS
from quantry.reports import Estimate
from quantry.training_planning import TRAINED_FAMILIES
from quantry.vision import VISION_FAMILIES
from quantry.vision_planning import VISION_METHODS
from tests.app.api.factories import LAYERS, REQUEST, Jobs, tensors


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """Metrics by name and label values."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_probes(client: TestClient, app: Any) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}


def test_a_server_without_its_tables_is_alive_but_not_ready(client: TestClient, made: Jobs) -> None:
    with made.sessions() as session:
        session.execute(text("DROP TABLE jobs"))
        session.commit()
    assert client.get("/healthz").status_code == 200
    response = client.get("/readyz")
    assert (response.status_code, response.json()["type"]) == (503, "/problems/not-ready")


def test_a_server_without_its_storage_is_not_ready(client: TestClient, settings: Any) -> None:
    Path(settings.storage).rename(Path(settings.storage).parent / "moved")
    assert client.get("/readyz").json()["detail"] == "the storage folder cannot be written"


def test_metrics_count_requests_and_jobs(client: TestClient, made: Jobs) -> None:
    made.queued()
    made.queued("bob")
    made.running()
    client.get("/v1/jobs/job_x")
    client.get("/nothing/here")
    client.request("BREW", "/v1/jobs")
    found = samples(client)
    assert found["quantry_jobs", "queued"] == 2
    assert found["quantry_jobs", "preparing"] == 1
    assert {name[1] for name in found if name[0] == "quantry_jobs"} == {state.value for state in State}
    assert found["quantry_http_requests_total", "GET", "/v1/jobs/{job_id}", "404"] == 1
    assert found["quantry_http_requests_total", "GET", "unmatched", "404"] == 1
    assert found["quantry_http_requests_total", "other", "/v1/jobs", "405"] == 1
    assert found["quantry_waiting_clients",] == 0


def test_methods_publish_schemas_that_accept_what_the_server_takes(client: TestClient) -> None:
    page = MethodPage.model_validate_json(client.get("/v1/methods").content)
    for info in page.items:
        jsonschema.Draft202012Validator.check_schema(info.json_schema)
        assert info.json_schema["properties"]["method"]["const"] == info.method
    validator = jsonschema.Draft202012Validator(page.items[1].json_schema)
    validator.validate({"method": "gptq", "bits": 3, "group_size": 64})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"method": "gptq", "bits": 7})


def test_methods_say_which_models_they_work_on(client: TestClient) -> None:
    found = {
        info.method: info for info in MethodPage.model_validate_json(client.get("/v1/methods").content).items
    }
    assert set(found) == {*LANGUAGE_METHODS, *VISION_METHODS, *DIFFUSION_METHODS, *TRAINING_METHODS}
    everywhere = {*FAMILIES, *VISION_FAMILIES, *PIPELINES}
    assert {name for name, info in found.items() if set(info.families) == everywhere} == {
        "rtn",
        "bias_compensation",
        "softmax_bias",
    }
    assert set(found["gptq"].families) == {*FAMILIES, *VISION_FAMILIES}
    assert set(found["accuquant"].families) == set(PIPELINES) - {"ConsistencyModelPipeline"}
    assert found["svdquant"].families == ("DiTPipeline",)
    for name in ("uniform", "ptq4vit", "repq", "adalog", "igq"):
        others = set(PIPELINES) if name == "uniform" else set()
        assert set(found[name].families) == set(VISION_FAMILIES) | others
        formats = ("quantry", "onnx") if name == "uniform" else ("quantry",)
        assert (found[name].role, found[name].formats) == ("activations", formats)
    assert (found["gptq"].role, found["softmax_bias"].role) == ("weights", "correction")
    training = found["fixed_point_training"]
    assert (training.role, set(training.families)) == ("training", set(TRAINED_FAMILIES))
    assert found["repq"].paper == "https://arxiv.org/abs/2212.08254"


def test_an_estimate_counts_without_making_a_job(client: TestClient) -> None:
    response = client.post("/v1/estimates", json=REQUEST)
    assert response.status_code == 200
    found = Estimate.model_validate_json(response.content)
    everything = tensors()
    assert found.parameters == sum(tensor.numel() for tensor in everything.values())
    assert found.fp_bytes == sum(tensor.nbytes for tensor in everything.values())
    assert found.format == "compressed-tensors"
    assert sum(layer.quantized for layer in found.layers) == 7 * LAYERS
    kept = {layer.name: layer.reason for layer in found.layers if not layer.quantized}
    assert set(kept) == {"model.embed_tokens", "lm_head"}
    assert all(kept.values())
    assert 0 < found.seconds_low < found.seconds_high
    assert found.quantized_bytes < found.fp_bytes
    assert client.get("/v1/jobs").json()["items"] == []


def test_an_estimate_is_a_reading(app: Any, keys: Any) -> None:
    reader = TestClient(app, headers=keys.make("alice", "read"))
    assert reader.post("/v1/estimates", json=REQUEST).status_code == 200


def test_the_bundled_text_has_a_known_length(client: TestClient) -> None:
    found = Estimate.model_validate_json(client.post("/v1/estimates", json=REQUEST).content)
    assert not any("not known" in warning for warning in found.warnings)
