"""The client: one method for each thing that the server can do."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from quantry.client import download as transfers
from quantry.client import following
from quantry.client.connection import Connection, resolve_key, resolve_url
from quantry.client.errors import InvalidRequest
from quantry.client.following import job_path
from quantry.contract import DatasetPage, DatasetRead, JobSpec, MethodInfo, MethodPage
from quantry.jobs import Attempt, AttemptPage, Event, JobPage, JobRead
from quantry.reports import Estimate, LayerReport, Manifest, Report
from quantry.requests import JobRequest

_LAYERS = TypeAdapter(tuple[LayerReport, ...])


class Client:
    """A Quantry server, over HTTP. May be used by several threads.

    Args:
        base_url: else QUANTRY_URL, else http://127.0.0.1:8000.
        api_key: else QUANTRY_API_KEY, else, for a server on this machine, the file QUANTRY_DATA/api-key.
        timeout: seconds to wait for a connection, and for the next bytes of an answer.
        retries: tries after the first, when the connection fails or the server is busy.
    Raises: every method raises a QuantryError: ProblemError when the server refuses, ConnectionFailed when
        it does not answer. A job may be given as its id or as the JobRead that another method returned.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 3,
    ) -> None:
        url = resolve_url(base_url)
        self._connection = Connection(url, resolve_key(api_key, url), timeout=timeout, retries=retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def url(self) -> str:
        return str(self._connection.url)

    def estimate(self, request: JobRequest | JobSpec | None = None, **fields: Any) -> Estimate:
        """A dry run: what would be quantized, sizes, memory, time. Takes what `submit` takes."""
        content = self._post("/v1/estimates", _body(request, fields))
        return Estimate.model_validate_json(content)

    def submit(
        self,
        request: JobRequest | JobSpec | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> JobRead:
        """Queue a job: from a JobRequest, from the spec of another job, or from the fields of a JobRequest.

        The idempotency key makes a submit that is sent twice one job; without one, a fresh key covers the
        tries of this call. Raises InvalidRequest before anything is sent if a field is wrong.
        """
        body = _body(request, fields)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return JobRead.model_validate_json(self._post("/v1/jobs", body, headers))

    def job(self, job: str | JobRead) -> JobRead:
        return JobRead.model_validate_json(self._get(job_path(_id(job))))

    def jobs(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, page_size: int = 100
    ) -> Iterator[JobRead]:
        """Every job of this key, newest first, page by page as they are needed."""
        params: dict[str, Any] = {"limit": page_size}
        if state:
            params["state"] = state
        if labels:
            params["label"] = [f"{name}={value}" for name, value in labels.items()]
        while True:
            page = JobPage.model_validate_json(self._get("/v1/jobs", params))
            yield from page.items
            if page.next is None:
                return
            params["cursor"] = page.next

    def cancel(self, job: str | JobRead) -> JobRead:
        """Ask for the end of a job; it is `cancelling` until its processes are gone."""
        return JobRead.model_validate_json(self._post(job_path(_id(job), "cancel")))

    def retry(self, job: str | JobRead) -> JobRead:
        """Queue a finished job that did not succeed once more; it goes on at its last finished block."""
        return JobRead.model_validate_json(self._post(job_path(_id(job), "retry")))

    def events(self, job: str | JobRead, *, follow: bool = False, after: int = 0) -> Iterator[Event]:
        """What happened to a job after event `after`; with `follow`, also what will, until it has finished.

        Following survives lost connections and restarts of the server; each event comes once, in order.
        """
        if not follow:
            yield from following.list_events(self._connection, _id(job), after)
            return
        for event in following.follow(self._connection, _id(job), after):
            if event is not None:
                yield event

    def watch(self, job: str | JobRead, timeout: float | None = None) -> Iterator[JobRead]:
        """The job now, and again whenever it changed; the finished one comes last. Raises WaitTimeout."""
        return following.watch(self._connection, _id(job), timeout)

    def wait(self, job: str | JobRead, timeout: float | None = None) -> JobRead:
        """The job once it has finished, however it ended: look at its `state`. Raises WaitTimeout."""
        *_, last = self.watch(job, timeout)
        return last

    def report(self, job: str | JobRead) -> Report:
        return Report.model_validate_json(self._get(job_path(_id(job), "report")))

    def report_html(self, job: str | JobRead) -> str:
        """The report as one page without external resources."""
        return self._get(job_path(_id(job), "report.html")).decode()

    def layers(self, job: str | JobRead) -> tuple[LayerReport, ...]:
        return _LAYERS.validate_json(self._get(job_path(_id(job), "layers")))

    def attempts(self, job: str | JobRead) -> tuple[Attempt, ...]:
        return AttemptPage.model_validate_json(self._get(job_path(_id(job), "attempts"))).items

    def files(self, job: str | JobRead) -> Manifest:
        return Manifest.model_validate_json(self._get(job_path(_id(job), "files")))

    def download(
        self,
        job: str | JobRead,
        folder: str | os.PathLike[str],
        *,
        parallel: int = 4,
        on_bytes: transfers.OnBytes | None = None,
    ) -> Manifest:
        """Fetch the artifact into a folder; call it again to go on after a break.

        on_bytes: called with (bytes done, bytes in all), from several threads, one at a time.
        Raises DownloadError for wrong digests, a full disk, or a manifest that leaves the folder.
        """
        return transfers.download_files(
            self._connection, _id(job), Path(folder), parallel=parallel, on_bytes=on_bytes
        )

    def download_checkpoint(
        self, job: str | JobRead, file: str | os.PathLike[str], *, on_bytes: transfers.OnBytes | None = None
    ) -> Manifest:
        """Fetch the artifact as one tar file, its members checked by digest. Starts over after a break."""
        return transfers.download_checkpoint(self._connection, _id(job), Path(file), on_bytes=on_bytes)

    def methods(self) -> tuple[MethodInfo, ...]:
        return MethodPage.model_validate_json(self._get("/v1/methods")).items

    def upload_dataset(self, file: str | os.PathLike[str], *, name: str | None = None) -> DatasetRead:
        """Upload a text (.txt, .jsonl, .parquet) to calibrate or evaluate with; the name tells its kind."""
        path = Path(file)
        response = self._connection.request(
            "POST",
            "/v1/datasets",
            params={"name": name or path.name},
            content=partial(_pieces, path),
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)},
        )
        return DatasetRead.model_validate_json(response.content)

    def datasets(self) -> tuple[DatasetRead, ...]:
        return DatasetPage.model_validate_json(self._get("/v1/datasets")).items

    def delete_dataset(self, dataset: str | DatasetRead) -> None:
        name = dataset if isinstance(dataset, str) else dataset.id
        self._connection.request("DELETE", f"/v1/datasets/{quote(name, safe='')}")

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> bytes:
        return self._connection.request("GET", path, params=params).content

    def _post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> bytes:
        return self._connection.request("POST", path, json=body, headers=headers).content


def _pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces of a mebibyte."""
    with path.open("rb") as content:
        while piece := content.read(1 << 20):
            yield piece


def _id(job: str | JobRead) -> str:
    return job if isinstance(job, str) else job.id


def _body(request: JobRequest | JobSpec | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a request: the fields that were named, each of them whole. Raises InvalidRequest."""
    if request is not None and fields:
        raise InvalidRequest([("", f"give a request or its fields, not both: {', '.join(fields)}")])
    try:
        made = JobRequest.model_validate(fields) if request is None else request
    except ValidationError as error:
        raise InvalidRequest.of(error) from error
    return made.model_dump(mode="json", include=set(made.model_fields_set))
