"""Small diffusion pipelines with random weights, in the layout of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 12),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def write_ddim(folder: Path, *, unet: dict[str, Any] | None = None, **scheduler: Any) -> Path:
    """A DDIMPipeline; scheduler: settings that differ from a DDIMScheduler without clipping."""
    torch.manual_seed(0)
    network = UNet2DModel(**{**UNET, **(unet or {})})
    settings = {"num_train_timesteps": 100, "clip_sample": False, **scheduler}
    DDIMPipeline(network, DDIMScheduler(**settings)).save_pretrained(folder)
    return folder


def write_ddpm(folder: Path, **scheduler: Any) -> Path:
    """A DDPMPipeline, likewise."""
    torch.manual_seed(0)
    settings = {"num_train_timesteps": 100, "clip_sample": False, **scheduler}
    DDPMPipeline(UNet2DModel(**UNET), DDPMScheduler(**settings)).save_pretrained(folder)
    return folder
