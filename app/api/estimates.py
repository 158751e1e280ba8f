"""The dry run."""

from __future__ import annotations

from app.api.deps import Reader, ServicesDep
from app.api.router import Router
from app.intake.preparing import prepare
from quantry.reports import Estimate
from quantry.requests import JobRequest

router = Router(prefix="/v1/estimates", tags=["jobs"])


@router.post("", response_model=Estimate)
def create_estimate(request: JobRequest, services: ServicesDep, caller: Reader) -> Estimate:
    """What a job would do, from the config and the tensors' headers: nothing is loaded, nothing is stored.

    Refuses what submitting would refuse. Bytes are exact up to small files; memory and time are a model.
    """
    with services.sessions() as session:
        prepared = prepare(request.resolve(), services.settings, session=session, owner=caller.owner)
    return prepared.estimate(services.settings)
