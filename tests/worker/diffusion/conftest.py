"""A UNet2DModel of a few thousand weights, lively enough that rounding it shows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from pipelines import UNET
from torch import Tensor

from worker.diffusion.accuquant import roll
from worker.diffusion.quantizers import StepNetwork, attach_quantizers
from worker.diffusion.ranges import fit_quantizers
from worker.diffusion.steps import Step, read_steps
from worker.diffusion.trajectory import SeededNoise, trajectory
from worker.diffusion.unet import image_shape, layers_of
from worker.diffusion.weights import quantize_weight, set_weights

MakeUNet = Callable[..., Any]
SMALL = {**UNET, "in_channels": 2, "out_channels": 2}


@pytest.fixture
def make_unet() -> MakeUNet:
    """`make_unet(**changes)`: a network of SMALL with random weights, in evaluation, without gradients."""

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        return UNet2DModel(**{**SMALL, **changes}).eval().requires_grad_(False)

    return make


def _cast(unet: Any, dtype: torch.dtype) -> Any:
    """`to` of diffusers warns, even of nothing."""
    return torch.nn.Module.to(unet, dtype)


@dataclass
class Pair:
    """A network in full precision and quantized, and full-precision latents at group boundaries."""

    full: StepNetwork
    quantized: StepNetwork
    steps: tuple[Step, ...]
    noise: SeededNoise
    bounds: Tensor

    def spoil(self, factor: float = 1.6) -> Pair:
        """Every learned step size too large: there is something to gain."""
        for quantizer in self.quantized.quantizers.values():
            if quantizer.learned:
                quantizer.log_scale.data += math.log(factor)
        return self

    def step_sizes(self) -> Tensor:
        return torch.cat([q.scale.flatten() for q in self.quantized.quantizers.values()])


@pytest.fixture
def make_pair(make_unet: MakeUNet) -> Callable[..., Pair]:
    """`make_pair(count=..., group=..., bits=..., samples=..., eta=..., shared=..., dtype=...)`; weights have 4 bits."""

    def make(
        *,
        count: int = 4,
        group: int = 2,
        bits: int = 4,
        samples: int = 6,
        eta: float = 0.0,
        shared: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Pair:
        unet = make_unet()
        steps = read_steps(DDIMScheduler(num_train_timesteps=100, clip_sample=False), count, eta=eta)
        full = StepNetwork(_cast(copy.deepcopy(unet), dtype), steps)
        noise = SeededNoise(tuple(range(samples)), image_shape(unet), torch.device("cpu"))
        layers = layers_of(unet)
        if bits < 32:
            weights = {
                m.name: quantize_weight(unet.get_submodule(m.name).weight, 4, split=m.split) for m in layers
            }
            set_weights(unet, weights)
        float_steps = StepNetwork(unet, steps)
        quantizers = fit_quantizers(
            float_steps,
            layers,
            lambda: trajectory(float_steps, steps, noise),
            bits={layer.name: bits for layer in layers},
            steps_per_row=count if shared else group,
            clip="none" if bits == 32 else "mse",
        )
        attach_quantizers(unet, quantizers)
        quantized = StepNetwork(_cast(unet, dtype), steps)
        latents = roll(full, steps, range(count), noise.start().to(dtype), noise)
        bounds = torch.stack([*latents[:-1:group], latents[-1]])
        return Pair(full, quantized, steps, noise, bounds)

    return make
