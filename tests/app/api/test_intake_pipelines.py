"""Diffusion pipelines at submit: bundled, below a root, on a hub; planned from outside, refused with their field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import factories
import pipelines
import pytest
from huggingface_hub import constants
from sqlalchemy.orm import Session, sessionmaker
from starlette.testclient import TestClient

from app.main import create_app
from app.shared.settings import Settings
from quantry.bundled import bundled_model
from tests.app.api.factories import Jobs, Keys
from tests.fake_hub import FakeHub

SHORT = {"model": "bundled/ddpm-tiny", "bits": 4, "method": "accuquant"}


def refused(client: TestClient, body: dict[str, Any]) -> tuple[str, str]:
    """Path and detail of a refusal, the same for the dry run and the submit."""
    answers = [client.post(f"/v1/{where}", json=body) for where in ("estimates", "jobs")]
    assert [answer.status_code for answer in answers] == [422, 422], answers[0].text
    assert answers[0].json()["errors"] == answers[1].json()["errors"]
    error = answers[0].json()["errors"][0]
    return error["path"], error["detail"]


def test_the_short_form_is_planned_and_stored_in_full(client: TestClient) -> None:
    estimate = client.post("/v1/estimates", json=SHORT).json()
    assert estimate["architecture"] == "DDIMPipeline"
    assert estimate["quantized_bytes"] < estimate["fp_bytes"]
    assert any(layer["name"] == "mid_block.attentions.0.to_q" for layer in estimate["layers"])
    spec = client.post("/v1/jobs", json=SHORT).json()["spec"]
    assert [step["method"] for step in spec["recipe"]] == ["adaround", "uniform", "accuquant"]
    assert spec["sampling"]["steps"] == 20
    assert spec["evaluation"]["features"]["id"] == "bundled/vit-tiny"
    assert spec["format"] == "quantry"


def test_steps_of_other_families_name_their_place(client: TestClient) -> None:
    path, detail = refused(client, {"model": "bundled/ddpm-tiny", "bits": 4})
    assert path == "recipe.0"
    assert "Hessian" in detail
    path, detail = refused(client, {"model": "bundled/vit-tiny", "bits": 4, "method": "accuquant"})
    assert path == "recipe.0"
    assert "does not work on image classifiers" in detail
    path, _ = refused(client, {**SHORT, "sampling": {"steps": 3}})
    assert path == "recipe.2.group"


def test_the_catalog_lists_what_pipelines_take(client: TestClient) -> None:
    methods = {item["method"]: item for item in client.get("/v1/methods").json()["items"]}
    assert methods["accuquant"]["role"] == "correction"
    assert "StableDiffusionPipeline" in methods["accuquant"]["families"]
    assert methods["adaround"]["role"] == "weights"
    assert {"vit", "opt", "DDIMPipeline"} <= set(methods["rtn"]["families"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "no safetensors weights"),
        ("scheduler/scheduler_config.json", "no folder scheduler"),
    ],
)
def test_folders_below_a_root_are_read(
    spoil: str, reason: str, client: TestClient, settings: Settings
) -> None:
    folder = pipelines.write_ddim(settings.model_roots[0] / "ddim")
    body = {"model": "local:ddim", "bits": 4, "method": "rtn"}
    assert client.post("/v1/jobs", json=body).status_code == 202
    (folder / spoil).unlink()
    answer = client.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/model-refused")
    assert reason in answer.json()["errors"][0]["detail"]


def test_features_must_be_a_classifier_with_a_class_token(client: TestClient, settings: Settings) -> None:
    factories.write_classifier(settings.model_roots[0] / "swin", "swin")
    for model in ({"source": "bundled", "id": "bundled/opt-tiny"}, {"source": "local", "id": "swin"}):
        path, detail = refused(client, {**SHORT, "evaluation": {"features": model}})
        assert path == "evaluation.features"
        assert "class token" in detail


def test_text_models_need_prompts(client: TestClient, settings: Settings) -> None:
    root = settings.model_roots[0]
    pipelines.write_stable_diffusion(root / "sd")
    body: dict[str, Any] = {"model": "local:sd", "bits": 4, "method": "accuquant"}
    path, detail = refused(client, body)
    assert path == "calibration.dataset"
    assert "needs prompts" in detail
    (root / "prompts.txt").write_text("a cat\na dog\n")
    dataset = {"source": "local", "id": "prompts.txt"}
    body |= {"calibration": {"dataset": dataset}, "evaluation": {"dataset": dataset}}
    spec = client.post("/v1/jobs", json=body).json()["spec"]
    assert spec["sampling"]["guidance_scale"] == 7.5
    same = {**dataset, "split": "all"}
    path, _ = refused(client, {**body, "calibration": {"dataset": same}, "evaluation": {"dataset": same}})
    assert path == "evaluation.dataset.split"


def test_files_in_subfolders_are_served(client: TestClient, made: Jobs) -> None:
    content = {"unet/config.json": b"{}", "samples/fp.png": b"\x89PNG", "model_index.json": b"{}"}
    job = made.succeeded(content)
    listed = {entry["path"] for entry in client.get(f"/v1/jobs/{job}/files").json()["files"]}
    assert set(content) <= listed
    for path, data in content.items():
        answer = client.get(f"/v1/jobs/{job}/files/{path}")
        assert (answer.status_code, answer.content) == (200, data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the library reads HF_HUB_OFFLINE at import
    with FakeHub() as hub:
        yield hub


def test_a_pipeline_of_the_hub_is_read_by_its_headers(
    hub: FakeHub, tmp_path: Path, sqlite_sessions: sessionmaker[Session], keys: Keys
) -> None:
    folder = bundled_model("bundled/ddpm-tiny")
    content = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    commit = hub.add("models", "someone/ddpm", content)
    broken = {
        **content,
        "scheduler/scheduler_config.json": json.dumps({"_class_name": "PNDMScheduler"}).encode(),
    }
    hub.add("models", "someone/pndm", broken)
    app = create_app(Settings(data=tmp_path / "data", hub_url=hub.url), sessions=sqlite_sessions)
    with TestClient(app, headers=keys.make("alice")) as client:
        answer = client.post("/v1/jobs", json={**SHORT, "model": "someone/ddpm"})
        assert answer.status_code == 202, answer.text
        assert answer.json()["spec"]["model"]["revision"] == commit
        path, detail = refused(client, {**SHORT, "model": "someone/pndm"})
        assert path == "sampling.scheduler"
        assert "no linear step" in detail
