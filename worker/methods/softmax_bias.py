"""Softmax bias correction: give attention probabilities back the mass that their quantizer takes.

Pandey et al., "Softmax Bias Correction for Quantized Generative Models", ICCV Workshops 2023, arXiv:2309.01729.
A grid over [0, 1] rounds the many small probabilities of a long row to 0, so rows no longer sum to 1. The
constant beta = E[P - Q(P)] over the valid entries minimises E[(P - Q(P) - beta)^2]; every row of P sums to 1,
so sums of Q(P) alone give it. At inference it is the real-valued part of the quantizer's offset,
s (q - z) + beta = s (q - (z - beta / s)), and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantry.layers.operands import ProbabilityObserver, watch_probabilities
from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.recipe import SoftmaxBiasStep
from worker.errors import CalibrationError, NonFiniteError
from worker.models.calls import BlockCall, run_block

Batches = Sequence[tuple[Tensor, BlockCall]]
CHUNK = 1 << 22  # probabilities summed at once in float64: 32 MiB a copy


@dataclass(frozen=True)
class SoftmaxError:
    """What quantized probabilities are worth, over all rows that were seen.

    row_sum: mean sum of a row over its valid keys; 1 in full precision. mse: of a valid probability.
    sqnr_db: 10 log10(E|P V|^2 / E|P V - P_q V|^2), the attention's output.
    """

    row_sum: float
    mse: float
    sqnr_db: float


@dataclass(frozen=True)
class SoftmaxResult:
    """quantizer: of the probabilities. bias: beta, float32 (H, 1, 1) or (1, 1, 1), for `set_probability_bias`."""

    quantizer: ActivationQuantizer
    bias: Tensor
    before: SoftmaxError
    after: SoftmaxError


class SoftmaxStatistics:
    """Sums per head in float64, exact over any split into batches: beta and the errors for any beta follow.

    quantizer: of P (batch, heads, queries, keys). Rows without a valid key (padding) are left out.
    """

    def __init__(self, quantizer: nn.Module) -> None:
        self._quantizer = quantizer
        self._sums: dict[str, Tensor] = {}

    def update(self, p: Tensor, valid: Tensor | None, value: Tensor) -> None:
        """Take the softmax of some windows or images; a `ProbabilityObserver`.

        p: (batch, heads, queries, keys). valid: 1 where the mask is open, broadcasts to p; None: everywhere.
        value: (batch, heads, keys, width). Raises NonFiniteError.
        """
        quantized = self._quantizer(p)
        open_ = None if valid is None else valid.expand(p.shape)
        rows = max(1, CHUNK // (p.numel() // p.shape[2]))
        for start in range(0, p.shape[2], rows):
            part = (slice(None), slice(None), slice(start, start + rows))
            self._add(p[part], quantized[part], None if open_ is None else open_[part], value)
        if not math.isfinite(float(self._sums["quantized"].sum())):
            raise NonFiniteError("attention probabilities are NaN or infinite: the network overflows")

    def _add(self, p: Tensor, quantized: Tensor, valid: Tensor | None, value: Tensor) -> None:
        mask = torch.ones_like(p) if valid is None else valid.to(p.dtype)
        p, quantized = p * mask, quantized * mask
        error = p - quantized
        keys = mask.sum(-1, dtype=torch.float64)
        values = value.to(p.dtype)
        output, lost, mass = (x @ values for x in (p, error, mask))  # mass @ V: what beta = 1 would add
        self._sum("rows", keys > 0)
        self._sum("keys", keys)
        self._sum("quantized", quantized)
        self._sum("squared", error.double().square())
        self._sum("power", output.double().square())
        self._sum("lost", lost.double().square())
        self._sum("cross", lost.double() * mass.double())
        self._sum("mass", mass.double().square())

    def _sum(self, name: str, x: Tensor) -> None:
        total = x.sum([axis for axis in range(x.ndim) if axis != 1], dtype=torch.float64)
        self._sums[name] = total if name not in self._sums else self._sums[name] + total

    def bias(self, granularity: str) -> Tensor:
        """beta = (rows - sum Q(P)) / valid keys, eq. 2 of the method page: float32 (H, 1, 1) or (1, 1, 1).

        Raises CalibrationError if nothing was seen.
        """
        if not self._sums or not bool(self._sums["keys"].sum() > 0):
            raise CalibrationError(
                "softmax bias correction saw no attention row: give calibration data, once for each pass"
            )
        sums = self._sums
        lost, keys = sums["rows"] - sums["quantized"], sums["keys"]
        if granularity == "tensor":
            lost, keys = lost.sum(0, keepdim=True), keys.sum(0, keepdim=True)
        return (lost / keys.clamp(min=1)).float().view(-1, 1, 1)

    def error(self, bias: Tensor | None) -> SoftmaxError:
        """The error that is left with this beta, (H, 1, 1) or (1, 1, 1); None: without."""
        sums = self._sums
        beta = torch.zeros_like(sums["rows"]) if bias is None else bias.double().flatten()
        lost = sums["rows"] - sums["quantized"]
        squared = sums["squared"] - 2 * beta * lost + beta.square() * sums["keys"]
        output = sums["lost"] - 2 * beta * sums["cross"] + beta.square() * sums["mass"]
        row_sum = (sums["quantized"] + beta * sums["keys"]).sum() / sums["rows"].sum()
        return SoftmaxError(
            row_sum=float(row_sum),
            mse=float(squared.sum().clamp(min=0) / sums["keys"].sum()),
            sqnr_db=_decibels(float(sums["power"].sum()), float(output.sum())),
        )


class _Largest:
    """The largest valid probability, per head (H, 1, 1)."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, p: Tensor, valid: Tensor | None, value: Tensor) -> None:
        seen = p if valid is None else p * valid
        top = seen.amax((0, 2, 3)).float().view(-1, 1, 1)
        self.value = top if self.value is None else torch.maximum(self.value, top)


@torch.no_grad()
def correct_softmax(
    block: nn.Module,
    attention: str,
    batches: Batches,
    step: SoftmaxBiasStep,
    quantizer: ActivationQuantizer | None = None,
) -> SoftmaxResult:
    """The correction of one attention module, from one run of its block over the batches.

    Args:
        block: of a causal language model or a classifier, with attention `quantry`. It runs as it is, with
            whatever quantizers are on it, and is left as it was.
        attention: the attention module's path inside the block.
        batches: (hidden, call), what enters the block; in a job, from the float network. A second run finds
            the largest probability where `step.range` is max.
        quantizer: of the probabilities, where an activation step has one; None: the step's own uniform grid.
    Raises: CalibrationError if the block never showed a softmax, NonFiniteError.
    """
    if quantizer is None:
        quantizer = _grid(block, attention, batches, step)
    statistics = SoftmaxStatistics(quantizer)
    _run(block, attention, batches, statistics.update)
    bias = statistics.bias(step.granularity)
    return SoftmaxResult(quantizer, bias, statistics.error(None), statistics.error(bias))


def unit_grid(bits: int) -> UniformQuantizer:
    """The grid over [0, 1] of deployment kits: zero_point 0, scale 1 / (2**bits - 1), per tensor."""
    return UniformQuantizer(bits, []).fill(
        scale=torch.tensor(1 / (2**bits - 1)), zero_point=torch.tensor(0.0)
    )


def _grid(block: nn.Module, attention: str, batches: Batches, step: SoftmaxBiasStep) -> UniformQuantizer:
    if step.range == "unit":
        return unit_grid(step.bits).to(batches[0][0].device) if batches else unit_grid(step.bits)
    largest = _Largest()
    _run(block, attention, batches, largest.update)
    if largest.value is None:
        raise CalibrationError(f"`{attention}` never showed a softmax: its attention must be `quantry`")
    high = largest.value if step.granularity == "head" else largest.value.max()
    return UniformQuantizer.covering(torch.zeros_like(high), high, step.bits)


def _run(block: nn.Module, attention: str, batches: Batches, see: ProbabilityObserver) -> None:
    with watch_probabilities(block, attention, see):
        for hidden, call in batches:
            run_block(block, hidden, call)


def _decibels(power: float, error: float) -> float:
    """10 log10(power / error); infinity where nothing is left of the error."""
    return 10 * math.log10(power / error) if error > 0 and power > 0 else math.inf
