"""The engine, sessions and transactions, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from app.shared.settings import get_settings

BUSY_TIMEOUT_MS = 10_000
_WRITE = "quantry_write"


def make_engine(url: str) -> Engine:
    """An engine for `url`. A SQLite file's folder is made if it is missing."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=30)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, pool_size=16, max_overflow=48)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    """WAL, so that readers never wait; and no transactions begun by the driver behind our back."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # an accepted job outlives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: upgrading a read transaction later can fail without waiting."""
    write = connection.get_execution_options().get(_WRITE, True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Rows stay readable after the commit that ends each function of `jobs.py`."""
    return sessionmaker(engine, expire_on_commit=False)


@lru_cache
def sessions() -> sessionmaker[Session]:
    """The sessions of this process, on the database of its settings: `with sessions()() as session`."""
    return make_sessions(make_engine(get_settings().database))


@contextmanager
def transaction(session: Session, *, write: bool = True) -> Iterator[None]:
    """One transaction: commit at the end, roll back on an error. Refuses to join one that is open."""
    if session.in_transaction():
        raise RuntimeError("a transaction is already open on this session: commit or roll back first")
    with session.begin():
        session.connection(execution_options={_WRITE: write})
        try:
            yield
        except BaseException:
            session.expunge_all()  # a rollback would expire the rows that the caller still reads
            raise


def now(session: Session) -> datetime:
    """The time by the database's clock, so that hosts whose clocks differ agree on leases."""
    if session.get_bind().dialect.name == "sqlite":  # one host
        return datetime.now(UTC)
    moment = session.scalar(select(func.clock_timestamp()))
    assert isinstance(moment, datetime)
    return moment.astimezone(UTC)
