"""From a request to a plan: model and texts looked at, revisions pinned, the recipe checked against both."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.intake.errors import ModelNotFound
from app.intake.folders import Outside, below_roots, read_folder
from app.intake.hub import Hub
from app.intake.texts import check_length, check_overlap, read_text
from app.shared.settings import Settings
from quantry.bundled import NotBundledError, bundled_model
from quantry.contract import JobSpec, ModelRef
from quantry.costs import estimate
from quantry.planning import Plan, plan
from quantry.reports import Estimate
from quantry.vision import is_vision
from quantry.vision_planning import VisionPlan, estimate_vision, plan_vision


@dataclass(frozen=True)
class Prepared:
    """The plan, and the length of the evaluation text in bytes where it is known."""

    plan: Plan | VisionPlan
    evaluation_bytes: int | None

    @property
    def spec(self) -> JobSpec:
        """What is stored: the full form, with commits in place of branches."""
        return self.plan.spec

    def estimate(self, settings: Settings) -> Estimate:
        threads = settings.threads or os.cpu_count() or 1
        cuda = self.spec.device == "cuda" or (self.spec.device == "auto" and settings.device == "cuda")
        if isinstance(self.plan, VisionPlan):
            return estimate_vision(self.plan, threads=threads, cuda=cuda)
        return estimate(self.plan, threads=threads, cuda=cuda, evaluation_bytes=self.evaluation_bytes)


def prepare(spec: JobSpec, settings: Settings, *, session: Session, owner: str) -> Prepared:
    """Check all that can be checked before work. Holds no transaction while it asks the hub.

    Raises SpecError, InputRefused and its kinds.
    """
    hub = Hub(settings.hub_url, settings.cache, settings.offline)
    check_overlap(spec)
    ref, outside = _model(spec.model, settings, hub)
    vision = is_vision(outside.config)
    if vision:
        spec = plan_vision(spec, outside.config, outside.tensors).spec
    calibration = spec.calibration
    text = read_text(
        calibration.dataset,
        "calibration",
        images=vision,
        settings=settings,
        hub=hub,
        session=session,
        owner=owner,
    )
    calibration = calibration.model_copy(update={"dataset": text.ref})
    evaluation, evaluation_bytes = spec.evaluation, None
    if evaluation is not None:
        other = read_text(
            evaluation.dataset,
            "evaluation",
            images=vision,
            settings=settings,
            hub=hub,
            session=session,
            owner=owner,
        )
        evaluation = evaluation.model_copy(update={"dataset": other.ref})
        evaluation_bytes = other.bytes
    pinned = spec.model_copy(update={"model": ref, "calibration": calibration, "evaluation": evaluation})
    if vision:
        return Prepared(plan_vision(pinned, outside.config, outside.tensors), None)
    planned = plan(pinned, outside.config, outside.tensors)
    check_length(planned.spec, text)
    return Prepared(planned, evaluation_bytes)


def _model(ref: ModelRef, settings: Settings, hub: Hub) -> tuple[ModelRef, Outside]:
    if ref.source == "bundled":
        try:
            return ref, read_folder(bundled_model(ref.id))
        except NotBundledError as error:
            raise ModelNotFound("model.id", str(error)) from error
    if ref.source == "local":
        folder = below_roots(ref.id, settings.model_roots, path="model.id", missing=ModelNotFound)
        return ref, read_folder(folder)
    commit, outside = hub.model(ref.id, ref.revision)
    return ref.model_copy(update={"revision": commit}), outside
