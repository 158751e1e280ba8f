"""The life of a job as its owner sees it: submit, read, cancel, retry. `leases.py` is the worker's side.

Each function is one short transaction that it commits itself; hand it a session with none open. `now` is for
tests: the time by which leases and deadlines are judged, by default that of the database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.shared import database, queue
from app.shared.database import transaction
from app.shared.errors import (
    BadCursor,
    IdempotencyConflict,
    JobFinished,
    JobNotFound,
    JobNotRetryable,
    QueueFull,
)
from app.shared.ids import new_id
from app.shared.moves import move
from app.shared.tables import Job, JobAttempt, JobEvent, Outbox
from quantry.contract import JobSpec
from quantry.jobs import FINISHED, RUNNING, Attempt, Event, JobError, JobRead, Progress, State
from quantry.reports import QualityRow

UNFINISHED = (State.QUEUED, *RUNNING, State.CANCELLING)


def submit(
    session: Session,
    spec: JobSpec,
    *,
    owner: str,
    idempotency_key: str | None = None,
    request_sha256: str | None = None,
    max_unfinished: int | None = None,
    now: datetime | None = None,
) -> tuple[Job, bool]:
    """Store a job and announce it; and whether it is new. The announcement may be lost: the dispatcher repeats it.

    The same `idempotency_key` with the same request returns the job that the first request made.
    Raises IdempotencyConflict if the request differs, QueueFull if the owner has `max_unfinished` jobs.
    """
    digest = request_sha256 or fingerprint(spec)
    try:
        with transaction(session):
            job = _repeated(session, owner, idempotency_key, digest)
            if job is not None:
                return job, False
            _check_room(session, owner, max_unfinished)
            job = _new_job(spec, owner, idempotency_key, digest, now or database.now(session))
            session.add(job)
            session.flush()
            rung_at = job.created_at if queue.configured() else None
            session.add(Outbox(job_id=job.id, created_at=job.created_at, rung_at=rung_at))
            session.add(_created(job))
    except IntegrityError:  # on PostgreSQL the same key may be inserted by two requests at once
        with transaction(session, write=False):
            job = _repeated(session, owner, idempotency_key, digest)
        if job is None:
            raise
        return job, False
    if queue.configured() and not queue.ring(job.id):
        _not_rung(session, job.id)
    return job, True


def _not_rung(session: Session, job_id: str) -> None:
    """The announcement failed: let the dispatcher make it as soon as the broker is back."""
    with transaction(session):
        session.execute(update(Outbox).where(Outbox.job_id == job_id).values(rung_at=None))


def fingerprint(spec: JobSpec) -> str:
    """SHA-256 of the spec's canonical JSON: tells whether two requests ask for the same."""
    canonical = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _repeated(session: Session, owner: str, key: str | None, digest: str) -> Job | None:
    if key is None:
        return None
    job = session.scalars(select(Job).where(Job.owner == owner, Job.idempotency_key == key)).one_or_none()
    if job is not None and job.request_sha256 != digest:
        raise IdempotencyConflict(
            f"idempotency key {key!r} made job {job.id} from another request; use a new key"
        )
    return job


def _check_room(session: Session, owner: str, limit: int | None) -> None:
    if limit is None:
        return
    states = [state.value for state in UNFINISHED]
    count = (
        session.scalar(select(func.count()).select_from(Job).where(Job.owner == owner, Job.state.in_(states)))
        or 0
    )
    if count >= limit:
        raise QueueFull(
            f"you have {count} unfinished jobs and the limit is {limit}; wait for some, or cancel them"
        )


def _new_job(spec: JobSpec, owner: str, key: str | None, digest: str, now: datetime) -> Job:
    return Job(
        id=new_id("job"),
        owner=owner,
        state=State.QUEUED.value,
        done=0,
        total=0,
        spec=spec.model_dump(mode="json"),
        labels=dict(spec.labels),
        idempotency_key=key,
        request_sha256=digest,
        epoch=0,
        tries=0,
        version=1,
        last_event=1,
        created_at=now,
        updated_at=now,
        expires_at=now + timedelta(seconds=spec.limits.queue_s),
    )


def _created(job: Job) -> JobEvent:
    data = {"state": State.QUEUED.value, "attempt": 0}
    return JobEvent(job_id=job.id, id=1, at=job.created_at, kind="state", data=data)


def repeated(session: Session, *, owner: str, key: str, request_sha256: str) -> Job | None:
    """The job that an earlier request with this idempotency key made. Raises IdempotencyConflict."""
    with transaction(session, write=False):
        return _repeated(session, owner, key, request_sha256)


def get(session: Session, job_id: str, *, owner: str) -> Job:
    """The job as it is now. Raises JobNotFound, also for a job of another owner."""
    with transaction(session, write=False):
        return _load(session, job_id, owner)


def _load(session: Session, job_id: str, owner: str) -> Job:
    query = select(Job).where(Job.id == job_id, Job.owner == owner).execution_options(populate_existing=True)
    job = session.scalars(query).one_or_none()
    if job is None:
        raise JobNotFound(job_id)
    return job


def page(
    session: Session,
    *,
    owner: str,
    limit: int = 50,
    cursor: str | None = None,
    states: Sequence[State] = (),
    label: tuple[str, str] | None = None,
    labels: Sequence[tuple[str, str]] = (),
) -> tuple[list[Job], str | None]:
    """Jobs of the owner, newest first, and the cursor of the next page (None at the end).

    The cursor is the id of the last job shown, so that jobs which come meanwhile shift nothing.
    Raises BadCursor.
    """
    query = select(Job).where(Job.owner == owner).order_by(Job.id.desc()).limit(limit + 1)
    if cursor is not None:
        if not cursor.startswith("job_") or len(cursor) != 40:
            raise BadCursor(f"{cursor!r} is no cursor of this list; pass `next` of the page before")
        query = query.where(Job.id < cursor)
    if states:
        query = query.where(Job.state.in_([state.value for state in states]))
    for name, value in [*labels, *([label] if label is not None else [])]:
        query = query.where(Job.labels[name].as_string() == value)
    with transaction(session, write=False):
        found = list(session.scalars(query.execution_options(populate_existing=True)))
    return found[:limit], found[limit - 1].id if len(found) > limit else None


def cancel(session: Session, job_id: str, *, owner: str, now: datetime | None = None) -> Job:
    """Ask that the job end: a queued one is cancelled at once, a running one by its worker, soon.

    Cancelling twice is the same as once. Raises JobNotFound, JobFinished.
    """
    with transaction(session):
        now = now or database.now(session)
        _load(session, job_id, owner)
        job = move(session, job_id, [State.QUEUED], State.CANCELLED, now=now) or move(
            session, job_id, RUNNING, State.CANCELLING, now=now
        )
        if job is not None:
            return job
        job = _load(session, job_id, owner)
        if job.state in (State.CANCELLING, State.CANCELLED):
            return job
        raise JobFinished(f"job {job_id} has {job.state}; there is nothing to cancel")


def retry(session: Session, job_id: str, *, owner: str, now: datetime | None = None) -> Job:
    """Queue a failed, cancelled, rejected or expired job again, with all its attempts before it.

    A job that is queued or running is returned as it is. Raises JobNotFound, JobNotRetryable.
    """
    with transaction(session):
        now = now or database.now(session)
        job = _load(session, job_id, owner)
        if job.state == State.SUCCEEDED:
            raise JobNotRetryable(f"job {job_id} has succeeded; submit a new job to run it again")
        if job.state == State.CANCELLING:
            raise JobNotRetryable(f"job {job_id} is being cancelled; retry it when it is cancelled")
        if job.state not in FINISHED:
            return job
        queue_s = JobSpec.model_validate(job.spec).limits.queue_s
        fresh: dict[str, Any] = {
            "tries": 0,
            "error": None,
            "quality": None,
            "artifact": None,
            "done": 0,
            "total": 0,
        }
        fresh |= {"started_at": None, "expires_at": now + timedelta(seconds=queue_s)}
        sources = [State.FAILED, State.CANCELLED, State.REJECTED, State.EXPIRED]
        job = move(session, job_id, sources, State.QUEUED, now=now, values=fresh) or _load(
            session, job_id, owner
        )
    queue.ring(job_id)
    return job


def events(session: Session, job_id: str, *, owner: str, after: int = 0, limit: int = 500) -> list[Event]:
    """Events of the job with numbers above `after`, oldest first. Raises JobNotFound."""
    with transaction(session, write=False):
        _load(session, job_id, owner)
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
        rows = session.scalars(query.order_by(JobEvent.id).limit(limit)).all()
    return [Event(id=row.id, at=row.at, kind=row.kind, data=row.data) for row in rows]


def attempts(session: Session, job_id: str, *, owner: str) -> list[Attempt]:
    """Every run of the job, oldest first. Raises JobNotFound."""
    with transaction(session, write=False):
        _load(session, job_id, owner)
        query = select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.number)
        rows = session.scalars(query.execution_options(populate_existing=True)).all()
    return [
        Attempt(
            number=row.number,
            worker=row.worker,
            started_at=row.started_at,
            finished_at=row.finished_at,
            outcome=row.outcome,
            detail=row.detail,
        )
        for row in rows
    ]


def etag(job: Job) -> str:
    """A strong entity tag, quoted: it changes with every change that `to_read` shows."""
    return etag_of(job.id, job.version)


def etag_of(job_id: str, version: int) -> str:
    """The same without the row."""
    return f'"{job_id}.{version}"'


def to_read(job: Job) -> JobRead:
    """The job as the API shows it."""
    base = f"/v1/jobs/{job.id}"
    names = ["events", "logs", "attempts"]
    if job.artifact is not None:
        names += ["report", "layers", "files", "checkpoint"]
    if job.state in (State.QUEUED, *RUNNING):
        names.append("cancel")
    if job.state in (State.FAILED, State.CANCELLED, State.REJECTED, State.EXPIRED):
        names.append("retry")
    return JobRead(
        id=job.id,
        state=State(job.state),
        stage=job.stage,
        progress=Progress(done=job.done, total=job.total, eta_s=job.eta_s),
        attempt=job.epoch,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        spec=JobSpec.model_validate(job.spec),
        labels=job.labels,
        error=JobError.model_validate(job.error) if job.error else None,
        quality=tuple(QualityRow.model_validate(row) for row in job.quality)
        if job.quality is not None
        else None,
        links={"self": base, **{name: f"{base}/{name}" for name in names}},
    )
