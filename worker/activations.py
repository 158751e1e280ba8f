"""The activation side of a recipe, before the block sweep: quantizers, softmax corrections, their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantry.contract import JobSpec
from quantry.jobs import State
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedWeight
from quantry.quantizers.product_bias import ProductBias
from quantry.recipe import AdalogStep, IgqStep, Ptq4vitStep, RepqStep, SmoothquantStep, UniformStep
from quantry.reports import OperandReport
from worker.calibration.streams import Stream
from worker.dressing import Dressing
from worker.memory import release_memory
from worker.methods import adalog, igq, ptq4vit, repq, uniform
from worker.methods.activations import Calibrated, Images, names_of, observe
from worker.methods.product_bias import product_biases
from worker.methods.smoothquant import Smoothed, input_maxima, input_quantizers, smooth_block
from worker.methods.softmax_bias import SoftmaxResult, correct_softmax
from worker.models.causal_lm import CausalLM
from worker.models.network import Network, join
from worker.models.vision import VisionModel
from worker.progress import Progress

ACTIVATION_STEPS: dict[type, Callable[[VisionModel, Images, Any], Calibrated]] = {
    UniformStep: uniform.calibrate,
    Ptq4vitStep: ptq4vit.calibrate,
    RepqStep: repq.calibrate,
    AdalogStep: adalog.calibrate,
    IgqStep: igq.calibrate,
}
REPORTED_IMAGES = 32


@dataclass(frozen=True)
class Activations:
    """What the sweep dresses its networks with. baseline: the network that round-to-nearest works on."""

    dressing: Dressing = field(default_factory=Dressing)
    nearest: Dressing = field(default_factory=Dressing)
    chosen: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    baseline: Network | None = None
    operands: tuple[OperandReport, ...] = ()


def calibrate_activations(
    model: Network, spec: JobSpec, calibration: Tensor | None, progress: Progress
) -> Activations:
    """Run the activation step and the softmax correction of a recipe on the float network."""
    if calibration is None or (spec.activation_step is None and spec.softmax_bias is None):
        return Activations()
    found, nearest = Calibrated({}), Dressing()
    baseline: Network | None = None
    if isinstance(model, VisionModel) and spec.activation_step is not None:
        found, baseline, nearest = _activation_step(model, spec, calibration, progress)
    if isinstance(model, CausalLM) and isinstance(spec.activation_step, SmoothquantStep):
        found, baseline, nearest = _smoothquant(model, spec.activation_step, calibration, progress)
    corrected = _softmax(model, spec, calibration, found.quantizers, progress)
    probabilities = {f"{name}.probabilities": result.quantizer for name, result in corrected.items()}
    quantizers = found.quantizers | probabilities
    nearest = Dressing({**probabilities, **nearest.quantizers})  # the same grid, not corrected
    biases = {attention: result.bias for attention, result in corrected.items()}
    products = _products(model, spec, calibration, quantizers, biases, progress)
    dressing = Dressing({**_places(model, quantizers), **products}, biases)
    reports = _reports(model, quantizers, calibration, corrected)
    release_memory()
    return Activations(dressing, nearest, found.weights, baseline, reports)


def _activation_step(
    model: VisionModel, spec: JobSpec, pixels: Tensor, progress: Progress
) -> tuple[Calibrated, VisionModel | None, Dressing]:
    """The step's own result, and the min-max baseline on a network that no method has rewritten.

    Without an evaluation nothing is compared with, and there is no baseline.
    """
    step = spec.activation_step
    assert step is not None

    def images(method: str) -> Images:
        progress.stage(State.CALIBRATING, f"activations: {method}")

        def begin(what: str) -> None:
            progress.stage(State.CALIBRATING, f"activations: {method}, {what}")

        return Images(pixels, spec.calibration.seed, spec.weight_step, progress.advance, begin)

    if spec.evaluation is None:
        return ACTIVATION_STEPS[type(step)](model, images(step.method), step), None, Dressing()
    untouched = VisionModel(model.folder, device=model.device)
    plain = UniformStep(bits=step.bits, softmax_bits=getattr(step, "softmax_bits", None))
    nearest = uniform.calibrate(untouched, images("round to nearest"), plain)
    found = ACTIVATION_STEPS[type(step)](model, images(step.method), step)
    return found, untouched, Dressing(_places(model, nearest.quantizers))


def _smoothquant(
    model: CausalLM, step: SmoothquantStep, tokens: Tensor, progress: Progress
) -> tuple[Calibrated, CausalLM, Dressing]:
    """Smooth every block on the float network; the baseline is the same grids without smoothing."""
    progress.stage(State.CALIBRATING, "smoothing activations", 0, model.count)
    untouched = CausalLM(model.folder, device=model.device, dtype=model.dtype, attention=model.attention_kind)
    stream = Stream.embed(model, tokens)
    found, plain = Calibrated({}), Calibrated({})
    for index in range(model.count):
        block, prefix = model.block(index), model.prefix(index)
        batches = [(states, call) for _, states, call in stream.batches(index)]
        maxima = input_maxima(block, model.family, batches)
        stream.advance(block, index)
        smoothed = smooth_block(block, model.family, model.config.to_dict(), maxima, step.alpha)
        model.smooth(prefix, smoothed.scales, smoothed.norms)
        for into, what in ((found, smoothed), (plain, Smoothed({}, {}))):
            grids = input_quantizers(model.family, maxima, what, step)
            into.quantizers.update({join(prefix, place): grid for place, grid in grids.items()})
        progress.advance(index + 1, model.count)
    return found, untouched, Dressing(plain.quantizers)


def _places(model: Network, quantizers: Mapping[str, ActivationQuantizer]) -> dict[str, ActivationQuantizer]:
    """By place instead of operand: an input that q, k and v share stands before each of them."""
    if not isinstance(model, VisionModel):
        return dict(quantizers)
    return {
        place: quantizers[operand.name]
        for operand in model.operands
        if operand.name in quantizers
        for place in names_of(operand)
    }


def _softmax(
    model: Network,
    spec: JobSpec,
    inputs: Tensor,
    quantizers: Mapping[str, ActivationQuantizer],
    progress: Progress,
) -> dict[str, SoftmaxResult]:
    """The correction of every attention module, on the float network's own probabilities."""
    step = spec.softmax_bias
    if step is None:
        return {}
    progress.stage(State.CALIBRATING, "softmax bias", 0, model.count)
    stream = Stream.embed(model, inputs)
    results: dict[str, SoftmaxResult] = {}
    for index in range(model.count):
        block = model.block(index)
        attention = model.attention(index)
        if attention is not None:
            full = join(model.prefix(index), attention)
            given = quantizers.get(f"{full}.probabilities")
            runs = [(states, call) for _, states, call in stream.batches(index)]
            results[full] = correct_softmax(block, attention, runs, step, given)
        stream.advance(block, index)
        progress.advance(index + 1, model.count)
    return results


def _products(
    model: Network,
    spec: JobSpec,
    pixels: Tensor,
    quantizers: Mapping[str, ActivationQuantizer],
    biases: Mapping[str, Tensor],
    progress: Progress,
) -> dict[str, ProductBias]:
    """The biases on the products of attention, where bias compensation is asked for them."""
    if not (
        isinstance(model, VisionModel) and spec.compensation and "products" in spec.compensation.chosen_levels
    ):
        return {}
    progress.stage(State.CALIBRATING, "biases of attention products")
    return product_biases(model, pixels, quantizers, biases, progress.advance)


def _reports(
    model: Network,
    quantizers: Mapping[str, ActivationQuantizer],
    inputs: Tensor,
    corrected: Mapping[str, SoftmaxResult],
) -> tuple[OperandReport, ...]:
    """Every quantized operand with its error on the first calibration images."""
    noise: dict[str, float] = {}
    if isinstance(model, VisionModel):
        noise = operand_sqnr(model, inputs[:REPORTED_IMAGES], quantizers)
        kinds = {operand.name: operand.kind for operand in model.operands}
    else:
        kinds = {name: "probabilities" if name.endswith(".probabilities") else "input" for name in quantizers}
    reports = []
    for name in sorted(quantizers, key=list(kinds).index):  # in the order of the network
        quantizer = quantizers[name]
        result = corrected.get(name.removesuffix(".probabilities"))
        reports.append(
            OperandReport(
                name=name,
                kind=kinds[name],
                bits=quantizer.bits,
                quantizer=quantizer.kind,
                sqnr_db=noise.get(name),
                row_sum_before=result.before.row_sum if result else None,
                row_sum_after=result.after.row_sum if result else None,
            )
        )
    return tuple(reports)


@torch.no_grad()
def operand_sqnr(
    model: VisionModel, pixels: Tensor, quantizers: Mapping[str, ActivationQuantizer]
) -> dict[str, float]:
    """Signal to quantization noise of each operand in the float network, in decibel."""
    power = dict.fromkeys(quantizers, 0.0)
    error = dict.fromkeys(quantizers, 0.0)

    def see(x: Tensor, name: str) -> None:
        power[name] += float(x.square().sum(dtype=torch.float64))
        error[name] += float((quantizers[name](x) - x).square().sum(dtype=torch.float64))

    observe(model, pixels, {name: partial(see, name=name) for name in quantizers})
    return {
        name: 10 * math.log10(max(power[name], 1e-300) / max(error[name], 1e-300 + power[name] * 1e-30))
        for name in quantizers
    }
