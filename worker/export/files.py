"""Files of an artifact: whole and on the disk, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantry.reports import FileEntry
from worker.errors import DiskFull

# What a tokenizer, an image processor and the terms of use consist of; weights and configs are written by the formats.
COPIED = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[None]:
    """If anything goes wrong inside, nothing stays in `target`. Raises DiskFull where that was the disk."""
    try:
        yield
    except BaseException as error:
        clear(target)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise disk_full(target, error) from error
        raise


def disk_full(target: Path, error: OSError) -> DiskFull:
    """The error a user reads when `target` cannot take more."""
    free = shutil.disk_usage(target).free
    return DiskFull(
        f"no room for the checkpoint on the disk of {target} "
        f"({os.strerror(error.errno or errno.ENOSPC).lower()}; {free} bytes are free): nothing was kept; "
        "free some space or point the storage elsewhere, then retry"
    )


def clear(folder: Path) -> None:
    """Remove what is in `folder`, not the folder itself."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write and fsync."""
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, as fsync of a file does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, image processor, generation config and licence of the model; returns their names."""
    found = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(source).as_posix() for path in found)
    for name in names:
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        with (source / name).open("rb") as original, copy.open("wb") as out:
            shutil.copyfileobj(original, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
    return names


def file_entry(folder: Path, path: Path) -> FileEntry:
    """Size and sha256 of a file, by its path below `folder`."""
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=digest)
