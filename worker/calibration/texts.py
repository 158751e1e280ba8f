"""Texts to calibrate on and to evaluate with: read, split, tokenise, cut into windows.

The convention is written down in docs/perplexity.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from quantry.bundled import bundled_text
from quantry.contract import DatasetRef
from worker.errors import DatasetError
from worker.models.source import Role, dataset_path, shown_name
from worker.workspace import Workspace

SHINGLE = 32  # tokens; a run of this many that stands in both texts counts as overlap


@dataclass(frozen=True)
class Text:
    """One text as documents. separate: each document is tokenised on its own, after a start token."""

    name: str
    documents: tuple[str, ...]
    separate: bool = False


def load_text(ref: DatasetRef, role: Role, workspace: Workspace) -> Text:
    """Read what `ref` names. Raises DatasetError, with the file and the reason."""
    split = ref.split or ("train" if role == "calibration" else "test")
    if ref.source == "bundled":
        try:
            return Text(f"{ref.id} ({split})", (bundled_text(ref.id, split),))
        except (KeyError, ValueError) as error:
            raise DatasetError(f"{role}.dataset.id: {error}") from error
    path = dataset_path(ref, role, workspace)
    name = shown_name(ref, path)
    return _split(_read(path, name, ref, role), f"{name} ({split})", split)


def _read(path: Path, name: str, ref: DatasetRef, role: Role) -> Text:
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return Text(name, tuple(_parquet(path, ref.field)))
        content = path.read_text(encoding="utf-8-sig")  # without the byte order mark of some editors
    except UnicodeDecodeError as error:
        raise DatasetError(f"{role}: {name} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DatasetError(f"{role}: {name} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError) as error:
        raise DatasetError(f"{role}: {name} cannot be read: {error}") from error
    if kind in (".jsonl", ".ndjson"):
        return Text(name, tuple(_jsonl(content, ref.field, name)))
    if ref.separator is not None:
        return Text(name, tuple(d for d in map(str.strip, content.split(ref.separator)) if d), separate=True)
    return Text(name, (content,))


def _parquet(path: Path, field: str) -> list[str]:
    table = pq.read_table(path, columns=[field])
    values = table[field].to_pylist()
    if any(value is not None and not isinstance(value, str) for value in values):
        raise ValueError(f"column {field!r} does not hold strings")
    return [value for value in values if value]


def _jsonl(content: str, field: str, name: str) -> list[str]:
    documents = []
    for number, line in enumerate(
        content.split("\n"), 1
    ):  # splitlines() breaks at U+2028, which JSON may hold
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{name}, line {number}: no JSON object with a field {field!r}") from error
        if not isinstance(value, str):
            raise DatasetError(f"{name}, line {number}: field {field!r} is not a string")
        documents.append(value)
    return documents


def _split(text: Text, name: str, split: str) -> Text:
    """`train`: the first nine tenths of the documents (of the characters of a single one); `test`: the rest."""
    documents = text.documents
    if split == "all":
        return Text(name, documents, text.separate)
    if len(documents) == 1:
        cut = documents[0].rfind("\n", 0, len(documents[0]) * 9 // 10) + 1 or len(documents[0]) * 9 // 10
        part = documents[0][:cut] if split == "train" else documents[0][cut:]
        return Text(name, (part,), text.separate)
    cut = len(documents) * 9 // 10
    return Text(name, documents[:cut] if split == "train" else documents[cut:], text.separate)


def tokenize(text: Text, tokenizer: Any, start: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The text as one run of token ids, (tokens,) int64; `start` goes before each separate document."""
    if not any(text.documents):
        return np.empty(0, dtype=np.int64)  # the callers refuse it as too short
    if not text.separate:
        ids = tokenizer("\n\n".join(text.documents), verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)
    parts: list[int] = []
    for ids in tokenizer(list(text.documents), add_special_tokens=False, verbose=False)["input_ids"]:
        parts += ids if start is None else [start, *ids]
    return np.asarray(parts, dtype=np.int64)


def cut_windows(tokens: np.ndarray[Any, Any], length: int) -> Tensor:
    """Non-overlapping windows (windows, length) int64; the tail is dropped."""
    count = len(tokens) // length
    return torch.from_numpy(tokens[: count * length].reshape(count, length).copy())


def calibration_windows(
    tokens: np.ndarray[Any, Any], *, samples: int, length: int, seed: int, name: str
) -> Tensor:
    """`samples` of the text's windows, drawn without replacement, in the order of the text.

    Raises: DatasetError if the text is too short.
    """
    windows = cut_windows(tokens, length)
    if len(windows) < samples:
        raise DatasetError(
            f"calibration: {name} has {len(tokens)} tokens, {len(windows)} windows of {length}; "
            f"{samples} were asked for: give more text, fewer samples or a shorter sequence_length"
        )
    chosen = np.random.default_rng(seed).permutation(len(windows))[:samples]
    return windows[np.sort(chosen)]


def overlap(calibration: Tensor, evaluation: Tensor) -> float:
    """The share of the evaluation's runs of 32 tokens (of a shorter window's length) that calibration has too."""
    run = min(SHINGLE, calibration.shape[1], evaluation.shape[1])
    seen = np.unique(_shingles(calibration.numpy(), run))
    return float(np.isin(_shingles(evaluation.numpy(), run), seen).mean())


def _shingles(windows: np.ndarray[Any, Any], run: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash of every run of tokens inside each window."""
    factors = np.random.default_rng(7).integers(1, 2**63, run, dtype=np.uint64) | np.uint64(1)
    values = windows.astype(np.uint64) + np.uint64(1)
    width = windows.shape[1] - run + 1
    hashes = np.zeros((len(windows), width), dtype=np.uint64)
    for i, factor in enumerate(factors):
        hashes += values[:, i : i + width] * factor
        hashes ^= hashes >> np.uint64(29)
    return hashes.ravel()
