"""The layers of a denoiser from its tensors: which are quantized, where in the network they run. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import check_float, size_of
from quantry.headers import TensorInfo

_TIME = re.compile(
    r"^time_embedding\.|\.time_emb_proj\.|^add_embedding\.|^class_embedding\.|norm1\.(emb|linear)\.|^proj_out_1\."
)
_TABLES = re.compile(
    r"(^|\.)(embedding_table|position_embedding|pos_embed)\.weight$|^class_embedding\.weight$"
)
MAX_LEVELS = 12  # each halves the latent, of 4096 pixels a side at most
EDGES = ("conv_in", "conv_out", "pos_embed.proj", "proj_out_2")


def quantized_layers(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The weights of convolutions and linear layers, by layer name. Raises SpecError for none, or for integers."""
    found = {}
    for name, info in tensors.items():
        if not name.endswith(".weight") or len(info.shape) not in (2, 4) or _TABLES.search(name):
            continue
        check_float(name, info)
        if info.numel == 0:
            raise SpecError("model", f"{name} is empty: its shape is {list(info.shape)}")
        found[name.removesuffix(".weight")] = info
    if not found:
        raise SpecError("model", "the denoiser holds no weight of a convolution or linear layer")
    return found


def is_edge(layer: str) -> bool:
    """Whether a layer reads or writes the latent."""
    return layer in EDGES


def is_time(layer: str) -> bool:
    """Whether a layer sees nothing but the timestep and, in a DiT, the label."""
    return _TIME.search(f"{layer}.") is not None


def latent_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of a latent. Raises SpecError for sizes that are missing or that the levels do not divide."""
    channels = size_of(config, "in_channels")
    size = config.get("sample_size")
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in sides) or not channels:
        raise SpecError(
            "model",
            f"the denoiser's config has sample_size {size!r} and in_channels {channels!r}: both are needed, sizes from "
            "1 to 4096",
        )
    widths = config.get("block_out_channels") or (0,)
    if not isinstance(widths, list | tuple) or len(widths) > MAX_LEVELS:
        raise SpecError(
            "model", f"unet/config.json: block_out_channels must be a list of at most {MAX_LEVELS} widths"
        )
    levels = len(widths) - 1
    levels = 0 if config.get("cross_attention_dim") else levels  # a UNet2DConditionModel fits what comes up
    wrong = next((side for side in sides if side % 2**levels), None)
    if wrong is not None:
        raise SpecError(
            "model",
            f"unet/config.json: sample_size {wrong} is not a multiple of {2**levels}, and the network halves it "
            f"{levels} times: what comes up would not fit what went down",
        )
    patch = size_of(config, "patch_size")
    if patch is not None and any(side % patch for side in sides):
        raise SpecError(
            "model", f"transformer/config.json: sample_size {size!r} is not a multiple of patch_size {patch}"
        )
    height, width = sides
    return channels, height, width


def positions(layer: str, config: Mapping[str, Any], shape: tuple[int, int, int]) -> int:
    """How many places of one latent a layer's weight is applied to."""
    if is_time(layer):
        return 1
    area = shape[1] * shape[2]
    patch = config.get("patch_size")
    if patch:
        return max(1, area // int(patch) ** 2)
    last = len(config.get("block_out_channels") or (0,)) - 1
    block = re.match(r"(down_blocks|up_blocks|mid_block)\.?(\d*)", layer)
    if block is None:
        return area
    level = last if block[1] == "mid_block" else int(block[2] or 0)
    level = last - level if block[1] == "up_blocks" else level
    return max(1, area >> (2 * max(0, level)))
