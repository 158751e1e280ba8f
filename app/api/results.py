"""What a job made: its report, its layers, its attempts, its files, and all files as one tar."""

from __future__ import annotations

import csv
import hashlib
import io
import mimetypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import Header, Path, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import TypeAdapter

from app.api.content import ContentResponse, FilePart, Source, repr_digest, tar_source
from app.api.deps import JobId, Reader, Services, ServicesDep
from app.api.errors import ProblemError
from app.api.negotiation import choose
from app.api.router import Router, problems
from app.shared import jobs
from app.shared.errors import Conflict, JobNotFinished, NotFound
from quantry.jobs import FINISHED, AttemptPage
from quantry.reports import FileEntry, LayerReport, Manifest, Report

router = Router(prefix="/v1/jobs/{job_id}", tags=["results"])

MANIFEST = "manifest.json"
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_LAYERS = TypeAdapter(tuple[LayerReport, ...])
_NOT_READY = problems(_409="The job has no result, or none yet")


def _content(media_type: str) -> dict[int | str, dict[str, Any]]:
    """Documentation of a route that sends bytes, whole or in ranges."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        200: {"content": {media_type: binary}, "description": "The bytes"},
        206: {
            "content": {media_type: binary, "multipart/byteranges": binary},
            "description": "The ranges asked for",
        },
        304: {"description": "Not modified"},
        **problems(_409="The job has no result, or none yet", _416="The range lies beyond the end"),
    }


Range = Annotated[
    str | None, Header(alias="Range", description="`bytes=0-1023`, `bytes=1024-`, `bytes=-512`")
]
IfRange = Annotated[str | None, Header(alias="If-Range", description="an ETag: else the whole is sent")]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match")]


class NoResult(Conflict):
    """The job ended without an artifact."""

    type = "no-result"
    title = "The job has no result"


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest; both never change."""

    folder: FilePath
    manifest: Manifest
    entries: dict[str, FileEntry]


@router.get("/report", response_model=Report, responses={304: {"description": "Not modified"}, **_NOT_READY})
def read_report(
    caller: Reader, job_id: JobId, services: ServicesDep, if_none_match: IfNoneMatch = None
) -> Response:
    """`report.json`: quality against full precision and round-to-nearest, sizes, layers, cost."""
    return _file(_artifact(services, job_id, caller.owner), "report.json", "application/json")


@router.get(
    "/report.html",
    response_class=HTMLResponse,
    responses={200: {"content": {"text/html": {}}}, 304: {"description": "Not modified"}, **_NOT_READY},
)
def read_report_page(
    caller: Reader, job_id: JobId, services: ServicesDep, if_none_match: IfNoneMatch = None
) -> Response:
    """The report as one page that loads nothing else."""
    headers = {"Content-Security-Policy": _REPORT_POLICY}
    return _file(
        _artifact(services, job_id, caller.owner), "report.html", "text/html; charset=utf-8", headers
    )


@router.get(
    "/layers",
    response_model=tuple[LayerReport, ...],
    responses={
        200: {"content": {"text/csv": {"schema": {"type": "string"}}}, "description": "The layers"},
        **_NOT_READY,
        **problems(_406="Neither JSON nor CSV is accepted"),
    },
)
def read_layers(caller: Reader, job_id: JobId, request: Request, services: ServicesDep) -> Response:
    """The output error of each quantized layer, as JSON or as CSV."""
    kind = choose(request.headers.get("accept"), ("application/json", "text/csv"))
    artifact = _artifact(services, job_id, caller.owner)
    report = Report.model_validate_json((artifact.folder / "report.json").read_bytes())
    headers = {"Vary": "Accept", "Cache-Control": "private, no-cache"}
    if kind == "text/csv":
        return Response(_csv(report.layers), 200, headers, "text/csv; charset=utf-8")
    return Response(_LAYERS.dump_json(report.layers), 200, headers, kind)


@router.get("/attempts", response_model=AttemptPage)
def read_attempts(caller: Reader, job_id: JobId, services: ServicesDep) -> AttemptPage:
    """Each run of the job by a worker, and how it ended."""
    with services.sessions() as session:
        return AttemptPage(items=tuple(jobs.attempts(session, job_id, owner=caller.owner)))


@router.get("/files", response_model=Manifest, responses=_NOT_READY)
def list_files(caller: Reader, job_id: JobId, services: ServicesDep) -> Manifest:
    """`manifest.json`: every file with its size and SHA-256."""
    return _artifact(services, job_id, caller.owner).manifest


@router.get("/files/{path:path}", response_class=Response, responses=_content("*/*"))
def download_file(
    caller: Reader,
    job_id: JobId,
    path: Annotated[str, Path(description="as the manifest names it")],
    services: ServicesDep,
    range_: Range = None,
    if_range: IfRange = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """One file, whole or in ranges. `ETag` is its SHA-256, so a download can be resumed and checked."""
    media_type = mimetypes.guess_type(path)[0] or "application/octet-stream"
    headers = {"Content-Security-Policy": _REPORT_POLICY} if media_type == "text/html" else {}
    return _file(_artifact(services, job_id, caller.owner), path, media_type, headers)


@router.get("/checkpoint", response_class=Response, responses=_content("application/x-tar"))
def download_checkpoint(
    caller: Reader,
    job_id: JobId,
    services: ServicesDep,
    range_: Range = None,
    if_range: IfRange = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """All files as one tar, its length known ahead; the same bytes each time, so it can be resumed too."""
    artifact = _artifact(services, job_id, caller.owner)
    entries = sorted(
        [*artifact.manifest.files, _manifest_entry(artifact.folder)], key=lambda entry: entry.path
    )
    members = [(entry.path, _path(artifact, entry), entry.bytes) for entry in entries]
    digest = hashlib.sha256("".join(f"{entry.path}\0{entry.sha256}\n" for entry in entries).encode())
    headers = {"Content-Disposition": f'attachment; filename="{job_id}.tar"'}
    return ContentResponse(
        tar_source(members),
        etag=f'"tar-{digest.hexdigest()}"',
        media_type="application/x-tar",
        headers=headers,
    )


def _artifact(services: Services, job_id: str, owner: str) -> Artifact:
    """The job's artifact. Raises JobNotFound, JobNotFinished, NoResult."""
    with services.sessions() as session:
        job = jobs.get(session, job_id, owner=owner)
    if job.artifact is None and job.state not in FINISHED:
        raise JobNotFinished(f"job {job_id} is {job.state}: it has no result yet")
    if job.artifact is None:
        reason = f": {job.error['detail']}" if job.error else ""
        raise NoResult(f"job {job_id} is {job.state}{reason}")
    return _read_artifact(services.storage.artifact(job.artifact))


@lru_cache(maxsize=256)
def _read_artifact(folder: FilePath) -> Artifact:
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise _damaged(MANIFEST) from error
    return Artifact(folder, manifest, {entry.path: entry for entry in manifest.files})


def _file(
    artifact: Artifact, path: str, media_type: str, headers: dict[str, str] | None = None
) -> ContentResponse:
    """One file of the manifest, or the manifest itself. Raises NotFound."""
    entry = artifact.entries.get(path) or (_manifest_entry(artifact.folder) if path == MANIFEST else None)
    if entry is None:
        raise NotFound(f"the job has no file {path!r}; GET .../files lists them")
    source = Source((FilePart(_path(artifact, entry), entry.bytes),))
    digests = {"Repr-Digest": repr_digest(entry.sha256)}
    return ContentResponse(
        source, etag=f'"{entry.sha256}"', media_type=media_type, headers={**digests, **(headers or {})}
    )


def _path(artifact: Artifact, entry: FileEntry) -> FilePath:
    """Where the file lies, if it is as long as the manifest says. Raises ProblemError."""
    path = artifact.folder / entry.path
    try:
        if path.stat().st_size == entry.bytes:
            return path
    except OSError as error:
        raise _damaged(entry.path) from error
    raise _damaged(entry.path)


@lru_cache(maxsize=256)
def _manifest_entry(folder: FilePath) -> FileEntry:
    content = (folder / MANIFEST).read_bytes()
    return FileEntry(path=MANIFEST, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _damaged(path: str) -> ProblemError:
    detail = f"{path} on the server's disk is not what the manifest says; run the job again"
    return ProblemError(500, "artifact-damaged", detail)


def _csv(layers: tuple[LayerReport, ...]) -> str:
    """A row a layer; warnings are joined by semicolons, nothing stands for null."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(LayerReport.model_fields))
    writer.writeheader()
    for layer in layers:
        writer.writerow({**layer.model_dump(), "warnings": "; ".join(layer.warnings)})
    return text.getvalue()
