"""A UNet2DModel of a few thousand weights, lively enough that rounding it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

MakeUNet = Callable[..., Any]
SMALL = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 12),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture
def make_unet() -> MakeUNet:
    """`make_unet(**changes)`: a network of SMALL with random weights, in evaluation, without gradients."""

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        return UNet2DModel(**{**SMALL, **changes}).eval().requires_grad_(False)

    return make
