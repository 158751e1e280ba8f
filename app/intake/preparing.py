"""From a request to a plan: model and data looked at, revisions pinned, the recipe checked against both."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from app.intake.datasets import Sources
from app.intake.errors import ModelNotFound, ModelRefused
from app.intake.folders import Outside, below_roots, read_folder
from app.intake.hub import Hub
from app.intake.images import Images, check_images, check_training_images, read_images
from app.intake.starts import check_start
from app.intake.texts import check_evaluation, check_length, check_overlap, read_text
from app.shared.settings import Settings
from quantry.base import SpecError
from quantry.bundled import NotBundledError, bundled_model
from quantry.contract import DatasetRef, JobSpec, ModelRef
from quantry.costs import estimate
from quantry.diffusion import is_pipeline
from quantry.diffusion_costs import estimate_diffusion
from quantry.diffusion_planning import DiffusionPlan, plan_diffusion
from quantry.planning import Plan, plan
from quantry.reports import Estimate
from quantry.training_costs import estimate_training
from quantry.training_planning import TrainingPlan, is_trainable, plan_training
from quantry.vision import is_vision, vision_family_of
from quantry.vision_costs import estimate_vision
from quantry.vision_planning import VisionPlan, plan_vision


@dataclass(frozen=True)
class Prepared:
    """The plan, and what is known of the evaluation's data: bytes of text, or images and the bytes of their arrays.

    loaded_bytes: of the arrays of images that calibration and evaluation read whole.
    """

    plan: Plan | VisionPlan | DiffusionPlan | TrainingPlan
    evaluation_bytes: int | None = None
    evaluation_images: int | None = None
    training_images: int | None = None
    loaded_bytes: int = 0

    @property
    def spec(self) -> JobSpec:
        """What is stored: the full form, with commits in place of branches."""
        return self.plan.spec

    def estimate(self, settings: Settings) -> Estimate:
        threads = settings.threads or os.cpu_count() or 1
        cuda = self.spec.device == "cuda" or (self.spec.device == "auto" and settings.device == "cuda")
        if isinstance(self.plan, DiffusionPlan):
            return estimate_diffusion(self.plan, threads=threads, cuda=cuda)
        if isinstance(self.plan, TrainingPlan):
            return estimate_training(
                self.plan,
                threads=threads,
                cuda=cuda,
                training_images=self.training_images,
                evaluation_images=self.evaluation_images,
                loaded_bytes=self.loaded_bytes,
            )
        if isinstance(self.plan, VisionPlan):
            return estimate_vision(
                self.plan,
                threads=threads,
                cuda=cuda,
                evaluation_images=self.evaluation_images,
                loaded_bytes=self.loaded_bytes,
            )
        return estimate(self.plan, threads=threads, cuda=cuda, evaluation_bytes=self.evaluation_bytes)


def prepare(spec: JobSpec, settings: Settings, *, session: Session, owner: str) -> Prepared:
    """Check all that can be checked before work. Holds no transaction while it asks the hub.

    Raises SpecError, InputRefused and its kinds.
    """
    try:
        return _prepared(spec, settings, session, owner)
    except SpecError as error:
        if error.path == "model":  # said of the checkpoint, not of the field
            raise ModelRefused(error.path, error.detail) from error
        raise


def _prepared(spec: JobSpec, settings: Settings, session: Session, owner: str) -> Prepared:
    hub = Hub(settings.hub_url, settings.cache, settings.offline)
    sources = Sources(settings, hub, session, owner)
    ref, outside = _model(spec.model, settings, hub, weights=spec.reads_weights)
    spec = spec.model_copy(update={"model": ref})
    if is_pipeline(outside.config):
        return _pipeline(spec, outside, sources)
    check_overlap(spec)
    if spec.training_step is not None:
        return _training(spec, outside, sources)
    if is_trainable(outside.config):
        return _classifier(spec, outside, sources)
    return _language_model(spec, outside, sources)


def _language_model(spec: JobSpec, outside: Outside, sources: Sources) -> Prepared:
    calibration = read_text(spec.calibration.dataset, "calibration", sources)
    evaluation = None
    if spec.evaluation is not None:
        evaluation = read_text(spec.evaluation.dataset, "evaluation", sources)
    pinned = _pinned(spec, calibration.ref, evaluation.ref if evaluation else None)
    planned = plan(pinned, outside.config, outside.tensors)
    check_length(planned.spec, calibration)
    if evaluation is not None:
        check_evaluation(planned.spec, evaluation)
    return Prepared(planned, evaluation_bytes=evaluation.bytes if evaluation else None)


def _classifier(spec: JobSpec, outside: Outside, sources: Sources) -> Prepared:
    planned = plan_vision(spec, outside.config, outside.tensors)  # its spec names the model's default images
    calibration, evaluation = _image_sets(planned.spec, sources)
    check_images(planned, calibration, evaluation)
    pinned = _pinned(planned.spec, calibration.ref, evaluation.ref if evaluation else None)
    counts = [found.counts for found in (calibration, evaluation) if found and found.counts]
    return Prepared(
        replace(planned, spec=pinned),
        evaluation_images=evaluation.counts.images if evaluation and evaluation.counts else None,
        loaded_bytes=sum(count.loaded_bytes for count in counts),
    )


def _pipeline(spec: JobSpec, outside: Outside, sources: Sources) -> Prepared:
    planned = plan_diffusion(spec, outside.config, outside.components)
    pinned, evaluation = planned.spec, planned.spec.evaluation
    if planned.family.conditions == "text":
        check_overlap(pinned)
        seen = read_text(pinned.calibration.dataset, "calibration", sources)
        unseen = read_text(evaluation.dataset, "evaluation", sources) if evaluation else None
        pinned = _pinned(pinned, seen.ref, unseen.ref if unseen else None)
        evaluation = pinned.evaluation
    if evaluation is not None and evaluation.features is not None:
        ref, extractor = _model(evaluation.features, sources.settings, sources.hub, weights=True)
        if not is_vision(extractor.config) or vision_family_of(extractor.config).pooled == "mean":
            raise SpecError("evaluation.features", f"{ref.id} is no image classifier with a class token")
        pinned = pinned.model_copy(update={"evaluation": evaluation.model_copy(update={"features": ref})})
    return Prepared(replace(planned, spec=pinned))


def _training(spec: JobSpec, outside: Outside, sources: Sources) -> Prepared:
    planned = plan_training(spec, outside.config, outside.tensors)
    check_start(planned.step, spec.model, sources)
    found, evaluation = _image_sets(planned.spec, sources, trained=True)
    check_training_images(planned, found, evaluation)
    pinned = _pinned(planned.spec, found.ref, evaluation.ref if evaluation else None)
    counts = [images.counts for images in (found, evaluation) if images and images.counts]
    return Prepared(
        replace(planned, spec=pinned),
        evaluation_images=evaluation.counts.images if evaluation and evaluation.counts else None,
        training_images=found.counts.images if found.counts else None,
        loaded_bytes=sum(count.loaded_bytes for count in counts),
    )


def _image_sets(spec: JobSpec, sources: Sources, *, trained: bool = False) -> tuple[Images, Images | None]:
    """The images of both roles, looked up; `trained`: the first need labels as well."""
    first = read_images(spec.calibration.dataset, "calibration", sources, labelled=trained)
    if spec.evaluation is None:
        return first, None
    return first, read_images(spec.evaluation.dataset, "evaluation", sources)


def _pinned(spec: JobSpec, calibration: DatasetRef, evaluation: DatasetRef | None) -> JobSpec:
    """The spec with the datasets as they were found."""
    changed: dict[str, object] = {"calibration": spec.calibration.model_copy(update={"dataset": calibration})}
    if spec.evaluation is not None:
        changed["evaluation"] = spec.evaluation.model_copy(update={"dataset": evaluation})
    return spec.model_copy(update=changed)


def _model(ref: ModelRef, settings: Settings, hub: Hub, *, weights: bool) -> tuple[ModelRef, Outside]:
    """The reference with its commit, and the checkpoint from outside; of the hub always with its weights."""
    if ref.source == "bundled":
        try:
            return ref, read_folder(bundled_model(ref.id), weights=weights)
        except NotBundledError as error:
            raise ModelNotFound("model.id", str(error)) from error
    if ref.source == "local":
        folder = below_roots(ref.id, settings.model_roots, path="model.id", missing=ModelNotFound)
        return ref, read_folder(folder, settings.model_roots, weights=weights)
    commit, outside = hub.model(ref.id, ref.revision)
    return ref.model_copy(update={"revision": commit}), outside
