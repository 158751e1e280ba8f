"""Take in the files of a multipart/form-data body (RFC 7578): each goes into one stored zip archive as it comes."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool

from app.contents import UploadRefused
from app.shared.storage import Storage
from quantry.archives import MAX_MEMBERS
from quantry.labels import IMAGE_SUFFIXES, LABEL_FILES, MAX_LABEL_BYTES

MEDIA_TYPE = "multipart/form-data"
MAX_IMAGE_BYTES = 64 << 20  # of one file
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,255}")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same files are the same archive whenever they come


async def receive_files(
    chunks: AsyncIterator[bytes], content_type: str, storage: Storage
) -> tuple[Path, str, int]:
    """Write a body's files to an archive of its own. Returns the archive, its SHA-256 and its size.

    The file is the caller's to move or remove; nothing is left when the body breaks off or is refused.
    Raises UploadRefused.
    """
    path = storage.incoming()
    try:
        with zipfile.ZipFile(path, "x") as archive:
            files = _Files(archive)
            try:
                parser = _parser(content_type, files)
                async for chunk in chunks:
                    await run_in_threadpool(parser.write, chunk)
            except FormParserError as error:
                raise UploadRefused(f"the body is not {MEDIA_TYPE}: {error}") from error
            finally:
                files.close()
        if not files.complete:
            raise UploadRefused(f"the body is not {MEDIA_TYPE}: it ends before its last boundary")
        return path, await run_in_threadpool(_digest, path), path.stat().st_size
    except BaseException:  # a client that went away is a cancellation
        path.unlink(missing_ok=True)
        raise


class _Files:
    """What the parser tells, part by part; the member that is being written."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.complete = False
        self._archive = archive
        self._member: IO[bytes] | None = None
        self._file = ""
        self._size = 0
        self._seen: set[str] = set()
        self._field = self._value = b""
        self._disposition = b""

    def on_part_begin(self) -> None:
        self._field = self._value = self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def on_headers_finished(self) -> None:
        self._file = _file_name(self._disposition)
        if self._file in self._seen:
            raise UploadRefused(f"two files are named {self._file}")
        if len(self._seen) == MAX_MEMBERS:
            raise UploadRefused(f"more than {MAX_MEMBERS} files")
        self._seen.add(self._file)
        self._size = 0
        self._member = self._archive.open(zipfile.ZipInfo(self._file, _LONG_AGO), "w")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._member is not None
        self._size += end - start
        limit = MAX_LABEL_BYTES if self._file in LABEL_FILES else MAX_IMAGE_BYTES
        if self._size > limit:
            raise UploadRefused(f"{self._file} is larger than {limit} bytes")
        self._member.write(data[start:end])

    def on_part_end(self) -> None:
        self.close()

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None


def _parser(content_type: str, files: _Files) -> MultipartParser:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise UploadRefused(f"Content-Type: {MEDIA_TYPE} names no boundary")
    return MultipartParser(
        boundary,
        {
            "on_part_begin": files.on_part_begin,
            "on_header_field": files.on_header_field,
            "on_header_value": files.on_header_value,
            "on_header_end": files.on_header_end,
            "on_headers_finished": files.on_headers_finished,
            "on_part_data": files.on_part_data,
            "on_part_end": files.on_part_end,
            "on_end": files.on_end,
        },
    )


def _file_name(disposition: bytes) -> str:
    """The name that a part gives its file. Raises UploadRefused for what is not to be kept."""
    raw = parse_options_header(disposition.decode("latin-1"))[1].get(b"filename")
    if raw is None:
        raise UploadRefused("a part of the body is no file: send images and a labels file, nothing else")
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise UploadRefused(f"a file's name is not UTF-8: {raw[:80]!r}") from error
    if not _NAME.fullmatch(name):
        raise UploadRefused(f"{name[:80]!r} is no file name: leave out the folder")
    if name not in LABEL_FILES and not name.lower().endswith(IMAGE_SUFFIXES):
        raise UploadRefused(
            f"{name} is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a labels file ({', '.join(LABEL_FILES)})"
        )
    return name


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        os.fsync(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest()
