"""What the plan of a diffusion job checks: that recipe, network and sampler go together. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantry.base import SpecError
from quantry.contract import JobSpec
from quantry.diffusion import PipelineFamily
from quantry.diffusion_layers import is_edge, is_time
from quantry.diffusion_schedulers import SCHEDULERS
from quantry.headers import TensorInfo
from quantry.recipe import (
    AccuquantStep,
    AdaroundStep,
    BiasCompensationStep,
    NoiseCorrectionStep,
    RtnStep,
    SvdquantStep,
    UniformStep,
    dividing_group_sizes,
)
from quantry.sampling import Sampling

DIFFUSION_METHODS = (
    "rtn",
    "adaround",
    "svdquant",
    "uniform",
    "accuquant",
    "softmax_bias",
    "bias_compensation",
    "noise_correction",
)
NO_CLASS = 1000  # the label that a DiTPipeline asks for no class by
# Conditions beside timestep, label and text that a network may want, and no supported pipeline gives
_CONDITIONS = ("addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "attention_type")
_GIVEN = (None, "default", "text", "text_proj")  # none, or made of the prompt alone


def check_recipe(spec: JobSpec, family: PipelineFamily) -> None:
    """That every step can work on a denoiser. Raises SpecError."""
    for index, step in enumerate(spec.recipe):
        path = f"recipe.{index}"
        if step.method == "gptq":
            raise SpecError(
                path,
                "`gptq` needs the Hessian of each layer's inputs, which changes with the timestep: use `adaround`, "
                "which learns the rounding over all timesteps, or `rtn`",
            )
        if step.method not in DIFFUSION_METHODS:
            raise SpecError(
                path,
                f"`{step.method}` does not work on diffusion pipelines; these do: {', '.join(DIFFUSION_METHODS)}",
            )
        if isinstance(step, RtnStep | AdaroundStep):
            if step.group_size is not None:
                raise SpecError(
                    f"{path}.group_size", "layers of a denoiser have one scale a row: leave it out"
                )
            if step.clip == "percentile":
                raise SpecError(f"{path}.clip", "denoisers take `none` or `mse`")
        if isinstance(step, UniformStep):
            _check_uniform(path, step, family)
        if isinstance(step, AccuquantStep) and getattr(spec.activation_step, "granularity", "") == "token":
            raise SpecError(
                path, "grids of tokens are found as they run and have nothing to train: leave it out"
            )
        if isinstance(step, SvdquantStep) and not family.transformer:
            raise SpecError(path, f"`svdquant` is for transformers; the denoiser is a {family.architecture}")
        if isinstance(step, BiasCompensationStep) and step.granularity != "channel":
            raise SpecError(
                f"{path}.granularity", "a bias per position is not made for denoisers: use `channel`"
            )
        if isinstance(step, BiasCompensationStep) and step.levels not in (None, ("module",)):
            raise SpecError(f"{path}.levels", "of a denoiser the layers are compensated: use `module`")
    if spec.format not in ("auto", "quantry"):
        raise SpecError(
            "format", f"{spec.format} has no place for a pipeline and its quantizers: use quantry"
        )
    for gate in ("perplexity_increase_max", "accuracy_drop_max"):
        if getattr(spec.accept, gate) is not None:
            raise SpecError(f"accept.{gate}", "samples have no perplexity and no accuracy: leave it out")
    if spec.compute_dtype == "bfloat16":
        raise SpecError("compute_dtype", "denoisers run in float32: leave it out")


def check_groups(spec: JobSpec, layers: Mapping[str, TensorInfo]) -> None:
    """That the groups of a low-rank branch's residual divide the layers that have one. Raises SpecError."""
    step = spec.weight_step
    if not isinstance(step, SvdquantStep) or step.group_size is None:
        return
    for name, info in layers.items():
        if (
            len(info.shape) == 2
            and not is_edge(name)
            and not is_time(name)
            and info.shape[1] % step.group_size
        ):
            sizes = ", ".join(map(str, dividing_group_sizes(info.shape[1]))) or "no usual size"
            raise SpecError(
                "recipe.0.group_size",
                f"{step.group_size} does not divide the {info.shape[1]} columns of {name}; {sizes} would, and null "
                "gives one scale a row",
            )


def _check_uniform(path: str, step: UniformStep, family: PipelineFamily) -> None:
    if step.range == "percentile":
        raise SpecError(f"{path}.range", "denoisers take `min_max` or `mse`")
    if step.granularity != "tensor" and not family.transformer:
        raise SpecError(f"{path}.granularity", "grids of a U-Net are static, per tensor: use `tensor`")
    if step.softmax_bits is not None:
        raise SpecError(f"{path}.softmax_bits", "the softmax of a U-Net stays in float: leave it out")


def check_network(family: PipelineFamily, config: Mapping[str, Any]) -> None:
    """That the pipeline can run a denoiser with this config. Raises SpecError."""
    file = f"{family.denoiser}/config.json"
    own = config.get("_class_name", family.architecture)
    if own != family.architecture:
        raise SpecError("model", f"{file} is of a {own}, and model_index.json names a {family.architecture}")
    kind, labels = config.get("class_embed_type"), config.get("num_class_embeds")
    if (kind or labels) and not (family.one_step and labels and kind != "identity"):
        raise SpecError("model", f"class-conditional networks do not run in a {family.name}")
    more = next((key for key in _CONDITIONS if config.get(key) not in _GIVEN), None)
    if more:
        raise SpecError("model", f"{file}: {more} is {config[more]!r}, and a {family.name} is run without")
    size = config.get("sample_size")
    if family.square and isinstance(size, list | tuple) and len(set(size)) > 1:
        raise SpecError(
            "model", f"{file}: sample_size is {list(size)}, and a {family.name} samples squares only"
        )
    outputs, inputs = config.get("out_channels"), config.get("in_channels")
    if family.conditions == "class" and outputs == 2 * (inputs or 0):
        return  # a DiT's variance is left alone
    if outputs != inputs:
        raise SpecError(
            "model",
            f"{file}: out_channels is {outputs!r} for {inputs} channels of the latent; networks that predict a "
            "variance are not supported"
            + (", but for twice the channels of a DiT" if family.transformer else ""),
        )


def check_noise(spec: JobSpec, scheduler: str, sampling: Sampling) -> None:
    """That there is noise of the sampler where a step wants some to be left out. Raises SpecError."""
    if scheduler == SCHEDULERS["ddpm"] or sampling.eta:
        return
    for index, step in enumerate(spec.recipe):
        if isinstance(step, NoiseCorrectionStep) and step.absorb:
            raise SpecError(
                f"recipe.{index}.absorb",
                "the sampler adds no noise that could be less: set sampling.eta above 0 or scheduler to `ddpm`, or "
                "leave absorb out",
            )


def check_guidance(family: PipelineFamily, config: Mapping[str, Any], sampling: Sampling) -> None:
    """That the pipeline's label for no class is the network's. Raises SpecError."""
    labels = config.get("num_embeds_ada_norm")
    if family.conditions == "class" and labels != NO_CLASS and sampling.guidance_scale != 1:
        raise SpecError(
            "sampling.guidance_scale",
            f"a {family.name} asks for no class by the label {NO_CLASS}, and this network has {labels} labels: set 1, "
            "which is without guidance",
        )


def group_of(spec: JobSpec, sampling: Sampling, family: PipelineFamily) -> int:
    """Consecutive steps that share activation grids. Raises SpecError."""
    assert sampling.steps is not None
    steps, step = sampling.steps, spec.accuquant
    if sampling.group is not None and sampling.group > steps:
        raise SpecError("sampling.group", f"{sampling.group} steps in a group, but {steps} in all")
    if step is None:
        return sampling.group or steps
    at = f"recipe.{spec.recipe.index(step)}"
    if family.one_step:
        raise SpecError(
            at, "`accuquant` calibrates over several steps, and a consistency model takes one: leave it out"
        )
    if step.group > steps:
        raise SpecError(
            f"{at}.group",
            f"{step.group} steps are simulated together, but a trajectory has {steps} (sampling.steps)",
        )
    if step.start == "progressive" and not step.per_group:
        raise SpecError(f"{at}.start", "`progressive` needs step sizes for each group: set per_group")
    shared = step.group if step.per_group else steps
    if sampling.group is not None and sampling.group != shared:
        raise SpecError(
            "sampling.group",
            f"`accuquant` makes grids for {shared} steps each: leave it out, or set its group",
        )
    return shared
