"""Pictures of samples, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[np.uint8]]
SIDE = 480  # pixels that a grid has about


def write_grid(images: Array, path: Path, *, columns: int) -> None:
    """A PNG of images (N, H, W, C) uint8 in rows of `columns`; small ones enlarged pixel by pixel, large reduced."""
    rows = -(-len(images) // columns)
    _, height, width, channels = images.shape
    sheet = np.zeros((rows * height, columns * width, channels), dtype=np.uint8)
    for place, image in enumerate(images):
        y, x = divmod(place, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet[..., :3])
    factor = max(1, SIDE // max(sheet.shape[:2]))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
