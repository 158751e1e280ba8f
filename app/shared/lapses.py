"""What happens to a job that no worker speaks for: its lease lapsed, its worker is known to be dead, none ever took it.

Each function is one short transaction; those that look for such jobs take at most 100 at a time. `now` is for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.shared import database
from app.shared.database import transaction
from app.shared.moves import close_attempt, move
from app.shared.tables import Job
from quantry.jobs import RUNNING, JobError, State

MAX_ATTEMPTS = 3
HELD = (*RUNNING, State.CANCELLING)  # states in which a worker holds a job


def requeue_lapsed(
    session: Session, *, max_attempts: int = MAX_ATTEMPTS, now: datetime | None = None
) -> list[str]:
    """Take jobs back from workers that fell silent, and return the ids of those that are queued again.

    After `max_attempts` runs a job fails as worker-lost; one that was being cancelled is cancelled.
    """
    with transaction(session, write=False):
        now = now or database.now(session)
        states = [state.value for state in HELD]
        lapsed = select(Job.id).where(Job.state.in_(states), Job.lease_until <= now).limit(100)
        ids = list(session.scalars(lapsed))
    if not ids:
        return []
    with transaction(session):
        return lapse(session, ids, max_attempts, now)


def lapse(session: Session, ids: Sequence[str], max_attempts: int, now: datetime) -> list[str]:
    """Those of these jobs whose lease has lapsed: see `requeue_lapsed`. In the caller's transaction."""
    states = [state.value for state in HELD]
    query = select(Job).where(Job.id.in_(ids), Job.state.in_(states), Job.lease_until <= now)
    query = query.with_for_update(skip_locked=True).execution_options(populate_existing=True)
    queued = []
    for job in session.scalars(query).all():
        worker, epoch, tries, source = job.worker, job.epoch, job.tries, State(job.state)
        values: dict[str, Any] = {}
        if source is State.CANCELLING:
            to = State.CANCELLED
        elif tries >= max_attempts:
            to = State.FAILED
            detail = (
                f"{tries} workers were lost while they ran this job, the last one {worker}; see its attempts"
            )
            error = JobError(type="worker-lost", title="The workers were lost", detail=detail, retryable=True)
            values["error"] = error.model_dump(mode="json")
        else:
            to = State.QUEUED
            queued.append(job.id)
        move(session, job.id, [source], to, now=now, conditions=[Job.epoch == epoch], values=values)
        close_attempt(session, job.id, epoch, "lost", f"worker {worker} fell silent", now)
    return queued


def forfeit(session: Session, worker: str, *, now: datetime | None = None) -> int:
    """End the leases of a worker that is known to be dead, because one of the same name starts now."""
    with transaction(session):
        now = now or database.now(session)
        states = [state.value for state in HELD]
        statement = (
            update(Job)
            .where(Job.worker == worker, Job.state.in_(states))
            .values(lease_until=now)
            .returning(Job.id)
        )
        return len(session.scalars(statement.execution_options(synchronize_session=False)).all())


def expire_queued(session: Session, *, now: datetime | None = None) -> list[str]:
    """End jobs that waited in the queue for longer than their limit, and return their ids."""
    with transaction(session, write=False):
        now = now or database.now(session)
        late = select(Job.id).where(Job.state == State.QUEUED.value, Job.expires_at <= now).limit(100)
        ids = list(session.scalars(late))
    if not ids:
        return []
    error = JobError(
        type="queue-limit",
        title="The job waited too long",
        detail="no worker took the job within limits.queue_s; retry it, or check that a worker is running",
        retryable=True,
    )
    values = {"error": error.model_dump(mode="json")}
    with transaction(session):
        moved = [
            move(
                session,
                job_id,
                [State.QUEUED],
                State.EXPIRED,
                now=now,
                conditions=[Job.expires_at <= now],
                values=values,
            )
            for job_id in ids
        ]
    return [job.id for job in moved if job is not None]
