"""Take in a dataset: stream it to the storage, check that it is one, record it.

A text is UTF-8 (.txt), JSON objects a line (.jsonl) or Parquet with a column of strings (.parquet). Images are
an .npz file, or files that `multipart.py` received.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.contents import Contents, UploadRefused
from app.images import inspect_npz
from app.shared.database import transaction
from app.shared.errors import Conflict, NotFound
from app.shared.ids import new_id
from app.shared.jobs import UNFINISHED
from app.shared.storage import Storage
from app.shared.tables import Dataset, Job
from quantry.contract import DatasetRead

_MAGIC = {b"PAR1": ".parquet", b"PK\x03\x04": ".npz"}
_NAMES = {".parquet": "a Parquet file", ".npz": "an .npz file"}
_KINDS = {".txt": ".txt", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".parquet": ".parquet", ".npz": ".npz"}
_READ_BYTES = 1 << 20
_MAX_LINE_BYTES = 64 << 20


class DatasetInUse(Conflict):
    type = "dataset-in-use"
    title = "An unfinished job needs the dataset"


async def receive(chunks: AsyncIterator[bytes], storage: Storage) -> tuple[Path, str, int]:
    """Write a body to a file of its own as it comes. Returns the file, its SHA-256 and its size.

    The file is the caller's to move or remove; nothing is left when the body breaks off.
    """
    path = storage.incoming()
    digest, size = hashlib.sha256(), 0

    def write(file: BinaryIO, chunk: bytes) -> None:
        file.write(chunk)
        digest.update(chunk)

    try:
        with path.open("xb") as file:
            async for chunk in chunks:
                size += len(chunk)
                await run_in_threadpool(write, file, chunk)
            await run_in_threadpool(_flush, file)
    except BaseException:  # a client that went away is a cancellation
        path.unlink(missing_ok=True)
        raise
    return path, digest.hexdigest(), size


def inspect(file: Path, name: str) -> Contents:
    """What kind of dataset a file is, by its bytes and its name, and how much of it. Raises UploadRefused."""
    suffix = Path(name).suffix.lower()
    with file.open("rb") as content:
        kind = _MAGIC.get(content.read(4))
        said = _KINDS.get(suffix)
        if said is not None and kind != said and (kind or said in _NAMES):
            wrong = f"is {_NAMES[kind]}" if kind else f"is not {_NAMES[said]}"
            raise UploadRefused(f"{name} {wrong}, which its name denies")
        content.seek(0)
        if kind is not None:
            return _inspect_parquet(file, name) if kind == ".parquet" else inspect_npz(file, name)
        kind = said or (".jsonl" if _looks_like_json_lines(content) else ".txt")
        content.seek(0)
        return _inspect_json_lines(content, name) if kind == ".jsonl" else _inspect_plain(content, name)


def store(
    session: Session,
    storage: Storage,
    file: Path,
    *,
    owner: str,
    name: str,
    sha256: str,
    size: int,
    check: Callable[[Path, str], Contents] = inspect,
) -> tuple[DatasetRead, bool]:
    """Check a received file and make a dataset of it; True if it is new. The file is moved or removed.

    The same bytes under the same name are the dataset that is there already. Raises UploadRefused.
    """
    try:
        found = check(file, name)
        target = storage.blob(sha256, found.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        with transaction(session):
            same = select(Dataset).where(
                Dataset.owner == owner, Dataset.sha256 == sha256, Dataset.name == name
            )
            row = session.scalars(same.where(Dataset.suffix == found.suffix)).first()
            new = row is None
            if row is None:
                row = _row(found, owner=owner, name=name, sha256=sha256, size=size)
                session.add(row)
            os.replace(file, target)  # inside the transaction: `delete` cannot come between
    finally:
        file.unlink(missing_ok=True)
    return read(row), new


def list_datasets(session: Session, *, owner: str) -> list[DatasetRead]:
    """The owner's datasets, newest first."""
    with transaction(session, write=False):
        rows = session.scalars(
            select(Dataset).where(Dataset.owner == owner).order_by(Dataset.id.desc())
        ).all()
    return [read(row) for row in rows]


def get(session: Session, dataset_id: str, *, owner: str) -> DatasetRead:
    """One dataset. Raises NotFound."""
    with transaction(session, write=False):
        return read(_load(session, dataset_id, owner))


def delete(session: Session, storage: Storage, dataset_id: str, *, owner: str) -> None:
    """Forget a dataset, and its bytes if nobody else has them. Raises NotFound, DatasetInUse."""
    with transaction(session):
        row = _load(session, dataset_id, owner)
        job = session.scalars(_needing(dataset_id, owner).limit(1)).first()
        if job is not None:
            raise DatasetInUse(f"job {job} has not finished and reads {dataset_id}; cancel it, or wait")
        session.delete(row)
        session.flush()
        others = select(Dataset.id).where(Dataset.sha256 == row.sha256, Dataset.suffix == row.suffix)
        if session.scalars(others.limit(1)).first() is None:
            storage.blob(row.sha256, row.suffix).unlink(missing_ok=True)


def read(row: Dataset) -> DatasetRead:
    return DatasetRead(**{name: getattr(row, name) for name in DatasetRead.model_fields})


def _inspect_plain(content: BinaryIO, name: str) -> Contents:
    decoder = codecs.getincrementaldecoder("utf-8")()
    characters, offset, blank = 0, 0, True
    while chunk := content.read(_READ_BYTES):
        text = _decode(decoder, chunk, name, offset)
        if "\0" in text:
            raise UploadRefused(f"{name} is not text: it has a zero byte")
        characters, offset, blank = characters + len(text), offset + len(chunk), blank and not text.strip()
    _decode(decoder, b"", name, offset, final=True)
    if blank:
        raise UploadRefused(f"{name} is empty")
    return Contents(".txt", 1, characters)


def _decode(
    decoder: codecs.IncrementalDecoder, chunk: bytes, name: str, offset: int, *, final: bool = False
) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        raise UploadRefused(f"{name} is not UTF-8: byte {place} does not fit") from error


def _inspect_json_lines(content: BinaryIO, name: str) -> Contents:
    documents = characters = number = 0
    while line := content.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise UploadRefused(f"{name}, line {number}: longer than {_MAX_LINE_BYTES} bytes")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UploadRefused(f"{name}, line {number}: not JSON in UTF-8") from error
        texts = (
            [value for value in record.values() if isinstance(value, str)] if isinstance(record, dict) else []
        )
        if not texts:
            raise UploadRefused(f"{name}, line {number}: not an object with a field that is a string")
        documents += 1
        characters += sum(map(len, texts))
    if not documents:
        raise UploadRefused(f"{name} is empty")
    return Contents(".jsonl", documents, characters)


def _inspect_parquet(file: Path, name: str) -> Contents:
    # Imported where it is used: it takes 60 MB that a server without Parquet uploads need not spend.
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            columns = [
                f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
            ]
            if not columns:
                raise UploadRefused(
                    f"{name} has no column of strings; it has {', '.join(schema.names) or 'none'}"
                )
            characters = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=columns):
                for column in batch.columns:
                    characters += pc.sum(pc.utf8_length(column)).as_py() or 0
            documents = parquet.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UploadRefused(f"{name} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    if not characters:
        raise UploadRefused(f"{name} is empty")
    return Contents(".parquet", documents, characters)


def _looks_like_json_lines(content: BinaryIO) -> bool:
    """Whether the first line is a JSON object; asked only where the name has no ending that we know."""
    try:
        return isinstance(json.loads(content.readline(_READ_BYTES)), dict)
    except (ValueError, RecursionError):
        return False


def _row(found: Contents, *, owner: str, name: str, sha256: str, size: int) -> Dataset:
    return Dataset(
        id=new_id("ds"),
        owner=owner,
        name=name,
        suffix=found.suffix,
        bytes=size,
        sha256=sha256,
        documents=found.documents,
        characters=found.characters,
        images=found.images,
        classes=found.classes,
        created_at=datetime.now(UTC),
    )


def _load(session: Session, dataset_id: str, owner: str) -> Dataset:
    query = select(Dataset).where(Dataset.id == dataset_id, Dataset.owner == owner)
    row = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if row is None:
        raise NotFound(f"there is no dataset {dataset_id!r}")
    return row


def _needing(dataset_id: str, owner: str) -> Select[str]:
    """Ids of the owner's unfinished jobs that read this dataset."""
    named = [
        Job.spec[role, "dataset", "id"].as_string() == dataset_id for role in ("calibration", "evaluation")
    ]
    states = [state.value for state in UNFINISHED]
    return select(Job.id).where(Job.owner == owner, Job.state.in_(states), or_(*named))


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
