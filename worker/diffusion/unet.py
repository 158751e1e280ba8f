"""What of a denoiser is quantized: its convolutions and linear layers, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from quantry.diffusion_layers import is_edge, is_time
from worker.errors import ModelError

_BLOCKS = (ResnetBlock2D, BasicTransformerBlock, Attention)
Role = Literal["first", "last", "time", "inner"]


@dataclass(frozen=True)
class UNetLayer:
    """A Conv2d or Linear of the network.

    role: `first` and `last` read and write the image, `time` layers see nothing but the timestep. block: the
    residual block, attention or time embedding that holds the layer, or the layer itself. split: channels of
    the deep and of the skip half of a concatenated input.
    """

    name: str
    role: Role
    block: str
    split: tuple[int, int] | None


@torch.no_grad()
def layers_of(unet: Any, run: Callable[[], object] | None = None) -> tuple[UNetLayer, ...]:
    """The layers that run, in their order; a layer that never runs is left out.

    run: runs the network once; without it a UNet2DModel runs on zeros, and ModelError is raised for anything else.
    """
    run = run or partial(_run_on_zeros, unet)
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    order: dict[str, None] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: order.setdefault(name))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    splits = dict(_splits(unet)) if hasattr(unet, "up_blocks") else {}
    return tuple(UNetLayer(name, _role(name), _block(unet, name), splits.get(name)) for name in order)


def _run_on_zeros(unet: Any) -> None:
    shape, weight = image_shape(unet), unet.conv_in.weight
    unet(torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device), 0)


def image_shape(unet: Any) -> tuple[int, int, int]:
    """(C, H, W) of a latent. Raises ModelError for what is no unconditional UNet2DModel that predicts one image."""
    if type(unet).__name__ != "UNet2DModel":
        raise ModelError(f"unet: {type(unet).__name__} is not supported; use a UNet2DModel")
    config = unet.config
    if unet.class_embedding is not None:
        raise ModelError("unet/config.json: class-conditional networks are not supported")
    if config.out_channels != config.in_channels:
        raise ModelError(
            f"unet/config.json: {config.out_channels} output channels for {config.in_channels} of the image; "
            "networks that predict a variance are not supported"
        )
    size = config.sample_size
    if size is None:
        raise ModelError("unet/config.json: sample_size is missing; set it to the size of an image")
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def layer_bits(layers: Iterable[UNetLayer], bits: int, edge_bits: int = 8) -> dict[str, int]:
    """Bits by layer name: `edge_bits` for the layers that read and write the image, `bits` for all others."""
    return {layer.name: edge_bits if layer.role in ("first", "last") else bits for layer in layers}


def _role(name: str) -> Role:
    if is_edge(name):
        return "first" if name in ("conv_in", "pos_embed.proj") else "last"
    return "time" if is_time(name) else "inner"


def _block(unet: nn.Module, name: str) -> str:
    """The outermost residual block, attention or time embedding around a layer, or the layer."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        if path == "time_embedding" or isinstance(unet.get_submodule(path), _BLOCKS):
            return path
    return name


def _splits(unet: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """The layers behind a concatenation: what came up the decoder, then the skip."""
    deep = unet.config.block_out_channels[-1]
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            for layer in ("conv1", "conv_shortcut"):
                if getattr(resnet, layer) is not None:
                    yield f"up_blocks.{i}.resnets.{j}.{layer}", (deep, resnet.in_channels - deep)
            deep = resnet.out_channels
