"""What the check of an upload finds, or why it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from app.shared.errors import ServiceError


class UploadRefused(ServiceError):
    """The bytes are no dataset that a job could read."""

    type = "upload-refused"
    title = "The upload is neither a usable text nor a usable set of images"


@dataclass(frozen=True)
class Contents:
    """Of a text its documents and characters, else 0. Of images their number and that of their classes, else None.

    suffix: of the blob; it tells a worker how to read it.
    """

    suffix: str
    documents: int
    characters: int
    images: int | None = None
    classes: int | None = None
