"""UUIDv7 by RFC 9562."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.shared import ids


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_last", 0)


def test_layout() -> None:
    """The example of RFC 9562, appendix A.6: 2022-02-22T19:22:22Z is 0x017F22E279B0 milliseconds."""
    made = ids.uuid7(1645557742000 * 1_000_000)
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert made.int >> 80 == 0x017F22E279B0


def test_the_fraction_of_the_millisecond_is_kept() -> None:
    made = ids.uuid7(1645557742000 * 1_000_000 + 500_000)
    assert made.int >> 64 & 0xFFF == 2048


@pytest.mark.parametrize("step", [0, -1_000_000_000])
def test_ids_increase_when_the_clock_does_not(step: int) -> None:
    start = time.time_ns()
    made = [ids.uuid7(start + step * index) for index in range(5000)]
    assert made == sorted(made)
    assert len(set(made)) == 5000


def test_threads_make_different_ids() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ids.new_id("job"), range(4000)))
    assert len(set(made)) == 4000
    assert all(len(one) == 40 and one.startswith("job_") for one in made)
