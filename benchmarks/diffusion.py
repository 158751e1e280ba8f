"""Errors of a quantized diffusion model along its trajectory: observed ranges, correctors, AccuQuant over M steps.

usage: python benchmarks/diffusion.py MODEL [--steps 20] [--eta 0] [--widths 4/8 4/6 3/6] [--adaround 0]
           [--methods min-max mse ptqd tac accuquant exact accuquant+ptqd accuquant+tac] [--groups 1 2 5 10]
           [--samples 64] [--iterations 200] [--batch 16] [--learning-rate 0.003] [--seeds 0] [--evaluation 32]
           [--features CLASSIFIER]

MODEL is a diffusers folder with a UNet2DModel and a DDPM or DDIM scheduler, sampled with DDIM, without clipping; or a
consistency model, sampled in one step: of methods, min-max, mse, ptqd and tac then. Columns: *single*, the squared
error of one quantized step from a full-precision latent, mean over the steps; *accumulated*, that of the last latent
when every step is quantized, mean and median over samples. All are means over elements and over seeds that
calibration has not seen, in units of 1e-3. *Frechet*: between quantized and full-precision samples, in the last class
token of CLASSIFIER. Methods: ranges over all that was seen (min-max) and of least squared error (mse), for weights
and activations; on the latter, correctors of the output (ptqd, tac) and AccuQuant with the gradient of the paper
(accuquant) and the exact one, a set of step sizes for each group; accuquant+ptqd and +tac correct its output besides.
`--adaround N` learns the rounding of weights, but those of min-max, in N iterations a block: `mse` is then
Q-Diffusion's core.
Runs are kept in benchmarks/results (kept.py) and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler, UNet2DModel
from kept import Kept

from worker.diffusion.accuquant import AccuQuant, calibrate
from worker.diffusion.adaround import AdaRound, reconstruct
from worker.diffusion.correctors import Rule, corrected, fit_corrections, ptqd, tac
from worker.diffusion.quantizers import StepNetwork, attach_quantizers
from worker.diffusion.ranges import Clip, attention_sites, fit_quantizers
from worker.diffusion.steps import Denoiser, Step, read_steps
from worker.diffusion.trajectory import Curves, SeededNoise, boundaries, error_curves, trajectory
from worker.diffusion.unet import UNetLayer, image_shape, layer_bits, layers_of
from worker.diffusion.weights import UNetWeight, quantize_weight, set_weights
from worker.metrics.images import class_tokens, frechet_distance

KEPT = Kept("diffusion")
LATENTS = 80  # that AdaRound learns on, at least
OBSERVED = 16  # samples that ranges are fitted to
GROUPED = ("accuquant", "exact", "accuquant+ptqd", "accuquant+tac")
METHODS = ("min-max", "mse", "ptqd", "tac", *GROUPED)
RULES: dict[str, Rule] = {"ptqd": ptqd, "tac": tac}
UNSEEN = 1 << 20  # seeds from here on are for evaluation


class Bench:
    """One model in full precision, and a quantized copy of it for each setting."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.unet: UNet2DModel = (
            UNet2DModel.from_pretrained(options.model / "unet").float().eval().requires_grad_(False)
        )
        self.options = options
        scheduler = scheduler_of(options.model)
        self.steps: tuple[Step, ...] = read_steps(scheduler, options.steps, eta=options.eta)
        self.layers: tuple[UNetLayer, ...] = layers_of(self.unet)
        self.full = StepNetwork(self.unet, self.steps)
        self.known: dict[tuple[int, Clip, int], dict[str, UNetWeight]] = {}

    def noise(self, first: int, count: int) -> SeededNoise:
        return SeededNoise(tuple(range(first, first + count)), image_shape(self.unet), torch.device("cpu"))

    def weights(self, bits: int, clip: Clip, seed: int) -> dict[str, UNetWeight]:
        """Rounded to nearest, or by AdaRound; of the last setting asked for they are kept in memory."""
        if (bits, clip, seed) in self.known:
            return self.known[bits, clip, seed]
        widths = layer_bits(self.layers, bits)
        if self.options.adaround and clip == "mse":
            samples = max(4, LATENTS // len(self.steps))
            latents = list(trajectory(self.full, self.steps, self.noise(seed * 1000, samples)))[:-1]
            copied = StepNetwork(copy.deepcopy(self.unet), self.steps)
            settings = AdaRound(iterations=self.options.adaround, learning_rate=0.03, seed=seed)
            weights, _ = reconstruct(self.full, copied, self.layers, latents, widths, settings)
        else:
            modules = {m.name: self.unet.get_submodule(m.name).weight for m in self.layers}
            weights = {
                m.name: quantize_weight(modules[m.name], widths[m.name], split=m.split, clip=clip)
                for m in self.layers
            }
        self.known = {(bits, clip, seed): weights}
        return weights

    def quantized(self, widths: str, steps_per_row: int, clip: Clip, seed: int) -> StepNetwork:
        """A copy with both weights and activations on their grids."""
        weight, activation = map(int, widths.split("/"))
        unet = copy.deepcopy(self.unet)
        set_weights(unet, self.weights(weight, clip, seed))
        observed = self.noise(seed * 1000, OBSERVED)
        sites = (*self.layers, *attention_sites(unet))
        quantizers = fit_quantizers(
            StepNetwork(unet, self.steps),
            sites,
            lambda: trajectory(self.full, self.steps, observed),
            bits=layer_bits(sites, activation),
            steps_per_row=steps_per_row,
            clip=clip,
        )
        attach_quantizers(unet, quantizers)
        return StepNetwork(unet, self.steps)

    def run(self, widths: str, method: str, group: int, seed: int) -> dict[str, float]:
        """The errors of one setting, and its CPU seconds without those of AdaRound."""
        clip: Clip = "none" if method == "min-max" else "mse"
        self.weights(int(widths.split("/")[0]), clip, seed)
        started = time.process_time()
        network = self.quantized(widths, group or len(self.steps), clip, seed)
        noise = self.noise(seed * 1000, self.options.samples)
        denoiser: Denoiser = network
        gradient, _, rule = method.partition("+")
        if group:
            self.calibrate(network, gradient, group, noise, seed)
        rule = method if method in RULES else rule
        if rule:
            fitted = fit_corrections(self.full, network, self.steps, noise, RULES[rule])
            denoiser = corrected(network, fitted)
        spent = time.process_time() - started
        curves = error_curves(self.full, denoiser, self.steps, self.noise(UNSEEN, self.options.evaluation))
        return {
            "single": float(curves.single.mean()),
            "accumulated": float(curves.accumulated[-1].mean()),
            "median": float(curves.accumulated[-1].median()),
            "frechet": self.frechet(curves),
            "cpu_s": spent,
        }

    def frechet(self, curves: Curves) -> float:
        """Between the samples; NaN where no classifier is named."""
        if self.options.features is None:
            return float("nan")
        images = torch.cat([curves.final, curves.reference]).clamp(-1, 1)
        return frechet_distance(*class_tokens(images, self.options.features).chunk(2))

    def calibrate(
        self, network: StepNetwork, gradient: str, group: int, noise: SeededNoise, seed: int
    ) -> None:
        settings = AccuQuant(
            group=group,
            gradient=gradient,  # type: ignore[arg-type]
            iterations=self.options.iterations,
            batch=self.options.batch,
            learning_rate=self.options.learning_rate,
            seed=seed,
        )
        calibrate(network, boundaries(self.full, self.steps, noise, group=group), noise, settings)


def settings(bench: Bench, widths: str, method: str, group: int, seed: int) -> dict[str, Any]:
    """What a run is known by."""
    o = bench.options
    run = {"model": o.model.name, "steps": o.steps, "eta": o.eta, "widths": widths, "method": method}
    run |= {"adaround": o.adaround, "evaluation": o.evaluation, "seed": seed}
    if method not in ("min-max", "mse"):
        run["samples"] = o.samples
    if o.features is not None:
        run["features"] = o.features.name
    if group:
        run |= {"M": group, "iterations": f"{o.iterations}x{o.batch}", "learning_rate": o.learning_rate}
    return run


def measure(bench: Bench, widths: str, method: str, group: int, seed: int) -> dict[str, float]:
    facts = settings(bench, widths, method, group, seed)
    found = KEPT.find(facts)
    if found is None:
        found = bench.run(widths, method, group, seed)
        KEPT.keep(facts, found)
    return found


def scheduler_of(model: Path) -> DDIMScheduler | CMStochasticIterativeScheduler:
    """The checkpoint's if it is a consistency model's, else DDIM's without clipping."""
    config = DDPMScheduler.load_config(model / "scheduler")
    if config["_class_name"] == "CMStochasticIterativeScheduler":
        return CMStochasticIterativeScheduler.from_config(config)
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def cell(values: list[float]) -> str:
    """Mean in units of 1e-3, and half the spread where there are several."""
    spread = f" ± {500 * (max(values) - min(values)):.3g}" if len(values) > 1 else ""
    return f"{1000 * statistics.mean(values):.3g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument(
        "--widths", nargs="+", default=["4/8", "4/6", "3/6"], help="bits of weights/activations"
    )
    parser.add_argument(
        "--adaround", type=int, default=0, help="iterations of each block; 0: round to nearest"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200, help="of each group")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluation", type=int, default=32, help="seeds")
    parser.add_argument("--features", type=Path, help="an image classifier with a class token")
    options = parser.parse_args()
    bench = Bench(options)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| W/A | method | M | single | accumulated | its median | Frechet | CPU s |")
    print("| --- " * 8 + "|", flush=True)
    for widths in options.widths:
        for method in options.methods:
            for group in options.groups if method in GROUPED else [0]:
                runs = [measure(bench, widths, method, group, seed) for seed in options.seeds]
                errors = [cell([run[key] for run in runs]) for key in ("single", "accumulated", "median")]
                seconds = f"{statistics.mean(run['cpu_s'] for run in runs):.0f}"
                distance = cell([run["frechet"] / 1000 for run in runs])
                row = [widths, method, str(group or "all"), *errors, distance, seconds]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
