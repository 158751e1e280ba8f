"""The texts that a request names: there, readable, not both calibrated and evaluated on, and long enough."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.intake.errors import DatasetNotFound, DatasetRefused
from app.intake.folders import below_roots
from app.intake.hub import Hub
from app.shared.database import transaction
from app.shared.settings import Settings
from app.shared.tables import Dataset
from quantry.base import SpecError
from quantry.bundled import NotBundledError, bundled_images, bundled_text
from quantry.contract import DatasetRef, JobSpec

IMAGE_SUFFIXES = (".npz", ".zip")  # uploaded files are kept as a stored zip
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
_SHARES = {"train": 0.9, "test": 0.1, "all": 1.0}
Role = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Text:
    """The reference with its revision pinned, and how many bytes of UTF-8 it has, if that can be known."""

    ref: DatasetRef
    bytes: int | None


def read_text(
    ref: DatasetRef,
    role: Role,
    *,
    images: bool = False,
    settings: Settings,
    hub: Hub,
    session: Session,
    owner: str,
) -> Text:
    """Look the text, or the set of images, up where it is. Raises DatasetNotFound, DatasetRefused, HubUnreachable."""
    path = f"{role}.dataset"
    split = ref.split or ("train" if role == "calibration" else "test")
    if ref.source == "bundled":
        try:
            if images:
                bundled_images(ref.id)
                return Text(ref, None)
            return Text(ref, _bundled_bytes(ref.id, split))
        except NotBundledError as error:
            raise DatasetNotFound(f"{path}.id", str(error)) from error
    if ref.source == "upload":
        with transaction(session, write=False):
            query = select(Dataset).where(Dataset.id == ref.id, Dataset.owner == owner)
            row = session.scalars(query).one_or_none()
        if row is None:
            raise DatasetNotFound(f"{path}.id", f"there is no uploaded text {ref.id}")
        size, suffix = row.bytes, row.suffix
    elif ref.source == "local":
        file = below_roots(ref.id, settings.model_roots, path=f"{path}.id", missing=DatasetNotFound)
        if images and file.is_dir():
            return Text(ref, None)
        if not file.is_file():
            raise DatasetRefused(f"{path}.id", f"{ref.id} is not a file")
        size, suffix = file.stat().st_size, file.suffix.lower()
    else:
        if ref.file is None:
            raise DatasetRefused(f"{path}.file", f"name the file inside the dataset repository {ref.id}")
        commit, found = hub.dataset_file(ref.id, ref.file, ref.revision, path=path)
        ref = ref.model_copy(update={"revision": commit})
        size, suffix = found or 0, "." + ref.file.rpartition(".")[2].lower() if ref.file else ""
    allowed = IMAGE_SUFFIXES if images else SUFFIXES
    if suffix not in allowed:
        what = "a set of images" if images else "a text"
        raise DatasetRefused(
            f"{path}.id", f"{what} ends in {', '.join(allowed)}, not in {suffix or 'nothing'}"
        )
    plain = not images and suffix != ".parquet" and size > 0  # a Parquet file is compressed
    return Text(ref, int(size * _SHARES[split]) if plain else None)


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


@lru_cache
def _bundled_bytes(name: str, split: str) -> int:
    return len(bundled_text(name, split).encode())
