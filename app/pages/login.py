"""Who looks at a page: the API key, pasted once, kept in a cookie that scripts cannot read.

The cookie is checked against the database at every request, so a revoked key ends its sessions. Other sites
cannot use it: SameSite=Strict keeps it off their requests, and a form that comes from another origin (also
another port of this host, which is the same site) is refused.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qsl, quote, urlsplit

from fastapi import Depends, Request, Response

from app.api.deps import ServicesDep
from app.api.errors import ProblemError
from app.security import Caller, verify_key
from app.shared.errors import KeyRefused

COOKIE = "quantry_key"


class LoginNeeded(Exception):
    """No key, or one that is not valid any more."""


def _viewer(request: Request, services: ServicesDep) -> Caller:
    key = request.cookies.get(COOKIE)
    if not key:
        raise LoginNeeded
    try:
        with services.sessions() as session:
            caller = verify_key(session, key)
    except KeyRefused as error:
        raise LoginNeeded from error
    request.scope["quantry.key_id"] = caller.key_id
    caller.require("read")
    return caller


Viewer = Annotated[Caller, Depends(_viewer)]


def _author(caller: Viewer) -> Caller:
    caller.require("write")
    return caller


Author = Annotated[Caller, Depends(_author)]


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form that was sent from one of our own pages."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    if site not in ("same-origin", "none") or (origin and urlsplit(origin).netloc != request.url.netloc):
        raise ProblemError(
            403, "cross-origin", "this form was sent from another site; use the pages of this server"
        )
    try:
        text = (await request.body()).decode("ascii")
        return dict(parse_qsl(text, strict_parsing=bool(text), max_num_fields=64, errors="strict"))
    except ValueError as error:
        raise ProblemError(400, "invalid-body", "the form cannot be read") from error


Fields = Annotated[dict[str, str], Depends(_fields)]


def sign_in(response: Response, key: str, *, secure: bool) -> None:
    """Keep the key until the browser is closed."""
    response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure, path="/")


def sign_out(response: Response) -> None:
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", path="/")


def login_path(request: Request) -> str:
    """The login page, which leads back to where the visitor wanted to go."""
    wanted = request.url.path if request.method == "GET" else "/"
    return "/login" if wanted == "/" else f"/login?next={quote(wanted)}"


def safe_next(path: str | None) -> str:
    """A path of this server: never another host, however it is written."""
    if not path or not path.startswith("/") or path.startswith("//") or "\\" in path:
        return "/"
    return path if path.isprintable() else "/"
