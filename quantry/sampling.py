"""How a diffusion pipeline samples: the part of a job that its calibrated parameters belong to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantry.base import Model


class Sampling(Model):
    """How a diffusion pipeline samples; what is calibrated holds for these settings and no others."""

    steps: int | None = Field(None, ge=1, le=1000, description="null: 20; of a consistency model 1")
    scheduler: Literal["ddim", "ddpm"] | None = Field(None, description="null: the checkpoint's own")
    eta: float = Field(0.0, ge=0, le=1, description="share of DDPM's noise that DDIM adds")
    clip_sample: Literal[False] | None = Field(
        None,
        description="false: without the clipping or thresholding that the checkpoint's scheduler asks for",
    )
    guidance_scale: float | None = Field(
        None,
        ge=1,
        le=50,
        description="of classifier-free guidance; null: the pipeline's usual one, 1: without",
    )
    group: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="consecutive steps that share grids; null: as accuquant's groups, else all",
    )
    timestep_sampler: Literal["uniform", "normal", "density"] = Field(
        "uniform",
        description="timesteps of the calibration latents: evenly; normal (PTQ4DM); by the density and diversity of "
        "features (EDA-DM)",
    )
