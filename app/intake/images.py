"""The images that a request names: there, as many as are asked for, with labels that the model knows.

Looked at from outside, as far as the server has the files: nothing is decoded, no pixel is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.intake.datasets import Role, Sources, check_suffix, find, split_of
from app.intake.errors import DatasetNotFound, DatasetRefused
from quantry.archives import ArchiveError, opened
from quantry.bundled import NotBundledError, bundled_images
from quantry.contract import DatasetRef
from quantry.labels import (
    IMAGE_SUFFIXES,
    LABEL_FILES,
    MAX_LABEL_BYTES,
    LabelsError,
    check_files,
    parse_labels,
)
from quantry.npz import ImageArrays, Split, read_labels, read_layout
from quantry.training_planning import TrainingPlan
from quantry.vision_planning import VisionPlan

SUFFIXES = (".npz", ".zip")  # uploaded files are kept as a stored zip


@dataclass(frozen=True)
class Counts:
    """What the part of a set that is read holds.

    labels: the least and the largest, None where images have none. loaded_bytes: of the arrays that are read
    whole; 0 of files, which are decoded one by one. channels: None of files.
    """

    images: int
    labels: tuple[int, int] | None
    loaded_bytes: int
    channels: int | None = None


@dataclass(frozen=True)
class Images:
    """The reference with its revision pinned, what to call it, and its counts: None of a file on the hub."""

    ref: DatasetRef
    name: str
    counts: Counts | None


class _UnfitError(ValueError):
    """Files that make no set of images; the message says why."""


def read_images(ref: DatasetRef, role: Role, sources: Sources, *, labelled: bool | None = None) -> Images:
    """Look the set of images up where it is; its labels too if `labelled`, by default those of an evaluation.

    Raises DatasetNotFound, DatasetRefused, HubUnreachable.
    """
    labelled = role == "evaluation" if labelled is None else labelled
    split = split_of(ref, role)
    if ref.source == "bundled":
        try:
            return Images(
                ref, f"{ref.id} ({split})", _count(bundled_images(ref.id), ref.id, split, role, labelled)
            )
        except NotBundledError as error:
            raise DatasetNotFound(f"{role}.dataset.id", str(error)) from error
    found = find(ref, role, sources)
    if found.path is None or not found.path.is_dir():
        check_suffix(found, role, SUFFIXES, "a set of images")
    counts = None if found.path is None else _count(found.path, found.name, split, role, labelled)
    return Images(found.ref, f"{found.name} ({split})", counts)


def check_images(plan: VisionPlan, calibration: Images, evaluation: Images | None) -> None:
    """Refuse what a worker would: too few images, of other channels, labels beyond the head. Raises DatasetRefused."""
    samples, classes = plan.spec.calibration.samples, plan.classes
    _check_channels(plan.channels, calibration, evaluation)
    if calibration.counts is not None and calibration.counts.images < samples:
        raise DatasetRefused(
            "calibration.samples",
            f"{calibration.name} has {calibration.counts.images} images; {samples} were asked for: give more "
            "images or fewer samples",
        )
    if evaluation is not None:
        _check_labels(evaluation, classes, "evaluation")


def check_training_images(plan: TrainingPlan, training: Images, evaluation: Images | None) -> None:
    """Refuse what a worker would: too few images, of other channels, labels beyond the head. Raises DatasetRefused."""
    step, classes = plan.step, plan.classes
    _check_channels(plan.channels, training, evaluation)
    if training.counts is not None and step.samples is not None and training.counts.images < step.samples:
        raise DatasetRefused(
            "recipe.0.samples",
            f"{training.name} has {training.counts.images} images; {step.samples} were asked for: give more "
            "images or fewer samples",
        )
    _check_labels(training, classes, "calibration")
    if evaluation is not None:
        _check_labels(evaluation, classes, "evaluation")


def _check_channels(channels: int, calibration: Images, evaluation: Images | None) -> None:
    """That images have as many channels as the model; grey ones may be shown to a model of colour ones."""
    for role, images in (("calibration", calibration), ("evaluation", evaluation)):
        found = images.counts.channels if images is not None and images.counts is not None else None
        if images is not None and found not in (None, channels, 1 if channels == 3 else None):
            raise DatasetRefused(
                f"{role}.dataset.id",
                f"{images.name} has {found} channels, the model takes {channels}; give images of as many",
            )


def _check_labels(images: Images, classes: int, role: Role) -> None:
    """That every image has a class that the head knows, as far as the server has the files. Raises DatasetRefused."""
    if images.counts is None:
        return
    if images.counts.labels is None:
        raise DatasetRefused(
            f"{role}.dataset.id",
            f"{images.name} has no labels; add an array `labels` to the .npz, or labels.csv to the folder",
        )
    least, largest = images.counts.labels
    if least < 0 or largest >= classes:
        raise DatasetRefused(
            f"{role}.dataset.id",
            f"{images.name} has the label {least if least < 0 else largest}, and the model's head knows "
            f"classes 0 to {classes - 1}: they do not belong together",
        )


def _count(path: Path, name: str, split: Split, role: Role, labelled: bool) -> Counts:
    """Raises DatasetRefused for what a worker could not read, or a split without images."""
    where = f"{role}.dataset.id"
    try:
        if path.is_dir():
            counts = _count_folder(path, split)
        elif path.suffix == ".zip":
            counts = _count_archive(path, name, split)
        else:
            counts = _count_arrays(path, name, split, role, labelled)
    except (ArchiveError, LabelsError, _UnfitError) as error:
        raise DatasetRefused(where, str(error)) from error
    except OSError as error:
        raise DatasetRefused(where, f"{name} cannot be read: {error.strerror or error}") from error
    if counts.images == 0:
        raise DatasetRefused(
            f"{role}.dataset.split", f"{name} ({split}) holds no image; choose another split"
        )
    return counts


def _count_arrays(path: Path, name: str, split: Split, role: Role, labelled: bool) -> Counts:
    """Of an .npz, whose headers say how many there are."""
    layout = read_layout(path, name)
    if "all" in layout:
        parts, images = [layout["all"]], _share(layout["all"].count, split)
    else:
        wanted: Sequence[Split] = ("train", "test") if split == "all" else (split,)
        parts = [layout[part] for part in wanted if part in layout]
        images = sum(part.count for part in parts)
        if not parts:
            detail = f"{name} has no split {split!r}; it has {' and '.join(layout)}"
            raise DatasetRefused(f"{role}.dataset.split", detail)
    if len({(part.images.shape[1:], part.labels is None) for part in parts}) > 1:
        raise _UnfitError(f"{name}: train and test differ in the images' shape, or one has no labels")
    labels = _label_range(path, name, parts) if labelled else None
    shape = parts[0].images.shape
    channels = {4: shape[-1], 3: 1}.get(len(shape))
    return Counts(images, labels, sum(part.images.nbytes for part in parts), channels)


def _label_range(path: Path, name: str, parts: Sequence[ImageArrays]) -> tuple[int, int] | None:
    labels: list[int] = []
    for part in parts:
        if part.labels is None:
            return None
        found = read_labels(path, name, part.labels)
        labels += [min(found), max(found)]
    return min(labels), max(labels)


def _count_folder(path: Path, split: Split) -> Counts:
    """Of a folder of JPEG and PNG files; what lies below it is not looked at."""
    files, content = {file.name for file in path.iterdir()}, None
    labels = _labels_file(files, path.name)
    if labels is not None:
        if not (path / labels).resolve().is_relative_to(path.resolve()):
            raise _UnfitError(f"{path.name}, {labels} is a link out of the folder")
        with (path / labels).open("rb") as file:
            content = file.read(MAX_LABEL_BYTES + 1)
    return _count_files(files, labels, content, split, path.name)


def _count_archive(path: Path, name: str, split: Split) -> Counts:
    """Of the archive that uploaded files are kept as."""
    with opened(path, name) as archive:
        files, content = set(archive.namelist()), None
        labels = _labels_file(files, name)
        if labels is not None:
            with archive.open(labels) as file:
                content = file.read(MAX_LABEL_BYTES + 1)
    return _count_files(files, labels, content, split, name)


def _count_files(
    files: set[str], labels: str | None, content: bytes | None, split: Split, name: str
) -> Counts:
    """labels, content: the name of the labels file and what is in it."""
    images = {file for file in files if file.lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise _UnfitError(f"{name} has no .jpg, .jpeg or .png file")
    span = None
    if labels is not None and content is not None:
        values = parse_labels(content, labels)
        check_files(values, images, labels)
        span = min(values.values()), max(values.values())
    return Counts(_share(len(images), split), span, 0)


def _labels_file(files: set[str], name: str) -> str | None:
    found = [file for file in LABEL_FILES if file in files]
    if len(found) > 1:
        raise _UnfitError(f"{name} has {found[0]} and {found[1]}: leave one of them")
    return found[0] if found else None


def _share(count: int, split: Split) -> int:
    """Images of a split that a worker cuts: `train` is the first nine tenths, `test` the rest."""
    cut = count * 9 // 10
    return {"train": cut, "test": count - cut, "all": count}[split]
