"""The one place where a job's state is written.

A move is one conditional UPDATE: it happens only if the row is still in a state that allows it (and meets
the caller's conditions, such as the epoch of a claim), so none is made from a state that was read too early.
Everything that follows from the new state alone is written here too: the outbox, the lease, the state event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, update
from sqlalchemy.orm import Session

from app.shared.errors import ForbiddenMove
from app.shared.tables import Job, JobAttempt, JobEvent, Outbox
from quantry.jobs import FINISHED, MOVES, State


def move(
    session: Session,
    job_id: str,
    sources: Sequence[State],
    to: State,
    *,
    now: datetime,
    conditions: Sequence[ColumnElement[bool]] = (),
    values: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Job | None:
    """Move the job to `to` if it is in one of `sources` and meets `conditions`; None if not.

    `values` are further columns to set, `data` further content of the state event. The caller has a write
    transaction open. Raises ForbiddenMove if the contract's table has no such move.
    """
    for source in sources:
        if to not in MOVES[source]:
            raise ForbiddenMove(f"job {job_id}: {source} -> {to} is not a move of the contract")
    columns = {**_implied(to, now), **(values or {}), "state": to.value, "updated_at": now}
    columns |= {"version": Job.version + 1, "last_event": Job.last_event + 1}
    job = session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.state.in_([state.value for state in sources]), *conditions)
        .values(**columns)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if job is None:
        return None
    if to is State.QUEUED:
        session.add(Outbox(job_id=job_id, created_at=now, rung_at=None))
    elif State.QUEUED in sources:
        session.execute(delete(Outbox).where(Outbox.job_id == job_id))
    content = {"state": to.value, "attempt": job.epoch, **(data or {})}
    session.add(JobEvent(job_id=job_id, id=job.last_event, at=now, kind="state", data=content))
    return job


def _implied(to: State, now: datetime) -> dict[str, Any]:
    """Columns whose value follows from the new state alone."""
    if to in FINISHED:
        return {"lease_until": None, "worker": None, "finished_at": now, "eta_s": None}
    if to is State.QUEUED:
        return {"lease_until": None, "worker": None, "finished_at": None, "stage": None, "eta_s": None}
    return {}


def append_events(
    session: Session, job: Job, events: Sequence[tuple[str, Mapping[str, Any]]], now: datetime
) -> None:
    """Number and store events. The caller holds the row's lock, which orders the numbers."""
    if not events:
        return
    last = session.scalars(
        update(Job)
        .where(Job.id == job.id)
        .values(last_event=Job.last_event + len(events))
        .returning(Job.last_event)
        .execution_options(synchronize_session=False)
    ).one()
    for number, (kind, data) in enumerate(events, start=last - len(events) + 1):
        session.add(JobEvent(job_id=job.id, id=number, at=now, kind=kind, data=dict(data)))


def close_attempt(
    session: Session, job_id: str, number: int, outcome: str, detail: str | None, now: datetime
) -> None:
    """Write how the attempt ended."""
    session.execute(
        update(JobAttempt)
        .where(JobAttempt.job_id == job_id, JobAttempt.number == number)
        .values(outcome=outcome, detail=detail, finished_at=now)
    )
