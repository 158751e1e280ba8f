"""The image classifiers that Quantry knows: how their blocks are called and what runs in them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import architectures, size_of


@dataclass(frozen=True)
class VisionFamily:
    """One `model_type` of transformers with an image classification head.

    base: attribute of the backbone. layers: path of the list of blocks; Swin's is a list of stages.
    groups: linear layers of a block in the order they run; the layers of one group share their input.
    norms: LayerNorm -> the layers that take its output. attention, after_activation: the attention module,
    and the layer that is fed by the MLP's non-linearity. norm: the last LayerNorm.
    pooled: what the head is given: the class token, that and the mean of the patches, or the mean.
    special_tokens: the tokens beside the patches, as their embeddings are called.
    """

    model_type: str
    architecture: str
    base: str
    layers: str
    groups: tuple[tuple[str, ...], ...]
    norms: Mapping[str, tuple[str, ...]]
    norm: str
    pooled: str
    attention: str = "attention"
    after_activation: str = "mlp.fc2"
    hierarchical: bool = False
    special_tokens: tuple[str, ...] = ("cls_token",)

    @property
    def stem(self) -> str:
        """The convolution that embeds patches."""
        return f"{self.base}.embeddings.patch_embeddings.projection"


_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_GROUPS = (_QKV, ("attention.o_proj",), ("mlp.fc1",), ("mlp.fc2",))
_NORMS = {"layernorm_before": _QKV, "layernorm_after": ("mlp.fc1",)}

VISION_FAMILIES: dict[str, VisionFamily] = {
    family.model_type: family
    for family in (
        VisionFamily(
            "vit",
            "ViTForImageClassification",
            "vit",
            "vit.layers",
            _GROUPS,
            _NORMS,
            "vit.layernorm",
            "class",
        ),
        VisionFamily(
            "deit",
            "DeiTForImageClassification",
            "deit",
            "deit.layers",
            _GROUPS,
            _NORMS,
            "deit.layernorm",
            "class",
            special_tokens=("cls_token", "distillation_token"),
        ),
        VisionFamily(
            "dinov2",
            "Dinov2ForImageClassification",
            "dinov2",
            "dinov2.encoder.layer",
            _GROUPS,
            {"norm1": _QKV, "norm2": ("mlp.fc1",)},
            "dinov2.layernorm",
            "class+mean",
        ),
        VisionFamily(
            "swin",
            "SwinForImageClassification",
            "swin",
            "swin.encoder.layers",
            _GROUPS,
            _NORMS,
            "swin.layernorm",
            "mean",
            hierarchical=True,
            special_tokens=(),
        ),
    )
}


def is_vision(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of an image classifier that Quantry knows."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in VISION_FAMILIES


def vision_family_of(config: Mapping[str, Any]) -> VisionFamily:
    """The family of a `config.json`. Raises SpecError for remote code, other heads and odd variants."""
    if "auto_map" in config:
        raise SpecError("model", "config.json names remote code (`auto_map`); it is refused")
    family = VISION_FAMILIES[str(config.get("model_type"))]
    wanted = architectures(config)
    if wanted and family.architecture not in wanted:
        raise SpecError(
            "model", f"a {wanted[0]} is not an image classifier; Quantry needs a {family.architecture}"
        )
    if config.get("return_dict") is False:
        raise SpecError("model", "config.json: return_dict is false, and classifiers run with true only")
    if config.get("use_swiglu_ffn"):
        raise SpecError("model", "DINOv2 with a SwiGLU feed-forward network is not supported")
    return family


def class_count(config: Mapping[str, Any]) -> int:
    """Classes that the head of a classifier tells apart. Raises SpecError."""
    names = config.get("id2label")
    if names is None:
        return size_of(config, "num_labels") or 2  # transformers' default
    if not isinstance(names, Mapping) or not names:
        raise SpecError("model", "config.json: id2label is not an object from class numbers to names")
    if config.get("num_labels", len(names)) != len(names):
        raise SpecError(
            "model",
            f"config.json: num_labels is {config['num_labels']!r}, but id2label names {len(names)} classes",
        )
    return len(names)


def activation_function(config: Mapping[str, Any]) -> str:
    """The non-linearity of the feed-forward networks, as transformers calls it."""
    return str(config.get("hidden_act", "gelu"))
