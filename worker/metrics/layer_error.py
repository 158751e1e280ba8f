"""The output error of every layer of a block, measured in the running networks, on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worker.block import QuantizedBlock
from worker.calibration.hooks import outputs_of
from worker.calibration.streams import Stream
from worker.models.calls import run_block
from worker.models.network import Network, channels_last, linears


class ErrorSum:
    """Sums over tokens of a layer's output error against its float output."""

    def __init__(self) -> None:
        self.squared = self.power = 0.0
        self.tokens = 0
        self.mean: Tensor | None = None

    def update(self, output: Tensor, reference: Tensor) -> None:
        """output, reference: (..., out)."""
        error = (output.float() - reference.float()).flatten(0, -2)
        self.squared += float(error.square().sum(dtype=torch.float64))
        self.power += float(reference.float().square().sum(dtype=torch.float64))
        total = error.sum(0, dtype=torch.float64)
        self.mean = total if self.mean is None else self.mean + total
        self.tokens += len(error)

    @property
    def relative(self) -> float:
        """Mean squared error over mean squared output."""
        return self.squared / max(self.power, 1e-300)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibel."""
        return -10 * math.log10(max(self.relative, 1e-30))

    def mean_error(self, without: Tensor | None) -> float:
        """Rms over channels of the mean error; `without` a bias (out,) that the layer has added."""
        assert self.mean is not None
        mean = self.mean / self.tokens
        if without is not None:
            mean = mean - without.double()
        return float(mean.square().mean().sqrt())


@torch.no_grad()
def layer_errors(
    model: Network,
    index: int,
    original: nn.Module,
    block: QuantizedBlock,
    nearest: nn.Module | None,
    streams: Mapping[str, Stream],
) -> dict[str, dict[str, ErrorSum]]:
    """Errors by network (`quantized`, `rtn`) and layer, over the first batch of evaluation windows.

    Empty without a float evaluation stream. Call before the streams pass the block.
    """
    errors: dict[str, dict[str, ErrorSum]] = {"quantized": {}, "rtn": {}}
    if "fp" not in streams:
        return errors
    reference: dict[str, Tensor] = {}
    where, states, call = next(streams["fp"].batches(index))
    names = linears(model, index)

    def keep(name: str, output: Tensor) -> None:
        reference[name] = channels_last(original.get_submodule(name), output)

    with outputs_of({n: original.get_submodule(n) for n in names}, keep):
        run_block(original, states, call)
    for network, module in (("quantized", block.module), ("rtn", nearest)):
        if module is None or network not in streams:
            continue
        sums = errors[network]

        def see(name: str, output: Tensor, sums: dict[str, ErrorSum] = sums) -> None:
            values = channels_last(original.get_submodule(name), output)
            sums.setdefault(name, ErrorSum()).update(values, reference[name])

        with outputs_of({n: module.get_submodule(n) for n in names}, see):
            run_block(module, streams[network].hidden[where], call)
    return errors
