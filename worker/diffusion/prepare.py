"""A diffusion job made ready: its folder planned again, the network loaded, seeds drawn, a fingerprint taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import diffusers
import torch

import quantry
from quantry.base import SpecError
from quantry.contract import DatasetRef, JobSpec
from quantry.diffusion_planning import INSTALLED, DiffusionPlan, plan_diffusion
from quantry.jobs import State
from worker.calibration.pieces import PieceStore
from worker.calibration.texts import load_text
from worker.diffusion.conditions import UNSEEN
from worker.diffusion.pipelines import Loaded, Prompts, blaming, load_pipeline
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.trajectory import SeededNoise
from worker.diffusion.unet import UNetLayer, layers_of
from worker.errors import DatasetError, RecipeError
from worker.metrics.perceptual import Measure, load_measure
from worker.models.source import Role, read_pipeline, resolve
from worker.prepare import OVERLAP_ALLOWED, device_of
from worker.progress import Progress
from worker.workspace import Workspace

SEEDS = 1 << 13  # of calibration, for each seed of a job


@dataclass
class DiffusionJob:
    """What every stage of a diffusion job looks at.

    installed: measures of the operator's, and by what they measure, by metric. warnings: grows while the job runs.
    """

    spec: JobSpec
    plan: DiffusionPlan
    folder: Path
    loaded: Loaded
    layers: tuple[UNetLayer, ...]
    device: torch.device
    store: PieceStore
    fingerprint: str
    progress: Progress
    features: Path | None
    installed: Mapping[str, tuple[Measure, str]]
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def full(self) -> StepNetwork:
        return StepNetwork(self.loaded.network, self.loaded.steps, self.loaded.predict)

    def calibration(self) -> SeededNoise:
        first = self.spec.calibration.seed * SEEDS
        return self._noise(first, self.spec.calibration.samples)

    def evaluation(self) -> SeededNoise:
        """Seeds that calibration has not seen."""
        samples = self.spec.evaluation.samples if self.spec.evaluation else 0
        return self._noise(UNSEEN, samples or 0)

    def reference(self, count: int) -> SeededNoise:
        """A few samples that a written pipeline is checked with, on the CPU."""
        return SeededNoise(tuple(range(UNSEEN, UNSEEN + count)), self.plan.latent, torch.device("cpu"))

    def _noise(self, first: int, count: int) -> SeededNoise:
        return SeededNoise(tuple(range(first, first + count)), self.plan.latent, self.device)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.event("warning", {"message": text})

    @property
    def tell(self) -> Callable[[int, int], None]:
        return lambda done, total: self.progress.advance(done, total)


def prepare(spec: JobSpec, workspace: Workspace, progress: Progress) -> DiffusionJob:
    """Raises ModelError and its kinds, RecipeError, DeviceError."""
    progress.stage(State.PREPARING, "resolving the model")
    folder = resolve(spec.model, workspace)
    index, components = read_pipeline(folder)
    try:
        plan = plan_diffusion(spec, index, components)
    except SpecError as error:
        raise RecipeError(f"{error.path}: {error.detail}") from error
    evaluation = plan.spec.evaluation
    features = resolve(evaluation.features, workspace) if evaluation and evaluation.features else None
    device = device_of(plan.spec, workspace)
    prompts = _prompts(plan, workspace)
    progress.stage(State.PREPARING, "loading the pipeline")
    loaded = load_pipeline(folder, plan, prompts, device)
    fingerprint = _fingerprint(plan.spec, folder, prompts, device)
    store = PieceStore(workspace.checkpoints, fingerprint)
    layers = _layers(loaded, plan, device)
    job = DiffusionJob(
        spec=plan.spec,
        plan=plan,
        folder=folder,
        loaded=loaded,
        layers=layers,
        device=device,
        store=store,
        fingerprint=fingerprint,
        progress=progress,
        features=features,
        installed=_installed(plan, loaded, workspace),
    )
    for text in (*plan.warnings, *loaded.warnings):
        job.warn(text)
    return job


def _installed(plan: DiffusionPlan, loaded: Loaded, workspace: Workspace) -> dict[str, tuple[Measure, str]]:
    """Raises RecipeError for what is asked for and not installed."""
    metrics = (plan.spec.evaluation.metrics or ()) if plan.spec.evaluation else ()
    wanted = [metric for metric in metrics if metric in INSTALLED]
    if not wanted:
        return {}
    image = loaded.images(torch.zeros(1, *plan.latent, device=loaded.network.device))
    return {metric: load_measure(metric, image, workspace.inception_weights) for metric in wanted}


def _prompts(plan: DiffusionPlan, workspace: Workspace) -> Prompts:
    """The lines of the texts that a text-to-image job names. Raises DatasetError for none, or the same in both."""
    if plan.family.conditions != "text":
        return Prompts()
    spec = plan.spec
    seen = _lines(spec.calibration.dataset, "calibration", workspace)
    if spec.evaluation is None:
        return Prompts(seen)
    unseen = _lines(spec.evaluation.dataset, "evaluation", workspace)
    share = len(set(unseen) & set(seen)) / len(set(unseen))
    if share > OVERLAP_ALLOWED and not spec.evaluation.allow_overlap:
        raise DatasetError(
            f"evaluation: {share:.1%} of the prompts also stand among the calibration's; evaluate on others, or set "
            "evaluation.allow_overlap to accept figures that flatter the result"
        )
    return Prompts(seen, unseen)


def _lines(ref: DatasetRef, role: Role, workspace: Workspace) -> list[str]:
    text = load_text(ref, role, workspace)
    lines = [line for document in text.documents for line in document.splitlines() if line.strip()]
    if not lines:
        raise DatasetError(f"{role}: {text.name} holds no prompt; put one on each line")
    return lines


def _layers(loaded: Loaded, plan: DiffusionPlan, device: torch.device) -> tuple[UNetLayer, ...]:
    """The layers that run. Raises ModelError where latents of the config's size do not pass the network."""
    x = torch.zeros(1, *plan.latent, device=device)
    with blaming(f"latents of {plan.latent} do not pass the denoiser"):
        return layers_of(
            loaded.network, lambda: loaded.predict(loaded.network, x, loaded.steps[0].timestep, (0,))
        )


def _fingerprint(spec: JobSpec, folder: Path, prompts: Prompts, device: torch.device) -> str:
    """A digest of everything that the quantized bytes depend on."""
    digest = hashlib.sha256()
    recipe = spec.model_dump_json(include={"recipe", "calibration", "sampling"})
    versions = (quantry.__version__, torch.__version__, diffusers.__version__)
    for part in (*versions, str(device), recipe, *prompts.calibration):
        digest.update(f"{part}\n".encode())
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
