"""Finished pieces of a job on disk, so that an attempt goes on where the last one stopped."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class PieceStore:
    """One file a piece, written whole or not at all; a store of another fingerprint is emptied."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        mark = folder / "fingerprint"
        if not mark.exists() or mark.read_text() != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(fingerprint)
        for partial in folder.glob("*.part"):
            partial.unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """facts: text beside the tensors."""
        partial = self._path(name).with_suffix(f".{uuid.uuid4().hex}.part")  # a frozen attempt may thaw
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, partial, dict(facts))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self._path(name))

    def load(self, name: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors, on the device, and the facts of a piece that is there."""
        with safe_open(self._path(name), framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
