"""What the pages say of jobs on image classifiers, and what the form offers for them."""

from __future__ import annotations

import html
import re
from datetime import UTC, datetime

import httpx2
import pytest

from app.api.methods import METHODS
from app.pages.forms import DEFAULTS, request_of
from app.pages.rendering import fragment
from quantry.jobs import JobRead, State
from quantry.recipe import RepqStep
from quantry.reports import QualityRow
from quantry.requests import JobRequest
from tests.live_server import MODEL

ROWS = (
    QualityRow(metric="top1", dataset="digits", samples=1000, fp=0.9754, rtn=0.6812, quantized=0.9723),
    QualityRow(metric="kl", dataset="digits", samples=1000, fp=0.0, rtn=1.25, quantized=0.01234),
)


@pytest.fixture
def job() -> JobRead:
    request = JobRequest(model="bundled/vit-tiny", bits=4, method="repq")
    return JobRead(
        id="job_1",
        state=State.SUCCEEDED,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        spec=request.resolve(),
        quality=ROWS,
    )


def words(page: str) -> str:
    """The text of a page, one space between words."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_a_job_shows_accuracy_as_per_cent_and_its_change_in_points(job: JobRead) -> None:
    shown = words(fragment("job_live.html", {"job": job, "manifest": None, "attempts": ()}))
    assert "top-1 accuracy digits, 1,000 images 97.54 % 68.12 % −29.42 points 97.23 % −0.31 points" in shown
    assert "KL divergence, nats digits, 1,000 images 0 1.25 0.01234" in shown


def test_the_list_names_the_metric(job: JobRead) -> None:
    values = {
        "jobs": [job],
        "following": None,
        "first": True,
        "form": DEFAULTS,
        "token": "0",
        "wrong": [],
        "estimate": None,
        "models": [],
        "methods": [],
        "corrections": [],
        "datasets": [],
    }
    shown = words(fragment("index.html", values))
    assert "RTN 4 bits + RepQ-ViT 4 bits top-1 accuracy 97.23 % −0.31 points" in shown


def test_the_form_offers_what_the_catalog_has(user: httpx2.Client) -> None:
    page = user.get("/").text
    offered = set(re.findall(r'<option value="(\w+)"', page))
    assert {info.method for info in METHODS.items} <= offered
    assert "fixed-point training (image classifiers)" in page
    assert "RepQ-ViT (image classifiers)" in page
    assert '<option value="gptq" selected>GPTQ</option>' in page
    assert '<option value="bundled/digits">' in page


def test_a_method_for_other_models_is_refused_with_its_reason(user: httpx2.Client) -> None:
    answer = user.post("/", data={"model": MODEL, "bits": "4", "method": "repq"})
    assert answer.status_code == 422
    assert "`repq` does not work on causal language models" in html.unescape(answer.text)


def test_the_form_makes_a_vision_recipe() -> None:
    fields = {**DEFAULTS, "model": "bundled/vit-tiny", "method": "repq", "correction": "softmax_bias"}
    spec = request_of(fields).resolve()
    assert [step.method for step in spec.recipe] == ["rtn", "repq", "softmax_bias"]
    assert spec.activation_step == RepqStep(bits=4)
