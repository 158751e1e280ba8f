"""Where the dataset that a request names lies: bundled, among the uploads, below the model roots, on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.intake.errors import DatasetNotFound, DatasetRefused
from app.intake.folders import below_roots
from app.intake.hub import Hub
from app.shared.database import transaction
from app.shared.settings import Settings
from app.shared.storage import Storage
from app.shared.tables import Dataset
from quantry.contract import DatasetRef
from quantry.npz import Split

Role = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Sources:
    """Where to look, and for whom."""

    settings: Settings
    hub: Hub
    session: Session
    owner: str


@dataclass(frozen=True)
class Found:
    """A dataset that is there. ref: with its revision pinned. name: of its file, for messages.

    suffix: lower case, with the dot. bytes: of the file, 0 where they are not known. path: of the file or
    folder; None on the hub.
    """

    ref: DatasetRef
    name: str
    suffix: str
    bytes: int
    path: Path | None


def find(ref: DatasetRef, role: Role, sources: Sources) -> Found:
    """A dataset that is not bundled. Raises DatasetNotFound, DatasetRefused, HubUnreachable."""
    if ref.source == "upload":
        return _upload(ref, role, sources)
    if ref.source == "local":
        return _local(ref, role, sources.settings)
    return _hub(ref, role, sources.hub)


def split_of(ref: DatasetRef, role: Role) -> Split:
    """The part that is read, with the default filled in."""
    return ref.split or ("train" if role == "calibration" else "test")


def check_suffix(found: Found, role: Role, allowed: tuple[str, ...], what: str) -> None:
    """That the file is of a kind that can hold `what`. Raises DatasetRefused."""
    if found.suffix not in allowed:
        raise DatasetRefused(
            f"{role}.dataset.id", f"{what} ends in {', '.join(allowed)}, not in {found.suffix or 'nothing'}"
        )


def _upload(ref: DatasetRef, role: Role, sources: Sources) -> Found:
    with transaction(sources.session, write=False):
        query = select(Dataset).where(Dataset.id == ref.id, Dataset.owner == sources.owner)
        row = sources.session.scalars(query).one_or_none()
    if row is None:
        raise DatasetNotFound(f"{role}.dataset.id", f"there is no uploaded dataset {ref.id}")
    path = Storage(sources.settings.storage).blob(row.sha256, row.suffix)
    return Found(ref, row.name, row.suffix, row.bytes, path)


def _local(ref: DatasetRef, role: Role, settings: Settings) -> Found:
    path = below_roots(ref.id, settings.model_roots, path=f"{role}.dataset.id", missing=DatasetNotFound)
    if not path.is_file() and not path.is_dir():
        raise DatasetRefused(f"{role}.dataset.id", f"{ref.id} is neither a file nor a folder")
    return Found(ref, path.name, path.suffix.lower(), path.stat().st_size if path.is_file() else 0, path)


def _hub(ref: DatasetRef, role: Role, hub: Hub) -> Found:
    if ref.file is None:
        raise DatasetRefused(f"{role}.dataset.file", f"name the file inside the dataset repository {ref.id}")
    commit, size = hub.dataset_file(ref.id, ref.file, ref.revision, path=f"{role}.dataset")
    pinned = ref.model_copy(update={"revision": commit})
    suffix = "." + ref.file.rpartition(".")[2].lower()
    return Found(pinned, ref.file.rpartition("/")[2], suffix, size or 0, None)
