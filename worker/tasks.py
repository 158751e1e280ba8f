"""The Celery tasks: claim a job, run it, record its outcome."""

from __future__ import annotations

import logging
from datetime import timedelta

from celery import Celery
from sqlalchemy.exc import DBAPIError

from app.shared import leases, queue
from quantry.jobs import State
from worker.runner import Runner

log = logging.getLogger(__name__)


def run_job(runner: Runner, worker: str, job_id: str) -> State | None:
    """Look at the job that a doorbell names; a second doorbell finds nothing to claim."""
    if runner.stopping.is_set():
        return None  # the dispatcher announces the job again, to a worker that stays
    settings = runner.settings
    with runner.sessions() as session:
        lease = timedelta(seconds=settings.lease_s)
        claim = leases.claim(session, job_id, worker=worker, lease=lease, max_attempts=settings.max_attempts)
    if claim is None:
        log.info("%s: nothing to claim", job_id)
        return None
    log.info("%s: attempt %d begins", job_id, claim.epoch)
    return runner.run(claim)


def register(app: Celery, runner: Runner, worker: str) -> None:
    """Give the app its one task."""

    @app.task(name=queue.QUANTIZE, acks_late=True, reject_on_worker_lost=True)
    def quantize(job_id: str) -> None:
        try:
            run_job(runner, worker, job_id)
        except DBAPIError:  # the row says what is to be done: the dispatcher announces the job again
            log.exception("%s: the database did not answer", job_id)
