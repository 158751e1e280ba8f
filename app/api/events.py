"""What happened to a job: as a stream of server-sent events, as a list, or its log lines as text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.api.deps import JobId, Reader, Services, ServicesDep
from app.api.negotiation import choose
from app.api.router import Router, problems
from app.api.watch import Mark
from app.shared import jobs
from quantry.jobs import FINISHED, Event, EventPage

router = Router(prefix="/v1/jobs/{job_id}", tags=["jobs"])

HEARTBEAT_S = 15.0
_BATCH = 500
_LONGEST_LIST = 10_000
_JSON, _STREAM = "application/json", "text/event-stream"
LastEventId = Annotated[
    str | None,
    Header(description="replay what came after this event", pattern=r"^\d{1,18}$", alias="Last-Event-ID"),
]
After = Annotated[int | None, Query(ge=0, le=10**18, description="as Last-Event-ID, for a first request")]


@router.get(
    "/events",
    response_model=EventPage,
    responses={
        200: {
            "content": {_STREAM: {"schema": {"type": "string"}}},
            "description": "the events, or their stream",
        },
        **problems(_406="Neither JSON nor an event stream is accepted"),
    },
)
async def read_events(
    caller: Reader,
    job_id: JobId,
    request: Request,
    services: ServicesDep,
    last_event_id: LastEventId = None,
    after: After = None,
    limit: Annotated[
        int, Query(ge=1, le=_LONGEST_LIST, description="of the list; a stream has none")
    ] = _LONGEST_LIST,
) -> Response:
    """Events of a job in order, after the one named by `Last-Event-ID` (or `after`).

    With `Accept: text/event-stream` a stream that replays what was missed and goes on until the job has
    finished: `id` counts 1, 2, ... within the job, `event` is the kind, `data` the event as in the list.
    """
    start = int(last_event_id) if last_event_id is not None else after or 0
    headers = {"Cache-Control": "no-cache", "Vary": "Accept"}
    if choose(request.headers.get("accept"), (_JSON, _STREAM)) == _JSON:
        found = await run_in_threadpool(_list, services, job_id, caller.owner, start, limit)
        return Response(EventPage(items=tuple(found)).model_dump_json(), 200, headers, _JSON)
    await run_in_threadpool(_list, services, job_id, caller.owner, start, 1)  # 404 before the stream begins
    stream = _stream(services, job_id, caller.owner, start)
    if request.scope.get("quantry.head"):
        return Response(status_code=200, headers=headers, media_type=_STREAM)
    return StreamingResponse(stream, 200, {**headers, "X-Accel-Buffering": "no"}, _STREAM)


@router.get(
    "/logs",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}, "description": "log lines and warnings"}},
)
def read_logs(caller: Reader, job_id: JobId, services: ServicesDep) -> PlainTextResponse:
    """The log lines and warnings of all attempts as text, one a line: time, kind, message."""
    lines, after = [], 0
    while batch := _list(services, job_id, caller.owner, after, _BATCH):
        after = batch[-1].id
        lines += [_lines(event) for event in batch if event.kind in ("log", "warning")]
    return PlainTextResponse("".join(lines))


async def _stream(services: Services, job_id: str, owner: str, after: int) -> AsyncIterator[bytes]:
    """Messages until the job has finished; while nothing happens, a comment keeps the connection alive."""
    while not services.watcher.closed:
        mark, finished, batch = await run_in_threadpool(_look, services, job_id, owner, after)
        for event in batch:
            after = event.id
            yield _message(event)
        if len(batch) == _BATCH:
            continue
        if finished:
            return
        if not await services.watcher.wait(job_id, mark, HEARTBEAT_S):
            yield b": keep-alive\n\n"


def _look(services: Services, job_id: str, owner: str, after: int) -> tuple[Mark, bool, list[Event]]:
    """The job first, then its events: whatever the job had done when it was read is among them."""
    with services.sessions() as session:
        job = jobs.get(session, job_id, owner=owner)
        mark, finished = Mark.of(job), job.state in FINISHED
        return mark, finished, jobs.events(session, job_id, owner=owner, after=after, limit=_BATCH)


def _list(services: Services, job_id: str, owner: str, after: int, limit: int) -> list[Event]:
    with services.sessions() as session:
        return jobs.events(session, job_id, owner=owner, after=after, limit=limit)


def _message(event: Event) -> bytes:
    """JSON has no raw line break, so the data is one line."""
    return f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()


def _lines(event: Event) -> str:
    """The event's message, or the end of the log of a process that failed: each line with time and kind."""
    text = event.data.get("message", event.data.get("tail"))
    if not isinstance(text, str):
        text = json.dumps(event.data, ensure_ascii=False)
    begin = f"{event.at.isoformat(timespec='milliseconds')} {event.kind:<7} "
    return "".join(f"{begin}{line}\n" for line in text.splitlines())
