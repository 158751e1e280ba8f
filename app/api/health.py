"""Probes for whoever runs the server: is it alive, can it work, how does it do."""

from __future__ import annotations

import os

from fastapi import Request, Response
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app.api.deps import Reader, ServicesDep
from app.api.errors import ProblemError
from app.api.router import Router, problems
from app.api.schemas import Health
from app.shared.database import transaction
from app.shared.tables import Job
from quantry.jobs import State

router = Router(tags=["server"])


@router.get("/healthz", response_model=Health)
async def is_alive() -> Health:
    """The process answers. Asks nothing of anybody."""
    return Health(status="ok")


@router.get("/readyz", response_model=Health)
def is_ready(services: ServicesDep) -> Health:
    """The database answers and has its tables, and the storage can be written; else 503."""
    try:
        with services.sessions() as session, transaction(session, write=False):
            session.execute(select(Job.id).limit(1))
    except SQLAlchemyError as error:
        raise ProblemError(503, "not-ready", "the database does not answer, or is not migrated") from error
    if not os.access(services.storage.root, os.W_OK | os.X_OK):
        raise ProblemError(503, "not-ready", "the storage folder cannot be written")
    return Health(status="ok")


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
)
def read_metrics(request: Request, services: ServicesDep, caller: Reader) -> Response:
    """Prometheus: requests by route, jobs by state, waiting clients, the process."""
    with services.sessions() as session, transaction(session, write=False):
        rows = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
    counts = {state: count for state, count in rows}  # noqa: C416  # a row is no pair to the type checker
    metrics = request.app.state.metrics
    metrics.set_jobs({state.value: counts.get(state.value, 0) for state in State}, len(services.watcher))
    return Response(metrics.render(), media_type=metrics.media_type)
