"""The dry run: what a job would quantize and write, from the config and the tensors' shapes alone.

`plan` is called by the server at submit and by the worker before it loads anything, so both refuse the
same jobs in the same words. Needs no torch. Sizes are bytes of tensors as the format stores them; what a
folder holds besides (tokenizer, reports) is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import refuse_diffusion
from quantry.contract import Format, JobSpec, Written, resolve_format
from quantry.families import Family, family_of, foldable_norms, holds_added_biases, rehome_target
from quantry.headers import DTYPE_BITS, TensorInfo
from quantry.language_layers import (
    Layer,
    canonical_tensors,
    context_length,
    hidden_size,
    is_embedding,
    is_head,
    layer_plans,
    linear_layers,
    vocabulary_size,
)
from quantry.levels import check_levels, is_compensated
from quantry.recipe import (
    BiasCompensationStep,
    GptqStep,
    SmoothquantStep,
    WeightStep,
    dividing_group_sizes,
)
from quantry.reports import LayerPlan

DEFAULT_SEQUENCE_LENGTH = 2048
LANGUAGE_METHODS = ("rtn", "gptq", "smoothquant", "bias_compensation", "softmax_bias")


@dataclass(frozen=True)
class Plan:
    """What a job will do. `spec` is the full form with every default that depends on the model filled in."""

    spec: JobSpec
    format: Written
    family: Family
    written_family: Family
    context: int | None
    quantized: tuple[Layer, ...]
    layers: tuple[LayerPlan, ...]
    parameters: int
    kept_parameters: int
    vocabulary: int
    hidden: int
    fp_bytes: int
    quantized_bytes: int
    effective_bits: float
    warnings: tuple[str, ...]


def plan(spec: JobSpec, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Plan:
    """Check a job against its model. Raises SpecError, naming the field and the layer."""
    if found := config.get("quantization_config"):
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        raise SpecError(
            "model",
            f"the checkpoint is already quantized ({method or 'an unknown method'}); give the full-precision one",
        )
    family = family_of(config)
    _check_steps(spec, family, config)
    named = canonical_tensors(family, config, tensors)
    quantized = tuple(linear_layers(family, config, named))
    weights = spec.weight_step
    _check_groups(weights, quantized)
    context = context_length(config)
    written, written_family = _format(spec, family, config, quantized)
    resolved = _resolve_lengths(spec, context).model_copy(update={"format": written})
    taken = {f"{layer.name}.weight" for layer in quantized}
    kept = {name: info for name, info in named.items() if name not in taken}
    layer_bits = sum(_layer_bits(layer, resolved, weights) for layer in quantized)
    count = sum(layer.rows * layer.columns for layer in quantized)
    stored = sum(
        _stored_bytes(layer, written, weights) + _added_bias_bytes(layer, resolved) for layer in quantized
    )
    return Plan(
        spec=resolved,
        format=written,
        family=family,
        written_family=written_family,
        context=context,
        quantized=quantized,
        layers=layer_plans(family, quantized, kept),
        parameters=sum(info.numel for info in named.values()),
        kept_parameters=sum(info.numel for info in kept.values()),
        vocabulary=vocabulary_size(kept),
        hidden=hidden_size(config),
        fp_bytes=sum(info.nbytes for info in named.values()),
        quantized_bytes=stored + sum(_kept_bytes(name, info) for name, info in kept.items()),
        effective_bits=round(layer_bits / count, 4),
        warnings=tuple(_warnings(spec, written, family, written_family, kept, resolved)),
    )


def _check_steps(spec: JobSpec, family: Family, config: Mapping[str, Any]) -> None:
    """That every step can work on this language model. Raises SpecError."""
    for index, step in enumerate(spec.recipe):
        if step.method not in LANGUAGE_METHODS:
            raise SpecError(
                f"recipe.{index}",
                f"`{step.method}` does not work on causal language models; these do: {', '.join(LANGUAGE_METHODS)}",
            )
        if isinstance(step, SmoothquantStep):
            _check_norms(f"recipe.{index}", family, config)
        if isinstance(step, BiasCompensationStep):
            check_levels(f"recipe.{index}.levels", step, family, config)
    refuse_diffusion(spec)
    if spec.accept.accuracy_drop_max is not None:
        raise SpecError(
            "accept.accuracy_drop_max", "a language model has no top-1 accuracy: use perplexity_increase_max"
        )
    metrics = spec.evaluation.metrics if spec.evaluation else None
    if metrics and metrics != ("perplexity",):
        raise SpecError("evaluation.metrics", "a language model is measured by perplexity alone")


def _check_norms(path: str, family: Family, config: Mapping[str, Any]) -> None:
    """That the norms take the factors of SmoothQuant. Raises SpecError at `path`."""
    try:
        foldable_norms(family, config)
    except SpecError as error:
        raise SpecError(path, error.detail) from error


def added_bias(layer: Layer, spec: JobSpec) -> bool:
    """Whether the job gives this layer a bias that the full-precision model does not have."""
    step = spec.compensation
    return step is not None and not layer.had_bias and is_compensated(step, layer.name)


def _check_groups(weights: WeightStep, layers: tuple[Layer, ...]) -> None:
    group = weights.group_size
    wrong = next((layer for layer in layers if group and layer.columns % group), None)
    if wrong is None:
        return
    columns = {layer.columns for layer in layers}
    fitting = sorted(set.intersection(*(set(dividing_group_sizes(count)) for count in columns)), reverse=True)
    sizes = ", ".join(map(str, fitting)) if fitting else "no usual size"
    raise SpecError(
        "recipe.0.group_size",
        f"{group} does not divide the {wrong.columns} columns of {wrong.name}; {sizes} would divide every "
        "layer, and null gives one scale a row",
    )


def _format(
    spec: JobSpec, family: Family, config: Mapping[str, Any], layers: tuple[Layer, ...]
) -> tuple[Written, Family]:
    """The format that can hold the result and the family it is written as. Raises SpecError."""
    wanted = resolve_format(spec.format, spec)
    adds = any(added_bias(layer, spec) for layer in layers)
    reason = _unfit(wanted, family, config, layers, spec.weight_step, adds)
    if reason and spec.format != "auto":
        raise SpecError("format", f"{wanted} cannot hold this result: {reason}; use quantry or auto")
    if reason or wanted == "quantry":
        return "quantry", family
    target = rehome_target(family, config) if adds else None
    return wanted, target or family


def _unfit(
    wanted: Format,
    family: Family,
    config: Mapping[str, Any],
    layers: tuple[Layer, ...],
    weights: WeightStep,
    adds_biases: bool,
) -> str | None:
    """Why a format cannot hold the result exactly, or None if it can."""
    if wanted == "quantry":
        return None
    if wanted == "onnx":
        return "only image classifiers are written as ONNX"
    if family.transposed:
        return f"{family.model_type} keeps its weights transposed, which the loaders of {wanted} do not"
    if wanted == "gguf" and not family.gguf:
        return f"GGUF is written for Llama models only, not for {family.model_type}"
    if adds_biases and not holds_added_biases(family, config):
        return f"{family.model_type} has no place for the biases that compensation adds"
    if wanted == "gptq":
        for layer in layers:
            if layer.columns % 32 or layer.rows % 32:
                return (
                    f"the GPTQ layout packs 32 rows and columns at a time, which do not fit "
                    f"{layer.name} with {layer.rows} rows and {layer.columns} columns"
                )
    return None


def _resolve_lengths(spec: JobSpec, context: int | None) -> JobSpec:
    """Window lengths that the model can take, filled in where the request left them open."""
    calibration, evaluation = spec.calibration, spec.evaluation
    limit = context or DEFAULT_SEQUENCE_LENGTH
    length = calibration.sequence_length or min(limit, DEFAULT_SEQUENCE_LENGTH)
    wanted = {"calibration": length}
    if evaluation is not None:
        wanted["evaluation"] = evaluation.sequence_length or length
        evaluation = evaluation.model_copy(update={"sequence_length": wanted["evaluation"]})
    for field, value in wanted.items():
        if context and value > context:
            raise SpecError(
                f"{field}.sequence_length", f"{value} tokens are more than the model's context of {context}"
            )
    step = spec.compensation
    per_position = step is not None and step.granularity == "position_channel"
    if per_position and wanted.get("evaluation", length) != length:
        raise SpecError(
            "evaluation.sequence_length",
            f"{wanted['evaluation']} tokens, but a bias per position is fitted for calibration windows of "
            f"{length}: leave it out, or use granularity channel",
        )
    calibration = calibration.model_copy(update={"sequence_length": length})
    return spec.model_copy(update={"calibration": calibration, "evaluation": evaluation})


def _layer_bits(layer: Layer, spec: JobSpec, weights: WeightStep) -> int:
    """Bits of codes, float16 scales, zero-points and added biases, packed without padding."""
    scales = layer.rows * _groups(layer, weights)
    zeros = 0 if weights.symmetric else scales * weights.bits
    return (
        layer.rows * layer.columns * weights.bits + 16 * scales + zeros + 8 * _added_bias_bytes(layer, spec)
    )


def _stored_bytes(layer: Layer, written: Written, weights: WeightStep) -> int:
    """Bytes of the codes and grid parameters in the layout of the format (docs of each in worker/export)."""
    bits, groups = weights.bits, _groups(layer, weights)
    if written == "gguf":  # blocks of 32 codes with one float16 scale
        return layer.rows * layer.columns // 32 * (4 * bits + 2)
    scales = 2 * layer.rows * groups
    if written == "gptq":  # qweight and qzeros in int32 words, g_idx int32 a column
        return (
            layer.rows * layer.columns * bits // 8
            + groups * layer.rows * bits // 8
            + scales
            + 4 * layer.columns
        )
    if written == "compressed-tensors":  # int32 words a row, weight_shape int64[2]
        return layer.rows * -(-layer.columns * bits // 32) * 4 + scales + 16
    zeros = 0 if weights.symmetric else layer.rows * -(-groups * bits // 8)
    return layer.rows * -(-layer.columns * bits // 8) + scales + zeros


def _added_bias_bytes(layer: Layer, spec: JobSpec) -> int:
    """float32 biases of layers that had none; a bias per position adds one for each token of a window."""
    step = spec.compensation
    if step is None or not is_compensated(step, layer.name):
        return 0
    positions = spec.calibration.sequence_length if step.granularity == "position_channel" else None
    return 4 * layer.rows * ((positions or 0) + (0 if layer.had_bias or positions else 1))


def is_halved(name: str, dtype: str) -> bool:
    """Whether a kept tensor is stored as float16: embeddings and heads of float32 checkpoints are."""
    return dtype in ("F32", "F64") and (is_embedding(name) or is_head(name))


def _kept_bytes(name: str, info: TensorInfo) -> int:
    """Embeddings and heads are stored with 16 bits; everything else as it came."""
    return info.numel * (16 if is_halved(name, info.dtype) else DTYPE_BITS[info.dtype]) // 8


def _warnings(
    spec: JobSpec,
    written: Written,
    family: Family,
    written_family: Family,
    kept: Mapping[str, TensorInfo],
    resolved: JobSpec,
) -> Iterator[str]:
    if written == "quantry":
        yield "the quantry format loads in transformers after `import quantry`; other runtimes do not read it"
    if written_family is not family:
        yield (
            f"written as {written_family.architecture}: it computes the same and has a place for the biases "
            f"that compensation adds, which {family.architecture} has not"
        )
    weights = spec.weight_step
    late = isinstance(weights, GptqStep) and not weights.true_sequential
    if late and spec.compensation and spec.compensation.targets == "sequential":
        yield (
            "true_sequential is off: compensation is fitted before the earlier layers of a block are quantized, "
            "so their mean error is not removed"
        )
    if spec.compensation and spec.compensation.granularity == "position_channel":
        positions = resolved.calibration.sequence_length
        yield f"a bias per position is stored for each of {positions} positions, in float32"
    sixteen = [name for name, info in kept.items() if _kept_bytes(name, info) < info.nbytes]
    if sixteen:
        yield f"stored as float16 instead of float32: {', '.join(sixteen)}"


def _groups(layer: Layer, weights: WeightStep) -> int:
    return layer.columns // weights.group_size if weights.group_size else 1
