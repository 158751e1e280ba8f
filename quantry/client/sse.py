"""Server-sent events, as the HTML standard defines the stream (section 9.2.6)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class Message:
    """One dispatched event. `id` is the last one seen, as `Last-Event-ID` wants it."""

    event: str
    data: str
    id: str


def decode(chunks: Iterable[bytes]) -> Iterator[Message | None]:
    """Yield the messages of a stream, and None for each chunk that ended none.

    The None let a reader look at the clock while a server sends only keep-alive comments. An unfinished
    message at the end of the stream is dropped, as the standard says.
    """
    event, data, last_id = "", list[str](), ""
    for line in _lines(chunks):
        if line is None:
            yield None
        elif line:
            name, _, value = line.decode("utf-8", "replace").partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                event = value
            elif name == "id" and "\0" not in value:
                last_id = value
        else:
            if data:
                yield Message(event or "message", "\n".join(data), last_id)
            event, data = "", []


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of a stream without their ends, and None after each chunk."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        held = rest.endswith(b"\r")  # half of a CRLF, perhaps
        *lines, tail = _LINE_END.split(rest[:-1] if held else rest)
        rest = tail + b"\r" if held else tail
        yield from lines
        yield None
