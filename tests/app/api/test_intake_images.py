"""Images that a job on a classifier names: counted from outside, refused at once, part of the estimate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from app.shared.settings import Settings
from tests.app.api.test_images_api import PNG, npz, send, upload

CLASSES = 5  # of the head; images are 16x16
PIXELS = np.zeros((40, 16, 16, 3), np.uint8)
LABELS = np.arange(40) % CLASSES
WHOLE = {"images": PIXELS, "labels": LABELS}
SPLIT = {"x_train": PIXELS[:30], "y_train": LABELS[:30], "x_test": PIXELS[30:], "y_test": LABELS[30:]}


@pytest.fixture
def root(settings: Settings) -> Path:
    """A model root with a classifier in `vit`."""
    folder = settings.model_roots[0]
    factories.write_classifier(folder / "vit", "vit")
    return folder


def uploaded(client: TestClient, **arrays: Any) -> dict[str, Any]:
    response = upload(client, npz(**arrays), "pets.npz")
    assert response.status_code == 201, response.text
    return {"source": "upload", "id": response.json()["id"]}


def files(labels: list[int], file: str = "labels.csv") -> list[tuple[str, bytes]]:
    """PNG files and, unless there are no labels, their labels.csv."""
    names = [f"{i}.png" for i in range(len(labels) or 40)]
    lines = "".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=False))
    return [(name, PNG) for name in names] + ([(file, lines.encode())] if labels else [])


def request(calibration: Any, evaluation: Any, samples: int = 8, **fields: Any) -> dict[str, Any]:
    return {
        "model": "local:vit",
        "bits": 4,
        "method": "uniform",
        "calibration": {"dataset": calibration, "samples": samples},
        "evaluation": evaluation and {"dataset": evaluation},
        **fields,
    }


def refused(client: TestClient, body: dict[str, Any], path: str, type: str = "dataset-refused") -> str:
    """The detail of a refusal, the same for the dry run and the submit, which keeps nothing."""
    answers = [client.post(f"/v1/{where}", json=body) for where in ("estimates", "jobs")]
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (422, f"/problems/{type}"), answer.text
        assert answer.json()["errors"][0]["path"] == path
    assert client.get("/v1/jobs").json()["items"] == []
    assert answers[0].json()["detail"] == answers[1].json()["detail"]
    return str(answers[0].json()["detail"])


def estimate(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/estimates", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    ("arrays", "split", "available"),
    [
        (WHOLE, None, 36),
        (WHOLE, "test", 4),
        (WHOLE, "all", 40),
        (SPLIT, None, 30),
        (SPLIT, "test", 10),
        (SPLIT, "all", 40),
    ],
)
def test_more_calibration_images_than_there_are(
    client: TestClient, root: Path, arrays: dict[str, Any], split: str | None, available: int
) -> None:
    dataset = {**uploaded(client, **arrays), "split": split}
    detail = refused(client, request(dataset, None, available + 1), "calibration.samples")
    assert f"has {available} images; {available + 1} were asked for" in detail
    assert client.post("/v1/jobs", json=request(dataset, None, available)).status_code == 202


def test_uploaded_files_are_counted(client: TestClient, root: Path) -> None:
    found = send(client, files([0, 1, 2, 3] * 10)).json()
    dataset = {"source": "upload", "id": found["id"]}
    assert "pets (train) has 36 images" in refused(client, request(dataset, None, 37), "calibration.samples")
    assert client.post("/v1/jobs", json=request(dataset, dataset, 36)).status_code == 202


@pytest.mark.parametrize("largest", [CLASSES - 1, CLASSES, 1000])
def test_labels_beyond_the_head(client: TestClient, root: Path, largest: int) -> None:
    """Two classes are fewer than the head has; what counts is their number."""
    labels = [0, largest] * 20
    sets = [
        {"source": "upload", "id": send(client, files(labels)).json()["id"]},
        uploaded(client, images=PIXELS, labels=np.array(labels)),
        uploaded(client, **{**SPLIT, "y_test": np.array(labels[:10])}),
    ]
    for dataset in sets:
        body = request(dataset, dataset)
        if largest < CLASSES:
            assert estimate(client, body)["warnings"]
        else:
            detail = refused(client, body, "evaluation.dataset.id")
            assert f"has the label {largest}, and the model's head knows classes 0 to 4" in detail
        assert estimate(client, request(dataset, None))["layers"]  # calibration needs no labels


def test_channels_that_the_network_does_not_take(client: TestClient, root: Path) -> None:
    factories.edit_json(root / "vit" / "config.json", num_channels=1)
    path = root / "vit" / "model.safetensors"
    tensors = load_file(path)
    kernel = next(name for name in tensors if name.endswith("projection.weight"))
    save_file(
        {**tensors, kernel: np.ascontiguousarray(tensors[kernel][:, :1])}, path, metadata={"format": "pt"}
    )
    colours = uploaded(client, images=np.zeros((40, 4, 4, 3), np.uint8), labels=LABELS)
    grey = uploaded(client, images=np.zeros((40, 4, 4), np.uint8), labels=LABELS)
    assert "has 3 channels, the model takes 1" in refused(
        client, request(colours, grey), "calibration.dataset.id"
    )
    assert "has 3 channels, the model takes 1" in refused(
        client, request(grey, colours), "evaluation.dataset.id"
    )
    assert estimate(client, request(grey, grey))["layers"]


def test_evaluation_needs_labels(client: TestClient, root: Path) -> None:
    sets = [
        {"source": "upload", "id": send(client, files([])).json()["id"]},
        uploaded(client, images=PIXELS),
        uploaded(client, x_train=PIXELS, y_train=LABELS, x_test=PIXELS),
    ]
    for dataset in sets:
        assert "has no labels" in refused(client, request(dataset, dataset), "evaluation.dataset.id")
        assert estimate(client, request(dataset, None))["layers"]


def test_a_split_that_is_not_there(client: TestClient, root: Path) -> None:
    dataset = uploaded(client, x_test=PIXELS, y_test=LABELS)
    detail = refused(client, request(dataset, dataset), "calibration.dataset.split")
    assert "has no split 'train'; it has test" in detail
    unlike = {**uploaded(client, x_train=PIXELS, x_test=PIXELS[:, 1:]), "split": "all"}
    detail = refused(client, request(unlike, None), "calibration.dataset.id")
    assert "train and test differ" in detail
    single = uploaded(client, images=PIXELS[:1], labels=LABELS[:1])
    detail = refused(client, request(single, None, 1), "calibration.dataset.split")
    assert "holds no image" in detail


def test_local_images_are_looked_at_too(client: TestClient, root: Path) -> None:
    np.savez(root / "pets.npz", **WHOLE)
    file = {"source": "local", "id": "pets.npz"}
    assert "pets.npz (train) has 36 images" in refused(client, request(file, None, 37), "calibration.samples")
    np.savez(root / "wrong.npz", images=PIXELS, labels=LABELS - 1)
    wrong = {"source": "local", "id": "wrong.npz"}
    assert "has the label -1" in refused(client, request(file, wrong), "evaluation.dataset.id")
    (root / "pets").mkdir()
    for name, content in files([0, 9] * 20):
        (root / "pets" / name).write_bytes(content)
    folder = {"source": "local", "id": "pets"}
    assert "pets (train) has 36 images" in refused(client, request(folder, None, 37), "calibration.samples")
    assert "has the label 9" in refused(client, request(folder, folder), "evaluation.dataset.id")


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"0.png": None}, "names '0.png', which is not there"),
        ({"labels.txt": b"0.png 0"}, "has labels.csv and labels.txt"),
        ({"labels.csv": b"0.png,dog"}, "'dog' is no class number"),
        ({"labels.csv": b"x" * (17 << 20)}, "the limit is"),
    ],
)
def test_a_folder_that_no_worker_could_read(
    client: TestClient, root: Path, change: dict[str, bytes | None], detail: str
) -> None:
    (root / "pets").mkdir()
    for name, content in {**dict(files([0, 1] * 20)), **change}.items():
        if content is not None:
            (root / "pets" / name).write_bytes(content)
    folder = {"source": "local", "id": "pets"}
    assert detail in refused(client, request(folder, None), "calibration.dataset.id")


def test_folders_without_images_links_out_and_pipes_are_refused(client: TestClient, root: Path) -> None:
    (root / "empty").mkdir()
    empty = {"source": "local", "id": "empty"}
    assert "empty has no .jpg" in refused(client, request(empty, None), "calibration.dataset.id")
    (root / "empty" / "a.png").write_bytes(PNG)
    (root / "empty" / "labels.csv").symlink_to(root / "vit" / "config.json")
    assert "is a link out" in refused(client, request(empty, None), "calibration.dataset.id")
    os.mkfifo(root / "pipe.npz")
    pipe = {"source": "local", "id": "pipe.npz"}
    assert "neither a file nor a folder" in refused(client, request(pipe, None), "calibration.dataset.id")
    (root / "text.npz").write_text("text")
    text = {"source": "local", "id": "text.npz"}
    assert "not a zip archive" in refused(client, request(text, None), "calibration.dataset.id")


def test_an_upload_whose_bytes_are_gone(client: TestClient, root: Path, settings: Settings) -> None:
    dataset = uploaded(client, **WHOLE)
    for blob in (settings.storage / "blobs").rglob("*.npz"):
        blob.unlink()
    assert "pets.npz cannot be read" in refused(client, request(dataset, None), "calibration.dataset.id")


def test_all_evaluation_images_count_in_the_estimate(client: TestClient, root: Path) -> None:
    """Four times the images, where `samples` leaves their number open: more memory and more time."""
    calibration = uploaded(client, **WHOLE)
    few = {**uploaded(client, images=np.repeat(PIXELS, 25, 0), labels=np.repeat(LABELS, 25)), "split": "all"}
    many = {
        **uploaded(client, images=np.repeat(PIXELS, 100, 0), labels=np.repeat(LABELS, 100)),
        "split": "all",
    }
    found = [estimate(client, request(calibration, dataset)) for dataset in (few, many)]
    streams = 3000 * (1 + 3) * 4 * PIXELS[0].size
    loaded = 3000 * PIXELS[0].size
    assert found[1]["peak_memory_bytes"] - found[0]["peak_memory_bytes"] >= streams + loaded
    assert found[1]["seconds_high"] > found[0]["seconds_high"]
    assert not any("not known" in warning for one in found for warning in one["warnings"])


def test_bundled_images_are_counted(client: TestClient) -> None:
    body = {"model": "bundled/vit-tiny", "bits": 4, "method": "repq"}
    whole = estimate(client, body)
    assert not any("not known" in warning for warning in whole["warnings"])
    part = estimate(client, {**body, "evaluation": {"samples": 10}})
    assert part["peak_memory_bytes"] < whole["peak_memory_bytes"]
    assert part["seconds_high"] <= whole["seconds_high"]
    detail = refused(client, {**body, "calibration": {"samples": 8192}}, "calibration.samples")
    assert "bundled/digits (train) has" in detail


def test_ptq4vit_is_refused_without_gelu(client: TestClient, root: Path) -> None:
    factories.edit_json(root / "vit" / "config.json", hidden_act="relu")
    dataset = uploaded(client, **WHOLE)
    body = request(dataset, None, method="ptq4vit")
    assert "hidden_act is `relu`" in refused(client, body, "recipe.1", "invalid-request")
    assert estimate(client, request(dataset, None))["layers"]


def test_smoothquant_is_refused_where_norms_feed_the_residual_stream(client: TestClient, root: Path) -> None:
    factories.write_checkpoint(root / "opt", "opt-post-ln")
    recipe = [{"method": "rtn", "bits": 8}, {"method": "smoothquant"}]
    body = {"model": "local:opt", "recipe": recipe, "calibration": {"samples": 4}}
    assert "do_layer_norm_before is false" in refused(client, body, "recipe.1", "invalid-request")
    assert estimate(client, {**body, "recipe": recipe[:1]})["layers"]


def test_a_block_without_one_of_its_tensors(client: TestClient, root: Path) -> None:
    factories.edit_json(root / "vit" / "config.json", num_hidden_layers=3)
    dataset = uploaded(client, **WHOLE)
    detail = refused(client, request(dataset, None), "model", "model-refused")
    assert "says 3 blocks, the checkpoint holds 2" in detail
