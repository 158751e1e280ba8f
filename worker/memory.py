"""Memory that was freed goes back to the system: the C library's heap keeps it otherwise."""

from __future__ import annotations

import ctypes


def release_memory() -> None:
    """Give the heap's free pages back (glibc; elsewhere this does nothing)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
