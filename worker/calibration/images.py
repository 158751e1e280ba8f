"""Images to calibrate on and to evaluate with: read, split, chosen, turned into pixels.

A set of images is an .npz file (quantry/npz.py says of which arrays) or a folder of JPEG and PNG files with a
labels file (quantry/labels.py), which an upload keeps as a stored zip archive. Files are decoded when asked for.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor

from quantry.archives import ArchiveError
from quantry.bundled import bundled_images
from quantry.contract import DatasetRef
from quantry.labels import LabelsError, check_files, parse_labels
from quantry.npz import ImageArrays, Split, read_layout
from worker.calibration.image_files import archive_files, decode_image, folder_files
from worker.errors import DatasetError, ModelError
from worker.models.source import Role, dataset_path, reason_of, refusing, shown_name
from worker.workspace import Workspace

Array = np.ndarray[Any, Any]
MAX_SIDE = 4096  # pixels that a processor may make
TOLD = 64  # images after which progress is told again
Tell = Callable[[int, int], None]  # hears (done, total), of images
ORDER_SEED = 7  # of the one order that labelled runs are shuffled into


@dataclass(frozen=True)
class ImageSet:
    """Images, each uint8 (H, W) or (H, W, C), and their class numbers (N,) int64, None where there are none.

    read: image by its place in the source. chosen: the places that make the set, (N,) int64.
    """

    name: str
    read: Callable[[int], Array]
    chosen: Array
    labels: Array | None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Array:
        """One image. Raises DatasetError if its file cannot be decoded."""
        return self.read(int(self.chosen[index]))

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | Array) -> ImageSet:
        """These images of the set, in this order."""
        where = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[where]
        return ImageSet(self.name, self.read, self.chosen[where], labels)


def load_images(ref: DatasetRef, role: Role, workspace: Workspace) -> ImageSet:
    """Read what `ref` names. Raises DatasetError, with the field or file and the reason."""
    split: Split = ref.split or ("train" if role == "calibration" else "test")
    path = _path(ref, role, workspace)
    name = f"{shown_name(ref, path)} ({split})"
    try:
        found = _read(path, split, name)
    except (ArchiveError, LabelsError) as error:
        raise DatasetError(f"{role}: {error}") from error
    except OSError as error:
        raise DatasetError(f"{role}: {path.name} cannot be read: {error.strerror or error}") from error
    if not len(found):
        raise DatasetError(f"{role}: {name} holds no image; choose another split")
    return found


def _path(ref: DatasetRef, role: Role, workspace: Workspace) -> Path:
    if ref.source != "bundled":
        return dataset_path(ref, role, workspace)
    try:
        return bundled_images(ref.id)
    except KeyError as error:
        raise DatasetError(f"{role}.dataset.id: {error}") from error


def _read(path: Path, split: Split, name: str) -> ImageSet:
    kind = path.suffix.lower()
    if path.is_dir() or kind == ".zip":
        return _cut(_read_files(path, name), split)
    if kind == ".npz":
        return _read_npz(path, split, name)
    raise DatasetError(
        f"{path.name} is no set of images: give an .npz file, or a folder of JPEG and PNG files with labels.csv"
    )


def _read_npz(path: Path, split: Split, name: str) -> ImageSet:
    """`images` are split here; `x_calib` or `x_train` and `x_test` are a split of the file's own."""
    layout = read_layout(path, path.name)
    if "all" in layout:
        whole = layout["all"]
        found = _arrays(path, [whole], name) if whole.offsets is None else _joined_files(path, whole, name)
        return _cut(found, split)
    wanted: tuple[Split, ...] = ("train", "test") if split == "all" else (split,)
    parts = [layout[part] for part in wanted if part in layout]
    if not parts:
        raise DatasetError(f"{path.name} has no split {split!r}; it has {' and '.join(layout)}")
    return _arrays(path, parts, name)


def _arrays(path: Path, parts: Sequence[ImageArrays], name: str) -> ImageSet:
    if len({(part.images.shape[1:], part.labels is None) for part in parts}) > 1:
        raise DatasetError(f"{path.name}: train and test differ in the images' shape, or one has no labels")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = [arrays[part.images.name] for part in parts]
            labels = [arrays[part.labels.name].astype(np.int64) for part in parts if part.labels is not None]
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(f"{path.name} cannot be read: {error}") from error
    count = sum(len(part) for part in images)
    return _in_order(name, _one_after_another(images), count, np.concatenate(labels) if labels else None)


def _joined_files(path: Path, part: ImageArrays, name: str) -> ImageSet:
    """JPEG and PNG files in one array of bytes, decoded when they are asked for. Raises DatasetError."""
    assert part.offsets is not None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content, offsets = arrays[part.images.name], arrays[part.offsets.name].astype(np.int64)
            labels = None if part.labels is None else arrays[part.labels.name].astype(np.int64)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(f"{path.name} cannot be read: {error}") from error
    if offsets[0] < 0 or offsets[-1] > len(content) or bool((np.diff(offsets) <= 0).any()):
        raise DatasetError(
            f"{path.name}: `offset` does not rise from image to image within the {len(content)} bytes"
        )

    def read(index: int) -> Array:
        return decode_image(
            content[offsets[index] : offsets[index + 1]].tobytes(), f"{path.name}, image {index}"
        )

    return _in_order(name, read, part.count, labels)


def _one_after_another(parts: Sequence[Array]) -> Callable[[int], Array]:
    """Reads the images of several arrays by one number, without joining them: they may take most of the memory."""
    ends = np.cumsum([len(part) for part in parts])

    def read(index: int) -> Array:
        part = int(np.searchsorted(ends, index, side="right"))
        image: Array = parts[part][index - ends[part]]  # negative: counted from the part's end
        return image

    return read


def _read_files(path: Path, name: str) -> ImageSet:
    """In the order of the labels file, else by name."""
    source = folder_files(path, name) if path.is_dir() else archive_files(path, name)
    files, labels = sorted(source.images), None
    if source.labels is not None:
        labels = parse_labels(source.content(source.labels), source.labels)
        check_files(labels, set(files), source.labels)
        files = list(labels)
    values = None if labels is None else np.array(list(labels.values()), dtype=np.int64)
    return _in_order(name, lambda index: source.decode(files[index]), len(files), values)


def _in_order(name: str, read: Callable[[int], Array], count: int, labels: Array | None) -> ImageSet:
    """All images; where each class is one run, they are shuffled, always alike, so that any part has them all."""
    order = np.arange(count)
    if labels is not None and np.count_nonzero(np.diff(labels)) == len(np.unique(labels)) - 1:
        order = np.random.default_rng(ORDER_SEED).permutation(count)
    return ImageSet(name, read, order, None if labels is None else labels[order])


def _cut(images: ImageSet, split: Split) -> ImageSet:
    """`train`: the first nine tenths; `test`: the rest."""
    cut = len(images) * 9 // 10
    if split == "all":
        return images
    return images.take(range(cut) if split == "train" else range(cut, len(images)))


def calibration_images(images: ImageSet, *, samples: int, seed: int) -> ImageSet:
    """`samples` of the images, drawn without replacement, in the order of the set.

    Raises: DatasetError if there are too few.
    """
    if len(images) < samples:
        raise DatasetError(
            f"calibration.samples: {images.name} has {len(images)} images; {samples} were asked for: "
            "give more images or fewer samples"
        )
    return images.take(np.sort(np.random.default_rng(seed).permutation(len(images))[:samples]))


def check_labels(images: ImageSet, classes: int, role: Role) -> None:
    """Every image needs a class that the head knows. Raises DatasetError."""
    if images.labels is None:
        raise DatasetError(
            f"{role}: {images.name} has no labels; add an array `labels` to the .npz, or labels.csv to the folder"
        )
    wrong = (images.labels < 0) | (images.labels >= classes)
    if wrong.any():
        raise DatasetError(
            f"{role}: {images.name} has the label {images.labels[wrong][0]}, and the model's head knows classes "
            f"0 to {classes - 1}: they do not belong together"
        )


def overlap(calibration: ImageSet, evaluation: ImageSet, tell: Tell = lambda done, total: None) -> float:
    """The share of the evaluation's images that calibration has too, pixel for pixel.

    Every image is decoded; `tell` hears how many of both sets are done.
    """
    first, total = len(calibration), len(calibration) + len(evaluation)
    seen = {_digest(calibration[index]) for index in _told(first, tell, 0, total)}
    again = [_digest(evaluation[index]) in seen for index in _told(len(evaluation), tell, first, total)]
    return sum(again) / len(again)


def _told(count: int, tell: Tell, before: int, total: int) -> Iterator[int]:
    """0, 1, ... below `count`; `tell` hears of every TOLD that are done and of the last, after `before` others."""
    for index in range(count):
        yield index
        if (index + 1) % TOLD == 0 or index + 1 == count:
            tell(before + index + 1, total)


def _digest(image: Array) -> bytes:
    squeezed = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    return hashlib.sha256(f"{squeezed.shape}".encode() + squeezed.tobytes()).digest()


def pixels(images: ImageSet, folder: Path, channels: int, tell: Tell = lambda done, total: None) -> Tensor:
    """What the network takes, by the image processor of the checkpoint `folder`: (N, channels, H, W) float32.

    Grey images are repeated for a network of three channels. Images are decoded and processed one by one: no
    more than one of full size is held. `tell` hears how many are done.
    Raises: ModelError without a usable processor, DatasetError for an image that does not fit.
    """
    processor = _processor(folder)
    out: Tensor | None = None
    for index in _told(len(images), tell, 0, len(images)):
        made = _processed(processor, _channels(images, index, channels), images.name, folder)
        if out is None:
            out = torch.empty(len(images), *made.shape)
        if made.shape != out.shape[1:]:
            raise DatasetError(
                f"{images.name} has images of several sizes, and {folder.name}/preprocessor_config.json does not "
                "bring them to one"
            )
        out[index] = made
    if out is None:
        raise DatasetError(f"{images.name} holds no image")
    return out


def _processor(folder: Path) -> Any:
    file = "preprocessor_config.json"
    if not (folder / file).exists():
        raise ModelError(
            f"{folder.name} has no {file}: it says how images become pixels; add it to the folder"
        )
    with refusing(folder, file):
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    for key in ("size", "crop_size", "pad_size"):
        sides = getattr(processor, key, None)
        for side in dict(sides).values() if sides else ():
            if isinstance(side, int) and side > MAX_SIDE:
                raise ModelError(
                    f"{folder.name}/{file}: {key} has {side} pixels; the limit is {MAX_SIDE} a side"
                )
    return processor


def _channels(images: ImageSet, index: int, channels: int) -> Array:
    """One image as (H, W, channels)."""
    image = images[index]
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] != channels:
        raise DatasetError(
            f"{images.name}: image {index} has {image.shape[2]} channels, the model takes {channels}; "
            "give images of as many"
        )
    return image


def _processed(processor: Any, image: Array, name: str, folder: Path) -> Tensor:
    """One image (H, W, channels) by the image processor: (channels, H, W) float32. Raises ModelError."""
    shortest = (getattr(processor, "size", None) or {}).get("shortest_edge")
    height, width = image.shape[:2]
    if shortest and shortest * max(height, width) > MAX_SIDE * min(height, width):
        raise ModelError(
            f"{folder.name}/preprocessor_config.json makes more than {MAX_SIDE} pixels a side of {name} with "
            f"{height}x{width}: leave such long images out"
        )
    try:
        made = processor([image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder.name}/preprocessor_config.json cannot process {name}: {reason_of(error, folder)}"
        ) from error
    values: Tensor = made[0].float()
    return values
