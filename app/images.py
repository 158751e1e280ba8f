"""Check uploaded images by their outsides: nothing is decoded, no array of pixels is read.

Images are an .npz file (quantry/npz.py), or JPEG and PNG files with a labels file (quantry/labels.py), which are
kept together in a stored zip archive.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from app.contents import Contents, UploadRefused
from quantry.archives import ArchiveError, opened
from quantry.image_headers import MAX_PIXELS, jpeg_size, png_size, png_unread
from quantry.labels import IMAGE_SUFFIXES, LABEL_FILES, LabelsError, check_files, parse_labels
from quantry.npz import read_labels, read_layout

_SIGNATURES = {".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff", ".png": b"\x89PNG\r\n\x1a\n"}


def inspect_npz(file: Path, name: str) -> Contents:
    """How many images and classes an .npz file has. Raises UploadRefused."""
    classes: set[int] = set()
    try:
        parts = read_layout(file, name).values()
        for part in parts:
            if part.labels is not None:
                classes |= set(read_labels(file, name, part.labels))
    except ArchiveError as error:
        raise UploadRefused(str(error)) from error
    if min(classes, default=0) < 0:
        raise UploadRefused(f"{name} has the label {min(classes)}; labels are class numbers (0, 1, ...)")
    labelled = all(part.labels is not None for part in parts)
    return _contents(".npz", sum(part.count for part in parts), classes if labelled else None)


def inspect_files(file: Path, name: str) -> Contents:
    """The same for an archive of received files, each beginning as its name says. Raises UploadRefused."""
    try:
        with opened(file, name) as archive:
            names = archive.namelist()
            images = {file for file in names if file.lower().endswith(IMAGE_SUFFIXES)}
            for image in sorted(images):
                _check_header(archive, image)
            labels = _labels(archive, [file for file in LABEL_FILES if file in names], images)
    except (ArchiveError, LabelsError) as error:
        raise UploadRefused(str(error)) from error
    if not images:
        raise UploadRefused(f"{name} has no image: send .jpg, .jpeg or .png files in one multipart/form-data")
    return _contents(".zip", len(images), labels)


def _labels(archive: zipfile.ZipFile, found: list[str], images: set[str]) -> set[int] | None:
    if not found:
        return None
    if len(found) > 1:
        raise UploadRefused(f"{found[0]} and {found[1]} are both there: send one of them")
    labels = parse_labels(archive.read(found[0]), found[0])
    check_files(labels, images, found[0])
    return set(labels.values())


def _check_header(archive: zipfile.ZipFile, image: str) -> None:
    signature = _SIGNATURES[Path(image).suffix.lower()]
    with archive.open(image) as content:
        if content.read(len(signature)) != signature:
            raise UploadRefused(f"{image} is no {'PNG' if image.lower().endswith('.png') else 'JPEG'} file")
    with archive.open(image) as content:
        size = png_size(content) if image.lower().endswith(".png") else jpeg_size(content)
    if size is None or not all(size):
        raise UploadRefused(f"{image} has no header that says how large it is: it is damaged")
    if size[0] * size[1] > MAX_PIXELS:
        raise UploadRefused(f"{image} is {size[0]} x {size[1]} pixels; the limit is {MAX_PIXELS} in all")
    if image.lower().endswith(".png"):
        with archive.open(image) as content:
            unread = png_unread(content)
        if unread:
            raise UploadRefused(f"{image} is {unread}; save it as grey or RGB of 8 bits")


def _contents(suffix: str, images: int, classes: set[int] | None) -> Contents:
    return Contents(suffix, 0, 0, images, None if classes is None else len(classes))
