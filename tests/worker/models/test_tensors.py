"""Which files of a folder are its weights, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantry.contract import ModelRef
from worker.errors import ModelError
from worker.models.source import resolve
from worker.models.tensors import shard_files
from worker.workspace import Workspace

INDEX = '{"weight_map": {"a": "../../elsewhere.safetensors"}}'


def test_an_index_counts_for_nothing_beside_whole_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    with pytest.raises(ModelError, match=r"\.\./\.\./elsewhere"):
        shard_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert shard_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_link_out_of_the_roots_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "roots" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    workspace = Workspace(
        artifact=tmp_path, checkpoints=tmp_path, cache=tmp_path, model_roots=(tmp_path / "roots",)
    )
    with pytest.raises(ModelError, match=r"model\.safetensors is a link that leads out"):
        resolve(ModelRef(source="local", id="model"), workspace)
