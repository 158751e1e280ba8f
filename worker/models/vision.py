"""One adapter for the image classifiers of transformers: a stem, blocks, a head, each run on its own.

The sweep sees a list of blocks whose first takes pixels and whose last returns logits. A classifier is small:
it stays whole on the device, and each block is copied when the sweep visits it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.swin.modeling_swin import SwinStage

from quantry.layers.operands import use_quantized_attention
from quantry.vision import VisionFamily, vision_family_of
from quantry.vision_layers import UNREAD
from worker.errors import ModelError, NonFiniteError
from worker.models.calls import BlockCall, run_block
from worker.models.network import join
from worker.models.source import refusing

BATCH_IMAGES = 32  # at most
HEAD_WIDTH = 64  # as these networks have it
BATCH_VALUES = 1 << 22  # of the widest tensor of a batch, on a CPU; sixteen times as many on a GPU


@dataclass(frozen=True)
class Operand:
    """A tensor that a classifier's activation quantizer works on.

    name: as `quantry.layers.operands` names it. kind: what the tensor is: image, post_norm, attention_output,
    post_activation, head_input, query, key, value or probabilities. layers: the linear or convolution
    layers that take it (q, k and v share one), by full name; for attention operands, the attention module.
    """

    name: str
    kind: str
    layers: tuple[str, ...]


class Stem(nn.Module):
    """Pixels (N, C, H, W) to tokens (N, T, width)."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.embeddings(pixels)
        tokens: Tensor = out[0] if isinstance(out, tuple) else out
        return tokens


class Head(nn.Module):
    """Tokens (N, T, width) to logits (N, classes)."""

    def __init__(self, norm: nn.Module, classifier: nn.Module, pooled: str) -> None:
        super().__init__()
        self.norm, self.classifier, self.pooled = norm, classifier, pooled

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        if self.pooled == "class":
            x = tokens[:, 0]
        elif self.pooled == "mean":
            x = tokens.mean(1)
        else:
            x = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        logits: Tensor = self.classifier(x)
        return logits


@dataclass(frozen=True)
class _Block:
    """prefix: of the names of its layers in the network ("" for the head)."""

    prefix: str
    module: nn.Module
    groups: tuple[tuple[str, ...], ...]
    call: BlockCall


def load_classifier(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The network of a checkpoint, whole. Raises ModelError if the tensors do not fit the architecture."""
    with refusing(folder, "the checkpoint"):
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(name for name in map(str, info[kind]) if not UNREAD.search(name))
        if wrong:
            raise ModelError(f"{folder.name}: {kind.replace('_', ' ')}, such as {wrong[0]}")
    return model


class VisionModel:
    """An image classifier in float32, whole on the device, with attention that quantizers can reach.

    Raises: ModelError if the folder's tensors do not fit the architecture, NonFiniteError for damaged weights.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        with refusing(folder, "config.json"):
            self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.family: VisionFamily = vision_family_of(self.config.to_dict())
        self.network = load_classifier(folder, dtype)
        self.network.eval().requires_grad_(False).to(device)
        use_quantized_attention(self.network)
        for name, parameter in self.network.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"{name} holds NaN or infinity: the checkpoint is damaged")

    @property
    def classes(self) -> int:
        return int(self.config.num_labels)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width that the network takes, after the image processor."""
        size = getattr(self.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.config.num_channels), int(height), int(width)

    @cached_property
    def images_at_once(self) -> int:
        """How many images go through the network together: so many that their widest tensor stays small."""
        stem = self.network.get_submodule(self.family.stem)
        pixels = self.image_shape[1] * self.image_shape[2]
        tokens = pixels // (stem.kernel_size[0] * stem.kernel_size[1])
        keys = getattr(self.config, "window_size", None)
        keys = tokens if keys is None else keys**2
        widest = tokens * stem.out_channels * max(4, keys // HEAD_WIDTH)  # of the MLP, of all heads' scores
        values = BATCH_VALUES * (16 if self.device.type == "cuda" else 1)
        return min(BATCH_IMAGES, max(1, int(values // max(1, widest))))

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """(N, classes) float32, with whatever quantizers are attached to the network."""
        parts = [
            self.network(part.to(self.device)).logits.float()
            for part in torch.split(pixels, self.images_at_once)
        ]
        return torch.cat(parts)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Run on another device for the length of the block."""
        home, self.device = self.device, device
        self.network.to(device)
        try:
            yield
        finally:
            self.device = home
            self.network.to(home)

    # The list of blocks, as the sweep takes it.

    @property
    def count(self) -> int:
        return len(self._blocks)

    def prefix(self, index: int) -> str:
        return self._blocks[index].prefix

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        return self._blocks[index].groups

    def block(self, index: int) -> nn.Module:
        """Block `index`, its own copy, with the quantizers attached to the network so far."""
        return copy.deepcopy(self._blocks[index].module)

    def run(self, index: int, states: Tensor) -> Tensor:
        """Block `index` of the network itself, with whatever is attached to it."""
        return run_block(self._blocks[index].module, states, self._blocks[index].call)

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """What enters the first block: the pixels themselves."""
        return pixels.to(self.device, self.dtype), [block.call for block in self._blocks]

    @property
    def halves(self) -> None:
        return None

    def batch(self, inputs: Tensor) -> int:
        return self.images_at_once

    def attention(self, index: int) -> str | None:
        return self.family.attention if self.groups(index) == self.family.groups else None

    def units(self, index: int) -> dict[str, tuple[str, str]]:
        """The attention module and the feed-forward network of a block, and the last layer of each."""
        if self.attention(index) is None:
            return {}
        family = self.family
        mlp = family.after_activation.rpartition(".")[0]
        return {
            "attention": (family.attention, family.groups[1][0]),
            "mlp": (mlp, family.after_activation),
        }

    def output_layer(self, index: int) -> str | None:
        """The block's last layer, if what it returns is added to the residual stream as it is."""
        name = self.family.after_activation
        plain = (name,) in self.groups(index) and not hasattr(self._blocks[index].module, "layer_scale2")
        return name if plain else None

    def use_kept(self, *, as_stored: bool) -> None:
        """What is not quantized is stored as it is."""

    def layer(self, name: str) -> nn.Linear | nn.Conv2d:
        module = self.network.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return module

    def columns(self, name: str) -> int:
        """The number of inputs of one output of a layer."""
        return int(self.layer(name).weight[0].numel())

    def weight(self, name: str) -> Tensor:
        """The full-precision weight: (out, in) float32; a convolution's kernel is flattened."""
        return self.layer(name).weight.detach().flatten(1).float().clone()

    def bias(self, name: str) -> Tensor | None:
        bias = self.layer(name).bias
        return None if bias is None else bias.detach().float().clone()

    @cached_property
    def _blocks(self) -> tuple[_Block, ...]:
        family, network = self.family, self.network
        base = network.get_submodule(family.base)
        stem = _Block(
            f"{family.base}", Stem(base.embeddings), (("embeddings.patch_embeddings.projection",),), _plain()
        )
        head = _Block(
            "",
            Head(network.get_submodule(family.norm), network.classifier, family.pooled),
            (("classifier",),),
            _plain(),
        )
        return (stem, *self._layers(), head)

    def _layers(self) -> list[_Block]:
        layers = self.network.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        if not self.family.hierarchical:
            return [
                _Block(f"{self.family.layers}.{i}", layer, self.family.groups, _plain())
                for i, layer in enumerate(layers)
            ]
        blocks = []
        patches = self.network.get_submodule(self.family.stem).kernel_size
        sides = zip(self.image_shape[1:], patches, strict=True)
        height, width = (-(-side // patch) for side, patch in sides)  # the stem pads what is left over
        for i, stage in enumerate(layers):
            call = BlockCall(((height, width),), {})
            path = f"{self.family.layers}.{i}"
            assert isinstance(stage, SwinStage)
            for j, layer in enumerate(stage.blocks):
                blocks.append(_Block(f"{path}.blocks.{j}", layer, self.family.groups, call))
            if stage.downsample is not None:
                blocks.append(_Block(f"{path}.downsample", stage.downsample, (("reduction",),), call))
                height, width = (height + 1) // 2, (width + 1) // 2
        return blocks

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Every linear and convolution layer that is quantized, by full name, in the order they run."""
        return tuple(
            join(block.prefix, name) for block in self._blocks for group in block.groups for name in group
        )

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Every tensor that an activation quantizer can work on, in the order the network makes them."""
        found: list[Operand] = []
        for block in self._blocks:
            for group in block.groups:
                names = tuple(join(block.prefix, name) for name in group)
                found.append(Operand(f"{names[0]}.input", self._kind(group[0]), names))
                if group[0].startswith(f"{self.family.attention}.q"):
                    attention = join(block.prefix, self.family.attention)
                    for role in ("query", "key", "value", "probabilities"):
                        found.append(Operand(f"{attention}.{role}", role, (attention,)))
        return tuple(found)

    def _kind(self, layer: str) -> str:
        if layer.endswith("projection"):
            return "image"
        if layer == "classifier":
            return "head_input"
        if layer == self.family.after_activation:
            return "post_activation"
        return "attention_output" if layer.endswith("o_proj") else "post_norm"


def _plain() -> BlockCall:
    return BlockCall((), {})
