"""Top-1 accuracy and divergence of quantized image classifiers, by method and bit-width.

usage: python benchmarks/image_classifiers.py MODEL DATA.npz [--tables w8a8 w6a6 w4a4 igq] [--methods rtn ptq4vit ...]
           [--seeds 0 1 2] [--samples 32] [--images 2000] [--weights published|gptq] [--stop-after SECONDS] [--show]

`rtn` is round-to-nearest weights and min-max activations, `weights` quantizes weights only; `igq16` takes 16 groups,
`igqbound` a grid for every channel and row of every image; `repq:log` and `igq8:mean` are as published (decision 11).
A method with `+bc` adds bias compensation, `+published` the published form, a bias for each position of each layer and
of both products of attention. `--weights published` gives every method per-channel weights with a clip search (PTQ4ViT:
its own), `gptq` gives it GPTQ on the quantized activations.

Every run is kept in benchmarks/results (kept.py) and not computed again; seeds are taken in turn, so that a table of
one seed is whole before the next begins. `--show` prints what is there already.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kept import Kept

from quantry.recipe import IgqStep
from quantry.requests import JobRequest
from worker.activations import ACTIVATION_STEPS, calibrate_activations
from worker.calibration.store import BlockStore
from worker.methods import igq
from worker.prepare import prepare
from worker.progress import Progress
from worker.sweep import BlockSweep
from worker.workspace import Workspace

KEPT = Kept("image_classifiers")
FORMS: dict[str, dict[str, Any]] = {"log": {"softmax": "log"}, "mean": {"bounds": "mean"}}
METHODS = (
    "rtn",
    "ptq4vit",
    "ptq4vit+bc",
    "ptq4vit+published",
    "repq",
    "repq+bc",
    "repq:log",
    "adalog",
    "adalog+bc",
    "igq8",
    "igq8+bc",
    "igq8:mean",
)
UNIFORM = ("rtn", "ptq4vit", "repq", "repq:log", "adalog", "igq8", "igq8:mean")
TABLES: dict[str, tuple[int, tuple[str, ...]]] = {
    "w8a8": (8, UNIFORM),
    "w6a6": (6, UNIFORM),
    "w4a4": (4, METHODS),
    "igq": (4, ("igq1", "igq2", "igq4", "igq8", "igq12", "igq16", "igqbound")),
}


def recipe(method: str, bits: int, weights: str) -> list[dict[str, Any]]:
    """The steps of a method; `rtn` and `uniform` share the min-max grids."""
    method, _, correction = method.partition("+")
    base, _, form = method.partition(":")
    grid = {"bits": bits}
    if base == "rtn":
        steps = [{"method": "rtn", **grid}, {"method": "uniform", **grid}]
    else:
        published = {"method": "rtn", "clip": "mse", **grid}
        steps = [published if weights == "published" else {"method": "gptq", **grid}]
        name, groups = ("igq", base.removeprefix("igq")) if base.startswith("igq") else (base, "")
        groups = "1" if groups == "bound" else groups
        if name != "weights":
            chosen: dict[str, Any] = {"groups": int(groups)} if groups else {}
            steps.append({"method": name, **grid, **chosen, **FORMS.get(form, {})})
    if correction == "published":
        published_form = {
            "granularity": "position_channel",
            "targets": "published",
            "levels": ["module", "products"],
        }
        return [*steps, {"method": "bias_compensation", **published_form}]
    return [*steps, {"method": "bias_compensation"}] if correction else steps


def settings(options: argparse.Namespace, method: str, bits: int, seed: int) -> dict[str, Any]:
    """What a run is known by."""
    job = {"model": options.model.name, "method": method, "weights": options.weights, "bits": bits}
    return {**job, "samples": options.samples, "images": options.images, "seed": seed}


def measure(options: argparse.Namespace, method: str, bits: int, seed: int) -> None:
    """Run one job without its export and keep its figures."""
    facts = settings(options, method, bits, seed)
    if KEPT.find(facts) is not None:
        return
    data = {"source": "local", "id": str(options.data.resolve())}
    request = JobRequest.model_validate(
        {
            "model": {"source": "local", "id": str(options.model.resolve())},
            "recipe": recipe(method, bits, options.weights),
            "calibration": {"dataset": data, "samples": options.samples, "seed": seed},
            "evaluation": {"dataset": data, "samples": options.images, "baselines": ["fp"]},
        }
    )
    progress = Progress(io.StringIO())
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        roots = (options.model.resolve().parent, options.data.resolve().parent)
        space = Workspace(artifact=Path(), checkpoints=Path(), cache=Path(), model_roots=roots)
        job = prepare(request.resolve(), space, progress)
        bound = {IgqStep: igq.upper_bound} if method.startswith("igqbound") else {}
        with mock.patch.dict(ACTIVATION_STEPS, bound):
            found_activations = calibrate_activations(job.model, job.spec, job.calibration, progress)
        result = BlockSweep(
            job.model,
            job.spec,
            BlockStore(Path(folder) / "blocks", "benchmark"),
            progress,
            job.calibration,
            job.evaluation,
            job.judge,
            dressing=found_activations.dressing,
            chosen=found_activations.chosen,
        ).run()
    figures = {f"{metric} {name}": v for metric, row in result.quality.items() for name, v in row.items()}
    KEPT.keep(facts, {**figures, "cpu_s": round(time.process_time() - began, 1)})


def cell(values: list[float], form: str) -> str:
    """Mean, and half the spread where there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def show(options: argparse.Namespace, rows: list[tuple[int, str]]) -> None:
    """The table of what was measured so far."""
    print("\n| bits | method | top-1 % | KL | CPU-s | seeds |\n" + "| --- " * 6 + "|", flush=True)
    full = set()
    for bits, method in rows:
        known = [KEPT.find(settings(options, method, bits, seed)) for seed in options.seeds]
        runs = [figures for figures in known if figures is not None]
        if not runs:
            continue
        top = cell([100 * run["top1 quantized"] for run in runs], ".2f")
        kl = cell([run["kl quantized"] for run in runs], ".4f")
        cpu = cell([run["cpu_s"] for run in runs][:1], ".0f")
        print(f"| {bits} | {method} | {top} | {kl} | {cpu} | {len(runs)} |", flush=True)
        full.add(f"{100 * runs[0]['top1 fp']:.2f} %")
    print(f"\nfull precision: {', '.join(full)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--methods", nargs="+", help="only these of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--weights", choices=("published", "gptq"), default="published")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="begin no run after so many s")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows = list(dict.fromkeys((bits, m) for t in options.tables for bits, m in _rows(t, options.methods)))
    print(
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.weights}"
    )
    began = time.monotonic()
    for seed in [] if options.show else options.seeds:
        for bits, method in rows:
            if time.monotonic() - began < options.stop_after:
                measure(options, method, bits, seed)
                print(f"done: {bits} bits, {method}, seed {seed}", file=sys.stderr, flush=True)
        show(options, rows)
    if options.show:
        show(options, rows)


def _rows(table: str, wanted: list[str] | None) -> list[tuple[int, str]]:
    bits, methods = TABLES[table]
    return [(bits, method) for method in methods if wanted is None or method in wanted]


if __name__ == "__main__":
    main()
