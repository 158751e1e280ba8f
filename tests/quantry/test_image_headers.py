"""Sizes from headers are what Pillow decodes; damaged headers have none."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantry.image_headers import MAX_PIXELS, jpeg_size, png_size, png_unread
from worker.calibration.image_files import decode_image
from worker.errors import DatasetError


def encoded(kind: str, width: int, height: int, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (513, 2)])
def test_the_size_is_that_of_the_decoded_image(size: tuple[int, int]) -> None:
    assert png_size(io.BytesIO(encoded("PNG", *size))) == size
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(60_000), "comment": b"x" * 500}):
        assert jpeg_size(io.BytesIO(encoded("JPEG", *size, **options))) == size


def test_a_header_that_is_cut_or_damaged_has_no_size() -> None:
    png, jpeg = encoded("PNG", 9, 5), encoded("JPEG", 9, 5)
    start = jpeg.index(b"\xff\xc0")
    assert png_size(io.BytesIO(png[:20])) is None
    assert png_size(io.BytesIO(png.replace(b"IHDR", b"IDAT"))) is None
    assert all(jpeg_size(io.BytesIO(jpeg[:end])) is None for end in range(start + 9))
    assert jpeg_size(io.BytesIO(jpeg[:2] + bytes(50))) is None


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16", "clear L", "clear P"])
def test_what_the_worker_does_not_decode_is_said(mode: str) -> None:
    file = io.BytesIO()
    options = {"transparency": 0} if mode.startswith("clear") else {}
    Image.new(mode.removeprefix("clear "), (40, 30)).save(file, "PNG", **options)
    said = png_unread(io.BytesIO(file.getvalue()))
    assert said == {"1": None, "L": None, "P": None, "RGB": None, "I;16": "16 bits deep"}.get(
        mode, "transparent"
    )
    if said is None:
        decode_image(file.getvalue(), "image")
    else:
        with pytest.raises(DatasetError, match="save it as grey or RGB"):
            decode_image(file.getvalue(), "image")
    assert all(png_unread(io.BytesIO(file.getvalue()[:end])) in (said, None) for end in range(60))


def test_the_limit_is_where_pillow_warns() -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
