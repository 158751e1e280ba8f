"""Sets of images for tests: arrays of a few pixels, and how they are written, named and looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantry.contract import DatasetRef
from worker.calibration.images import ImageSet
from worker.workspace import Workspace

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (40, 6, 5), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
MIXED = np.arange(40) % 4
GROUPED = np.repeat(np.arange(4), 10)


def local(name: str, **fields: object) -> DatasetRef:
    return DatasetRef.model_validate({"source": "local", "id": name, **fields})


def save(workspace: Workspace, name: str, **arrays: Any) -> None:
    np.savez(workspace.model_roots[0] / name, **arrays)


def stacked(images: ImageSet) -> np.ndarray:
    return np.stack(list(images))


def labels_of(images: ImageSet) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()
