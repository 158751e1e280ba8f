"""The model and the images of a training job, resolved, checked and at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantry.base import SpecError
from quantry.contract import JobSpec
from quantry.jobs import State
from quantry.training import FixedPointTrainingStep
from quantry.training_planning import TrainingPlan, plan_training
from quantry.vision import is_vision
from worker.calibration.images import ImageSet, check_labels, load_images, pixels
from worker.errors import DatasetError, ModelError, RecipeError
from worker.models.source import check_folder, resolve
from worker.models.tensors import read_headers, shard_files
from worker.prepare import device_of, fingerprint_of, overlapping
from worker.progress import Progress
from worker.training.data import TrainingImages, split_off, training_images
from worker.training.network import artifact_network, checkpoint_network, random_network
from worker.workspace import Workspace


@dataclass
class PreparedTraining:
    """A job whose model and images are at hand and were checked.

    held: what validates epochs, None without `patience`. evaluation: (N, C, H, W) and its labels (N,), None where the
    job asks for no evaluation. fingerprint: of everything that the trained bytes depend on.
    """

    plan: TrainingPlan
    folder: Path
    start: Path | None
    device: torch.device
    images: TrainingImages
    held: TrainingImages | None
    evaluation: Tensor | None
    labels: Tensor
    evaluation_name: str
    fingerprint: str
    warnings: list[str] = field(default_factory=list)

    @property
    def spec(self) -> JobSpec:
        return self.plan.spec

    @property
    def step(self) -> FixedPointTrainingStep:
        return self.plan.step

    def network(self) -> tuple[Any, nn.Module | None]:
        """A float network at the start of training, and the artifact that it comes from, if from one."""
        if self.start is not None:
            return artifact_network(self.folder, self.start)
        return self.reference(), None

    def reference(self) -> Any:
        """The float network that the training in full precision starts from."""
        if self.step.init == "random":
            return random_network(self.folder, self.spec.calibration.seed)
        return checkpoint_network(self.folder)


def prepare_training(spec: JobSpec, workspace: Workspace, progress: Progress) -> PreparedTraining:
    """Resolve the model, plan the job, read and process the images."""
    progress.stage(State.PREPARING, "resolving the model")
    step = spec.training_step
    assert step is not None
    weights = spec.reads_weights
    folder = resolve(spec.model, workspace, weights=weights)
    config = check_folder(folder, weights=weights)
    shards = read_headers(folder).values() if weights else ()
    tensors = {name: info for shard in shards for name, info in shard.items()}
    try:
        plan = plan_training(spec, config, tensors)
    except SpecError as error:
        raise RecipeError(f"{error.path}: {error.detail}") from error
    if step.init.startswith("job_") and workspace.start is None:
        raise ModelError(f"recipe.0.init: job {step.init} has no artifact on this worker's storage")
    device = device_of(plan.spec, workspace)
    channels = int(config.get("num_channels", 3))
    trained, held, judged, warnings = _image_sets(plan, workspace, progress)
    progress.stage(State.PREPARING, "processing the training images")
    images = training_images(trained, folder, channels, progress.advance)
    _check_size(plan, config, images, folder)
    validation = None if held is None else training_images(held, folder, channels, progress.advance)
    evaluation = None
    if judged is not None:
        progress.stage(State.PREPARING, "processing the evaluation images")
        evaluation = pixels(judged, folder, channels, progress.advance)
    warnings = [*plan.warnings, *warnings]
    for text in warnings:
        progress.event("warning", {"message": text})
    files = [folder / "config.json", *(shard_files(folder) if weights else ()), *_start_files(workspace)]
    arrays = (images.cached, images.labels, evaluation)
    return PreparedTraining(
        plan=plan,
        folder=folder,
        start=workspace.start,
        device=device,
        images=images,
        held=validation,
        evaluation=evaluation,
        labels=torch.as_tensor(judged.labels) if judged is not None else torch.empty(0),
        evaluation_name=judged.name if judged is not None else "",
        fingerprint=fingerprint_of(plan.spec, files, arrays, device=device, dtype=torch.float32),
        warnings=warnings,
    )


def _check_size(plan: TrainingPlan, config: dict[str, Any], images: TrainingImages, folder: Path) -> None:
    """That the processor makes images of the size that a network of tokens was made for. Raises ModelError."""
    made = images.pixels(torch.tensor([0]))[0]
    free = config["model_type"] == "dinov2" or not is_vision(config)
    if made.numel() != plan.pixels and not free:
        raise ModelError(
            f"{folder.name}: preprocessor_config.json makes images of {made.shape[1]}x{made.shape[2]}, config.json "
            f"says {config.get('image_size')}: make them agree"
        )


def _start_files(workspace: Workspace) -> Iterator[Path]:
    if workspace.start is not None:
        yield from sorted(workspace.start.glob("*.safetensors"))


def _image_sets(
    plan: TrainingPlan, workspace: Workspace, progress: Progress
) -> tuple[ImageSet, ImageSet | None, ImageSet | None, list[str]]:
    """Images to train on, to validate by, to evaluate on; and warnings. Raises DatasetError."""
    spec, step, seed = plan.spec, plan.step, plan.spec.calibration.seed
    progress.stage(State.PREPARING, "reading the images")
    images = load_images(spec.calibration.dataset, "calibration", workspace)
    check_labels(images, plan.classes, "calibration")
    if step.samples is not None:
        images = _drawn(images, step.samples, seed)
    judged, warnings = None, []
    if spec.evaluation is not None:
        judged = load_images(spec.evaluation.dataset, "evaluation", workspace)
        judged = judged.take(range(min(len(judged), spec.evaluation.samples or len(judged))))
        check_labels(judged, plan.classes, "evaluation")
        warnings = overlapping(images, judged, allowed=spec.evaluation.allow_overlap, progress=progress)
    held = None
    if step.patience is not None:
        if len(images) < 2:
            raise DatasetError(f"calibration: {images.name} has one image: none is left to validate by")
        images, held = split_off(images, step.validation, seed)
    if len(images) == 1 and plan.batch_norm:
        raise DatasetError(
            f"calibration: {images.name} has one image to train on: batch norm has nothing to normalise in it"
        )
    return images, held, judged, warnings


def _drawn(images: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` of the images without replacement, in the order of the set. Raises DatasetError if there are too few."""
    if len(images) < count:
        raise DatasetError(
            f"recipe.0.samples: {images.name} has {len(images)} images; {count} were asked for: give more images "
            "or fewer samples"
        )
    return images.take(np.sort(np.random.default_rng(seed).permutation(len(images))[:count]))
