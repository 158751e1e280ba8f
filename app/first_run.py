"""What `serve` needs before it can serve: a database of this version, and a first API key."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

import migrations
from app import security
from app.shared.database import make_engine, make_sessions
from app.shared.errors import KeyRefused, StartError
from app.shared.settings import Settings

log = logging.getLogger(__name__)

FIRST_OWNER = "local"


def prepare(settings: Settings) -> None:
    """Migrate, and write the first API key to `data`/api-key, unless one that works is there.

    Raises StartError.
    """
    engine = make_engine(settings.database)
    try:
        migrations.upgrade(engine)
        path = settings.data / "api-key"
        with make_sessions(engine)() as session:
            if path.exists():
                try:
                    security.verify_key(session, path.read_text().strip())
                except KeyRefused as error:
                    log.warning("%s is no longer valid (%s); writing a new key", path, error)
                else:
                    return
            _, key = security.create_key(session, owner=FIRST_OWNER, name="first key, made by serve")
        write_secret(path, key)
    except SQLAlchemyError as error:
        raise StartError(f"the database cannot be used: {error}") from error
    except OSError as error:
        raise StartError(f"the API key cannot be written: {error}") from error
    finally:
        engine.dispose()


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
