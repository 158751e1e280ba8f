"""What can be wrong with a request to the service. `app.api.errors` maps each to an HTTP status."""

from __future__ import annotations


class ServiceError(Exception):
    """Base. `type` is stable and short; the message is written for the user."""

    type = "service-error"
    title = "The request could not be served"


class NotFound(ServiceError):
    type = "not-found"
    title = "No such resource"


class JobNotFound(NotFound):
    """No such job, or it belongs to somebody else."""

    type = "job-not-found"
    title = "No such job"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}")


class Conflict(ServiceError):
    type = "conflict"
    title = "The request does not fit the present state"


class JobFinished(Conflict):
    """The job has ended, so it can no longer be cancelled."""

    type = "job-finished"
    title = "The job has already finished"


class JobNotFinished(Conflict):
    """The job has no result yet."""

    type = "job-not-finished"
    title = "The job has not finished"


class JobNotRetryable(Conflict):
    """A job that succeeded is not run again: submit a new one."""

    type = "job-not-retryable"
    title = "The job cannot be retried"


class IdempotencyConflict(Conflict):
    """The same Idempotency-Key came with another request."""

    type = "idempotency-conflict"
    title = "The idempotency key was used for a different request"


class QueueFull(ServiceError):
    """The owner has as many unfinished jobs as the server allows."""

    type = "queue-full"
    title = "Too many unfinished jobs"


class BadCursor(ServiceError):
    """The `cursor` of a list is none that the server gave out."""

    type = "bad-cursor"
    title = "The cursor is not valid"


class KeyRefused(ServiceError):
    """No API key, or one that is unknown, revoked or expired."""

    type = "key-refused"
    title = "The API key is not valid"


class ScopeMissing(ServiceError):
    """The API key is valid but may not do this."""

    type = "scope-missing"
    title = "The API key does not allow this"


class ForbiddenMove(ServiceError):
    """A move between states that the contract's table does not have: a fault of ours, never of the user."""

    type = "forbidden-move"
    title = "The job cannot move between these states"


class StartError(ServiceError):
    """A process of the service cannot start here; the message says what to change."""

    type = "start-refused"
    title = "The service cannot start"
