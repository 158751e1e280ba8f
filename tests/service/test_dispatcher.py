"""The dispatcher and the doorbell, on a real broker that comes and goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import broker
from app.shared import jobs, lapses, leases, queue
from app.shared.dispatcher import Dispatcher, sweep
from app.shared.settings import Settings, get_settings
from app.shared.storage import Storage
from app.shared.tables import Outbox
from app.supervisor import Child
from quantry.jobs import Cancelled, Failed, JobError, Succeeded
from quantry.requests import JobRequest
from tests.service.child_jobs import manifest, report

OWNER = "owner"
SPEC = JobRequest(model="bundled/opt-tiny", bits=4).resolve()


class Service:
    """Settings, a broker that can be killed and started, and a dispatcher."""

    def __init__(self, folder: Path, sessions: sessionmaker[Session]) -> None:
        self.folder = folder
        self.path = broker.socket_path(folder)
        self.child: Child | None = None
        self.settings = Settings(data=folder, redis_url=f"unix://{self.path}", ring_again_s=30)
        self.dispatcher = Dispatcher(sessions, self.settings)
        self.sessions = sessions

    def up(self) -> None:
        self.child = broker.start(self.folder / "broker", self.path)

    def down(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child = None

    def rung(self) -> set[bool]:
        with self.sessions() as session:
            return {moment is not None for moment in session.scalars(select(Outbox.rung_at))}


@pytest.fixture
def service(
    tmp_path: Path, sqlite_sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    service = Service(tmp_path, sqlite_sessions)
    monkeypatch.setenv("QUANTRY_REDIS_URL", str(service.settings.redis_url))
    monkeypatch.setattr(queue, "PAUSE_S", 0.0)
    get_settings.cache_clear()
    queue.celery.cache_clear()
    yield service
    queue.celery().close()
    get_settings.cache_clear()
    queue.celery.cache_clear()
    service.down()


def submit(session: Session) -> str:
    return jobs.submit(session, SPEC, owner=OWNER)[0].id


def test_a_submit_rings_once(service: Service) -> None:
    service.up()
    with service.sessions() as session:
        submit(session)
    assert queue.waiting() == 1
    service.dispatcher.tick()
    assert queue.waiting() == 1
    assert service.rung() == {True}


def test_a_submit_without_broker_is_announced_when_it_is_back(service: Service) -> None:
    with service.sessions() as session:
        submit(session)
        submit(session)
    assert service.rung() == {False}
    service.dispatcher.tick()  # the broker is still away
    assert service.rung() == {False}
    service.up()
    service.dispatcher.tick()
    assert queue.waiting() == 2
    assert service.rung() == {True}


def test_a_wiped_broker_loses_nothing(service: Service) -> None:
    service.up()
    with service.sessions() as session:
        submit(session)
    service.down()
    for path in (service.folder / "broker").rglob("*"):
        if path.is_file():
            path.unlink()
    service.up()
    queue.celery.cache_clear()
    assert queue.waiting() == 0
    service.dispatcher.tick(now=datetime.now(UTC) + timedelta(seconds=31))
    assert queue.waiting() == 1


def test_messages_that_wait_are_not_doubled(service: Service) -> None:
    service.up()
    with service.sessions() as session:
        submit(session)
    for minute in range(1, 4):
        service.dispatcher.tick(now=datetime.now(UTC) + timedelta(minutes=minute))
    assert queue.waiting() == 1


def test_unreadable_broker_data_are_put_aside(service: Service) -> None:
    service.up()
    service.down()
    for path in (service.folder / "broker").rglob("*.aof"):
        path.write_bytes(b"this is no append-only file")
    service.up()
    assert broker.ping(service.path)
    assert list(service.folder.glob("broker-unreadable-*"))


def test_the_sweep_removes_what_lost_attempts_left(
    service: Service, sqlite_sessions: sessionmaker[Session]
) -> None:
    storage = Storage(service.settings.storage)
    storage.prepare()
    now = datetime.now(UTC)
    with sqlite_sessions() as session:
        running, failed = submit(session), submit(session)
        for job_id in (running, failed):
            claim = leases.claim(session, job_id, worker="w", now=now)
            assert claim is not None
            storage.open_part(job_id, 1)
        leases.finish(session, claim, Failed(error=JobError(type="t", title="t", detail="d")), now=now)
        lapses.forfeit(session, "w", now=now)
        assert leases.claim(session, running, worker="w", now=now) is not None
        storage.open_part(running, 2)
        storage.open_part("job_" + "0" * 36, 1)  # of another database

        removed = sweep(session, storage, now=now)
        assert sorted(removed) == sorted([f"{running}/attempt-1.part", f"{failed}/attempt-1.part"])
        assert storage.part(running, 2).is_dir()
        assert storage.part("job_" + "0" * 36, 1).is_dir()
        assert storage.checkpoints(failed).is_dir()
        assert sweep(session, storage, now=now + timedelta(days=8)) == [f"{failed}/checkpoints"]


def test_the_sweep_removes_uploads_that_a_killed_server_left(
    service: Service, sqlite_sessions: sessionmaker[Session]
) -> None:
    storage = Storage(service.settings.storage)
    left, arriving = storage.incoming(), storage.incoming()
    for path, age in ((left, 2 * 86400), (arriving, 60)):
        path.write_bytes(b"x")
        os.utime(path, times=(time.time() - age,) * 2)
    with sqlite_sessions() as session:
        assert sweep(session, storage) == [f"blobs/{left.name}"]
    assert not left.exists()
    assert arriving.exists()


def test_a_published_artifact_is_never_swept(
    service: Service, sqlite_sessions: sessionmaker[Session]
) -> None:
    storage = Storage(service.settings.storage)
    with sqlite_sessions() as session:
        job_id = submit(session)
        claim = leases.claim(session, job_id, worker="w")
        assert claim is not None
        (storage.open_part(job_id, 1) / "model.safetensors").write_bytes(b"x")
        artifact = storage.publish(job_id, 1)
        assert sweep(session, storage) == []  # published, and its end not yet written
        leases.finish(
            session, claim, Succeeded(report=report(), manifest=manifest(job_id, b"x")), artifact=artifact
        )
        assert sweep(session, storage) == [f"{job_id}/checkpoints"]
        assert (storage.artifact(artifact) / "model.safetensors").read_bytes() == b"x"


def test_a_tick_without_a_broker_still_takes_jobs_back(service: Service) -> None:
    with service.sessions() as session:
        job_id = submit(session)
        assert leases.claim(session, job_id, worker="w") is not None
        jobs.cancel(session, job_id, owner=OWNER)
    service.dispatcher.tick(now=datetime.now(UTC) + timedelta(seconds=61))
    with service.sessions() as session:
        assert jobs.to_read(jobs.get(session, job_id, owner=OWNER)).state == Cancelled().outcome
