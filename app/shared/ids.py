"""Identifiers: a prefix that says what they name, and a UUID that sorts by time (RFC 9562, version 7)."""

from __future__ import annotations

import os
import threading
import time
import uuid

_lock = threading.Lock()
_last = 0


def uuid7(now_ns: int | None = None) -> uuid.UUID:
    """A UUIDv7: 48 bits of Unix milliseconds, 12 bits of the millisecond's fraction, 62 random bits.

    The fraction is RFC 9562 section 6.2, method 3. Within a process the time part strictly increases, also
    when the clock stands still or steps back.
    """
    global _last
    now = time.time_ns() if now_ns is None else now_ns
    milliseconds, rest = divmod(now, 1_000_000)
    ticks = milliseconds << 12 | (rest << 12) // 1_000_000
    with _lock:
        _last = ticks = max(ticks, _last + 1)
    random = int.from_bytes(os.urandom(8)) & (1 << 62) - 1
    value = (ticks >> 12) << 80 | 0x7 << 76 | (ticks & 0xFFF) << 64 | 0b10 << 62 | random
    return uuid.UUID(int=value)


def new_id(prefix: str) -> str:
    """Such as `job_0198c0f2-...`: sorts by the time of its making among ids of the same prefix."""
    return f"{prefix}_{uuid7()}"
