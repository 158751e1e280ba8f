"""What a planned job will take: memory and time, counted from shapes. Needs no torch.

Both are models, not measurements. Memory follows the block sweep (docs/api.md, "What an estimate counts"):
one block at a time, its Hessians, and the activations of every stream. Time divides counted operations by a
slow and a fast rate of the device class, so the range is wide on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantry.language_layers import Layer
from quantry.planning import Plan
from quantry.recipe import GptqStep
from quantry.reports import Estimate

RUNTIME_BYTES = 800 * 2**20  # a process with torch and transformers imported, and what malloc keeps
_BATCH_WINDOWS = 8  # windows that go through a block at once
_BYTES_PER_TOKEN = (2.5, 5.0)  # UTF-8 text: small and large vocabularies


@dataclass(frozen=True)
class Rates:
    """Operations a second (matrix products; factorisations) and seconds to start, slow and fast."""

    products: tuple[float, float]
    solves: tuple[float, float]
    start_s: tuple[float, float]


def cpu_rates(threads: int) -> Rates:
    """From float32 on an old core without help to bfloat16 with matrix units."""
    return Rates((10e9 * threads, 200e9 * threads), (2e9 * threads, 60e9 * threads), (1.0, 40.0))


CUDA_RATES = Rates((10e12, 400e12), (0.5e12, 20e12), (2.0, 60.0))


def estimate(
    plan: Plan, *, threads: int, cuda: bool, evaluation_bytes: int | None, warnings: tuple[str, ...] = ()
) -> Estimate:
    """The dry run's answer. `evaluation_bytes`: length of the evaluation text, None where it is not known."""
    tokens = _evaluation_tokens(plan, evaluation_bytes)
    if tokens is None:
        warnings = (
            *warnings,
            "the length of the evaluation text is not known yet: its memory and time are left out",
        )
        tokens = (0, 0)
    low, high = seconds(plan, tokens, CUDA_RATES if cuda else cpu_rates(threads))
    return Estimate(
        spec=plan.spec,
        format=plan.format,
        architecture=plan.written_family.architecture,
        parameters=plan.parameters,
        layers=plan.layers,
        fp_bytes=plan.fp_bytes,
        quantized_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        peak_memory_bytes=peak_memory(plan, tokens[1]),
        seconds_low=low,
        seconds_high=high,
        warnings=(*plan.warnings, *warnings),
    )


def peak_memory(plan: Plan, evaluation_tokens: int) -> int:
    """Bytes at the worst moment: runtime, kept tensors, one block thrice, Hessians, streams, one batch.

    Statistics and residual streams are float32; a block is held as float, as round-to-nearest and as the
    result; a Hessian is held with its cross moments, its factor and one work copy.
    """
    block = _block_layers(plan)
    weights = sum(layer.rows * layer.columns for layer in block)
    widest = max(layer.columns for layer in block)
    tallest = max(max(layer.rows, layer.columns) for layer in block)
    window = plan.spec.calibration.sequence_length or 0
    calibration = plan.spec.calibration.samples * window
    evaluation = plan.spec.evaluation
    evaluation_streams = 1 + len(evaluation.baselines) if evaluation else 0
    streams = 4 * plan.hidden * (2 * calibration + evaluation_streams * evaluation_tokens)
    batch = 4 * window * min(_BATCH_WINDOWS, plan.spec.calibration.samples) * 3 * tallest
    logits = 2 * 4 * window * plan.vocabulary if evaluation else 0
    fixed = RUNTIME_BYTES + 4 * plan.kept_parameters
    sweep = fixed + 3 * 4 * weights + 4 * 4 * widest**2 + streams + max(batch, logits)
    reload = RUNTIME_BYTES // 2 + 4 * plan.parameters  # a clean process reads the checkpoint in float32
    return max(sweep, reload)


def seconds(plan: Plan, evaluation_tokens: tuple[int, int], rates: Rates) -> tuple[float, float]:
    """A range of wall-clock seconds once a worker has the job and the model is on its disk."""
    spec = plan.spec
    step = spec.weight_step
    calibration = spec.calibration.samples * (spec.calibration.sequence_length or 0)
    weights = sum(layer.rows * layer.columns for layer in plan.quantized)
    head = plan.hidden * plan.vocabulary
    streams = 1 + len(spec.evaluation.baselines) if spec.evaluation else 0
    moments, solves = 0.0, 0.0
    if isinstance(step, GptqStep):
        share = len(_block_layers(plan)) / len(plan.written_family.groups)  # layers of a group share moments
        moments = sum(2.0 * layer.columns**2 * calibration for layer in plan.quantized) / share
        solves = sum(_solve_operations(layer, step) for layer in plan.quantized)
    bounds = []
    for passes, tokens, rate, solve, start in zip(
        (2, 6),
        evaluation_tokens,
        reversed(rates.products),
        reversed(rates.solves),
        rates.start_s,
        strict=True,
    ):
        forwards = 2.0 * weights * (passes * calibration + streams * tokens) + 2.0 * head * streams * tokens
        bounds.append(start + (forwards + 2 * moments) / rate + solves / solve)
    return round(bounds[0], 1), round(bounds[1], 1)


def _solve_operations(layer: Layer, step: GptqStep) -> float:
    """The sweep over columns and each refinement pass, and the factorisation of the Hessian."""
    return 2.0 * layer.rows * layer.columns**2 * (1 + step.passes) + 2.0 * layer.columns**3


def _block_layers(plan: Plan) -> tuple[Layer, ...]:
    return plan.quantized[: len(plan.family.linears)]


def _evaluation_tokens(plan: Plan, text_bytes: int | None) -> tuple[int, int] | None:
    evaluation = plan.spec.evaluation
    if evaluation is None:
        return 0, 0
    most = None
    if evaluation.samples is not None:
        most = evaluation.samples * (evaluation.sequence_length or 0)
    if text_bytes is None:
        return None if most is None else (0, most)
    few, many = (int(text_bytes / share) for share in reversed(_BYTES_PER_TOKEN))
    return (min(few, most), min(many, most)) if most is not None else (few, many)
