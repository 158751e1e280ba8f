"""A workspace for the jobs of `training_jobs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    roots = tmp_path / "roots"
    roots.mkdir()
    return Workspace(
        job="job_test",
        artifact=tmp_path / "artifact",
        checkpoints=tmp_path / "checkpoints",
        cache=tmp_path / "cache",
        model_roots=(roots,),
        threads=1,
    )
