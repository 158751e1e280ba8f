"""What is said of checkpoints that cannot be read."""

from __future__ import annotations

from pathlib import Path

from worker.models.source import reason_of


def test_a_reason_is_a_line_without_the_place_of_the_folder() -> None:
    folder = Path("/somewhere/models/tiny")
    assert reason_of(OSError(f"no file\n  in {folder}/unet"), folder) == "no file in tiny/unet"
    assert reason_of(ValueError("x" * 1000), folder) == "x" * 400 + " ..."
    assert reason_of(KeyError(), folder) == "KeyError"
