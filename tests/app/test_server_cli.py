"""`quantry-server` as an administrator uses it, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.orm import sessionmaker

from app import security
from app.first_run import prepare
from app.shared.database import make_engine, make_sessions
from app.shared.errors import KeyRefused
from app.shared.settings import Settings


def run(data: Path, *arguments: str, status: int = 0, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QUANTRY_")}
    result = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env={**inherited, "QUANTRY_DATA": str(data), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == status, result
    assert "Traceback" not in result.stderr
    return result.stdout + (result.stderr if status else "")


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    run(tmp_path, "migrate")
    key = run(
        tmp_path, "keys", "create", "laptop", "--owner", "ann", "--scope", "read", "--days", "2"
    ).strip()
    engine = make_engine(f"sqlite:///{tmp_path}/quantry.db")
    sessions: sessionmaker = make_sessions(engine)  # type: ignore[type-arg]
    with sessions() as session:
        caller = security.verify_key(session, key)
        assert (caller.owner, caller.scopes) == ("ann", {"read"})

        listed = run(tmp_path, "keys", "list")
        assert caller.key_id in listed
        assert "laptop" in listed
        assert key not in listed
        run(tmp_path, "keys", "revoke", caller.key_id)
        with pytest.raises(KeyRefused):
            security.verify_key(session, key)
    engine.dispose()
    assert "there is no API key" in run(tmp_path, "keys", "revoke", "0" * 12, status=2)


def test_an_api_without_keys_stays_on_loopback(tmp_path: Path) -> None:
    run(tmp_path, "migrate")
    said = run(tmp_path, "api", "--host", "0.0.0.0", status=2, QUANTRY_REDIS_URL="unix:///nowhere.sock")
    assert "keys create" in said


def test_the_doctor_names_what_is_wrong(tmp_path: Path) -> None:
    said = run(tmp_path, "doctor", status=1, QUANTRY_MODEL_ROOTS=str(tmp_path / "gone"))
    assert "quantry-server migrate" in said
    assert str(tmp_path / "gone") in said
    run(tmp_path, "migrate")
    assert "quantry-server" not in run(tmp_path, "doctor")
    assert "does not answer" in run(tmp_path, "doctor", status=1, QUANTRY_REDIS_URL="unix:///nowhere.sock")


def test_the_first_run_keeps_a_key_that_works_and_replaces_one_that_does_not(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    prepare(settings)
    first = (tmp_path / "api-key").read_text()
    prepare(settings)
    assert (tmp_path / "api-key").read_text() == first
    (tmp_path / "quantry.db").unlink()
    prepare(settings)
    assert (tmp_path / "api-key").read_text() != first
