"""Train the bundled image classifier `bundled/vit-tiny` on the train split of `bundled/digits`.

usage: python scripts/train_vit_tiny.py [--target FOLDER] [--epochs 150]

The architecture is ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) at half a million parameters: 8x8 digits
enlarged to 16x16 by the checkpoint's own image processor, patches of 4x4, a class token, 4 layers. Each batch
is moved, turned and scaled a little at random. Weights and AdamW in float32 on one thread, six minutes; the
number of epochs is fixed, so nothing is chosen by the test split. `metrics.json` says what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from quantry.bundled import bundled_images

TARGET = Path(__file__).parent.parent / "quantry" / "bundled" / "vit-tiny"
SIZE = 16  # pixels a side
BATCH = 64
LEARNING_RATE = 1.5e-3
WARMUP = 60  # steps
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


def split(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """One split as the network takes it: pixels (N, 1, SIZE, SIZE) float32 in [-1, 1], labels (N,) int64."""
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    with np.load(bundled_images("bundled/digits"), allow_pickle=False) as arrays:
        images, labels = arrays[f"x_{name}"], arrays[f"y_{name}"]
    pixels = processor(list(images[..., None]), return_tensors="pt", input_data_format="channels_last")
    return pixels["pixel_values"], torch.from_numpy(labels).long()


def new_model() -> ViTForImageClassification:
    names = {digit: str(digit) for digit in range(10)}
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        hidden_dropout_prob=0.1,
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )
    return ViTForImageClassification(config)


def moved(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Each image turned by up to 0.2 rad, scaled by up to 15 %, sheared and shifted a little; -1 outside."""
    amount = torch.rand(5, len(pixels), generator=random) * 2 - 1
    angle, scale, shear = 0.2 * amount[0], 1 + 0.15 * amount[1], 0.2 * amount[2]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, shear - sin, 0.15 * amount[3], sin, cos, 0.15 * amount[4]]
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return grid_sample(pixels + 1, grid, align_corners=False) - 1


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = (model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean().item()
    model.train()
    return hits


def train(model: ViTForImageClassification, pixels: Tensor, labels: Tensor, epochs: int) -> int:
    """Train in place; return the number of steps."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    random = torch.Generator().manual_seed(1)
    steps = epochs * (len(pixels) // BATCH)
    model.train()
    for step in range(steps):
        if step % (len(pixels) // BATCH) == 0:
            order = torch.randperm(len(pixels), generator=random)
        chosen = order[: len(pixels) // BATCH * BATCH].view(-1, BATCH)[step % (len(pixels) // BATCH)]
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(pixel_values=moved(pixels[chosen], random)).logits
        loss = cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 300 == 0:
            print(f"step {step + 1} of {steps}  loss {loss.item():.3f}", flush=True)
    return steps


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--target", type=Path, default=TARGET)
    options.add_argument("--epochs", type=int, default=150)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    arguments.target.mkdir(parents=True, exist_ok=True)
    (arguments.target / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    model = new_model()
    pixels, labels = split("train", arguments.target)
    begin = time.process_time()
    steps = train(model, pixels, labels, arguments.epochs)
    minutes = (time.process_time() - begin) / 60

    model.half().save_pretrained(arguments.target)
    model.float()  # the stored weights, computed with in float32
    test_pixels, test_labels = split("test", arguments.target)
    metrics = {
        "accuracy": round(accuracy(model, test_pixels, test_labels), 4),
        "dataset": "bundled/digits, split test",
        "images": len(test_labels),
        "train_accuracy": round(accuracy(model, pixels, labels), 4),
        "parameters": model.num_parameters(),
        "train_images": len(labels),
        "epochs": arguments.epochs,
        "steps": steps,
        "cpu_minutes": round(minutes, 1),
    }
    (arguments.target / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
