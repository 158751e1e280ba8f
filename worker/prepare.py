"""prepare(): the model and the texts of a job, resolved, checked and at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import quantry
from quantry.base import SpecError
from quantry.contract import JobSpec
from quantry.jobs import State
from quantry.layers.operands import ATTENTION
from quantry.planning import Plan, plan
from quantry.training_planning import is_trainable
from quantry.vision_planning import VisionPlan, plan_vision
from worker.calibration.images import ImageSet, calibration_images, check_labels, load_images, pixels
from worker.calibration.images import overlap as overlap_of_images
from worker.calibration.texts import calibration_windows, cut_windows, load_text, overlap, tokenize
from worker.errors import DatasetError, DeviceError, ModelError, NonFiniteError, RecipeError
from worker.metrics.quality import ClassifierJudge, Judge, PerplexityJudge
from worker.models.causal_lm import CausalLM
from worker.models.network import Network
from worker.models.source import check_folder, resolve
from worker.models.tensors import read_headers, shard_files
from worker.models.vision import VisionModel
from worker.progress import Progress
from worker.steps import needs_statistics
from worker.workspace import Workspace

OVERLAP_ALLOWED = 0.01  # of the evaluation's runs of 32 tokens: set phrases repeat in any two texts
SMALL_MODEL = 20_000_000  # parameters; below, float32 costs nothing and keeps every digit


@dataclass
class Prepared:
    """A job whose model and data are at hand and were checked.

    calibration, evaluation: token windows (windows, length), or pixels (N, C, H, W); None where the recipe
    or the spec needs none. judge: makes figures of the evaluation's streams. fingerprint: of everything that
    the quantized bytes depend on.
    """

    spec: JobSpec
    plan: Plan | VisionPlan
    folder: Path
    model: Network
    calibration: Tensor | None
    evaluation: Tensor | None
    evaluation_name: str
    judge: Judge
    fingerprint: str
    warnings: list[str] = field(default_factory=list)


def prepare(spec: JobSpec, workspace: Workspace, progress: Progress) -> Prepared:
    """Resolve the model, plan the job, read the data, cut and check what will be used of it."""
    progress.stage(State.PREPARING, "resolving the model")
    folder = resolve(spec.model, workspace)
    tensors = {name: info for shard in read_headers(folder).values() for name, info in shard.items()}
    config = check_folder(folder)
    try:
        classifier = is_trainable(config)
        planned = plan_vision(spec, config, tensors) if classifier else plan(spec, config, tensors)
    except SpecError as error:
        raise RecipeError(f"{error.path}: {error.detail}") from error
    device = device_of(spec, workspace)
    if isinstance(planned, VisionPlan):
        return _classifier(planned, folder, device, workspace, progress)
    return _language_model(planned, folder, device, workspace, progress)


def _language_model(
    planned: Plan, folder: Path, device: torch.device, workspace: Workspace, progress: Progress
) -> Prepared:
    dtype = compute_dtype(planned.spec, planned, device)
    attention = ATTENTION if planned.spec.softmax_bias else None
    model = CausalLM(folder, device=device, dtype=dtype, attention=attention)
    progress.stage(State.PREPARING, "reading the texts")
    calibration, evaluation, name, warnings = _windows(planned, model, workspace)
    return _prepared(
        planned, folder, model, calibration, evaluation, name, PerplexityJudge(model), warnings, progress
    )


def _classifier(
    planned: VisionPlan, folder: Path, device: torch.device, workspace: Workspace, progress: Progress
) -> Prepared:
    spec = planned.spec
    model = VisionModel(folder, device=device)
    progress.stage(State.PREPARING, "reading the images")
    channels = model.image_shape[0]
    wanted = spec.calibration
    images = calibration_images(
        load_images(wanted.dataset, "calibration", workspace), samples=wanted.samples, seed=wanted.seed
    )
    progress.stage(State.PREPARING, "processing the calibration images")
    calibration = pixels(images, folder, channels, progress.advance)
    _check_size(model, calibration)
    _check_finite(model, calibration)
    if spec.evaluation is None:
        judge = ClassifierJudge(torch.empty(0), ())
        return _prepared(planned, folder, model, calibration, None, "", judge, [], progress)
    held = load_images(spec.evaluation.dataset, "evaluation", workspace)
    held = held.take(range(min(len(held), spec.evaluation.samples or len(held))))
    check_labels(held, model.classes, "evaluation")
    warnings = overlapping(images, held, allowed=spec.evaluation.allow_overlap, progress=progress)
    judge = ClassifierJudge(torch.as_tensor(held.labels), spec.evaluation.metrics or ())
    progress.stage(State.PREPARING, "processing the evaluation images")
    evaluation = pixels(held, folder, channels, progress.advance)
    return _prepared(planned, folder, model, calibration, evaluation, held.name, judge, warnings, progress)


def _check_size(model: VisionModel, images: Tensor) -> None:
    """That the processor makes images of the network's size; DINOv2 takes others. Raises ModelError."""
    given, wanted = tuple(images.shape[1:]), model.image_shape
    if given != wanted and model.family.model_type != "dinov2":
        raise ModelError(
            f"{model.folder.name}: preprocessor_config.json makes images of {given[1]}x{given[2]}, config.json "
            f"says {wanted[1]}x{wanted[2]}: make them agree"
        )


def _check_finite(model: VisionModel, images: Tensor) -> None:
    """That the float network computes numbers, before anything is fitted to it. Raises NonFiniteError."""
    if not torch.isfinite(model.logits(images[: model.images_at_once])).all():
        raise NonFiniteError(
            f"{model.folder.name} computes NaN or infinity on calibration images in full precision: check the "
            "checkpoint and its preprocessor_config.json"
        )


def overlapping(
    calibration: ImageSet, evaluation: ImageSet, *, allowed: bool, progress: Progress
) -> list[str]:
    """A warning for each kind of overlap. Raises DatasetError for more than is allowed."""
    progress.stage(State.PREPARING, "comparing the images")
    share = overlap_of_images(calibration, evaluation, progress.advance)
    if share > OVERLAP_ALLOWED and not allowed:
        raise DatasetError(
            f"evaluation: {share:.1%} of {evaluation.name} also stand among the calibration images; evaluate on "
            "others, or set evaluation.allow_overlap to accept figures that flatter the result"
        )
    return [f"{share:.2%} of the evaluation images also stand among the calibration images"] if share else []


def _prepared(
    planned: Plan | VisionPlan,
    folder: Path,
    model: Network,
    calibration: Tensor | None,
    evaluation: Tensor | None,
    name: str,
    judge: Judge,
    warnings: list[str],
    progress: Progress,
) -> Prepared:
    warnings = [*planned.warnings, *warnings]
    for text in warnings:
        progress.event("warning", {"message": text})
    fingerprint = fingerprint_of(
        planned.spec,
        [folder / "config.json", *shard_files(folder)],
        (calibration, evaluation),
        device=model.device,
        dtype=model.dtype,
    )
    return Prepared(
        planned.spec, planned, folder, model, calibration, evaluation, name, judge, fingerprint, warnings
    )


def _windows(
    planned: Plan, model: CausalLM, workspace: Workspace
) -> tuple[Tensor | None, Tensor | None, str, list[str]]:
    """Calibration windows, evaluation windows, the name of the evaluation text, and warnings."""
    spec = planned.spec
    tokenizer = model.tokenizer()
    calibration = _calibration(planned, model, workspace, tokenizer)
    if spec.evaluation is None:
        return calibration, None, "", []
    text = load_text(spec.evaluation.dataset, "evaluation", workspace)
    tokens = tokenize(text, tokenizer, model.start_token)
    _check_vocabulary(tokens, model)
    evaluation = cut_windows(tokens, spec.evaluation.sequence_length or 0)[: spec.evaluation.samples]
    if not len(evaluation):
        raise DatasetError(
            f"evaluation: {text.name} has {len(tokens)} tokens, less than one window of "
            f"{spec.evaluation.sequence_length}: give more text or a shorter sequence_length"
        )
    share = 0.0 if calibration is None else overlap(calibration, evaluation)
    if share > OVERLAP_ALLOWED and not spec.evaluation.allow_overlap:
        raise DatasetError(
            f"evaluation: {share:.1%} of {text.name} also stands in the calibration windows; evaluate on other "
            "text, or set evaluation.allow_overlap to accept figures that flatter the result"
        )
    warnings = [f"{share:.2%} of the evaluation text also stands in the calibration windows"] if share else []
    return calibration, evaluation, text.name, warnings


def _calibration(planned: Plan, model: CausalLM, workspace: Workspace, tokenizer: Any) -> Tensor | None:
    """The calibration windows; None for a recipe that looks at no data."""
    spec = planned.spec
    if len(spec.recipe) == 1 and not needs_statistics(spec.weight_step):
        return None
    text = load_text(spec.calibration.dataset, "calibration", workspace)
    tokens = tokenize(text, tokenizer, model.start_token)
    _check_vocabulary(tokens, model)
    return calibration_windows(
        tokens,
        samples=spec.calibration.samples,
        length=spec.calibration.sequence_length or 0,
        seed=spec.calibration.seed,
        name=text.name,
    )


def _check_vocabulary(tokens: np.ndarray[Any, Any], model: CausalLM) -> None:
    size = model.model.get_input_embeddings().num_embeddings
    largest = int(tokens.max(initial=0))
    if largest >= size:
        raise DatasetError(
            f"the tokenizer gives token {largest}, the model knows {size}: they do not belong together"
        )


def device_of(spec: JobSpec, workspace: Workspace) -> torch.device:
    """Where the job runs. Raises DeviceError."""
    wanted = workspace.device if spec.device == "auto" else spec.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device: cuda was asked for, but this worker has no CUDA device")
    return torch.device(wanted)


def compute_dtype(spec: JobSpec, planned: Plan, device: torch.device) -> torch.dtype:
    """The dtype of the forwards: as asked, or bfloat16 where the processor multiplies it natively."""
    if spec.compute_dtype != "auto":
        return torch.bfloat16 if spec.compute_dtype == "bfloat16" else torch.float32
    large = planned.parameters >= SMALL_MODEL
    return torch.bfloat16 if large and multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are quicker than those of float32: on a CPU without it, fifty times slower."""
    if device.type == "cuda":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fingerprint_of(
    spec: JobSpec,
    files: Iterable[Path],
    arrays: Iterable[Tensor | None],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """A digest of everything that the quantized bytes depend on: the recipe, the model's files, the data."""
    digest = hashlib.sha256()
    recipe = spec.model_dump_json(include={"recipe", "calibration", "evaluation"})
    for part in (quantry.__version__, torch.__version__, str(device), str(dtype), recipe):
        digest.update(f"{part}\n".encode())
    for array in arrays:
        digest.update(b"-" if array is None else array.numpy().tobytes())
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
