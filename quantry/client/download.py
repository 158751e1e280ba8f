"""Download an artifact: several files at a time, taken up where they broke off, checked by digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Self

import httpx2

from quantry.client.connection import Connection, backoff_s
from quantry.client.errors import ProblemError, QuantryError
from quantry.client.following import job_path
from quantry.reports import FileEntry, Manifest

MANIFEST = "manifest.json"
CHUNK = 1 << 20

OnBytes = Callable[[int, int], None]


class DownloadError(QuantryError):
    """A file could not be fetched, stored, or does not have the bytes that the manifest promises."""


@dataclass(frozen=True)
class _Source:
    """What to fetch: its path on the server, its length, its ETag."""

    path: str
    bytes: int
    etag: str


@dataclass
class _Meter:
    """Bytes done of all files together; called from several threads."""

    total: int
    report: OnBytes | None
    done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.report:
                self.report(self.done, self.total)


def download_files(
    connection: Connection, job: str, folder: Path, *, parallel: int = 4, on_bytes: OnBytes | None = None
) -> Manifest:
    """Fetch every file of the manifest into `folder`; `manifest.json` comes last: all are there.

    Files that are there already, with the right digest, are kept. A part keeps the digest of its file in its
    name (`model.safetensors.<digest>.part`), so it is only ever continued to that very file.
    Raises DownloadError, ConnectionFailed, ProblemError.
    """
    content, manifest = _manifest(connection, job)
    targets = [(entry, _target(folder, entry.path)) for entry in manifest.files]
    _check_space(folder, targets)
    meter = _Meter(sum(entry.bytes for entry in manifest.files), on_bytes)
    pool = ThreadPoolExecutor(max_workers=max(1, parallel), thread_name_prefix="download")
    try:
        tasks = [pool.submit(_fetch, connection, job, entry, target, meter) for entry, target in targets]
        for task in tasks:
            task.result()
    finally:  # also on Ctrl-C: the others end at their next piece and keep their parts
        meter.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    part = folder / f"{MANIFEST}.part"
    part.write_bytes(content)
    os.replace(part, folder / MANIFEST)
    return manifest


def download_checkpoint(
    connection: Connection, job: str, file: Path, *, on_bytes: OnBytes | None = None
) -> Manifest:
    """Fetch the artifact as one tar file and check each member's digest before the file gets its name.

    The tar is the same bytes each time, so an earlier part is continued; its ETag is in the part's name.
    """
    _, manifest = _manifest(connection, job)
    head = connection.request("HEAD", job_path(job, "checkpoint"), headers={"Accept": "*/*"})
    source = _Source(job_path(job, "checkpoint"), int(head.headers["Content-Length"]), head.headers["ETag"])
    file.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(source.etag.encode()).hexdigest()[:16]
    path = file.with_name(f"{file.name}.{mark}.part")
    with _Part(path, source, _Meter(source.bytes, on_bytes)) as part:
        _transfer(connection, part)
    _check_tar(path, manifest)
    os.replace(path, file)
    return manifest


def _manifest(connection: Connection, job: str) -> tuple[bytes, Manifest]:
    """`manifest.json` as it is on the server, byte for byte, and read."""
    content = connection.request("GET", job_path(job, "files", MANIFEST)).content
    return content, Manifest.model_validate_json(content)


def _target(folder: Path, path: str) -> Path:
    """Where a file of the manifest goes. Raises DownloadError for a path that leaves the folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in path or "\0" in path:
        raise DownloadError(
            f"the manifest names {path!r}, which is outside of the artifact; nothing was written"
        )
    target = folder.joinpath(*parts.parts)
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{target} leads out of {folder} through a link; use an empty folder")
    return target


def _part(target: Path, entry: FileEntry) -> Path:
    return target.with_name(f"{target.name}.{entry.sha256[:16]}.part")


def _check_space(folder: Path, targets: list[tuple[FileEntry, Path]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = 0
    for entry, target in targets:
        here = next((p.stat().st_size for p in (target, _part(target, entry)) if p.is_file()), 0)
        needed += max(0, entry.bytes - here)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder} has {free:,} bytes free and {needed:,} are needed; make room or name another folder"
        )


def _fetch(connection: Connection, job: str, entry: FileEntry, target: Path, meter: _Meter) -> None:
    """One file, until its bytes are right: a part that proves wrong is thrown away and fetched once more."""
    if target.is_file() and target.stat().st_size == entry.bytes and _sha256(target) == entry.sha256:
        meter.add(entry.bytes)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _part(target, entry)
    source = _Source(job_path(job, "files", entry.path), entry.bytes, f'"{entry.sha256}"')
    with _Part(path, source, meter) as part:
        resumed = part.have > 0
        _transfer(connection, part)
        if part.digest != entry.sha256 and resumed:
            part.clear()
            _transfer(connection, part)
        digest = part.digest
    if digest != entry.sha256:
        path.unlink()
        raise DownloadError(
            f"{entry.path}: the manifest promises sha256 {entry.sha256}, but {digest} came; "
            "the file was thrown away: download again, and tell the server's operator if it stays so"
        )
    os.replace(path, target)


class _Part:
    """A file on its way: its bytes on disk, and their running digest."""

    def __init__(self, path: Path, source: _Source, meter: _Meter) -> None:
        self.source, self.meter = source, meter
        self.have = 0
        self._sha256 = hashlib.sha256()
        self._file = path.open("a+b")
        if path.stat().st_size > source.bytes:
            self._file.truncate(0)
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._count(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()

    @property
    def complete(self) -> bool:
        return self.have == self.source.bytes

    def clear(self) -> None:
        self._file.truncate(0)
        self.meter.add(-self.have)
        self.have = 0
        self._sha256 = hashlib.sha256()

    def append(self, chunk: bytes) -> None:
        if self.meter.stop.is_set():
            raise DownloadError(f"{self.source.path}: stopped; what came so far is kept for the next time")
        if self.have + len(chunk) > self.source.bytes:
            raise DownloadError(
                f"{self.source.path}: more came than the {self.source.bytes:,} bytes promised"
            )
        self._file.write(chunk)
        self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        self.have += len(chunk)
        self.meter.add(len(chunk))


def _transfer(connection: Connection, part: _Part) -> None:
    """Append to the part until all bytes are there, over as many connections as it takes."""
    stalls = 0
    while not part.complete:
        before = part.have
        error: QuantryError | None = None
        try:
            _read_into(connection, part)
        except httpx2.TransportError as broken:
            error = connection.failed(broken)
        except ProblemError as problem:
            if problem.status < 500:
                raise
            error = problem
        stalls = 0 if part.have > before else stalls + 1
        if stalls > 2 * connection.retries:  # a server may restart meanwhile
            raise error or DownloadError(f"{part.source.path}: the server sent nothing; look into its log")
        if not part.complete:
            part.meter.stop.wait(backoff_s(stalls + 1))


def _read_into(connection: Connection, part: _Part) -> None:
    """One request for what is missing. Where the bytes have changed, If-Range makes all of them come."""
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    if part.have:
        headers |= {"Range": f"bytes={part.have}-", "If-Range": part.source.etag}
    with connection.stream(part.source.path, headers=headers) as body:
        if part.have and body.status_code != 206:
            part.clear()
        for chunk in body.iter_raw():  # as it comes: a cut loses nothing that arrived
            part.append(chunk)


def _check_tar(file: Path, manifest: Manifest) -> None:
    """Compare each member of a tar with the manifest. Raises DownloadError, and removes the file."""
    promised = {entry.path: entry.sha256 for entry in manifest.files}
    found: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    found[member.name] = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
    except tarfile.TarError as error:
        file.unlink()
        raise DownloadError(f"what came is not a whole tar archive ({error}); download again") from error
    wrong = [path for path, digest in promised.items() if found.get(path) != digest]
    if wrong:
        file.unlink()
        raise DownloadError(f"missing or with the wrong digest: {', '.join(wrong)}; download again")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
