"""What the client's errors say: each thing once, in our own words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from quantry.client import InvalidRequest, ProblemError
from quantry.contract import Problem
from quantry.requests import JobRequest


def test_a_single_wrong_field_is_said_once() -> None:
    entry = {"path": "bits", "detail": "wrong"}
    one = ProblemError(Problem(title="Refused", status=422, detail="bits: wrong", errors=[entry]))
    assert str(one) == "Refused (422): bits: wrong"
    errors = [entry, {"path": "recipe.0", "detail": "too"}]
    two = ProblemError(Problem(title="Refused", status=422, detail="bits: wrong (and 1 more)", errors=errors))
    assert str(two).splitlines()[1:] == ["  bits: wrong", "  recipe.0: too"]


def test_a_request_that_cannot_be_sent_speaks_our_words() -> None:
    with pytest.raises(ValidationError) as caught:
        JobRequest(model="bundled/opt-tiny")
    assert str(InvalidRequest.of(caught.value)).startswith("give `bits`")
