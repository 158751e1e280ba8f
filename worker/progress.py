"""How a job process tells its parent how far it is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, TextIO

from quantry.jobs import State


class Progress:
    """Writes one JSON line a message. `eta_s` is extrapolated from the pace of the present stage."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._state = State.PREPARING
        self._stage = ""
        self._began = time.monotonic()
        self._first = 0

    def stage(self, state: State, stage: str, done: int = 0, total: int = 0) -> None:
        """Enter a stage; `state` is where the job is, `stage` says it in words."""
        self._state, self._stage, self._began, self._first = state, stage, time.monotonic(), done
        self._send(done, total, None)

    def advance(self, done: int, total: int, stage: str | None = None) -> None:
        """`done` of `total` units of the present stage are finished."""
        self._stage = stage or self._stage
        made = done - self._first
        eta = (time.monotonic() - self._began) / made * (total - done) if made > 0 else None
        self._send(done, total, eta)

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Something worth keeping: a warning, the result of a block."""
        self.message({"type": "event", "kind": kind, "data": dict(data)})

    def message(self, content: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()

    def _send(self, done: int, total: int, eta: float | None) -> None:
        state, stage = self._state.value, self._stage
        self.message(
            {"type": "stage", "state": state, "stage": stage, "done": done, "total": total, "eta_s": eta}
        )
