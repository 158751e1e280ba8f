"""Uploads of images: an .npz, or files without an archive; counted by their outsides, kept as one dataset."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from app.contents import UploadRefused
from app.images import inspect_files, inspect_npz
from app.shared.settings import Settings
from quantry.contract import DatasetRead

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 4, 4) + bytes(9)
JPEG = b"\xff\xd8\xff\xe0\0\x04ab\xff\xc0\0\x11\x08" + struct.pack(">HH", 4, 4) + bytes(10)
IMAGES = np.zeros((6, 4, 4), np.uint8)
CLASSES = np.array([0, 2, 2, 5, 0, 0])


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def upload(client: Any, content: bytes, name: str = "x.npz") -> httpx2.Response:
    headers = {"Content-Type": "application/octet-stream"}
    response: httpx2.Response = client.post(
        "/v1/datasets", params={"name": name}, content=content, headers=headers
    )
    return response


def send(client: Any, files: list[tuple[str, bytes]], name: str = "pets") -> httpx2.Response:
    parts = [("files", (file, content)) for file, content in files]
    response: httpx2.Response = client.post("/v1/datasets", params={"name": name}, files=parts)
    return response


def blobs(settings: Settings) -> list[Path]:
    return [path for path in (settings.storage / "blobs").rglob("*") if path.is_file()]


def refused(response: httpx2.Response, settings: Settings) -> str:
    """The detail of a refusal that left nothing behind."""
    assert (response.status_code, response.json()["type"]) == (422, "/problems/upload-refused")
    assert blobs(settings) == []
    return str(response.json()["detail"])


@pytest.mark.parametrize("kind", [np.uint8, np.int64, ">i4", "<u2"])
def test_an_npz_is_counted(client: TestClient, settings: Settings, kind: Any) -> None:
    content = npz(images=IMAGES, labels=CLASSES.astype(kind))
    response = upload(client, content)
    assert response.status_code == 201, response.text
    dataset = DatasetRead.model_validate_json(response.content)
    assert (dataset.images, dataset.classes) == (6, 3)
    assert (dataset.documents, dataset.characters, dataset.bytes) == (0, 0, len(content))
    (blob,) = blobs(settings)
    assert blob.name == f"{dataset.sha256}.npz"
    assert blob.read_bytes() == content
    assert client.get(f"/v1/datasets/{dataset.id}").json() == response.json()


@pytest.mark.parametrize("name", ["x.npz", "x.NPZ", "noending"])
def test_both_parts_of_a_split_count(client: TestClient, name: str) -> None:
    content = npz(x_train=IMAGES, y_train=CLASSES, x_test=IMAGES[:2], y_test=np.array([7, 7]))
    found = upload(client, content, name).json()
    assert (found["images"], found["classes"]) == (8, 4)


def test_labels_may_be_missing(client: TestClient) -> None:
    assert upload(client, npz(images=IMAGES)).json()["classes"] is None
    assert send(client, [("a.png", PNG)]).json()["classes"] is None


def test_a_text_has_no_images(client: TestClient) -> None:
    found = upload(client, b"text", "a.txt").json()
    assert (found["images"], found["classes"], found["documents"]) == (None, None, 1)


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("x.npz", b"text", "is not an .npz file"),
        ("x.txt", npz(images=IMAGES), "is an .npz file"),
        ("x.npz", npz(images=IMAGES)[:-40], "is not a zip archive, or it is cut short"),
        ("x.npz", npz(pictures=IMAGES), "has no array `images`"),
        ("x.npz", npz(images=IMAGES.astype(float)), "images are uint8"),
        ("x.npz", npz(images=IMAGES[0]), "not (N, H, W)"),
        ("x.npz", npz(images=IMAGES, labels=CLASSES[:5]), "6 images need (6,)"),
        ("x.npz", npz(images=IMAGES, labels=CLASSES - 1), "has the label -1"),
        ("x.npz", npz(images=IMAGES, labels=np.array([None] * 6)), "labels integers"),
    ],
)
def test_what_is_no_set_of_images_is_refused(
    client: TestClient, settings: Settings, name: str, content: bytes, detail: str
) -> None:
    assert detail in refused(upload(client, content, name), settings)


def test_declared_sizes_are_not_believed(client: TestClient, settings: Settings) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99, 99), }\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    assert "its header describes 980099990199 bytes" in refused(upload(client, file.getvalue()), settings)


def test_a_pickle_is_never_loaded(client: TestClient, settings: Settings) -> None:
    file = io.BytesIO()
    np.savez(file, images=np.array([{"a": 1}], dtype=object))
    assert "of type '|O'" in refused(upload(client, file.getvalue()), settings)


@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.integers(0, 2000),
    change=st.binary(min_size=1, max_size=6),
    check=st.sampled_from([inspect_npz, inspect_files]),
)
def test_damaged_archives_are_counted_or_refused(
    tmp_path: Path, place: int, change: bytes, check: Any
) -> None:
    content = npz(images=IMAGES, labels=CLASSES)
    place %= len(content)
    (tmp_path / "x").write_bytes(content[:place] + change + content[place + len(change) :])
    try:
        found = check(tmp_path / "x", "x.npz")
    except UploadRefused:
        return
    assert found.images >= 1


@pytest.mark.parametrize(
    ("file", "labels"),
    [
        ("labels.csv", "file,label\nb.jpg,1\na.png,0\nc.JPEG,1\n"),
        ("labels.txt", "b.jpg 1\na.png 0\nc.JPEG 1\n"),
        ("labels.json", json.dumps({"b.jpg": 1, "a.png": 0, "c.JPEG": 1})),
    ],
)
def test_files_become_one_dataset(client: TestClient, settings: Settings, file: str, labels: str) -> None:
    files = [("b.jpg", JPEG), (file, labels.encode()), ("a.png", PNG), ("c.JPEG", JPEG + b"--\r\n--boundary")]
    response = send(client, files)
    assert response.status_code == 201, response.text
    dataset = DatasetRead.model_validate_json(response.content)
    assert (dataset.images, dataset.classes, dataset.name) == (3, 2, "pets")
    (blob,) = blobs(settings)
    assert (blob.name, blob.stat().st_size) == (f"{dataset.sha256}.zip", dataset.bytes)
    with zipfile.ZipFile(blob) as archive:
        assert [(member.filename, archive.read(member)) for member in archive.infolist()] == [
            (name, content) for name, content in files
        ]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    again = send(client, files)
    assert (again.status_code, again.json()) == (200, response.json())
    assert client.delete(f"/v1/datasets/{dataset.id}").status_code == 204
    assert blobs(settings) == []


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_decompression_bomb_is_refused(suffix: str, client: TestClient, settings: Settings) -> None:
    content = {
        "png": PNG.replace(struct.pack(">II", 4, 4), struct.pack(">II", 60_000, 60_000)),
        "jpg": JPEG.replace(struct.pack(">HH", 4, 4), struct.pack(">HH", 60_000, 60_000)),
    }[suffix]
    answer = send(client, [(f"a.{suffix}", content), ("labels.csv", b"a." + suffix.encode() + b",1")])
    assert f"a.{suffix} is 60000 x 60000 pixels; the limit is" in refused(answer, settings)


@pytest.mark.parametrize(("mode", "said"), [("I;16", "16 bits deep"), ("RGBA", "transparent")])
def test_what_the_worker_does_not_decode_is_refused(
    mode: str, said: str, client: TestClient, settings: Settings
) -> None:
    content = io.BytesIO()
    Image.new(mode, (4, 4)).save(content, "PNG")
    answer = send(client, [("a.png", content.getvalue()), ("labels.csv", b"a.png,1")])
    assert f"a.png is {said}; save it as grey or RGB" in refused(answer, settings)


@pytest.mark.parametrize(
    ("files", "detail"),
    [
        ([], "is no file"),
        ([("labels.csv", b"a.png,0")], "names 'a.png', which is not there"),
        ([("labels.csv", b"")], "labels.csv is empty"),
        ([("a.png", PNG), ("a.png", PNG)], "two files are named a.png"),
        ([("a.gif", b"GIF89a")], "a.gif is neither an image"),
        ([("a.png", JPEG)], "a.png is no PNG file"),
        ([("a.jpg", b"")], "a.jpg is no JPEG file"),
        ([("a.png", PNG), ("b.png", PNG), ("labels.csv", b"a.png,0")], "has no label of 'b.png'"),
        ([("a.png", PNG), ("labels.csv", b"a.png,dog")], "'dog' is no class number"),
        ([("a.png", PNG), ("labels.csv", b"a.png,0"), ("labels.txt", b"a.png 0")], "are both there"),
        ([("cats/a.png", PNG)], "leave out the folder"),
        ([("..\\a.png", PNG)], "leave out the folder"),
    ],
)
def test_unfit_files_are_refused_and_leave_nothing(
    client: TestClient, settings: Settings, files: list[tuple[str, bytes]], detail: str
) -> None:
    if not files:
        body = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
        assert detail in refused(post(client, body), settings)
        return
    assert detail in refused(send(client, files), settings)


def post(client: Any, body: bytes, kind: str = "multipart/form-data; boundary=x") -> httpx2.Response:
    response: httpx2.Response = client.post(
        "/v1/datasets", params={"name": "a"}, content=body, headers={"Content-Type": kind}
    )
    return response


HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "ends before its last boundary"),
        (b"--x--\r\n", "has no image"),
        (HEAD + b"\r\n" + PNG, "ends before its last boundary"),
        (HEAD, "ends before its last boundary"),
        (b"no boundary here", "is not multipart/form-data"),
        (HEAD + b"X-Long: " + b"x" * 10_000, "is not multipart/form-data"),
        (HEAD.replace(b"a.png", b"\xff.png") + b"\r\n" + PNG + b"\r\n--x--\r\n", "is not UTF-8"),
        (HEAD.replace(b"a.png", b"a\x00.png") + b"\r\n" + PNG + b"\r\n--x--\r\n", ""),
    ],
)
def test_a_malformed_body_is_refused(
    client: TestClient, settings: Settings, body: bytes, detail: str
) -> None:
    assert detail in refused(post(client, body), settings)


def test_a_boundary_is_needed(client: TestClient, settings: Settings) -> None:
    assert "names no boundary" in refused(post(client, b"", "Multipart/Form-Data"), settings)


def test_names_may_be_of_any_script(client: TestClient, settings: Settings) -> None:
    body = HEAD.replace(b"a.png", "b\u00e4r \u732b.png".encode()) + b"\r\n" + PNG + b"\r\n--x--\r\n"
    assert post(client, body).status_code == 201
    with zipfile.ZipFile(blobs(settings)[0]) as archive:
        assert archive.namelist() == ["b\u00e4r \u732b.png"]


def test_the_size_of_files_is_bounded_together(live: httpx2.Client, settings: Settings) -> None:
    half = PNG + bytes(settings.max_upload_bytes // 2)
    response = send(live, [("a.png", half), ("b.png", half)])
    assert (response.status_code, response.json()["type"]) == (413, "/problems/content-too-large")
    assert blobs(settings) == []
    assert send(live, [("a.png", half)]).status_code == 201
