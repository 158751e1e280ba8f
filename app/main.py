"""The HTTP application: routers, problems, the outermost layer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from sqlalchemy.orm import Session, sessionmaker

from app import pages
from app.api import datasets, errors, estimates, events, health, jobs, keys, methods, results
from app.api.deps import Services
from app.api.edge import MAX_BODY_BYTES, Edge
from app.api.keyring import Keyring
from app.api.metrics import Metrics
from app.api.router import allowed_methods, document
from app.api.watch import Watcher
from app.shared import database
from app.shared.settings import Settings, get_settings
from app.shared.storage import Storage
from quantry import __version__

ROUTERS = tuple(
    module.router for module in (jobs, events, results, estimates, methods, datasets, keys, health)
)


def create_app(settings: Settings | None = None, *, sessions: sessionmaker[Session] | None = None) -> FastAPI:
    """The application on a database at migration head. Both default to those of this process."""
    settings = settings or get_settings()
    sessions = sessions or database.sessions()
    storage = Storage(settings.storage)
    storage.prepare()
    services = Services(settings, sessions, storage, Watcher(sessions), Keyring(sessions))
    app = FastAPI(
        title="Quantry",
        version=__version__,
        summary="Quantization as a service",
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = services
    app.state.metrics = Metrics()
    for router in ROUTERS:
        app.include_router(router)
    app.include_router(pages.router)
    errors.register(app, allowed_methods((*ROUTERS, pages.router)))
    app.openapi = document(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    app.add_middleware(Edge, limit=partial(_body_limit, settings), observe=app.state.metrics.observe)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.services.watcher.close()


def _body_limit(settings: Settings, method: str, path: str) -> int:
    """Bytes that a body may have: an upload much, everything else little."""
    return settings.max_upload_bytes if (method, path) == ("POST", "/v1/datasets") else MAX_BODY_BYTES
