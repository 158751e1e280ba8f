"""From the submit form to a JobRequest, and back to a form that keeps what was typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from quantry.requests import JobRequest

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
    "gradient": "large_gradient",
    "epochs": "",
    "training_images": "",
}
TRAINING = "fixed_point_training"
_OF_TRAINING = ("gradient", "epochs", "training_images")
_OF_OTHERS = ("correction", "group_size", "symmetric", "samples", "sequence_length")


class FormError(Exception):
    """What is wrong with a form: one line a field."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def request_of(fields: Mapping[str, str]) -> JobRequest:
    """The request that a form stands for; an empty field means the server's default. Raises FormError."""
    given = {name: value.strip() for name, value in fields.items() if value.strip()}
    body: dict[str, Any] = {name: given[name] for name in ("model", "format") if name in given}
    body["evaluation"] = {"dataset": given["evaluation"]} if "evaluation" in given else None
    trains = given.get("method") == TRAINING
    _check_unused(given, _OF_OTHERS if trains else _OF_TRAINING, trains=trains)
    body |= _training(given) if trains else _others(given)
    if "calibration" in given:
        body["calibration"]["dataset"] = given["calibration"]
    try:
        return JobRequest.model_validate(body)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'form'}: {e['msg']}" for e in error.errors()]
        raise FormError(lines) from error


def _training(given: Mapping[str, str]) -> dict[str, Any]:
    step: dict[str, Any] = {"method": TRAINING}
    names = {"bits": "bits", "epochs": "epochs", "training_images": "samples"}
    step |= {field: _number(given[name]) for name, field in names.items() if name in given}
    if "gradient" in given:
        step["gradient"] = None if given["gradient"] == "none" else {"interval": given["gradient"]}
    return {"recipe": [step], "calibration": {}}


def _others(given: Mapping[str, str]) -> dict[str, Any]:
    body: dict[str, Any] = {name: given[name] for name in ("method", "correction") if name in given}
    body |= {name: _number(given[name]) for name in ("bits", "group_size") if name in given}
    body["symmetric"] = given.get("symmetric", "true") == "true"
    read = ("samples", "sequence_length")
    body["calibration"] = {name: _number(given[name]) for name in read if name in given}
    return body


def _check_unused(given: Mapping[str, str], names: tuple[str, ...], *, trains: bool) -> None:
    """That nobody has changed a field which the method does not look at. Raises FormError."""
    changed = [name for name in names if name in given and given[name] != DEFAULTS[name]]
    who = "fixed-point training does not take it" if trains else "only fixed-point training takes it"
    if changed:
        raise FormError([f"{name}: {who}; leave it as it was" for name in changed])


def _number(text: str) -> int | str:
    """A whole number, or the text as it is: the contract says best what is wrong with it."""
    return int(text) if text.isdecimal() and len(text) < 12 else text
