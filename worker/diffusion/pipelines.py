"""A pipeline folder as what calibration needs of it: the denoiser, its sampler's steps, the shape of a latent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from quantry.diffusion_planning import DiffusionPlan
from worker.diffusion.steps import Step, read_steps
from worker.errors import ModelError, NonFiniteError


@dataclass(frozen=True)
class Loaded:
    """network: in float32, in evaluation, without gradients. scheduler: as it samples, never clipping."""

    network: Any
    scheduler: Any
    steps: tuple[Step, ...]


def load_pipeline(folder: Path, plan: DiffusionPlan, device: torch.device) -> Loaded:
    """Raises ModelError for weights that do not fit the config, NonFiniteError, RecipeError for the sampler."""
    network = _network(folder / plan.family.denoiser, plan.family.architecture)
    for name, value in network.named_parameters():
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"{plan.family.denoiser}: {name} holds NaN or infinity: the checkpoint is damaged"
            )
    torch.nn.Module.to(network, device)  # that of diffusers warns, even of nothing
    scheduler = make_scheduler(folder, plan)
    return Loaded(network, scheduler, read_steps(scheduler, plan.steps, eta=plan.sampling.eta))


def make_scheduler(folder: Path, plan: DiffusionPlan) -> Any:
    """The scheduler of the checkpoint, of the class and without the clipping that the job asks for."""
    kind = getattr(diffusers, plan.scheduler)
    config = dict(kind.load_config(folder / "scheduler", local_files_only=True))
    if plan.sampling.clip_sample is False:
        config |= {"clip_sample": False, "thresholding": False}
    return kind.from_config(config)


def _network(folder: Path, architecture: str) -> Any:
    """The denoiser. Raises ModelError for tensors that are missing, left over or of another shape."""
    kind = getattr(diffusers, architecture)
    try:
        network, info = kind.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{folder.name} does not load: {str(error).splitlines()[0]}") from error
    for kind_of in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind_of]:
            names = sorted(map(str, info[kind_of]))
            raise ModelError(f"{folder.name}: {kind_of.replace('_', ' ')}, such as {names[0]}")
    return network.eval().requires_grad_(False)
