"""Artifacts, checkpoints and uploads in a folder.

jobs/<job id>/attempt-<epoch>.part/  what an attempt writes
jobs/<job id>/attempt-<epoch>/       published: complete, on disk, never changed again
jobs/<job id>/attempt-<epoch>.log    what the attempt's process printed
jobs/<job id>/checkpoints/           for the next attempt to resume from; removed on success
blobs/<2 hex>/<sha256><suffix>       uploads, by content
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.shared.errors import StartError

_ATTEMPT = re.compile(r"attempt-(\d+)(\.part)?")
_JOB = re.compile(r"job_[0-9a-f-]{36}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"(\.[a-z0-9]{1,10})?")


@dataclass(frozen=True)
class Storage:
    """The folder tree below `root`."""

    root: Path

    def prepare(self) -> None:
        """Make the folders. Raises StartError if they cannot be written."""
        try:
            for name in ("jobs", "blobs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StartError(f"the storage folder {self.root} cannot be written: {error.strerror}") from error

    def job(self, job_id: str) -> Path:
        """The folder of a job. Raises ValueError for what is no job id."""
        if not _JOB.fullmatch(job_id):
            raise ValueError(f"{job_id!r} is no job id")
        return self.root / "jobs" / job_id

    def checkpoints(self, job_id: str) -> Path:
        return self.job(job_id) / "checkpoints"

    def log(self, job_id: str, epoch: int) -> Path:
        return self.job(job_id) / f"attempt-{epoch}.log"

    def part(self, job_id: str, epoch: int) -> Path:
        """Where an attempt writes."""
        return self.job(job_id) / f"attempt-{epoch}.part"

    def open_part(self, job_id: str, epoch: int) -> Path:
        """An empty folder for an attempt's files, and one for its checkpoints beside it."""
        part = self.part(job_id, epoch)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self.checkpoints(job_id).mkdir(exist_ok=True)
        return part

    def publish(self, job_id: str, epoch: int) -> str:
        """Put the attempt's files on disk, then under their final name, which is returned (below the root).

        Raises OSError, such as ENOSPC, if the file system cannot hold them.
        """
        part = self.part(job_id, epoch)
        final = part.with_suffix("")
        for path in _tree(part):
            _sync(path)
        part.rename(final)
        _sync(final.parent)
        return str(final.relative_to(self.root))

    def artifact(self, name: str) -> Path:
        """The folder of a published artifact, from `Job.artifact`."""
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"{name!r} lies outside the storage")
        return path

    def discard(self, job_id: str, epoch: int) -> None:
        """Remove an attempt's files, whether published or not. Its log stays."""
        part = self.part(job_id, epoch)
        for folder in (part, part.with_suffix("")):
            shutil.rmtree(folder, ignore_errors=True)

    def drop_checkpoints(self, job_id: str) -> None:
        shutil.rmtree(self.checkpoints(job_id), ignore_errors=True)

    def attempts(self) -> Iterator[tuple[str, int, Path]]:
        """Job id, epoch and folder of every attempt that left files."""
        for folder in sorted((self.root / "jobs").glob("job_*/attempt-*")):
            name = _ATTEMPT.fullmatch(folder.name)
            if name is not None and _JOB.fullmatch(folder.parent.name):
                yield folder.parent.name, int(name[1]), folder

    def blob(self, sha256: str, suffix: str = "") -> Path:
        """The file of an upload. Raises ValueError for what is no digest or suffix."""
        if not _SHA256.fullmatch(sha256) or not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"{sha256 + suffix!r} is no blob")
        return self.root / "blobs" / sha256[:2] / f"{sha256}{suffix}"

    def incoming(self) -> Path:
        """A name of its own for a body that is being received; its folder is there."""
        folder = self.root / "blobs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"incoming-{uuid.uuid4().hex}"

    def drop_incoming(self, before: float) -> list[str]:
        """Remove bodies to which nothing was added since `before` (of time.time): their server was killed."""
        removed = []
        for path in self.root.glob("blobs/incoming-*"):
            with suppress(FileNotFoundError):  # received meanwhile
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed.append(f"blobs/{path.name}")
        return removed


def _tree(folder: Path) -> Iterator[Path]:
    """Every file and folder below, and the folder itself last."""
    for root, _, files in os.walk(folder, topdown=False):
        yield from (Path(root, name) for name in files)
        yield Path(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
