"""Top-1 accuracy and divergence of quantized image classifiers, by method and bit-width.

usage: python benchmarks/image_classifiers.py MODEL DATA.npz [--bits 8 6 4] [--methods rtn ptq4vit ...]
           [--seeds 0 1 2] [--samples 32] [--images 2000] [--weights published|gptq]

`rtn` is round-to-nearest weights and min-max activations, `weights` quantizes weights only; a method with
`+bc` adds bias compensation, `igq16` takes 16 groups. `--weights published` gives every method per-channel
weights with a clip search (PTQ4ViT: its own), `gptq` gives it GPTQ on the quantized activations. Results are
kept in .bench/vision and not computed again.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from quantry.contract import JobRequest
from worker.activations import calibrate_activations
from worker.calibration.store import BlockStore
from worker.prepare import prepare
from worker.progress import Progress
from worker.sweep import BlockSweep
from worker.workspace import Workspace

KEPT = Path(".bench/vision")
METHODS = ("rtn", "weights", "uniform", "ptq4vit", "ptq4vit+bc", "repq", "repq+bc", "adalog", "adalog+bc")
METHODS += ("igq4", "igq8", "igq16", "igq8+bc")


def recipe(method: str, bits: int, weights: str) -> list[dict[str, Any]]:
    """The steps of a method; `rtn` and `uniform` share the min-max grids."""
    base, _, correction = method.partition("+")
    grid = {"bits": bits}
    if base == "rtn":
        steps = [{"method": "rtn", **grid}, {"method": "uniform", **grid}]
    else:
        published = {"method": "rtn", "clip": "mse", **grid}
        steps = [published if weights == "published" else {"method": "gptq", **grid}]
        name, groups = re.fullmatch(r"([a-z4]+?)(\d*)", base).groups() if base != "ptq4vit" else (base, "")  # type: ignore[union-attr]
        if name != "weights":
            steps.append({"method": name, **grid, **({"groups": int(groups)} if groups else {})})
    return [*steps, {"method": "bias_compensation"}] if correction else steps


def measure(options: argparse.Namespace, method: str, bits: int, seed: int) -> dict[str, float]:
    """Figures of one job without its export."""
    facts = (
        f"{options.model.name} {method} {options.weights} {bits} {seed} {options.samples} {options.images}"
    )
    file = KEPT / (facts.replace(" ", "-") + ".json")
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text())
        return found
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
    values = {f"{metric} {name}": v for metric, row in result.quality.items() for name, v in row.items()}
    values["cpu_s"] = time.process_time() - began
    KEPT.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))
    return values


def cell(values: list[float], form: str) -> str:
    """Mean, and half the spread where there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--weights", choices=("published", "gptq"), default="published")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.weights}\n"
    )
    print("| bits | method | top-1 % | KL | CPU-s |")
    print("| --- " * 5 + "|", flush=True)
    for bits in options.bits:
        for method in options.methods:
            runs = [measure(options, method, bits, seed) for seed in options.seeds]
            top = cell([100 * run["top1 quantized"] for run in runs], ".2f")
            kl = cell([run["kl quantized"] for run in runs], ".4f")
            cpu = cell([run["cpu_s"] for run in runs][:1], ".0f")
            print(f"| {bits} | {method} | {top} | {kl} | {cpu} |", flush=True)
    print(f"\nfull precision: {100 * runs[0]['top1 fp']:.2f} %")


if __name__ == "__main__":
    main()
