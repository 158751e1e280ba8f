"""Models and texts of a hub on loopback, over real HTTP: pinned to commits, read by their headers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save, save_file
from sqlalchemy.orm import Session, sessionmaker
from starlette.testclient import TestClient

from app.main import create_app
from app.shared.settings import Settings
from tests.app.api.factories import REQUEST, Keys, tensors, write_checkpoint
from tests.fake_hub import FakeHub, read_files

HUB_REQUEST = {**REQUEST, "model": "someone/tiny"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the library reads HF_HUB_OFFLINE at import
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def client(
    hub: FakeHub, tmp_path: Path, sqlite_sessions: sessionmaker[Session], keys: Keys
) -> Iterator[TestClient]:
    settings = Settings(data=tmp_path / "data", hub_url=hub.url)
    app = create_app(settings, sessions=sqlite_sessions)
    with TestClient(app, headers=keys.make("alice")) as client:
        yield client


def refused(client: TestClient, request: dict[str, Any], status: int, type: str) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=request)
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["type"]) == (status, f"/problems/{type}"), response.text
    assert client.get("/v1/jobs").json()["items"] == []
    return body


def test_a_branch_is_pinned_to_its_commit(client: TestClient, hub: FakeHub, folder: Path) -> None:
    old = hub.add_model("someone/tiny", folder)
    first = client.post("/v1/jobs", json=HUB_REQUEST)
    assert first.status_code == 202, first.text
    assert first.json()["spec"]["model"] == {"source": "hub", "id": "someone/tiny", "revision": old}
    (folder / "README.md").write_text("changed")
    new = hub.add_model("someone/tiny", folder)
    moved = client.post("/v1/jobs", json={**HUB_REQUEST, "model": "someone/tiny@main"})
    stayed = client.post("/v1/jobs", json={**HUB_REQUEST, "model": f"someone/tiny@{old}"})
    assert moved.json()["spec"]["model"]["revision"] == new != old
    assert stayed.json()["spec"]["model"]["revision"] == old


def test_only_headers_are_read(client: TestClient, hub: FakeHub, folder: Path) -> None:
    hub.add_model("someone/tiny", folder)
    assert client.post("/v1/estimates", json=HUB_REQUEST).status_code == 200
    assert client.post("/v1/estimates", json=HUB_REQUEST).status_code == 200
    weights = [request for request in hub.requests if request[1].endswith(".safetensors")]
    assert weights == [("GET", weights[0][1], "bytes=0-99999")]  # once: a commit does not change


def test_shards_are_read_through_their_index(client: TestClient, hub: FakeHub, folder: Path) -> None:
    everything = tensors()
    names = sorted(everything)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: everything[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add_model("someone/tiny", folder)
    found = client.post("/v1/estimates", json=HUB_REQUEST).json()
    assert found["parameters"] == sum(tensor.numel() for tensor in everything.values())
    (folder / "model-2.safetensors").unlink()
    hub.add_model("someone/tiny", folder)
    body = refused(client, HUB_REQUEST, 422, "model-refused")
    assert "model-2.safetensors, which is not in someone/tiny" in body["detail"]


def test_a_header_longer_than_the_first_request_is_read_whole(
    client: TestClient, hub: FakeHub, folder: Path
) -> None:
    content = save(tensors(), metadata={"note": "x" * 150_000})
    (folder / "model.safetensors").write_bytes(content)
    hub.add_model("someone/tiny", folder)
    assert client.post("/v1/jobs", json=HUB_REQUEST).status_code == 202


def test_a_server_that_ignores_ranges_is_understood(client: TestClient, hub: FakeHub, folder: Path) -> None:
    hub.ignore_ranges = True
    (folder / "model.safetensors").write_bytes(save(tensors(), metadata={"note": "x" * 150_000}))
    hub.add_model("someone/tiny", folder)
    assert client.post("/v1/jobs", json=HUB_REQUEST).status_code == 202


@pytest.mark.parametrize(
    ("model", "path", "detail"),
    [
        ("someone/nothing", "model.id", "no public repository someone/nothing"),
        ("someone/tiny@nope", "model.revision", "no revision someone/tiny@nope"),
        ("someone/tiny@" + "0" * 40, "model.revision", "no revision"),
        ("not//valid", "model.id", "no name of a hub repository"),
        ("a/b/c", "model.id", "no name of a hub repository"),
    ],
)
def test_what_the_hub_does_not_have(
    client: TestClient, hub: FakeHub, folder: Path, model: str, path: str, detail: str
) -> None:
    hub.add_model("someone/tiny", folder)
    body = refused(client, {**HUB_REQUEST, "model": model}, 422, "model-not-found")
    assert body["errors"][0]["path"] == path
    assert detail in body["detail"]


@pytest.mark.parametrize("status", [500, 502, 429])
def test_a_hub_that_fails_is_a_problem_that_passes(
    client: TestClient, hub: FakeHub, folder: Path, status: int
) -> None:
    hub.add_model("someone/tiny", folder)
    hub.fail_with = status
    body = refused(client, HUB_REQUEST, 503, "hub-unreachable")
    assert body["retryable"] is True
    hub.fail_with = None
    assert client.post("/v1/jobs", json=HUB_REQUEST).status_code == 202


def test_a_hub_that_is_away(
    tmp_path: Path, hub: FakeHub, sqlite_sessions: sessionmaker[Session], keys: Keys
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    app = create_app(Settings(data=tmp_path / "data", hub_url=address), sessions=sqlite_sessions)
    client = TestClient(app, headers=keys.make("alice"))
    assert refused(client, HUB_REQUEST, 503, "hub-unreachable")["retryable"] is True


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"model.safetensors": None, "pytorch_model.bin": b"\x80"}, "pytorch_model.bin is a pickle"),
        ({"tokenizer.json": None}, "no tokenizer"),
        ({"config.json": None}, "no config.json"),
        ({"config.json": b"no"}, "not valid JSON"),
        ({"model.safetensors": b"<html>an error page</html>"}, "not a safetensors file"),
    ],
)
def test_a_repository_that_cannot_be_used(
    client: TestClient, hub: FakeHub, folder: Path, change: dict[str, bytes | None], detail: str
) -> None:
    files = {**read_files(folder), **change}
    hub.add(
        "models", "someone/tiny", {name: content for name, content in files.items() if content is not None}
    )
    assert detail in refused(client, HUB_REQUEST, 422, "model-refused")["detail"]


def test_a_truncated_upload_is_seen_in_its_size(client: TestClient, hub: FakeHub, folder: Path) -> None:
    files = read_files(folder)
    hub.add("models", "someone/tiny", {**files, "model.safetensors": files["model.safetensors"][:-1]})
    assert "is truncated" in refused(client, HUB_REQUEST, 422, "model-refused")["detail"]


def test_a_text_of_the_hub_is_pinned_too(client: TestClient, hub: FakeHub, folder: Path) -> None:
    hub.add_model("someone/tiny", folder)
    commit = hub.add("datasets", "someone/texts", {"data/train.txt": b"word " * 1000})
    reference = {"source": "hub", "id": "someone/texts", "file": "data/train.txt"}
    calibration = {**REQUEST["calibration"], "dataset": reference}
    job = client.post("/v1/jobs", json={**HUB_REQUEST, "calibration": calibration})
    assert job.status_code == 202, job.text
    assert job.json()["spec"]["calibration"]["dataset"]["revision"] == commit


def test_images_of_the_hub_are_not_counted_and_the_estimate_says_so(client: TestClient, hub: FakeHub) -> None:
    hub.add("datasets", "someone/images", {"pets.npz": b"not read before the job runs"})
    dataset = {"source": "hub", "id": "someone/images", "file": "pets.npz"}
    body = {"model": "bundled/vit-tiny", "bits": 4, "method": "repq", "evaluation": {"dataset": dataset}}
    warnings = client.post("/v1/estimates", json=body).json()["warnings"]
    assert any("number of evaluation images is not known" in warning for warning in warnings)
    assert not any("/resolve/" in path for _, path, _ in hub.requests)
    body["evaluation"] = {"dataset": dataset, "samples": 100}
    warnings = client.post("/v1/estimates", json=body).json()["warnings"]
    assert not any("not known" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        ({"id": "someone/nothing", "file": "a.txt"}, "calibration.dataset.id"),
        ({"id": "someone/texts", "file": "b.txt"}, "calibration.dataset.file"),
        ({"id": "someone/texts", "file": "a.txt", "revision": "x"}, "calibration.dataset.revision"),
    ],
)
def test_a_text_that_the_hub_does_not_have(
    client: TestClient, hub: FakeHub, folder: Path, dataset: dict[str, str], path: str
) -> None:
    hub.add_model("someone/tiny", folder)
    hub.add("datasets", "someone/texts", {"a.txt": b"word " * 1000})
    calibration = {**REQUEST["calibration"], "dataset": {"source": "hub", **dataset}}
    body = refused(client, {**HUB_REQUEST, "calibration": calibration}, 422, "dataset-not-found")
    assert body["errors"][0]["path"] == path


def test_offline_only_the_cache_counts(
    client: TestClient,
    hub: FakeHub,
    folder: Path,
    tmp_path: Path,
    sqlite_sessions: sessionmaker[Session],
    keys: Keys,
) -> None:
    commit = hub.add_model("someone/tiny", folder)
    settings = Settings(data=tmp_path / "data", hub_url=hub.url, offline=True)
    offline = TestClient(create_app(settings, sessions=sqlite_sessions), headers=keys.make("alice"))
    body = refused(offline, HUB_REQUEST, 422, "model-not-found")
    assert "QUANTRY_OFFLINE" in body["detail"]
    snapshot_download("someone/tiny", cache_dir=settings.cache, endpoint=hub.url)  # as a worker does
    hub.fail_with = 500  # whoever asks now fails
    job = offline.post("/v1/jobs", json=HUB_REQUEST)
    assert job.status_code == 202, job.text
    assert job.json()["spec"]["model"]["revision"] == commit
    missing = offline.post("/v1/jobs", json={**HUB_REQUEST, "model": "someone/other"})
    assert missing.json()["type"] == "/problems/model-not-found"
