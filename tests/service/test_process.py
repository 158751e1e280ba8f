"""The job process itself: typed failures, and an end whenever its parent ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantry.jobs import Failed
from tests.service.processes import await_gone, gone
from worker import child as children
from worker.errors import ExportError, ModelNotFound, OutOfMemory, QuantizationError
from worker.process import failure

HERE = Path(__file__).parent


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001  # the test wants every kind
        return caught


@pytest.mark.parametrize(
    ("error", "type", "retryable"),
    [
        (ModelNotFound("no such model: x"), "model-not-found", False),
        (OutOfMemory("block 3 does not fit"), "out-of-memory", True),
        (MemoryError(), "out-of-memory", True),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out-of-memory", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out-of-memory", True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out-of-memory", True),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "disk-full", True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk-full", True),
        (
            Exception("Error while serializing: IoError(Os { code: 28, No space left on device })"),
            "disk-full",
            True,
        ),
        (OSError(errno.EACCES, "Permission denied"), "internal-error", False),
        (KeyError("x"), "internal-error", False),
    ],
)
def test_exceptions_become_typed_failures(error: BaseException, type: str, retryable: bool) -> None:
    found = failure(raised(error))
    assert (found.type, found.retryable) == (type, retryable)
    assert found.detail


def test_the_root_of_a_wrapped_failure_counts() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert failure(raised(ExportError("shard 2 could not be written"), full)).type == "disk-full"
    assert failure(raised(ExportError("shard 2 could not be written"))).type == "export-failed"
    assert failure(raised(QuantizationError("x"), ValueError("y"))).type == "quantization-failed"


FULL = """
from worker.process import guarded
def run():
    raise OSError(28, "No space left on device")
print(guarded(run).model_dump_json())
"""


def test_a_full_disk_is_said_even_if_the_log_lies_on_it() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Path("/dev/full").open("wb", buffering=0) as full:
        done = subprocess.run(
            [sys.executable, "-c", FULL], env=environment, stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert Failed.model_validate_json(done.stdout).error.type == "disk-full"


def test_an_internal_error_names_the_place_and_not_the_values() -> None:
    found = failure(raised(ValueError("the password is 1234")))
    assert "test_process.py" in found.detail
    assert "1234" not in found.detail


PARENT = """
import sys, time
from pathlib import Path
from worker import child
started = child.start("child_jobs", Path(sys.argv[1]))
while not started.read(1):
    pass
print(started.pid, flush=True)
time.sleep(3600)
"""


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    await_gone([pid])


def test_the_real_process_is_ready_after_its_imports(tmp_path: Path) -> None:
    """`worker.process` itself, with torch and the pipeline: ready, then gone with its pipe."""
    child = children.start("worker.process", tmp_path / "log", threads=1)
    try:
        deadline, lines = time.monotonic() + 120, []
        while not lines and not child.exited():
            assert time.monotonic() < deadline
            lines = child.read(0.5)
        assert lines == [b'{"type": "ready"}'], (tmp_path / "log").read_text()
        assert child.process.stdin is not None
        child.process.stdin.close()
        await_gone([child.pid])
    finally:
        child.end()


def test_messages_arrive_whole_however_they_are_cut(tmp_path: Path) -> None:
    child = children.start("child_jobs", tmp_path / "log")
    reader, writer = os.pipe()
    os.close(child.messages)
    child.messages = reader
    try:
        os.write(writer, b'{"a": 1}\n{"b"')
        assert child.read(1) == [b'{"a": 1}']
        assert child.read(0) == []
        os.write(writer, b": 2}\n")
        os.close(writer)
        assert child.drain() == [b'{"b": 2}']
        assert child.eof
    finally:
        child.end()
        assert child.end() is child.exit
