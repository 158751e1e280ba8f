"""The Celery app. A message is a doorbell: it carries the id of a job to look at, nothing else.

The row in the database is the queue, so a lost, doubled or reordered message does no harm.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import cast

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import KombuError, OperationalError
from kombu.transport import virtual
from redis.exceptions import RedisError

from app.shared.settings import WEEK_S, get_settings

log = logging.getLogger(__name__)

QUANTIZE = "quantry.quantize"
QUEUE = Queue("quantry", Exchange("quantry", type="direct"), routing_key="quantry")
BROKER_ERRORS = (OperationalError, KombuError, RedisError, OSError)
PAUSE_S = 2.0
_silent_until = 0.0


def make_celery(broker_url: str | None, *, connect_retries: int | None = None) -> Celery:
    """An app without result backend that keeps one unacknowledged message per worker.

    connect_retries: how often a lost broker is tried again before an error is raised; None: for ever.
    """
    options = {} if connect_retries is None else {"max_retries": connect_retries}
    app = Celery("quantry", broker=_broker(broker_url), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_queues=(QUEUE,),
        task_default_queue=QUEUE.name,
        task_default_exchange="quantry",
        task_default_routing_key="quantry",
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        task_send_sent_event=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": WEEK_S + 86400,  # above the longest run: contract.Limits.run_s
            "socket_connect_timeout": 1,
            "socket_timeout": 10,
            "socket_keepalive": True,
            "health_check_interval": 10,
            **options,
        },
    )
    return app


def _broker(url: str | None) -> str:
    """Celery's spelling of the address: redis-py says unix://, Celery redis+socket://."""
    if url is None:
        return "memory://"
    return f"redis+socket://{url.removeprefix('unix://')}" if url.startswith("unix://") else url


@lru_cache
def celery() -> Celery:
    """The app with which this process rings; it gives up at once where the broker is away."""
    return make_celery(get_settings().redis_url, connect_retries=0)


def configured() -> bool:
    """Whether this process has a broker to ring; one that only reads needs none."""
    return get_settings().redis_url is not None


def ring(job_id: str) -> bool:
    """Tell the workers to look at a job, without waiting for a broker that is away.

    False if the message was not sent: no broker is configured, or it did not answer (then nobody asks it for
    PAUSE_S). The row stays in the outbox, and the dispatcher rings again.
    """
    global _silent_until
    if not configured() or time.monotonic() < _silent_until:
        return False
    for retry in (True, False):  # the first error may be that of a connection which has died in the pool
        try:
            celery().send_task(QUANTIZE, args=[job_id], queue=QUEUE.name, retry=False, ignore_result=True)
        except BROKER_ERRORS as error:
            if not retry:
                log.warning("the broker did not take the announcement of %s: %s", job_id, error)
        else:
            return True
    _silent_until = time.monotonic() + PAUSE_S
    return False


def connect() -> None:
    """Open the connection that `ring` uses, ahead of the first request. Raises one of BROKER_ERRORS."""
    with celery().producer_pool.acquire(block=True) as producer:
        if producer.connection is not None:
            producer.connection.ensure_connection(max_retries=1, timeout=2)


def waiting() -> int:
    """Messages that no worker has taken yet. Raises one of BROKER_ERRORS."""
    with celery().connection_for_write() as connection:
        channel = cast(virtual.Channel, connection.default_channel)
        return int(channel.queue_declare(queue=QUEUE.name, durable=True).message_count)
