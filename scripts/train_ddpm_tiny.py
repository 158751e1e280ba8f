"""Train the bundled diffusion model `bundled/ddpm-tiny` on the train split of `bundled/digits`.

usage: python scripts/train_ddpm_tiny.py [--target FOLDER] [--steps 4000]

Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239: a UNet2DModel that predicts noise, linear
betas, 1000 timesteps. The 8x8 digits are enlarged to 16x16 and shifted a little at random. AdamW in float32 on
one thread; what is stored, in float16, is the exponential average of the weights. The number of steps is fixed, so
nothing is chosen by the test split. The scheduler does not clip samples: its steps stay linear, as calibration along
the trajectory needs them. `metrics.json` says what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss

from quantry.bundled import bundled_images, bundled_model
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import SeededNoise, sample
from worker.metrics.images import class_tokens, frechet_distance

TARGET = Path(__file__).parent.parent / "quantry" / "bundled" / "ddpm-tiny"
SIZE = 16  # pixels a side
BATCH = 32
LEARNING_RATE = 1.5e-3
WARMUP = 200  # steps
SHIFT = 1  # pixels


def split(name: str) -> Tensor:
    """The digits of one split as the network takes them: (N, 1, SIZE, SIZE) float32 in [-1, 1]."""
    with np.load(bundled_images("bundled/digits"), allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[f"x_{name}"]).float()[:, None] / 127.5 - 1
    return interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def new_model() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def shifted(images: Tensor, random: torch.Generator) -> Tensor:
    """All images of a batch moved by the same few pixels; what comes in is background."""
    x, y = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=random).tolist()
    moved = torch.full_like(images, -1.0)
    rows, columns = (slice(max(0, d), SIZE + min(0, d)) for d in (y, x))
    back = [slice(max(0, -d), SIZE + min(0, -d)) for d in (y, x)]
    moved[..., rows, columns] = images[..., back[0], back[1]]
    return moved


def train(model: UNet2DModel, images: Tensor, steps: int) -> tuple[UNet2DModel, float]:
    """The exponential average of the weights, and the average of the last losses."""
    average = new_model()
    average.load_state_dict(model.state_dict())
    scheduler = new_scheduler()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    random = torch.Generator().manual_seed(1)
    running = 1.0
    for step in range(steps):
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        clean = shifted(images[torch.randint(len(images), (BATCH,), generator=random)], random)
        noise = torch.randn(clean.shape, generator=random)
        times = torch.randint(1000, (BATCH,), generator=random)
        loss = mse_loss(model(scheduler.add_noise(clean, noise, times), times).sample, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        running += 0.01 * (loss.item() - running)
        if (step + 1) % 200 == 0:
            print(f"step {step + 1} of {steps}  loss {running:.4f}", flush=True)
    return average.eval(), running


def distances(model: UNet2DModel) -> dict[str, float]:
    """Frechet distances to the held-out digits in the space of vit-tiny's class token, by number of DDIM steps."""
    extractor = bundled_model("bundled/vit-tiny")
    held = class_tokens(split("test"), extractor)
    found = {"train split": frechet_distance(class_tokens(split("train"), extractor), held)}
    for count in (20, 50):
        steps = read_steps(new_scheduler(), count)
        noise = SeededNoise(tuple(range(500)), (1, SIZE, SIZE), torch.device("cpu"))
        samples = sample(StepNetwork(model.requires_grad_(False), steps), steps, noise, batch=100)
        found[f"DDIM {count} steps"] = frechet_distance(class_tokens(samples, extractor), held)
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--target", type=Path, default=TARGET)
    options.add_argument("--steps", type=int, default=4000)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    begin = time.process_time()
    model, loss = train(new_model().train(), split("train"), arguments.steps)
    minutes = (time.process_time() - begin) / 60
    DDIMPipeline(unet=model.half(), scheduler=new_scheduler()).save_pretrained(arguments.target)
    metrics = {
        "train_loss": round(loss, 4),
        "frechet_distance": distances(model.float()),
        "features": "bundled/vit-tiny, last class token; 500 samples against bundled/digits, split test",
        "parameters": model.num_parameters(),
        "train_images": len(split("train")),
        "steps": arguments.steps,
        "cpu_minutes": round(minutes, 1),
    }
    (arguments.target / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
