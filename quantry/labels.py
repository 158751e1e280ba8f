"""The labels file of a folder of images: labels.csv, labels.json or labels.txt. A label is a class number from 0.

csv: `file,label` a line, with or without that header. json: an object from file to label. txt: a file, white
space, its label a line. Files are named without a folder.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

LABEL_FILES = ("labels.csv", "labels.json", "labels.txt")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_LABEL_BYTES = 16 << 20


class LabelsError(ValueError):
    """A labels file that cannot be used; the message names it, the line and the fault."""


def parse_labels(content: bytes, name: str) -> dict[str, int]:
    """Image file -> class number, in the order of the labels file `name`. Raises LabelsError."""
    if len(content) > MAX_LABEL_BYTES:
        raise LabelsError(f"{name} has {len(content)} bytes; the limit is {MAX_LABEL_BYTES}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LabelsError(f"{name} is not UTF-8: byte {error.start} does not fit") from error
    labels: dict[str, int] = {}
    for place, file, label in _entries(text, name):
        if file in labels:
            raise LabelsError(f"{place}: {file!r} has a label already")
        labels[file] = _class_number(label, f"{place}, {file!r}")
    if not labels:
        raise LabelsError(f"{name} is empty")
    return labels


def check_files(labels: dict[str, int], files: set[str], name: str) -> None:
    """Each label must have its image and each image its label. Raises LabelsError."""
    missing = next((file for file in labels if file not in files), None)
    if missing is not None:
        raise LabelsError(f"{name} names {missing!r}, which is not there")
    unlabelled = sorted(files - labels.keys())
    if unlabelled:
        raise LabelsError(f"{name} has no label of {unlabelled[0]!r}")


def _entries(text: str, name: str) -> Iterator[tuple[str, str, Any]]:
    """Where an entry stands, its file and its label as written."""
    if name.endswith(".json"):
        yield from _json_entries(text, name)
        return
    lines = text.splitlines()
    rows = csv.reader(lines) if name.endswith(".csv") else (line.rsplit(None, 1) for line in lines)
    try:
        for number, row in enumerate(rows, 1):
            fields = [field.strip() for field in row]
            if not any(fields) or (number == 1 and [f.lower() for f in fields] == ["file", "label"]):
                continue
            if len(fields) != 2:
                raise LabelsError(f"{name}, line {number}: not a file and a label")
            yield f"{name}, line {number}", fields[0], fields[1]
    except csv.Error as error:
        raise LabelsError(f"{name} is not CSV: {error}") from error


def _json_entries(text: str, name: str) -> Iterator[tuple[str, str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise LabelsError(f"{name} is not JSON: {error}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise LabelsError(f"{name} is not a JSON object from file to label")
    for file, label in pairs:
        yield name, file, label


def _class_number(label: Any, where: str) -> int:
    text = label.strip() if isinstance(label, str) else str(label)
    if isinstance(label, bool | float) or not (text.isascii() and text.isdecimal()) or len(text) > 7:
        raise LabelsError(f"{where}: {text[:40]!r} is no class number (0, 1, ...)")
    return int(text)
