"""Write a quantized diffusion pipeline: a folder of diffusers whose denoiser lies packed in a sidecar.

See quantry/pipelines.py for what the sidecar holds. The denoiser's own weights file is left out, so that diffusers
alone says that it is missing, and never samples with random weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import quantry
from quantry.diffusion import SIDECAR, parts_of, pipeline_for
from quantry.layers.linear import pack_weight
from quantry.layers.operands import attached
from quantry.pipelines import FORMAT_VERSION, GAIN, SETTINGS, SHIFT, TENSORS
from quantry.quantizers.activation import ActivationQuantizer
from quantry.recipe import Step
from worker.diffusion.correctors import Correction
from worker.diffusion.steps import Step as SamplingStep
from worker.diffusion.svdquant import LowRank
from worker.diffusion.weights import UNetWeight
from worker.errors import ExportError
from worker.export.files import sync_folder, whole_or_nothing, write_bytes, write_json
from worker.export.quantry_format import Operands

_SCALES = {torch.float16: "float16", torch.float32: "float32"}
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".py", ".h5", ".pkl")


@dataclass(frozen=True)
class Artifact:
    """What is written. network: on its grids, with frozen quantizers, dense but for layers of two branches.
    weights, low_rank: by layer.

    component: its name in the pipeline. scheduler: as it samples. call: how the pipeline is called for one sample.
    noise_kept: the part of each step's noise that is still added, None for all. corrections: of each step, or none.
    """

    component: str
    network: Any
    weights: Mapping[str, UNetWeight]
    low_rank: Mapping[str, LowRank]
    splits: Mapping[str, tuple[int, int] | None]
    scheduler: Any
    steps: Sequence[SamplingStep]
    noise_kept: Sequence[float] | None
    eta: float
    call: Mapping[str, Any]
    corrections: Sequence[Correction]
    recipe: Sequence[Step]
    base_model: str


def write_pipeline(source: Path, target: Path, artifact: Artifact) -> None:
    """Write into `target`, an empty folder. Raises ExportError, DiskFull; `target` is then empty again."""
    if any(target.iterdir()):
        raise ExportError(f"{target} is not empty: a checkpoint is written into a fresh folder")
    with whole_or_nothing(target):
        index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        scheduler = type(artifact.scheduler).__name__
        index["scheduler"] = ["diffusers", scheduler]
        index["_class_name"] = pipeline_for(index["_class_name"], scheduler)
        write_json(target / "model_index.json", index)
        for part in parts_of(index):
            if part not in (artifact.component, "scheduler"):
                _copy(source / part, target / part)
        artifact.scheduler.save_pretrained(target / "scheduler")
        (target / artifact.component).mkdir()
        shutil.copyfile(
            source / artifact.component / "config.json", target / artifact.component / "config.json"
        )
        for file in source.glob("LICEN[SC]E*"):
            shutil.copyfile(file, target / file.name)
        write_bytes(target / TENSORS, save(dict(_tensors(artifact))))
        write_json(target / SIDECAR, _sidecar(artifact))
        sync_folder(target)


def _copy(source: Path, target: Path) -> None:
    """A component as it is, but for pickles and code."""
    shutil.copytree(source, target, ignore=lambda folder, names: [n for n in names if n.endswith(_LEFT_OUT)])


def _tensors(artifact: Artifact) -> Iterable[tuple[str, Tensor]]:
    """Every tensor of the network, packed where it is quantized, and of its quantizers."""
    packed = {f"{name}.weight" for name in artifact.weights}
    quantizers = _quantizers(artifact.network)
    own = {name for name, _ in Operands(quantizers).tensors()}
    for name, value in artifact.network.state_dict().items():
        layer, _, last = name.rpartition(".")
        if name in packed or name in own:
            continue
        if last == "bias" and artifact.splits.get(layer):
            name = f"{layer}.deep.bias"
        yield name, value.contiguous().cpu() if layer in artifact.weights else _small(value)
    for name, weight in artifact.weights.items():
        halves = ("",) if len(weight.parts) == 1 else (".deep", ".skip")
        for half, part in zip(halves, weight.parts, strict=True):
            for key, value in pack_weight(part).items():
                yield f"{name}{half}.{key}", value.contiguous().cpu()
    for name, value in Operands(quantizers).tensors():
        yield name, value.contiguous().cpu()
    corrections = padded_corrections(artifact.network, artifact.corrections)
    if corrections:
        yield GAIN, torch.stack([gain for gain, _ in corrections])
        yield SHIFT, torch.stack([shift for _, shift in corrections])


def padded_corrections(network: Any, corrections: Sequence[Correction]) -> list[tuple[Tensor, Tensor]]:
    """(gain, shift) of each step for all channels of the network's output: a variance beside them is left alone."""
    channels = network.config.out_channels or 0
    found = []
    for correction in corrections:
        more = max(0, channels - len(correction.gain))
        gain = torch.cat([correction.gain.cpu(), torch.ones(more)])
        found.append((gain, torch.cat([correction.shift.cpu(), torch.zeros(more)])))
    return found


def _small(value: Tensor) -> Tensor:
    """In float16 where that holds it exactly, as it does what a float16 checkpoint held."""
    half = value.half()
    exact = value.dtype == torch.float32 and bool((half.float() == value).all())
    return (half if exact else value).contiguous().cpu()


def _noise(artifact: Artifact) -> dict[str, Any]:
    """What a loader needs to leave out a part of each step's noise: the step without it, and the part that is kept."""
    if artifact.noise_kept is None:
        return {}
    steps = artifact.steps
    return {
        "noise": {
            "kept": list(artifact.noise_kept),
            "a": [step.a for step in steps],
            "b": [step.b for step in steps],
        }
    }


def _quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    found = {}
    for name, quantizer in attached(network):
        if not isinstance(quantizer, ActivationQuantizer):
            raise ExportError(f"`{name}`: its quantizer is still being trained and cannot be written")
        found[name] = quantizer
    return found


def _sidecar(artifact: Artifact) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {}
    for name, weight in artifact.weights.items():
        part = weight.parts[0]
        split = artifact.splits.get(name)
        layers[name] = {
            "bits": part.bits,
            "symmetric": part.symmetric,
            "scale_dtype": _SCALES[part.scale.dtype],
            "bias": getattr(artifact.network.get_submodule(name), "bias", None) is not None,
            **({"split": list(split)} if split else {}),
        }
    for name, low in artifact.low_rank.items():
        layers[name] = {
            "bits": low.weight.bits,
            "symmetric": low.weight.symmetric,
            "scale_dtype": _SCALES[low.weight.scale.dtype],
            "bias": artifact.network.get_submodule(name).residual.bias is not None,
            "group_size": low.weight.group_size,
            "rank": len(low.down),
        }
    scheduler = artifact.scheduler
    return {
        "format_version": FORMAT_VERSION,
        "component": artifact.component,
        "layers": layers,
        "activations": {name: q.describe() for name, q in _quantizers(artifact.network).items()},
        "corrected": bool(artifact.corrections),
        "sampling": {
            "scheduler": type(scheduler).__name__,
            "steps": len(artifact.steps),
            "eta": artifact.eta,
            **_noise(artifact),
            "timesteps": [step.timestep for step in artifact.steps],
            "settings": {key: scheduler.config[key] for key in SETTINGS if key in scheduler.config},
        },
        "call": dict(artifact.call),
        "producer": f"quantry {quantry.__version__}",
        "base_model": artifact.base_model,
        "recipe": [step.model_dump(mode="json") for step in artifact.recipe],
    }
