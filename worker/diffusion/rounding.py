"""Calibration latents, and the weights of a denoiser on their grids by the weight step of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantry.diffusion_planning import edge_bits
from quantry.jobs import State
from quantry.quantizers.activation import TokenQuantizer
from quantry.recipe import (
    AdaroundStep,
    RtnStep,
    SvdquantStep,
    UniformStep,
    WeightStep,
)
from worker.diffusion.adaround import AdaRound, BlockResult, reconstruct
from worker.diffusion.memory import halving
from worker.diffusion.pieces import BlockPieces
from worker.diffusion.prepare import DiffusionJob
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.svdquant import LowRank, fit_low_rank, layer_inputs
from worker.diffusion.timesteps import allocate, choose, middle_features
from worker.diffusion.trajectory import Latents, trajectory
from worker.diffusion.unet import UNetLayer, layer_bits
from worker.diffusion.weights import Clip, UNetWeight, quantize_weight, set_weights
from worker.errors import NonFiniteError

TRAJECTORIES = 32  # at least, where there are as many samples: few of them would be all that any step sees
LATENTS = 128  # that ranges are fitted to, where no weight step asks for another number
FEATURE_SAMPLES = 8  # that the density of timesteps is seen on
BATCH = 64  # samples that are sampled at once

Calibration = Sequence[Latents]


def calibration_latents(job: DiffusionJob) -> Calibration:
    """Full-precision latents of every step, as many of each as the timestep sampler says."""
    job.progress.stage(State.CALIBRATING, "sampling in full precision")
    steps, noise = job.loaded.steps, job.calibration()
    total = getattr(job.spec.weight_step, "latents", LATENTS)
    few = noise.of(range(min(FEATURE_SAMPLES, len(noise.seeds))))

    def features() -> torch.Tensor:
        return middle_features(job.full, _middle(job.full.unet), trajectory(job.full, steps, few))

    counts = allocate(job.plan.sampling.timestep_sampler, len(steps), total, features)
    wanted = noise.of(range(min(max(*counts, TRAJECTORIES), len(noise.seeds))))

    def run(batch: int) -> Calibration:
        parts: list[list[Latents]] = []
        for number, part in enumerate(wanted.batches(batch)):
            parts.append([at for at in trajectory(job.full, steps, part) if at.step < len(steps)])
            job.tell(min((number + 1) * batch, len(wanted.seeds)), len(wanted.seeds))
        whole = (
            Latents(same[0].step, torch.cat([at.x for at in same]), sum((at.seeds for at in same), ()))
            for same in zip(*parts, strict=True)
        )
        return choose(whole, counts)

    found = halving(run, BATCH, "sampling", job.warn)
    broken = next((at.step for at in found if not torch.isfinite(at.x).all()), None)
    if broken is not None:
        raise NonFiniteError(
            f"step {broken}: full-precision latents hold NaN or infinity; the model does not stand this sampler"
        )
    return found


def _middle(network: Any) -> str:
    """The module in the middle of a denoiser; of a U-Net without a middle block the last that leads down."""
    blocks = getattr(network, "transformer_blocks", None)
    if blocks is not None:
        return f"transformer_blocks.{len(blocks) // 2}"
    return "mid_block" if network.mid_block is not None else f"down_blocks.{len(network.down_blocks) - 1}"


def round_weights(job: DiffusionJob, latents: Calibration) -> dict[str, UNetWeight]:
    step = job.spec.weight_step
    job.progress.stage(State.QUANTIZING, "rounding weights")
    if isinstance(step, SvdquantStep):
        wide = {layer.name: edge_bits(step) for layer in job.layers if not _is_inner_linear(job, layer)}
        return rounded(job, "mse", wide, symmetric=step.symmetric)
    if not isinstance(step, AdaroundStep):
        return rounded(job, _clip(step), weight_bits(job, step), symmetric=step.symmetric)

    def done(result: BlockResult) -> None:
        job.progress.event(
            "block", {"block": result.block, "mse_nearest": result.nearest, "mse_learned": result.learned}
        )

    def run(batch: int) -> dict[str, UNetWeight]:
        options = AdaRound(
            iterations=step.iterations,
            batch=batch,
            learning_rate=step.learning_rate,
            clip=_clip(step),
            symmetric=step.symmetric,
            seed=job.spec.calibration.seed,
        )
        copied = job.full.on(copy.deepcopy(job.loaded.network))
        pieces = BlockPieces(job.store, job.device, done)
        found, _ = reconstruct(
            job.full, copied, job.layers, latents, weight_bits(job, step), options, job.tell, pieces
        )
        return found

    return halving(run, step.batch, "recipe.0.batch (adaround)", job.warn)


def _is_inner_linear(job: DiffusionJob, layer: UNetLayer) -> bool:
    """Whether a low-rank branch pays: not for convolutions, the edges, and what sees the timestep alone."""
    return layer.role == "inner" and isinstance(job.loaded.network.get_submodule(layer.name), nn.Linear)


def install_low_rank(
    job: DiffusionJob, network: StepNetwork, latents: Calibration, step: SvdquantStep
) -> dict[str, LowRank]:
    """Put layers of two branches in place of the linear layers of `network`."""
    names = [layer.name for layer in job.layers if _is_inner_linear(job, layer)]
    activation = job.spec.activation_step
    token = TokenQuantizer(activation.bits) if isinstance(activation, UniformStep) else None
    inputs = layer_inputs(job.full, names, latents)
    found = {}
    for done, name in enumerate(names):
        dense = job.loaded.network.get_submodule(name)
        found[name] = fit_low_rank(dense.weight, inputs[name], step, token)
        network.unet.set_submodule(name, found[name].layer(dense.bias))
        job.tell(done + 1, len(names))
    return found


def rounded(
    job: DiffusionJob, clip: Clip, bits: Mapping[str, int], *, symmetric: bool
) -> dict[str, UNetWeight]:
    """The layers that `bits` names, rounded to nearest."""
    return {
        layer.name: quantize_weight(
            job.loaded.network.get_submodule(layer.name).weight,
            bits[layer.name],
            split=layer.split,
            clip=clip,
            symmetric=symmetric,
        )
        for layer in job.layers
        if layer.name in bits
    }


def weight_bits(job: DiffusionJob, step: WeightStep) -> dict[str, int]:
    assert isinstance(step, RtnStep | AdaroundStep | SvdquantStep)
    return layer_bits(job.layers, step.bits, edge_bits(step))


def _clip(step: WeightStep) -> Clip:
    return "mse" if step.clip == "mse" else "none"


def with_weights(job: DiffusionJob, weights: Mapping[str, UNetWeight]) -> StepNetwork:
    network = copy.deepcopy(job.loaded.network)
    set_weights(network, weights)
    return job.full.on(network)
