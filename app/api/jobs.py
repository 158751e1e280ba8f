"""Submit, list, read, cancel and retry jobs."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Annotated

from fastapi import Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.content import etag_matches
from app.api.deps import JobId, Reader, Services, ServicesDep, Writer
from app.api.negotiation import wait_seconds
from app.api.router import Router, problems
from app.api.watch import look
from app.intake.preparing import prepare
from app.shared import jobs
from app.shared.tables import Job
from quantry.jobs import JobPage, JobRead, State
from quantry.requests import JobRequest

router = Router(prefix="/v1/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="The same key with the same request makes one job, however often it is sent",
    ),
]
_REPLAYED = {"Idempotency-Replayed": "true"}
LabelFilter = Annotated[str, Query(max_length=127, pattern=r"^[A-Za-z0-9._-]{1,63}[:=][A-Za-z0-9._-]{1,63}$")]


@router.post("", status_code=202, response_model=JobRead, responses={**problems(_507="The disk is full")})
def create_job(
    request: JobRequest, services: ServicesDep, caller: Writer, idempotency_key: IdempotencyKey = None
) -> Response:
    """Check a job against its model and texts, and queue it. Poll the URL in `Location` for its progress.

    Takes the short form (`bits`, `method`, `correction`) or a full `recipe`; answers with the full form.
    """
    digest = _request_sha256(request)
    with services.sessions() as session:
        if idempotency_key is not None:
            job = jobs.repeated(session, owner=caller.owner, key=idempotency_key, request_sha256=digest)
            if job is not None:
                return _shown(job, 202, _REPLAYED)
        prepared = prepare(request.resolve(), services.settings, session=session, owner=caller.owner)
        job, new = jobs.submit(
            session,
            prepared.spec,
            owner=caller.owner,
            idempotency_key=idempotency_key,
            request_sha256=digest,
            max_unfinished=services.settings.max_unfinished_jobs,
        )
    return _shown(job, 202, {} if new else _REPLAYED)


@router.get("", response_model=JobPage)
def list_jobs(
    services: ServicesDep,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        str | None, Query(pattern=r"^job_[0-9a-f-]{36}$", description="`next` of the page before")
    ] = None,
    state: Annotated[list[State] | None, Query(max_length=13, description="one of these states")] = None,
    label: Annotated[
        list[LabelFilter] | None, Query(max_length=32, description="`name:value`; each must be there")
    ] = None,
) -> JobPage:
    """Jobs of the key's owner, newest first. Jobs that are added meanwhile shift no page."""
    labels = [(name, value) for name, value in (_label(text) for text in label or ())]
    with services.sessions() as session:
        found, following = jobs.page(
            session, owner=caller.owner, limit=limit, cursor=cursor, states=state or (), labels=labels
        )
    return JobPage(items=tuple(map(jobs.to_read, found)), next=following)


@router.get("/{job_id}", response_model=JobRead, responses={304: {"description": "Not modified"}})
async def read_job(
    caller: Reader,
    job_id: JobId,
    request: Request,
    services: ServicesDep,
    if_none_match: Annotated[str | None, Header(description="the ETag of the version you have")] = None,
    prefer: Annotated[str | None, Header(description="`wait=30`: answer only when there is news")] = None,
) -> Response:
    """A job as it is. `ETag` and `If-None-Match` make polling cheap: 304 as long as nothing changed.

    With `Prefer: wait=N` the answer waits up to N seconds (60 at most): for a change, if `If-None-Match`
    names the present version, else for the job to finish. Async, so that waiting holds no thread; each
    look at the database is a short transaction in a thread.
    """
    wait = wait_seconds(prefer)
    applied = {} if wait is None else {"Preference-Applied": f"wait={wait}"}
    deadline = time.monotonic() + (wait or 0)
    while True:
        found = await run_in_threadpool(look, services.sessions, job_id, caller.owner)
        unchanged = etag_matches(if_none_match, found.etag)
        news = found.finished or (if_none_match is not None and not unchanged)
        if news or not await services.watcher.wait(job_id, found.mark, deadline - time.monotonic()):
            break
    if unchanged:
        return Response(status_code=304, headers={**_validators(found.etag), **applied})
    return _shown(await run_in_threadpool(_load, services, job_id, caller.owner), 200, applied)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=JobRead,
    responses={**problems(_409="The job has finished")},
)
def cancel_job(caller: Writer, job_id: JobId, services: ServicesDep) -> Response:
    """Ask for the end of a job. A queued one is cancelled at once, a running one is `cancelling` first."""
    with services.sessions() as session:
        return _shown(jobs.cancel(session, job_id, owner=caller.owner), 202)


@router.post(
    "/{job_id}/retry",
    status_code=202,
    response_model=JobRead,
    responses={**problems(_409="The job has succeeded")},
)
def retry_job(caller: Writer, job_id: JobId, services: ServicesDep) -> Response:
    """Queue a job again that failed, expired, was cancelled or rejected. It goes on at its last block."""
    with services.sessions() as session:
        return _shown(jobs.retry(session, job_id, owner=caller.owner), 202)


def _load(services: Services, job_id: str, owner: str) -> Job:
    with services.sessions() as session:
        return jobs.get(session, job_id, owner=owner)


def _shown(job: Job, status: int, headers: dict[str, str] | None = None) -> Response:
    content = jobs.to_read(job).model_dump_json()
    place = {"Location": f"/v1/jobs/{job.id}"} if status == 202 else {}
    sent = {**_validators(jobs.etag(job)), **place, **(headers or {})}
    return Response(content, status, sent, "application/json")


def _validators(etag: str) -> dict[str, str]:
    return {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Authorization, X-API-Key"}


def _request_sha256(request: JobRequest) -> str:
    """Digest of what was asked, before branches become commits: the same request stays the same later."""
    canonical = json.dumps(request.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _label(text: str) -> tuple[str, str]:
    separator = ":" if ":" in text else "="
    name, _, value = text.partition(separator)
    return name, value
