"""The texts that a request names: there, readable, not both calibrated and evaluated on, and long enough."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from app.intake.datasets import Role, Sources, check_suffix, find, split_of
from app.intake.errors import DatasetNotFound, DatasetRefused
from quantry.base import SpecError
from quantry.bundled import NotBundledError, bundled_text
from quantry.contract import DatasetRef, JobSpec

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
_SHARES = {"train": 0.9, "test": 0.1, "all": 1.0}


@dataclass(frozen=True)
class Text:
    """The reference with its revision pinned, and how many bytes of UTF-8 it has, if that can be known."""

    ref: DatasetRef
    bytes: int | None


def read_text(ref: DatasetRef, role: Role, sources: Sources) -> Text:
    """Look the text up where it is. Raises DatasetNotFound, DatasetRefused, HubUnreachable."""
    split = split_of(ref, role)
    if ref.source == "bundled":
        try:
            return Text(ref, _bundled_bytes(ref.id, split))
        except NotBundledError as error:
            raise DatasetNotFound(f"{role}.dataset.id", str(error)) from error
    found = find(ref, role, sources)
    if found.path is not None and found.path.is_dir():
        raise DatasetRefused(f"{role}.dataset.id", f"{ref.id} is not a file")
    check_suffix(found, role, SUFFIXES, "a text")
    if found.path is not None and found.bytes == 0:
        raise DatasetRefused(f"{role}.dataset.id", f"{ref.id} is empty")
    plain = found.suffix != ".parquet" and found.bytes > 0  # a Parquet file is compressed
    return Text(found.ref, int(found.bytes * _SHARES[split]) if plain else None)


def check_overlap(spec: JobSpec) -> None:
    """Refuse to evaluate on what calibration sees, if the names alone show it. Raises SpecError."""
    if spec.evaluation is None or spec.evaluation.allow_overlap:
        return
    first, second = spec.calibration.dataset, spec.evaluation.dataset
    if (first.source, first.id, first.file, first.revision) != (
        second.source,
        second.id,
        second.file,
        second.revision,
    ):
        return
    splits = {first.split or "train", second.split or "test"}
    if len(splits) == 1 or "all" in splits:
        detail = f"calibration and evaluation both read {' and '.join(sorted(splits))} of {first.id}; "
        raise SpecError("evaluation.dataset.split", detail + "choose disjoint splits, or set allow_overlap")


def check_length(spec: JobSpec, text: Text) -> None:
    """Refuse a text with fewer bytes than tokens are asked for: each has at least one. Raises SpecError."""
    length, samples = spec.calibration.sequence_length, spec.calibration.samples
    if text.bytes is None or length is None or text.ref.separator is not None:
        return
    if text.bytes < samples * length:
        raise SpecError(
            "calibration.samples",
            f"{samples} windows of {length} tokens need {samples * length} tokens, and {text.ref.id} "
            f"has only {text.bytes} bytes: give more text, fewer samples or a shorter sequence_length",
        )


def check_evaluation(spec: JobSpec, text: Text) -> None:
    """Refuse a text with fewer bytes than one window has tokens. Raises SpecError."""
    assert spec.evaluation is not None
    length = spec.evaluation.sequence_length or spec.calibration.sequence_length
    if text.bytes is not None and length is not None and text.bytes < length:
        raise SpecError(
            "evaluation.sequence_length",
            f"a window has {length} tokens, and {text.ref.id} only {text.bytes} bytes: give more text or a shorter "
            "sequence_length",
        )


@lru_cache
def _bundled_bytes(name: str, split: str) -> int:
    return len(bundled_text(name, split).encode())
