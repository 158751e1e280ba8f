"""Keep child processes running: start, restart with patience, stop all; none outlives the supervisor.

On Linux the kernel kills a child when the thread that started it ends (PR_SET_PDEATHSIG); so `start` and
`restart_dead` belong to the main thread. Children in Python also hold a pipe (`app.shared.lifeline`).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
HEALTHY_S = 30.0  # a child that ran so long starts again at once
MAX_DELAY_S = 30.0
LIFELINE = "{lifeline}"  # in a command: the descriptor of the pipe


@dataclass
class Child:
    """One process that has to run. `command` may hold LIFELINE."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    keep_fds: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    retry_at: float = 0.0
    _pipe: int | None = None

    def start(self) -> None:
        """Start the process in a group of its own, so that Ctrl+C reaches the supervisor alone."""
        reader, writer = os.pipe()
        command = [part.replace(LIFELINE, str(reader)) for part in self.command]
        try:
            self.process = subprocess.Popen(
                command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                pass_fds=(reader, *self.keep_fds),
                process_group=0,
                preexec_fn=_die_with_parent(),
            )
        except OSError:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        self._pipe, self.started = writer, time.monotonic()

    def reap(self) -> int | None:
        """The exit status if the process has ended, else None."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is not None:
            self.process = None
            self._close()
        return code

    def stop(self, patience: float) -> None:
        """SIGTERM, and SIGKILL after `patience` seconds."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
            self.kill()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self._close()

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


def _die_with_parent() -> Callable[[], None] | None:
    """What the child runs before its program: ask the kernel for SIGKILL when the parent is gone."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


@dataclass
class Supervisor:
    """The children in the order in which they start; they stop in the opposite order."""

    children: list[Child] = field(default_factory=list)

    def start(self, child: Child) -> None:
        child.start()
        self.children.append(child)

    def restart_dead(self) -> None:
        """Look once after every child. One that keeps dying is given growing pauses."""
        for child in self.children:
            code = child.reap()
            if code is not None:
                healthy = time.monotonic() - child.started > HEALTHY_S
                child.failures = 0 if healthy else child.failures + 1
                delay = 0.0 if child.failures <= 1 else min(MAX_DELAY_S, 0.5 * 2 ** (child.failures - 2))
                child.retry_at = time.monotonic() + delay
                log.error("%s ended with status %d; starting it again in %.1f s", child.name, code, delay)
            if child.process is None and time.monotonic() >= child.retry_at:
                child.start()

    def stop(self, patience: float) -> None:
        """End all children, last started first."""
        for child in reversed(self.children):
            child.stop(patience)
