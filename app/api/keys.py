"""API keys, for administrators of the server: an `admin` key sees and makes keys of every owner."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from fastapi import Path, Response

from app import security
from app.api.deps import Admin, ServicesDep
from app.api.router import Router
from app.api.schemas import KeyCreated, KeyPage, KeyRead, KeyRequest
from app.shared.errors import NotFound
from app.shared.tables import ApiKey

router = Router(prefix="/v1/keys", tags=["keys"])


@router.post("", status_code=201, response_model=KeyCreated)
def create_key(request: KeyRequest, services: ServicesDep, caller: Admin, response: Response) -> KeyCreated:
    """Make a key. The answer is the only place where it ever stands."""
    lifetime = timedelta(seconds=request.lifetime_s) if request.lifetime_s is not None else None
    with services.sessions() as session:
        row, key = security.create_key(
            session,
            owner=request.owner or caller.owner,
            name=request.name,
            scopes=request.scopes,
            lifetime=lifetime,
        )
    response.headers["Location"] = f"/v1/keys/{row.id}"
    response.headers["Cache-Control"] = "no-store"
    return KeyCreated(**_fields(row), key=key)


@router.get("", response_model=KeyPage)
def list_keys(services: ServicesDep, caller: Admin) -> KeyPage:
    """Every key, oldest first, revoked ones too."""
    with services.sessions() as session:
        return KeyPage(items=tuple(KeyRead(**_fields(row)) for row in security.list_keys(session)))


@router.delete("/{key_id}", status_code=204, response_class=Response)
def revoke_key(
    key_id: Annotated[str, Path(description="the middle part of the key")],
    services: ServicesDep,
    caller: Admin,
) -> Response:
    """Refuse a key from now on."""
    if not key_id.isascii() or not key_id.isalnum():
        raise NotFound(f"there is no API key {key_id!r}")
    with services.sessions() as session:
        security.revoke_key(session, key_id)
    services.keyring.forget()
    return Response(status_code=204)


def _fields(row: ApiKey) -> dict[str, Any]:
    return {name: getattr(row, name) for name in KeyRead.model_fields}
