"""What a ViT-B costs to quantize, by method, and what PTQ4ViT's search saves over a loop on candidates.

usage: python benchmarks/vit_b.py [--methods uniform ptq4vit repq adalog igq8 ...] [--bits 4] [--search]

The network has the size of ViT-B/16 (86 M parameters, 224 pixels, 1000 classes) and random weights; 32 random
images calibrate it. Each method runs in a process of its own: preparation, activations, weights and
compensation, without export or evaluation. Peak memory is the process's, its start (everything imported, the
network not yet read) beside it. --search compares one layer of each shape instead.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from image_classifiers import recipe
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from quantry.recipe import RtnStep
from quantry.requests import JobRequest
from worker.activations import calibrate_activations
from worker.calibration.store import BlockStore
from worker.methods.ptq4vit_search import LinearRows, search_linear
from worker.methods.ptq4vit_spaces import Space, uniform_space, weight_space
from worker.prepare import prepare
from worker.progress import Progress
from worker.sweep import BlockSweep
from worker.workspace import Workspace

HOME = Path(".bench/models/vit-b-random")
IMAGES = HOME.with_suffix(".npz")
METHODS = ("rtn", "uniform", "ptq4vit", "ptq4vit+bc", "repq", "adalog", "igq8", "igq16")
CANDIDATES, ROUNDS, TOKENS, ALL_TOKENS = 100, 3, 1024, 32 * 197


def make() -> None:
    """Write the network and the images, once."""
    if not (HOME / "model.safetensors").exists():
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(HOME)
        ViTImageProcessor().save_pretrained(HOME)
    if not IMAGES.exists():
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
        np.savez(IMAGES, images=pixels, labels=random.integers(0, 1000, 32))


def run(method: str, bits: int, answer: str) -> None:
    """Quantize in this process and write what it cost to the file `answer`."""
    data = {"source": "local", "id": str(IMAGES.resolve()), "split": "all"}
    request = JobRequest.model_validate(
        {
            "model": {"source": "local", "id": str(HOME.resolve())},
            "recipe": recipe(method, bits, "published"),
            "calibration": {"dataset": data, "samples": 32},
            "evaluation": None,
        }
    )
    progress = Progress(io.StringIO())
    start = psutil.Process().memory_info().rss
    began = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(
            artifact=Path(), checkpoints=Path(), cache=Path(), model_roots=(HOME.resolve().parent,)
        )
        job = prepare(request.resolve(), space, progress)
        found = calibrate_activations(job.model, job.spec, job.calibration, progress)
        store = BlockStore(Path(folder) / "blocks", "benchmark")
        BlockSweep(
            job.model,
            job.spec,
            store,
            progress,
            job.calibration,
            None,
            job.judge,
            dressing=found.dressing,
            chosen=found.chosen,
        ).run()
    cost = {"wall": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(answer).write_text(json.dumps({**cost, "peak": peak, "start": start}))


def methods(options: argparse.Namespace) -> None:
    print("| method | wall s | CPU-s | peak MiB (start) |\n| --- | --- | --- | --- |", flush=True)
    for method in options.methods:
        with tempfile.NamedTemporaryFile() as answer:
            process = multiprocessing.get_context("spawn").Process(
                target=run, args=(method, options.bits, answer.name)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{method} ended with {process.exitcode}")
            cost = json.loads(Path(answer.name).read_text())
        memory = f"{cost['peak'] / 2**20:.0f} ({cost['start'] / 2**20:.0f})"
        print(f"| {method} | {cost['wall']:.0f} | {cost['cpu']:.0f} | {memory} |", flush=True)


def naive(rows: LinearRows, inputs: Space, weights: Space) -> tuple[Tensor, Tensor]:
    """The same alternation, one candidate at a time on all rows, all rounds."""
    p, g = inputs.incumbent, weights.incumbent

    def best(space: Space, incumbent: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
        chosen, least = incumbent, distance(incumbent)
        for candidate in space.candidates:
            found = distance(candidate)
            better = found < least
            chosen = torch.where(better.unsqueeze(-1), candidate, chosen)
            least = torch.where(better, found, least)
        return chosen

    def of_weight(grid: Tensor, p: Tensor) -> Tensor:
        out = inputs.quantize_one(rows.x, p) @ weights.quantize_one(rows.w, grid).T
        return (out - rows.target).square().mul(rows.fisher).mean(0)

    def of_input(grid: Tensor, g: Tensor) -> Tensor:
        out = inputs.quantize_one(rows.x, grid) @ weights.quantize_one(rows.w, g).T
        return (out - rows.target).square().mul(rows.fisher).mean().unsqueeze(0)

    for _ in range(ROUNDS):
        g = best(weights, g, lambda grid, p=p: of_weight(grid, p))  # type: ignore[misc]
        p = best(inputs, p, lambda grid, g=g: of_input(grid, g))  # type: ignore[misc]
    return p, g


def search(bits: int) -> None:
    """Seconds of the loop on all tokens, of the loop on the rows that ours keeps, and of ours on them."""
    print(
        "| layer | loop, all tokens s | loop, kept rows s | ours s | distance on all tokens |\n"
        + "| --- " * 5
        + "|"
    )
    for columns, out in ((768, 768),):  # the loop takes two minutes on it
        torch.manual_seed(0)
        x = torch.randn(ALL_TOKENS, columns) * torch.rand(columns).add(0.1)
        weight = torch.randn(out, columns) / columns**0.5
        fisher = torch.rand(ALL_TOKENS, out).square() * torch.rand(ALL_TOKENS, 1).pow(4)
        rows = LinearRows(x, fisher, weight)
        heavy = fisher.sum(1).argsort(descending=True)[:TOKENS]
        kept = LinearRows(x[heavy], fisher[heavy], weight)
        weights = weight_space(weight, RtnStep(bits=bits, clip="mse"), CANDIDATES)  # type: ignore[arg-type]
        inputs = uniform_space(x.min(), x.max(), bits, CANDIDATES)
        times, ends = [], []
        for solve in (
            partial(naive, rows),
            partial(naive, kept),
            partial(search_linear, kept, rounds=ROUNDS),
        ):
            began = time.process_time()
            p, g = solve(inputs, weights)
            times.append(f"{time.process_time() - began:.1f}")
            error = inputs.quantize_one(x, p) @ weights.quantize_one(weight, g).T - rows.target
            ends.append(float(error.square().mul(fisher).mean()))
        distances = " / ".join(f"{end / ends[0]:.3f}" for end in ends)
        print(f"| {columns} → {out} | {' | '.join(times)} | {distances} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args()
    if options.search:
        search(options.bits)
        return
    make()
    methods(options)


if __name__ == "__main__":
    main()
