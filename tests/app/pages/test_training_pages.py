"""The form for fixed-point training, posted as a browser does: every field, most of them as they stand."""

from __future__ import annotations

import html
from typing import Any

import factories
import httpx2
import numpy as np
import pytest

from app.pages.forms import DEFAULTS
from quantry.client import Client
from quantry.training import FixedPointTrainingStep
from tests.live_server import LiveServer

FORM = {**DEFAULTS, "method": "fixed_point_training", "action": "submit"}


@pytest.fixture
def form(live: LiveServer) -> dict[str, str]:
    """For a tiny network and images that lie on the server."""
    root = live.settings.model_roots[0]
    if not (root / "resnet").exists():
        factories.write_convnet(root / "resnet", "cifar_resnet")
        images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
        np.savez(root / "images.npz", images=images, labels=np.arange(8) % 3)
    data = "local:images.npz"
    return {**FORM, "model": "local:resnet", "calibration": data, "evaluation": data}


def step_of(live: LiveServer, answer: httpx2.Response) -> FixedPointTrainingStep:
    assert answer.status_code == 303, html.unescape(answer.text)
    with Client(live.url, live.key) as client:
        (step,) = client.job(answer.headers["location"].rpartition("/")[2]).spec.recipe
    assert isinstance(step, FixedPointTrainingStep)
    return step


def test_the_form_as_it_stands_makes_the_published_training(
    live: LiveServer, user: httpx2.Client, form: dict[str, str]
) -> None:
    step = step_of(live, user.post("/", data=form))
    assert step.gradient is not None
    assert (step.bits, step.gradient.interval, step.epochs, step.samples) == (4, "large_gradient", 160, None)


def test_the_fields_of_training_are_those_of_the_job(
    live: LiveServer, user: httpx2.Client, form: dict[str, str]
) -> None:
    changed = {**form, "bits": "6", "gradient": "min_max", "epochs": "7", "training_images": "5"}
    step = step_of(live, user.post("/", data=changed))
    assert step.gradient is not None
    assert (step.bits, step.gradient.interval, step.epochs, step.samples) == (6, "min_max", 7, 5)
    assert step_of(live, user.post("/", data={**form, "gradient": "none"})).gradient is None


def test_a_dry_run_of_training_counts_and_submits_nothing(
    live: LiveServer, user: httpx2.Client, form: dict[str, str]
) -> None:
    with Client(live.url, live.key) as client:
        before = len(list(client.jobs()))
        page = user.post("/", data={**form, "action": "estimate", "epochs": "12"})
        assert page.status_code == 200
        assert "Dry run" in page.text
        assert 'name="epochs" value="12"' in page.text
        assert len(list(client.jobs())) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": "0"}, "epochs"),
        ({"epochs": "many"}, "epochs"),
        ({"group_size": "32"}, "group_size: fixed-point training does not take it"),
        ({"correction": "softmax_bias"}, "correction: fixed-point training does not take it"),
        ({"training_images": "9"}, "7 images; 9 were asked for"),
        ({"method": "gptq", "epochs": "3"}, "epochs: only fixed-point training takes it"),
        ({"gradient": "widest"}, "gradient"),
    ],
)
def test_what_does_not_fit_is_named_and_the_form_kept(
    user: httpx2.Client, form: dict[str, str], changed: dict[str, Any], said: str
) -> None:
    answer = user.post("/", data={**form, **changed})
    assert answer.status_code == 422
    alert = html.unescape(answer.text).partition('role="alert"')[2].partition("</div>")[0]
    assert said in alert
    assert "fixed_point_training" in answer.text
    assert form["model"] in answer.text
