"""Fixtures for all tests: a database at migration head, on SQLite and on PostgreSQL.

PostgreSQL is the server at QUANTRY_TEST_POSTGRES_URL; each test run makes a schema of its own there and drops it.
Where no server answers, the tests on it are left out and the reason is printed; with CI=true or
QUANTRY_TEST_POSTGRES=1 they run and fail instead.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.orm import Session, sessionmaker

import migrations
from app.shared.database import make_engine, make_sessions
from app.shared.tables import Base

POSTGRES = os.environ.get("QUANTRY_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
REQUIRED = os.environ.get("CI") == "true" or os.environ.get("QUANTRY_TEST_POSTGRES") == "1"
_missing: list[str] = []


def _postgres_answers() -> str | None:
    """Why there is no PostgreSQL, or None."""
    try:
        url = make_url(POSTGRES).set(drivername="postgresql").render_as_string(hide_password=False)
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.Error as error:
        return str(error).strip().splitlines()[0]
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_postgres = [item for item in items if "postgres" in item.name]
    if not on_postgres or REQUIRED:
        return
    reason = _postgres_answers()
    if reason is not None:
        _missing.append(f"{len(on_postgres)} tests on PostgreSQL left out: {reason}")
        config.hook.pytest_deselected(items=on_postgres)
        items[:] = [item for item in items if item not in on_postgres]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _missing:
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of an empty schema at migration head, dropped at the end of the run."""
    schema = f"quantry_{uuid.uuid4().hex[:12]}"
    admin = make_engine(POSTGRES)
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    url = make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"})
    address = url.render_as_string(hide_password=False)
    engine = make_engine(address)
    migrations.upgrade(engine)
    engine.dispose()
    yield address
    with admin.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    admin.dispose()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(f"sqlite:///{tmp_path}/quantry.db")
    migrations.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def postgres_engine(postgres_url: str) -> Iterator[Engine]:
    engine = make_engine(postgres_url)
    empty(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """The test runs once on each database."""
    found = request.getfixturevalue(f"{request.param}_engine")
    assert isinstance(found, Engine)
    return found


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions on an empty database, once on each kind."""
    return make_sessions(engine)


@pytest.fixture
def sqlite_sessions(sqlite_engine: Engine) -> sessionmaker[Session]:
    """Sessions on an empty SQLite database, for tests to which the kind of database does not matter."""
    return make_sessions(sqlite_engine)


def empty(engine: Engine) -> None:
    """Delete every row."""
    with engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
