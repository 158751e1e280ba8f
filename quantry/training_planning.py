"""The dry run of a job that trains a classifier in fixed point: from the config and the tensors' shapes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import check_float
from quantry.contract import JobSpec
from quantry.convnets import (
    FIRST,
    LAST,
    ConvFamily,
    TrainedLayer,
    conv_family_of,
    image_size,
    is_convnet,
    tensor_shapes,
)
from quantry.headers import TensorInfo
from quantry.training import FixedPointTrainingStep, GradientGrid
from quantry.vision import VISION_FAMILIES, VisionFamily, class_count, is_vision, vision_family_of
from quantry.vision_layers import (
    check_tensors,
    is_quantized,
    pixel_count,
    tensors_in_memory,
    token_count,
)
from quantry.vision_layers import tensor_shapes as vision_shapes
from quantry.vision_planning import resolve_images
from quantry.vision_products import check_windows

MAX_TENSORS = 20_000  # ResNet-152 has a thousand
TRAINED_FAMILIES = (*VISION_FAMILIES, "resnet", "mobilenet_v2", "cifar_resnet")


@dataclass(frozen=True)
class TrainingPlan:
    """What a job will train. `spec` has every default that depends on the model filled in.

    layers: all with a weight. inactive: quantized layers with too few gradients a batch for the interval rule.
    values, operations: outputs of all layers, and multiplications and additions of a forward, for one image.
    """

    spec: JobSpec
    format: str
    architecture: str
    batch_norm: bool
    layers: tuple[TrainedLayer, ...]
    inactive: tuple[str, ...]
    parameters: int
    classes: int
    channels: int
    pixels: int
    values: int
    operations: float
    fp_bytes: int
    quantized_bytes: int
    effective_bits: float
    warnings: tuple[str, ...]

    @property
    def step(self) -> FixedPointTrainingStep:
        found = self.spec.training_step
        assert found is not None
        return found

    @property
    def quantized(self) -> tuple[TrainedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.reason is None)


def is_trainable(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a classifier that can be trained."""
    return is_vision(config) or is_convnet(config)


def classifier_family_of(config: Mapping[str, Any]) -> VisionFamily | ConvFamily:
    """The family of a classifier that can be trained. Raises SpecError for variants that cannot."""
    return vision_family_of(config) if is_vision(config) else conv_family_of(config)


def plan_training(
    spec: JobSpec, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> TrainingPlan:
    """Check a job against its classifier. Raises SpecError, naming the field and the layer.

    tensors: of the checkpoint; not looked at where the weights are drawn anew.
    """
    step = spec.training_step
    assert step is not None
    if not is_trainable(config):
        raise SpecError(
            "recipe.0",
            f"`{step.method}` trains image classifiers ({', '.join(TRAINED_FAMILIES)}), not a "
            f"{config.get('model_type')!r} model",
        )
    if config.get("quantization_config"):
        raise SpecError(
            "model",
            "the checkpoint is already quantized; give the full-precision one, and the job that made this as `init`",
        )
    _check(spec)
    architecture, layers, named, pixels = _network(config, tensors, checked=step.init != "random")
    classes, channels = class_count(config), int(config.get("num_channels", 3))
    resolved = _resolve(spec, step, str(config["model_type"]), classes, channels)
    quantized = [layer for layer in layers if layer.reason is None]
    bits = sum(layer.weights * step.bits + 32 * layer.shape[0] for layer in quantized)
    weights = sum(layer.weights for layer in quantized)
    total = sum(named.values())
    inactive = tuple(_inactive(quantized, step))
    return TrainingPlan(
        spec=resolved,
        format="quantry",
        architecture=architecture,
        batch_norm=any(layer.norm for layer in layers),
        layers=layers,
        inactive=inactive,
        parameters=total,
        classes=classes,
        channels=channels,
        pixels=pixels,
        values=sum(layer.outputs for layer in layers),
        operations=sum(2.0 * layer.weights * layer.outputs / layer.shape[0] for layer in layers),
        fp_bytes=sum(info.nbytes for info in tensors.values()) or 4 * total,
        quantized_bytes=4 * (total - weights) + bits // 8,
        effective_bits=round(bits / weights, 4),
        warnings=tuple(_warnings(step, inactive, quantized, image_size_assumed=_assumed(config))),
    )


def _check(spec: JobSpec) -> None:
    """What does not depend on the model. Raises SpecError."""
    if spec.accept.perplexity_increase_max is not None:
        raise SpecError(
            "accept.perplexity_increase_max", "a classifier has no perplexity: use accuracy_drop_max"
        )
    if spec.compute_dtype == "bfloat16":
        raise SpecError("compute_dtype", "fixed-point training computes in float32: leave it out")


def _network(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, checked: bool
) -> tuple[str, tuple[TrainedLayer, ...], dict[str, int], int]:
    """Architecture, layers, size of each tensor by name, and the values of an image."""
    if is_vision(config):
        vision = vision_family_of(config)
        check_windows(vision, config)
        shapes = _bounded(vision_shapes(vision, config))
        if checked:
            check_tensors(vision, config, tensors_in_memory(tensors))
        layers = tuple(_transformer_layers(vision.stem, shapes, token_count(vision, config)))
        pixels = pixel_count(vision, config)
        return vision.architecture, layers, {name: math.prod(shape) for name, shape in shapes.items()}, pixels
    family = conv_family_of(config)
    shapes = _bounded(tensor_shapes(family, config))
    if checked:
        _check_tensors(family.architecture, shapes, tensors)
    size = image_size(family, config)
    pixels = int(config.get("num_channels", 3)) * size[0] * size[1]
    layers = tuple(family.layers(config, size))
    return family.architecture, layers, {name: math.prod(shape) for name, shape in shapes.items()}, pixels


def _bounded(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """All shapes of a network, of which config.json may claim any number. Raises SpecError."""
    found = dict(islice(shapes, MAX_TENSORS + 1))
    if len(found) > MAX_TENSORS:
        raise SpecError(
            "model",
            f"config.json makes a network of more than {MAX_TENSORS:,} tensors: it has too many layers",
        )
    return found


def _transformer_layers(
    stem: str, shapes: Mapping[str, tuple[int, ...]], tokens: int
) -> Iterator[TrainedLayer]:
    """Every layer with a weight matrix. Swin merges four tokens into one from stage to stage."""
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        bias = f"{layer}.bias" in shapes
        reason: str | None = None
        if layer == stem or layer == "classifier":
            count = tokens if layer == stem else 1
            reason = FIRST if layer == stem else LAST
        else:
            stage = int(layer.split(".")[3]) if layer.startswith("swin.") else 0
            count = max(1, tokens // 4 ** (stage + layer.endswith("downsample.reduction")))
            reason = None if is_quantized(name) else "not a linear layer of a block"
        yield TrainedLayer(layer, shape, count * shape[0], bias, reason)


def _check_tensors(
    architecture: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> None:
    """That the checkpoint holds these tensors and no other. Raises SpecError, naming the tensor."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise SpecError(
                "model", f"the checkpoint lacks {name}, which a {architecture} of its config.json has"
            )
        if tensors[name].shape != shape:
            raise SpecError(
                "model",
                f"{name} has the shape {list(tensors[name].shape)}, config.json makes it {list(shape)}",
            )
        if not name.endswith("num_batches_tracked"):
            check_float(name, tensors[name])
    other = next((name for name in tensors if name not in shapes), None)
    if other is not None:
        raise SpecError(
            "model", f"the checkpoint holds {other}, which a {architecture} of its config.json has not"
        )


def _resolve(
    spec: JobSpec, step: FixedPointTrainingStep, model_type: str, classes: int, channels: int
) -> JobSpec:
    """The spec with its open settings filled in. Raises SpecError."""
    mobile = model_type == "mobilenet_v2"
    rate = 0.1 if step.init == "random" else 0.01
    filled = {
        "activation_bits": step.activation_bits or step.bits,
        "gradient": step.gradient
        and step.gradient.model_copy(update={"bits": step.gradient.bits or step.bits}),
        "learning_rate": step.learning_rate or (0.05 if mobile else rate),
        "weight_decay": (4e-5 if mobile else 1e-4) if step.weight_decay is None else step.weight_decay,
        "schedule": step.schedule or ("cosine" if mobile else "step"),
        "augmentation": step.augmentation or ("flip_crop" if channels == 3 else "crop"),
    }
    if step.batch_size == 1 and is_convnet({"model_type": model_type}):
        raise SpecError(
            "recipe.0.batch_size", "batch norm has nothing to normalise in a batch of one image: take more"
        )
    evaluation = spec.evaluation
    if evaluation is not None:  # there is no rounding to compare with: weights move
        fp = tuple(name for name in evaluation.baselines if name == "fp")
        evaluation = evaluation.model_copy(update={"baselines": fp})
    trained = spec.model_copy(update={"recipe": (step.model_copy(update=filled),), "evaluation": evaluation})
    return resolve_images(trained, classes)


def _inactive(layers: list[TrainedLayer], step: FixedPointTrainingStep) -> Iterator[str]:
    """Layers in which one clipped gradient is more than the share that the rule aims at."""
    grid = step.gradient
    if grid is None or grid.interval != "large_gradient":
        return
    least = least_gradients(step, grid)
    batch = min(step.batch_size, step.samples or step.batch_size)
    yield from (layer.name for layer in layers if batch * layer.outputs < least)


def least_gradients(step: FixedPointTrainingStep, grid: GradientGrid) -> float:
    """Gradients of a batch below which the large-gradient rule keeps the whole range."""
    return float((2 ** (grid.bits or step.bits) - 1) / grid.alpha)


def _assumed(config: Mapping[str, Any]) -> bool:
    return is_convnet(config) and "image_size" not in config


def _warnings(
    step: FixedPointTrainingStep,
    inactive: tuple[str, ...],
    quantized: list[TrainedLayer],
    *,
    image_size_assumed: bool,
) -> Iterator[str]:
    yield "the quantry format loads in transformers after `import quantry`"
    if image_size_assumed:
        yield "config.json says no image_size: memory, time and inactive layers are those of its family's usual size"
    if not inactive or step.gradient is None:
        return
    which = "every quantized layer" if len(inactive) == len(quantized) else f"{len(inactive)} layers"
    least = least_gradients(step, step.gradient)
    yield (
        f"the large-gradient interval is inactive in {which}: a batch has fewer than {least:,.0f} gradients there, "
        f"(2^bits - 1) / alpha, so they train with the whole range (min_max); raise recipe.0.gradient.alpha or "
        f"batch_size: {', '.join(inactive)}"
    )
