"""Results over HTTP: reports, layers, and files that arrive whole, in parts, or resumed."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import tarfile
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from app.api.content import CHUNK_BYTES
from app.shared import leases
from app.shared.settings import Settings
from quantry.jobs import Failed, JobError
from quantry.reports import Manifest, Report
from tests.app.api.factories import Jobs, make_report

CONTENT = bytes(range(256)) * 40
NAME = "model.safetensors"


@pytest.fixture
def job(made: Jobs) -> str:
    return made.succeeded({NAME: CONTENT, "sub/tokenizer.json": b"{}", "empty.txt": b""})


def test_the_report_is_the_file_of_the_artifact(client: TestClient, job: str) -> None:
    response = client.get(f"/v1/jobs/{job}/report")
    assert Report.model_validate_json(response.content) == make_report()
    known = {"If-None-Match": response.headers["ETag"]}
    assert client.get(f"/v1/jobs/{job}/report", headers=known).status_code == 304


def test_the_page_can_load_and_run_nothing(client: TestClient, job: str) -> None:
    response = client.get(f"/v1/jobs/{job}/report.html")
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    as_file = client.get(f"/v1/jobs/{job}/files/report.html")
    assert as_file.headers["Content-Security-Policy"] == policy


def test_layers_as_json_and_as_csv(client: TestClient, job: str) -> None:
    layers = client.get(f"/v1/jobs/{job}/layers").json()
    assert [layer["name"] for layer in layers] == ["a", 'b,"c']
    response = client.get(f"/v1/jobs/{job}/layers", headers={"Accept": "text/csv"})
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert [row["name"] for row in rows] == ["a", 'b,"c']
    assert rows[1]["warnings"] == "one; two"
    assert rows[0]["group_size"] == ""
    assert client.get(f"/v1/jobs/{job}/layers", headers={"Accept": "image/png"}).status_code == 406


def test_every_file_of_the_manifest_has_its_digest(client: TestClient, job: str) -> None:
    manifest = Manifest.model_validate_json(client.get(f"/v1/jobs/{job}/files").content)
    assert {NAME, "sub/tokenizer.json", "empty.txt", "report.json"} <= {
        entry.path for entry in manifest.files
    }
    for entry in manifest.files:
        response = client.get(f"/v1/jobs/{job}/files/{entry.path}")
        digest = hashlib.sha256(response.content)
        assert digest.hexdigest() == entry.sha256
        assert response.headers["ETag"] == f'"{entry.sha256}"'
        assert response.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        assert int(response.headers["Content-Length"]) == entry.bytes == len(response.content)
    own = client.get(f"/v1/jobs/{job}/files/manifest.json")
    assert Manifest.model_validate_json(own.content) == manifest


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=10000-", 10000, 10240), ("bytes=-7", 10233, 10240),
     ("bytes=5-99999", 5, 10240),
     ("bytes=0-4,3-9", 0, 10), ("bytes=10239-", 10239, 10240), ("bytes=-99999", 0, 10240)],
)  # fmt: skip
def test_a_range_is_that_part(client: TestClient, job: str, header: str, start: int, stop: int) -> None:
    response = client.get(f"/v1/jobs/{job}/files/{NAME}", headers={"Range": header})
    assert response.status_code == 206
    assert response.content == CONTENT[start:stop]
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(CONTENT)}"
    assert response.headers["ETag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'


def test_several_ranges_come_in_parts(client: TestClient, job: str) -> None:
    response = client.get(f"/v1/jobs/{job}/files/{NAME}", headers={"Range": "bytes=0-3, 100-102, -2"})
    assert response.status_code == 206
    assert "Content-Range" not in response.headers
    assert int(response.headers["Content-Length"]) == len(response.content)
    head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + response.content).get_payload()
    assert isinstance(parts, list)
    found = [(part["Content-Range"], part.get_payload(decode=True)) for part in parts]  # type: ignore[union-attr,index]
    assert found == [
        ("bytes 0-3/10240", CONTENT[:4]),
        ("bytes 100-102/10240", CONTENT[100:103]),
        ("bytes 10238-10239/10240", CONTENT[-2:]),
    ]


@pytest.mark.parametrize("header", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_beyond_the_end_is_416(client: TestClient, job: str, header: str) -> None:
    response = client.get(f"/v1/jobs/{job}/files/{NAME}", headers={"Range": header})
    assert response.status_code == 416
    assert response.json()["instance"] == response.request.url.path
    assert response.headers["Content-Range"] == "bytes */10240"
    assert response.json()["type"] == "/problems/range-not-satisfiable"
    empty = client.get(f"/v1/jobs/{job}/files/empty.txt", headers={"Range": "bytes=0-"})
    assert empty.headers["Content-Range"] == "bytes */0"


def test_if_range_resumes_the_same_file_only(client: TestClient, job: str) -> None:
    url = f"/v1/jobs/{job}/files/{NAME}"
    etag = client.get(url).headers["ETag"]
    same = client.get(url, headers={"Range": "bytes=10000-", "If-Range": etag})
    changed = client.get(url, headers={"Range": "bytes=10000-", "If-Range": '"0"'})
    weak = client.get(url, headers={"Range": "bytes=10000-", "If-Range": f"W/{etag}"})
    date = client.get(url, headers={"Range": "bytes=10000-", "If-Range": "Sat, 01 Jan 2028 00:00:00 GMT"})
    assert [r.status_code for r in (same, changed, weak, date)] == [206, 200, 200, 200]
    assert changed.content == CONTENT


def test_head_tells_the_same_without_the_bytes(client: TestClient, job: str) -> None:
    for path in (f"files/{NAME}", "checkpoint", "report", "files", ""):
        url = f"/v1/jobs/{job}/{path}".rstrip("/")
        got, head = client.get(url), client.head(url)
        assert (head.status_code, head.content) == (200, b"")
        differing = {"x-request-id", "date"}
        assert {k: v for k, v in head.headers.items() if k not in differing} == {
            k: v for k, v in got.headers.items() if k not in differing
        }
    ranged = client.head(f"/v1/jobs/{job}/files/{NAME}", headers={"Range": "bytes=0-3"})
    assert ranged.status_code == 200  # ranges are of GET alone
    assert (
        ranged.headers["Content-Length"]
        == client.get(f"/v1/jobs/{job}/files/{NAME}").headers["Content-Length"]
    )


@pytest.mark.parametrize(
    "path",
    ["nope", "../manifest.json", "..%2f..%2fquantry.db", "/etc/passwd", "sub", "sub/", "", "%00", "a%0Ab"],
)
def test_only_what_the_manifest_names_is_a_file(client: TestClient, job: str, path: str) -> None:
    response = client.get(f"/v1/jobs/{job}/files/{path}")
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/problem+json"


def test_the_checkpoint_is_a_tar_of_every_file(client: TestClient, job: str) -> None:
    response = client.get(f"/v1/jobs/{job}/checkpoint")
    assert response.headers["Content-Type"] == "application/x-tar"
    assert int(response.headers["Content-Length"]) == len(response.content)
    assert response.headers["Content-Disposition"] == f'attachment; filename="{job}.tar"'
    with tarfile.open(fileobj=io.BytesIO(response.content), mode="r:") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found[NAME] == CONTENT
    assert {"manifest.json", "report.json", "report.html", "empty.txt", "sub/tokenizer.json"} < set(found)
    assert client.get(f"/v1/jobs/{job}/checkpoint").content == response.content
    etag = response.headers["ETag"]
    rest = client.get(f"/v1/jobs/{job}/checkpoint", headers={"Range": "bytes=600-12000", "If-Range": etag})
    assert rest.content == response.content[600:12001]


@pytest.mark.parametrize("path", ["report", "report.html", "layers", "files", f"files/{NAME}", "checkpoint"])
def test_before_the_end_there_is_no_result(
    client: TestClient, made: Jobs, sqlite_sessions: Any, path: str
) -> None:
    claim = made.running()
    waiting = client.get(f"/v1/jobs/{claim.job_id}/{path}")
    assert (waiting.status_code, waiting.json()["type"]) == (409, "/problems/job-not-finished")
    with sqlite_sessions() as session:
        error = JobError(type="out-of-memory", title="t", detail="needs 9 GB")
        leases.finish(session, claim, Failed(error=error))
    failed = client.get(f"/v1/jobs/{claim.job_id}/{path}")
    assert (failed.status_code, failed.json()["type"]) == (409, "/problems/no-result")
    assert "needs 9 GB" in failed.json()["detail"]


def test_a_damaged_file_is_never_sent_as_whole(
    client: TestClient, job: str, settings: Settings, made: Jobs
) -> None:
    path: Path = made.storage.artifact(f"jobs/{job}/attempt-1") / NAME
    os.truncate(path, 100)
    for url in (f"files/{NAME}", "checkpoint"):
        response = client.get(f"/v1/jobs/{job}/{url}")
        assert (response.status_code, response.json()["type"]) == (500, "/problems/artifact-damaged")
    path.unlink()
    assert client.get(f"/v1/jobs/{job}/files/{NAME}").status_code == 500


def test_a_large_file_comes_in_chunks_over_a_real_connection(live: httpx2.Client, made: Jobs) -> None:
    content = os.urandom(3 * CHUNK_BYTES + 17)
    job = made.succeeded({NAME: content})
    digest = hashlib.sha256(content).hexdigest()
    with live.stream("GET", f"/v1/jobs/{job}/files/{NAME}") as response:
        received = b"".join(response.iter_raw())
    assert hashlib.sha256(received).hexdigest() == digest
    tail = live.get(f"/v1/jobs/{job}/files/{NAME}", headers={"Range": f"bytes={CHUNK_BYTES - 5}-"})
    assert tail.content == content[CHUNK_BYTES - 5 :]
    assert live.head(f"/v1/jobs/{job}/files/{NAME}").headers["Content-Length"] == str(len(content))
