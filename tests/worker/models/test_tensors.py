"""Which files of a folder are its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.errors import ModelError
from worker.models.tensors import shard_files

INDEX = '{"weight_map": {"a": "../../elsewhere.safetensors"}}'


def test_an_index_counts_for_nothing_beside_whole_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    with pytest.raises(ModelError, match=r"\.\./\.\./elsewhere"):
        shard_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert shard_files(tmp_path) == [tmp_path / "model.safetensors"]
