"""The life of a job as its worker sees it: claim, heartbeat, finish. What follows when the worker dies: `lapses.py`.

A claim is a lease with an epoch. Every later write carries the epoch as a fencing token: once the lease has
lapsed and the job was given to another worker, writes of the first are refused and change nothing.
Each function is one short transaction; `now` is for tests, as in `jobs.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from app.shared import database
from app.shared.database import transaction
from app.shared.lapses import HELD, MAX_ATTEMPTS, lapse
from app.shared.moves import append_events, close_attempt, move
from app.shared.tables import Dataset, Job, JobAttempt
from quantry.contract import DatasetRef, JobSpec
from quantry.jobs import (
    FINISHED,
    Cancelled,
    Failed,
    JobError,
    Outcome,
    Progress,
    Rejected,
    State,
    Succeeded,
)

LEASE = timedelta(seconds=60)

_REJECTED = {
    "quality-gate": "The result missed its quality gate",
    "training-diverged": "Training diverged; the result is of an epoch before",
}


class Signal(StrEnum):
    """What a worker has to do with the job it holds."""

    CONTINUE = "continue"
    CANCEL = "cancel"
    LOST = "lost"


@dataclass(frozen=True)
class Claim:
    """A job that was given to a worker. `uploads`: id of a text it names -> its blob's (sha256, suffix).

    start: the artifact of the job that training starts from, as `Job.artifact` names it.
    """

    job_id: str
    epoch: int
    worker: str
    spec: JobSpec
    uploads: Mapping[str, tuple[str, str]]
    start: str | None = None

    @property
    def conditions(self) -> tuple[ColumnElement[bool], ...]:
        """True of the row only as long as nobody has claimed the job since."""
        return (Job.epoch == self.epoch, Job.worker == self.worker)


@dataclass(frozen=True)
class Step:
    """Where a job is: its state, that state in words, and how far it is."""

    state: State
    stage: str
    progress: Progress


def claim(
    session: Session,
    job_id: str,
    *,
    worker: str,
    lease: timedelta = LEASE,
    max_attempts: int = MAX_ATTEMPTS,
    now: datetime | None = None,
) -> Claim | None:
    """Take the job if it is queued, or if its lease has lapsed; None if there is nothing to take.

    A message may come twice: the second finds nothing.
    """
    with transaction(session):
        now = now or database.now(session)
        lapse(session, [job_id], max_attempts, now)
        values = {
            "epoch": Job.epoch + 1,
            "tries": Job.tries + 1,
            "worker": worker,
            "lease_until": now + lease,
        }
        values |= {"started_at": func.coalesce(Job.started_at, now), "stage": None, "done": 0, "total": 0}
        alive = [Job.expires_at > now]
        job = move(session, job_id, [State.QUEUED], State.PREPARING, now=now, conditions=alive, values=values)
        if job is None:
            return None
        session.add(
            JobAttempt(job_id=job_id, number=job.epoch, worker=worker, started_at=now, outcome="running")
        )
        spec = JobSpec.model_validate(job.spec)
        uploads, start = _uploads(session, spec, job.owner), _start(session, spec, job.owner)
        return Claim(job_id, job.epoch, worker, spec, uploads, start)


def first_in_line(session: Session, *, now: datetime | None = None) -> str | None:
    """The queued job that was submitted first; a read that takes no lock."""
    with transaction(session, write=False):
        waits = (Job.state == State.QUEUED.value, Job.expires_at > (now or database.now(session)))
        return session.scalar(select(Job.id).where(*waits).order_by(Job.created_at, Job.id).limit(1))


def _uploads(session: Session, spec: JobSpec, owner: str) -> dict[str, tuple[str, str]]:
    texts: list[DatasetRef] = [spec.calibration.dataset]
    if spec.evaluation is not None:
        texts.append(spec.evaluation.dataset)
    ids = [text.id for text in texts if text.source == "upload"]
    if not ids:
        return {}
    rows = session.scalars(select(Dataset).where(Dataset.id.in_(ids), Dataset.owner == owner))
    return {row.id: (row.sha256, row.suffix) for row in rows}


def _start(session: Session, spec: JobSpec, owner: str) -> str | None:
    step = spec.training_step
    if step is None or not step.init.startswith("job_"):
        return None
    return session.scalar(select(Job.artifact).where(Job.id == step.init, Job.owner == owner))


def signal(session: Session, claim: Claim) -> Signal:
    """Whether the claim still holds and the job is still wanted; a read that takes no lock."""
    with transaction(session, write=False):
        state = session.scalar(select(Job.state).where(Job.id == claim.job_id, *claim.conditions))
    return _signal(state)


def _signal(state: str | None) -> Signal:
    if state is None or state not in HELD:
        return Signal.LOST
    return Signal.CANCEL if state == State.CANCELLING else Signal.CONTINUE


def heartbeat(
    session: Session,
    claim: Claim,
    *,
    step: Step | None = None,
    events: Sequence[tuple[str, Mapping[str, Any]]] = (),
    lease: timedelta = LEASE,
    now: datetime | None = None,
) -> Signal:
    """Renew the lease and store what is new: the step that the job is at, and events.

    Raises ForbiddenMove if the step goes back to an earlier state.
    """
    with transaction(session):
        now = now or database.now(session)
        job = _held(session, claim)
        if job is None:
            return Signal.LOST
        values: dict[str, Any] = {"lease_until": now + lease}
        if step is None or job.state == State.CANCELLING:
            _touch(session, claim, values)
        else:
            values |= _columns(step)
            if step.state == job.state:
                changed = any(getattr(job, name) != value for name, value in _columns(step).items())
                _touch(
                    session,
                    claim,
                    values | ({"version": Job.version + 1, "updated_at": now} if changed else {}),
                )
                events = [*events, ("progress", _shown(step))] if changed else events
            else:
                conditions = claim.conditions
                move(
                    session,
                    job.id,
                    [State(job.state)],
                    step.state,
                    now=now,
                    conditions=conditions,
                    values=values,
                    data=_shown(step),
                )
        append_events(session, job, events, now)
        return _signal(job.state)


def _held(session: Session, claim: Claim) -> Job | None:
    """The row under lock, or None if the claim is stale."""
    states = [state.value for state in HELD]
    query = select(Job).where(Job.id == claim.job_id, Job.state.in_(states), *claim.conditions)
    return session.scalars(query.with_for_update().execution_options(populate_existing=True)).one_or_none()


def _touch(session: Session, claim: Claim, values: Mapping[str, Any]) -> None:
    statement = update(Job).where(Job.id == claim.job_id, *claim.conditions).values(**values)
    session.execute(statement.execution_options(synchronize_session=False))


def _columns(step: Step) -> dict[str, Any]:
    progress = step.progress
    return {"stage": step.stage, "done": progress.done, "total": progress.total, "eta_s": progress.eta_s}


def _shown(step: Step) -> dict[str, Any]:
    return {"state": step.state.value, **_columns(step)}


def finish(
    session: Session,
    claim: Claim,
    outcome: Outcome,
    *,
    artifact: str | None = None,
    now: datetime | None = None,
) -> State | None:
    """Record how the job ended and return its final state; None if the claim is stale (nothing is written).

    Repeating it, say after a broken connection, changes nothing and returns the state that was recorded.
    A job that is being cancelled ends as cancelled, whatever the outcome. `artifact` is kept only by
    `succeeded` and `rejected`: with any other result the caller removes it.
    """
    with transaction(session):
        now = now or database.now(session)
        job = _held(session, claim)
        if job is None:
            return _recorded(session, claim)
        if job.state == State.CANCELLING:
            outcome = Cancelled()
        to, values, detail = _ending(outcome, artifact)
        conditions = claim.conditions
        move(session, job.id, [State(job.state)], to, now=now, conditions=conditions, values=values)
        if isinstance(outcome, Succeeded | Rejected):
            append_events(session, job, [("result", {"quality": values["quality"]})], now)
        close_attempt(session, job.id, claim.epoch, to.value, detail, now)
        return to


def _recorded(session: Session, claim: Claim) -> State | None:
    """How this very claim has ended already, or None if it has not."""
    states = [state.value for state in FINISHED]
    query = select(Job.state).where(Job.id == claim.job_id, Job.epoch == claim.epoch, Job.state.in_(states))
    state = session.scalar(query)
    return State(state) if state is not None else None


def _ending(outcome: Outcome, artifact: str | None) -> tuple[State, dict[str, Any], str | None]:
    """The final state, the columns that say more, and a line for the list of attempts."""
    match outcome:
        case Succeeded() | Rejected():
            if artifact is None:
                raise ValueError(f"a job that {outcome.outcome} has an artifact")
            # as JSON text, which has null for an infinite perplexity: PostgreSQL's JSON cannot hold that
            quality = [json.loads(row.model_dump_json()) for row in outcome.report.quality]
            values: dict[str, Any] = {"artifact": artifact, "quality": quality, "error": None}
            if isinstance(outcome, Succeeded):
                return State.SUCCEEDED, values, None
            error = JobError(type=outcome.reason, title=_REJECTED[outcome.reason], detail=outcome.detail)
            return State.REJECTED, values | {"error": error.model_dump(mode="json")}, outcome.detail
        case Failed(error=error):
            return State.FAILED, {"error": error.model_dump(mode="json")}, f"{error.type}: {error.detail}"
        case Cancelled():
            return State.CANCELLED, {"error": None}, None


def release(session: Session, claim: Claim, detail: str, *, now: datetime | None = None) -> State | None:
    """Give the job back unfinished, as a worker does that is told to stop. Not counted as a try."""
    with transaction(session):
        now = now or database.now(session)
        job = _held(session, claim)
        if job is None:
            return None
        to = State.CANCELLED if job.state == State.CANCELLING else State.QUEUED
        values = {"tries": Job.tries - 1} if to is State.QUEUED else {}
        conditions = claim.conditions
        move(session, job.id, [State(job.state)], to, now=now, conditions=conditions, values=values)
        close_attempt(
            session, job.id, claim.epoch, "lost" if to is State.QUEUED else "cancelled", detail, now
        )
        return to
