"""From the options of `submit` and `estimate` to a JobRequest; local data is uploaded on the way."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantry.cli.session import Session
from quantry.client import InvalidRequest
from quantry.contract import DatasetRef
from quantry.requests import JobRequest
from quantry.wording import contents_text

_NAMED = ("bundled/", "local:", "hub:", "ds_")


@dataclass(frozen=True)
class Options:
    """What was typed; None where nothing was."""

    spec: str | None
    model: str | None
    fields: Mapping[str, Any]
    calibration: str | None
    calibration_fields: Mapping[str, Any]
    evaluation: str | None
    evaluate: bool
    accept: Mapping[str, float | None]
    labels: Sequence[str]


def build_request(session: Session, options: Options) -> JobRequest:
    """The request: the spec file, if any, with the options laid over it. Raises InvalidRequest."""
    body = _read_spec(options.spec) if options.spec else {}
    if options.model:
        body["model"] = options.model
    body |= _given(options.fields)
    calibration = _given(options.calibration_fields)
    if options.calibration:
        calibration["dataset"] = _dataset(session, options.calibration, "--calibration")
    if calibration:
        body["calibration"] = {**_part(body, "calibration"), **calibration}
    if options.evaluation:
        dataset = _dataset(session, options.evaluation, "--evaluation")
        body["evaluation"] = {**_part(body, "evaluation"), "dataset": dataset}
    if not options.evaluate:
        body["evaluation"] = None
    accept = _given(options.accept)
    if accept:
        body["accept"] = {**_part(body, "accept"), **accept}
    if options.labels:
        body["labels"] = {**_part(body, "labels"), **parse_labels(options.labels)}
    if "model" not in body:
        raise InvalidRequest([("model", "name one, such as bundled/opt-tiny, or give --spec")])
    try:
        return JobRequest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise InvalidRequest.of(error) from error


def parse_labels(labels: Sequence[str]) -> dict[str, str]:
    """`k=v`, each; raises InvalidRequest."""
    pairs = [label.partition("=") for label in labels]
    wrong = [
        (f"--label {key}", "write it as name=value")
        for key, sign, value in pairs
        if not (sign and key and value)
    ]
    if wrong:
        raise InvalidRequest(wrong)
    return {key: value for key, _, value in pairs}


def _read_spec(source: str) -> dict[str, Any]:
    """A JSON object from a file, or from standard input for `-`."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        body = json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest([("--spec", f"{source} is not readable JSON: {error}")]) from error
    if not isinstance(body, dict):
        raise InvalidRequest([("--spec", f"{source} must hold one JSON object, as POST /v1/jobs takes it")])
    return body


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _part(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = body.get(name) or {}
    return dict(part) if isinstance(part, dict) else {}


def _dataset(session: Session, text: str, option: str) -> dict[str, Any]:
    """A reference to a text or to images. A path that exists on this machine is uploaded, once for the same bytes."""
    path = Path(text)
    if text.startswith(_NAMED) or not path.exists():
        if not text.startswith((*_NAMED, "/")) and ":" not in text:
            hint = (
                "no such file; else bundled/NAME, ds_..., local:FILE (of the server) or hub:OWNER/NAME:FILE"
            )
            raise InvalidRequest([(option, f"{text}: {hint}")])
        return DatasetRef.parse(text).model_dump(mode="json", exclude_none=True)
    if not path.is_file():
        raise InvalidRequest([(option, f"{text} is a folder; give one .txt, .jsonl, .parquet or .npz file")])
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    known = next((d for d in session.client.datasets() if (d.sha256, d.name) == (digest, path.name)), None)
    dataset = known or session.client.upload_dataset(path)
    verb = "uses the upload" if known else "uploaded as"
    session.say(f"{path.name}: {verb} {dataset.id} ({contents_text(dataset)})")
    return {"source": "upload", "id": dataset.id}
