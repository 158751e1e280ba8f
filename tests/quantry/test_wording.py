"""How numbers are said."""

from __future__ import annotations

import math

import pytest

from quantry.contract import BiasCompensationStep, GptqStep, RtnStep
from quantry.wording import bytes_text, change_text, number_text, recipe_text, seconds_text


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (4_050_000, "4.05 MB"),
        (999_600, "1 MB"),
        (2e15, "2,000 TB"),
    ],
)
def test_bytes(count: float, said: str) -> None:
    assert bytes_text(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.042, "0.042 s"),
        (9.96, "10 s"),
        (41.4, "41 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert seconds_text(seconds) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (14.6128, "14.613"),
        (5840.04, "5840.0"),
        (1.23e5, "1.23e+05"),
        (0.0, "0.000"),
        (math.inf, "inf"),
    ],
)
def test_figures(value: float | None, said: str) -> None:
    assert number_text(value) == said


@pytest.mark.parametrize(
    ("value", "base", "said"),
    [
        (15, 10, "+50.00 %"),
        (9, 10, "-10.00 %"),
        (100, 10, "+900 %"),
        (None, 10, ""),
        (1, None, ""),
        (1, 0, ""),
        (math.inf, 1, ""),
    ],
)
def test_changes(value: float | None, base: float | None, said: str) -> None:
    assert change_text(value, base) == said


def test_recipes() -> None:
    recipe = (
        GptqStep(bits=3, group_size=64, symmetric=False),
        BiasCompensationStep(granularity="position_channel"),
    )
    assert recipe_text(recipe) == "GPTQ 3 bits, groups of 64, asymmetric + bias compensation per position"
    assert recipe_text((RtnStep(bits=8),)) == "RTN 8 bits"
