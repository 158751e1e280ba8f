"""What a step of fixed-point training costs: the interval update, the memory, and products on int8 codes.

usage: python benchmarks/fixed_point_step.py [--batch 128] [--steps 10] [--threads 1] [--device cpu|cuda]

Times are processor seconds on a CPU (medians over the steps), so that other work on the machine counts less. Memory is
the peak of a process of its own for each row, less what it had before the first step; on a GPU what torch allocated.
The products are those of ResNet-20's widest layers (im2col) and of a ViT-B block.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quantry.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from quantry.training import FixedPointTrainingStep
from worker.child import environment
from worker.training.gradient import GradientQuantizer
from worker.training.integer import int_product
from worker.training.layers import fixed_point_layers, use_fixed_point
from worker.training.trainer import place

ROWS = ("full precision", "4/4/32", "4/4/4 min_max", "4/4/4 large_gradient")
PRODUCTS = {  # rows, inner, columns of Y = X W^T
    "ResNet-20, 16 channels of 32x32": (128 * 32 * 32, 144, 16),
    "ResNet-20, 64 channels of 8x8": (128 * 8 * 8, 576, 64),
    "ViT-B, q, k or v": (8 * 197, 768, 768),
    "ViT-B, fc1": (8 * 197, 768, 3072),
}


def network(row: str) -> nn.Module:
    torch.manual_seed(0)
    made = CifarResNetForImageClassification(CifarResNetConfig(num_labels=10))
    if row != "full precision":
        interval = row.partition(" ")[2]
        gradient = {"interval": interval} if interval else None
        step = FixedPointTrainingStep.model_validate({"bits": 4, "gradient": gradient})
        names = [n for n, m in made.named_modules() if isinstance(m, nn.Conv2d)][1:]
        use_fixed_point(made, tuple(names), step)
    return made.train()


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, of the interval updates in it, and bytes at the peak."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    made = network(row)
    place(made, device)
    optimiser = torch.optim.SGD(made.parameters(), 1e-3, momentum=0.9)
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randn(options.batch, 3, 32, 32, generator=chance).to(device)
    labels = torch.randint(10, (options.batch,), generator=chance).to(device)
    updates = watch_updates(made, device)
    before, times, shares = used(device), [], []
    for _ in range(options.steps + 2):
        updates.clear()
        began = now(device)
        optimiser.zero_grad(set_to_none=True)
        cross_entropy(made(pixel_values=pixels).logits, labels).backward()
        optimiser.step()
        times.append(now(device) - began)
        shares.append(sum(updates))
    return {
        "step_s": statistics.median(times[2:]),
        "update_s": statistics.median(shares[2:]),
        "peak_bytes": used(device) - before,
    }


def watch_updates(made: nn.Module, device: torch.device) -> list[float]:
    """Seconds that each call of the interval rule takes."""
    seconds: list[float] = []

    def timed(move: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            began = now(device)
            move(*arguments)
            seconds.append(now(device) - began)

        return run

    for layer in fixed_point_layers(made).values():
        if isinstance(layer.gradient, GradientQuantizer):
            layer.gradient._move = timed(layer.gradient._move)  # type: ignore[method-assign]
    return seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def used(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def products(options: argparse.Namespace) -> None:
    """float32 against int8, forward products alone, codes at hand."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print("\n| product | float32, ms | int8, ms | int8 is faster by |\n| --- | --- | --- | --- |")
    for name, (rows, inner, columns) in PRODUCTS.items():
        a = torch.randint(-7, 8, (rows, inner), dtype=torch.int8, device=device)
        b = torch.randint(-7, 8, (columns, inner), dtype=torch.int8, device=device).t()
        x, w = a.float(), b.float()
        assert torch.equal(int_product(a, b).float(), x @ w)
        spent = []
        for run in (lambda x=x, w=w: x @ w, lambda a=a, b=b: int_product(a, b)):
            times = []
            for _ in range(4):
                began = now(device)
                run()
                times.append(now(device) - began)
            spent.append(1e3 * statistics.median(times[1:]))
        sizes = f"({rows}, {inner}) x ({inner}, {columns})"
        print(
            f"| {name}: {sizes} | {spent[0]:.2f} | {spent[1]:.2f} | {spent[0] / spent[1]:.2f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--row", choices=ROWS, help="measure one row, print JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    where = f"{platform.machine()}, torch {torch.__version__}, {options.threads} threads, {options.device}"
    print(f"{where}, batches of {options.batch}\n")
    print(
        "| ResNet-20 | step, ms | interval update, ms | share | memory, MiB |\n| --- | --- | --- | --- | --- |"
    )
    for row in ROWS:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment(options.threads)
        )
        found = json.loads(done.stdout)
        step, update = 1e3 * found["step_s"], 1e3 * found["update_s"]
        print(
            f"| {row} | {step:.0f} | {update:.1f} | {100 * update / step:.1f} % | {found['peak_bytes'] / 2**20:.0f} |",
            flush=True,
        )
    products(options)


if __name__ == "__main__":
    main()
