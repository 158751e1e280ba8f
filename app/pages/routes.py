"""The pages. Each reads or changes through the functions that the API uses."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app import uploads
from app.api import results
from app.api.deps import JobId, Services, ServicesDep
from app.api.estimates import create_estimate
from app.api.jobs import create_job
from app.api.methods import METHODS
from app.api.watch import Mark
from app.pages.forms import DEFAULTS, FormError, request_of
from app.pages.login import Author, Fields, Viewer, safe_next, sign_in, sign_out
from app.pages.rendering import HEADERS, STATIC, TYPES, PageRoute, fragment, page, refusal
from app.security import Caller, verify_key
from app.shared import jobs
from app.shared.errors import KeyRefused, NotFound, ServiceError
from quantry.base import SpecError
from quantry.bundled import BUNDLED_IMAGES, BUNDLED_MODELS, BUNDLED_TEXTS
from quantry.diffusion import PIPELINES
from quantry.families import FAMILIES
from quantry.jobs import FINISHED, JobRead
from quantry.reports import Estimate, Manifest
from quantry.wording import METHODS as NAMES

router = APIRouter(route_class=PageRoute, include_in_schema=False)
PAGE_SIZE = 25
HEARTBEAT_S = 15.0


@router.get("/login")
def show_login(next: Annotated[str | None, Query(max_length=512)] = None) -> Response:
    return page("login.html", {"next": safe_next(next), "refused": None})


@router.post("/login")
def log_in(request: Request, services: ServicesDep, fields: Fields) -> Response:
    """Check the key and keep it in a cookie."""
    key, wanted = fields.get("key", "").strip(), safe_next(fields.get("next"))
    try:
        with services.sessions() as session:
            verify_key(session, key)
    except KeyRefused as error:
        return page("login.html", {"next": wanted, "refused": str(error)}, 401)
    response = RedirectResponse(wanted, 303, HEADERS)
    sign_in(response, key, secure=request.url.scheme == "https")
    return response


@router.post("/logout")
def log_out(fields: Fields) -> Response:
    response = RedirectResponse("/login", 303, HEADERS)
    sign_out(response)
    return response


@router.get("/")
def index(
    services: ServicesDep, caller: Viewer, cursor: Annotated[str | None, Query(max_length=64)] = None
) -> Response:
    """The submit form and the jobs, newest first."""
    return _index(services, caller, cursor=cursor)


@router.post("/")
def submit(services: ServicesDep, caller: Author, fields: Fields) -> Response:
    """Submit the form, or answer it with a dry run; a form that is wrong comes back as it was."""
    try:
        request = request_of(fields)
        if fields.get("action") == "estimate":
            planned = create_estimate(request=request, services=services, caller=caller)
            return _index(services, caller, typed=fields, estimate=planned)
        token = fields.get("token", "")[:64]
        key = f"page-{token}" if token.isalnum() else None
        created = create_job(request=request, services=services, caller=caller, idempotency_key=key)
    except FormError as error:
        return _index(services, caller, typed=fields, wrong=error.lines, status=422)
    except (ServiceError, SpecError) as error:
        status, title, detail = refusal(error)
        return _index(services, caller, typed=fields, wrong=[f"{title}: {detail}"], status=status)
    return RedirectResponse(f"/jobs/{created.headers['Location'].rpartition('/')[2]}", 303, HEADERS)


@router.get("/jobs/{job_id}")
def show_job(job_id: JobId, services: ServicesDep, caller: Viewer) -> Response:
    """One job: how far it is, what came of it, its files."""
    job = _read(services, job_id, caller.owner)
    return page("job.html", _shown(services, job, caller))


@router.get("/jobs/{job_id}/live")
async def follow_job(job_id: JobId, services: ServicesDep, caller: Viewer) -> Response:
    """The changing part of the page, as an event stream: anew whenever the job has changed."""
    await run_in_threadpool(_read, services, job_id, caller.owner)
    headers = {**HEADERS, "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(services, job_id, caller), 200, headers, "text/event-stream")


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: JobId, services: ServicesDep, caller: Author, fields: Fields) -> Response:
    with services.sessions() as session:
        jobs.cancel(session, job_id, owner=caller.owner)
    return RedirectResponse(f"/jobs/{job_id}", 303, HEADERS)


@router.post("/jobs/{job_id}/retry")
def retry_job(job_id: JobId, services: ServicesDep, caller: Author, fields: Fields) -> Response:
    with services.sessions() as session:
        jobs.retry(session, job_id, owner=caller.owner)
    return RedirectResponse(f"/jobs/{job_id}", 303, HEADERS)


@router.get("/jobs/{job_id}/report")
def show_report(job_id: JobId, services: ServicesDep, caller: Viewer) -> Response:
    return results.read_report_page(job_id=job_id, services=services, caller=caller)


@router.get("/jobs/{job_id}/files/{path:path}")
def download_file(job_id: JobId, path: str, services: ServicesDep, caller: Viewer) -> Response:
    return results.download_file(job_id=job_id, path=path, services=services, caller=caller)


@router.get("/jobs/{job_id}/checkpoint")
def download_checkpoint(job_id: JobId, services: ServicesDep, caller: Viewer) -> Response:
    return results.download_checkpoint(job_id=job_id, services=services, caller=caller)


@router.get("/static/{name}")
def static_file(name: str) -> Response:
    """A style sheet or a script of ours. Needs no key: they are the same for everybody."""
    path = STATIC.get(name)
    if path is None or path.suffix not in TYPES:
        raise NotFound(f"there is no file {name!r}")
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return FileResponse(path, media_type=TYPES[path.suffix], headers=headers)


def _index(
    services: Services,
    caller: Caller,
    *,
    cursor: str | None = None,
    typed: dict[str, str] | None = None,
    wrong: list[str] | None = None,
    estimate: Estimate | None = None,
    status: int = 200,
) -> Response:
    with services.sessions() as session:
        found, following = jobs.page(session, owner=caller.owner, limit=PAGE_SIZE, cursor=cursor)
    with services.sessions() as session:
        uploaded = uploads.list_datasets(session, owner=caller.owner)
    values = {
        "jobs": [jobs.to_read(job) for job in found],
        "following": following,
        "first": cursor is None,
        "form": {**DEFAULTS, **(typed or {})},
        "token": uuid.uuid4().hex,
        "wrong": wrong or [],
        "estimate": estimate,
        "models": sorted(BUNDLED_MODELS),
        "methods": _choices("weights", "activations", "training"),
        "corrections": [*_choices("correction"), ("", "none")],
        "datasets": [
            *((name, name) for name in sorted({*BUNDLED_TEXTS, *BUNDLED_IMAGES})),
            *((dataset.id, dataset.name) for dataset in uploaded),
        ],
    }
    return page("index.html", values, status)


def _choices(*roles: str) -> list[tuple[str, str]]:
    """The methods of these roles for the form, with a word on those that no language model can take."""
    return [
        (
            info.method,
            NAMES[info.method].name + _limits(set(info.families)),
        )
        for info in METHODS.items
        if info.role in roles
    ]


def _limits(families: set[str]) -> str:
    """A word on methods that no language model can take."""
    if families & set(FAMILIES):
        return ""
    return " (diffusion)" if families <= set(PIPELINES) else " (image classifiers)"


def _read(services: Services, job_id: str, owner: str) -> JobRead:
    with services.sessions() as session:
        return jobs.to_read(jobs.get(session, job_id, owner=owner))


def _shown(services: Services, job: JobRead, caller: Caller) -> dict[str, object]:
    manifest: Manifest | None = None
    if "files" in job.links:
        manifest = results.list_files(job_id=job.id, services=services, caller=caller)
    with services.sessions() as session:
        attempts = jobs.attempts(session, job.id, owner=caller.owner)
    return {"job": job, "manifest": manifest, "attempts": attempts}


async def _stream(services: Services, job_id: str, caller: Caller) -> AsyncIterator[str]:
    """The fragment now and after each change; `done` when the job has finished."""
    while not services.watcher.closed:
        mark, shown = await run_in_threadpool(_look, services, job_id, caller)
        html = fragment("job_live.html", shown)
        yield "".join(f"data: {line}\n" for line in html.splitlines() if line) + "\n"
        job = shown["job"]
        if isinstance(job, JobRead) and job.state in FINISHED:
            yield "event: done\ndata: done\n\n"
            return
        while not await services.watcher.wait(job_id, mark, HEARTBEAT_S):
            if services.watcher.closed:
                return
            yield ": keep-alive\n\n"


def _look(services: Services, job_id: str, caller: Caller) -> tuple[Mark, dict[str, object]]:
    with services.sessions() as session:
        row = jobs.get(session, job_id, owner=caller.owner)
        mark, job = Mark.of(row), jobs.to_read(row)
    return mark, _shown(services, job, caller)
