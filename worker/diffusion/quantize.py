"""The steps of a recipe, one after the other, on a copy of the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from quantry.diffusion_planning import edge_bits
from quantry.jobs import State
from quantry.layers.low_rank import LowRankLinear
from quantry.layers.operands import attach
from quantry.quantizers.activation import TokenQuantizer
from quantry.recipe import (
    AccuquantStep,
    BiasCompensationStep,
    NoiseCorrectionStep,
    SoftmaxBiasStep,
    Step,
    SvdquantStep,
    UniformStep,
)
from quantry.reports import OperandReport
from worker.diffusion.accuquant import AccuQuant, GroupResult, calibrate
from worker.diffusion.compensation import compensate
from worker.diffusion.correctors import RULES, Correction, absorb_noise, corrected, fit_corrections
from worker.diffusion.memory import halving
from worker.diffusion.pieces import GroupPieces
from worker.diffusion.prepare import DiffusionJob
from worker.diffusion.quantizers import StepNetwork, StepQuantizer, attach_quantizers, operand_of
from worker.diffusion.ranges import attention_sites, fit_quantizers
from worker.diffusion.rounding import (
    BATCH,
    Calibration,
    install_low_rank,
    round_weights,
    rounded,
    weight_bits,
    with_weights,
)
from worker.diffusion.softmax import correct_softmax
from worker.diffusion.steps import Denoiser
from worker.diffusion.steps import Step as SamplingStep
from worker.diffusion.svdquant import LowRank
from worker.diffusion.trajectory import boundaries
from worker.diffusion.unet import UNetLayer, layer_bits
from worker.diffusion.weights import Clip, UNetWeight
from worker.errors import RecipeError


@dataclass
class QuantizedDenoiser:
    """What a recipe makes of the denoiser.

    network: weights and activations on their grids. weights, low_rank: by layer, each in one of them. groups: of
    AccuQuant. corrections: of each step, or none. quieter: the steps, where they add less noise than full precision's.
    operands: what is reported of softmax.
    """

    network: StepNetwork
    weights: dict[str, UNetWeight]
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    groups: list[GroupResult] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    quieter: tuple[SamplingStep, ...] = ()
    operands: list[OperandReport] = field(default_factory=list)

    def bits(self, layer: str) -> int:
        """Of the layer's codes."""
        return (
            self.low_rank[layer].weight.bits if layer in self.low_rank else self.weights[layer].parts[0].bits
        )

    def cpu(self) -> None:
        """Move what samples to the CPU, where an artifact is loaded again."""
        nn.Module.to(self.network.unet, "cpu")  # that of diffusers warns, even of nothing
        self.corrections = [correction.cpu() for correction in self.corrections]

    @property
    def denoiser(self) -> Denoiser:
        return corrected(self.network, self.corrections) if self.corrections else self.network

    @property
    def steps(self) -> tuple[SamplingStep, ...]:
        """How the quantized denoiser is sampled from."""
        return self.quieter or self.network.steps

    @property
    def noise_kept(self) -> tuple[float, ...] | None:
        """The part of each step's noise that it still adds, None where that is all of it."""
        if not self.quieter:
            return None
        pairs = zip(self.quieter, self.network.steps, strict=True)
        return tuple(less.sigma / step.sigma if step.sigma else 1.0 for less, step in pairs)

    def freeze(self) -> None:
        """Give the network the quantizers that an artifact holds, so that what is measured is what is written."""
        for name, quantizer in self.network.quantizers.items():
            if isinstance(quantizer, StepQuantizer):
                attach(self.network.unet, operand_of(name), quantizer.frozen())
        self.network = self.network.on(self.network.unet)


def quantize(job: DiffusionJob, latents: Calibration) -> QuantizedDenoiser:
    """Run the recipe. Raises CalibrationError and its kinds, OutOfMemory."""
    weights = round_weights(job, latents)
    made = QuantizedDenoiser(with_weights(job, weights), weights)
    if isinstance(job.spec.weight_step, SvdquantStep):
        made.low_rank = install_low_rank(job, made.network, latents, job.spec.weight_step)
    for step in job.spec.recipe:
        if type(step) in _STEPS:
            _STEPS[type(step)](job, made, step, latents)
    made.freeze()
    return made


def round_to_nearest(job: DiffusionJob, latents: Calibration) -> StepNetwork:
    """The baseline: the same bits without any method, whole ranges, one grid for all steps."""
    step = job.spec.weight_step
    weights = rounded(job, "none", weight_bits(job, step), symmetric=step.symmetric)
    network = with_weights(job, weights)
    activation = job.spec.activation_step
    if isinstance(activation, UniformStep):
        _attach_ranges(job, network, activation, latents, "none", len(network.steps))
    return network.on(network.unet)


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
        tell=job.tell,
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
            absorb=step.absorb,
            batch=batch,
            tell=job.tell,
        ),
        BATCH,
        "fitting corrections",
        job.warn,
    )
    if step.absorb:
        made.quieter = absorb_noise(job.loaded.steps, made.corrections)
        none_left = sum(kept == 0 for kept in made.noise_kept or ())
        if none_left:
            job.warn(
                f"at {none_left} of {len(made.steps)} steps quantization adds more noise than the sampler would: these "
                "add none, and samples are noisier than full precision's"
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
