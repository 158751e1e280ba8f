"""The steps of a recipe, one after the other, on a copy of the denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from quantry.diffusion_planning import edge_bits
from quantry.jobs import State
from quantry.layers.low_rank import LowRankLinear
from quantry.layers.operands import attach
from quantry.quantizers.activation import TokenQuantizer
from quantry.recipe import (
    AccuquantStep,
    AdaroundStep,
    BiasCompensationStep,
    NoiseCorrectionStep,
    RtnStep,
    SoftmaxBiasStep,
    Step,
    SvdquantStep,
    UniformStep,
    WeightStep,
)
from quantry.reports import OperandReport
from worker.diffusion.accuquant import AccuQuant, GroupResult, calibrate
from worker.diffusion.adaround import AdaRound, BlockResult, reconstruct
from worker.diffusion.compensation import compensate
from worker.diffusion.correctors import RULES, Correction, corrected, fit_corrections
from worker.diffusion.memory import halving
from worker.diffusion.pieces import BlockPieces, GroupPieces
from worker.diffusion.prepare import DiffusionJob
from worker.diffusion.quantizers import StepNetwork, StepQuantizer, attach_quantizers, operand_of
from worker.diffusion.ranges import attention_sites, fit_quantizers
from worker.diffusion.softmax import correct_softmax
from worker.diffusion.steps import Denoiser
from worker.diffusion.svdquant import LowRank, fit_low_rank, layer_inputs
from worker.diffusion.timesteps import allocate, choose, middle_features
from worker.diffusion.trajectory import Latents, boundaries, trajectory
from worker.diffusion.unet import UNetLayer, layer_bits
from worker.diffusion.weights import Clip, UNetWeight, quantize_weight, set_weights
from worker.errors import NonFiniteError, RecipeError

LATENTS = 128  # that ranges are fitted to, where no weight step asks for another number
FEATURE_SAMPLES = 8  # that the density of timesteps is seen on
BATCH = 64  # samples that are sampled at once

Calibration = Sequence[Latents]


@dataclass
class QuantizedDenoiser:
    """What a recipe makes of the denoiser.

    network: weights and activations on their grids. weights, low_rank: by layer, each in one of them. groups: of
    AccuQuant. corrections: of each step, or none. operands: what is reported of softmax.
    """

    network: StepNetwork
    weights: dict[str, UNetWeight]
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    groups: list[GroupResult] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    operands: list[OperandReport] = field(default_factory=list)

    def bits(self, layer: str) -> int:
        """Of the layer's codes."""
        return (
            self.low_rank[layer].weight.bits if layer in self.low_rank else self.weights[layer].parts[0].bits
        )

    @property
    def denoiser(self) -> Denoiser:
        return corrected(self.network, self.corrections) if self.corrections else self.network

    def freeze(self) -> None:
        """Give the network the quantizers that an artifact holds, so that what is measured is what is written."""
        for name, quantizer in self.network.quantizers.items():
            if isinstance(quantizer, StepQuantizer):
                attach(self.network.unet, operand_of(name), quantizer.frozen())
        self.network = self.network.on(self.network.unet)


def quantize(job: DiffusionJob, latents: Calibration) -> QuantizedDenoiser:
    """Run the recipe. Raises CalibrationError and its kinds, OutOfMemory."""
    weights = _weights(job, latents)
    made = QuantizedDenoiser(_with_weights(job, weights), weights)
    if isinstance(job.spec.weight_step, SvdquantStep):
        made.low_rank = _low_rank(job, made.network, latents, job.spec.weight_step)
    for step in job.spec.recipe:
        if type(step) in _STEPS:
            _STEPS[type(step)](job, made, step, latents)
    made.freeze()
    return made


def round_to_nearest(job: DiffusionJob, latents: Calibration) -> StepNetwork:
    """The baseline: the same bits without any method, whole ranges, one grid for all steps."""
    step = job.spec.weight_step
    weights = _rounded(job, "none", _weight_bits(job, step), symmetric=step.symmetric)
    network = _with_weights(job, weights)
    activation = job.spec.activation_step
    if isinstance(activation, UniformStep):
        _attach_ranges(job, network, activation, latents, "none", len(network.steps))
    return network.on(network.unet)


def calibration_latents(job: DiffusionJob) -> Calibration:
    """Full-precision latents of every step, as many of each as the timestep sampler says."""
    job.progress.stage(State.CALIBRATING, "sampling in full precision")
    steps, noise = job.loaded.steps, job.calibration()
    total = getattr(job.spec.weight_step, "latents", LATENTS)
    few = noise.of(range(min(FEATURE_SAMPLES, len(noise.seeds))))

    def features() -> torch.Tensor:
        return middle_features(job.full, "mid_block", trajectory(job.full, steps, few))

    counts = allocate(job.plan.sampling.timestep_sampler, len(steps), total, features)
    wanted = noise.of(range(min(max(counts), len(noise.seeds))))

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


def _weights(job: DiffusionJob, latents: Calibration) -> dict[str, UNetWeight]:
    step = job.spec.weight_step
    job.progress.stage(State.QUANTIZING, "rounding weights")
    if isinstance(step, SvdquantStep):
        wide = {layer.name: edge_bits(step) for layer in job.layers if not _is_inner_linear(job, layer)}
        return _rounded(job, "mse", wide, symmetric=step.symmetric)
    if not isinstance(step, AdaroundStep):
        return _rounded(job, _clip(step), _weight_bits(job, step), symmetric=step.symmetric)

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
            job.full, copied, job.layers, latents, _weight_bits(job, step), options, job.tell, pieces
        )
        return found

    return halving(run, step.batch, "recipe.0.batch (adaround)", job.warn)


def _is_inner_linear(job: DiffusionJob, layer: UNetLayer) -> bool:
    """Whether a low-rank branch pays: not for convolutions, the edges, and what sees the timestep alone."""
    return layer.role == "inner" and isinstance(job.loaded.network.get_submodule(layer.name), nn.Linear)


def _low_rank(
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


def _rounded(
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


def _weight_bits(job: DiffusionJob, step: WeightStep) -> dict[str, int]:
    assert isinstance(step, RtnStep | AdaroundStep | SvdquantStep)
    return layer_bits(job.layers, step.bits, edge_bits(step))


def _clip(step: WeightStep) -> Clip:
    return "mse" if step.clip == "mse" else "none"


def _with_weights(job: DiffusionJob, weights: Mapping[str, UNetWeight]) -> StepNetwork:
    network = copy.deepcopy(job.loaded.network)
    set_weights(network, weights)
    return job.full.on(network)


def _attach_ranges(
    job: DiffusionJob, network: StepNetwork, step: UniformStep, latents: Calibration, clip: Clip, group: int
) -> None:
    try:
        operands = attention_sites(network.unet)
    except ValueError as error:
        raise RecipeError(f"uniform: {error}") from error
    layers = (*job.layers, *operands)
    if step.granularity == "token":
        for operand in operands:
            attach(network.unet, operand.name, TokenQuantizer(step.bits))
        layers = _attach_tokens(job, network, step)
    quantizers = fit_quantizers(
        network,
        layers,
        lambda: latents,
        bits=layer_bits(layers, step.bits, edge_bits(step)),
        steps_per_row=group,
        clip=clip,
    )
    attach_quantizers(network.unet, quantizers)


def _attach_tokens(job: DiffusionJob, network: StepNetwork, step: UniformStep) -> tuple[UNetLayer, ...]:
    """A grid for each token, found when it runs, before every linear layer; returns the layers that are left."""
    left = []
    for layer in job.layers:
        module = network.unet.get_submodule(layer.name)
        bits = step.bits if layer.role == "inner" else edge_bits(step)
        if isinstance(module, LowRankLinear):
            attach(network.unet, f"{layer.name}.residual.input", TokenQuantizer(bits))
        elif isinstance(module, nn.Linear):
            attach(network.unet, f"{layer.name}.input", TokenQuantizer(bits))
        else:
            left.append(layer)
    return tuple(left)


def _uniform(job: DiffusionJob, made: QuantizedDenoiser, step: UniformStep, latents: Calibration) -> None:
    job.progress.stage(State.QUANTIZING, "fitting grids to activations")
    _attach_ranges(job, made.network, step, latents, "mse" if step.range == "mse" else "none", job.plan.group)
    made.network = made.network.on(made.network.unet)


def _accuquant(job: DiffusionJob, made: QuantizedDenoiser, step: AccuquantStep, latents: Calibration) -> None:
    job.progress.stage(State.CORRECTING, "calibrating over groups of steps")
    noise = job.calibration()
    bounds = halving(
        lambda batch: boundaries(job.full, job.loaded.steps, noise, group=step.group, batch=batch),
        BATCH,
        "sampling",
        job.warn,
    )
    start = {name: q.scale.clone() for name, q in made.network.quantizers.items()}

    def done(result: GroupResult) -> None:
        facts = asdict(result)
        job.progress.event("block", facts)

    def run(batch: int) -> list[GroupResult]:
        for name, quantizer in made.network.quantizers.items():
            assert isinstance(quantizer, StepQuantizer)
            quantizer.log_scale.data.copy_(start[name].log())
        options = AccuQuant(
            group=step.group,
            gradient=step.gradient,
            per_group=step.per_group,
            start=step.start,
            iterations=step.iterations,
            batch=batch,
            learning_rate=step.learning_rate,
            seed=job.spec.calibration.seed,
        )
        return calibrate(
            made.network, bounds, noise, options, job.tell, GroupPieces(job.store, job.device, done)
        )

    at = job.spec.recipe.index(step)
    made.groups = halving(run, step.batch, f"recipe.{at}.batch (accuquant)", job.warn)


def _noise_correction(
    job: DiffusionJob, made: QuantizedDenoiser, step: NoiseCorrectionStep, latents: Calibration
) -> None:
    job.progress.stage(State.CORRECTING, "fitting corrections of the prediction")
    made.corrections = halving(
        lambda batch: fit_corrections(
            job.full,
            made.network,
            job.loaded.steps,
            job.calibration(),
            RULES[step.rule],
            batch=batch,
            tell=job.tell,
        ),
        BATCH,
        "fitting corrections",
        job.warn,
    )


def _softmax_bias(
    job: DiffusionJob, made: QuantizedDenoiser, step: SoftmaxBiasStep, latents: Calibration
) -> None:
    job.progress.stage(State.CORRECTING, "correcting softmax")
    made.operands += correct_softmax(made.network, latents, step, job.plan.group)
    made.network = made.network.on(made.network.unet)


def _bias_compensation(
    job: DiffusionJob, made: QuantizedDenoiser, step: BiasCompensationStep, latents: Calibration
) -> None:
    job.progress.stage(State.CORRECTING, "compensating biases")
    compensate(
        job.full,
        made.network,
        job.layers,
        latents,
        steps_per_row=job.plan.group,
        targets=step.targets,
        tell=job.tell,
    )
    made.network = made.network.on(made.network.unet)


_STEPS: dict[type[Step], Callable[[DiffusionJob, QuantizedDenoiser, Any, Calibration], None]] = {
    UniformStep: _uniform,
    AccuquantStep: _accuquant,
    SoftmaxBiasStep: _softmax_bias,
    BiasCompensationStep: _bias_compensation,
    NoiseCorrectionStep: _noise_correction,
}
