"""Training jobs at submit: what they resolve to, what an estimate says, what is refused before a worker sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
from sqlalchemy.orm import Session, sessionmaker
from starlette.testclient import TestClient

from app.shared import leases
from app.shared.settings import Settings
from app.shared.storage import Storage
from tests.app.api.factories import Jobs
from tests.app.api.test_intake_images import WHOLE, estimate, refused, uploaded

SHORT = {"bits": 4, "method": "fixed_point_training"}
OTHER_JOB = "job_00000000-0000-7000-8000-000000000000"


@pytest.fixture
def root(settings: Settings) -> Path:
    """A model root with a ResNet for small images, a ViT, and labelled images."""
    folder = settings.model_roots[0]
    factories.write_convnet(folder / "resnet", "cifar_resnet")
    factories.write_classifier(folder / "vit", "vit")
    np.savez(folder / "images.npz", **WHOLE)
    return folder


def request(model: str = "resnet", dataset: str = "images.npz", **changes: Any) -> dict[str, Any]:
    """The short form, or with `step` the full one."""
    data = {"dataset": {"source": "local", "id": dataset}}
    step = changes.pop("step", None)
    named = SHORT if step is None else {"recipe": [{"method": "fixed_point_training", "bits": 4, **step}]}
    return {"model": f"local:{model}", **named, "calibration": data, "evaluation": data, **changes}


def test_the_short_form_has_the_published_defaults(client: TestClient, root: Path) -> None:
    answer = client.post("/v1/jobs", json=request())
    assert answer.status_code == 202, answer.text
    spec = answer.json()["spec"]
    (step,) = spec["recipe"]
    grid = step.pop("gradient")
    assert (grid["bits"], grid["interval"], grid["alpha"], grid["beta"]) == (4, "large_gradient", 1e-3, 1e-3)
    assert (step["epochs"], step["batch_size"], step["momentum"], step["weight_decay"]) == (
        160,
        128,
        0.9,
        1e-4,
    )
    assert (step["schedule"], step["milestones"], step["decay"]) == ("step", [0.5, 0.75], 0.1)
    assert (step["range_learning_rate"], step["learning_rate"], step["init"]) == (1e-5, 0.01, "model")
    assert (step["augmentation"], step["activation_bits"]) == ("flip_crop", 4)
    assert spec["format"] == "quantry"
    assert spec["evaluation"]["baselines"] == ["fp"]  # nothing is rounded to nearest


def test_random_weights_need_no_checkpoint_and_learn_faster(client: TestClient, root: Path) -> None:
    (root / "resnet" / "model.safetensors").unlink()
    found = estimate(client, request(step={"init": "random"}))
    assert found["spec"]["recipe"][0]["learning_rate"] == 0.1
    answer = client.post("/v1/estimates", json=request())
    assert "no safetensors weights" in answer.json()["detail"]


def test_an_estimate_lists_layers_and_counts_the_work(client: TestClient, root: Path) -> None:
    few = estimate(client, request(step={"epochs": 1}))
    many = estimate(client, request(step={"epochs": 10_000}))
    assert many["seconds_high"] > 10 * few["seconds_high"]
    kept = {layer["name"]: layer["reason"] for layer in few["layers"] if not layer["quantized"]}
    assert set(kept) == {"resnet.embedder.convolution", "classifier"}
    assert all(kept.values())
    assert few["quantized_bytes"] < few["fp_bytes"]


def test_layers_in_which_the_rule_is_inactive_are_listed(client: TestClient, root: Path) -> None:
    """The last stage of the network has 16 channels of 8x8: 1024 gradients an image, and the rule needs 15 000."""
    quiet = estimate(client, request(step={"batch_size": 32}))
    assert not any("inactive" in warning for warning in quiet["warnings"])
    some = estimate(client, request(step={"batch_size": 10}))
    (said,) = [warning for warning in some["warnings"] if "inactive" in warning]
    assert "in 2 layers: a batch has fewer than 15,000 gradients" in said
    assert "resnet.stages.1.0.layer.0.convolution, resnet.stages.1.0.layer.1.convolution" in said
    every = estimate(client, request(step={"gradient": {"alpha": 1e-6}}))
    (said,) = [warning for warning in every["warnings"] if "inactive" in warning]
    assert "in every quantized layer" in said
    assert "resnet.stages.0.0.layer.0.convolution" in said
    plain = estimate(client, request(step={"gradient": {"alpha": 1e-6, "interval": "min_max"}}))
    assert not any("inactive" in warning for warning in plain["warnings"])


@pytest.mark.parametrize(
    ("changes", "path", "detail"),
    [
        ({"step": {"init": OTHER_JOB}}, "recipe.0.init", "you have no job"),
        ({"step": {"batch_size": 1}}, "recipe.0.batch_size", "batch norm"),
        ({"step": {"validation": 0.2}}, "recipe.0.validation", "without `patience`"),
        ({"step": {"schedule": "cosine", "decay": 0.5}}, "recipe.0.decay", "has no steps"),
        ({"format": "gptq"}, "format", "use quantry or auto"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype", "float32"),
        ({"group_size": 32}, "group_size", "one symmetric grid a layer"),
        ({"correction": "bias_compensation"}, "correction", "leave this out"),
        ({"accept": {"perplexity_increase_max": 0.1}}, "accept.perplexity_increase_max", "no perplexity"),
        ({"model": "tiny"}, "recipe.0", "trains image classifiers"),
    ],
)
def test_requests_that_no_job_can_be_made_of(
    changes: dict[str, Any], path: str, detail: str, client: TestClient, root: Path
) -> None:
    assert detail in refused(client, request(**changes), path, "invalid-request")


@pytest.mark.parametrize(
    ("bits", "said"), [(1, "greater than or equal to 2"), (9, "less than or equal to 8")]
)
def test_bits_are_two_to_eight(bits: int, said: str, client: TestClient, root: Path) -> None:
    for step in ({"bits": bits}, {"gradient": {"bits": bits}}, {"activation_bits": bits}):
        answer = client.post("/v1/jobs", json=request(step=step))
        assert answer.status_code == 422
        assert said in answer.text
    assert client.post("/v1/jobs", json={**request(), "bits": bits}).status_code == 422


def test_the_step_stands_alone_and_names_its_own_samples(client: TestClient, root: Path) -> None:
    recipe = [{"method": "rtn", "bits": 4}, {"method": "fixed_point_training", "bits": 4}]
    body = {**request(step={}), "recipe": recipe}
    assert "stands alone" in refused(client, body, "recipe.1", "invalid-request")
    body = request()
    body["calibration"] = {**body["calibration"], "samples": 20}
    assert "every image" in refused(client, body, "calibration.samples", "invalid-request")
    too_many = request(step={"samples": 37})
    assert "has 36 images; 37 were asked for" in refused(client, too_many, "recipe.0.samples")


def test_other_methods_say_what_convolutional_networks_need(client: TestClient, root: Path) -> None:
    body = {**request(), "method": "uniform"}
    assert "use `fixed_point_training`" in refused(client, body, "recipe.0", "invalid-request")


def test_labels_to_train_on_must_be_there_and_fit_the_head(client: TestClient, root: Path) -> None:
    np.savez(root / "images.npz", images=WHOLE["images"], labels=WHOLE["labels"] + 1)
    assert "has the label 5" in refused(client, request(), "calibration.dataset.id")
    np.savez(root / "images.npz", images=WHOLE["images"])
    assert "has no labels" in refused(client, request(), "calibration.dataset.id")
    good = uploaded(client, **WHOLE)
    body = request()
    body["calibration"] = body["evaluation"] = {"dataset": good}
    assert estimate(client, body)["spec"]["calibration"]["dataset"]["id"] == good["id"]


def test_images_have_the_channels_of_the_network(client: TestClient, root: Path) -> None:
    factories.write_convnet(root / "grey", "cifar_resnet", num_channels=1)
    said = refused(client, request(model="grey"), "calibration.dataset.id")
    assert "has 3 channels, the model takes 1" in said
    np.savez(root / "images.npz", images=WHOLE["images"][..., :1], labels=WHOLE["labels"])
    estimate(client, request(model="grey"))
    estimate(client, request())  # a network of colour images sees grey ones


def test_a_checkpoint_that_is_another_network_is_refused(client: TestClient, root: Path) -> None:
    factories.edit_json(root / "resnet" / "config.json", widths=[8, 32])
    said = refused(client, request(), "model", "model-refused")
    assert "resnet.stages.1.0.layer.0.convolution.weight has the shape [16, 8, 3, 3]" in said


def test_a_start_is_a_finished_job_of_the_same_owner_and_model(
    client: TestClient,
    other: TestClient,
    root: Path,
    sqlite_sessions: sessionmaker[Session],
    settings: Settings,
) -> None:
    made = Jobs(sqlite_sessions, Storage(settings.storage))
    job = client.post("/v1/jobs", json=request()).json()["id"]
    assert "no artifact" in client.post("/v1/jobs", json=request(step={"init": job})).json()["detail"]
    with sqlite_sessions() as session:
        claim = leases.claim(session, job, worker="w")
    assert claim is not None
    made.finish(claim, {"model.safetensors": b"-"})
    answer = client.post("/v1/jobs", json=request(step={"init": job}))
    assert answer.status_code == 202, answer.text
    with sqlite_sessions() as session:
        claim = leases.claim(session, answer.json()["id"], worker="w")
    assert claim is not None
    assert claim.start is not None
    assert Storage(settings.storage).artifact(claim.start).is_dir()
    body = request(step={"init": job})
    assert "you have no job" in other.post("/v1/jobs", json=body).json()["detail"]
    vit = request("vit", step={"init": job})
    assert "both must be of the same model" in client.post("/v1/jobs", json=vit).json()["detail"]
