"""The Accept and Prefer headers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.api.errors import ProblemError

MAX_WAIT_S = 60
_WAIT = re.compile(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9})', re.IGNORECASE)


def choose(accept: str | None, offered: Sequence[str]) -> str:
    """The media type to answer with: the best that is accepted, the first offered among equals.

    Follows RFC 9110, section 12.5.1: the most specific range that fits a type gives its weight.
    Raises ProblemError (406).
    """
    ranges = [_range(part) for part in (accept or "*/*").split(",")]
    weights = {media_type: _weight(media_type, ranges) for media_type in offered}
    best = max(offered, key=lambda media_type: weights[media_type])
    if weights[best] <= 0:
        raise ProblemError(406, "not-acceptable", f"this comes as {' or '.join(offered)}")
    return best


def wait_seconds(prefer: str | None) -> int | None:
    """How long `Prefer: wait=N` asks to wait (RFC 7240), at most MAX_WAIT_S; None without it."""
    match = _WAIT.search(prefer or "")
    return min(int(match[1]), MAX_WAIT_S) if match else None


def _range(part: str) -> tuple[str, float]:
    media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weight = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                weight = min(max(float(value), 0.0), 1.0)
            except ValueError:
                weight = 0.0
    return media_type, weight


def _weight(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    for wanted in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
        found = [weight for name, weight in ranges if name == wanted]
        if found:
            return max(found)
    return 0.0
