"""The life of a job: its states and their moves, what it says of itself, how it ends.

Times are RFC 3339 UTC, durations seconds.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from quantry.base import Model
from quantry.contract import JobSpec
from quantry.reports import Manifest, QualityRow, Report


class State(StrEnum):
    """Where a job is. The moves between them are one table: `MOVES`."""

    QUEUED = "queued"
    PREPARING = "preparing"
    CALIBRATING = "calibrating"
    QUANTIZING = "quantizing"
    CORRECTING = "correcting"
    EVALUATING = "evaluating"
    PACKAGING = "packaging"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    EXPIRED = "expired"


RUNNING = (
    State.PREPARING,
    State.CALIBRATING,
    State.QUANTIZING,
    State.CORRECTING,
    State.EVALUATING,
    State.PACKAGING,
)
FINISHED = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REJECTED, State.EXPIRED)


def _moves() -> dict[State, frozenset[State]]:
    ends = {State.SUCCEEDED, State.REJECTED, State.FAILED, State.CANCELLING, State.CANCELLED, State.QUEUED}
    table: dict[State, frozenset[State]] = {
        State.QUEUED: frozenset({State.PREPARING, State.CANCELLED, State.EXPIRED, State.FAILED}),
        State.CANCELLING: frozenset({State.CANCELLED, State.FAILED}),
    }
    for index, state in enumerate(RUNNING):  # forward only; QUEUED again when a worker was lost
        table[state] = frozenset(ends | set(RUNNING[index + 1 :]))
    retry = frozenset({State.QUEUED})
    table.update({State.FAILED: retry, State.CANCELLED: retry, State.EXPIRED: retry, State.REJECTED: retry})
    table[State.SUCCEEDED] = frozenset()
    return table


MOVES: dict[State, frozenset[State]] = _moves()


class Progress(Model):
    """How far the present stage is, and how long it will still take at its present pace."""

    done: int = 0
    total: int = 0
    eta_s: float | None = None


class JobError(Model):
    """Why a job did not succeed. `type` is stable and short, such as `worker-lost` or `out-of-memory`."""

    type: str
    title: str
    detail: str
    retryable: bool = False


class JobRead(Model):
    """A job as the API shows it."""

    id: str
    state: State
    stage: str | None = None
    progress: Progress = Progress()
    attempt: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    spec: JobSpec
    labels: dict[str, str] = Field(default_factory=dict)
    error: JobError | None = None
    quality: tuple[QualityRow, ...] | None = None
    links: dict[str, str] = Field(default_factory=dict)


class JobPage(Model):
    """One page of a list; `next` is the cursor of the following page."""

    items: tuple[JobRead, ...]
    next: str | None = None


class Event(Model):
    """One thing that happened to a job. `kind`: state, progress, log, warning, block, epoch, result."""

    id: int
    at: datetime
    kind: str
    data: dict[str, Any]


class EventPage(Model):
    items: tuple[Event, ...]


class Attempt(Model):
    """One run of a job by a worker. `outcome`: running, succeeded, failed, cancelled, rejected, lost."""

    number: int
    worker: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    outcome: str | None = None
    detail: str | None = None


class AttemptPage(Model):
    items: tuple[Attempt, ...]


class Succeeded(Model):
    outcome: Literal["succeeded"] = "succeeded"
    report: Report
    manifest: Manifest


class Rejected(Model):
    """The artifact is whole, but missed the gate that the job set, or is of an epoch before its training diverged."""

    outcome: Literal["rejected"] = "rejected"
    report: Report
    manifest: Manifest
    reason: Literal["quality-gate", "training-diverged"] = "quality-gate"
    detail: str


class Failed(Model):
    outcome: Literal["failed"] = "failed"
    error: JobError


class Cancelled(Model):
    outcome: Literal["cancelled"] = "cancelled"


Outcome = Annotated[Succeeded | Rejected | Failed | Cancelled, Field(discriminator="outcome")]
