"""Artifacts in a folder: published whole, found again, never outside the root."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.shared.errors import StartError
from app.shared.ids import new_id
from app.shared.storage import Storage


def test_publishing_moves_every_file_to_its_final_name(tmp_path: Path) -> None:
    storage, job_id = Storage(tmp_path), new_id("job")
    part = storage.open_part(job_id, 2)
    (part / "deep").mkdir()
    (part / "deep" / "a").write_text("1")
    name = storage.publish(job_id, 2)

    assert name == f"jobs/{job_id}/attempt-2"
    assert (storage.artifact(name) / "deep" / "a").read_text() == "1"
    assert not part.exists()
    assert [(found, epoch) for found, epoch, _ in storage.attempts()] == [(job_id, 2)]


def test_a_new_attempt_starts_empty_and_keeps_checkpoints(tmp_path: Path) -> None:
    storage, job_id = Storage(tmp_path), new_id("job")
    (storage.open_part(job_id, 1) / "old").touch()
    (storage.checkpoints(job_id) / "block-0").touch()
    assert list(storage.open_part(job_id, 1).iterdir()) == []
    assert [path.name for path in storage.checkpoints(job_id).iterdir()] == ["block-0"]


def test_discarding_removes_an_attempt_alone(tmp_path: Path) -> None:
    storage, job_id = Storage(tmp_path), new_id("job")
    for epoch in (1, 2):
        storage.open_part(job_id, epoch)
    storage.publish(job_id, 2)
    storage.discard(job_id, 1)
    storage.discard(job_id, 7)
    assert [epoch for _, epoch, _ in storage.attempts()] == [2]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "jobs/../../secret"])
def test_no_artifact_lies_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="outside"):
        Storage(tmp_path).artifact(name)


@pytest.mark.parametrize("job_id", ["", "..", "job_../../x", "job_" + "g" * 36])
def test_only_job_ids_name_folders(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(ValueError, match="no job id"):
        Storage(tmp_path).job(job_id)


@pytest.mark.parametrize("blob", [("x", ""), ("0" * 64, "/../a"), ("0" * 63, ".txt"), ("0" * 64, ".TXT")])
def test_only_digests_name_blobs(tmp_path: Path, blob: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="no blob"):
        Storage(tmp_path).blob(*blob)


def test_a_root_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be written"):
        Storage(tmp_path / "file").prepare()
