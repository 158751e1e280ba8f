"""Every bad request gets a problem that says what is wrong, where; and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, text
from sqlalchemy.event import listen
from starlette.testclient import TestClient

from app.api.edge import MAX_BODY_BYTES
from tests.app.api.factories import REQUEST, Jobs, Keys, tensors, write_checkpoint

BIAS = {"method": "bias_compensation"}


def check(response: httpx2.Response, status: int, type: str) -> dict[str, Any]:
    """The response is this problem, whole and well-formed."""
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["type"]) == (status, f"/problems/{type}"), response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


@pytest.fixture(autouse=True)
def nothing_stays(client: TestClient) -> Any:
    yield
    assert client.get("/v1/jobs", params={"label": "kept:no"}).json()["items"] == []


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"bits": 7}, "bits", "2, 3, 4, 5, 6 or 8"),
    ({"bits": 1}, "bits", "2, 3, 4, 5, 6 or 8"),
    ({"bits": "4"}, "bits", "2, 3, 4, 5, 6 or 8"),
    ({"bits": None}, "", "give `bits`"),
    ({"method": "awq"}, "method", "'rtn', 'gptq', 'adaround'"),
    ({"unknown": 1}, "unknown", "no such field"),
    ({"dataset": "x"}, "dataset", "there is calibration.dataset, evaluation.dataset"),
    ({"groupsize": 32}, "groupsize", "did you mean group_size"),
    ({"recipe": [{"method": "rtn", "bits": 4, "damping": 0.1}], "bits": ...}, "recipe.0.damping",
     "there is recipe.gptq.damping"),
    ({"group_size": 1}, "group_size", "greater than or equal to 2"),
    ({"group_size": 7}, "recipe.0.group_size", "32, 16, 8, 4, 2"),
    ({"group_size": 48}, "recipe.0.group_size",
     "48 does not divide the 32 columns of model.layers.0.self_attn.q_proj; 32, 16, 8, 4, 2"),
    ({"format": "gptq", "bits": 5}, "format", "2, 3, 4 or 8 bits"),
    ({"format": "gguf"}, "format", "groups of 32"),
    ({"format": "compressed-tensors", "symmetric": False}, "format", "asymmetric"),
    ({"recipe": [BIAS], "bits": ...}, "recipe.0", "put `rtn` or `gptq` before it"),
    ({"recipe": [{"method": "rtn", "bits": 4}, BIAS, BIAS], "bits": ...}, "recipe.2", "stands twice"),
    ({"recipe": [{"method": "rtn", "bits": 4}, {"method": "gptq", "bits": 4}], "bits": ...}, "recipe.1",
     "second weight step"),
    ({"recipe": [{"method": "gptq", "bits": 9, "damping": 2}], "bits": ...}, "recipe.0.bits", "2, 3, 4"),
    ({"recipe": [{"method": "rtn", "bits": 4}, {"method": "igq", "bits": 4, "overhead_max": 0.02}], "bits": ...},
     "recipe.1.overhead_max", "set it to `ilp`"),
    ({"recipe": [{"method": "x"}], "bits": ...}, "recipe.0", "'rtn', 'gptq'"),
    ({"recipe": [{"bits": 4}], "bits": ...}, "recipe.0", "discriminator 'method'"),
    ({"recipe": [], "bits": ...}, "recipe", "at least 1 item"),
    ({"recipe": [{"method": "rtn", "bits": 4}]}, "", "leave out `bits`"),
    ({"model": ...}, "model", "Field required"),
    ({"model": 3}, "model", "valid string"),
    ({"model": ""}, "model", "at least 1 character"),
    ({"model": {"source": "ftp", "id": "x"}}, "model.source", "'hub', 'bundled' or 'local'"),
    ({"model": {"source": "local", "id": "tiny", "x": 1}}, "model.x", "no such field"),
    ({"labels": {"a b": "c"}}, "labels.a b", "pattern"),
    ({"calibration": {"samples": 0}}, "calibration.samples", "greater than or equal to 1"),
    ({"calibration": {"sequence_length": 65}}, "calibration.sequence_length", "context of 64"),
    ({"evaluation": {"sequence_length": 65}}, "evaluation.sequence_length", "context of 64"),
    ({"evaluation": {"dataset": {"source": "bundled", "id": "bundled/pydoc", "split": "train"}}},
     "evaluation.dataset.split", "allow_overlap"),
    ({"limits": {"run_s": 10**9}}, "limits.run_s", "less than or equal to"),
    ({"model": "hub:"}, "model", "at least 1 character"),
    ({"model": "@main"}, "model", "at least 1 character"),
    ({"model": "local:"}, "model", "at least 1 character"),
    ({"model": "owner/name@"}, "model", "revision"),
    ({"model": {"source": "bundled", "id": "bundled/opt-tiny", "revision": "main"}}, "model.revision", "of the hub"),
    ({"calibration": {"dataset": {"source": "bundled", "id": "bundled/pydoc", "separator": "x"}}},
     "calibration.dataset.separator", "read as it is"),
    ({"recipe": [{"method": "gptq", "bits": 4, "target": "plain", "target_strength": 0.1}], "bits": ...},
     "recipe.0.target_strength", "shifts nothing"),
    ({"evaluation": {"samples": 10**30}}, "evaluation.samples", "less than or equal to"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "path", "detail"), REFUSED)
@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/estimates"])
def test_a_wrong_field_is_named(
    client: TestClient, url: str, change: dict[str, Any], path: str, detail: str
) -> None:
    request = {**REQUEST, "labels": {"kept": "no"}, **change}
    request = {name: value for name, value in request.items() if value is not ...}
    body = check(client.post(url, json=request), 422, "invalid-request")
    assert body["errors"][0]["path"] == path
    assert detail in body["errors"][0]["detail"]
    assert body["errors"][0]["pointer"] == ("#/" + path.replace(".", "/") if path else "#")


def test_all_wrong_fields_are_named_at_once(client: TestClient) -> None:
    request = {"model": {"source": "x"}, "recipe": [{"method": "gptq", "bits": 7, "foo": 1}], "zz": 1}
    body = check(client.post("/v1/jobs", json=request), 422, "invalid-request")
    paths = [error["path"] for error in body["errors"]]
    assert paths == ["model.source", "model.id", "recipe.0.bits", "recipe.0.foo", "zz"]
    assert "(and 4 more)" in body["detail"]


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


@pytest.mark.parametrize(
    ("content", "detail"),
    [(b"{", "not valid JSON at character 1"), (b'{"model": "\xff"}', "UTF-8"),
     (b"\x00" * 100, "not valid JSON"),
     (b"[" * 100_000, "not JSON"), (b'{"bits": 4,}', "character 11")],
)  # fmt: skip
def test_a_body_that_is_not_json(client: TestClient, content: bytes, detail: str) -> None:
    response = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert detail in check(response, 400, "invalid-body")["detail"]


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e400"])
def test_a_gate_is_a_finite_number(client: TestClient, number: str) -> None:
    """JSON has no infinity, Python's reader has: a gate must not vanish for it."""
    content = (
        json.dumps({**REQUEST, "accept": {"perplexity_increase_max": 77}}).replace("77", number).encode()
    )
    response = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    body = check(response, 422, "invalid-request")
    assert body["errors"][0]["path"] == "accept.perplexity_increase_max"


@pytest.mark.parametrize("content", [b"[]", b"3", b'"x"', b"null", b""])
def test_a_body_that_is_not_an_object(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    check(response, 422, "invalid-request")


def test_half_a_surrogate_is_refused(client: TestClient) -> None:
    content = json.dumps({**REQUEST, "model": "x"}).replace('"x"', '"\\ud800"').encode()
    response = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    check(response, 422, "invalid-request")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "", "json"]
)
def test_a_body_of_another_type(client: TestClient, kind: str) -> None:
    response = client.post("/v1/jobs", content=json.dumps(REQUEST), headers={"Content-Type": kind})
    check(response, 415, "unsupported-media-type")


def test_types_that_are_json_are_taken(client: TestClient) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/merge-patch+json"):
        assert client.post(
            "/v1/estimates", content=json.dumps(REQUEST), headers={"Content-Type": kind}
        ).is_success


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 10_000_000])
def test_a_large_body_is_refused_whether_declared_or_not(live: httpx2.Client, size: int) -> None:
    headers = {"Content-Type": "application/json"}
    declared = live.post("/v1/jobs", content=b" " * size, headers=headers)
    check(declared, 413, "content-too-large")
    parts = (b" " * 65536 for _ in range(size // 65536 + 1))
    check(live.post("/v1/jobs", content=parts, headers=headers), 413, "content-too-large")
    assert live.get("/v1/jobs").status_code == 200


def test_a_huge_body_is_refused_before_it_is_sent(live: httpx2.Client, server: str) -> None:
    """A client that asks first (Expect: 100-continue) hears no at once, and need not send 1 TB."""
    url = httpx2.URL(server)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_of_exactly_the_limit_is_read(client: TestClient) -> None:
    content = json.dumps(REQUEST).encode().ljust(MAX_BODY_BYTES)
    response = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 202


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/jobs", "GET, HEAD, POST"),
        ("DELETE", "/v1/jobs", "GET, HEAD, POST"),
        ("PATCH", "/v1/datasets", "GET, HEAD, POST"),
        ("PUT", "/v1/datasets/ds_x", "DELETE, GET, HEAD"),
        ("GET", "/v1/jobs/job_x/cancel", "POST"),
        ("POST", "/v1/methods", "GET, HEAD"),
        ("TRACE", "/healthz", "GET, HEAD"),
        ("GET", "/v1/keys/x", "DELETE"),
    ],
)
def test_a_wrong_method_hears_all_the_right_ones(
    client: TestClient, method: str, path: str, allow: str
) -> None:
    response = client.request(method, path)
    check(response, 405, "method-not-allowed")
    assert response.headers["Allow"] == allow


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/jobs/x/y", "/v1/jobs/", "/docs", "/v1//jobs"])
def test_an_unknown_path(client: TestClient, path: str) -> None:
    check(client.get(path, follow_redirects=False), 404, "not-found")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer nope"},
     {"X-API-Key": "qz_000000000000_" + "a" * 43}, {"X-API-Key": ""}, {"Authorization": "Bearer qz_\x7f"}],
)  # fmt: skip
def test_without_a_valid_key_there_is_nothing(app: FastAPI, headers: dict[str, str]) -> None:
    stranger = TestClient(app, headers=headers)
    for path in ("/v1/jobs", "/v1/methods", "/v1/datasets", "/v1/keys", "/metrics", "/v1/jobs/job_x/events"):
        response = stranger.get(path)
        check(response, 401, "key-refused")
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert stranger.post("/v1/jobs", json=REQUEST).status_code == 401
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert stranger.get(path).status_code == 200


def test_the_key_may_come_in_either_header(app: FastAPI, keys: Keys) -> None:
    bearer = keys.make("alice")
    key = bearer["Authorization"].removeprefix("Bearer ")
    for headers in (bearer, {"X-API-Key": key}, {"authorization": f"bearer {key}"}):
        assert TestClient(app, headers=headers).get("/v1/jobs").status_code == 200


def test_a_database_that_is_gone_is_a_problem_that_passes(
    client: TestClient, app: FastAPI, made: Jobs
) -> None:
    with made.sessions() as session:
        session.execute(text("ALTER TABLE jobs RENAME TO elsewhere"))
        session.commit()
    response = client.get("/v1/jobs")
    assert check(response, 503, "database-unavailable")["retryable"] is True
    assert int(response.headers["Retry-After"]) > 0
    with made.sessions() as session:
        session.execute(text("ALTER TABLE elsewhere RENAME TO jobs"))
        session.commit()
    assert client.get("/v1/jobs").status_code == 200


def test_a_database_without_room_is_a_full_disk(
    client: TestClient, sqlite_engine: Engine, made: Jobs
) -> None:
    sqlite_engine.dispose()
    listen(sqlite_engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA max_page_count = 1"))
    answers = [client.post("/v1/jobs", json=REQUEST) for _ in range(60)]
    refused = next(answer for answer in answers if answer.status_code != 202)
    check(refused, 507, "disk-full")
    assert client.get("/v1/jobs").status_code == 200


def test_a_fault_of_ours_tells_no_secrets(client: TestClient, app: FastAPI) -> None:
    sessions = app.state.services.sessions
    object.__setattr__(app.state.services, "sessions", None)
    body = check(client.get("/v1/jobs"), 500, "internal-error")
    object.__setattr__(app.state.services, "sessions", sessions)
    assert "NoneType" not in json.dumps(body)


def test_every_response_can_be_found_in_the_log(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    key = client.headers["Authorization"].removeprefix("Bearer ")
    given = client.get("/v1/jobs?label=secret:value", headers={"X-Request-Id": "my-id.1"})
    made_up = client.get("/v1/jobs", headers={"X-Request-Id": "bad id\t"})
    assert given.headers["X-Request-Id"] == "my-id.1"
    assert len(made_up.headers["X-Request-Id"]) == 32
    log = "".join(capsys.readouterr())
    assert "my-id.1" in log
    assert key.split("_")[1] in log  # which key it was
    assert key not in log
    assert key.split("_", 2)[2] not in log  # the secret may hold underscores
    assert "secret" not in log
