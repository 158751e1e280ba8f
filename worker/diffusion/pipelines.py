"""A pipeline folder as what calibration needs of it: the denoiser, its steps, its conditions, its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from quantry.diffusion_planning import DiffusionPlan
from worker.diffusion.conditions import GuidedLabels, GuidedPrompts, Labelled, Predict, Unconditional
from worker.diffusion.steps import Step, read_steps
from worker.errors import ModelError, NonFiniteError

DECODED = 4  # latents that are made images of at once


@dataclass(frozen=True)
class Prompts:
    """What text samples are asked for by, in calibration and in evaluation. Empty for other pipelines."""

    calibration: Sequence[str] = ()
    evaluation: Sequence[str] = ()


@dataclass(frozen=True)
class Loaded:
    """network: in float32, in evaluation, without gradients. scheduler: as it samples, never clipping.

    predict: what the pipeline does around the network. decoder: makes images of latents, None where they are images.
    """

    network: Any
    scheduler: Any
    steps: tuple[Step, ...]
    predict: Predict
    decoder: Any

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], on the CPU."""
        if self.decoder is None:
            return latents.clamp(-1, 1).cpu()
        scaled = torch.split(latents / self.decoder.config.scaling_factor, DECODED)
        return torch.cat(
            [self.decoder.decode(part, return_dict=False)[0].clamp(-1, 1).cpu() for part in scaled]
        )


def load_pipeline(folder: Path, plan: DiffusionPlan, prompts: Prompts, device: torch.device) -> Loaded:
    """Raises ModelError for weights that do not fit the config, NonFiniteError, RecipeError for the sampler."""
    family = plan.family
    network = _network(folder / family.denoiser, family.architecture)
    for name, value in network.named_parameters():
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"{family.denoiser}: {name} holds NaN or infinity: the checkpoint is damaged"
            )
    pipeline = _pipeline(folder, plan, network)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.float()
    scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config
    )  # pipelines change their settings
    decoder = getattr(pipeline, family.decoder) if family.decoder else None
    for module in (network, decoder):
        if isinstance(module, torch.nn.Module):
            torch.nn.Module.to(
                module.eval().requires_grad_(False), device
            )  # that of diffusers warns, even of nothing
    predict = _predict(pipeline, plan, network, prompts)
    return Loaded(
        network, scheduler, read_steps(scheduler, plan.steps, eta=plan.sampling.eta), predict, decoder
    )


def make_scheduler(folder: Path, plan: DiffusionPlan) -> Any:
    """The scheduler of the checkpoint, of the class and without the clipping that the job asks for."""
    kind = getattr(diffusers, plan.scheduler)
    config = dict(kind.load_config(folder / "scheduler", local_files_only=True))
    if plan.sampling.clip_sample is False:
        config |= {"clip_sample": False, "thresholding": False}
    return kind.from_config(config)


def _pipeline(folder: Path, plan: DiffusionPlan, network: Any) -> Any:
    """The pipeline around the network. Raises ModelError."""
    kind = getattr(diffusers, plan.family.name)
    parts = {plan.family.denoiser: network, "scheduler": make_scheduler(folder, plan)}
    if "safety_checker" in plan.family.others:  # it looks at images, which are looked at here by figures
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        return kind.from_pretrained(folder, **parts, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder.name} does not load: {str(error).splitlines()[0]}") from error


def _predict(pipeline: Any, plan: DiffusionPlan, network: Any, prompts: Prompts) -> Predict:
    scale = plan.sampling.guidance_scale or 1.0
    if plan.family.conditions == "class":
        return GuidedLabels(_classes(network), scale)
    if plan.family.conditions == "text":
        seen, nothing = _encoded(pipeline, prompts.calibration)
        unseen, _ = _encoded(pipeline, prompts.evaluation or prompts.calibration)
        return GuidedPrompts(seen, unseen, nothing, scale)
    classes = network.config.get("num_class_embeds")
    return Labelled(classes) if classes else Unconditional()


def _classes(network: Any) -> int:
    """The labels that mean something; the table of embeddings holds one more, for none."""
    return int(network.config.num_embeds_ada_norm)


@torch.no_grad()
def _encoded(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts (prompts, tokens, width), and of no prompt (1, tokens, width)."""
    found, nothing = [], None
    for prompt in prompts:
        text, nothing = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, True)
        found.append(text)
    assert nothing is not None, "prompts are read before the pipeline is loaded"
    return torch.cat(found), nothing


def _network(folder: Path, architecture: str) -> Any:
    """The denoiser. Raises ModelError for tensors that are missing, left over or of another shape."""
    kind = getattr(diffusers, architecture)
    try:
        network, info = kind.from_pretrained(
            folder,
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
    return network.float().eval().requires_grad_(False)
