"""Bodies that only the server's administration uses; everything else is in quantry.contract and quantry.reports."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from quantry.base import Model, Name


class KeyRequest(Model):
    """A new API key. `admin` includes `write`, `write` includes `read`."""

    name: Name = Field(max_length=255, description="what the key is for")
    owner: Name | None = Field(None, max_length=128, description="whose jobs it sees; null: the caller's")
    scopes: tuple[Literal["read", "write", "admin"], ...] = Field(
        ("read", "write"), min_length=1, max_length=3
    )
    lifetime_s: int | None = Field(None, ge=1, le=10 * 365 * 86400, description="null: until it is revoked")


class KeyRead(Model):
    """An API key without its secret."""

    id: str
    owner: str
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class KeyCreated(KeyRead):
    """`key` is shown here once and kept nowhere."""

    key: str


class KeyPage(Model):
    items: tuple[KeyRead, ...]


class Health(Model):
    status: Literal["ok"]
