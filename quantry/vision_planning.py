"""The dry run of a job on an image classifier: from the config and the tensors' shapes alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import Metric, SpecError
from quantry.checkpoint_checks import refuse_diffusion
from quantry.contract import DatasetRef, JobSpec
from quantry.convnets import is_convnet
from quantry.headers import TensorInfo
from quantry.levels import check_classifier_levels, is_compensated
from quantry.recipe import BiasCompensationStep, IgqStep, dividing_group_sizes
from quantry.reports import LayerPlan
from quantry.vision import VisionFamily, activation_function, class_count, vision_family_of
from quantry.vision_layers import (
    block_values,
    channel_count,
    check_tensors,
    is_quantized,
    pixel_count,
    stem_width,
    tensors_in_memory,
    token_count,
)
from quantry.vision_products import attentions, check_windows, least_overhead, products, shortfall

VISION_METHODS = (
    "rtn",
    "gptq",
    "uniform",
    "ptq4vit",
    "repq",
    "adalog",
    "igq",
    "bias_compensation",
    "softmax_bias",
)
_METRICS: tuple[Metric, ...] = ("top1", "top5", "kl")


@dataclass(frozen=True)
class VisionPlan:
    """What a job on a classifier will do. `spec` has every default that depends on the model filled in.

    widest: columns of a layer, at most. blocks: with stem and head. Of one image: pixels, all channels together;
    stream, the values between blocks, and block_values, those of the largest tensor inside one, at most.
    product_biases: values of the biases on Q K^T and P V.
    """

    spec: JobSpec
    format: str
    family: VisionFamily
    layers: tuple[LayerPlan, ...]
    parameters: int
    quantized_weights: int
    widest: int
    classes: int
    blocks: int
    tokens: int
    channels: int
    pixels: int
    stream: int
    block_values: int
    product_biases: int
    fp_bytes: int
    quantized_bytes: int
    effective_bits: float
    warnings: tuple[str, ...]


def plan_vision(spec: JobSpec, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> VisionPlan:
    """Check a job against its classifier. Raises SpecError, naming the field and the layer."""
    if is_convnet(config):
        raise SpecError(
            "recipe.0",
            f"`{spec.recipe[0].method}` does not work on a {config['model_type']}: use `fixed_point_training`, alone",
        )
    if config.get("quantization_config"):
        raise SpecError("model", "the checkpoint is already quantized; give the full-precision one")
    family = vision_family_of(config)
    _check_recipe(spec, config)
    classes = class_count(config)
    resolved = resolve_images(spec, classes)
    named = tensors_in_memory(tensors)
    check_tensors(family, config, named)
    check_windows(family, config)
    layers = {name: info for name, info in named.items() if is_quantized(name)}
    tokens = token_count(family, config)
    _check_groups(spec, layers)
    _check_budget(spec, family, config)
    bits = sum(
        _layer_bits(spec, name, info, tokens, had_bias=f"{name.removesuffix('weight')}bias" in named)
        for name, info in layers.items()
    )
    products_of_attention = _product_bits(spec, family, config)
    bits += products_of_attention
    weights = sum(info.numel for info in layers.values())
    kept = sum(4 * info.numel for name, info in named.items() if name not in layers)  # written as float32
    return VisionPlan(
        spec=resolved,
        format=resolved.format,
        family=family,
        layers=tuple(_layer_plans(named, layers)),
        parameters=sum(info.numel for info in named.values()),
        quantized_weights=weights,
        widest=max(info.numel // info.shape[0] for info in layers.values()),
        classes=classes,
        blocks=2 + sum(name.endswith("fc1.weight") for name in layers),
        tokens=tokens,
        channels=channel_count(family, config),
        pixels=pixel_count(family, config),
        stream=tokens * stem_width(family, config),
        block_values=block_values(family, config),
        product_biases=products_of_attention // 32,
        fp_bytes=sum(info.nbytes for info in named.values()),
        quantized_bytes=kept + bits // 8,
        effective_bits=round(bits / weights, 4),
        warnings=tuple(_warnings(resolved, family)),
    )


def _check_groups(spec: JobSpec, layers: Mapping[str, TensorInfo]) -> None:
    """That the groups of the weights divide the columns of every layer. Raises SpecError."""
    group = spec.weight_step.group_size
    for name, info in layers.items():
        columns = info.numel // info.shape[0]
        if group and columns % group:
            sizes = ", ".join(map(str, dividing_group_sizes(columns))) or "no usual size"
            raise SpecError(
                "recipe.0.group_size",
                f"{group} does not divide the {columns} columns of {name}; {sizes} would, and null "
                "gives one scale a row",
            )


def _check_budget(spec: JobSpec, family: VisionFamily, config: Mapping[str, Any]) -> None:
    """That the fewest groups stay within IGQ's budget. Raises SpecError.

    DINOv2 takes images of any size, which its image processor says: there the worker looks.
    """
    step = spec.activation_step
    if not isinstance(step, IgqStep) or step.overhead_max is None or family.model_type == "dinov2":
        return
    reason = shortfall(step, least_overhead(products(family, config), step, spec.weight_step.bits))
    if reason:
        raise SpecError(f"recipe.{spec.recipe.index(step)}.overhead_max", reason)


def _layer_bits(spec: JobSpec, name: str, info: TensorInfo, tokens: int, *, had_bias: bool) -> int:
    """Bits of codes, float16 scales, zero-points and the float32 biases that compensation adds."""
    step, compensation, rows = spec.weight_step, spec.compensation, info.shape[0]
    scales = info.numel // step.group_size if step.group_size else rows
    width, scale = step.bits, 16
    if spec.format == "onnx":  # whole containers, float32 scales
        width, scale = (4 if step.bits <= 4 else 8), 32
    bits = (
        width * info.numel + (scale if step.symmetric and spec.format != "onnx" else scale + width) * scales
    )
    if compensation is None or not is_compensated(compensation, name.removesuffix(".weight")):
        return bits
    if compensation.granularity == "channel":
        return bits + (0 if had_bias else 32 * rows)
    positions = 1 if name.startswith("classifier") else tokens  # windows and merged patches have fewer
    return bits + 32 * rows * positions


def _product_bits(spec: JobSpec, family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Bits of the biases on Q K^T and P V."""
    if spec.compensation is None or "products" not in spec.compensation.chosen_levels:
        return 0
    return sum(32 * heads * tokens * (tokens + width) for heads, tokens, width in attentions(family, config))


def _warnings(spec: JobSpec, family: VisionFamily) -> Iterator[str]:
    if spec.format == "quantry":
        yield "the quantry format loads in transformers after `import quantry`"
    elif spec.weight_step.bits <= 4 and spec.activation_step is None:
        yield (
            "ONNX Runtime rounds the inputs of 4-bit weights to 8 bits, unless the session is told "
            "session.qdq_matmulnbits_accuracy_level = 1"
        )
    if spec.compensation and spec.compensation.granularity == "position_channel":
        yield "a bias per position is stored for every layer, in float32: it can outweigh the packed weights"
        if family.model_type == "dinov2":
            yield "sizes are those of config.json's image_size; the image processor may make images of another"


def _check_recipe(spec: JobSpec, config: Mapping[str, Any]) -> None:
    """That every step can work on this classifier. Raises SpecError."""
    for index, step in enumerate(spec.recipe):
        if step.method not in VISION_METHODS:
            raise SpecError(
                f"recipe.{index}",
                f"`{step.method}` does not work on image classifiers; these do: {', '.join(VISION_METHODS)}",
            )
        if step.method == "ptq4vit" and "gelu" not in activation_function(config):
            raise SpecError(
                f"recipe.{index}",
                "the twin grid of `ptq4vit` is made for GELU, and this model's hidden_act is "
                f"`{activation_function(config)}`: use another activation method, such as `uniform`",
            )
        if isinstance(step, BiasCompensationStep):
            check_classifier_levels(f"recipe.{index}.levels", step, str(config.get("model_type")))
            _check_products(f"recipe.{index}.levels", step, spec)
    refuse_diffusion(spec)
    if spec.format not in ("auto", "quantry", "onnx"):
        raise SpecError(
            "format",
            f"{spec.format} has no place for a classifier's convolution and quantizers: use quantry, or onnx for "
            "static uniform grids",
        )
    if spec.accept.perplexity_increase_max is not None:
        raise SpecError(
            "accept.perplexity_increase_max", "a classifier has no perplexity: use accuracy_drop_max"
        )
    if spec.compute_dtype == "bfloat16":
        raise SpecError("compute_dtype", "classifiers run in float32: leave it out")


def _check_products(path: str, step: BiasCompensationStep, spec: JobSpec) -> None:
    """That biases on the products of attention have something to correct and a place. Raises SpecError at `path`."""
    if "products" not in step.chosen_levels:
        return
    if spec.activation_step is None:
        raise SpecError(
            path, "without a step that quantizes activations Q K^T and P V are exact: leave `products` out"
        )
    if spec.format == "onnx":
        raise SpecError(path, "`products` is not written as ONNX: leave it out, or set format to quantry")


def resolve_images(spec: JobSpec, classes: int) -> JobSpec:
    """The spec with its images and metrics filled in. Raises SpecError."""
    calibration = spec.calibration.model_copy(update={"dataset": _images(spec, "calibration")})
    for role, part in (("calibration", spec.calibration), ("evaluation", spec.evaluation)):
        if part is not None and part.sequence_length is not None:
            raise SpecError(f"{role}.sequence_length", "images have no windows of tokens: leave it out")
    evaluation = spec.evaluation
    if evaluation is not None:
        metrics = evaluation.metrics or _METRICS
        unknown = next((metric for metric in metrics if metric not in _METRICS), None)
        if unknown is not None:
            raise SpecError(
                "evaluation.metrics", f"a classifier has no {unknown}; choose of {', '.join(_METRICS)}"
            )
        if evaluation.metrics and "kl" in metrics and "fp" not in evaluation.baselines:
            raise SpecError(
                "evaluation.metrics", "kl compares with full precision: add `fp` to the baselines"
            )
        if "kl" in metrics and "fp" not in evaluation.baselines:
            metrics = tuple(metric for metric in metrics if metric != "kl")
        if not any(metric == "kl" or int(metric.removeprefix("top")) < classes for metric in metrics):
            raise SpecError(
                "evaluation.metrics",
                f"{' and '.join(metrics)} of a model with {classes} classes is always 100 %: add `kl`, or `top1` "
                "where there are two classes or more",
            )
        if spec.accept.accuracy_drop_max is not None and "top1" not in metrics:
            raise SpecError(
                "accept.accuracy_drop_max", "the gate looks at top1: add it to evaluation.metrics"
            )
        dataset = _images(spec, "evaluation")
        evaluation = evaluation.model_copy(update={"dataset": dataset, "metrics": metrics})
    written = "onnx" if spec.format == "onnx" else "quantry"
    return spec.model_copy(update={"calibration": calibration, "evaluation": evaluation, "format": written})


def _images(spec: JobSpec, role: str) -> DatasetRef:
    """The images of a role. The bundled text is what a request without a dataset names."""
    part = spec.calibration if role == "calibration" else spec.evaluation
    assert part is not None
    if part.dataset.id != "bundled/pydoc":
        return part.dataset
    if spec.model.id == "bundled/vit-tiny":
        return part.dataset.model_copy(update={"id": "bundled/digits"})
    raise SpecError(
        f"{role}.dataset",
        "an image classifier needs images of its own kind: name an .npz with `images` and `labels`, or a "
        "folder of JPEG or PNG files with labels.csv (upload it with POST /v1/datasets)",
    )


def _layer_plans(named: Mapping[str, TensorInfo], layers: Mapping[str, TensorInfo]) -> Iterator[LayerPlan]:
    for name, info in named.items():
        if len(info.shape) < 2 or not name.endswith(".weight"):
            continue
        shape = (info.shape[0], info.numel // info.shape[0])
        quantized = name in layers
        reason = None if quantized else "not a linear layer of a block"
        yield LayerPlan(name=name.removesuffix(".weight"), shape=shape, quantized=quantized, reason=reason)
