"""What the plan of a diffusion job checks: that recipe, network and sampler go together. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantry.base import SpecError
from quantry.contract import JobSpec
from quantry.diffusion import PipelineFamily
from quantry.diffusion_layers import is_edge, is_time
from quantry.headers import TensorInfo
from quantry.recipe import (
    AccuquantStep,
    AdaroundStep,
    BiasCompensationStep,
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
STEPS = 20  # of a trajectory, where the request says nothing
SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}


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
    classes = config.get("class_embed_type") or config.get("num_class_embeds")
    if classes and not (family.one_step and config.get("num_class_embeds")):
        raise SpecError("model", f"class-conditional networks do not run in a {family.name}")
    outputs, inputs = config.get("out_channels"), config.get("in_channels")
    if family.conditions == "class" and outputs in (None, 2 * (inputs or 0)):
        return  # a DiT's variance is left alone
    if outputs != inputs:
        raise SpecError(
            "model",
            f"the denoiser has {outputs} output channels for {inputs} of the latent: networks that predict a variance "
            "are not supported",
        )


def resolve_sampling(spec: JobSpec, family: PipelineFamily, config: Mapping[str, Any]) -> Sampling:
    """The sampler's settings, filled in. Raises SpecError for what has no linear step."""
    asked = spec.sampling or Sampling()
    if family.one_step:
        return _one_step(asked, config)
    kind = scheduler_class(asked, config)
    if kind not in SCHEDULERS.values():
        raise SpecError(
            "sampling.scheduler",
            f"{kind} has no linear step, which calibration along the trajectory needs: set `ddim` or `ddpm`",
        )
    if asked.eta and kind != SCHEDULERS["ddim"]:
        raise SpecError(
            "sampling.eta", f"{kind} has its own noise: leave eta out, or set scheduler to `ddim`"
        )
    if asked.eta and family.transformer:
        raise SpecError("sampling.eta", f"a {family.name} passes no eta on to its scheduler: leave it out")
    bent = [key for key, usual in (("clip_sample", True), ("thresholding", False)) if config.get(key, usual)]
    if bent and asked.clip_sample is None:
        raise SpecError(
            "sampling.clip_sample",
            f"the checkpoint's scheduler has {bent[0]} on, which bends every step: set false to sample without and see "
            "in the report whether the model still samples well",
        )
    if asked.guidance_scale is not None and family.guidance is None:
        raise SpecError("sampling.guidance_scale", f"a {family.name} has no guidance: leave it out")
    steps, limit = asked.steps or STEPS, config.get("num_train_timesteps", 1000)
    if steps > limit:
        raise SpecError("sampling.steps", f"{steps} steps, but the scheduler was trained with {limit}")
    return asked.model_copy(
        update={"steps": steps, "guidance_scale": asked.guidance_scale or family.guidance}
    )


def _one_step(asked: Sampling, config: Mapping[str, Any]) -> Sampling:
    """The settings of a consistency model. Raises SpecError for any that it has not."""
    kind = config.get("_class_name")
    if kind != "CMStochasticIterativeScheduler":
        raise SpecError(
            "model", f"a consistency model is sampled by a CMStochasticIterativeScheduler, not by a {kind}"
        )
    if asked.steps not in (None, 1):
        raise SpecError(
            "sampling.steps", "a consistency model is linear in its network only in one step: use 1"
        )
    for field in ("scheduler", "clip_sample", "guidance_scale", "group"):
        if getattr(asked, field) is not None:
            raise SpecError(f"sampling.{field}", "a consistency model has its own sampler: leave it out")
    if asked.eta:
        raise SpecError("sampling.eta", "the one step of a consistency model adds no noise: leave it out")
    return asked.model_copy(update={"steps": 1})


def scheduler_class(sampling: Sampling, config: Mapping[str, Any]) -> str:
    """The class of the scheduler that samples."""
    return SCHEDULERS[sampling.scheduler] if sampling.scheduler else str(config.get("_class_name"))


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
