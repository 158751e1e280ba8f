"""The job whose artifact a training job starts from: the same owner's, finished, on the same model."""

from __future__ import annotations

from app.intake.datasets import Sources
from app.shared import jobs
from app.shared.errors import JobNotFound
from quantry.base import SpecError
from quantry.contract import JobSpec, ModelRef
from quantry.training import FixedPointTrainingStep

_FIELD = "recipe.0.init"


def check_start(step: FixedPointTrainingStep, model: ModelRef, sources: Sources) -> None:
    """Refuse a start that no worker could load. Raises SpecError."""
    if not step.init.startswith("job_"):
        return
    try:
        job = jobs.get(sources.session, step.init, owner=sources.owner)
    except JobNotFound as error:
        raise SpecError(_FIELD, f"you have no job {step.init}") from error
    if job.artifact is None:
        raise SpecError(_FIELD, f"job {step.init} is {job.state}: it has no artifact to start from")
    other = JobSpec.model_validate(job.spec).model
    if (other.source, other.id) != (model.source, model.id):
        raise SpecError(
            _FIELD, f"job {step.init} quantized {other.id}, not {model.id}: both must be of the same model"
        )
