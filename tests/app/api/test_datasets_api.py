"""Uploads: streamed, checked by their bytes, kept once, gone when deleted."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.shared.settings import Settings
from app.uploads import UploadRefused, inspect
from quantry.contract import DatasetRead
from tests.app.api.factories import REQUEST

TEXT = "Once upon a time \u2014 there was a test.\n" * 50


def upload(client: Any, content: bytes, name: str = "story.txt") -> httpx2.Response:
    headers = {"Content-Type": "application/octet-stream"}
    response: httpx2.Response = client.post(
        "/v1/datasets", params={"name": name}, content=content, headers=headers
    )
    return response


def blobs(settings: Settings) -> list[Path]:
    return [path for path in (settings.storage / "blobs").rglob("*") if path.is_file()]


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def test_a_text_is_kept_with_its_digest(client: TestClient, settings: Settings) -> None:
    response = upload(client, TEXT.encode())
    assert response.status_code == 201
    dataset = DatasetRead.model_validate_json(response.content)
    assert response.headers["Location"] == f"/v1/datasets/{dataset.id}"
    assert dataset.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (dataset.bytes, dataset.characters, dataset.documents) == (len(TEXT.encode()), len(TEXT), 1)
    (blob,) = blobs(settings)
    assert blob.read_bytes() == TEXT.encode()
    assert blob.name == f"{dataset.sha256}.txt"
    assert client.get(f"/v1/datasets/{dataset.id}").json() == response.json()
    assert client.get("/v1/datasets").json()["items"] == [response.json()]


@pytest.mark.parametrize(
    ("name", "content", "suffix", "documents", "characters"),
    [
        ("a.txt", b'{"text": "x"}\n', ".txt", 1, 14),
        ("a.jsonl", b'{"text": "ab"}\n\n{"text": "c", "n": 1}', ".jsonl", 2, 3),
        ("a.NDJSON", b'{"text": "ab"}', ".jsonl", 1, 2),
        ("a.parquet", parquet(text=["ab", None, "c\u00e9"], n=[1, 2, 3]), ".parquet", 3, 4),
        ("noending", b"plain", ".txt", 1, 5),
        ("noending", b'{"text": "ab"}\n', ".jsonl", 1, 2),
        ("noending", parquet(text=["abc"]), ".parquet", 1, 3),
        ("odd.md", b"# title", ".txt", 1, 7),
    ],
)
def test_the_kind_is_told_by_content_and_name(
    client: TestClient,
    settings: Settings,
    name: str,
    content: bytes,
    suffix: str,
    documents: int,
    characters: int,
) -> None:
    found = upload(client, content, name).json()
    assert (found["documents"], found["characters"]) == (documents, characters)
    assert [blob.suffix for blob in blobs(settings)] == [suffix]


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t ", "is empty"),
        ("a.txt", "é".encode("latin-1"), "byte 0 does not fit"),
        ("a.txt", b"x" * 2_000_000 + b"\xc3", "byte 2000000 does not fit"),
        ("a.txt", b"x" * ((1 << 20) - 1) + "é".encode()[:1] + b"x", "byte 1048575 does not fit"),
        ("a.txt", b"a\x00b", "zero byte"),
        ("a.txt", parquet(text=["x"]), "is a Parquet file"),
        ("a.parquet", b"text", "is not a Parquet file"),
        ("a.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("a.parquet", parquet(text=["x" * 100] * 100)[:-50], "not a readable Parquet file"),
        ("a.parquet", parquet(n=[1]), "no column of strings; it has n"),
        ("a.parquet", parquet(text=["", None]), "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not JSON in UTF-8"),
        ("a.jsonl", b"[1]", "line 1: not an object with a field that is a string"),
        ("a.jsonl", b'{"n": 1}', "line 1: not an object with a field that is a string"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b"\n\n", "is empty"),
    ],
)
def test_what_is_no_text_is_refused_and_leaves_nothing(
    client: TestClient, settings: Settings, name: str, content: bytes, detail: str
) -> None:
    response = upload(client, content, name)
    assert (response.status_code, response.json()["type"]) == (422, "/problems/upload-refused")
    assert detail in response.json()["detail"]
    assert blobs(settings) == []
    assert client.get("/v1/datasets").json()["items"] == []


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.jsonl", "a.parquet", "a"]))
def test_any_bytes_are_counted_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    file = tmp_path / "upload"
    file.write_bytes(content)
    try:
        found = inspect(file, name)
    except UploadRefused:
        return
    assert found.documents >= 1
    if found.suffix == ".txt":
        assert found.characters == len(content.decode())


@pytest.mark.parametrize("name", ["", "a/b.txt", "..\\x", "a\nb", "x" * 256, "\x00"])
def test_a_bad_name_is_refused(client: TestClient, name: str) -> None:
    assert upload(client, b"x", name).status_code == 422


def test_a_name_is_needed(client: TestClient) -> None:
    assert client.post("/v1/datasets", content=b"x").json()["errors"][0]["path"] == "name"


def test_the_size_is_bounded_and_nothing_stays(live: httpx2.Client, settings: Settings) -> None:
    limit = settings.max_upload_bytes
    assert upload(live, b"x" * limit).status_code == 201
    before = blobs(settings)
    declared = upload(live, b"y" * (limit + 1))
    chunks = (b"y" * 65536 for _ in range(limit // 65536 + 1))
    streamed = live.post("/v1/datasets", params={"name": "a.txt"}, content=chunks)
    for response in (declared, streamed):
        assert (response.status_code, response.json()["type"]) == (413, "/problems/content-too-large")
    assert blobs(settings) == before


def test_an_upload_that_breaks_off_leaves_nothing(
    live: httpx2.Client, server: str, settings: Settings
) -> None:
    url = httpx2.URL(server)
    key = live.headers["Authorization"]
    incoming = settings.storage / "blobs"
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        head = (
            f"POST /v1/datasets?name=a.txt HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
            "Content-Length: 100000\r\n\r\n"
        )
        connection.sendall(head.encode() + b"x" * 1000)
        while not list(incoming.glob("incoming-*")):
            time.sleep(0.01)
    while list(incoming.glob("incoming-*")):
        time.sleep(0.01)
    assert live.get("/v1/datasets").json()["items"] == []


def test_the_same_bytes_are_kept_once(client: TestClient, other: TestClient, settings: Settings) -> None:
    first = upload(client, TEXT.encode())
    again = upload(client, TEXT.encode())
    renamed = upload(client, TEXT.encode(), "other.txt")
    theirs = upload(other, TEXT.encode())
    assert [r.status_code for r in (first, again, renamed, theirs)] == [201, 200, 201, 201]
    assert again.json() == first.json()
    assert len({r.json()["id"] for r in (first, renamed, theirs)}) == 3
    assert len(blobs(settings)) == 1
    for client_, response in ((client, first), (client, renamed)):
        assert client_.delete(f"/v1/datasets/{response.json()['id']}").status_code == 204
    assert len(blobs(settings)) == 1  # bob still has it
    assert other.delete(f"/v1/datasets/{theirs.json()['id']}").status_code == 204
    assert blobs(settings) == []


def test_another_owners_text_does_not_exist(client: TestClient, other: TestClient) -> None:
    dataset = upload(client, TEXT.encode()).json()["id"]
    assert other.get("/v1/datasets").json()["items"] == []
    assert other.get(f"/v1/datasets/{dataset}").status_code == 404
    assert other.delete(f"/v1/datasets/{dataset}").status_code == 404
    request = {
        **REQUEST,
        "calibration": {**REQUEST["calibration"], "dataset": {"source": "upload", "id": dataset}},
    }
    assert other.post("/v1/jobs", json=request).json()["type"] == "/problems/dataset-not-found"
    assert client.post("/v1/jobs", json=request).status_code == 202


def test_a_text_that_a_job_needs_cannot_be_deleted(client: TestClient) -> None:
    dataset = upload(client, TEXT.encode()).json()["id"]
    reference = {"dataset": {"source": "upload", "id": dataset}, "sequence_length": 16}
    job = client.post("/v1/jobs", json={**REQUEST, "evaluation": reference}).json()["id"]
    refused = client.delete(f"/v1/datasets/{dataset}")
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/dataset-in-use")
    assert job in refused.json()["detail"]
    client.post(f"/v1/jobs/{job}/cancel")
    assert client.delete(f"/v1/datasets/{dataset}").status_code == 204
    assert client.delete(f"/v1/datasets/{dataset}").status_code == 404


def test_uploads_need_a_key_that_may_write(app: Any, keys: Any) -> None:
    reader = TestClient(app, headers=keys.make("alice", "read"))
    assert upload(reader, b"x").status_code == 403
    assert upload(TestClient(app), b"x").status_code == 401


def test_a_json_line_may_be_long(client: TestClient) -> None:
    content = json.dumps({"text": "x" * 3_000_000}).encode()
    assert upload(client, content, "a.jsonl").json()["characters"] == 3_000_000
