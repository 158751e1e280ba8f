"""What can go wrong between a user and a server. Each message says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx2
from pydantic import ValidationError

from quantry.contract import Problem


class QuantryError(Exception):
    """Base of every error that the client raises."""


class InvalidRequest(QuantryError):
    """The request cannot be sent: a field is wrong or missing. `fields` are (path, reason)."""

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {reason}" if path else reason for path, reason in fields))
        self.fields = tuple(fields)

    @classmethod
    def of(cls, error: ValidationError) -> InvalidRequest:
        return cls(
            [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        )


class ConnectionFailed(QuantryError):
    """No answer from the server."""


class WaitTimeout(QuantryError, TimeoutError):
    """The job goes on, but it did not finish in the time given."""


class ProblemError(QuantryError):
    """The server refused: RFC 9457 problem details.

    status: of HTTP. type: stable and short enough to branch on. errors: one entry a wrong field.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(_problem_text(problem))
        self.problem = problem
        self.status = problem.status
        self.type = problem.type
        self.title = problem.title
        self.detail = problem.detail
        self.errors = problem.errors or []


class Unauthorized(ProblemError):
    """No key, a wrong or expired one, or one without the scope that is needed."""


def problem_of(response: httpx2.Response) -> ProblemError:
    """The error that a response of 400 or more stands for; its body must have been read."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # not ours: a proxy, or another program on this port
        detail = f"{response.request.url} answered {response.status_code} with a body that is not of Quantry"
        problem = Problem(title=response.reason_phrase or "Error", status=response.status_code, detail=detail)
    return (Unauthorized if problem.status in (401, 403) else ProblemError)(problem)


def _problem_text(problem: Problem) -> str:
    lines = [f"{problem.title} ({problem.status})" + (f": {problem.detail}" if problem.detail else "")]
    fields = [_field(entry) for entry in problem.errors or []]
    lines += [
        f"  {field}" for field in fields if field != problem.detail
    ]  # a single one is the detail already
    if problem.status == 401:
        lines.append("Give the server's API key in QUANTRY_API_KEY; `quantry-server keys create` makes one.")
    return "\n".join(lines)


def _field(entry: dict[str, Any]) -> str:
    path = entry.get("path") or entry.get("pointer") or entry.get("loc") or ""
    path = ".".join(map(str, path)) if isinstance(path, list) else str(path)
    reason = str(entry.get("detail") or entry.get("msg") or entry)
    return f"{path}: {reason}" if path else reason
