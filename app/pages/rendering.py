"""Templates, static files, and errors as pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from app.api.errors import STATUS, ProblemError
from app.pages.login import LoginNeeded, login_path
from app.shared.errors import ServiceError
from quantry.base import SpecError
from quantry.jobs import FINISHED
from quantry.wording import (
    bytes_text,
    figure_change_text,
    figure_text,
    metric_text,
    recipe_text,
    samples_text,
    seconds_text,
)

FOLDER = Path(__file__).parent
STATIC = {path.name: path for path in sorted((FOLDER / "static").iterdir())}
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
HEADERS = {"Cache-Control": "private, no-store", "Vary": "Cookie"}


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "bytes": bytes_text,
        "seconds": seconds_text,
        "metric": metric_text,
        "recipe": recipe_text,
        "time": lambda moment: moment.strftime("%Y-%m-%d %H:%M UTC"),
    }
    made.globals |= {
        "change": figure_change_text,
        "figure": figure_text,
        "finished": FINISHED,
        "samples": samples_text,
        "static": static_url,
    }
    return made


@cache
def static_url(name: str) -> str:
    """The address of a static file; it changes with the file, so that browsers may keep it for ever."""
    return f"/static/{name}?v={hashlib.sha256(STATIC[name].read_bytes()).hexdigest()[:12]}"


def page(template: str, values: Mapping[str, object], status: int = 200) -> HTMLResponse:
    """A whole page; it is nobody else's, so nothing on the way keeps it."""
    return HTMLResponse(environment().get_template(template).render(values), status, HEADERS)


def fragment(template: str, values: Mapping[str, object]) -> str:
    """A part of a page, to be put into one that is open."""
    return environment().get_template(template).render(values)


class PageRoute(APIRoute):
    """A route whose refusals are pages: to the login without a key, else one that says what is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_page(request: Request) -> Response:
            try:
                return await handle(request)
            except LoginNeeded:
                return RedirectResponse(login_path(request), 303, HEADERS)
            except (ServiceError, SpecError, ProblemError, RequestValidationError) as error:
                status, title, detail = refusal(error)
                return page("error.html", {"title": title, "detail": detail}, status)

        return handle_page


def refusal(error: Exception) -> tuple[int, str, str]:
    """Status, title and detail of an error of the service."""
    if isinstance(error, ProblemError):
        return error.status, "The request was refused", error.detail
    if isinstance(error, RequestValidationError):
        return 422, "The request was refused", "the address or the form is not one of this server's pages"
    if isinstance(error, SpecError):
        return 422, "The job cannot be run", str(error)
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    title = getattr(error, "title", "The request was refused")
    path = getattr(error, "path", None)
    return status, title, f"{path}: {error}" if path else str(error)
