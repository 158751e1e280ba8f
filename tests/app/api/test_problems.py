"""Every bad request gets a problem that says what is wrong, where. Models and texts: test_refused_inputs.py."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, text
from sqlalchemy.event import listen
from starlette.testclient import TestClient

from app.api.edge import MAX_BODY_BYTES
from tests.app.api.factories import REQUEST, Jobs, Keys, check

pytestmark = pytest.mark.usefixtures("nothing_stays")
BIAS = {"method": "bias_compensation"}


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
