"""The report a user sees: `report.json` for programs, `report.html` for people, both from one Report."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from quantry.reports import Report
from worker.errors import ExportError
from worker.report.page import render

JSON_NAME, HTML_NAME = "report.json", "report.html"


def write_report(folder: Path, report: Report) -> None:
    """Write `report.json` and `report.html` into `folder`, with the pictures that the report names there.

    Raises ExportError if the report holds a figure that JSON cannot carry (NaN or infinity where a number
    is required): a reader must get back what was measured.
    """
    text = report.model_dump_json(indent=2) + "\n"
    try:
        Report.model_validate_json(text)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise ExportError(f"{JSON_NAME}: not a finite number in {fields}") from error
    (folder / JSON_NAME).write_text(text, encoding="utf-8")
    names = report.trajectory.pictures if report.trajectory else {}
    pictures = {name: (folder / path).read_bytes() for name, path in names.items()}
    (folder / HTML_NAME).write_text(render(report, pictures), encoding="utf-8")


__all__ = ["HTML_NAME", "JSON_NAME", "write_report"]
