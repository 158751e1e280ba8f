"""Downloads: broken off and continued, damaged and refused."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from quantry.client import Client, ConnectionFailed, DownloadError, ProblemError
from quantry.jobs import JobRead
from quantry.reports import FileEntry, Loader, Manifest
from tests.cutting_proxy import CuttingProxy
from tests.live_server import LiveServer, request

BIG = os.urandom(3 << 20)
FILES = {"model.safetensors": BIG, "config.json": b"{}", "sub/folder/notes.txt": b"deep", "empty.txt": b""}


@pytest.fixture
def job(live: LiveServer, client: Client) -> JobRead:
    made = client.submit(request())
    live.succeed(live.claim(made.id), FILES)
    return client.job(made)


def part_of(folder: Path, name: str, content: bytes) -> Path:
    return folder / f"{name}.{hashlib.sha256(content).hexdigest()[:16]}.part"


def check(folder: Path) -> None:
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == content
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert {entry.path for entry in manifest.files} == {*FILES, "report.json", "report.html"}
    assert not list(folder.rglob("*.part"))


def test_every_file_comes_and_is_whole(client: Client, job: JobRead, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = client.download(job, tmp_path / "out", on_bytes=lambda done, total: seen.append((done, total)))
    check(tmp_path / "out")
    total = sum(entry.bytes for entry in manifest.files)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_second_download_fetches_no_file_again(
    live: LiveServer, client: Client, job: JobRead, tmp_path: Path
) -> None:
    client.download(job, tmp_path)
    kept = (tmp_path / "model.safetensors").stat()
    with CuttingProxy(live.port, []) as proxy, Client(proxy.url, live.key) as other:
        other.download(job, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_ino == kept.st_ino
    check(tmp_path)


def test_cut_connections_are_continued(
    live: LiveServer, client: Client, job: JobRead, tmp_path: Path
) -> None:
    """Three connections break within the big file; the fourth brings the rest."""
    cuts = [500_000, 300_000, 700_000]
    with CuttingProxy(live.port, cuts) as proxy, Client(proxy.url, live.key) as other:
        other.download(job, tmp_path, parallel=1)
    assert proxy.cut == 3
    check(tmp_path)


def test_a_download_goes_on_where_an_earlier_one_ended(client: Client, job: JobRead, tmp_path: Path) -> None:
    part = part_of(tmp_path, "model.safetensors", BIG)
    part.write_bytes(BIG[: 2 << 20])
    client.download(job, tmp_path)
    check(tmp_path)


def test_only_the_missing_bytes_are_asked_for(live: LiveServer, job: JobRead, tmp_path: Path) -> None:
    """With all but 1000 bytes here, a connection that is cut after 200 kB is enough."""
    part_of(tmp_path, "model.safetensors", BIG).write_bytes(BIG[:-1000])
    with CuttingProxy(live.port, [200_000] * 20) as proxy, Client(proxy.url, live.key) as client:
        client.download(job, tmp_path)
    assert proxy.cut == 0
    check(tmp_path)


def test_a_damaged_part_is_fetched_afresh(client: Client, job: JobRead, tmp_path: Path) -> None:
    part_of(tmp_path, "model.safetensors", BIG).write_bytes(bytes(1 << 20))
    client.download(job, tmp_path)
    check(tmp_path)


def test_a_part_that_is_too_long_is_fetched_afresh(client: Client, job: JobRead, tmp_path: Path) -> None:
    part_of(tmp_path, "model.safetensors", BIG).write_bytes(BIG + b"more")
    client.download(job, tmp_path)
    check(tmp_path)


def test_a_file_that_was_changed_is_fetched_again(client: Client, job: JobRead, tmp_path: Path) -> None:
    client.download(job, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(len(BIG)))
    client.download(job, tmp_path)
    check(tmp_path)


def test_bytes_that_the_manifest_does_not_promise_are_refused(
    live: LiveServer, client: Client, job: JobRead, tmp_path: Path
) -> None:
    """The file rots on the server's disk; its length stays, so only the digest tells."""
    stored = next(live.storage.job(job.id).rglob("model.safetensors"))
    stored.write_bytes(bytes([BIG[0] ^ 1]) + BIG[1:])
    with pytest.raises(DownloadError, match=r"model\.safetensors: the manifest promises sha256"):
        client.download(job, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "manifest.json").exists()
    assert not part_of(tmp_path, "model.safetensors", BIG).exists()


def test_a_server_that_stops_half_way_leaves_a_part_to_continue(
    live: LiveServer, job: JobRead, tmp_path: Path
) -> None:
    with (
        CuttingProxy(live.port, [*[400_000] * 3, *[0] * 40]) as proxy,
        Client(proxy.url, live.key, retries=1) as client,
        pytest.raises(ConnectionFailed, match="connection was lost"),
    ):
        client.download(job, tmp_path, parallel=1)
    left = part_of(tmp_path, "model.safetensors", BIG)
    assert 0 < left.stat().st_size < len(BIG)
    assert BIG.startswith(left.read_bytes())
    with Client(live.url, live.key) as client:
        client.download(job, tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("path", ["../escape.txt", "/etc/passwd", "a/../../b", "a\\b", "link/file"])
def test_a_manifest_that_leaves_the_folder_writes_nothing(
    path: str, live: LiveServer, client: Client, job: JobRead, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    stored = next(live.storage.job(job.id).rglob("manifest.json"))
    evil = Manifest(
        job=job.id,
        format="x",
        loader=Loader(package="p", version="1", snippet=""),
        files=(FileEntry(path=path, bytes=4, sha256=hashlib.sha256(b"evil").hexdigest()),),
    )
    stored.write_text(evil.model_dump_json())
    with pytest.raises(DownloadError, match=r"outside|leads out"):
        client.download(job, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert [p.name for p in folder.iterdir()] == ["link"]


def test_a_job_without_result_has_no_files(client: Client, tmp_path: Path) -> None:
    job = client.submit(request())
    with pytest.raises(ProblemError) as caught:
        client.download(job, tmp_path / "out")
    assert caught.value.status == 409
    assert not (tmp_path / "out").exists()


def test_the_tar_is_continued_and_checked(live: LiveServer, job: JobRead, tmp_path: Path) -> None:
    with CuttingProxy(live.port, [900_000, 800_000]) as proxy, Client(proxy.url, live.key) as client:
        client.download_checkpoint(job, tmp_path / "job.tar")
    assert proxy.cut == 2
    with tarfile.open(tmp_path / "job.tar") as archive:
        names = set(archive.getnames())
        model = archive.extractfile("model.safetensors")
        assert model is not None
        assert model.read() == BIG
    assert names == {*FILES, "report.json", "report.html", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["job.tar"]


def test_a_tar_with_wrong_bytes_is_refused(
    live: LiveServer, client: Client, job: JobRead, tmp_path: Path
) -> None:
    stored = next(live.storage.job(job.id).rglob("config.json"))
    stored.write_bytes(b"[]")
    with pytest.raises(DownloadError, match=r"wrong digest: config\.json"):
        client.download_checkpoint(job, tmp_path / "job.tar")
    assert not list(tmp_path.glob("job.tar*"))


def test_a_disk_without_room_is_said_before_the_first_byte(
    live: LiveServer, client: Client, job: JobRead, tmp_path: Path
) -> None:
    stored = next(live.storage.job(job.id).rglob("manifest.json"))
    manifest = Manifest.model_validate_json(stored.read_bytes())
    huge = FileEntry(path="huge", bytes=10**18, sha256="0" * 64)
    stored.write_text(manifest.model_copy(update={"files": (*manifest.files, huge)}).model_dump_json())
    with pytest.raises(DownloadError, match="make room"):
        client.download(job, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
