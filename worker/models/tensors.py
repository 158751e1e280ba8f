"""Reading the tensors of a safetensors checkpoint, one at a time, under their canonical names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantry.families import Family
from worker.errors import ModelError


class Checkpoint:
    """The tensors of a folder. A file is open only while a tensor is read, so its pages do not stay mapped."""

    def __init__(self, folder: Path, family: Family) -> None:
        self._folder = folder
        self._where: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in shard_files(folder):
            try:
                with safe_open(file, framework="pt") as shard:
                    for stored in shard.keys():  # noqa: SIM118 - not a mapping
                        name = family.canonical(stored)
                        if not family.is_ignored(name):
                            self._where[name] = (file, stored)
                            self._shapes[name] = tuple(shard.get_slice(stored).get_shape())
            except SafetensorError as error:
                raise ModelError(f"{file.name} is not a whole safetensors file: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> Tensor:
        """The tensor in the checkpoint's dtype, on the CPU."""
        file, stored = self._where[name]
        with safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(stored)
        return tensor.clone()


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises ModelError if one that the index names is missing."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise ModelError(f"{folder.name} holds no model.safetensors; pickled weights are refused")
        return [single]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise ModelError(f"{folder.name}: the index names {name}, which is not in the folder")
    return [folder / name for name in names]
