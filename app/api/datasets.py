"""Texts and images that users upload, to calibrate on and to evaluate with."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app import uploads
from app.api.deps import Reader, Services, ServicesDep, Writer
from app.api.router import Router, problems
from app.images import inspect_files
from app.multipart import MEDIA_TYPE, receive_files
from app.shared.errors import NotFound
from quantry.contract import DatasetPage, DatasetRead

router = Router(prefix="/v1/datasets", tags=["datasets"])

_ID = re.compile(r"ds_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def _dataset_id(
    dataset_id: Annotated[str, Path(description="as the server gave it: ds_ and a UUID")],
) -> str:
    if not _ID.fullmatch(dataset_id):
        raise NotFound(f"there is no dataset {dataset_id!r}")
    return dataset_id


DatasetId = Annotated[str, Depends(_dataset_id)]


@router.post(
    "",
    status_code=201,
    response_model=DatasetRead,
    responses={
        200: {"model": DatasetRead, "description": "These bytes are there already under this name"},
        **problems(_507="The disk is full"),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                MEDIA_TYPE: {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "files": {"type": "array", "items": {"type": "string", "format": "binary"}}
                        },
                    }
                },
            },
        }
    },
)
async def upload_dataset(
    request: Request,
    services: ServicesDep,
    caller: Writer,
    name: Annotated[
        str,
        Query(
            min_length=1,
            max_length=255,
            pattern=r"^[^\x00-\x1f\x7f/\\]+$",
            description="the file's name; .txt, .jsonl, .parquet or .npz says its kind. Of files: any",
        ),
    ],
) -> Response:
    """Upload a text as the raw body (UTF-8, JSON lines, or Parquet with a column of strings), or images.

    Images are an .npz file as the raw body, with `images` and `labels` or `x_train`, `y_train`, `x_test` and
    `y_test`; or JPEG and PNG files as multipart/form-data, with `labels.csv`, `labels.json` or `labels.txt`.
    Streamed to the disk, so the size is bounded by the server's limit, not by its memory.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() == MEDIA_TYPE:
        file, sha256, size = await receive_files(request.stream(), kind, services.storage)
        check = inspect_files
    else:
        file, sha256, size = await uploads.receive(request.stream(), services.storage)
        check = uploads.inspect

    def store() -> tuple[DatasetRead, bool]:
        with services.sessions() as session:
            return uploads.store(
                session,
                services.storage,
                file,
                owner=caller.owner,
                name=name,
                sha256=sha256,
                size=size,
                check=check,
            )

    dataset, new = await run_in_threadpool(store)
    headers = {"Location": f"/v1/datasets/{dataset.id}"}
    return Response(dataset.model_dump_json(), 201 if new else 200, headers, "application/json")


@router.get("", response_model=DatasetPage)
def list_datasets(services: ServicesDep, caller: Reader) -> DatasetPage:
    """The datasets of the key's owner, newest first."""
    with services.sessions() as session:
        return DatasetPage(items=tuple(uploads.list_datasets(session, owner=caller.owner)))


@router.get("/{dataset_id}", response_model=DatasetRead)
def read_dataset(caller: Reader, dataset_id: DatasetId, services: ServicesDep) -> DatasetRead:
    """Name, size, digest, and number of documents or images of a dataset."""
    with services.sessions() as session:
        return uploads.get(session, dataset_id, owner=caller.owner)


@router.delete(
    "/{dataset_id}",
    status_code=204,
    response_class=Response,
    responses={**problems(_409="An unfinished job needs the dataset")},
)
def delete_dataset(caller: Writer, dataset_id: DatasetId, services: ServicesDep) -> Response:
    """Delete a dataset. Refused while a job that reads it has not finished."""
    _delete(services, dataset_id, caller.owner)
    return Response(status_code=204)


def _delete(services: Services, dataset_id: str, owner: str) -> None:
    with services.sessions() as session:
        uploads.delete(session, services.storage, dataset_id, owner=owner)
