"""`quantry-server serve`: everything on one machine and one data folder, from one command."""

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

from sqlalchemy.exc import SQLAlchemyError

import migrations
from app import broker, security
from app.shared.database import make_engine, make_sessions
from app.shared.errors import KeyRefused, StartError
from app.shared.settings import Settings
from app.shared.storage import Storage
from app.supervisor import LIFELINE, Child, Supervisor

log = logging.getLogger(__name__)

STOP_S = 20.0  # for a worker to give its job back, an API to end its streams
READY_S = 60.0
FIRST_OWNER = "local"


def serve(settings: Settings) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP. Raises StartError where that is not possible."""
    data = settings.data.absolute()
    stop = _stop_on_signals()
    with lock(data), listen(settings.host, settings.port) as listener:
        Storage(settings.storage).prepare()
        prepare_database(settings, data)
        supervisor = Supervisor()
        try:
            settings = _with_broker(settings, data, supervisor)
            _start_processes(settings, supervisor, listener)
            _announce(listener, data, supervisor, stop)
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


def prepare_database(settings: Settings, data: Path) -> None:
    """Migrate, and write the first API key to `data`/api-key unless one that works is there.

    Raises StartError.
    """
    engine = make_engine(settings.database)
    try:
        migrations.upgrade(engine)
        path = data / "api-key"
        with make_sessions(engine)() as session:
            if path.exists():
                try:
                    security.verify_key(session, path.read_text().strip())
                except KeyRefused as error:
                    log.warning("%s is no longer valid (%s); writing a new key", path, error)
                else:
                    return
            _, key = security.create_key(session, owner=FIRST_OWNER, name="first key, made by serve")
        write_secret(path, key)
    except SQLAlchemyError as error:
        raise StartError(f"the database cannot be used: {error}") from error
    except OSError as error:
        raise StartError(f"the API key cannot be written: {error}") from error
    finally:
        engine.dispose()


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _with_broker(settings: Settings, data: Path, supervisor: Supervisor) -> Settings:
    """The settings with the address of a broker, which is started if none is given."""
    if settings.redis_url is not None:
        return settings
    path = broker.socket_path(data)
    supervisor.children.append(broker.start(data / "broker", path))
    return settings.model_copy(update={"redis_url": f"unix://{path}"})


def _start_processes(settings: Settings, supervisor: Supervisor, listener: socket.socket) -> None:
    folder = hashlib.sha256(os.fsencode(settings.data.absolute())).hexdigest()[:8]
    name = settings.worker_name or f"{socket.gethostname()}-serve-{folder}"
    settings = settings.model_copy(update={"worker_name": name, "data": settings.data.absolute()})
    environment = {**os.environ, **settings.as_environment()}
    fd = listener.fileno()
    program = [sys.executable, "-m"]
    api = [*program, "app", "api", "--fd", str(fd), "--lifeline-fd", LIFELINE]
    supervisor.start(Child("api", api, environment, keep_fds=[fd]))
    supervisor.start(Child("worker", [*program, "worker", "--lifeline-fd", LIFELINE], environment))


def _announce(listener: socket.socket, data: Path, supervisor: Supervisor, stop: threading.Event) -> None:
    """Say where everything is, once the API answers. Raises StartError if it does not."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    deadline = time.monotonic() + READY_S
    while not stop.is_set() and not answers(local, port):
        supervisor.restart_dead()
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
