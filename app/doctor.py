"""What can be checked before anything is started."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import redis
from sqlalchemy.exc import SQLAlchemyError

import migrations
from app.broker import find_server
from app.shared.database import make_engine
from app.shared.errors import StartError
from app.shared.settings import Settings
from app.shared.storage import Storage


def examine(settings: Settings) -> Iterator[tuple[str, str | None]]:
    """Each part with what is wrong about it, or None."""
    yield "database", _database(settings)
    yield "broker", _broker(settings)
    yield "storage", _storage(settings)
    yield (
        "worker",
        None if importlib.util.find_spec("torch") else "torch is not installed: pip install quantry[worker]",
    )
    missing = [str(root) for root in settings.model_roots if not root.is_dir()]
    yield "models", f"no such folder in QUANTRY_MODEL_ROOTS: {', '.join(missing)}" if missing else None


def _database(settings: Settings) -> str | None:
    try:
        engine = make_engine(settings.database)
        try:
            return None if migrations.is_current(engine) else "not up to date: run `quantry-server migrate`"
        finally:
            engine.dispose()
    except (SQLAlchemyError, OSError) as error:
        return f"does not answer: {error}"


def _broker(settings: Settings) -> str | None:
    if settings.redis_url is None:
        try:
            find_server()
        except StartError as error:
            return str(error)
        return None
    client = redis.Redis.from_url(settings.redis_url.replace("redis+socket://", "unix://"), socket_timeout=5)
    try:
        client.ping()
    except redis.RedisError as error:
        return f"does not answer: {error}"
    finally:
        client.close()
    return None


def _storage(settings: Settings) -> str | None:
    try:
        Storage(settings.storage).prepare()
    except StartError as error:
        return str(error)
    return None
