"""The dry run of a job on an image classifier: from the config and the tensors' shapes alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import Metric, SpecError
from quantry.contract import DatasetRef, JobSpec
from quantry.headers import TensorInfo
from quantry.recipe import dividing_group_sizes
from quantry.reports import Estimate, LayerPlan
from quantry.vision import VisionFamily, vision_family_of

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
_RUNTIME_BYTES = 800 * 2**20
_CPU_RATE = (10e9, 200e9)  # operations a second and thread, slow and fast
_CUDA_RATE = (5e12, 100e12)
_SEARCH_PASSES = {"uniform": 2, "repq": 6, "igq": 12, "adalog": 200, "ptq4vit": 400}
_RENAMED = (  # names on disk -> names in memory (transformers 5)
    (
        r"\.encoder\.layer\.(\d+)\.(?=attention\.|intermediate\.|output\.|layernorm|mlp\.|norm|layer_scale)",
        r".layers.\1.",
    ),
    (r"\.attention\.(attention|self)\.(query|key|value)\.", lambda m: f".attention.{m[2][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
)
_LINEARS = re.compile(
    r"(attention\.[qkvo]_proj|mlp\.fc[12]|downsample\.reduction|^classifier|patch_embeddings\.projection)\.weight$"
)


@dataclass(frozen=True)
class VisionPlan:
    """What a job on a classifier will do. `spec` has every default that depends on the model filled in."""

    spec: JobSpec
    format: str
    family: VisionFamily
    layers: tuple[LayerPlan, ...]
    parameters: int
    quantized_weights: int
    largest_block: int
    tokens: int
    fp_bytes: int
    quantized_bytes: int
    effective_bits: float
    warnings: tuple[str, ...]


def plan_vision(spec: JobSpec, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> VisionPlan:
    """Check a job against its classifier. Raises SpecError, naming the field and the layer."""
    if config.get("quantization_config"):
        raise SpecError("model", "the checkpoint is already quantized; give the full-precision one")
    family = vision_family_of(config)
    _check_recipe(spec)
    resolved = _resolve(spec)
    named = {_in_memory(name, family): info for name, info in tensors.items()}
    layers = {name: info for name, info in named.items() if _LINEARS.search(name)}
    for wanted in (f"{family.stem}.weight", "classifier.weight"):
        if wanted not in layers:
            raise SpecError("model", f"the checkpoint lacks {wanted}; it is not a {family.architecture}")
    step = resolved.weight_step
    bits = scales = weights = 0
    for name, info in layers.items():
        rows, columns = info.shape[0], info.numel // max(1, info.shape[0])
        if step.group_size and columns % step.group_size:
            sizes = ", ".join(map(str, dividing_group_sizes(columns))) or "no usual size"
            raise SpecError(
                "recipe.0.group_size",
                f"{step.group_size} does not divide the {columns} columns of {name}; {sizes} would, and null "
                "gives one scale a row",
            )
        groups = columns // step.group_size if step.group_size else 1
        weights += info.numel
        scales += 16 * rows * groups
        bits += step.bits * info.numel + 16 * rows * groups
        bits += 0 if step.symmetric else step.bits * rows * groups
        bits += 8 * _added_bytes(
            spec, rows, _positions(name, config), f"{name.removesuffix('weight')}bias" in named
        )
    kept = sum(info.nbytes for name, info in named.items() if name not in layers)
    return VisionPlan(
        spec=resolved,
        format="quantry",
        family=family,
        layers=tuple(_layer_plans(named, layers)),
        parameters=sum(info.numel for info in named.values()),
        quantized_weights=weights,
        largest_block=max(info.numel for info in layers.values()),
        tokens=_tokens(config),
        fp_bytes=sum(info.nbytes for info in named.values()),
        quantized_bytes=kept + bits // 8,
        effective_bits=round(bits / weights, 4),
        warnings=tuple(_warnings(resolved)),
    )


def estimate_vision(plan: VisionPlan, *, threads: int, cuda: bool) -> Estimate:
    """Memory and time from counted operations; a wide range on purpose."""
    spec = plan.spec
    images = spec.calibration.samples
    evaluated = spec.evaluation.samples if spec.evaluation else 0
    streams = 1 + len(spec.evaluation.baselines) if spec.evaluation else 0
    forward = 2.0 * plan.quantized_weights * plan.tokens
    activation = spec.activation_step
    search = _SEARCH_PASSES.get(activation.method, 2) if activation else 0
    operations = forward * (images * (6 + search) + streams * (evaluated or 2000))
    rates = _CUDA_RATE if cuda else tuple(rate * threads for rate in _CPU_RATE)
    return Estimate(
        spec=spec,
        format=plan.format,
        architecture=plan.family.architecture,
        parameters=plan.parameters,
        layers=plan.layers,
        fp_bytes=plan.fp_bytes,
        quantized_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        peak_memory_bytes=int(
            _RUNTIME_BYTES
            + 4 * plan.parameters * 3
            + 16 * plan.largest_block
            + 4 * 4 * images * plan.tokens * 4096
        ),
        seconds_low=round(1 + operations / rates[1], 1),
        seconds_high=round(40 + 4 * operations / rates[0], 1),
        warnings=plan.warnings,
    )


def _positions(name: str, config: Mapping[str, Any]) -> int:
    """Rows of a table of biases per position, at most: windows of Swin and merged patches have fewer."""
    return 1 if name.startswith("classifier") else _tokens(config)


def _added_bytes(spec: JobSpec, rows: int, positions: int, had_bias: bool) -> int:
    """float32 biases that compensation adds to a layer."""
    step = spec.compensation
    if step is None:
        return 0
    return 4 * rows * (positions if step.granularity == "position_channel" else int(not had_bias))


def _warnings(spec: JobSpec) -> Iterator[str]:
    yield "the quantry format loads in transformers after `import quantry`"
    if spec.compensation and spec.compensation.granularity == "position_channel":
        yield "a bias per position is stored for every layer, in float32: it can outweigh the packed weights"


def _check_recipe(spec: JobSpec) -> None:
    for index, step in enumerate(spec.recipe):
        if step.method not in VISION_METHODS:
            raise SpecError(
                f"recipe.{index}",
                f"`{step.method}` does not work on image classifiers; these do: {', '.join(VISION_METHODS)}",
            )
    if spec.format not in ("auto", "quantry"):
        raise SpecError(
            "format", f"{spec.format} has no place for a classifier's convolution and quantizers: use quantry"
        )
    if spec.accept.perplexity_increase_max is not None:
        raise SpecError(
            "accept.perplexity_increase_max", "a classifier has no perplexity: use accuracy_drop_max"
        )
    if spec.compute_dtype == "bfloat16":
        raise SpecError("compute_dtype", "classifiers run in float32: leave it out")


def _resolve(spec: JobSpec) -> JobSpec:
    calibration = spec.calibration.model_copy(update={"dataset": _images(spec, "calibration")})
    for role, part in (("calibration", spec.calibration), ("evaluation", spec.evaluation)):
        if part is not None and part.sequence_length is not None:
            raise SpecError(f"{role}.sequence_length", "images have no windows of tokens: leave it out")
    evaluation = spec.evaluation
    if evaluation is not None:
        metrics = evaluation.metrics or _METRICS
        if "perplexity" in metrics:
            raise SpecError(
                "evaluation.metrics", f"a classifier has no perplexity; choose of {', '.join(_METRICS)}"
            )
        if evaluation.metrics and "kl" in metrics and "fp" not in evaluation.baselines:
            raise SpecError(
                "evaluation.metrics", "kl compares with full precision: add `fp` to the baselines"
            )
        if "kl" in metrics and "fp" not in evaluation.baselines:
            metrics = tuple(metric for metric in metrics if metric != "kl")
        if spec.accept.accuracy_drop_max is not None and "top1" not in metrics:
            raise SpecError(
                "accept.accuracy_drop_max", "the gate looks at top1: add it to evaluation.metrics"
            )
        dataset = _images(spec, "evaluation")
        evaluation = evaluation.model_copy(update={"dataset": dataset, "metrics": metrics})
    return spec.model_copy(update={"calibration": calibration, "evaluation": evaluation, "format": "quantry"})


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


def _in_memory(name: str, family: VisionFamily) -> str:
    """The tensor's name in memory, from the name on disk."""
    for pattern, replacement in _RENAMED:
        if ".encoder" in pattern and family.layers.endswith("encoder.layer"):
            continue
        name = re.sub(pattern, replacement, name)
    return name


def _layer_plans(named: Mapping[str, TensorInfo], layers: Mapping[str, TensorInfo]) -> Iterator[LayerPlan]:
    for name, info in named.items():
        if len(info.shape) < 2 or not name.endswith(".weight"):
            continue
        shape = (info.shape[0], info.numel // max(1, info.shape[0]))
        quantized = name in layers
        reason = None if quantized else "not a linear layer of a block"
        yield LayerPlan(name=name.removesuffix(".weight"), shape=shape, quantized=quantized, reason=reason)


def _tokens(config: Mapping[str, Any]) -> int:
    """Tokens of an image in the first block."""

    def side(key: str, default: int) -> int:
        value = config.get(key, default)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is not int or value < 1:
            raise SpecError("model", f"config.json: {key} is {value!r}, not a positive whole number")
        return value

    return (side("image_size", 224) // max(1, side("patch_size", 16))) ** 2 + 1
