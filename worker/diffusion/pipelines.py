"""A pipeline folder as what calibration needs of it: the denoiser, its steps, its conditions, its decoder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from quantry.diffusion import INDEX, SCHEDULER_CONFIG, PipelineFamily, parts_of, pipeline_for
from quantry.diffusion_planning import DiffusionPlan
from worker.diffusion.conditions import GuidedLabels, GuidedPrompts, Labelled, Predict, Unconditional
from worker.diffusion.steps import Step, read_steps
from worker.errors import ModelError, NonFiniteError, QuantizationError
from worker.models.source import reason_of

DECODED = 4  # latents that are made images of at once
_UNREAD = "safety_checker"  # it looks at images, which are looked at here by figures


@dataclass(frozen=True)
class Prompts:
    """What text samples are asked for by, in calibration and in evaluation. Empty for other pipelines."""

    calibration: Sequence[str] = ()
    evaluation: Sequence[str] = ()


@dataclass(frozen=True)
class Loaded:
    """network: in float32, in evaluation, without gradients. scheduler: as it samples, never clipping.

    predict: what the pipeline does around the network. decoder: makes images of latents, None where they are images.
    warnings: about the prompts.
    """

    network: Any
    scheduler: Any
    steps: tuple[Step, ...]
    predict: Predict
    decoder: Any
    warnings: tuple[str, ...] = ()

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
    """Raises ModelError for parts that do not load or fit, NonFiniteError, RecipeError for the sampler."""
    family = plan.family
    networks = _networks(folder, family)
    pipeline = _pipeline(folder, plan, networks)
    network = networks[family.denoiser]
    with blaming(f"scheduler/{SCHEDULER_CONFIG} cannot be used"):
        scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config
        )  # pipelines change settings
        if type(scheduler).__name__ != plan.scheduler:
            raise ModelError(
                f"a {plan.family.name} does not sample with {plan.scheduler}: leave `scheduler` out"
            )
        steps = read_steps(scheduler, plan.steps, eta=plan.sampling.eta)
    decoder = getattr(pipeline, family.decoder) if family.decoder else None
    for module in filter(None, (network, decoder)):
        torch.nn.Module.to(module, device)  # that of diffusers warns, even of nothing
    predict = _predict(pipeline, plan, network, prompts)
    loaded = Loaded(network, scheduler, steps, predict, decoder, tuple(_warnings(pipeline, prompts)))
    with blaming(f"{family.decoder} does not decode latents of {plan.latent}"):
        image = loaded.images(torch.zeros(1, *plan.latent, device=device))
    if not torch.isfinite(image).all():
        raise NonFiniteError(f"{family.decoder} makes NaN or infinity of a latent of zeros")
    return loaded


def make_scheduler(folder: Path, plan: DiffusionPlan) -> Any:
    """The scheduler of the checkpoint, of the class and without the clipping that the job asks for."""
    kind = getattr(diffusers, plan.scheduler)
    config = dict(kind.load_config(folder / "scheduler", local_files_only=True))
    if plan.sampling.clip_sample is False:
        config |= {"clip_sample": False, "thresholding": False}
    return kind.from_config(config)


def _pipeline(folder: Path, plan: DiffusionPlan, networks: Mapping[str, Any]) -> Any:
    """The pipeline around the networks. Raises ModelError."""
    kind = getattr(diffusers, pipeline_for(plan.family.name, plan.scheduler))
    extra = {"requires_safety_checker": False} if _UNREAD in plan.family.others else {}
    left_out = {_UNREAD: None} if _UNREAD in plan.family.others else {}
    with blaming(f"scheduler/{SCHEDULER_CONFIG} cannot be used"):
        scheduler = make_scheduler(folder, plan)
    with blaming(f"{folder.name} does not load", folder):
        return kind.from_pretrained(
            folder,
            **networks,
            **left_out,
            **extra,
            scheduler=scheduler,
            use_safetensors=True,
            local_files_only=True,
        )


def _predict(pipeline: Any, plan: DiffusionPlan, network: Any, prompts: Prompts) -> Predict:
    scale = plan.sampling.guidance_scale or 1.0
    if plan.family.conditions == "class":
        return GuidedLabels(_classes(network), scale)
    if plan.family.conditions == "text":
        with blaming("text_encoder does not read the prompts"):
            seen, nothing = _encoded(pipeline, prompts.calibration)
            unseen, _ = _encoded(pipeline, prompts.evaluation or prompts.calibration)
        return GuidedPrompts(seen, unseen, nothing, scale)
    classes = network.config.get("num_class_embeds")
    return Labelled(classes) if classes else Unconditional()


def _classes(network: Any) -> int:
    """The labels that mean something; the table of embeddings holds one more, for none."""
    return int(network.config.num_embeds_ada_norm)


def _warnings(pipeline: Any, prompts: Prompts) -> Iterator[str]:
    everything = (*prompts.calibration, *prompts.evaluation)
    limit = pipeline.tokenizer.model_max_length if everything else 0
    cut = sum(len(pipeline.tokenizer(prompt).input_ids) > limit for prompt in everything)
    if cut:
        yield f"{cut} of {len(everything)} prompts are longer than {limit} tokens, and their ends are not read"


@torch.no_grad()
def _encoded(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts (prompts, tokens, width), and of no prompt (1, tokens, width)."""
    found, nothing = [], None
    for prompt in prompts:
        text, nothing = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, True)
        found.append(text)
    assert nothing is not None, "prompts are read before the pipeline is loaded"
    return torch.cat(found), nothing


def _networks(folder: Path, family: PipelineFamily) -> dict[str, Any]:
    """Every component with weights, by name, in float32 and without gradients. Raises ModelError, NonFiniteError."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    found = {}
    for part, (library, kind) in parts_of(index).items():
        if part == _UNREAD or not any((folder / part).glob("*.safetensors*")):
            continue
        with blaming(f"{part} does not load", folder):
            network = _network(folder / part, library, kind, strict=part == family.denoiser)
        for name, value in network.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{part}: {name} holds NaN or infinity: the checkpoint is damaged")
        found[part] = network
    return found


def _network(folder: Path, library: str, kind: str, *, strict: bool) -> Any:
    """A component. Raises ModelError for tensors that are missing, of another shape or, if `strict`, left over."""
    options = {"low_cpu_mem_usage": False} if library == "diffusers" else {}
    network, info = getattr(importlib.import_module(library), kind).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    for kind_of in ("missing_keys", "mismatched_keys", *(("unexpected_keys",) if strict else ())):
        if info[kind_of]:
            names = sorted(map(str, info[kind_of]))
            raise ModelError(f"{folder.name}: {kind_of.replace('_', ' ')}, such as {names[0]}")
    return network.float().eval().requires_grad_(False)


@contextmanager
def blaming(what: str, folder: Path = Path()) -> Iterator[None]:
    """Whatever diffusers or transformers raises for a part of `folder`, as a ModelError after `what`."""
    try:
        yield
    except (QuantizationError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{what}: {reason_of(error, folder.absolute())}") from error
