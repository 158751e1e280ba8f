"""Wait for a job to change, without a thread or a database connection for each one who waits.

One poller a process asks the database, a few times a second and in one query, for the versions of all jobs
that somebody waits for, and wakes those whose job has moved on. It runs only while somebody waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
from sqlalchemy import bindparam, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from app.shared import jobs
from app.shared.database import transaction
from app.shared.errors import JobNotFound
from app.shared.tables import Job
from quantry.jobs import FINISHED

PERIOD_S = 0.2
_BATCH = 500  # ids in one query; SQLite allows some tens of thousands of parameters
_log = structlog.get_logger("quantry.watch")


@dataclass(frozen=True)
class Mark:
    """A state of a job that somebody has seen."""

    version: int
    last_event: int

    @classmethod
    def of(cls, job: Job) -> Mark:
        return cls(job.version, job.last_event)


@dataclass(frozen=True)
class Look:
    """As much of a job as tells whether there is news."""

    mark: Mark
    etag: str
    finished: bool


_LOOK = select(Job.id, Job.version, Job.last_event, Job.state).where(
    Job.id == bindparam("job_id"), Job.owner == bindparam("owner")
)


def look(sessions: sessionmaker[Session], job_id: str, owner: str) -> Look:
    """A look at one job, several times cheaper than loading it. Raises JobNotFound."""
    with sessions() as session, transaction(session, write=False):
        row = session.execute(_LOOK, {"job_id": job_id, "owner": owner}).one_or_none()
    if row is None:
        raise JobNotFound(job_id)
    return Look(Mark(row.version, row.last_event), jobs.etag_of(row.id, row.version), row.state in FINISHED)


class Watcher:
    """For one event loop; `wait` may be called from any number of tasks."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._waiting: dict[str, dict[asyncio.Future[bool], Mark]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """The server is stopping: whoever waits should end."""
        return self._closed

    def __len__(self) -> int:
        return sum(len(waiters) for waiters in self._waiting.values())

    async def wait(self, job_id: str, seen: Mark, timeout_s: float) -> bool:
        """True once the job is no longer as `seen`; False after `timeout_s`, or when the server stops."""
        if self._closed or timeout_s <= 0:
            return False
        woken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(job_id, {})
        waiters[woken] = seen
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            return await asyncio.wait_for(woken, timeout_s)
        except TimeoutError:
            return False
        finally:
            waiters.pop(woken, None)
            if not waiters and self._waiting.get(job_id) is waiters:
                del self._waiting[job_id]

    def close(self) -> None:
        """End every wait, now and from now on."""
        self._closed = True
        for waiters in self._waiting.values():
            for woken in waiters:
                if not woken.done():
                    woken.set_result(False)
        if self._poller is not None:
            self._poller.cancel()

    async def _poll(self) -> None:
        while self._waiting:
            await asyncio.sleep(PERIOD_S)
            ids = list(self._waiting)
            try:
                marks = await run_in_threadpool(self._read, ids)
            except SQLAlchemyError as error:  # they time out, and ask again
                _log.warning("jobs cannot be watched", error=type(error).__name__)
                continue
            for job_id in ids:
                for woken, seen in self._waiting.get(job_id, {}).items():
                    if marks.get(job_id) != seen and not woken.done():
                        woken.set_result(True)

    def _read(self, ids: Iterable[str]) -> dict[str, Mark]:
        left, found = list(ids), {}
        with self._sessions() as session, transaction(session, write=False):
            while left:
                batch, left = left[:_BATCH], left[_BATCH:]
                rows = session.execute(select(Job.id, Job.version, Job.last_event).where(Job.id.in_(batch)))
                found.update({row.id: Mark(row.version, row.last_event) for row in rows})
        return found
