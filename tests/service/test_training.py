"""Fixed-point training through a real server and its worker: submit, follow, start from a result, cancel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.processes import await_that
from tests.service.test_serve import Server

STEP = {"method": "fixed_point_training", "bits": 4, "epochs": 1, "batch_size": 32, "samples": 64}
PATIENCE_S = 400  # two job processes import torch, one verifies: a busy machine takes its time
IMAGES = {"dataset": {"source": "bundled", "id": "bundled/digits"}}


PLAIN = {"QUANTRY_DEVICE": "cpu", "QUANTRY_THREADS": "1", "QUANTRY_POLL_S": "0.2"}


class TrainingServer(Server):
    """With the job process that users have."""

    environment = PLAIN

    def train(self, **changes: Any) -> str:
        evaluation = {**IMAGES, "samples": 64, "metrics": ["top1"], "baselines": []}
        body = {
            "model": "bundled/vit-tiny",
            "recipe": [{**STEP, "gradient": {"alpha": 0.1}, **changes}],
            "calibration": IMAGES,
            "evaluation": evaluation,
        }
        return str(self.call("POST", "/v1/jobs", body)["id"])

    def epochs(self, job_id: str) -> list[dict[str, Any]]:
        events = self.call("GET", f"/v1/jobs/{job_id}/events")["items"]
        return [event["data"] for event in events if event["kind"] == "epoch"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    running = TrainingServer(tmp_path_factory.mktemp("training") / "data")
    yield running
    running.stop()


def test_a_job_trains_and_another_starts_from_it_and_is_cancelled(server: TrainingServer) -> None:
    first = server.train()
    done = server.await_state(first, "succeeded", "failed", wait_s=PATIENCE_S)
    assert done["state"] == "succeeded", done["error"]
    assert [epoch["epoch"] for epoch in server.epochs(first)] == [1]
    report = server.call("GET", f"/v1/jobs/{first}/report")
    assert report["training"]["epochs"][0]["gamma"]
    assert report["verification"]["argmax_agreement"] == 1
    assert done["quality"][0]["metric"] == "top1"
    second = server.train(init=first, epochs=10_000)
    await_that(lambda: server.epochs(second), "no epoch was finished", PATIENCE_S)
    server.call("POST", f"/v1/jobs/{second}/cancel")
    server.await_state(second, "cancelled")
    kept = Path(server.data, "storage", "jobs", second)
    assert not list(kept.glob("attempt-*.part"))


def test_a_job_that_diverges_offers_its_last_epoch_to_download_and_to_start_from(
    server: TrainingServer,
) -> None:
    diverging = server.train(epochs=50, learning_rate=100, weight_decay=1)  # weights grow 99-fold a step
    done = server.await_state(diverging, "succeeded", "rejected", "failed", wait_s=PATIENCE_S)
    assert (done["state"], done["error"]["type"]) == ("rejected", "training-diverged"), done["error"]
    kept = len(server.epochs(diverging))
    assert done["error"]["detail"].endswith(f"after epoch {kept}")
    report = server.call("GET", f"/v1/jobs/{diverging}/report")
    assert report["training"]["kept_epoch"] == kept
    files = {file["path"] for file in server.call("GET", f"/v1/jobs/{diverging}/files")["files"]}
    assert "model.safetensors" in files
    following = server.train(init=diverging)
    server.call("POST", f"/v1/jobs/{following}/cancel")
