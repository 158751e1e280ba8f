"""From the submit form to a JobRequest, and back to a form that keeps what was typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from quantry.contract import JobRequest

DEFAULTS: dict[str, str] = {
    "model": "bundled/opt-tiny",
    "bits": "4",
    "method": "gptq",
    "correction": "bias_compensation",
    "group_size": "",
    "symmetric": "true",
    "format": "auto",
    "calibration": "bundled/pydoc",
    "samples": "128",
    "sequence_length": "",
    "evaluation": "bundled/pydoc",
}


class FormError(Exception):
    """What is wrong with a form: one line a field."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def request_of(fields: Mapping[str, str]) -> JobRequest:
    """The request that a form stands for; an empty field means the server's default. Raises FormError."""
    given = {name: value.strip() for name, value in fields.items() if value.strip()}
    plain = ("model", "method", "correction", "format")
    body: dict[str, Any] = {name: given[name] for name in plain if name in given}
    body |= {name: _number(given[name]) for name in ("bits", "group_size") if name in given}
    body["symmetric"] = given.get("symmetric", "true") == "true"
    calibration: dict[str, Any] = {
        name: _number(given[name]) for name in ("samples", "sequence_length") if name in given
    }
    if "calibration" in given:
        calibration["dataset"] = given["calibration"]
    body["calibration"] = calibration
    body["evaluation"] = {"dataset": given["evaluation"]} if "evaluation" in given else None
    try:
        return JobRequest.model_validate(body)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'form'}: {e['msg']}" for e in error.errors()]
        raise FormError(lines) from error


def _number(text: str) -> int | str:
    """A whole number, or the text as it is: the contract says best what is wrong with it."""
    return int(text) if text.isdecimal() and len(text) < 12 else text
