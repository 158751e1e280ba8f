"""The dry run of a job on a diffusion pipeline: from configs and the tensors' shapes alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import Metric, SpecError
from quantry.contract import Evaluation, JobSpec, ModelRef
from quantry.diffusion import PIPELINES, Component, PipelineFamily, pipeline_family_of
from quantry.diffusion_checks import (
    DIFFUSION_METHODS,
    check_groups,
    check_guidance,
    check_network,
    check_noise,
    check_recipe,
    group_of,
)
from quantry.diffusion_layers import is_edge, is_time, latent_shape, positions, quantized_layers
from quantry.diffusion_schedulers import resolve_sampling, scheduler_class
from quantry.headers import TensorInfo
from quantry.recipe import (
    AdaroundStep,
    RtnStep,
    SvdquantStep,
    UniformStep,
)
from quantry.reports import LayerPlan
from quantry.sampling import Sampling

EVALUATED = 64  # samples, where the request says nothing
EDGE_BITS = 8
_METRICS: tuple[Metric, ...] = ("latent_mse", "psnr", "ssim", "frechet")
INSTALLED: tuple[Metric, ...] = ("lpips", "frechet_inception")  # by the operator of the worker


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
    check_recipe(spec, family)
    latent = latent_shape(denoiser.config)
    check_network(family, denoiser.config)
    sampling = resolve_sampling(spec, family, components["scheduler"].config)
    scheduler = scheduler_class(sampling, components["scheduler"].config)
    check_guidance(family, denoiser.config, sampling)
    check_noise(spec, scheduler, sampling)
    group = group_of(spec, sampling, family)
    resolved = _resolve(spec, sampling, family)
    layers = quantized_layers(denoiser.tensors)
    check_groups(resolved, layers)
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
        scheduler=scheduler,
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


def edge_bits(step: RtnStep | AdaroundStep | SvdquantStep | UniformStep) -> int:
    """Bits of the layers that read and write the latent."""
    return EDGE_BITS if step.edge_bits is None else step.edge_bits


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
    known = (*_METRICS, *INSTALLED)
    unknown = next((metric for metric in wanted if metric not in known), None)
    if unknown:
        raise SpecError("evaluation.metrics", f"samples have no {unknown}; choose of {', '.join(known)}")
    if "frechet" in wanted and features is None:
        raise SpecError(
            "evaluation.features",
            "the Frechet distance is measured in the features of a classifier: name one, or leave `frechet` out",
        )
    if "fp" not in evaluation.baselines:
        raise SpecError("evaluation.baselines", "samples are compared with full precision's: add `fp`")
    samples = evaluation.samples or EVALUATED
    if {"frechet", "frechet_inception"} & set(wanted) and samples < 2:
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


def _warnings(spec: JobSpec, sampling: Sampling) -> Iterator[str]:
    yield "the pipeline loads with quantry.load(folder); diffusers alone does not read its packed weights"
    if spec.activation_step is not None or len(spec.recipe) > 1:
        count = "one step" if sampling.steps == 1 else f"{sampling.steps} steps"
        yield f"what is calibrated holds for {count}: another number needs another job"
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
