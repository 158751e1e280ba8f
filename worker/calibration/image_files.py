"""Sets of JPEG and PNG files, in a folder or in the archive that an upload of files is kept as."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantry.archives import opened
from quantry.labels import IMAGE_SUFFIXES, LABEL_FILES
from worker.errors import DatasetError

MAX_FILE_BYTES = 64 << 20
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


@dataclass(frozen=True)
class ImageFiles:
    """The names of the images and of the labels file, and how to get a file's bytes."""

    name: str
    images: tuple[str, ...]
    labels: str | None
    content: Callable[[str], bytes]

    def decode(self, file: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """An image as uint8, (H, W) if it is grey, else (H, W, 3).

        Palettes and CMYK become RGB; a turn noted in the metadata is not applied, as in the usual loaders.
        Raises: DatasetError, also for an image of more pixels than Pillow takes for an attack.
        """
        return decode_image(self.content(file), f"{self.name}, {file}")


def decode_image(content: bytes, where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A JPEG or PNG file as uint8, (H, W) or (H, W, 3); `where` it is, for messages. Raises DatasetError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                if image.mode not in _MODES or "transparency" in image.info:
                    raise DatasetError(
                        f"{where}: of mode {image.mode}, or transparent; save it as grey or RGB of 8 bits"
                    )
                wanted = _MODES[image.mode]
                return np.asarray(image if image.mode == wanted else image.convert(wanted))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{where} is not a readable JPEG or PNG file: {error}") from error


def folder_files(folder: Path, name: str) -> ImageFiles:
    """The files of a folder, none below it; `name` it, for messages. Raises DatasetError."""
    root = folder.resolve()

    def content(file: str) -> bytes:
        path = (folder / file).resolve()
        if not path.is_relative_to(root):
            raise DatasetError(f"{name}, {file} is a link out of the folder")
        _check_size(name, file, path.stat().st_size)
        return path.read_bytes()

    return _sorted_out(name, [path.name for path in folder.iterdir()], content)


def archive_files(path: Path, name: str) -> ImageFiles:
    """The files of an archive, which stays open for as long as they are in use; `name` it, for messages.

    Raises: ArchiveError, DatasetError.
    """
    with opened(path, name) as checked:
        for member in checked.infolist():
            _check_size(name, member.filename, member.file_size)
    archive = zipfile.ZipFile(path)

    def content(file: str) -> bytes:
        try:
            return archive.read(file)
        except (zipfile.BadZipFile, EOFError) as error:
            raise DatasetError(f"{name}, {file} cannot be read: {error}") from error

    return _sorted_out(name, archive.namelist(), content)


def _sorted_out(name: str, files: list[str], content: Callable[[str], bytes]) -> ImageFiles:
    images = tuple(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
    labels = [file for file in LABEL_FILES if file in files]
    if len(labels) > 1:
        raise DatasetError(f"{name} has {labels[0]} and {labels[1]}: leave one of them")
    if not images:
        raise DatasetError(f"{name} has no .jpg, .jpeg or .png file")
    return ImageFiles(name, images, labels[0] if labels else None, content)


def _check_size(name: str, file: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise DatasetError(f"{name}, {file}: {size} bytes; the limit is {MAX_FILE_BYTES}")
