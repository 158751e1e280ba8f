"""Every fault that a safetensors file can have is named, and a sound file is read as written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantry.headers import HeaderError, TensorInfo, merge_shards, parse_header, read_header


def _file(entries: dict[str, object], data_bytes: int) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data_bytes)


def _parse(content: bytes) -> dict[str, TensorInfo]:
    length = int.from_bytes(content[:8], "little")
    return parse_header("m.safetensors", content[:8], content[8 : 8 + length], len(content))


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, dtype=torch.int64),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "m.safetensors")
    assert {name: info.shape for name, info in found.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {name: info.nbytes for name, info in found.items()} == {n: t.nbytes for n, t in tensors.items()}
    assert found["b"].dtype == "BF16"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\x10", "truncated: it has 1 bytes"),
        (bytes(8), "a header of 0 bytes"),
        (b"\xff" * 16, "not a safetensors file"),
        ((64).to_bytes(8, "little") + b"{}", "its header has 64 bytes, 2 are there"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        (_file({"w": _entry("F32", [2, 2], 0, 16)}, 15), "truncated: its header describes"),
        (_file({"w": _entry("F32", [2, 2], 0, 16)}, 17), "bytes after its last tensor"),
        (_file({"w": _entry("F32", [2, 3], 0, 16)}, 16), "needs 24 bytes, its offsets span 16"),
        (_file({"w": _entry("X9", [4], 0, 16)}, 16), "unknown type 'X9'"),
        (_file({"w": _entry("F32", [-4], 0, 16)}, 16), "no whole number"),
        (_file({"w": {"dtype": "F32"}}, 0), "malformed"),
        (_file({"w": 3}, 0), "malformed"),
        (_file({"w": _entry([], [4], 0, 16)}, 16), "malformed"),  # type: ignore[arg-type]
        (_file({"v": _entry("U8", [4], 0, 4), "w": _entry("U8", [4], 6, 10)}, 10), "starts at byte 6"),
        (_file({"v": _entry("U8", [4], 0, 4), "w": _entry("U8", [4], 2, 6)}, 6), "starts at byte 2"),
    ],
)
def test_names_the_fault(content: bytes, fault: str) -> None:
    with pytest.raises(HeaderError, match=fault):
        _parse(content)


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_read(header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header
    try:
        found = _parse(content)
    except HeaderError:
        return
    assert all(info.nbytes == 0 for info in found.values())  # no data follows the header


@pytest.mark.parametrize("cut", [1, 8, 100, 200])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(64, 2)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(HeaderError, match="truncated"):
        read_header(path)


def test_shards_are_checked_against_their_index() -> None:
    info = TensorInfo("F32", (2, 2))
    shards = {"one": {"a": info}, "two": {"b": info}}
    assert set(merge_shards({"a": "one", "b": "two"}, shards)) == {"a", "b"}
    with pytest.raises(HeaderError, match="says that two holds a"):
        merge_shards({"a": "two"}, shards)
    with pytest.raises(HeaderError, match="says that three holds a"):
        merge_shards({"a": "three"}, shards)
    with pytest.raises(HeaderError, match="two files"):
        merge_shards(None, {"one": {"a": info}, "two": {"a": info}})
