"""What Quantry ships so that it works offline: three small models, a text and a set of images. No torch needed.

docs/bundled.md says where they come from, under which licence, and how they are made again.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent

BUNDLED_MODELS: dict[str, Path] = {
    "bundled/opt-tiny": FOLDER / "opt-tiny",
    "bundled/vit-tiny": FOLDER / "vit-tiny",
    "bundled/ddpm-tiny": FOLDER / "ddpm-tiny",
}
"""Checkpoint folders in the layout of transformers or diffusers, by the name a job uses."""

BUNDLED_TEXTS: dict[str, dict[str, Path]] = {
    "bundled/pydoc": {"train": FOLDER / "pydoc" / "train.txt.xz", "test": FOLDER / "pydoc" / "test.txt.xz"},
}
"""The compressed parts of each text, by name and split; split `all` is the parts in this order."""

BUNDLED_IMAGES: dict[str, Path] = {"bundled/digits": FOLDER / "digits" / "digits.npz"}
"""Labelled images by name: x_train, y_train, x_test and y_test in one .npz."""


class NotBundledError(KeyError):
    """A name or split that Quantry does not ship; the message lists what there is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(name)
        self.name = name
        self.known = tuple(sorted(known))
        self.detail = f"there is no {kind} {name!r}; there is {', '.join(self.known)}"

    def __str__(self) -> str:
        return self.detail


def bundled_model(name: str) -> Path:
    """The folder of a bundled checkpoint, such as `bundled/opt-tiny`. Raises NotBundledError."""
    if name not in BUNDLED_MODELS:
        raise NotBundledError("bundled model", name, BUNDLED_MODELS)
    return BUNDLED_MODELS[name]


def bundled_text(name: str, split: str) -> str:
    """One split (`train`, `test` or `all`) of a bundled text such as `bundled/pydoc`.

    Documents are separated by a blank line. `test` shares no document and no paragraph with `train`.
    Raises NotBundledError.
    """
    if name not in BUNDLED_TEXTS:
        raise NotBundledError("bundled text", name, BUNDLED_TEXTS)
    parts = BUNDLED_TEXTS[name]
    if split != "all" and split not in parts:
        raise NotBundledError(f"split of {name}", split, (*parts, "all"))
    wanted = parts.values() if split == "all" else (parts[split],)
    return "\n".join(lzma.decompress(path.read_bytes()).decode() for path in wanted)


def bundled_images(name: str) -> Path:
    """The .npz of bundled images such as `bundled/digits`. Raises NotBundledError."""
    if name not in BUNDLED_IMAGES:
        raise NotBundledError("bundled set of images", name, BUNDLED_IMAGES)
    return BUNDLED_IMAGES[name]
