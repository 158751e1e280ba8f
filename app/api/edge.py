"""The outermost layer: body limits, HEAD, request ids, security headers, access log and request metrics.

Plain ASGI, because it sees every request and streams must pass through it untouched.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import TITLES, problem

MAX_BODY_BYTES = 1 << 20
_DRAIN_BYTES = 64 << 20  # refused bodies up to this size are read and dropped, so that the answer arrives
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_log = structlog.get_logger("quantry.access")
Observe = Callable[[str, str, int, float], None]


class Edge:
    """Wraps the app.

    limit: from method and path to the most bytes a body may have. observe: called after each request
    with method, route, status and seconds.
    """

    def __init__(self, app: ASGIApp, *, limit: Callable[[str, str], int], observe: Observe) -> None:
        self.app = app
        self.limit = limit
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Exchange(scope, receive, send, self.limit(scope["method"], scope["path"]))
        started = time.perf_counter()
        try:
            if request.declared > request.limit:
                await request.refuse()
            else:
                await self.app(request.scope, request.receive, request.send)
        except Exception:
            request.status = 500
            raise
        finally:
            self._record(request, time.perf_counter() - started)

    def _record(self, request: _Exchange, seconds: float) -> None:
        """One line a request: path without query, never a header, so never a key."""
        route = getattr(request.scope.get("route"), "path", "unmatched")
        self.observe(request.method, route, request.status, seconds)
        _log.info(
            "request",
            request_id=request.id,
            method=request.method,
            path=request.scope["path"],
            status=request.status,
            ms=round(1000 * seconds, 2),
            bytes=request.sent,
            key=request.scope.get("quantry.key_id"),
            client=(request.scope.get("client") or [None])[0],
        )


class _Exchange:
    """One request and its response, watched from outside."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        headers = Headers(scope=scope)
        wished = headers.get("x-request-id", "")
        self.id = wished if _REQUEST_ID.fullmatch(wished) else uuid.uuid4().hex
        self.method: str = scope["method"]
        self.head = self.method == "HEAD"
        self.scope: dict[str, Any] = dict(scope)
        if self.head:  # answered as GET, without a byte of the body
            self.scope |= {"method": "GET", "quantry.head": True}
        length = headers.get("content-length", "")
        self.declared = int(length) if length.isdecimal() else 0
        self.expects = "expect" in headers
        self.limit = limit
        self.received = 0
        self.sent = 0
        self.status = 0
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            if self.received > self.limit:
                raise HTTPException(413, _limit_text(self.limit))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._complete(MutableHeaders(raw=message.setdefault("headers", [])))
        elif message["type"] == "http.response.body":
            if self.head:
                message = {**message, "body": b""}
            self.sent += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self) -> None:
        """Answer 413 to a body that is declared too large, having kept none of it."""
        if self.declared <= _DRAIN_BYTES and not self.expects:
            more = True
            while more:
                message = await self._receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
        response = too_large(self.limit, self.scope["path"])
        await response(self.scope, self._receive, self.send)

    def _complete(self, headers: MutableHeaders) -> None:
        headers["X-Request-Id"] = self.id
        headers.setdefault("X-Content-Type-Options", "nosniff")
        if self.received > self.limit:
            headers["Connection"] = "close"
        if headers.get("content-type", "").startswith("text/html"):
            headers.setdefault("Content-Security-Policy", _PAGE_POLICY)
            headers.setdefault("Referrer-Policy", "same-origin")
            headers.setdefault("X-Frame-Options", "DENY")


def too_large(limit: int, path: str) -> Any:
    """The problem for a body over the limit; the connection is closed after it."""
    status, title = TITLES["content-too-large"]
    detail = _limit_text(limit)
    return problem(status, "content-too-large", title, detail, instance=path, headers={"Connection": "close"})


def _limit_text(limit: int) -> str:
    return f"the body may have {limit} bytes here"
