"""Load a diffusion pipeline whose denoiser Quantry has quantized, and keep it to the steps it was calibrated for.

The folder is one of diffusers without the denoiser's weights file: they lie packed in quantization.safetensors, beside
every quantizer's tables; quantization.json says what is where:
    format_version, component, layers {name: {bits, symmetric, scale_dtype, bias, split, group_size, rank}},
    activations {operand: description of its quantizer}, corrected (whether predictions are), sampling {scheduler,
    steps, eta, timesteps, settings, noise where steps add less of it: kept, a and b of each, x' = a x + b output +
    noise}, call (its arguments for one sample), producer, base_model, recipe.
diffusers has no hook for a quantization of others, so `quantry.load(folder)` is the way in.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantry.quantizers.kinds  # noqa: F401  (so that descriptions can be read)
from quantry.checkpoint_errors import CheckpointError
from quantry.diffusion import SIDECAR
from quantry.layers.conv import QuantizedConv2d, SplitConv2d
from quantry.layers.linear import LinearFormat, QuantizedLinear
from quantry.layers.low_rank import LowRankLinear
from quantry.layers.operands import ROLES, attach
from quantry.quantizers.activation import from_description
from quantry.quantizers.steps import StepDependent

TENSORS = "quantization.safetensors"
FORMAT_VERSION = 1
SETTINGS = (
    *("num_train_timesteps", "prediction_type", "timestep_spacing", "clip_sample", "thresholding"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("set_alpha_to_one", "steps_offset", "variance_type"),
    *("sigma_min", "sigma_max", "sigma_data", "rho"),
)
GAIN, SHIFT = "correction.gain", "correction.shift"  # (steps, C) float32
_SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def load_pipeline(folder: Path) -> Any:
    """The pipeline in `folder`, in float32 on the CPU. Raises CheckpointError."""
    content = _read(folder / SIDECAR)
    diffusers = _diffusers(folder)
    tensors = _tensors(folder / TENSORS)
    gain, shift = tensors.pop(GAIN, None), tensors.pop(SHIFT, None)
    denoiser = _denoiser(folder, content, tensors, diffusers)
    index = _read(folder / "model_index.json")
    kind = getattr(diffusers, str(index["_class_name"]))
    pipeline = kind.from_pretrained(
        folder, **{content["component"]: denoiser}, local_files_only=True, use_safetensors=True
    )
    correction = None if gain is None or shift is None else (gain, shift)
    StepSelector(pipeline, denoiser, content["sampling"], content["call"], correction).watch()
    return pipeline


class StepSelector:
    """Tells a denoiser's tables which step runs, corrects what it predicts, and refuses steps of other samplers."""

    def __init__(
        self,
        pipeline: Any,
        denoiser: nn.Module,
        sampling: Mapping[str, Any],
        call: Mapping[str, Any],
        correction: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._pipeline, self._denoiser, self._sampling = pipeline, denoiser, sampling
        given = ("num_inference_steps", "eta", "guidance_scale")
        self._call = {name: call[name] for name in given if name in call}
        self._index = {time: index for index, time in enumerate(sampling["timesteps"])}
        self._tables = [module for module in denoiser.modules() if isinstance(module, StepDependent)]
        self._correction = correction
        self._checked: tuple[Any, Any] | None = None
        self._quieted: Any = None
        self._step = 0

    def watch(self) -> None:
        self._check_calls()
        self._denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        if self._correction is not None:
            self._denoiser.register_forward_hook(self._after)

    def _check_calls(self) -> None:
        """Let the pipeline refuse another eta or guidance than the calibration's, which no forward shows."""
        kind: Any = type(self._pipeline)
        signature = inspect.signature(kind.__call__)
        wanted = {"eta": 0.0, "guidance_rescale": 0.0, "guidance_scale": None, **self._call}

        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            asked = signature.bind(pipeline, *args, **kwargs)
            asked.apply_defaults()
            for name in ("eta", "guidance_scale", "guidance_rescale"):
                value = asked.arguments.get(name, wanted[name])
                if value != wanted[name]:
                    raise self._refusal(f"{name} {value} was asked for")
            return kind.__call__(pipeline, *args, **kwargs)

        names = {"__call__": functools.wraps(kind.__call__)(call), "__module__": kind.__module__}
        self._pipeline.__class__ = type(kind.__name__, (kind,), names)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check(self._pipeline.scheduler)
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        value = float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)
        if value not in self._index:
            raise self._refusal(f"timestep {value:g} is none of its steps")
        self._step = self._index[value]
        for table in self._tables:
            table.index = self._step

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        assert self._correction is not None
        gain, shift = (values[self._step][:, None, None] for values in self._correction)
        if isinstance(output, tuple):
            return (output[0] * gain.to(output[0]) + shift.to(output[0]), *output[1:])
        output.sample = output.sample * gain.to(output.sample) + shift.to(output.sample)
        return output

    def _check(self, scheduler: Any) -> None:
        """That it is the scheduler of the calibration, set to as many steps. Raises CheckpointError."""
        times = scheduler.timesteps
        if self._checked is not None and self._checked[0] is scheduler and self._checked[1] is times:
            return
        wanted = self._sampling
        if type(scheduler).__name__ != wanted["scheduler"]:
            raise self._refusal(f"its scheduler is a {type(scheduler).__name__}")
        if len(times) != wanted["steps"]:
            raise self._refusal(f"{len(times)} steps were asked for")
        for name, value in wanted["settings"].items():
            if scheduler.config.get(name) != value:
                raise self._refusal(f"its scheduler has {name} {scheduler.config.get(name)!r}")
        if [float(time) for time in times] != [float(time) for time in wanted["timesteps"]]:
            raise self._refusal("its scheduler has other timesteps")
        if "noise" in wanted and scheduler is not self._quieted:
            if "step" in vars(scheduler):
                raise self._refusal("its scheduler's `step` was replaced, as by another quantized pipeline")
            self._quiet(scheduler)
            self._quieted = scheduler
        self._checked = scheduler, times

    def _quiet(self, scheduler: Any) -> None:
        """Let the scheduler add less noise: what the quantized denoiser adds itself stands for the rest."""
        step, noise = scheduler.step, self._sampling["noise"]

        @functools.wraps(step)
        def quieter(output: Tensor, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            whole = kwargs.pop("return_dict", True)
            moved = step(output, time, sample, *args, **kwargs)
            index = self._index[float(time)]
            mean = noise["a"][index] * sample + noise["b"][index] * output
            moved.prev_sample = mean + noise["kept"][index] * (moved.prev_sample - mean)
            return moved if whole else moved.to_tuple()

        scheduler.step = quieter

    def _refusal(self, seen: str) -> CheckpointError:
        wanted = self._sampling
        call = ", ".join(f"{name}={value}" for name, value in self._call.items())
        return CheckpointError(
            f"this pipeline is quantized for {wanted['steps']} steps of {wanted['scheduler']} (eta {wanted['eta']:g}), "
            f"and {seen}: pass {call}, or quantize it again for other settings"
        )


def _denoiser(folder: Path, content: dict[str, Any], tensors: dict[str, Tensor], diffusers: Any) -> Any:
    """The denoiser with packed layers and quantizers in their places. Raises CheckpointError."""
    accelerate = importlib.import_module("accelerate")
    config = _read(folder / content["component"] / "config.json")
    kind = getattr(diffusers, str(config["_class_name"]))
    with accelerate.init_empty_weights(include_buffers=False):
        network = kind.from_config(config)
    try:
        for name, entry in content["layers"].items():
            network.set_submodule(name, _packed(network.get_submodule(name), entry))
        if any(operand.rpartition(".")[2] in ROLES for operand in content["activations"]):
            importlib.import_module("quantry.layers.denoiser_attention").use_operand_attention(network)
        for operand, description in content["activations"].items():
            attach(network, operand, from_description(description))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / SIDECAR} does not fit the network: {error}") from error
    floats = {key: value.float() if value.dtype == torch.float16 and _is_kept(key) else value
              for key, value in tensors.items()}  # fmt: skip
    found = network.load_state_dict(floats, strict=False, assign=True)
    for kind_of, names in (("missing", found.missing_keys), ("unexpected", found.unexpected_keys)):
        if names:
            raise CheckpointError(f"{folder / TENSORS}: {len(names)} {kind_of} tensors, such as {names[0]}")
    return network.eval().requires_grad_(False)


def _is_kept(key: str) -> bool:
    """Whether a tensor is one of the network's own: scales of packed weights keep the type they are stored in."""
    return not key.endswith("weight_scale")


def _packed(dense: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """A packed layer, still empty, for a dense one. Raises ValueError."""
    group = entry.get("group_size")
    form = LinearFormat(
        entry["bits"], group, entry["symmetric"], _SCALE_DTYPES[entry["scale_dtype"]], entry["bias"]
    )
    if isinstance(dense, nn.Linear) and entry.get("rank"):
        return LowRankLinear(dense.in_features, dense.out_features, form, entry["rank"])
    if isinstance(dense, nn.Conv2d):
        split = entry.get("split")
        return SplitConv2d(dense, form, (split[0], split[1])) if split else QuantizedConv2d(dense, form)
    if isinstance(dense, nn.Linear):
        return QuantizedLinear(dense.in_features, dense.out_features, form)
    raise ValueError(f"a {type(dense).__name__} is no linear layer or convolution")


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} is of format version {version}, this quantry reads {FORMAT_VERSION}: install the version that the "
            "model card names"
        )
    return content


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: download it again")
    found: dict[str, Tensor] = importlib.import_module("safetensors.torch").load_file(file)
    return found


def _diffusers(folder: Path) -> Any:
    try:
        importlib.import_module("accelerate")
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise CheckpointError(f"{folder} needs packages: pip install diffusers accelerate") from error
