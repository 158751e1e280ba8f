"""API keys: `qz_<id>_<secret>`, a readable id and 32 random bytes. The database has only their SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.shared import database
from app.shared.database import transaction
from app.shared.errors import KeyRefused, NotFound, ScopeMissing
from app.shared.tables import ApiKey

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_FORM = re.compile(r"qz_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_NOBODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who a request is from, and what the key may do: `admin` includes `write`, `write` includes `read`."""

    key_id: str
    owner: str
    scopes: frozenset[str]

    def require(self, scope: Scope) -> None:
        """Raises ScopeMissing unless the key may do what `scope` names."""
        sufficient = SCOPES[SCOPES.index(scope) :]
        if not self.scopes.intersection(sufficient):
            held = ", ".join(sorted(self.scopes)) or "none"
            raise ScopeMissing(f"this needs an API key with the scope `{scope}`; yours has: {held}")


def create_key(
    session: Session,
    *,
    owner: str,
    name: str,
    scopes: Sequence[Scope] = SCOPES,
    lifetime: timedelta | None = None,
    now: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Store a new key. The second value is the key itself: it is shown once and kept nowhere.

    Raises ValueError for an unknown scope, none at all, or a lifetime that is over already.
    """
    unknown = set(scopes) - set(SCOPES)
    if unknown or not scopes:
        raise ValueError(f"scopes must be some of {', '.join(SCOPES)}, not {sorted(unknown) or 'nothing'}")
    if lifetime is not None and lifetime <= timedelta():
        raise ValueError("the lifetime of a key must be positive")
    key_id = secrets.token_hex(6)
    key = f"qz_{key_id}_{secrets.token_urlsafe(32)}"
    with transaction(session):
        now = now or database.now(session)
        row = ApiKey(
            id=key_id,
            owner=owner,
            name=name,
            sha256=_digest(key),
            scopes=sorted(set(scopes), key=SCOPES.index),
            created_at=now,
            expires_at=now + lifetime if lifetime is not None else None,
        )
        session.add(row)
    return row, key


def _digest(key: str) -> str:
    """SHA-256 is enough for 256 random bits: there is no dictionary to slow down."""
    return hashlib.sha256(key.encode()).hexdigest()


def verify_key(session: Session, key: str, *, now: datetime | None = None) -> Caller:
    """Whose key this is. Raises KeyRefused, with one message for unknown, wrong and revoked keys."""
    form = _FORM.fullmatch(key)
    if form is None:
        raise KeyRefused("the API key is not of the form qz_<id>_<secret>")
    with transaction(session, write=False):
        now = now or database.now(session)
        query = select(ApiKey).where(ApiKey.id == form[1]).execution_options(populate_existing=True)
        row = session.scalars(query).one_or_none()
    known = row.sha256 if row is not None else _NOBODY
    equal = hmac.compare_digest(known, _digest(key))
    if row is None or not equal or row.revoked_at is not None:
        raise KeyRefused("the API key is unknown or was revoked")
    if row.expires_at is not None and row.expires_at <= now:
        raise KeyRefused(f"the API key expired at {row.expires_at.isoformat(timespec='seconds')}")
    return Caller(row.id, row.owner, frozenset(row.scopes))


def list_keys(session: Session, *, owner: str | None = None) -> list[ApiKey]:
    """Keys, oldest first; of one owner or of all."""
    query = select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)
    with transaction(session, write=False):
        return list(session.scalars(query if owner is None else query.where(ApiKey.owner == owner)))


def revoke_key(session: Session, key_id: str, *, owner: str | None = None) -> None:
    """Refuse the key from now on; idempotent. Raises NotFound."""
    with transaction(session):
        conditions = [ApiKey.id == key_id] + ([ApiKey.owner == owner] if owner is not None else [])
        revoked = func.coalesce(ApiKey.revoked_at, database.now(session))
        changed = session.scalars(
            update(ApiKey).where(*conditions).values(revoked_at=revoked).returning(ApiKey.id)
        ).all()
        if not changed:
            raise NotFound(f"there is no API key {key_id!r}")
