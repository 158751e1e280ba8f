"""Who a key belongs to, remembered for a moment: polling should not ask the database twice a request."""

from __future__ import annotations

import hashlib
import time

from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from app.security import Caller, verify_key

REMEMBER_S = 1.0
_MOST = 10_000


class Keyring:
    """Verified keys by their digest, each for REMEMBER_S: so long a key works that is revoked elsewhere.

    What is refused is never remembered. For one event loop.
    """

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._known: dict[bytes, tuple[float, Caller]] = {}

    async def caller(self, key: str) -> Caller:
        """Whose key this is. Raises KeyRefused."""
        digest = hashlib.sha256(key.encode()).digest()
        until, caller = self._known.get(digest, (0.0, None))
        if caller is not None and time.monotonic() < until:
            return caller
        caller = await run_in_threadpool(self._verify, key)
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[digest] = (time.monotonic() + REMEMBER_S, caller)
        return caller

    def forget(self) -> None:
        """Ask the database again from now on: a key was revoked."""
        self._known.clear()

    def _verify(self, key: str) -> Caller:
        with self._sessions() as session:
            return verify_key(session, key)
