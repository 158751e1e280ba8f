"""From errors to RFC 9457 problem details: every failure of the API leaves through here.

A problem's `type` is a reference below /problems/, where its meaning can be read; its last part is short,
stable, and what programs branch on.
"""

from __future__ import annotations

import errno
import http
import json
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from sqlalchemy.exc import OperationalError, TimeoutError
from starlette.exceptions import HTTPException

from app.api.unknown_fields import unknown_field
from app.contents import UploadRefused
from app.intake.errors import HubUnreachable, InputRefused
from app.shared import errors
from quantry.base import SpecError

MEDIA_TYPE = "application/problem+json"
PROBLEMS = "/problems/"
_POSTGRESQL_DISK_FULL = "53100"
_log = structlog.get_logger("quantry.api")


class ProblemError(Exception):
    """A problem that only HTTP knows, such as an unsupported media type."""

    def __init__(
        self, status: int, type: str, detail: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.type = type
        self.detail = detail
        self.headers = dict(headers or {})


STATUS: dict[type[Exception], int] = {
    errors.BadCursor: 422,
    errors.KeyRefused: 401,
    errors.ScopeMissing: 403,
    errors.NotFound: 404,
    errors.IdempotencyConflict: 422,  # as draft-ietf-httpapi-idempotency-key-header says
    errors.Conflict: 409,
    errors.QueueFull: 429,
    InputRefused: 422,
    UploadRefused: 422,
    HubUnreachable: 503,
}
"""The status of each error of the service; the nearest base class decides."""

TITLES: dict[str, tuple[int, str]] = {
    "invalid-body": (400, "The body cannot be read"),
    "not-found": (404, "No such resource"),
    "method-not-allowed": (405, "The resource does not support this method"),
    "not-acceptable": (406, "The resource has no such representation"),
    "content-too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "The body has the wrong media type"),
    "range-not-satisfiable": (416, "The range lies beyond the end"),
    "invalid-request": (422, "A field of the request is wrong"),
    "internal-error": (500, "The server failed"),
    "artifact-damaged": (500, "A file of the result is damaged"),
    "not-ready": (503, "The server is not ready"),
    "database-unavailable": (503, "The database did not answer"),
    "disk-full": (507, "The disk of the server is full"),
}
"""Problems that are not an error class of the service: type -> status, title."""

_RETRY_AFTER_S = {429: "10", 503: "5"}
_RETRYABLE = (429, 503, 507)


def problem(
    status: int,
    type: str,
    title: str,
    detail: str | None = None,
    *,
    instance: str | None = None,
    errors: Sequence[Mapping[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem response; it is never cached, and says when to come back if that makes sense."""
    body: dict[str, Any] = {"type": PROBLEMS + type, "title": title, "status": status}
    if detail:
        body["detail"] = detail
    if instance:
        body["instance"] = instance
    if errors:
        body["errors"] = list(errors)
    if status in _RETRYABLE:
        body["retryable"] = True
    sent = {"Cache-Control": "no-store", **(headers or {})}
    if status in _RETRY_AFTER_S:
        sent.setdefault("Retry-After", _RETRY_AFTER_S[status])
    content = json.dumps(body, ensure_ascii=False).encode("utf-8", errors="replace")
    return Response(content, status, sent, MEDIA_TYPE)


def register(app: FastAPI, allowed: Callable[[str], Sequence[str]]) -> None:
    """Route every exception to its problem. `allowed`: the methods that a path supports."""

    async def http_error(request: Request, error: HTTPException) -> Response:
        return _http_problem(request, error, allowed)

    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        HTTPException: http_error,
        RequestValidationError: _invalid_request,
        ResponseValidationError: _internal,
        SpecError: _spec_error,
        ProblemError: _problem_error,
        errors.ServiceError: _service_error,
        OperationalError: _database,
        TimeoutError: _database,
        OSError: _operating_system,
        Exception: _internal,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def field_error(parts: Sequence[str], detail: str) -> dict[str, str]:
    """One wrong field: its dotted path, the same as a JSON pointer (RFC 6901), and what is wrong."""
    pointer = "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
    return {"path": ".".join(parts), "pointer": "#" + pointer, "detail": detail}


async def _spec_error(request: Request, error: SpecError) -> Response:
    detail = f"{error.path}: {error.detail}"
    return _titled(
        "invalid-request", detail, request, errors=[field_error(error.path.split("."), error.detail)]
    )


async def _problem_error(request: Request, error: ProblemError) -> Response:
    title = TITLES[error.type][1]
    return problem(
        error.status, error.type, title, error.detail, instance=request.url.path, headers=error.headers
    )


async def _service_error(request: Request, error: errors.ServiceError) -> Response:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), None)
    if status is None:
        return await _internal(request, error)
    headers = {"WWW-Authenticate": 'Bearer realm="quantry"'} if status == 401 else {}
    path = getattr(error, "path", None)
    fields = [field_error(path.split("."), str(error))] if path else None
    detail = f"{path}: {error}" if path else str(error)
    return problem(
        status, error.type, error.title, detail, instance=request.url.path, errors=fields, headers=headers
    )


async def _invalid_request(request: Request, error: RequestValidationError) -> Response:
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        reason = found[0].get("ctx", {}).get("error", "")
        return _titled(
            "invalid-body", f"not valid JSON at character {found[0]['loc'][-1]}: {reason}", request
        )
    fields = _innermost([_field(entry, error.body) for entry in found])
    first = f"{fields[0]['path']}: {fields[0]['detail']}" if fields[0]["path"] else fields[0]["detail"]
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    return _titled("invalid-request", first + more, request, errors=fields)


def _http_problem(
    request: Request, error: HTTPException, allowed: Callable[[str], Sequence[str]]
) -> Response:
    if error.status_code == 404:
        return _titled("not-found", f"there is nothing at {request.url.path}", request)
    if error.status_code == 405:
        methods = ", ".join(allowed(request.url.path))
        detail = f"{request.method} is not allowed here; allowed: {methods}"
        return _titled("method-not-allowed", detail, request, headers={"Allow": methods})
    if error.status_code == 400:
        return _titled("invalid-body", "the body is not JSON in UTF-8", request)
    if error.status_code == 413:
        return _titled("content-too-large", error.detail, request, headers={"Connection": "close"})
    title = http.HTTPStatus(error.status_code).phrase
    return problem(error.status_code, "http-error", title, str(error.detail), headers=error.headers)


async def _database(request: Request, error: Exception) -> Response:
    cause = getattr(error, "orig", None) or error
    _log.error("database unavailable", path=request.url.path, error=f"{type(cause).__name__}: {cause}")
    full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if full or getattr(cause, "sqlstate", None) == _POSTGRESQL_DISK_FULL:
        return _disk_full(request)
    return _titled("database-unavailable", "try again in a few seconds", request)


async def _operating_system(request: Request, error: OSError) -> Response:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(request)
    return await _internal(request, error)


def _disk_full(request: Request) -> Response:
    return _titled("disk-full", "nothing of the request was kept; tell whoever runs the server", request)


async def _internal(request: Request, error: Exception) -> Response:
    _log.error("request failed", path=request.url.path, exc_info=error)
    return _titled("internal-error", "the fault is ours, and it is in the server's log", request)


def _titled(
    type: str,
    detail: str,
    request: Request,
    *,
    errors: Sequence[Mapping[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    status, title = TITLES[type]
    return problem(status, type, title, detail, instance=request.url.path, errors=errors, headers=headers)


def _field(entry: Mapping[str, Any], body: Any) -> dict[str, str]:
    """A validation error of pydantic as one of ours; the tags of unions are left out of its path."""
    place, *parts = entry["loc"]
    cause = entry.get("ctx", {}).get("error")
    detail = str(cause) if isinstance(cause, ValueError) else str(entry["msg"])
    if place != "body":
        return {"path": str(parts[0] if parts else place), "in": str(place), "detail": detail}
    if entry["type"] == "extra_forbidden":
        detail = unknown_field(str(parts[-1]))
    return field_error(_body_path(parts, body), detail)


def _innermost(fields: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """One error a field: of a union only what is wrong inside the member that came nearest."""
    kept: dict[str, dict[str, str]] = {}
    for field in fields:
        inner = any(other["path"].startswith(field["path"] + ".") for other in fields)
        if not inner:
            kept.setdefault(field["path"], field)
    return list(kept.values())


def _body_path(parts: Sequence[str | int], body: Any) -> list[str]:
    """The parts that are fields or indices of the body that came; a missing field is the last part."""
    path: list[str] = []
    for position, part in enumerate(parts):
        if part in (body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()):
            body = body[part]
        elif not (isinstance(body, dict) and position == len(parts) - 1 and _is_field(part, body)):
            continue
        path.append(str(part))
    return path


def _is_field(part: str | int, body: Mapping[str, Any]) -> bool:
    """Not the tag of the union member that the object was taken for (`gptq`, `ModelRef`)."""
    return isinstance(part, str) and part.isidentifier() and part.islower() and part != body.get("method")
