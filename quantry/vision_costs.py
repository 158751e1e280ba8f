"""What a job on an image classifier will take: memory and time from counted operations. No torch."""

from __future__ import annotations

from quantry.contract import JobSpec
from quantry.recipe import FISHER_DRAWS, Ptq4vitStep
from quantry.reports import Estimate
from quantry.vision_planning import VisionPlan

_RUNTIME_BYTES = 800 * 2**20
_BATCH_IMAGES = 32  # that go through a block at once
_CPU_RATE = (10e9, 200e9)  # operations a second and thread, slow and fast
_CUDA_RATE = (5e12, 100e12)
_SEARCH_PASSES = {"uniform": 2, "repq": 6, "igq": 12, "adalog": 200, "ptq4vit": 120}


def estimate_vision(
    plan: VisionPlan,
    *,
    threads: int,
    cuda: bool,
    evaluation_images: int | None = None,
    loaded_bytes: int = 0,
) -> Estimate:
    """The dry run's answer: memory and time from counted operations, a wide range on purpose.

    Args:
        evaluation_images: how many the evaluation could take, None where that is not known.
        loaded_bytes: of the arrays of images that are read whole before some are chosen.
    """
    evaluated, warnings = evaluated_images(plan.spec, evaluation_images), plan.warnings
    if evaluated is None:
        warnings = (
            *warnings,
            "the number of evaluation images is not known yet: their memory and time are left out",
        )
    low, high = _seconds(plan, evaluated or 0, threads=threads, cuda=cuda)
    return Estimate(
        spec=plan.spec,
        format=plan.format,
        architecture=plan.family.architecture,
        parameters=plan.parameters,
        layers=plan.layers,
        fp_bytes=plan.fp_bytes,
        quantized_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        peak_memory_bytes=_peak_memory(plan, evaluated or 0) + loaded_bytes,
        seconds_low=low,
        seconds_high=high,
        warnings=warnings,
    )


def evaluated_images(spec: JobSpec, available: int | None) -> int | None:
    """Images that will be evaluated, at most; None where that is not known."""
    if spec.evaluation is None:
        return 0
    counts = [count for count in (spec.evaluation.samples, available) if count is not None]
    return min(counts, default=None)


def _peak_memory(plan: VisionPlan, evaluated: int) -> int:
    """Bytes at the worst moment: runtime, networks, pixels, a stream of values each, one batch, one Hessian.

    All float32. The network is held as float, as round-to-nearest and as the result; a Hessian with its cross
    moments, its factor and a work copy. A stream starts as a copy of the pixels; one at a time is held as it was
    and as it will be. Fisher information takes what enters every block, and a gradient for each drawn label.
    Biases of the attention's products are held beside their sums in float64.
    """
    calibrated = plan.spec.calibration.samples
    step = plan.spec.activation_step
    fisher = isinstance(step, Ptq4vitStep) and step.metric == "fisher"
    walked = (plan.blocks + FISHER_DRAWS) * plan.stream * calibrated if fisher else 0
    streams = [calibrated, calibrated, *[evaluated] * _evaluation_streams(plan.spec)]
    pixels = plan.pixels * (calibrated + evaluated)
    values = max(plan.pixels, plan.stream) * sum(streams) + min(plan.pixels, plan.stream) * max(streams)
    batch = 3 * _BATCH_IMAGES * plan.block_values
    return _RUNTIME_BYTES + 4 * (
        3 * plan.parameters
        + pixels
        + max(values, walked)
        + batch
        + 4 * plan.widest**2
        + 3 * plan.product_biases
    )


def _seconds(plan: VisionPlan, evaluated: int, *, threads: int, cuda: bool) -> tuple[float, float]:
    """A range of wall-clock seconds once a worker has the job and the model is on its disk."""
    activation = plan.spec.activation_step
    search = _SEARCH_PASSES.get(activation.method, 2) if activation else 0
    images = plan.spec.calibration.samples * (6 + search) + evaluated * _evaluation_streams(plan.spec)
    operations = 2.0 * plan.quantized_weights * plan.tokens * images
    slow, fast = _CUDA_RATE if cuda else [rate * threads for rate in _CPU_RATE]
    return round(1 + operations / fast, 1), round(40 + 4 * operations / slow, 1)


def _evaluation_streams(spec: JobSpec) -> int:
    """Networks that the evaluation images go through."""
    return 1 + len(spec.evaluation.baselines) if spec.evaluation else 0
