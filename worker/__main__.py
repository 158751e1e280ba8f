"""`python -m worker`: a Celery worker that runs one job at a time. `quantry-server worker` starts it."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import warnings

from celery.exceptions import SecurityWarning
from celery.signals import worker_ready, worker_shutting_down

from app.shared import database, lapses, lifeline, queue
from app.shared.errors import StartError
from app.shared.logs import configure_logs
from app.shared.settings import get_settings
from app.shared.storage import Storage
from worker.device import resolve
from worker.errors import DeviceError
from worker.runner import Runner
from worker.tasks import register

log = logging.getLogger(__name__)


def main() -> int:
    """Serve the queue until told to stop; the exit status."""
    parser = argparse.ArgumentParser(prog="quantry-server worker")
    parser.add_argument("--lifeline-fd", type=int, help="end when this pipe reaches its end")
    arguments = parser.parse_args()
    configure_logs()
    if arguments.lifeline_fd is not None:
        lifeline.watch(arguments.lifeline_fd)
    try:
        serve()
    except (StartError, DeviceError) as error:
        print(f"quantry-server worker: {error}", file=sys.stderr)
        return 2
    return 0


def serve() -> None:
    """Raises StartError, DeviceError."""
    settings = get_settings()
    if settings.redis_url is None:
        raise StartError(
            "no broker: set QUANTRY_REDIS_URL, or use `quantry-server serve`, which brings its own"
        )
    Storage(settings.storage).prepare()
    name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
    runner = Runner(settings, database.sessions(), resolve(settings.device))
    if settings.worker_name is not None:  # unique by contract, so whoever had this name is dead
        with runner.sessions() as session:
            if count := lapses.forfeit(session, name):
                log.warning("took back %d jobs of the worker that had this name before", count)
    app = queue.make_celery(settings.redis_url)
    register(app, runner, name)
    worker_shutting_down.connect(lambda **_: runner.stop(), weak=False)
    worker_ready.connect(lambda **_: log.info("worker %s is ready on %s", name, runner.device), weak=False)
    runner.warm_up()
    warnings.filterwarnings("ignore", category=SecurityWarning)  # it is about pickles; we accept only JSON
    options = ["--quiet", "worker", "-P", "threads", "-c", "1", "-n", f"quantry@{name}", "--loglevel", "INFO"]
    try:
        app.worker_main([*options, "--without-gossip", "--without-mingle", "--without-heartbeat"])
    finally:
        runner.stop()


if __name__ == "__main__":
    sys.exit(main())
