"""The dry run of a job on a diffusion pipeline: from configs and the tensors' shapes alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import Metric, SpecError
from quantry.contract import Evaluation, JobSpec, ModelRef
from quantry.diffusion import PIPELINES, Component, PipelineFamily, pipeline_family_of
from quantry.diffusion_layers import is_edge, is_time, latent_shape, positions, quantized_layers
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
from quantry.reports import Estimate, LayerPlan
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
EVALUATED = 64  # samples, where the request says nothing
EDGE_BITS = 8
SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
_METRICS: tuple[Metric, ...] = ("latent_mse", "psnr", "ssim", "frechet")
_RUNTIME_BYTES = 900 * 2**20
_CPU_RATE = (
    2e9,
    100e9,
)  # operations a second and thread, slow and fast: small convolutions are far from the peak
_CUDA_RATE = (1e12, 60e12)
_OBSERVED = 3  # forwards for each calibration latent: sampled, ranges, histograms


@dataclass(frozen=True)
class DiffusionPlan:
    """What a job on a pipeline will do. `spec` has every default filled in that depends on the model.

    group: consecutive steps that share activation grids. latent: (C, H, W). operations: multiply-adds of one forward
    for one latent. copied_bytes: of the components that stay as they are.
    """

    spec: JobSpec
    sampling: Sampling
    format: str
    family: PipelineFamily
    scheduler: str
    layers: tuple[LayerPlan, ...]
    latent: tuple[int, int, int]
    group: int
    parameters: int
    quantized_weights: int
    operations: float
    fp_bytes: int
    quantized_bytes: int
    copied_bytes: int
    effective_bits: float
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        assert self.sampling.steps is not None
        return self.sampling.steps


def pipelines_taking(method: str) -> list[str]:
    """The pipeline classes that a step works on."""
    if method not in DIFFUSION_METHODS:
        return []
    return sorted(
        name
        for name, family in PIPELINES.items()
        if (method != "svdquant" or family.transformer) and (method != "accuquant" or not family.one_step)
    )


def plan_diffusion(
    spec: JobSpec, index: Mapping[str, Any], components: Mapping[str, Component]
) -> DiffusionPlan:
    """Check a job against its pipeline. Raises SpecError, naming the field."""
    family = pipeline_family_of(index)
    denoiser = components[family.denoiser]
    if denoiser.config.get("quantization_config"):
        raise SpecError("model", "the denoiser is already quantized; give the full-precision one")
    _check_recipe(spec, family)
    latent = latent_shape(denoiser.config)
    _check_network(family, denoiser.config)
    sampling = _sampling(spec, family, components["scheduler"].config)
    group = _group(spec, sampling, family)
    resolved = _resolve(spec, sampling, family)
    layers = quantized_layers(denoiser.tensors)
    _check_groups(resolved, layers)
    bits = sum(_layer_bits(resolved, name, info) for name, info in layers.items())
    weights = sum(info.numel for info in layers.values())
    kept = denoiser.nbytes - sum(info.nbytes for info in layers.values())
    copied = sum(part.nbytes for part in components.values()) - denoiser.nbytes
    operations = sum(
        float(info.numel) * positions(name, denoiser.config, latent) for name, info in layers.items()
    )
    return DiffusionPlan(
        spec=resolved,
        sampling=sampling,
        format="quantry",
        family=family,
        scheduler=_scheduler(sampling, components["scheduler"].config),
        layers=tuple(_layer_plans(denoiser.tensors, layers)),
        latent=latent,
        group=group,
        parameters=sum(info.numel for info in denoiser.tensors.values()),
        quantized_weights=weights,
        operations=operations,
        fp_bytes=denoiser.nbytes,
        quantized_bytes=kept + bits // 8,
        copied_bytes=copied,
        effective_bits=round(bits / weights, 4),
        warnings=tuple(_warnings(resolved, sampling)),
    )


def estimate_diffusion(plan: DiffusionPlan, *, threads: int, cuda: bool) -> Estimate:
    """The dry run's answer: memory and time from counted operations, a wide range on purpose."""
    low, high = _seconds(plan, threads=threads, cuda=cuda)
    return Estimate(
        spec=plan.spec,
        format=plan.format,
        architecture=plan.family.name,
        parameters=plan.parameters,
        layers=plan.layers,
        fp_bytes=plan.fp_bytes,
        quantized_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        peak_memory_bytes=_peak_memory(plan),
        seconds_low=low,
        seconds_high=high,
        warnings=plan.warnings,
    )


def edge_bits(step: RtnStep | AdaroundStep | SvdquantStep | UniformStep) -> int:
    """Bits of the layers that read and write the latent."""
    return EDGE_BITS if step.edge_bits is None else step.edge_bits


def _check_recipe(spec: JobSpec, family: PipelineFamily) -> None:
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


def _check_groups(spec: JobSpec, layers: Mapping[str, TensorInfo]) -> None:
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


def _check_network(family: PipelineFamily, config: Mapping[str, Any]) -> None:
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


def _sampling(spec: JobSpec, family: PipelineFamily, config: Mapping[str, Any]) -> Sampling:
    """The sampler's settings, filled in. Raises SpecError for what has no linear step."""
    asked = spec.sampling or Sampling()
    if family.one_step:
        return _one_step(asked, config)
    kind = _scheduler(asked, config)
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


def _scheduler(sampling: Sampling, config: Mapping[str, Any]) -> str:
    """The class of the scheduler that samples."""
    return SCHEDULERS[sampling.scheduler] if sampling.scheduler else str(config.get("_class_name"))


def _group(spec: JobSpec, sampling: Sampling, family: PipelineFamily) -> int:
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


def _resolve(spec: JobSpec, sampling: Sampling, family: PipelineFamily) -> JobSpec:
    for role, part in (("calibration", spec.calibration), ("evaluation", spec.evaluation)):
        if part is None:
            continue
        if part.sequence_length is not None:
            raise SpecError(f"{role}.sequence_length", "samples have no windows of tokens: leave it out")
        named = part.dataset.id != "bundled/pydoc"  # what a request without a dataset names
        if family.conditions == "text" and not named:
            raise SpecError(
                f"{role}.dataset",
                "a text-to-image pipeline needs prompts: name a text with a prompt on each line",
            )
        if family.conditions != "text" and named:
            raise SpecError(
                f"{role}.dataset",
                "a pipeline without prompts calibrates on its own samples, from seeds: leave it out",
            )
    changed = {"sampling": sampling, "format": "quantry", "evaluation": _evaluation(spec)}
    return spec.model_copy(update=changed)


def _evaluation(spec: JobSpec) -> Evaluation | None:
    evaluation = spec.evaluation
    if evaluation is None:
        return None
    features = evaluation.features
    if features is None and spec.model.id == "bundled/ddpm-tiny":
        features = ModelRef(source="bundled", id="bundled/vit-tiny")
    wanted = evaluation.metrics or tuple(m for m in _METRICS if m != "frechet" or features is not None)
    unknown = next((metric for metric in wanted if metric not in _METRICS), None)
    if unknown:
        raise SpecError("evaluation.metrics", f"samples have no {unknown}; choose of {', '.join(_METRICS)}")
    if "frechet" in wanted and features is None:
        raise SpecError(
            "evaluation.features",
            "the Frechet distance is measured in the features of a classifier: name one, or leave `frechet` out",
        )
    if "fp" not in evaluation.baselines:
        raise SpecError("evaluation.baselines", "samples are compared with full precision's: add `fp`")
    samples = evaluation.samples or EVALUATED
    if "frechet" in wanted and samples < 2:
        raise SpecError("evaluation.samples", "a Frechet distance needs at least 2 samples of each side")
    return evaluation.model_copy(update={"features": features, "metrics": wanted, "samples": samples})


def _layer_bits(spec: JobSpec, name: str, info: TensorInfo) -> int:
    """Bits of codes, float16 scales and zero-points; the second grid of a concatenated input is not counted."""
    step = spec.weight_step
    assert isinstance(step, RtnStep | AdaroundStep | SvdquantStep)
    low_rank = (
        isinstance(step, SvdquantStep) and len(info.shape) == 2 and not is_time(name) and not is_edge(name)
    )
    narrow = low_rank or not (is_edge(name) or isinstance(step, SvdquantStep))
    bits = step.bits if narrow else edge_bits(step)
    groups = info.shape[1] // step.group_size if low_rank and step.group_size else 1
    stored = bits * info.numel + (16 if step.symmetric else 16 + bits) * info.shape[0] * groups
    if isinstance(step, SvdquantStep) and low_rank:
        rank = min(step.rank, *info.shape)
        stored += 16 * rank * sum(info.shape) + 32 * info.shape[1]
    return stored


def _peak_memory(plan: DiffusionPlan) -> int:
    """Bytes at the worst moment: runtime, networks in float32, latents of all samples, one batch with its graph."""
    channels, height, width = plan.latent
    latent = channels * height * width
    groups = -(-plan.steps // plan.group)
    batch = max(
        16,
        getattr(plan.spec.weight_step, "batch", 0),
        plan.spec.accuquant.batch if plan.spec.accuquant else 0,
    )
    values = 40 * 64 * height * width  # of one latent's graph: tens of tensors, mostly at full size
    kept = plan.spec.calibration.samples * latent * (plan.steps + groups + 2)
    return _RUNTIME_BYTES + 4 * (4 * plan.parameters + kept + batch * values) + 2 * plan.copied_bytes


def forwards(plan: DiffusionPlan) -> float:
    """Forwards of one latent that a job takes, backward passes counted as two."""
    spec, steps = plan.spec, plan.steps
    total = float(spec.calibration.samples * steps * _OBSERVED)
    weights = spec.weight_step
    if isinstance(weights, AdaroundStep):
        recorded = (
            weights.latents * len(plan.layers) / 3
        )  # blocks of three layers, each recorded halfway, twice
        total += 3 * weights.iterations * weights.batch + recorded
    trained = spec.accuquant
    if isinstance(trained, AccuquantStep):
        total += steps * (4 * trained.iterations * trained.batch + 2 * spec.calibration.samples)
    evaluation = spec.evaluation
    if evaluation is not None:
        total += 5 * steps * (evaluation.samples or 0)
    return total


def _seconds(plan: DiffusionPlan, *, threads: int, cuda: bool) -> tuple[float, float]:
    operations = 2 * plan.operations * forwards(plan)
    slow, fast = _CUDA_RATE if cuda else [rate * threads for rate in _CPU_RATE]
    return round(5 + operations / fast, 1), round(60 + operations / slow, 1)


def _warnings(spec: JobSpec, sampling: Sampling) -> Iterator[str]:
    yield "the pipeline loads with quantry.load(folder); diffusers alone does not read its packed weights"
    if spec.activation_step is not None or len(spec.recipe) > 1:
        yield f"what is calibrated holds for {sampling.steps} steps: another number needs another job"
    if sampling.clip_sample is False:
        yield "sampled without clipping, which the checkpoint's scheduler asks for: look at the samples"


def _layer_plans(tensors: Mapping[str, TensorInfo], layers: Mapping[str, TensorInfo]) -> Iterator[LayerPlan]:
    for name, info in tensors.items():
        if len(info.shape) < 2 or not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        quantized = layer in layers
        shape = (info.shape[0], info.numel // info.shape[0])
        yield LayerPlan(
            name=layer, shape=shape, quantized=quantized, reason=None if quantized else "an embedding"
        )
