"""The server as a process: it stops at once for those who only wait, and cuts nobody off."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.security import create_key
from app.shared import jobs
from quantry.requests import JobRequest

SCRIPT = """
import socket, sys
from app import server
from app.main import create_app
server.run(create_app(), host="127.0.0.1", port=0, sockets=[socket.socket(fileno=int(sys.argv[1]))])
"""


@pytest.fixture
def process(
    tmp_path: Path, sqlite_sessions: sessionmaker[Session]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server on the test's database, and its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        descriptor = listening.fileno()
        environment = {
            **os.environ,
            "QUANTRY_DATA": str(tmp_path / "data"),
            "QUANTRY_DATABASE_URL": f"sqlite:///{tmp_path}/quantry.db",
        }
        command = [sys.executable, "-c", SCRIPT, str(descriptor)]
        child = subprocess.Popen(command, env=environment, pass_fds=[descriptor], stderr=subprocess.DEVNULL)
        yield child, f"http://127.0.0.1:{listening.getsockname()[1]}"
    child.kill()
    child.wait()


def test_a_stop_ends_streams_and_long_polls_cleanly(
    process: tuple[subprocess.Popen[bytes], str], sqlite_sessions: sessionmaker[Session]
) -> None:
    """Cleanly: a stream that is cut has no last chunk, and the client would raise."""
    child, url = process
    with sqlite_sessions() as session:
        _, key = create_key(session, owner="alice", name="test")
    with sqlite_sessions() as session:
        job = jobs.submit(session, JobRequest(model="bundled/opt-tiny", bits=4).resolve(), owner="alice")[0]
    headers = {"X-API-Key": key, "Accept": "text/event-stream"}
    events = f"{url}/v1/jobs/{job.id}/events"
    with httpx2.stream("GET", events, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines) == "id: 1"
        child.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-1] == ""
    assert child.wait(timeout=60) in (0, -signal.SIGTERM)
