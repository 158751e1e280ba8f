"""Build the bundled images `bundled/digits` from scikit-learn's copy of the UCI handwritten digits.

usage: python scripts/build_digits.py [TARGET]        (TARGET: quantry/bundled/digits)

Needs scikit-learn, which Quantry itself does not. The 1797 images are 8x8 with 17 levels of grey; the levels
are spread over 0..255. They stay in scikit-learn's order, the first 1297 for train, the last 500 for test:
neighbours tend to be of one writer, and drawn images would put every writer into both parts. Written is
digits.npz with x_train, y_train, x_test and y_test.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-not-found]

TARGET = Path(__file__).parent.parent / "quantry" / "bundled" / "digits"
TRAIN = 1297  # images


def build() -> dict[str, np.ndarray]:
    """The four arrays: images uint8 (N, 8, 8), labels uint8 (N,)."""
    levels, labels = load_digits(return_X_y=True)
    images = np.rint(levels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    labels = labels.astype(np.uint8)
    known = {image.tobytes() for image in images[:TRAIN]}
    if any(image.tobytes() in known for image in images[TRAIN:]):
        raise SystemExit("an image of test is also in train: move the border")
    return {
        "x_train": images[:TRAIN],
        "y_train": labels[:TRAIN],
        "x_test": images[TRAIN:],
        "y_test": labels[TRAIN:],
    }


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.mkdir(parents=True, exist_ok=True)
    arrays = build()
    np.savez_compressed(target / "digits.npz", **arrays)
    for name, array in arrays.items():
        print(f"{name}: {array.shape} {array.dtype}, sha256 {hashlib.sha256(array.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
