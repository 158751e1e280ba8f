"""Bias compensation in the block sweep: whose output is corrected, on which inputs, and where the bias merges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantry.quantizers.affine import QuantizedLayer
from quantry.recipe import BiasCompensationStep
from worker.calibration.statistics import InputStatistics
from worker.calibration.streams import Stream
from worker.methods.bias_compensation import channel_bias, position_bias
from worker.models.calls import run_block
from worker.models.network import Network


class Compensator:
    """A step's levels on one network.

    Sequential: the two streams tell what the float and the quantized network compute, so that the mean error of a
    unit is that of its last layer. Published: every unit is fed its float input, lower levels first.
    """

    def __init__(self, model: Network, step: BiasCompensationStep) -> None:
        self.model, self.step = model, step
        self.levels = step.chosen_levels

    @property
    def published(self) -> bool:
        return self.step.targets == "published"

    @property
    def per_position(self) -> bool:
        return self.step.granularity == "position_channel"

    def corrects(self, index: int, layer: str) -> bool:
        """Whether the mean output error of a layer of block `index` is taken from the statistics of its input."""
        return "module" in self.levels or (not self.published and layer in self.units(index).values())

    def units(self, index: int) -> dict[str, str]:
        """The modules of a block that are compensated as a whole, and the last layer of each."""
        found = self.model.units(index)
        return dict(found[level] for level in self.levels if level in found)

    def of_layer(self, w: Tensor, w_q: Tensor, statistics: InputStatistics) -> Tensor:
        """The bias to add: (out,), or (positions, out)."""
        given = statistics.sum_f if self.published else statistics.sum_q
        compute = position_bias if self.per_position else channel_bias
        return compute(w, w_q, statistics.sum_f, given)

    def of_units(
        self, index: int, original: nn.Module, module: nn.Module, floating: Stream
    ) -> dict[str, Tensor]:
        """As published: the biases of attention modules and feed-forward networks, by their last layer.

        original, module: the float block and the quantized one; both are run on the float stream, which stays.
        """
        units = self.units(index)
        if not units or not self.published:
            return {}
        means = {layer: MeanError(self.per_position) for layer in units.values()}
        with ExitStack() as hooks:
            for unit, layer in units.items():
                counterpart, mean = module.get_submodule(unit), means[layer]

                def compare(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    out: Any,
                    counterpart: nn.Module = counterpart,
                    mean: MeanError = mean,
                ) -> None:
                    mean.add(_first(out), _first(counterpart(*args, **kwargs)))

                hooked = original.get_submodule(unit).register_forward_hook(compare, with_kwargs=True)
                hooks.callback(hooked.remove)
            for _, states, call in floating.batches(index):
                run_block(original, states, call)
        return {layer: mean.value for layer, mean in means.items()}

    def of_block(self, index: int) -> str | None:
        """The layer that takes a bias on the output of block `index`, if that is wanted."""
        return self.model.output_layer(index) if "block" in self.levels else None

    def of_ends(self, index: int) -> str | None:
        """The layer that takes a bias on what the network has computed up to the end of block `index`, if any.

        Of blocks where targets are sequential (as published they see float inputs), and of the whole model.
        """
        if index == self.model.count - 1 and "model" in self.levels:
            return self.model.groups(index)[-1][-1]
        return None if self.published else self.of_block(index)

    def of_streams(self, floating: Stream, deployed: Stream) -> Tensor:
        """The bias that brings the mean of what the quantized network has computed so far to the float's."""
        mean = MeanError(self.per_position)
        for a, b in _pairs(floating, deployed):
            mean.add(a, b)
        return mean.value


class MeanError:
    """The mean of float minus quantized outputs over all tokens, or over the windows at each position; float64 sums."""

    def __init__(self, per_position: bool) -> None:
        self.per_position = per_position
        self.total: Tensor | None = None
        self.count = 0

    def add(self, out: Tensor, quantized: Tensor) -> None:
        error = out.float() - quantized.float()
        error = error if error.ndim > 2 else error.unsqueeze(-2)  # a pooled vector is one token
        total = error.sum((0,) if self.per_position else (0, 1), dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count += len(error) if self.per_position else error[..., 0].numel()

    @property
    def value(self) -> Tensor:
        """(out,), or (positions, out), float32."""
        assert self.total is not None
        return (self.total / self.count).float()


def merged(layer: QuantizedLayer, bias: Tensor) -> QuantizedLayer:
    """The layer with a bias (out,) or (positions, out) more."""
    if bias.ndim == 2:
        total = bias if layer.position_bias is None else layer.position_bias + bias
        return replace(layer, position_bias=total)
    added = bias if layer.bias is None else layer.bias + bias
    return replace(layer, bias=added, added_bias=layer.added_bias or layer.bias is None)


def _first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


def _pairs(a: Stream, b: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(a.hidden, a.batch), torch.split(b.hidden, b.batch), strict=True)
