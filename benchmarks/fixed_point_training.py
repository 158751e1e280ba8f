"""Accuracy of classifiers trained in fixed point, by the interval of their gradients, beside full precision.

usage: python benchmarks/fixed_point_training.py NETWORK TRAIN.npz [--train-split all] [--evaluation EVAL.npz]
           [--evaluation-split test] [--bits 4] [--intervals large_gradient min_max mse ...] [--seeds 0 1 2]
           [--epochs 160] [--samples N] [--images N] [--alpha 0.001] [--learning-rate 0.1] [--device cpu|cuda]

NETWORK: resnet20 (32x32 colour), cnn (the same with one block a stage and half the channels, 28x28 grey), vit (4 blocks
of 64, 28x28 grey), or a checkpoint folder. The first three start from random weights, a folder from its own. `none`
among the intervals leaves gradients in full precision. Every run of a seed sees the same batches. Runs are kept in
benchmarks/results (kept.py) and not computed again; one that was interrupted goes on at its last epoch, in .bench.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from transformers import AutoModelForImageClassification, ViTConfig

from quantry.cifar_resnet import CifarResNetConfig
from quantry.requests import JobRequest
from worker.metrics.quality import accuracy
from worker.progress import Progress
from worker.training.job import TrainingRun
from worker.training.prepare import prepare_training
from worker.workspace import Workspace

KEPT = Kept("fixed_point_training")
HOME = Path(".bench/training")
GREY = {"num_channels": 1, "image_size": 28, "num_labels": 10}
NETWORKS = {
    "resnet20": CifarResNetConfig(num_labels=10),
    "cnn": CifarResNetConfig(depths=[1, 1, 1], widths=[8, 16, 32], **GREY),
    "vit": ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        patch_size=7,
        **GREY,
    ),
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def folder_of(name: str) -> Path:
    """A checkpoint folder of the network, made at the first call."""
    if name not in NETWORKS:
        return Path(name).resolve()
    folder, config = (HOME / "models" / name).resolve(), NETWORKS[name]
    if not folder.exists():
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        mean, deviation = IMAGENET if config.num_channels == 3 else ([0.5], [0.5])
        side = config.image_size
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "image_mean": mean,
            "image_std": deviation,
            "size": {"height": side, "width": side},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def request_of(options: argparse.Namespace, folder: Path, interval: str, seed: int) -> JobRequest:
    gradient = (
        None
        if interval in ("none", "fp")
        else {"interval": interval, "alpha": options.alpha, "gamma": options.gamma}
    )
    step = {
        "method": "fixed_point_training",
        "bits": options.bits,
        "gradient": gradient,
        "init": "random" if options.network in NETWORKS else "model",
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "samples": options.samples,
    }
    data = {"source": "local", "id": str(options.train.resolve()), "split": options.train_split}
    judged = options.evaluation or options.train
    held = {"source": "local", "id": str(judged.resolve()), "split": options.evaluation_split}
    body: dict[str, Any] = {
        "model": {"source": "local", "id": str(folder)},
        "recipe": [step],
        "calibration": {"dataset": data, "seed": seed},
        "evaluation": {"dataset": held, "samples": options.images, "metrics": ["top1"]},
        "device": options.device,
    }
    return JobRequest.model_validate(body)


def settings(options: argparse.Namespace, interval: str, seed: int) -> dict[str, Any]:
    """What a run is known by."""
    data = {"train": options.train.name, "samples": options.samples, "images": options.images}
    names = ("bits", "epochs", "batch_size", "alpha", "gamma", "learning_rate")
    training = {name: getattr(options, name) for name in names}
    return {"network": Path(options.network).name, "gradients": interval, **training, **data, "seed": seed}


def middle(values: dict[str, float]) -> float | None:
    """The median over layers, if there are any."""
    return statistics.median(values.values()) if values else None


def measure(options: argparse.Namespace, interval: str, seed: int) -> dict[str, Any]:
    """Accuracy and curve of one training without its export; `fp` trains in full precision."""
    facts = settings(options, interval, seed)
    found = KEPT.find(facts)
    if found is not None:
        return found
    folder = folder_of(options.network)
    data = [path.resolve().parent for path in (options.train, options.evaluation or options.train)]
    space = Workspace(
        artifact=Path(),
        checkpoints=(HOME / "-".join(map(str, facts.values()))).resolve(),
        cache=Path(),
        model_roots=(folder.parent, *data),
        device=options.device,
    )
    progress, began = Progress(io.StringIO()), time.process_time()
    job = prepare_training(request_of(options, folder, interval, seed).resolve(), space, progress)
    run = TrainingRun(job, space, progress)
    trainer = run.full_precision(options.epochs) if interval == "fp" else run.quantized()[0]
    images = job.evaluation
    assert images is not None
    top1 = accuracy(trainer.logits(lambda part: images[part], len(images)), job.labels, 1)
    last = trainer.curve[-1]
    figures = {
        "top1": top1,
        "loss": last.loss,
        "gamma": middle(last.gamma),
        "large_gradient_error": middle(last.large_gradient_error),
        "cpu_s": round(time.process_time() - began, 1),
    }
    KEPT.keep(facts, figures)
    return figures


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """Mean and half the spread of accuracy; last loss, interval and error of large gradients of the first seed."""
    tops = [100 * run["top1"] for run in runs]
    last = runs[0]
    spread = f" ± {(max(tops) - min(tops)) / 2:.2f}" if len(tops) > 1 else ""
    medians = ["–" if last[key] is None else f"{last[key]:.3f}" for key in ("gamma", "large_gradient_error")]
    seconds = statistics.mean(run["cpu_s"] for run in runs)
    cells = (f"{statistics.mean(tops):.2f}{spread}", f"{last['loss']:.3f}", *medians, f"{seconds:.0f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", help=f"{', '.join(NETWORKS)}, or a checkpoint folder")
    parser.add_argument("train", type=Path)
    parser.add_argument("--train-split", choices=("train", "test", "all"), default="all")
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--evaluation-split", choices=("train", "test", "all"), default="test")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--intervals", nargs="+", default=["large_gradient", "min_max", "mse"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--gamma", type=float, default=1.0, help="of the interval `fixed`")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}"
    )
    print(f"{options.network}, {options.epochs} epochs, {options.bits} bits, seeds {options.seeds}\n")
    print("| gradients | top-1 % | last loss | γ | error of large gradients | CPU-s |")
    print("| --- " * 6 + "|", flush=True)
    for interval in ("fp", *options.intervals):
        print(row(interval, [measure(options, interval, seed) for seed in options.seeds]), flush=True)


if __name__ == "__main__":
    main()
