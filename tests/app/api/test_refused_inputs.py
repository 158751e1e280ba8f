"""Models and texts that cannot be used: the problem says what is wrong, where; and nothing is left behind."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.app.api.factories import REQUEST, check, tensors, write_checkpoint

pytestmark = pytest.mark.usefixtures("nothing_stays")

TEXTS: list[tuple[dict[str, Any], str, str]] = [
    ({"source": "bundled", "id": "bundled/nope"}, "dataset-not-found", "bundled/pydoc"),
    ({"source": "upload", "id": "ds_nope"}, "dataset-not-found", "no uploaded dataset"),
    ({"source": "local", "id": "nope.txt"}, "dataset-not-found", "not below"),
    ({"source": "local", "id": "../data/quantry.db"}, "dataset-not-found", "not below"),
    ({"source": "local", "id": "tiny"}, "dataset-refused", "not a file"),
    ({"source": "local", "id": "tiny/model.safetensors"}, "dataset-refused", "ends in .txt"),
    ({"source": "hub", "id": "a/b"}, "dataset-refused", "name the file"),
]


@pytest.mark.parametrize(("dataset", "type", "detail"), TEXTS)
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_a_text_that_cannot_be_used(
    client: TestClient, role: str, dataset: dict[str, Any], type: str, detail: str
) -> None:
    request = {**REQUEST, role: {**REQUEST.get(role, {}), "dataset": dataset}}
    body = check(client.post("/v1/jobs", json=request), 422, type)
    assert body["errors"][0]["path"].startswith(f"{role}.dataset.")
    assert detail in body["detail"]


def test_a_text_too_short_for_the_windows_is_refused(client: TestClient, settings: Any) -> None:
    (settings.model_roots[0] / "short.txt").write_text("word " * 20)
    dataset = {"source": "local", "id": "short.txt", "split": "all"}
    request = {
        **REQUEST,
        "calibration": {"samples": 7, "sequence_length": 16, "dataset": dataset},
        "evaluation": None,
    }
    body = check(client.post("/v1/jobs", json=request), 422, "invalid-request")
    assert body["errors"][0]["path"] == "calibration.samples"
    assert "112 tokens" in body["detail"]
    assert "100 bytes" in body["detail"]
    request["calibration"]["samples"] = 6
    assert client.post("/v1/jobs", json=request).status_code == 202


@pytest.mark.parametrize(
    ("text", "type", "path"),
    [
        ("", "dataset-refused", "evaluation.dataset.id"),
        ("a word", "invalid-request", "evaluation.sequence_length"),
    ],
)
def test_an_evaluation_text_without_one_window_is_refused(
    client: TestClient, settings: Any, text: str, type: str, path: str
) -> None:
    (settings.model_roots[0] / "short.txt").write_text(text)
    dataset = {"source": "local", "id": "short.txt", "split": "all"}
    request = {**REQUEST, "evaluation": {"dataset": dataset, "sequence_length": 16}}
    body = check(client.post("/v1/jobs", json=request), 422, type)
    assert body["errors"][0]["path"] == path


def _truncate(folder: Any) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def _pickle(folder: Any) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _config(**fields: Any) -> Any:
    def change(folder: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def _write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def _index_of_a_missing_shard(folder: Any) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors(), "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _link_to_outside(folder: Any) -> None:
    outside = folder.parents[1] / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def test_a_link_inside_the_roots_is_followed(client: TestClient, settings: Any) -> None:
    folder = write_checkpoint(settings.model_roots[0] / "linked")
    (folder / "model.safetensors").rename(settings.model_roots[0] / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    assert client.post("/v1/estimates", json={**REQUEST, "model": "local:linked"}).status_code == 200


MODELS: list[tuple[Any, str, str]] = [
    (_link_to_outside, "model-refused", "model.safetensors is a link that leads out of"),
    (_truncate, "model-refused", "model.safetensors is truncated"),
    (_write("model.safetensors", b"PK\x03\x04 a zip archive"), "model-refused", "not a safetensors file"),
    (_pickle, "model-refused", "pytorch_model.bin is a pickle"),
    (_without("tokenizer.json"), "model-refused", "has no tokenizer"),
    (_without("config.json"), "model-refused", "no config.json"),
    (_write("config.json", b"{"), "model-refused", "not valid JSON"),
    (_write("config.json", b"[]"), "model-refused", "not a JSON object"),
    (_index_of_a_missing_shard, "model-refused", "model-1.safetensors, which is not in broken"),
    (_config(auto_map={"AutoModel": "x.Y"}), "model-refused", "remote code"),
    (_config(model_type="mamba", architectures=["M"]), "model-refused", "'mamba' is not supported"),
    (_config(num_hidden_layers=3), "model-refused", "says 3 blocks"),
    (_config(quantization_config={"quant_method": "awq"}), "model-refused", "already quantized (awq)"),
]


@pytest.mark.parametrize(("damage", "type", "detail"), MODELS)
def test_a_model_that_cannot_be_used(
    client: TestClient, settings: Any, damage: Any, type: str, detail: str
) -> None:
    folder = write_checkpoint(settings.model_roots[0] / "broken")
    damage(folder)
    request = {**REQUEST, "model": "local:broken", "labels": {"kept": "no"}}
    body = check(client.post("/v1/jobs", json=request), 422, type)
    assert body["errors"][0]["path"].startswith("model")
    assert detail in body["detail"]


@pytest.mark.parametrize(
    "model",
    ["local:nope", "local:../data", "local:..", "/etc", "bundled/nope", "local:" + "a" * 300, "local:link"],
)
def test_a_model_that_is_not_there(client: TestClient, settings: Any, model: str) -> None:
    (settings.model_roots[0] / "link").symlink_to("/etc")  # leads out of the roots
    check(client.post("/v1/jobs", json={**REQUEST, "model": model}), 422, "model-not-found")


def test_local_models_are_off_without_roots(app: FastAPI, client: TestClient) -> None:
    services = app.state.services
    object.__setattr__(services, "settings", services.settings.model_copy(update={"model_roots": ()}))
    body = check(client.post("/v1/jobs", json=REQUEST), 422, "model-refused")
    assert "QUANTRY_MODEL_ROOTS" in body["detail"]
