"""One run of a command: its client, where it prints, and which exit code an error becomes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console

from quantry.client import (
    Client,
    ConnectionFailed,
    InvalidRequest,
    ProblemError,
    QuantryError,
    Unauthorized,
    WaitTimeout,
)

PIPED_WIDTH = 240  # columns of a table in a file or a pipe, where nothing has to fit a screen
OK, JOB_FAILED, REFUSED, UNREACHABLE, NOT_FINISHED, INTERRUPTED = 0, 1, 2, 3, 4, 130


class Session:
    """What a command works with. Results go to `out` (stdout), all that is said beside them to `err`."""

    def __init__(self, client: Client, as_json: bool) -> None:
        self.client = client
        self.as_json = as_json
        self.out = Console(soft_wrap=True, highlight=False)
        if not self.out.is_terminal and "COLUMNS" not in os.environ:
            self.out.width = PIPED_WIDTH
        self.err = Console(stderr=True, soft_wrap=True, highlight=False)

    def print_json(self, value: BaseModel | dict[str, Any]) -> None:
        """The one JSON document of a command."""
        content = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def say(self, text: str) -> None:
        self.err.print(text, markup=False)


@contextmanager
def session(context: typer.Context, as_json: bool) -> Iterator[Session]:
    """Open the client of the command and turn what goes wrong into a message and an exit code."""
    shown = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with Client(context.obj) as client:
            yield Session(client, as_json)
    except QuantryError as error:
        if as_json:
            sys.stdout.write(json.dumps({"error": error_json(error)}, indent=2) + "\n")
        shown.print("quantry:", style="bold red", end=" ")
        shown.print(str(error), markup=False)
        raise typer.Exit(exit_code(error)) from error
    except OSError as error:
        shown.print("quantry:", style="bold red", end=" ")
        shown.print(str(error), markup=False)
        raise typer.Exit(REFUSED) from error
    except KeyboardInterrupt:
        shown.print("interrupted", markup=False)
        raise typer.Exit(INTERRUPTED) from None


def exit_code(error: QuantryError) -> int:
    """See docs/cli.md: the codes are part of the interface."""
    if isinstance(error, WaitTimeout):
        return NOT_FINISHED
    if isinstance(error, ConnectionFailed | Unauthorized):
        return UNREACHABLE
    if isinstance(error, ProblemError):
        return UNREACHABLE if error.status >= 500 else REFUSED
    if isinstance(error, InvalidRequest):
        return REFUSED
    return JOB_FAILED


def error_json(error: QuantryError) -> dict[str, Any]:
    """An error for programs: the server's problem, or one of the same form."""
    if isinstance(error, ProblemError):
        return error.problem.model_dump(mode="json", exclude_none=True)
    content: dict[str, Any] = {
        "type": type(error).__name__,
        "title": "The command failed",
        "detail": str(error),
    }
    if isinstance(error, InvalidRequest):
        content["errors"] = [{"path": path, "detail": reason} for path, reason in error.fields]
    return content
