"""Send bytes that lie in files: whole, in ranges, or several files as one tar; a chunk in memory at a time.

A `Source` is a sequence of parts, each bytes or a file. So a tar archive is a source too: its headers are
bytes, its members files, its length is known before the first byte, and it can be resumed like a file.
"""

from __future__ import annotations

import base64
import os
import secrets
import tarfile
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api import ranges
from app.api.errors import TITLES, problem

CHUNK_BYTES = 1 << 20
_TAR_BLOCK = 512


@dataclass(frozen=True)
class FilePart:
    """A file and the size it has."""

    path: Path
    size: int

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Source:
    """What a response is made of."""

    parts: tuple[bytes | FilePart, ...]

    @cached_property
    def length(self) -> int:
        return sum(len(part) for part in self.parts)

    def slices(self, span: ranges.Span) -> Iterable[tuple[bytes | FilePart, int, int]]:
        """The parts that a span touches, each with where to start and stop in it."""
        offset = 0
        for part in self.parts:
            start, stop = max(span.start - offset, 0), min(span.stop - offset, len(part))
            if start < stop:
                yield part, start, stop
            offset += len(part)


def tar_source(members: Sequence[tuple[str, Path, int]]) -> Source:
    """A POSIX tar of (name, file, size), stored, the same bytes whenever and wherever it is made."""
    parts: list[bytes | FilePart] = []
    for name, path, size in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        parts += [info.tobuf(tarfile.PAX_FORMAT), FilePart(path, size), bytes(-size % _TAR_BLOCK)]
    return Source((*parts, bytes(2 * _TAR_BLOCK)))


def repr_digest(sha256: str) -> str:
    """The `Repr-Digest` field (RFC 9530) of a hexadecimal SHA-256."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match list names this tag, by the weak comparison that RFC 9110 asks for."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags


class ContentResponse(Response):
    """A source with a strong ETag. Answers Range, If-Range and If-None-Match; for HEAD sends no byte.

    etag: quoted. The file of a part is opened when its turn comes; one that has become shorter breaks the
    connection, so that a client sees the missing bytes.
    """

    def __init__(
        self, source: Source, *, etag: str, media_type: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        self.source = source
        self.etag = etag
        self.headers["ETag"] = etag
        self.headers["Accept-Ranges"] = "bytes"
        self.headers.setdefault("Cache-Control", "private, no-cache")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Headers(scope=scope)
        if etag_matches(request.get("if-none-match"), self.etag):
            await self._empty(304, {"ETag": self.etag, "Cache-Control": self.headers["Cache-Control"]})(
                scope, receive, send
            )
            return
        length = self.source.length
        wanted = request.get("range") if request.get("if-range", self.etag) == self.etag else None
        if scope.get("quantry.head"):
            wanted = None  # ranges are of GET alone (RFC 9110, section 14.2)
        try:
            spans = ranges.parse(wanted, length)
        except ranges.NotSatisfiable:
            status, title = TITLES["range-not-satisfiable"]
            detail = f"{wanted} asks for nothing of the {length} bytes"
            refusal = problem(
                status,
                "range-not-satisfiable",
                title,
                detail,
                instance=scope["path"],
                headers={"Content-Range": f"bytes */{length}"},
            )
            await refusal(scope, receive, send)
            return
        body = self._prepare(spans, length)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not scope.get("quantry.head"):
            async for chunk in body:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _prepare(self, spans: list[ranges.Span], length: int) -> AsyncIterator[bytes]:
        """Set status and headers for these spans, and return the body they make."""
        if not spans:
            self.headers["Content-Length"] = str(length)
            return _read(self.source, ranges.Span(0, length))
        self.status_code = 206
        self.headers.update({} if len(spans) > 1 else {"Content-Range": spans[0].content_range(length)})
        if len(spans) == 1:
            self.headers["Content-Length"] = str(spans[0].stop - spans[0].start)
            return _read(self.source, spans[0])
        boundary = secrets.token_hex(16)
        media_type = self.headers["Content-Type"]
        heads = [
            f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\n"
            f"Content-Range: {span.content_range(length)}\r\n\r\n"
            for span in spans
        ]
        tail = f"\r\n--{boundary}--\r\n"
        size = sum(map(len, heads)) + sum(span.stop - span.start for span in spans) + len(tail)
        self.headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        self.headers["Content-Length"] = str(size)
        return _multipart(self.source, spans, heads, tail)

    def _empty(self, status: int, headers: dict[str, str]) -> Response:
        return Response(status_code=status, headers=headers)


async def _multipart(
    source: Source, spans: list[ranges.Span], heads: list[str], tail: str
) -> AsyncIterator[bytes]:
    for head, span in zip(heads, spans, strict=True):
        yield head.encode()
        async for chunk in _read(source, span):
            yield chunk
    yield tail.encode()


async def _read(source: Source, span: ranges.Span) -> AsyncIterator[bytes]:
    for part, start, stop in source.slices(span):
        if isinstance(part, bytes):
            yield part[start:stop]
            continue
        file = await to_thread.run_sync(_open, part.path, start)
        try:
            while start < stop:
                chunk = await to_thread.run_sync(file.read, min(CHUNK_BYTES, stop - start))
                if not chunk:
                    raise RuntimeError(f"{part.path} is shorter than the {part.size} bytes of its manifest")
                start += len(chunk)
                yield chunk
        finally:
            file.close()


def _open(path: Path, start: int) -> BinaryIO:
    file = path.open("rb", buffering=0)
    file.seek(start, os.SEEK_SET)
    return file
