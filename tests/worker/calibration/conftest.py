"""A worker that reads images of a model root and of uploads."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "roots").mkdir()
    return Workspace(
        artifact=tmp_path / "a",
        checkpoints=tmp_path / "c",
        cache=tmp_path / "h",
        model_roots=(tmp_path / "roots",),
        uploads={"ds_1": tmp_path / "roots" / "up.npz", "ds_2": tmp_path / "roots" / "up.zip"},
        offline=True,
    )
