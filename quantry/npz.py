"""What an .npz file of images holds, by its zip directory and npy headers: no numpy, no pickle, no pixel read.

The arrays are `images` and `labels`, to be split by whoever reads them, or a split of the file's own: `x_calib`
(else `x_train`) and `x_test` with labels `y_...`. Images are uint8, (N, H, W) or (N, H, W, C) with C 1 or 3;
labels are integers (N,). Or JPEG and PNG files joined: `jpeg` uint8 (bytes,), `offset` integers (N + 1,), where image
i is jpeg[offset[i]:offset[i + 1]], and labels `y`, to be split likewise. The npy format is documented at https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import math
import sys
import zipfile
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from quantry.archives import ArchiveError, opened

MAX_HEADER_BYTES = 10_000  # numpy's own limit
MAX_PIXEL_BYTES = 4 << 30  # of one array: a small archive can declare any size
MAX_IMAGES = 2_000_000
MAX_SIDE = 16_384  # pixels
_MAGIC = b"\x93NUMPY"
_INTEGERS = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i1": "b", "i2": "h", "i4": "i", "i8": "q"}
_SPLITS: Mapping[Split, tuple[tuple[str, str], ...]] = {
    "all": (("images", "labels"), ("jpeg", "y")),
    "train": (("x_calib", "y_calib"), ("x_train", "y_train")),
    "test": (("x_test", "y_test"),),
}
Split = Literal["train", "test", "all"]


@dataclass(frozen=True)
class ArrayInfo:
    """One array: its name, its type as numpy writes it (`|u1`, `<i8`) and its shape."""

    name: str
    descr: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.descr[2:])


@dataclass(frozen=True)
class ImageArrays:
    """Images and the labels that belong to them, None where the file has none.

    offsets: where each image begins and ends, if `images` are the bytes of joined files; else None.
    """

    images: ArrayInfo
    labels: ArrayInfo | None
    offsets: ArrayInfo | None = None

    @property
    def count(self) -> int:
        return self.images.shape[0] if self.offsets is None else self.offsets.shape[0] - 1


def read_layout(file: Path, name: str) -> dict[Split, ImageArrays]:
    """The images of a file by split: `all` alone, or the file's own `train`, `test` or both.

    Raises ArchiveError, which calls the file `name`, for what is no such file or declares too much.
    """
    with opened(file, name) as archive:
        arrays = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        if len(arrays) != len(archive.infolist()) or any(m.filename in arrays for m in archive.infolist()):
            raise ArchiveError(f"{name}: every array is one member, and its name ends in .npy")
        found: dict[Split, ImageArrays] = {}
        for split, pairs in _SPLITS.items():
            pair = next((pair for pair in pairs if pair[0] in arrays), None)
            if pair is not None:
                headers = [_header(archive, arrays[key], name) for key in pair if key in arrays]
                labels = headers[1] if len(headers) > 1 else None
                if pair[0] != "jpeg":
                    found[split] = _checked(headers[0], labels, name)
                elif "offset" in arrays:
                    offsets = _header(archive, arrays["offset"], name)
                    found[split] = _checked_files(headers[0], labels, offsets, name)
                else:
                    raise ArchiveError(
                        f"{name} has `jpeg` without `offset`: where each image begins and ends"
                    )
    if not found:
        have = ", ".join(sorted(arrays)[:8]) or "none"
        raise ArchiveError(
            f"{name} has no array `images`, `x_calib`, `x_train`, `x_test` or `jpeg`; it has {have}"
        )
    if "all" in found and len(found) > 1:
        raise ArchiveError(f"{name} has `images` beside a split of its own: leave one of them out")
    return found


def read_labels(file: Path, name: str, info: ArrayInfo) -> array[int]:
    """The labels, or offsets, that `read_layout` found. Raises ArchiveError."""
    with opened(file, name) as archive, archive.open(_member(archive, info.name)) as content:
        _read_header(content, f"{name}, {info.name}")
        data = content.read(info.nbytes)
    if len(data) < info.nbytes:
        raise ArchiveError(f"{name}, {info.name}: {len(data)} bytes where the header describes {info.nbytes}")
    labels = array(_INTEGERS[info.descr[1:]], data)
    if info.descr[0] == (">" if sys.byteorder == "little" else "<"):
        labels.byteswap()
    return labels


def _member(archive: zipfile.ZipFile, key: str) -> zipfile.ZipInfo:
    return next(m for m in archive.infolist() if m.filename.removesuffix(".npy") == key)


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> ArrayInfo:
    """Type and shape of a member, whose declared size must be theirs."""
    key = member.filename.removesuffix(".npy")
    where = f"{name}, {key}"
    with archive.open(member) as content:
        length, fields = _read_header(content, where)
    try:
        values = ast.literal_eval(fields)
        descr, shape, fortran = values["descr"], values["shape"], values["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise ArchiveError(f"{where}: the npy header cannot be read") from error
    if not isinstance(descr, str) or descr[1:] not in _INTEGERS:
        raise ArchiveError(f"{where}: of type {descr!r}; images are uint8 and labels integers")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**48 for n in shape) or fortran:
        raise ArchiveError(f"{where}: not an array in C order; save numpy.ascontiguousarray(...) of it")
    info = ArrayInfo(key, descr, shape)
    if member.file_size != length + info.nbytes:
        raise ArchiveError(
            f"{where}: its header describes {info.nbytes} bytes, the archive declares {member.file_size - length}"
        )
    return info


def _read_header(content: IO[bytes], where: str) -> tuple[int, str]:
    """The length of everything before the data, and the header's text. Leaves `content` at the data."""
    start = content.read(8)
    if len(start) < 8 or not start.startswith(_MAGIC):
        raise ArchiveError(f"{where} is not a numpy array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(content.read(width), "little")
    if length > MAX_HEADER_BYTES:
        raise ArchiveError(f"{where}: a header of {length} bytes; numpy allows {MAX_HEADER_BYTES}")
    return 8 + width + length, content.read(length).decode("latin-1")


def _checked(images: ArrayInfo, labels: ArrayInfo | None, name: str) -> ImageArrays:
    shape, where = images.shape, f"{name}, {images.name}"
    if images.descr[1:] != "u1":
        raise ArchiveError(f"{where}: of type {images.descr}; images are uint8, 0 to 255")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        hint = "; put the channels last" if len(shape) == 4 and shape[1] in (1, 3) else ""
        raise ArchiveError(f"{where}: of shape {shape}, not (N, H, W) or (N, H, W, 1 or 3){hint}")
    if 0 in shape:
        raise ArchiveError(f"{where}: of shape {shape}, which holds no image")
    if images.nbytes > MAX_PIXEL_BYTES or shape[0] > MAX_IMAGES or max(shape[1:3]) > MAX_SIDE:
        raise ArchiveError(
            f"{where}: of shape {shape}; at most {MAX_IMAGES} images, {MAX_SIDE} pixels a side and "
            f"{MAX_PIXEL_BYTES} bytes in all"
        )
    if labels is not None and labels.shape != shape[:1]:
        raise ArchiveError(
            f"{name}, {labels.name}: of shape {labels.shape}; {shape[0]} images need ({shape[0]},)"
        )
    return ImageArrays(images, labels)


def _checked_files(files: ArrayInfo, labels: ArrayInfo | None, offsets: ArrayInfo, name: str) -> ImageArrays:
    """Joined files; what `offset` says is looked at when they are read."""
    if files.descr[1:] != "u1" or len(files.shape) != 1:
        raise ArchiveError(
            f"{name}, {files.name}: of type {files.descr} and shape {files.shape}; bytes are uint8 (n,)"
        )
    if len(offsets.shape) != 1 or not 2 <= offsets.shape[0] <= MAX_IMAGES + 1:
        raise ArchiveError(
            f"{name}, {offsets.name}: of shape {offsets.shape}, not (N + 1,) with 1 to {MAX_IMAGES} images"
        )
    if files.nbytes > MAX_PIXEL_BYTES:
        raise ArchiveError(f"{name}, {files.name}: {files.nbytes} bytes; the limit is {MAX_PIXEL_BYTES}")
    if labels is not None and labels.shape != (offsets.shape[0] - 1,):
        raise ArchiveError(
            f"{name}, {labels.name}: of shape {labels.shape}; {offsets.shape[0] - 1} images need "
            f"({offsets.shape[0] - 1},)"
        )
    return ImageArrays(files, labels, offsets)
