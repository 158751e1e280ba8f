"""The database tables. Times are UTC, sizes bytes. `moves.py` alone writes a job's state."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from quantry.jobs import State


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no zone, so it is taken off on the way in and put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone: use datetime.now(UTC)")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, int: BigInteger}  # noqa: RUF012


_STATES = ", ".join(f"'{state.value}'" for state in State)


class Job(Base):
    """One request, and the queue: a worker takes a row whose state is `queued`.

    epoch: how often the job was ever claimed; the fencing token that every write of a worker carries.
    tries: claims since it was last submitted or retried; bounded by settings.max_attempts.
    version: counts the changes that a reader can see; the ETag.
    last_event: number of the newest row in `events`; numbers are 1, 2, ... per job.
    artifact: folder of the published checkpoint, relative to the storage root.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        CheckConstraint(f"state IN ({_STATES})", name="state"),
        Index(None, "owner", "state"),
        Index(None, "owner", "id"),
        Index(None, "state", "lease_until"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(128))
    state: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str | None] = mapped_column(Text)
    done: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=0)
    eta_s: Mapped[float | None]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_sha256: Mapped[str | None] = mapped_column(String(64))

    epoch: Mapped[int] = mapped_column(default=0)
    tries: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=1)
    last_event: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[datetime | None]

    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    quality: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    artifact: Mapped[str | None] = mapped_column(String(255))


class Outbox(Base):
    """A doorbell that has to be rung: one row for every queued job, deleted when it leaves the queue."""

    __tablename__ = "outbox"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime]
    rung_at: Mapped[datetime | None] = mapped_column(index=True)


class JobEvent(Base):
    """One thing that happened to a job; `id` counts 1, 2, ... within the job, in the order of commit."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]]


class JobAttempt(Base):
    """One run of a job by a worker; `number` is the epoch of its claim."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[str] = mapped_column(String(255))
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    outcome: Mapped[str] = mapped_column(String(16), default="running")
    detail: Mapped[str | None] = mapped_column(Text)


class ApiKey(Base):
    """One API key. Only the SHA-256 of the whole key is kept; `id` is the readable part of it."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(128), index=True)
    name: Mapped[str] = mapped_column(String(255))
    sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[Any]] = mapped_column(JSON)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Dataset(Base):
    """An uploaded text or set of images; its bytes are the blob `sha256` + `suffix` of the storage.

    images: their number, null for a text. classes: different labels, null where images have none.
    """

    __tablename__ = "datasets"
    __table_args__ = (Index(None, "owner", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(255))
    suffix: Mapped[str] = mapped_column(String(16))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    documents: Mapped[int]
    characters: Mapped[int]
    images: Mapped[int | None]
    classes: Mapped[int | None]
    created_at: Mapped[datetime]
