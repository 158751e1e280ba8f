"""Read what a checkpoint says of itself, without loading it: safetensors headers and shard indexes.

The format is documented at https://huggingface.co/docs/safetensors: eight bytes of header length (little
endian), a JSON header, then the tensors' bytes. Needs no torch; never reads a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip


class HeaderError(ValueError):
    """A file that is not the safetensors file it should be; the message names the file and the fault."""


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of one stored tensor; `dtype` in the spelling of safetensors, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


def parse_header(file: str, first: bytes, header: bytes, file_bytes: int | None) -> dict[str, TensorInfo]:
    """The tensors of one file from its first 8 bytes and its header; its size is checked unless None.

    Raises HeaderError for a malformed header, gaps or overlaps between tensors, a size that is not the
    shape's, and a file that is shorter or longer than its header says.
    """
    length = header_length(file, first)
    if len(header) != length:
        raise HeaderError(f"{file} is truncated: its header has {length} bytes, {len(header)} are there")
    try:
        entries = json.loads(header)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HeaderError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise HeaderError(f"{file} is not a safetensors file: its header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        tensors[name], begin, end = _entry(file, name, entry)
        spans.append((begin, end, name))
    end = _check_contiguous(file, spans)
    if file_bytes is not None and file_bytes != 8 + length + end:
        fault = "is truncated" if file_bytes < 8 + length + end else "has bytes after its last tensor"
        raise HeaderError(
            f"{file} {fault}: its header describes {8 + length + end} bytes, it has {file_bytes}"
        )
    return tensors


def header_length(file: str, first: bytes) -> int:
    """The header's length from the first eight bytes. Raises HeaderError."""
    if len(first) < 8:
        raise HeaderError(f"{file} is truncated: it has {len(first)} bytes")
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise HeaderError(f"{file} is not a safetensors file: a header of {length} bytes")
    return length


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a local file. Raises HeaderError, OSError."""
    with path.open("rb") as file:
        first = file.read(8)
        header = file.read(header_length(path.name, first))
    return parse_header(path.name, first, header, path.stat().st_size)


def merge_shards(
    weight_map: Mapping[str, Any] | None, shards: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint, checked against its index if it has one. Raises HeaderError."""
    tensors: dict[str, TensorInfo] = {}
    for file, found in shards.items():
        for name, info in found.items():
            if name in tensors:
                raise HeaderError(f"tensor {name} stands in two files, one of them {file}")
            tensors[name] = info
    for name, file in (weight_map or {}).items():
        if name not in shards.get(str(file), {}):
            raise HeaderError(f"the index says that {file} holds {name}, but it does not")
    return tensors


def _entry(file: str, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = dtype in DTYPE_BITS
        whole = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise HeaderError(f"{file}: the entry of tensor {name} is malformed") from error
    if not known:
        raise HeaderError(f"{file}: tensor {name} has the unknown type {dtype!r}")
    if not whole:
        raise HeaderError(f"{file}: tensor {name} has a shape or an offset that is no whole number")
    info = TensorInfo(dtype, tuple(shape))
    if end - begin != info.nbytes:
        raise HeaderError(
            f"{file}: tensor {name} {dtype}{list(shape)} needs {info.nbytes} bytes, "
            f"its offsets span {end - begin}"
        )
    return info, begin, end


def _check_contiguous(file: str, spans: list[tuple[int, int, str]]) -> int:
    """The end of the last tensor; safetensors allows neither gaps nor overlaps."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise HeaderError(f"{file}: tensor {name} starts at byte {begin} of the data, not at {position}")
        position = end
    return position
