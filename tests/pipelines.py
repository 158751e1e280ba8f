"""Small diffusion pipelines with random weights, in the layout of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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


def write_ddpm(folder: Path, *, unet: dict[str, Any] | None = None, **scheduler: Any) -> Path:
    """A DDPMPipeline, likewise."""
    torch.manual_seed(0)
    settings = {"num_train_timesteps": 100, "clip_sample": False, **scheduler}
    DDPMPipeline(UNet2DModel(**{**UNET, **(unet or {})}), DDPMScheduler(**settings)).save_pretrained(folder)
    return folder


def write_consistency(folder: Path, **unet: Any) -> Path:
    """A ConsistencyModelPipeline."""
    torch.manual_seed(0)
    network = UNet2DModel(**{**UNET, **unet})
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(folder)
    return folder


def write_ldm(folder: Path, *, kl: bool = False, channels: int = 3) -> Path:
    """An LDMPipeline on latents of 3 channels; its VQ-VAE, or `kl` its VAE, is made for `channels`."""
    torch.manual_seed(0)
    network = UNet2DModel(**{**UNET, "in_channels": 3, "out_channels": 3})
    shape: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "norm_num_groups": 4,
    }
    vae = AutoencoderKL(**shape) if kl else VQModel(**shape, num_vq_embeddings=16)
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    LDMPipeline(vae, network, scheduler).save_pretrained(folder)
    return folder


def write_dit(folder: Path) -> Path:
    """A DiTPipeline that predicts a variance beside the noise."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for name, value in network.named_parameters():  # DiT starts its gates at zero, and would compute nothing
        if "bias" in name or "norm1.linear" in name:
            torch.nn.init.normal_(value, std=0.3)
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    DiTPipeline(network, tiny_vae(), scheduler).save_pretrained(folder)
    return folder


def write_stable_diffusion(folder: Path) -> Path:
    """A StableDiffusionPipeline without a safety checker."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 12),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=100, clip_sample=False, steps_offset=1, set_alpha_to_one=False
    )
    StableDiffusionPipeline(
        tiny_vae(),
        CLIPTextModel(text),
        tiny_tokenizer(folder),
        network,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_vae() -> AutoencoderKL:
    """From 8x8 pixels to 4x4 latents of 4 channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, and nothing longer."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    place = folder.parent / f"{folder.name}-tokenizer"
    place.mkdir(parents=True)
    (place / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(place, model_max_length=8)
