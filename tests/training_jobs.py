"""Tiny classifiers to train, and images that they can learn: bright squares in one of five places."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import factories
import numpy as np

import quantry
from quantry.jobs import Rejected, Succeeded
from quantry.requests import JobRequest
from worker.pipeline import run
from worker.progress import Progress
from worker.training.artifact import write_artifact
from worker.training.job import TrainingRun
from worker.training.prepare import PreparedTraining, prepare_training
from worker.training.trainer import Trainer
from worker.workspace import Workspace

CLASSES = 5


def squares(count: int, seed: int, side: int = 16) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Noisy images (count, side, side, 3) of CLASSES kinds, and their classes."""
    chance = np.random.default_rng(seed)
    images = chance.integers(0, 90, (count, side, side, 3), dtype=np.uint8)
    labels = chance.integers(0, CLASSES, count)
    half = side // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half), (half // 2, half // 2)]
    for image, label in zip(images, labels, strict=True):
        down, right = corners[label]
        image[down : down + half, right : right + half] += 120
    return images, labels


def training(workspace: Workspace, name: str = "cifar_resnet", **changes: Any) -> JobRequest:
    """A job that trains a tiny model of `name` from random weights; `step` changes its step, `model` its config."""
    root = workspace.model_roots[0]
    model = changes.pop("model", {})
    if not (root / name).exists():
        write = factories.write_convnet if name in factories.CONVNETS else factories.write_classifier
        write(root / name, name, **{"num_labels": CLASSES, **model})
    if not (root / "images.npz").exists():
        images, labels = squares(
            200, 0, json.loads((root / name / "config.json").read_text()).get("image_size", 16)
        )
        np.savez(root / "images.npz", images=images, labels=labels)
    step = {
        "bits": 4,
        "init": "random",
        "epochs": 2,
        "batch_size": 30,
        "gradient": {"alpha": 0.01},
        "augmentation": "none",
    }
    step = {"method": "fixed_point_training", **step, **changes.pop("step", {})}
    dataset = {"source": "local", "id": "images.npz"}
    body: dict[str, Any] = {
        "model": {"source": "local", "id": name},
        "recipe": [step],
        "calibration": {"dataset": dataset},
        "evaluation": {"dataset": dataset, "metrics": ["top1", "kl"]},
    }
    return JobRequest.model_validate({**body, **changes})


def train(workspace: Workspace, request: JobRequest, out: io.StringIO | None = None) -> Succeeded | Rejected:
    return run(request.resolve(), workspace, Progress(out or io.StringIO()))


def trained(
    workspace: Workspace, request: JobRequest, out: io.StringIO | None = None
) -> tuple[PreparedTraining, Trainer]:
    """The job without its end: prepared and trained in fixed point, nothing written but checkpoints."""
    progress = Progress(out or io.StringIO())
    job = prepare_training(request.resolve(), workspace, progress)
    trainer, _, _ = TrainingRun(job, workspace, progress).quantized()
    return job, trainer


def artifact(job: PreparedTraining, trainer: Trainer, folder: Path) -> Any:
    """The trained network written as a checkpoint, and loaded again as a user would, in this process."""
    folder.mkdir(parents=True)
    write_artifact(job, trainer, folder)
    return quantry.load(folder).eval()
