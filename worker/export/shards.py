"""Write safetensors shards as tensors arrive: at most one shard is ever in memory.

Layout of a file (github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header
as JSON (name -> dtype, shape, data_offsets), padded with spaces to a multiple of 8, then the bytes of the
tensors without holes, here wider dtypes first and then by name, as the reference writer orders them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from quantry.reports import FileEntry
from worker.errors import ExportError
from worker.export.files import write_json

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors; each time `shard_bytes` are full a shard goes to the disk."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[FileEntry] = []
        self._where: dict[str, int] = {}
        self.total_bytes = 0

    @property
    def names(self) -> set[str]:
        """Every tensor that was added."""
        return set(self._where)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor. Raises ExportError for a name that was there already or a dtype without a code."""
        if name in self._where:
            raise ExportError(f"tensor `{name}` came twice: the model names one tensor for two layers")
        if tensor.dtype not in _DTYPES:
            raise ExportError(f"tensor `{name}` is {tensor.dtype}, which safetensors files here do not hold")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = _owned(tensor)
        self._where[name] = len(self._shards)
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> list[FileEntry]:
        """Write the last shard, give the files their names and, if there are several, their index."""
        self._flush()
        count = len(self._shards)
        names = [_shard_name(number, count) for number in range(count)]
        for number, name in enumerate(names):
            (self._folder / _part_name(number)).rename(self._folder / name)
        if count > 1:
            weight_map = {tensor: names[shard] for tensor, shard in sorted(self._where.items())}
            metadata = {"total_size": self.total_bytes}
            write_json(self._folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        return [
            entry.model_copy(update={"path": name}) for entry, name in zip(self._shards, names, strict=True)
        ]

    def _flush(self) -> None:
        if self._pending:
            part = _part_name(len(self._shards))
            size, digest = _write(self._folder / part, self._pending)
            self._shards.append(FileEntry(path=part, bytes=size, sha256=digest))
        self._pending = {}
        self._pending_bytes = 0


def _part_name(number: int) -> str:
    return f"model-part-{number + 1:05d}.safetensors.partial"


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a view that keeps a larger tensor alive."""
    tensor = tensor.detach().to("cpu").contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write one file and fsync it; returns its size and sha256."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as out:
        for piece in (len(text).to_bytes(8, "little"), text):
            _write_all(out.fileno(), memoryview(piece))
            digest.update(piece)
        for name in order:
            content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
            _write_all(out.fileno(), content)
            digest.update(content)
        os.fsync(out.fileno())
    return 8 + len(text) + offset, digest.hexdigest()


def _write_all(handle: int, content: memoryview) -> None:
    """`os.write` until everything is out; a full disk raises OSError."""
    while content:
        content = content[os.write(handle, content[: 1 << 26]) :]
