"""The API on an empty SQLite database: an app, clients with keys, a real server."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.testclient import TestClient

import migrations
from app.main import create_app
from app.shared.database import make_engine
from app.shared.settings import Settings
from app.shared.storage import Storage
from tests.app.api.factories import Jobs, Keys, write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def plain_logs() -> Iterator[None]:
    """One JSON line an event, as a server writes them: structlog's default draws every traceback."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file at migration head, to be copied: migrating takes longer than most tests here."""
    path = tmp_path_factory.mktemp("database") / "quantry.db"
    engine = make_engine(f"sqlite:///{path}")
    migrations.upgrade(engine)
    engine.dispose()  # the last connection writes the log back into the file
    return path


@pytest.fixture
def sqlite_engine(tmp_path: Path, migrated: Path) -> Iterator[Engine]:
    shutil.copy(migrated, tmp_path / "quantry.db")
    engine = make_engine(f"sqlite:///{tmp_path}/quantry.db")
    yield engine
    engine.dispose()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write_checkpoint(tmp_path / "models" / "tiny")
    return Settings(data=tmp_path / "data", model_roots=(tmp_path / "models",), max_upload_bytes=4 << 20)


@pytest.fixture
def app(settings: Settings, sqlite_sessions: sessionmaker[Session]) -> FastAPI:
    return create_app(settings, sessions=sqlite_sessions)


@pytest.fixture
def keys(sqlite_sessions: sessionmaker[Session]) -> Keys:
    return Keys(sqlite_sessions)


@pytest.fixture
def client(app: FastAPI, keys: Keys) -> Iterator[TestClient]:
    """A client with a key of `alice`."""
    with TestClient(app, headers=keys.make("alice"), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def other(app: FastAPI, keys: Keys, client: TestClient) -> TestClient:
    """The same server with a key of `bob`."""
    return TestClient(app, headers=keys.make("bob"), raise_server_exceptions=False)


@pytest.fixture
def made(settings: Settings, sqlite_sessions: sessionmaker[Session]) -> Jobs:
    storage = Storage(settings.storage)
    storage.prepare()
    return Jobs(sqlite_sessions, storage)


@pytest.fixture
def server(app: FastAPI) -> Iterator[str]:
    """The app behind a real server; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    app.state.services.watcher.close()
    server.should_exit = True
    thread.join()


@pytest.fixture
def live(server: str, keys: Keys) -> Iterator[httpx2.Client]:
    """A client of the real server, with a key of `alice`."""
    with httpx2.Client(base_url=server, headers=keys.make("alice"), timeout=20) as client:
        yield client


@pytest.fixture
def nothing_stays(client: TestClient) -> Any:
    """No job with the label `kept` of a refused request."""
    yield
    assert client.get("/v1/jobs", params={"label": "kept:no"}).json()["items"] == []
