"""The Celery tasks: claim a job, run it, record its outcome."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial

from celery import Celery
from sqlalchemy.exc import DBAPIError

from app.shared import leases, queue
from quantry.jobs import State
from worker.runner import Runner

log = logging.getLogger(__name__)


def run_job(runner: Runner, worker: str, job_id: str) -> State | None:
    """Run the job that has waited longest: a doorbell says that there is one, not which.

    So a job that lost its worker does not queue behind all that came after it. A second doorbell finds nothing.
    """
    if runner.stopping.is_set():
        return None  # the dispatcher announces the job again, to a worker that stays
    settings = runner.settings
    lease = timedelta(seconds=settings.lease_s)
    with runner.sessions() as session:
        take = partial(leases.claim, session, worker=worker, lease=lease, max_attempts=settings.max_attempts)
        claim = None
        while claim is None and (first := leases.first_in_line(session)) is not None:
            claim = take(first)  # None where another worker was quicker
        claim = claim or take(job_id)  # its lease may have lapsed
    if claim is None:
        log.info("%s: nothing to claim", job_id)
        return None
    log.info("%s: attempt %d begins", claim.job_id, claim.epoch)
    return runner.run(claim)


def register(app: Celery, runner: Runner, worker: str) -> None:
    """Give the app its one task."""

    @app.task(name=queue.QUANTIZE, acks_late=True, reject_on_worker_lost=True)
    def quantize(job_id: str) -> None:
        try:
            run_job(runner, worker, job_id)
        except DBAPIError:  # the row says what is to be done: the dispatcher announces the job again
            log.exception("%s: the database did not answer", job_id)
