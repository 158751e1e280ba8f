"""What a job that trains will take: memory and time from counted operations. No torch."""

from __future__ import annotations

from quantry.reports import Estimate, LayerPlan
from quantry.training_planning import TrainingPlan
from quantry.vision_costs import evaluated_images

_RUNTIME_BYTES = 800 * 2**20
_CPU_RATE = (5e9, 100e9)  # operations a second and thread, slow and fast
_CUDA_RATE = (2e12, 50e12)
_STATE = 6  # weights, their gradient, momentum, the quantized copy, the float network and a checkpoint being written
_ACTIVATIONS = 6  # copies of each layer's output: around norm and non-linearity, quantized, gradients


def estimate_training(
    plan: TrainingPlan,
    *,
    threads: int,
    cuda: bool,
    training_images: int | None,
    evaluation_images: int | None,
    loaded_bytes: int = 0,
) -> Estimate:
    """The dry run's answer, a model and no measurement.

    Args:
        training_images, evaluation_images: of the datasets, None where that is not known.
        loaded_bytes: of the arrays of images that are read whole.
    """
    step, warnings = plan.step, plan.warnings
    counts = [count for count in (step.samples, training_images) if count is not None]
    images = min(counts, default=None)
    if images is None:
        warnings = (*warnings, "the number of training images is not known yet: their time is left out")
    held = evaluated_images(plan.spec, evaluation_images)
    if held is None:
        warnings = (*warnings, "the number of evaluation images is not known yet: their time is left out")
        held = 0
    baseline = plan.spec.evaluation is not None and "fp" in plan.spec.evaluation.baselines
    forwards = 3.0 * (images or 0) * step.epochs * (1 + baseline) + held * (1 + baseline)
    slow, fast = _CUDA_RATE if cuda else [rate * threads for rate in _CPU_RATE]
    operations = forwards * plan.operations
    memory = _STATE * plan.parameters + min(step.batch_size, images or step.batch_size) * (
        _ACTIVATIONS * plan.values + 2 * plan.pixels
    )
    return Estimate(
        spec=plan.spec,
        format=plan.format,
        architecture=plan.architecture,
        parameters=plan.parameters,
        layers=layer_plans(plan),
        fp_bytes=plan.fp_bytes,
        quantized_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        peak_memory_bytes=_RUNTIME_BYTES
        + 4 * memory
        + 4 * plan.pixels * ((images or 0) + held)
        + loaded_bytes,
        seconds_low=round(1 + operations / fast, 1),
        seconds_high=round(40 + 2 * operations / slow, 1),
        warnings=warnings,
    )


def layer_plans(plan: TrainingPlan) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(
            name=layer.name,
            shape=(layer.shape[0], layer.weights // layer.shape[0]),
            quantized=layer.reason is None,
            reason=layer.reason,
        )
        for layer in plan.layers
    )
