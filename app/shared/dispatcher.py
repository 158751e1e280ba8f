"""The loop that keeps the queue moving: ring for queued jobs, take jobs back from silent workers, clean up.

Any number of processes may run it: each tick is a few short transactions, and doing one twice does no harm.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app.shared import database, lapses, queue
from app.shared.database import transaction
from app.shared.settings import WEEK_S, Settings
from app.shared.storage import Storage
from app.shared.tables import Job, Outbox
from quantry.jobs import FINISHED, State

log = logging.getLogger(__name__)

BATCH = 100
_IDLE_UPLOAD_S = 86400


@dataclass
class Dispatcher:
    """`run` until `stop` is set; each tick stands alone, so an error costs one tick."""

    sessions: sessionmaker[Session]
    settings: Settings
    stop: threading.Event = field(default_factory=threading.Event)
    _swept: float = -1e9

    def run(self) -> None:
        connected = self.settings.redis_url is None
        while not self.stop.is_set():
            try:
                if not connected:
                    queue.connect()
                    connected = True
                self.tick()
            except (SQLAlchemyError, *queue.BROKER_ERRORS) as error:
                log.warning("dispatcher: %s; the next tick tries again", error)
            self.stop.wait(self.settings.tick_s)

    def start(self) -> threading.Thread:
        """Run in a thread that ends with the process."""
        thread = threading.Thread(target=self.run, name="dispatcher", daemon=True)
        thread.start()
        return thread

    def tick(self, now: datetime | None = None) -> None:
        """One round. Raises SQLAlchemyError, and queue.BROKER_ERRORS, after which the next round goes on."""
        with self.sessions() as session:
            for job_id in lapses.expire_queued(session, now=now):
                log.info("%s expired in the queue", job_id)
            for job_id in lapses.requeue_lapsed(session, max_attempts=self.settings.max_attempts, now=now):
                log.warning("%s was taken back from a worker that fell silent", job_id)
            self._ring(session, now)
            if time.monotonic() - self._swept >= self.settings.sweep_s:
                sweep(session, Storage(self.settings.storage), now=now)
                self._swept = time.monotonic()

    def _ring(self, session: Session, now: datetime | None) -> None:
        """Announce jobs that were never announced; when no message is left, also those announced long ago."""
        if self.settings.redis_url is None:
            return
        ids = due(session, timedelta(seconds=self.settings.ring_again_s), now=now)
        if not ids.never and (not ids.again or queue.waiting()):
            return
        wanted = ids.never or ids.again
        mark_rung(session, wanted, now=now)
        for position, job_id in enumerate(wanted):
            if not queue.ring(job_id):
                unmark_rung(session, wanted[position:])
                return


@dataclass(frozen=True)
class Due:
    """Ids of queued jobs, oldest first: never announced, and announced so long ago that it may be lost."""

    never: Sequence[str]
    again: Sequence[str]


def due(session: Session, patience: timedelta, *, now: datetime | None = None) -> Due:
    """Which jobs to announce, at most BATCH of each kind."""
    with transaction(session, write=False):
        now = now or database.now(session)
        query = select(Outbox.job_id).order_by(Outbox.job_id).limit(BATCH)
        never = session.scalars(query.where(Outbox.rung_at.is_(None))).all()
        again = session.scalars(query.where(Outbox.rung_at <= now - patience)).all()
    return Due(never, again)


def mark_rung(session: Session, ids: Sequence[str], *, now: datetime | None = None) -> None:
    with transaction(session):
        moment = now or database.now(session)
        session.execute(update(Outbox).where(Outbox.job_id.in_(ids)).values(rung_at=moment))


def unmark_rung(session: Session, ids: Sequence[str]) -> None:
    with transaction(session):
        session.execute(update(Outbox).where(Outbox.job_id.in_(ids)).values(rung_at=None))


def sweep(session: Session, storage: Storage, *, now: datetime | None = None) -> list[str]:
    """Remove what lost attempts and broken uploads left, and checkpoints a week after the end; returns what went.

    The folders are listed before the rows are read, so an attempt that begins meanwhile is not mistaken for
    an old one.
    """
    found = list(storage.attempts())
    removed = []
    for job_id, epoch, folder in found:
        with transaction(session, write=False):
            row = session.execute(
                select(Job.state, Job.epoch, Job.artifact).where(Job.id == job_id)
            ).one_or_none()
        if row is None:  # the row of another database: not ours to judge
            continue
        published = row.artifact is not None and storage.artifact(row.artifact) == folder.resolve()
        idle = row.state in FINISHED or row.state == State.QUEUED
        if not published and (idle or epoch < row.epoch):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(f"{job_id}/{folder.name}")
    removed += _sweep_checkpoints(session, storage, now)
    return removed + storage.drop_incoming(time.time() - _IDLE_UPLOAD_S)


def _sweep_checkpoints(session: Session, storage: Storage, now: datetime | None) -> list[str]:
    removed = []
    for folder in sorted((storage.root / "jobs").glob("job_*/checkpoints")):
        job_id = folder.parent.name
        with transaction(session, write=False):
            limit = (now or database.now(session)) - timedelta(seconds=WEEK_S)
            ended = or_(Job.state == State.SUCCEEDED.value, Job.finished_at <= limit)
            done = session.scalar(select(Job.id).where(Job.id == job_id, ended))
        if done is not None:
            storage.drop_checkpoints(job_id)
            removed.append(f"{job_id}/checkpoints")
    return removed
