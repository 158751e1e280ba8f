"""The job process: `python -m worker.process --messages-fd N`, started by `worker.child`.

Standard input is a pipe that the parent holds open: one line of JSON (`JobInput`), then nothing until the
parent is gone. End-of-file, before the line or after it, ends the whole process group, whatever else goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from quantry.jobs import Failed, JobError, Outcome
from worker.errors import DiskFull, OutOfMemory, QuantizationError
from worker.progress import Progress
from worker.workspace import JobInput

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded")
_MEMORY_TEXTS = ("can't allocate memory", "CUDA out of memory", "std::bad_alloc", "Cannot allocate memory")


def main(serve: Callable[[queue.SimpleQueue[bytes], TextIO], None]) -> None:
    """Set up the two pipes and hand them to `serve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--messages-fd", type=int, required=True)
    arguments = parser.parse_args()
    requests = read_requests(0)
    with os.fdopen(arguments.messages_fd, "w", encoding="utf-8") as out:
        serve(requests, out)


def read_requests(descriptor: int) -> queue.SimpleQueue[bytes]:
    """Lines that arrive on `descriptor`, read by a thread that ends the process group at end-of-file."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        pending = b""
        while data := os.read(descriptor, 65536):
            *whole, pending = (pending + data).split(b"\n")
            for line in whole:
                lines.put(line)
        end_group()

    threading.Thread(target=read, name="lifeline", daemon=True).start()
    return lines


def end_group() -> None:
    """Kill this process and all that it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)  # not a group leader: run by hand


def serve(requests: queue.SimpleQueue[bytes], out: TextIO) -> None:
    """Import what every job needs, say `ready`, run the one job that is handed in, say how it ended."""
    from worker import pipeline  # slow: torch and transformers; done while no job waits

    progress = Progress(out)
    progress.message({"type": "ready"})
    job = JobInput.model_validate_json(requests.get())
    workspace = job.workspace.model_copy(update={"job": job.job})
    outcome = guarded(lambda: pipeline.run(job.spec, workspace, progress))
    progress.message({"type": "outcome", **outcome.model_dump(mode="json")})


def guarded(run: Callable[[], Outcome]) -> Outcome:
    """The outcome of `run`; every exception becomes a typed failure."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001  # the border of the process: nothing may escape it
        with contextlib.suppress(OSError):  # the log lies on the disk that may be full
            traceback.print_exc()
        return Failed(error=failure(error))


def failure(error: BaseException) -> JobError:
    """The typed reason for an exception. Its message reaches the user only if it was written for users."""
    if isinstance(error, QuantizationError) and not isinstance(error, DiskFull | OutOfMemory):
        below = error.__cause__ or error.__context__
        resource = _resource(below) if below is not None else None
        return (resource or error).as_job_error()
    if isinstance(error, QuantizationError):
        return error.as_job_error()
    resource = _resource(error)
    if resource is not None:
        return resource.as_job_error()
    detail = f"{type(error).__name__} in {_place(error)}; the log of the attempt has the whole traceback"
    return JobError(type="internal-error", title="Quantry failed in a way it should not", detail=detail)


def _resource(error: BaseException) -> QuantizationError | None:
    """OutOfMemory or DiskFull if that is what lies at the root, through the wrappings of libraries."""
    for cause in _chain(error):
        text = str(cause)
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return DiskFull(f"the disk is full: {cause}; free space on the worker's storage and retry")
        if any(part in text for part in _FULL_TEXTS):
            return DiskFull(f"the disk is full: {text}; free space on the worker's storage and retry")
        memory = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"
        if memory or (
            isinstance(cause, RuntimeError | OSError) and any(part in text for part in _MEMORY_TEXTS)
        ):
            said = f" ({text.splitlines()[0]})" if text else ""
            advice = (
                "lower calibration.samples, calibration.sequence_length or the batch of the recipe's step, "
                "whichever the job has, or use a larger worker"
            )
            return OutOfMemory(f"memory ran out{said}; {advice}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        below = error.__cause__ or error.__context__
        if below is None:
            return
        error = below


def _place(error: BaseException) -> str:
    """The innermost line of our own code that the exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    frame = (ours or frames)[-1] if frames else None
    return f"{os.path.basename(frame.filename)}:{frame.lineno}" if frame is not None else "unknown code"


if __name__ == "__main__":
    main(serve)
    sys.stdout.flush()
    os._exit(0)  # library threads and atexit handlers must not delay the end of a finished job
