"""Open a zip archive from a stranger: its directory bounded before it is read, no names twice, no odd methods."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MAX_DIRECTORY_BYTES = 16 << 20  # of the list of members
MAX_MEMBERS = 65_000  # more would need zip64
_END = b"PK\x05\x06"  # begins the end record of 22 bytes, which numpy and zipfile write without a comment
_END_BYTES = 22
_LOCATOR = b"PK\x06\x07"  # of a zip64 end record, 20 bytes just before
_LOCATOR_BYTES = 20


class ArchiveError(ValueError):
    """A file that is not the archive it should be; the message names the file and the fault."""


@contextmanager
def opened(file: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """The archive `file`, called `name` in messages. Faults met inside the block become ArchiveError too."""
    try:
        with file.open("rb") as content:
            _check_directory(content, name)
            with zipfile.ZipFile(content) as archive:
                _check_members(archive, name)
                yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArchiveError(f"{name} is not a readable zip archive: {error}") from error


def _check_directory(content: BinaryIO, name: str) -> None:
    """Look at the end record, so that no directory of a gigabyte is read into memory."""
    size = content.seek(0, os.SEEK_END)
    content.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES))
    tail = content.read()
    end = tail[-_END_BYTES:]
    if not end.startswith(_END):
        raise ArchiveError(f"{name} is not a zip archive, or it is cut short")
    members, directory = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    large = tail[:-_END_BYTES].startswith(_LOCATOR) or members > MAX_MEMBERS
    if large or directory > MAX_DIRECTORY_BYTES:
        raise ArchiveError(f"{name} is too large: at most {MAX_MEMBERS} members and 4 GiB")
    content.seek(0)


def _check_members(archive: zipfile.ZipFile, name: str) -> None:
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ArchiveError(f"{name} has two members of one name")
    for member in archive.infolist():
        if member.header_offset < 0:
            raise ArchiveError(f"{name}: the list of members points outside of the archive")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{name}: {member.filename} is encrypted or compressed by other than deflate")
