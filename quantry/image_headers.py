"""What a PNG or JPEG file says of its image before it begins: nothing is decoded."""

from __future__ import annotations

from typing import IO

MAX_PIXELS = 89_478_485  # of an image: what Pillow decodes without calling it a decompression bomb
_GREY, _ALPHA = 0, (4, 6)  # PNG's colour types
_SIZED = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's start-of-frame markers
_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length


def png_size(file: IO[bytes]) -> tuple[int, int] | None:
    """Width and height; None where the first chunk is no header. file: at its start."""
    head = file.read(24)
    if len(head) < 24 or head[12:16] != b"IHDR":
        return None
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def png_unread(file: IO[bytes]) -> str | None:
    """What keeps a PNG file from being used, `16 bits deep` or `transparent`; else None. file: at its start."""
    head = file.read(33)
    if len(head) < 33:
        return None
    bits, colours = head[24:26]
    if colours == _GREY and bits == 16:
        return "16 bits deep"
    if colours in _ALPHA:
        return "transparent"
    while len(chunk := file.read(8)) == 8 and chunk[4:] != b"IDAT":
        if chunk[4:] == b"tRNS":
            return "transparent"
        file.seek(int.from_bytes(chunk[:4]) + 4, 1)
    return None


def jpeg_size(file: IO[bytes]) -> tuple[int, int] | None:
    """Width and height of the first frame; None where none begins. file: at its start, read no further than that."""
    file.read(2)
    while True:
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            return None
        if marker[1] in _BARE:
            continue
        if marker[1] in _SIZED:
            frame = file.read(7)
            return (int.from_bytes(frame[5:7]), int.from_bytes(frame[3:5])) if len(frame) == 7 else None
        length = int.from_bytes(file.read(2))
        if length < 2 or len(file.read(length - 2)) < length - 2:
            return None
