"""Accept with weights and wildcards; Prefer with other preferences around it."""

from __future__ import annotations

import pytest

from app.api.errors import ProblemError
from app.api.negotiation import choose, wait_seconds

JSON, STREAM = "application/json", "text/event-stream"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, JSON),
        ("*/*", JSON),
        (STREAM, STREAM),
        ("text/*", STREAM),
        (f"{JSON};q=0.5, {STREAM}", STREAM),
        (f"{STREAM};q=0.2, */*;q=0.1", STREAM),
        (f"{STREAM};q=0, */*", JSON),
        ("text/html, */*;q=0.8", JSON),
        (f"{JSON};q=x, {STREAM};q=0.1", STREAM),
        ("TEXT/EVENT-STREAM", STREAM),
    ],
)
def test_the_best_accepted_type_is_chosen(accept: str | None, expected: str) -> None:
    assert choose(accept, (JSON, STREAM)) == expected


@pytest.mark.parametrize("accept", ["text/html", f"{JSON};q=0", "*/*;q=0", "x"])
def test_nothing_accepted_is_406(accept: str) -> None:
    with pytest.raises(ProblemError) as caught:
        choose(accept, (JSON, STREAM))
    assert caught.value.status == 406


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [(None, None), ("", None), ("wait=30", 30), ("respond-async, wait=5", 5), ("WAIT = 7", 7),
     ("wait=9999999", 60),
     ("wait=-1", None), ("nowait=3", None), ('wait="12"', 12), ("return=minimal; wait=3", 3)],
)  # fmt: skip
def test_wait_is_found_among_preferences(prefer: str | None, seconds: int | None) -> None:
    assert wait_seconds(prefer) == seconds
