"""What AccuQuant's gradients cost and are worth on a real model, and what 8 bits do to long softmax rows.

usage: python benchmarks/diffusion_costs.py MODEL [--steps 20] [--groups 1 2 5 10] [--batch 8] [--softmax-size 0]
           [--tables memory cosine softmax]

MODEL as in benchmarks/diffusion.py, W4A8, ranges of least squared error. Three tables:
*memory*: the most bytes that autograd keeps for a backward pass, for both gradients and for naive unrolling, by steps
of a group; and a plot of them, in characters. *cosine*: between the published gradient of all step sizes and the
exact one, and the ratio of their norms, by group. *softmax*: 8-bit probabilities at each step, row sum before and
after correction and the SQNR of the attention's output, means over attention modules; `--softmax-size N` runs the
network on latents of N x N: attention one level down sees 1024 keys at N = 64.
"""

from __future__ import annotations

import argparse
import copy
from argparse import Namespace
from pathlib import Path

import torch
from diffusion import Bench
from torch import Tensor

from quantry.layers.denoiser_attention import attentions, use_operand_attention
from quantry.layers.operands import watch_probabilities
from worker.diffusion.accuquant import Gradient, backward, group_steps
from worker.diffusion.quantizers import StepNetwork, StepQuantizer, trainable
from worker.diffusion.trajectory import boundaries, trajectory
from worker.methods.softmax_bias import SoftmaxStatistics, unit_grid

WIDTH = 40  # characters of the longest bar


class Saved:
    """The most bytes of distinct storage that autograd has kept at any time."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def pack(self, x: Tensor) -> _Held:
        self.alive += x.numel() * x.element_size()
        self.most = max(self.most, self.alive)
        return _Held(x, self)

    @staticmethod
    def unpack(held: _Held) -> Tensor:
        return held.value


class _Held:
    """A saved tensor that says when it goes."""

    def __init__(self, value: Tensor, counter: Saved) -> None:
        self.value, self.counter = value, counter

    def __del__(self) -> None:
        self.counter.alive -= self.value.numel() * self.value.element_size()


def gradient(bench: Bench, network: StepNetwork, steps: range, mode: Gradient | str, batch: int) -> Tensor:
    """Of the loss at the end of these steps, from full-precision latents, for all trained step sizes."""
    noise = bench.noise(0, batch)
    bounds = boundaries(bench.full, bench.steps[: steps[-1] + 1], noise, group=steps[0] or len(steps))
    start, target = (bounds[1], bounds[-1]) if steps[0] else (bounds[0], bounds[-1])
    quantizers = [q for q in network.quantizers.values() if isinstance(q, StepQuantizer) and q.learned]
    with trainable(quantizers) as parameters:
        if mode == "unrolled":
            x = start
            for index in steps:
                x = bench.steps[index].advance(x, network(x, index), noise.at(bench.steps[index], index))
            (x - target).square().mean().backward()
        else:
            backward(network, bench.steps, steps, start, target, noise, gradient=mode)  # type: ignore[arg-type]
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def memory(bench: Bench, groups: list[int], batch: int) -> None:
    print("| M | accuquant, MiB | exact | unrolled |\n| --- | --- | --- | --- |", flush=True)
    found: dict[str, list[float]] = {"accuquant": [], "exact": [], "unrolled": []}
    for group in groups:
        network = bench.quantized("4/8", group, "mse", 0)
        for mode, values in found.items():
            saved = Saved()
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                gradient(bench, network, range(group), mode, batch)
            values.append(saved.most / 2**20)
        print(
            f"| {group} | " + " | ".join(f"{values[-1]:.1f}" for values in found.values()) + " |", flush=True
        )
    top = max(max(values) for values in found.values())
    for mode, values in found.items():
        for group, value in zip(groups, values, strict=True):
            print(f"    {mode:>9} M={group:<3} {'#' * max(1, round(WIDTH * value / top))}")


def cosine(bench: Bench, groups: list[int], batch: int) -> None:
    print("\n| M | steps | cosine | norm ratio |\n| --- | --- | --- | --- |", flush=True)
    for group in groups:
        network = bench.quantized("4/8", group, "mse", 0)
        for steps in group_steps(len(bench.steps), group):
            published, exact = (gradient(bench, network, steps, m, batch) for m in ("accuquant", "exact"))
            norms = float(published.norm()), float(exact.norm())
            value = float(published @ exact) / (norms[0] * norms[1]) if all(norms) else float("nan")
            print(
                f"| {group} | {steps[0]}–{steps[-1]} | {value:.4f} | {norms[0] / norms[1]:.3f} |", flush=True
            )


def softmax(bench: Bench, size: int) -> None:
    """Each step's own bias, per head, fitted on the samples it is measured on."""
    unet = copy.deepcopy(bench.unet)
    use_operand_attention(unet)
    network = StepNetwork(unet, bench.steps)
    noise = bench.noise(0, 2)
    if size:
        noise = type(noise)(noise.seeds, (noise.shape[0], size, size), noise.device)
    names = list(attentions(unet))
    print(f"\n| step | keys | row sum | after | SQNR, dB | after |\n{'| --- ' * 6}|", flush=True)
    for index, x, _ in trajectory(bench.full, bench.steps, noise):
        if index == len(bench.steps):
            return
        found = {name: SoftmaxStatistics(unit_grid(8)) for name in names}
        keys = 0
        for name, statistics in found.items():
            with watch_probabilities(unet, name, statistics.update), torch.no_grad():
                network(x, index)
            seen = statistics._sums
            keys = max(keys, round(float(seen["keys"].sum() / seen["rows"].sum())))
        before = [s.error(None) for s in found.values()]
        after = [s.error(s.bias("head")) for s in found.values()]
        sums = [sum(e.row_sum for e in errors) / len(errors) for errors in (before, after)]
        gains = [sum(min(e.sqnr_db, 200.0) for e in errors) / len(errors) for errors in (before, after)]
        print(
            f"| {index} | {keys} | {sums[0]:.4f} | {sums[1]:.4f} | {gains[0]:.1f} | {gains[1]:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--softmax-size", type=int, default=0)
    tables = ("memory", "cosine", "softmax")
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables))
    options = parser.parse_args()
    bench = Bench(Namespace(model=options.model, steps=options.steps, eta=0.0, adaround=0, features=None))
    if "memory" in options.tables:
        memory(bench, options.groups, options.batch)
    if "cosine" in options.tables:
        cosine(bench, options.groups, options.batch)
    if "softmax" in options.tables:
        softmax(bench, options.softmax_size)


if __name__ == "__main__":
    main()
