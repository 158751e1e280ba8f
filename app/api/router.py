"""Our route and router classes: JSON bodies only, every problem documented, `Allow` complete."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from app.api.errors import MEDIA_TYPE, ProblemError
from quantry.contract import Problem

_ALWAYS = {
    400: "The request cannot be read",
    401: "The API key is missing or not valid",
    403: "The API key lacks the scope",
    413: "The body is too large",
    422: "A field of the request is wrong",
    429: "Too many unfinished jobs",
    500: "The server failed",
    503: "Something that the server needs does not answer; try again",
}
_WITH_PATH = {404: "No such resource, or it belongs to somebody else"}
_WITH_BODY = {415: "The body is not JSON"}
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_SCHEMA = {"schema": {"$ref": "#/components/schemas/Problem"}}


def problems(**statuses: str) -> dict[int | str, dict[str, Any]]:
    """Documentation of more problems of one route, as in `problems(_409="The job has not finished")`."""
    return {int(status.removeprefix("_")): _documented(text) for status, text in statuses.items()}


class Route(APIRoute):
    """A route that documents the problems it can answer with, and takes no body but JSON.

    Below /v1 it takes no query parameter but its own: a filter with a typing mistake would filter nothing.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        texts = dict(_ALWAYS)
        if "{" in path:
            texts |= _WITH_PATH
        responses = {status: _documented(text) for status, text in texts.items()}
        super().__init__(
            path, endpoint, **{**options, "responses": {**responses, **(options.get("responses") or {})}}
        )
        if self.body_field is not None:
            self.responses.setdefault(415, _documented(_WITH_BODY[415]))

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if self.path.startswith("/v1/"):
            handle = _with_known_query(handle, [field.alias for field in self.dependant.query_params])
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not (
                kind.startswith("application/") and kind.endswith("+json")
            ):
                detail = f"send application/json, not {kind or 'a body without Content-Type'}"
                raise ProblemError(
                    415, "unsupported-media-type", detail, headers={"Accept": "application/json"}
                )
            return await handle(request)

        return handle_json


def _with_known_query(handle: Handler, known: Sequence[str]) -> Handler:
    async def handle_known(request: Request) -> Response:
        for name in request.query_params:
            if name not in known:
                detail = (
                    f"no such parameter; there is {', '.join(known)}"
                    if known
                    else "no parameter is taken here"
                )
                raise RequestValidationError(
                    [{"type": "extra_forbidden", "loc": ("query", name), "msg": detail}]
                )
        return await handle(request)

    return handle_known


class Router(APIRouter):
    """A router of such routes."""

    def __init__(self, *, prefix: str = "", tags: list[str] | None = None) -> None:
        super().__init__(prefix=prefix, tags=list(tags or []), route_class=Route)


def allowed_methods(routers: Sequence[APIRouter]) -> Callable[[str], list[str]]:
    """A function from a path to the methods that any route of `routers` supports there.

    A router answers 405 from the first route that fits, so it names that route's methods only.
    """
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

    def allowed(path: str) -> list[str]:
        methods = {
            method for route in routes if route.path_regex.match(path) for method in route.methods or ()
        }
        return sorted(methods | ({"HEAD"} if "GET" in methods else set()))

    return allowed


def document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The app's OpenAPI document, made once, with the schema of problems."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            _never_null(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


def _never_null(schema: dict[str, Any]) -> None:
    """A parameter is there or not, but never null: `str | None` means that it may be left out."""
    for item in schema["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                kinds = parameter["schema"].pop("anyOf", None)
                if kinds is not None:
                    (kind,) = (kind for kind in kinds if kind != {"type": "null"})
                    parameter["schema"] |= kind


def _documented(text: str) -> dict[str, Any]:
    return {"description": text, "content": {MEDIA_TYPE: _SCHEMA}}
