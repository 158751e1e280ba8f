"""Fields that nothing would look at, refused where a job is submitted: what is said should matter."""

from __future__ import annotations

from collections.abc import Iterator

from quantry.base import Model, SpecError
from quantry.contract import DatasetRef, JobSpec
from quantry.recipe import GptqStep, Step, TrainingStep

_OF_THE_HUB = "only repositories of the hub have one: leave it out"


def check_unused(spec: JobSpec) -> None:
    """Raises SpecError for the first field that differs from its default and does nothing."""
    if spec.model.source != "hub":
        _refuse("model", spec.model, {"revision": _OF_THE_HUB})
    _check_dataset("calibration.dataset", spec.calibration.dataset)
    if spec.evaluation is not None:
        _check_dataset("evaluation.dataset", spec.evaluation.dataset)
    for index, step in enumerate(spec.recipe):
        _refuse(f"recipe.{index}", step, dict(_idle(step)))


def _check_dataset(path: str, ref: DatasetRef) -> None:
    if ref.source != "hub":
        _refuse(path, ref, {"revision": _OF_THE_HUB, "file": _OF_THE_HUB})
    if ref.source == "bundled":
        reason = "a bundled text is read as it is: leave it out"
        _refuse(path, ref, {"field": reason, "separator": reason})


def _idle(step: Step) -> Iterator[tuple[str, str]]:
    """The fields of a step that its other fields leave without effect, and why."""
    if isinstance(step, GptqStep) and step.target == "plain":
        yield "target_strength", "`target: plain` shifts nothing: leave it out"
    if isinstance(step, TrainingStep):
        yield from _idle_in_training(step)


def _idle_in_training(step: TrainingStep) -> Iterator[tuple[str, str]]:
    """Not of `gradient`: its baselines are one word away from each other, whatever stands beside that word."""
    if step.schedule in ("cosine", "constant"):
        for name in ("milestones", "decay"):
            yield name, f"`schedule: {step.schedule}` has no steps: leave it out"
    if step.patience is None:
        yield "validation", "without `patience` no image is held out: leave it out"


def _refuse(path: str, holder: Model, idle: dict[str, str]) -> None:
    for name, reason in idle.items():
        if getattr(holder, name) != type(holder).model_fields[name].default:
            raise SpecError(f"{path}.{name}", reason)
