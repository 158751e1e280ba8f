"""Follow a job: its events as they happen, or its changes by long polls where events do not come through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import quote

import httpx2
from pydantic import ValidationError

from quantry.client.connection import Connection, backoff_s
from quantry.client.errors import ProblemError, QuantryError, WaitTimeout
from quantry.client.sse import Message, decode
from quantry.jobs import FINISHED, Event, EventPage, JobRead

KEEP_ALIVE_S = 60.0  # a stream that is silent for longer is taken for dead
LONG_POLL_S = 20  # what `Prefer: wait` asks for
PATIENCE_S = 120.0  # how long a server may be away while a job is followed


class StreamUnavailable(QuantryError):
    """Something between here and the server does not let an event stream through."""


def job_path(job: str, *parts: str) -> str:
    return "/".join(["/v1/jobs", quote(job, safe=""), *(quote(part) for part in parts)])


def list_events(connection: Connection, job: str, after: int) -> tuple[Event, ...]:
    """All events after number `after`; the server gives them out in pages."""
    found: list[Event] = []
    while True:
        response = connection.request("GET", job_path(job, "events"), headers=_after(after))
        page = EventPage.model_validate_json(response.content).items
        if not page:
            return tuple(found)
        found += page
        after = page[-1].id


def follow(
    connection: Connection, job: str, after: int, deadline: float | None = None
) -> Iterator[Event | None]:
    """Yield the events with an id above `after`, each once, until the job has finished.

    None comes between them whenever the stream is only alive, and at the deadline (of time.monotonic). A
    broken stream is taken up again behind the last event seen. Raises ConnectionFailed when the server stays
    away for PATIENCE_S, StreamUnavailable when it answers with something else than an event stream.
    """
    attempt, lost_since = 0, None
    while True:
        try:
            for message in _messages(connection, job, after, deadline):
                attempt, lost_since = 0, None
                event = _event(message) if message else None
                if event is None:
                    yield None
                elif event.id > after:
                    after = event.id
                    yield event
            if _finished(connection, job):  # what a cut stream may have kept from us
                yield from list_events(connection, job, after)
                return
        except httpx2.TransportError as error:
            if deadline is not None and time.monotonic() >= deadline:
                yield None
                return
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > PATIENCE_S:
                raise connection.failed(error) from error
        except ProblemError as error:
            if error.status < 500:
                raise
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > PATIENCE_S:
                raise
        attempt += 1
        yield None
        time.sleep(backoff_s(attempt, longest=5.0))


def poll(
    connection: Connection, job: str, etag: str | None, wait_s: float
) -> tuple[JobRead | None, str | None]:
    """The job if it differs from `etag`, waiting up to `wait_s` for that on the server; and its ETag."""
    headers = {"If-None-Match": etag} if etag else {}
    if wait_s >= 1:
        headers["Prefer"] = f"wait={int(wait_s)}"
    response = connection.request("GET", job_path(job), headers=headers, extra_s=wait_s)
    if response.status_code == 304:
        return None, etag
    return JobRead.model_validate_json(response.content), response.headers.get("ETag")


def watch(connection: Connection, job: str, timeout: float | None) -> Iterator[JobRead]:
    """Yield the job now and after each change, the finished one last.

    An event is only a doorbell: what is shown is always read afresh. Raises WaitTimeout.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    before = list_events(connection, job, 0)
    shown, etag = poll(connection, job, None, 0)
    assert shown is not None  # no ETag was sent, so there is no 304
    yield shown
    try:
        if shown.state not in FINISHED:
            for event in follow(connection, job, before[-1].id if before else 0, deadline):
                _left_s(deadline, shown)
                if event is None:
                    continue
                fresh, etag = poll(connection, job, etag, 0)
                if fresh is not None:
                    shown = fresh
                    yield shown
                    if shown.state in FINISHED:
                        return
    except StreamUnavailable:
        pass  # long polls tell the same, a little later
    while shown.state not in FINISHED:
        wait_s = min(LONG_POLL_S, _left_s(deadline, shown))
        asked = time.monotonic()
        fresh, etag = poll(connection, job, etag, wait_s)
        if fresh is not None:
            shown = fresh
            yield shown
        elif time.monotonic() - asked < 0.5:  # the server did not wait: do it here
            time.sleep(min(0.5, wait_s))


def _left_s(deadline: float | None, job: JobRead) -> float:
    """Seconds to the deadline. Raises WaitTimeout behind it."""
    left = float("inf") if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise WaitTimeout(f"{job.id} is still {job.state.value}; it goes on, wait for it again or cancel it")
    return left


def _messages(
    connection: Connection, job: str, after: int, deadline: float | None
) -> Iterator[Message | None]:
    left = KEEP_ALIVE_S if deadline is None else max(0.01, deadline - time.monotonic())
    headers = {**_after(after), "Accept": "text/event-stream", "Cache-Control": "no-store"}
    with connection.stream(
        job_path(job, "events"), headers=headers, read_s=min(KEEP_ALIVE_S, left)
    ) as response:
        kind = response.headers.get("Content-Type", "")
        if not kind.startswith("text/event-stream"):
            raise StreamUnavailable(
                f"{response.url} answered with {kind or 'no type'}, not with an event stream"
            )
        yield from decode(response.iter_bytes())


def _event(message: Message) -> Event | None:
    """The event in a message; None for what a newer server may send beside events."""
    try:
        return Event.model_validate_json(message.data)
    except ValidationError:
        return None


def _after(event: int) -> dict[str, str]:
    return {"Last-Event-ID": str(event)} if event else {}


def _finished(connection: Connection, job: str) -> bool:
    fresh, _ = poll(connection, job, None, 0)
    return fresh is not None and fresh.state in FINISHED
