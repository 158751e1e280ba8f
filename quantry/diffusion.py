"""The diffusion pipelines that Quantry knows, and what a folder of one says of itself. No torch.

A folder of diffusers: model_index.json names the components and their classes; each lies in a folder of its name with
a config and, if it has weights, safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantry.base import SpecError
from quantry.headers import HeaderError, TensorInfo, merge_shards

INDEX = "model_index.json"
SIDECAR = "quantization.json"  # of a quantized pipeline; see quantry/pipelines.py
SCHEDULER_CONFIG = "scheduler_config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers and of transformers
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last: the safety checker
MAX_SHARDS = 1000

Read = Callable[[str], bytes]  # a small file of the folder, by its path in it
ReadHeader = Callable[[str], Mapping[str, TensorInfo]]


@dataclass(frozen=True)
class PipelineFamily:
    """One pipeline class of diffusers.

    denoiser: the component that is quantized, of class `architecture`. others: what else it may have, beside the
    scheduler; it is copied. conditions: what a sample is asked for by. guidance: the usual scale of classifier-free
    guidance. decoder: the component that makes images of latents. one_step: a consistency model. square: it samples
    no other shape.
    """

    name: str
    denoiser: str
    architecture: str
    others: tuple[str, ...] = ()
    conditions: Literal["text", "class"] | None = None
    guidance: float | None = None
    decoder: str | None = None
    one_step: bool = False
    square: bool = False

    @property
    def transformer(self) -> bool:
        """Whether the denoiser's blocks are a transformer's."""
        return self.denoiser == "transformer"


PIPELINES: dict[str, PipelineFamily] = {
    family.name: family
    for family in (
        PipelineFamily("DDPMPipeline", "unet", "UNet2DModel"),
        PipelineFamily("DDIMPipeline", "unet", "UNet2DModel"),
        PipelineFamily("ConsistencyModelPipeline", "unet", "UNet2DModel", one_step=True, square=True),
        PipelineFamily("LDMPipeline", "unet", "UNet2DModel", ("vqvae",), decoder="vqvae", square=True),
        PipelineFamily(
            "StableDiffusionPipeline",
            "unet",
            "UNet2DConditionModel",
            ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"),
            conditions="text",
            guidance=7.5,
            decoder="vae",
        ),
        PipelineFamily(
            "DiTPipeline",
            "transformer",
            "DiTTransformer2DModel",
            ("vae",),
            conditions="class",
            guidance=4.0,
            decoder="vae",
            square=True,
        ),
    )
}


@dataclass(frozen=True)
class Component:
    """A part of a pipeline: its config, and its tensors, none of a scheduler or tokenizer."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def is_pipeline(config: Mapping[str, Any]) -> bool:
    """Whether this is a model_index.json, not the config of a single model."""
    return str(config.get("_class_name", "")).endswith("Pipeline")


def pipeline_family_of(index: Mapping[str, Any]) -> PipelineFamily:
    """The family of a model_index.json. Raises SpecError for pipelines and components that are not known."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise SpecError(
            "model", f"pipeline {name!r} is not supported; supported: {', '.join(sorted(PIPELINES))}"
        )
    family = PIPELINES[name]
    for component, (library, kind) in parts_of(index).items():
        if library not in _LIBRARIES:
            raise SpecError(
                "model",
                f"model_index.json takes `{component}` from {library!r}; only diffusers' and transformers' are",
            )
        if component not in (family.denoiser, "scheduler", *family.others):
            raise SpecError(
                "model", f"model_index.json names the component `{component}`, which a {name} has not"
            )
        if component == family.denoiser and kind != family.architecture:
            raise SpecError(
                "model", f"the `{component}` of a {name} must be a {family.architecture}, this is a {kind}"
            )
    needed = filter(None, (family.denoiser, "scheduler", family.decoder))
    missing = [part for part in needed if part not in parts_of(index)]
    if missing:
        raise SpecError("model", f"model_index.json names no `{missing[0]}`, which a {name} needs")
    return family


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """(library, class) by component; those that are left out ([null, null]) are not listed."""
    found = {}
    for name, value in index.items():
        if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str):
            found[name] = (value[0], str(value[1]))
    return found


def read_components(
    index: Mapping[str, Any], names: Collection[str], read: Read, header: ReadHeader
) -> dict[str, Component]:
    """The components that model_index.json names, each from its folder.

    Args: names: paths of all files of the pipeline. read, header: of one of them.
    Raises: HeaderError, naming the file.
    """
    found = {}
    for part in parts_of(index):
        if f"{part}/config.json" in names:
            config = _json(f"{part}/config.json", read)
            found[part] = Component(config, _tensors(part, names, read, header))
        elif f"{part}/{SCHEDULER_CONFIG}" in names:
            found[part] = Component(_json(f"{part}/{SCHEDULER_CONFIG}", read))
        elif any(name.startswith(f"{part}/") for name in names):
            found[part] = Component({})
        else:
            raise HeaderError(f"{INDEX} names `{part}`, and there is no folder {part}")
    return found


def weight_files(part: str, names: Collection[str], read: Read) -> tuple[dict[str, Any] | None, list[str]]:
    """The weight map of a sharded component, and the files of its weights. Raises HeaderError."""
    for file in _WEIGHTS:
        if f"{part}/{file}" in names:
            return None, [file]
        if f"{part}/{file}.index.json" in names:
            weight_map = _json(f"{part}/{file}.index.json", read).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise HeaderError(f"{part}/{file}.index.json has no weight_map from tensors to files")
            shards = sorted(set(map(str, weight_map.values())))
            wrong = [
                s for s in shards if "/" in s or f"{part}/{s}" not in names or not s.endswith(".safetensors")
            ]
            if wrong or len(shards) > MAX_SHARDS:
                raise HeaderError(
                    f"{part}/{file}.index.json names {(wrong or shards)[0]!r}, which is not beside it"
                )
            return weight_map, shards
    others = sorted(name for name in names if name.startswith(f"{part}/") and not name.endswith(".json"))
    hint = f"; {others[0]} is not read: convert it to safetensors" if others else ""
    raise HeaderError(f"`{part}` has no safetensors weights ({' or '.join(_WEIGHTS)}){hint}")


def _tensors(part: str, names: Collection[str], read: Read, header: ReadHeader) -> dict[str, TensorInfo]:
    weight_map, shards = weight_files(part, names, read)
    return merge_shards(weight_map, {shard: header(f"{part}/{shard}") for shard in shards})


def _json(name: str, read: Read) -> dict[str, Any]:
    try:
        value = json.loads(read(name))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise HeaderError(f"{name} is not a JSON object")
    return value


_OF_SCHEDULER = {"DDIMScheduler": "DDIMPipeline", "DDPMScheduler": "DDPMPipeline"}


def pipeline_for(pipeline: str, scheduler: str) -> str:
    """The class that samples with this scheduler; a DDIMPipeline makes a DDIMScheduler of any it is given."""
    return _OF_SCHEDULER.get(scheduler, pipeline) if pipeline in _OF_SCHEDULER.values() else pipeline
