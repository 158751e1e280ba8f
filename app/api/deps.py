"""What routes ask for: the services of the app, and a caller whose key allows what the route does."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session, sessionmaker

from app.api.keyring import Keyring
from app.api.watch import Watcher
from app.security import Caller, Scope
from app.shared.errors import JobNotFound, KeyRefused
from app.shared.settings import Settings
from app.shared.storage import Storage

_JOB_ID = re.compile(r"job_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Services:
    """What the app was made with. A route opens a session for each piece of work it does.

    Not a dependency that yields one: that would keep its connection until the response is sent.
    """

    settings: Settings
    sessions: sessionmaker[Session]
    storage: Storage
    watcher: Watcher
    keyring: Keyring


async def get_services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]

_bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer qz_...`")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key: `X-API-Key: qz_...`")


def _caller(scope: Scope) -> Callable[..., Coroutine[Any, Any, Caller]]:
    async def caller(
        request: Request,
        services: ServicesDep,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
        header: Annotated[str | None, Depends(_header)],
    ) -> Caller:
        key = bearer.credentials if bearer is not None else header
        if not key:
            raise KeyRefused("send an API key, as `Authorization: Bearer qz_...` or as `X-API-Key: qz_...`")
        found = await services.keyring.caller(key)
        request.scope["quantry.key_id"] = found.key_id
        found.require(scope)
        return found

    return caller


Reader = Annotated[Caller, Depends(_caller("read"))]
Writer = Annotated[Caller, Depends(_caller("write"))]
Admin = Annotated[Caller, Depends(_caller("admin"))]


async def _job_id(job_id: Annotated[str, Path(description="as the server gave it: job_ and a UUID")]) -> str:
    """A text that cannot be the id of a job names no job: 404, as for one that does not exist."""
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFound(job_id)
    return job_id


JobId = Annotated[str, Depends(_job_id)]
"""Stands after the caller in a signature: who has no key learns nothing about ids."""
