"""The convolutional classifiers that can be trained: their layers and tensors from config.json alone. No torch.

Names are those in memory, which for these networks are those on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import architectures, size_of
from quantry.vision import class_count

FIRST = "the first layer: images stay in full precision"
LAST = "the last layer: logits stay in full precision"
SHORTCUT = "a projection on a shortcut: shortcuts stay in full precision"
DEPTHWISE = "a depthwise convolution: too few products a code to train in fixed point"
Config = Mapping[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class TrainedLayer:
    """A layer with a weight. outputs: values of its output for one image. reason: why it stays in full precision."""

    name: str
    shape: tuple[int, ...]
    outputs: int
    bias: bool = False
    reason: str | None = None
    norm: str | None = None  # the batch norm behind it

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ConvFamily:
    """One `model_type`: its class, and what lists its layers for images of a size. image_size: where none is said."""

    model_type: str
    architecture: str
    layers: Callable[[Config, Size], Iterator[TrainedLayer]]
    image_size: int
    head_norm: Callable[[Config], tuple[str, int]] | None = None


def tensor_shapes(family: ConvFamily, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that `save_pretrained` writes, and its shape. Raises SpecError."""
    for layer in family.layers(config, image_size(family, config)):
        yield f"{layer.name}.weight", layer.shape
        if layer.bias:
            yield f"{layer.name}.bias", layer.shape[:1]
        if layer.norm:
            yield from _norm(layer.norm, layer.shape[0])
    if family.head_norm is not None:
        yield from _norm(*family.head_norm(config))


def image_size(family: ConvFamily, config: Config) -> Size:
    """Height and width of the images, as config.json says; a ResNet's does not always."""
    value = config.get("image_size", family.image_size)
    pair = value if isinstance(value, list) and len(value) == 2 else [value, value]
    height, width = (_size({"image_size": side}, "image_size") for side in pair)
    return height, width


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)
    yield f"{name}.num_batches_tracked", ()


def _conv(
    name: str, shape: tuple[int, int, int, int], size: Size, stride: int = 1, reason: str | None = None
) -> tuple[TrainedLayer, Size]:
    """A convolution padded by half its kernel with its batch norm, and the size that leaves it."""
    height, width = (-(-side // stride) for side in size)
    place = f"{name}.convolution"
    layer = TrainedLayer(place, shape, shape[0] * height * width, reason=reason, norm=f"{name}.normalization")
    return layer, (height, width)


def _head(name: str, config: Config, width: int) -> TrainedLayer:
    classes = class_count(config)
    return TrainedLayer(name, (classes, width), classes, bias=True, reason=LAST)


def _resnet(config: Config, size: Size) -> Iterator[TrainedLayer]:
    """transformers' ResNet: 7x7 stem and pooling, then stages of basic or bottleneck layers."""
    config = {
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024, 2048],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
        **config,
    }
    inputs = _size(config, "embedding_size")
    layer, size = _conv(
        "resnet.embedder.embedder", (inputs, _size(config, "num_channels"), 7, 7), size, 2, FIRST
    )
    yield layer
    size = (-(-size[0] // 2), -(-size[1] // 2))
    widths, depths = _sizes(config, "hidden_sizes"), _sizes(config, "depths")
    if len(widths) != len(depths):
        raise SpecError("model", "config.json: hidden_sizes and depths are not of one length")
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            place = f"resnet.encoder.stages.{stage}.layers.{index}"
            halves = index == 0 and (stage > 0 or bool(config.get("downsample_in_first_stage")))
            layers, size = _residual(place, config, inputs, width, 2 if halves else 1, size)
            yield from layers
            inputs = width
    yield _head("classifier.1", config, inputs)


def _residual(
    place: str, config: Config, inputs: int, width: int, stride: int, size: Size
) -> tuple[list[TrainedLayer], Size]:
    layers, before = [], size
    if inputs != width or stride != 1:
        layers.append(_conv(f"{place}.shortcut", (width, inputs, 1, 1), before, stride, SHORTCUT)[0])
    if config["layer_type"] == "basic":
        parts = [(width, inputs, 3, stride), (width, width, 3, 1)]
    elif config["layer_type"] == "bottleneck":
        inner, early = width // 4, bool(config.get("downsample_in_bottleneck"))
        first, second = (stride, 1) if early else (1, stride)
        parts = [(inner, inputs, 1, first), (inner, inner, 3, second), (width, inner, 1, 1)]
    else:
        raise SpecError(
            "model", f"config.json: layer_type is {config['layer_type']!r}, not basic or bottleneck"
        )
    for index, (out, given, kernel, step) in enumerate(parts):
        layer, size = _conv(f"{place}.layer.{index}", (out, given, kernel, kernel), size, step)
        layers.append(layer)
    return layers, size


_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)


def _mobilenet_v2(config: Config, size: Size) -> Iterator[TrainedLayer]:
    """transformers' MobileNetV2: a stem, 16 inverted residuals, a last 1x1 convolution."""
    stem, base = _scaled(config, 32), "mobilenet_v2"
    layer, size = _conv(
        f"{base}.conv_stem.first_conv",
        (stem, _size({"num_channels": 3, **config}, "num_channels"), 3, 3),
        size,
        2,
        FIRST,
    )
    yield layer
    place = f"{base}.conv_stem"
    if not config.get("first_layer_is_expansion", True):
        yield _conv(f"{place}.expand_1x1", (stem, stem, 1, 1), size)[0]
    yield _conv(f"{place}.conv_3x3", (stem, 1, 3, 3), size, 1, DEPTHWISE)[0]
    inputs = _scaled(config, _CHANNELS[0])
    yield _conv(f"{place}.reduce_1x1", (inputs, stem, 1, 1), size)[0]
    reached, limit = 2, _size({"output_stride": 32, **config}, "output_stride")
    for index, (stride, channels) in enumerate(zip(_STRIDES, _CHANNELS[1:], strict=True)):
        stride = 1 if reached == limit else stride  # dilated from there on
        reached *= stride
        place, width = f"{base}.layer.{index}", _scaled(config, channels)
        inner = _divisible(round(inputs * _factor(config, "expand_ratio", 6.0)), config)
        yield _conv(f"{place}.expand_1x1", (inner, inputs, 1, 1), size)[0]
        layer, size = _conv(f"{place}.conv_3x3", (inner, 1, 3, 3), size, stride, DEPTHWISE)
        yield layer
        yield _conv(f"{place}.reduce_1x1", (width, inner, 1, 1), size)[0]
        inputs = width
    fine = config.get("finegrained_output", True) and _factor(config, "depth_multiplier", 1.0) < 1
    last = 1280 if fine else _scaled(config, 1280)
    yield _conv(f"{base}.conv_1x1", (last, inputs, 1, 1), size)[0]
    yield _head("classifier", config, last)


def _scaled(config: Config, channels: int) -> int:
    return _divisible(round(channels * _factor(config, "depth_multiplier", 1.0)), config)


def _factor(config: Config, key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 100:
        raise SpecError("model", f"config.json: {key} is {value!r}, not a positive number below 100")
    return float(value)


def _divisible(channels: int, config: Config) -> int:
    """The nearest multiple of depth_divisible_by, at least min_depth and nine tenths of what was asked for."""
    config = {"depth_divisible_by": 8, "min_depth": 8, **config}
    by, least = _size(config, "depth_divisible_by"), _size(config, "min_depth")
    found = max(least, int(channels + by / 2) // by * by)
    return found + by if found < 0.9 * channels else found


def _cifar_resnet(config: Config, size: Size) -> Iterator[TrainedLayer]:
    """quantry.cifar_resnet: no shortcut has parameters."""
    config = {"num_channels": 3, **_CIFAR, **config}
    widths, depths = _sizes(config, "widths"), _sizes(config, "depths")
    if len(widths) != len(depths):
        raise SpecError("model", "config.json: widths and depths are not of one length")
    inputs = widths[0]
    yield _conv("resnet.embedder", (inputs, _size(config, "num_channels"), 3, 3), size, 1, FIRST)[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            place = f"resnet.stages.{stage}.{index}.layer"
            layer, size = _conv(f"{place}.0", (width, inputs, 3, 3), size, 2 if stage and not index else 1)
            yield layer
            yield _conv(f"{place}.1", (width, width, 3, 3), size)[0]
            inputs = width
    yield _head("classifier", config, inputs)


_CIFAR: Config = {"widths": [16, 32, 64], "depths": [3, 3, 3]}

CONV_FAMILIES: dict[str, ConvFamily] = {
    family.model_type: family
    for family in (
        ConvFamily("resnet", "ResNetForImageClassification", _resnet, 224),
        ConvFamily("mobilenet_v2", "MobileNetV2ForImageClassification", _mobilenet_v2, 224),
        ConvFamily(
            "cifar_resnet",
            "CifarResNetForImageClassification",
            _cifar_resnet,
            32,
            lambda config: ("resnet.normalization", _sizes({**_CIFAR, **config}, "widths")[-1]),
        ),
    )
}


def is_convnet(config: Config) -> bool:
    """Whether a `config.json` is of a convolutional classifier that Quantry can train."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in CONV_FAMILIES


def conv_family_of(config: Config) -> ConvFamily:
    """The family of a `config.json`. Raises SpecError for remote code and other heads."""
    if "auto_map" in config:
        raise SpecError("model", "config.json names remote code (`auto_map`); it is refused")
    family = CONV_FAMILIES[str(config.get("model_type"))]
    wanted = architectures(config)
    if wanted and family.architecture not in wanted:
        raise SpecError(
            "model",
            f"a {', '.join(map(str, wanted))} is not an image classifier; Quantry needs a {family.architecture}",
        )
    return family


def _size(config: Config, key: str) -> int:
    value = size_of(config, key)
    if value is None:
        raise SpecError("model", f"config.json: {key} is null, not a positive whole number")
    return value


def _sizes(config: Config, key: str) -> list[int]:
    values = config[key]
    if not isinstance(values, list) or not 0 < len(values) <= 64:
        raise SpecError("model", f"config.json: {key} is {values!r}, not a list of sizes")
    return [_size({key: value}, key) for value in values]
