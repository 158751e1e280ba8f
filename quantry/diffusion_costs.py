"""What a planned diffusion job will take: memory and time, counted from shapes. Needs no torch. Both are models."""

from __future__ import annotations

from quantry.diffusion_planning import DiffusionPlan
from quantry.recipe import AccuquantStep, AdaroundStep
from quantry.reports import Estimate

_RUNTIME_BYTES = 900 * 2**20
_CPU_RATE = (
    2e9,
    100e9,
)  # operations a second and thread, slow and fast: small convolutions are far from the peak
_CUDA_RATE = (1e12, 60e12)
_OBSERVED = 3  # forwards for each calibration latent: sampled, ranges, histograms


def estimate_diffusion(plan: DiffusionPlan, *, threads: int, cuda: bool) -> Estimate:
    """The dry run's answer: memory and time from counted operations, a wide range on purpose."""
    low, high = _seconds(plan, threads=threads, cuda=cuda)
    return Estimate(
        spec=plan.spec,
        format=plan.format,
        architecture=plan.family.name,
        parameters=plan.parameters,
        layers=plan.layers,
        fp_bytes=plan.fp_bytes,
        quantized_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        peak_memory_bytes=_peak_memory(plan),
        seconds_low=low,
        seconds_high=high,
        warnings=plan.warnings,
    )


def _peak_memory(plan: DiffusionPlan) -> int:
    """Bytes at the worst moment: runtime, networks in float32, latents of all samples, one batch with its graph."""
    channels, height, width = plan.latent
    latent = channels * height * width
    groups = -(-plan.steps // plan.group)
    batch = max(
        16,
        getattr(plan.spec.weight_step, "batch", 0),
        plan.spec.accuquant.batch if plan.spec.accuquant else 0,
    )
    values = 40 * 64 * height * width  # of one latent's graph: tens of tensors, mostly at full size
    kept = plan.spec.calibration.samples * latent * (plan.steps + groups + 2)
    return _RUNTIME_BYTES + 4 * (4 * plan.parameters + kept + batch * values) + 2 * plan.copied_bytes


def forwards(plan: DiffusionPlan) -> float:
    """Forwards of one latent that a job takes, backward passes counted as two."""
    spec, steps = plan.spec, plan.steps
    total = float(spec.calibration.samples * steps * _OBSERVED)
    weights = spec.weight_step
    if isinstance(weights, AdaroundStep):
        recorded = (
            weights.latents * len(plan.layers) / 3
        )  # blocks of three layers, each recorded halfway, twice
        total += 3 * weights.iterations * weights.batch + recorded
    trained = spec.accuquant
    if isinstance(trained, AccuquantStep):
        total += steps * (4 * trained.iterations * trained.batch + 2 * spec.calibration.samples)
    evaluation = spec.evaluation
    if evaluation is not None:
        total += 5 * steps * (evaluation.samples or 0)
    return total


def _seconds(plan: DiffusionPlan, *, threads: int, cuda: bool) -> tuple[float, float]:
    operations = 2 * plan.operations * forwards(plan)
    slow, fast = _CUDA_RATE if cuda else [rate * threads for rate in _CPU_RATE]
    return round(5 + operations / fast, 1), round(60 + operations / slow, 1)
