"""Softmax bias correction of a denoiser's attention, for each group of sampling steps.

Pandey et al., 2023, arXiv:2309.01729; see worker/methods/softmax_bias.py for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from quantry.layers.denoiser_attention import attentions, use_operand_attention
from quantry.layers.operands import ProbabilityObserver, attach, watch_probabilities
from quantry.quantizers.activation import UniformQuantizer
from quantry.quantizers.steps import StepProbabilities
from quantry.recipe import SoftmaxBiasStep
from quantry.reports import OperandReport
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.trajectory import Latents
from worker.errors import RecipeError
from worker.methods.softmax_bias import SoftmaxError, SoftmaxStatistics, unit_grid

See = Callable[[str, int], ProbabilityObserver]


@torch.no_grad()
def correct_softmax(
    network: StepNetwork, latents: Sequence[Latents], step: SoftmaxBiasStep, steps_per_row: int
) -> list[OperandReport]:
    """Quantize and correct every softmax of the network, in place, from what it computes on `latents`.

    Latents of each row of steps are needed. Returns the sums of rows and the SQNR of the attention's output, means
    over the groups of steps. Raises RecipeError for a network without attention, CalibrationError, NonFiniteError.
    """
    names = list(attentions(network.unet))
    if not names:
        raise RecipeError("softmax_bias: the denoiser has no attention; leave the step out")
    try:
        use_operand_attention(network.unet)
    except ValueError as error:
        raise RecipeError(f"softmax_bias: {error}") from error
    rows = -(-len(network.steps) // steps_per_row)
    grids = _grids(network, names, latents, step, steps_per_row, rows)
    found = {name: [SoftmaxStatistics(grid) for grid in grids[name]] for name in names}
    _watch(network, names, latents, lambda name, index: found[name][index // steps_per_row].update)
    reports = []
    for name in names:
        biases = [statistics.bias(step.granularity).flatten() for statistics in found[name]]
        heads = max(
            max(len(bias), grid.scale.numel()) for bias, grid in zip(biases, grids[name], strict=True)
        )
        scales = [grid.scale.flatten().expand(heads) for grid in grids[name]]
        table = StepProbabilities(step.bits, rows, steps_per_row, heads).to(biases[0].device)
        table.fill(scale=torch.stack(scales), bias=torch.stack([bias.expand(heads) for bias in biases]))
        attach(network.unet, f"{name}.probabilities", table)
        before = [statistics.error(None) for statistics in found[name]]
        after = [s.error(b.view(-1, 1, 1)) for s, b in zip(found[name], biases, strict=True)]
        reports.append(_report(name, step, before, after))
    return reports


def _grids(
    network: StepNetwork,
    names: Sequence[str],
    latents: Sequence[Latents],
    step: SoftmaxBiasStep,
    steps_per_row: int,
    rows: int,
) -> dict[str, list[UniformQuantizer]]:
    """The grid of each row of steps: over [0, 1], or to the largest probability seen."""
    device = latents[0].x.device
    if step.range == "unit":
        return {name: [unit_grid(step.bits).to(device)] * rows for name in names}
    largest: dict[str, dict[int, Tensor]] = {name: {} for name in names}

    def see(name: str, index: int) -> ProbabilityObserver:
        def keep(p: Tensor, valid: Tensor | None, value: Tensor) -> None:
            top = (p if valid is None else p * valid).amax((0, 2, 3)).float().view(-1, 1, 1)
            seen, row = largest[name], index // steps_per_row
            seen[row] = top if row not in seen else torch.maximum(seen[row], top)

        return keep

    _watch(network, names, latents, see)
    found: dict[str, list[UniformQuantizer]] = {}
    for name in names:
        tops = [largest[name][row] for row in range(rows)]
        highs = tops if step.granularity == "head" else [top.amax(0, keepdim=True) for top in tops]
        found[name] = [UniformQuantizer.covering(torch.zeros_like(high), high, step.bits) for high in highs]
    return found


def _watch(network: StepNetwork, names: Sequence[str], latents: Sequence[Latents], see: See) -> None:
    for index, x, seeds in latents:
        with ExitStack() as watching:
            for name in names:
                watching.enter_context(watch_probabilities(network.unet, name, see(name, index)))
            network.of(seeds)(x, index)


def _report(
    name: str, step: SoftmaxBiasStep, before: Sequence[SoftmaxError], after: Sequence[SoftmaxError]
) -> OperandReport:
    count = len(before)
    return OperandReport(
        name=f"{name}.probabilities",
        kind="probabilities",
        bits=step.bits,
        quantizer="step_probabilities",
        sqnr_db=min(200.0, sum(min(200.0, error.sqnr_db) for error in after) / count),
        row_sum_before=sum(error.row_sum for error in before) / count,
        row_sum_after=sum(error.row_sum for error in after) / count,
    )
