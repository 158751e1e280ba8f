"""What to tell a user about a job process that ended without an outcome, or was ended."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

from quantry.contract import Limits
from quantry.jobs import Failed, JobError
from worker.child import Exit

_TAIL = 4096  # bytes of a log that go into the job's events
_SEARCHED = 65536  # of a log: a library that aborts may print a long backtrace after its reason
_MEMORY_RAN_OUT = re.compile(r"memory allocation of \d+ bytes failed|std::bad_alloc|[Oo]ut of memory")


def oom_kills() -> int | None:
    """How many processes this host's kernel has killed for memory; None where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def crashed(exit: Exit, log: Path, oom_before: int | None, oom_after: int | None) -> Failed:
    """The process ended by itself, or by somebody else's signal, without an outcome."""
    peak = f"its largest process held {exit.peak_rss / 2**20:.0f} MiB at its peak"
    if exit.code == -signal.SIGKILL:
        if oom_before is not None and oom_after is not None and oom_after > oom_before:
            title = "The job ran out of memory"
            detail = (
                f"the kernel killed a process for memory while the job ran, and the job's was killed; {peak}"
            )
            return _failed("out-of-memory", title, detail, retryable=True)
        counter = (
            "counted no kill for memory" if oom_before is not None else "does not say whether memory ran out"
        )
        detail = (
            f"the job process was killed (SIGKILL) from outside; the kernel {counter}, though memory is the "
        )
        detail += f"usual cause; {peak}"
        return _failed("process-killed", "The job process was killed", detail, retryable=True)
    if exit.code == -signal.SIGABRT and (found := _MEMORY_RAN_OUT.search(tail(log, _SEARCHED))):
        detail = f"the job process could not go on: {found[0]}; {peak}"
        return _failed("out-of-memory", "The job ran out of memory", detail, retryable=True)
    if exit.code < 0:
        detail = f"the job process died of {signal.Signals(-exit.code).name}; {peak}"
        return _failed("process-crashed", "The job process crashed", detail, retryable=True)
    detail = f"the job process ended with status {exit.code} and no outcome; see the log of the attempt"
    return _failed("process-crashed", "The job process crashed", detail, retryable=exit.code != 0)


def unreadable(detail: str) -> Failed:
    """The process broke the protocol, which is a fault of ours."""
    return _failed("internal-error", "Quantry failed in a way it should not", detail)


def over_run_limit(limits: Limits) -> Failed:
    detail = f"the job ran for longer than limits.run_s = {limits.run_s} s; raise the limit, or ask for less"
    return _failed("run-limit", "The job ran too long", detail)


def over_progress_limit(limits: Limits, stage: str | None) -> Failed:
    detail = (
        f"no progress for limits.no_progress_s = {limits.no_progress_s} s, in the stage {stage or 'start'!r}"
    )
    return _failed("no-progress", "The job stood still", detail, retryable=True)


def _failed(type: str, title: str, detail: str, retryable: bool = False) -> Failed:
    return Failed(error=JobError(type=type, title=title, detail=detail, retryable=retryable))


def tail(log: Path, length: int = _TAIL) -> str:
    """The end of what the process printed."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - length))
        return file.read().decode(errors="replace")
    return ""
