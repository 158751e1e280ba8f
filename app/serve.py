"""`quantry-server serve`: everything on one machine and one data folder, from one command.

This process only supervises. It imports neither database nor web framework, so that the API, which needs
them, starts at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app import broker
from app.shared.errors import StartError
from app.shared.settings import Settings
from app.shared.storage import Storage
from app.supervisor import LIFELINE, Child, Supervisor

log = logging.getLogger(__name__)

STOP_S = 20.0  # for a worker to give its job back, an API to end its streams
READY_S = 60.0


def serve(settings: Settings) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP. Raises StartError where that is not possible."""
    data = settings.data.absolute()
    stop = _stop_on_signals()
    with lock(data), listen(settings.host, settings.port) as listener:
        Storage(settings.storage).prepare()
        supervisor = Supervisor()
        try:
            settings = _with_broker(settings, data, supervisor)
            settings = _for_children(settings)
            api = _start_api(settings, supervisor, listener)
            _announce(listener, data, api, stop)
            _start_worker(settings, supervisor)  # second: its imports would slow the API's
            while not stop.wait(0.2):
                supervisor.restart_dead()
        finally:
            supervisor.stop(STOP_S)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def lock(data: Path) -> Iterator[None]:
    """Own the data folder; the kernel takes the lock back however this process ends. Raises StartError."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        file = (data / "serve.lock").open("a+")
    except OSError as error:
        raise StartError(f"the data folder {data} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise StartError(f"another `serve` (process {owner}) uses the data folder {data}") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """The listening socket. It stays open while the API restarts, so that no client is turned away."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on {host}: {error.strerror}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            advice = "is it in use? choose another --port" if port else "choose another --host"
            raise StartError(f"cannot listen on {host} port {port}: {error.strerror}; {advice}") from error
        listener.listen(2048)
        yield listener


def _with_broker(settings: Settings, data: Path, supervisor: Supervisor) -> Settings:
    """The settings with the address of a broker, which is started if none is given."""
    if settings.redis_url is not None:
        return settings
    path = broker.socket_path(data)
    supervisor.children.append(broker.start(data / "broker", path))
    return settings.model_copy(update={"redis_url": f"unix://{path}"})


def _for_children(settings: Settings) -> Settings:
    """A worker name that is the same after a restart, and absolute paths."""
    folder = hashlib.sha256(os.fsencode(settings.data.absolute())).hexdigest()[:8]
    name = settings.worker_name or f"{socket.gethostname()}-serve-{folder}"
    return settings.model_copy(update={"worker_name": name, "data": settings.data.absolute()})


def _start_api(settings: Settings, supervisor: Supervisor, listener: socket.socket) -> Child:
    fd = listener.fileno()
    command = [sys.executable, "-m", "app", "api", "--fd", str(fd), "--lifeline-fd", LIFELINE, "--first-run"]
    child = Child("api", command, {**os.environ, **settings.as_environment()}, keep_fds=[fd])
    supervisor.start(child)
    return child


def _start_worker(settings: Settings, supervisor: Supervisor) -> None:
    command = [sys.executable, "-m", "worker", "--lifeline-fd", LIFELINE]
    supervisor.start(Child("worker", command, {**os.environ, **settings.as_environment()}))


def _announce(listener: socket.socket, data: Path, api: Child, stop: threading.Event) -> None:
    """Say where everything is, once the API answers. Raises StartError if it does not."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    deadline = time.monotonic() + READY_S
    while not stop.is_set() and not answers(local, port):
        if api.reap() is not None:
            raise StartError("the API did not start; its message is above")
        if time.monotonic() > deadline:
            raise StartError(f"the API did not answer within {READY_S:.0f} s; its messages are above")
        stop.wait(0.05)
    if not stop.is_set():
        print(f"Quantry is at http://{shown}:{port}\nAPI key: {data / 'api-key'}\nready", flush=True)


def answers(host: str, port: int) -> bool:
    """Whether the API answers its liveness probe."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
