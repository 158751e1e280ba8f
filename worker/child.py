"""A job process as its parent sees it: its own process group, two pipes, one end."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from app.shared.settings import without_settings

MAX_LINE = 256 * 2**20  # bytes; the outcome of a large model has thousands of layers
_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "PRIVATE")


class BadMessage(Exception):
    """The job process wrote what is no message."""


@dataclass(frozen=True)
class Exit:
    """How a job process ended.

    code: as in subprocess, -N for signal N. peak_rss: bytes, of the largest process of the job.
    """

    code: int
    peak_rss: int


@dataclass
class Child:
    """A started process; `end` must be called, and may be called at any time."""

    process: subprocess.Popen[bytes]
    messages: int
    log: Path
    exit: Exit | None = None
    eof: bool = False
    _buffer: bytearray = field(default_factory=bytearray)

    @property
    def pid(self) -> int:
        return self.process.pid

    def give(self, request: bytes) -> bool:
        """Hand in the job; False if the process is gone already."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def read(self, timeout: float) -> list[bytes]:
        """Whole lines that arrived, after waiting for at most `timeout` seconds. Raises BadMessage."""
        if not self._arrived(timeout):
            return []
        data = os.read(self.messages, 2**20)
        self.eof = not data
        self._buffer += data
        if b"\n" not in data:
            if len(self._buffer) > MAX_LINE:
                raise BadMessage(f"a message is longer than {MAX_LINE} bytes")
            return []
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        return lines

    def drain(self) -> list[bytes]:
        """What a process that has exited left in the pipe. Raises BadMessage."""
        lines = []
        while self._arrived(0):
            lines += self.read(0)
        return lines

    def _arrived(self, timeout: float) -> bool:
        if self.eof:
            time.sleep(timeout)
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self.messages, selectors.EVENT_READ)
            return bool(selector.select(timeout))

    def exited(self) -> bool:
        """Whether the process has ended. It is not reaped, so its id cannot be given to another yet."""
        if self.exit is not None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is not None

    def end(self) -> Exit:
        """Kill what is left of the process group, reap the process, close the pipes. Idempotent."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            unit = 1 if sys.platform == "darwin" else 1024
            self.exit = Exit(os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit)
            self.process.returncode = self.exit.code
            os.close(self.messages)
            if self.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.close()
        return self.exit


def start(module: str, log: Path, *, threads: int | None = None) -> Child:
    """Start `python -m module --messages-fd N` as leader of a new process group; it prints to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    try:
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--messages-fd", str(writer)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                pass_fds=(writer,),
                start_new_session=True,
                env=environment(threads),
            )
    except OSError:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return Child(process, reader, log)


def environment(threads: int | None) -> dict[str, str]:
    """What a job process may know: no setting of the service, nothing that is named like a secret.

    glibc gives freed memory back to the kernel and faults it in again for every large tensor; that can cost a
    third of the time, so it is told to keep it. OpenMP's threads spin while they wait for each other, which
    keeps those they wait for off the cores of a busy machine (measured: a sixth of the pace), so they sleep.
    """
    allowed = {
        name: value
        for name, value in without_settings().items()
        if not any(word in name.upper() for word in _SECRETS)
    }
    tuning = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
    }
    chosen = {"OMP_NUM_THREADS": str(threads)} if threads is not None else {}
    return {**tuning, **allowed, **chosen}
