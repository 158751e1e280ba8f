"""Reading the tensors of a safetensors checkpoint, one at a time, under their canonical names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantry.families import Family
from quantry.headers import HeaderError, TensorInfo, merge_shards, read_header
from worker.errors import ModelError

COPY_BYTES = 1 << 21


class Checkpoint:
    """The tensors of a folder. A file is open only while a tensor is read, so its pages do not stay mapped."""

    def __init__(self, folder: Path, family: Family) -> None:
        self._folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        for file, tensors in read_headers(folder).items():
            for stored, info in tensors.items():
                name = family.canonical(stored)
                if not family.is_ignored(name):
                    self.infos[name] = info
                    self._where[name] = (folder / file, stored)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name].shape

    def load(self, name: str) -> Tensor:
        """The tensor in the checkpoint's dtype, on the CPU."""
        file, stored = self._where[name]
        with safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(stored)
        return tensor.clone()

    def copy(self, name: str, into: Tensor, *, through: torch.dtype | None = None) -> None:
        """Copy a tensor into `into`, a few rows at a time; `through` a dtype that takes some of its digits."""
        file, stored = self._where[name]
        shape = self.infos[name].shape
        rows = max(1, COPY_BYTES // max(1, self.infos[name].nbytes // max(1, shape[0] if shape else 1)))
        for low in range(0, shape[0] if shape else 1, rows):
            with safe_open(file, framework="pt") as shard:
                part = shard.get_slice(stored)[low : low + rows] if shape else shard.get_tensor(stored)
                target = into[low : low + rows] if shape else into
                target.copy_(part if through is None else part.to(through))


def read_headers(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each file of a checkpoint. Raises ModelError for a truncated or malformed file."""
    try:
        shards = {file.name: read_header(file) for file in shard_files(folder)}
        merge_shards(_weight_map(folder), shards)
    except HeaderError as error:
        raise ModelError(f"{folder.name}: {error}") from error
    return shards


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises ModelError if one that the index names is missing."""
    index = _weight_map(folder)
    if index is None:
        if not (folder / "model.safetensors").exists():
            raise ModelError(f"{folder.name} holds no model.safetensors; pickled weights are refused")
        return [folder / "model.safetensors"]
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise ModelError(f"{folder.name}: the index names {name}, which is not in the folder")
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, from the index of a sharded checkpoint, or None. Raises ModelError.

    Beside a whole model.safetensors an index counts for nothing, as in transformers and at submit.
    """
    file = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder.name}: {file.name} is not an index of safetensors files") from error
