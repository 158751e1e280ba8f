"""API keys: shown once, kept as a digest, refused for every reason there is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.orm import Session, sessionmaker

from app import security
from app.shared.errors import KeyRefused, NotFound, ScopeMissing


def test_a_key_names_its_owner(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        row, key = security.create_key(session, owner="ann", name="laptop", scopes=["read"])
        caller = security.verify_key(session, key)
    assert (caller.owner, caller.key_id) == ("ann", row.id)
    assert key.startswith(f"qz_{row.id}_")
    assert key not in (row.sha256, row.name)
    assert len(row.sha256) == 64


def test_wrong_unknown_and_revoked_keys_read_alike(sqlite_sessions: sessionmaker[Session]) -> None:
    with sqlite_sessions() as session:
        row, key = security.create_key(session, owner="ann", name="n")
        changed = key[:-1] + ("A" if key[-1] != "A" else "B")
        unknown = "qz_" + "0" * 12 + key[15:]
        security.verify_key(session, key)
        security.revoke_key(session, row.id)
        security.revoke_key(session, row.id)  # twice is once
        said = set()
        for refused in (key, changed, unknown):
            with pytest.raises(KeyRefused) as error:
                security.verify_key(session, refused)
            said.add(str(error.value))
    assert len(said) == 1


@pytest.mark.parametrize("key", ["", "qz_", "Bearer x", "qz_0_x", "qz_" + "0" * 12 + "_" + "é" * 43])
def test_what_is_no_key_is_refused_without_a_query(sqlite_sessions: sessionmaker[Session], key: str) -> None:
    with sqlite_sessions() as session, pytest.raises(KeyRefused, match="form"):
        security.verify_key(session, key)


def test_a_key_expires(sessions: sessionmaker[Session]) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    with sessions() as session:
        _, key = security.create_key(session, owner="ann", name="n", lifetime=timedelta(days=1), now=now)
        security.verify_key(session, key, now=now + timedelta(hours=23))
        with pytest.raises(KeyRefused, match="expired at 2026-01-02"):
            security.verify_key(session, key, now=now + timedelta(days=1))


@pytest.mark.parametrize(
    ("held", "may", "may_not"),
    [
        (["read"], ["read"], ["write", "admin"]),
        (["write"], ["read", "write"], ["admin"]),
        (["admin"], ["read", "write", "admin"], []),
    ],
)
def test_scopes(held: list[str], may: list[str], may_not: list[str]) -> None:
    caller = security.Caller("id", "ann", frozenset(held))
    for scope in may:
        caller.require(scope)  # type: ignore[arg-type]
    for scope in may_not:
        with pytest.raises(ScopeMissing, match=scope):
            caller.require(scope)  # type: ignore[arg-type]


def test_senseless_keys_are_not_made(sqlite_sessions: sessionmaker[Session]) -> None:
    with sqlite_sessions() as session:
        with pytest.raises(ValueError, match="scopes"):
            security.create_key(session, owner="ann", name="n", scopes=[])
        with pytest.raises(ValueError, match="scopes"):
            security.create_key(session, owner="ann", name="n", scopes=["root"])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="lifetime"):
            security.create_key(session, owner="ann", name="n", lifetime=timedelta())
        assert security.list_keys(session) == []


def test_keys_are_revoked_by_their_owner_alone(sqlite_sessions: sessionmaker[Session]) -> None:
    with sqlite_sessions() as session:
        row, key = security.create_key(session, owner="ann", name="n")
        with pytest.raises(NotFound):
            security.revoke_key(session, row.id, owner="bob")
        security.verify_key(session, key)
        assert [found.id for found in security.list_keys(session, owner="ann")] == [row.id]
        assert security.list_keys(session, owner="bob") == []
