"""The Range header, as RFC 9110 section 14 has it: parsed, resolved against a length, merged."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_RANGES = 16  # more than this is not worth an answer in parts (RFC 9110, section 14.2)
_SPEC = re.compile(r"(\d{1,999})-(\d{1,999})?|-(\d{1,999})", re.ASCII)


@dataclass(frozen=True)
class Span:
    """Bytes `start` up to, not including, `stop`."""

    start: int
    stop: int

    def content_range(self, length: int) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{length}"


class NotSatisfiable(Exception):
    """Not one of the ranges asked for overlaps the content."""


def parse(header: str | None, length: int) -> list[Span]:
    """The spans asked for, clipped, in the order asked; empty for "send the whole".

    A header that is not a list of byte ranges, or has too many, is ignored, as the RFC allows. Overlapping
    spans are merged. Raises NotSatisfiable.
    """
    unit, separator, rest = (header or "").partition("=")
    if not separator or unit.strip().lower() != "bytes":
        return []
    parts = [part.strip(" \t") for part in rest.split(",")]
    found = [_SPEC.fullmatch(part) for part in parts if part]
    if not found or len(found) > MAX_RANGES:
        return []
    spans: list[Span] = []
    for match in found:
        if match is None:
            return []
        first, last, suffix = match.groups()
        if first is not None and last is not None and int(last) < int(first):
            return []
        span = _resolve(first, last, suffix, length)
        if span is not None:
            spans.append(span)
    if not spans:
        raise NotSatisfiable
    return _merge(spans)


def _resolve(first: str | None, last: str | None, suffix: str | None, length: int) -> Span | None:
    if first is None:
        wanted = min(int(suffix or 0), length)
        return Span(length - wanted, length) if wanted else None
    start = int(first)
    if start >= length:
        return None
    return Span(start, length if last is None else min(int(last) + 1, length))


def _merge(spans: list[Span]) -> list[Span]:
    """Spans that overlap or touch become one; the others keep their order."""
    merged: list[Span] = []
    for span in spans:
        for index, other in enumerate(merged):
            if span.start <= other.stop and other.start <= span.stop:
                del merged[index]
                merged = _merge([*merged, Span(min(span.start, other.start), max(span.stop, other.stop))])
                break
        else:
            merged.append(span)
    return merged
