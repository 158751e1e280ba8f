"""Watch processes by id, for tests that kill some and want others to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

WAIT_S = 60  # the machine may be busy; no test needs it when all is well
T = TypeVar("T")


def gone(pid: int) -> bool:
    """Whether the process has ended, be it reaped or not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def await_that(what: Callable[[], T], message: str, wait_s: float = WAIT_S) -> T:
    """The first true value of `what`."""
    deadline = time.monotonic() + wait_s
    while not (value := what()):
        assert time.monotonic() < deadline, message
        time.sleep(0.05)
    return value


def await_gone(pids: Iterable[int]) -> None:
    """Wait until none of the processes runs."""
    wanted = list(pids)
    await_that(lambda: all(map(gone, wanted)), f"some still run: {wanted}")
