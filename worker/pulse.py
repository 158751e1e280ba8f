"""The heartbeat of a running job: renews its lease, stores its progress, reads whether it is still wanted."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from app.shared import leases
from app.shared.leases import Claim, Signal, Step
from app.shared.settings import Settings

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0  # progress inside a stage is stored no more often


@dataclass
class Pulse:
    """Collects what the job process says and writes it in few transactions.

    A database that does not answer for a while ends no job: what is new is kept and written later. Whether
    the lease was lost meanwhile, the next write tells.
    """

    sessions: sessionmaker[Session]
    settings: Settings
    claim: Claim
    _step: Step | None = None
    _stored: Step | None = None
    _events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    _written: float = field(default_factory=time.monotonic)

    @property
    def stage(self) -> str | None:
        return self._step.stage if self._step is not None else None

    def note(self, step: Step) -> Signal:
        """A new step; a change of state is stored at once. Raises ForbiddenMove."""
        entered = self._step is None or step.state != self._step.state
        self._step = step
        return self._write() if entered else Signal.CONTINUE

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        self._events.append((kind, data))

    def beat(self) -> Signal:
        """Call often: writes what is due, else only reads. Raises ForbiddenMove."""
        age = time.monotonic() - self._written
        fresh = bool(self._events) or self._step != self._stored
        if age >= self.settings.heartbeat_s or (
            fresh and age >= min(WRITE_EVERY_S, self.settings.heartbeat_s)
        ):
            return self._write()
        try:
            with self.sessions() as session:
                return leases.signal(session, self.claim)
        except DBAPIError as error:
            log.warning("%s: the database did not answer: %s", self.claim.job_id, error)
            return Signal.CONTINUE

    def flush(self) -> Signal:
        """Write what is left."""
        return self._write() if self._events or self._step != self._stored else Signal.CONTINUE

    def _write(self) -> Signal:
        step, events = self._step, tuple(self._events)
        lease = timedelta(seconds=self.settings.lease_s)
        try:
            with self.sessions() as session:
                signal = leases.heartbeat(session, self.claim, step=step, events=events, lease=lease)
        except DBAPIError as error:
            log.warning("%s: the database did not take the heartbeat: %s", self.claim.job_id, error)
            return Signal.CONTINUE
        self._written = time.monotonic()
        self._stored = step
        del self._events[: len(events)]
        return signal
