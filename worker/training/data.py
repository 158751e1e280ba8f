"""Batches of training images: drawn, shuffled and augmented from a seed and the number of the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from quantry.training import Augmentation
from worker.calibration.images import ImageSet, Tell, pixels

_CACHED_SHARE = 4  # of the free memory, one part in so many may hold processed images


@dataclass(frozen=True)
class TrainingImages:
    """Labelled images as the network takes them.

    cached: all of them, (N, C, H, W) float32, or None where they are too many: batches are then processed as they are
    needed, with the same values. labels: (N,) int64. black: (C,) what a black pixel becomes; it fills what a crop
    leaves.
    """

    source: ImageSet
    folder: Path
    channels: int
    cached: Tensor | None
    labels: Tensor
    black: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, places: Tensor) -> Tensor:
        """(n, C, H, W) float32."""
        if self.cached is not None:
            return self.cached[places]
        return pixels(self.source.take(places.numpy()), self.folder, self.channels)


def training_images(images: ImageSet, folder: Path, channels: int, tell: Tell) -> TrainingImages:
    """Process the images, all at once where memory allows. Raises ModelError, DatasetError."""
    first = np.zeros_like(images[0])
    dark = ImageSet(images.name, lambda index: first, np.zeros(1, dtype=np.int64), None)
    black = pixels(dark, folder, channels)[0]
    room = psutil.virtual_memory().available // _CACHED_SHARE
    fits = 4 * black.numel() * len(images) <= room
    cached = pixels(images, folder, channels, tell) if fits else None
    return TrainingImages(
        images, folder, channels, cached, torch.as_tensor(images.labels), black.flatten(1)[:, 0]
    )


def split_off(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The images less a share of them, at least one, and that share; both keep the order of the set."""
    order = np.random.default_rng(seed).permutation(len(images))
    held = max(1, round(share * len(images)))
    return images.take(np.sort(order[held:])), images.take(np.sort(order[:held]))


def seed_of(*parts: int) -> int:
    """One seed of several numbers, such as the job's, a layer's and an epoch's."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batches(
    images: TrainingImages, *, size: int, seed: int, epoch: int, augmentation: Augmentation
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches (pixels, labels), all of `size`: what is left over waits for another epoch."""
    chance = torch.Generator().manual_seed(seed_of(seed, epoch))
    order = torch.randperm(len(images), generator=chance)
    size = min(size, len(images))
    for start in range(0, len(images) - size + 1, size):
        places = order[start : start + size]
        yield augment(images.pixels(places), images.black, augmentation, chance), images.labels[places]


def batch_count(images: int, size: int) -> int:
    """Batches of an epoch."""
    return images // min(size, images)


def augment(x: Tensor, fill: Tensor, augmentation: Augmentation, chance: torch.Generator) -> Tensor:
    """Each image (of n, C, H, W) moved by up to an eighth of its side, mirrored or not.

    fill: (C,) what is moved in from outside.
    """
    if augmentation == "none":
        return x
    count, channels, height, width = x.shape
    border = max(1, max(height, width) // 8)
    padded = fill.view(1, -1, 1, 1).expand(count, -1, height + 2 * border, width + 2 * border).clone()
    padded[:, :, border : border + height, border : border + width] = x
    down, right = torch.randint(2 * border + 1, (2, count, 1), generator=chance)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if augmentation == "flip_crop":
        mirrored = torch.rand(count, 1, generator=chance) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image, channel = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[image, channel, rows.view(count, 1, -1, 1), columns.view(count, 1, 1, -1)]
