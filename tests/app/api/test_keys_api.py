"""Keys are made, listed and revoked by administrators, and shown once."""

from __future__ import annotations

import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from app import security
from app.api import keyring
from tests.app.api.factories import REQUEST, Keys


def test_a_key_works_until_it_is_revoked(client: TestClient, app: Any) -> None:
    made = client.post("/v1/keys", json={"name": "ci", "owner": "carol", "scopes": ["write"]})
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    body = made.json()
    user = TestClient(app, headers={"X-API-Key": body["key"]})
    assert user.post("/v1/jobs", json=REQUEST).status_code == 202
    assert user.get("/v1/keys").status_code == 403
    assert client.delete(f"/v1/keys/{body['id']}").status_code == 204
    assert client.delete(f"/v1/keys/{body['id']}").status_code == 204
    assert user.get("/v1/jobs").status_code == 401
    listed = {key["id"]: key for key in client.get("/v1/keys").json()["items"]}
    assert listed[body["id"]]["revoked_at"] is not None
    assert listed[body["id"]]["owner"] == "carol"
    assert "key" not in listed[body["id"]]
    assert body["key"] not in client.get("/v1/keys").text


def test_a_key_is_the_callers_by_default_and_may_expire(client: TestClient) -> None:
    body = client.post("/v1/keys", json={"name": "x", "lifetime_s": 60}).json()
    assert body["owner"] == "alice"
    assert body["scopes"] == ["read", "write"]
    assert body["expires_at"] > body["created_at"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x", "scopes": []},
        {"name": "x", "scopes": ["root"]},
        {"name": "x", "lifetime_s": 0},
        {"name": "x", "key": "y"},
    ],
)
def test_a_bad_key_request_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    before = len(client.get("/v1/keys").json()["items"])
    assert client.post("/v1/keys", json=body).status_code == 422
    assert len(client.get("/v1/keys").json()["items"]) == before


@pytest.mark.parametrize("key_id", ["nope", "%00", "a b", "\u00e4"])
def test_an_unknown_key_is_not_found(client: TestClient, key_id: str) -> None:
    assert client.delete(f"/v1/keys/{key_id}").status_code == 404


def test_a_key_that_is_revoked_elsewhere_stops_soon(
    client: TestClient, sqlite_sessions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `quantry-server keys revoke`: this process is not told, and asks again when its memory is old."""
    monkeypatch.setattr(keyring, "REMEMBER_S", 0.05)
    key_id = client.get("/v1/keys").json()["items"][0]["id"]
    with sqlite_sessions() as session:
        security.revoke_key(session, key_id)
    time.sleep(0.1)
    assert client.get("/v1/keys").status_code == 401


def test_the_memory_for_keys_is_bounded(app: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "_MOST", 3)
    for number in range(8):
        user = TestClient(app, headers=keys.make(f"user{number}"))
        assert user.get("/v1/jobs").status_code == 200
    assert len(app.state.services.keyring._known) <= 3
