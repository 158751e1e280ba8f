"""Bias compensation of a denoiser's layers: the mean output error of each channel, for each group of sampling steps.

Gong et al., 2024, arXiv:2404.01892. `published` feeds each quantized layer the float layer's input; `sequential` the
input that it has in the quantized network, where the layers before are corrected already, so the mean error of what
runs vanishes. Sums in float64, so any split of the latents gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from quantry.layers.operands import attach
from quantry.quantizers.steps import StepBias
from worker.calibration.hooks import outputs_of
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.trajectory import Latents
from worker.diffusion.unet import UNetLayer
from worker.models.network import channels_last

Targets = Literal["sequential", "published"]
FLOAT = 32  # bits of what is added


class _Means:
    """Means of a layer's output over all tokens, by row of steps."""

    def __init__(self, layer: nn.Module, rows: int) -> None:
        self._layer = layer
        self._sums: list[Tensor | float] = [0.0] * rows
        self._tokens = [0] * rows

    def update(self, row: int, output: Tensor) -> None:
        values = channels_last(self._layer, output).flatten(0, -2)
        self._sums[row] = self._sums[row] + values.sum(0, dtype=torch.float64)
        self._tokens[row] += len(values)

    def all(self) -> Tensor:
        """(rows, channels) float64."""
        return torch.stack([torch.as_tensor(s) / n for s, n in zip(self._sums, self._tokens, strict=True)])


@torch.no_grad()
def compensate(
    full: StepNetwork,
    quantized: StepNetwork,
    layers: Sequence[UNetLayer],
    latents: Sequence[Latents],
    *,
    steps_per_row: int,
    targets: Targets,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Correct every layer of `quantized` in place. Latents of each row of steps are needed. tell: hears of layers."""
    rows = -(-len(full.steps) // steps_per_row)
    wanted = {layer.name: _Means(full.unet.get_submodule(layer.name), rows) for layer in layers}
    modules = {name: full.unet.get_submodule(name) for name in wanted}
    published = _PublishedMeans(quantized, layers, rows) if targets == "published" else None
    for index, x, seeds in latents:
        row = index // steps_per_row
        with outputs_of(modules, lambda name, output, row=row: wanted[name].update(row, output)):  # type: ignore[misc]
            if published is None:
                full.of(seeds)(x, index)
            else:
                published.see(full.of(seeds), x, index, row)
    for done, layer in enumerate(layers):
        if published is None:
            reached = _reached(quantized, layer.name, latents, steps_per_row, rows)
        else:
            reached = published.of(layer.name)
        bias = (wanted[layer.name].all() - reached.all()).float()
        table = StepBias(FLOAT, rows, steps_per_row, bias.shape[1]).to(bias.device).fill(bias=bias)
        attach(quantized.unet, f"{layer.name}.output", table)
        quantized = quantized.on(quantized.unet)
        tell(done + 1, len(layers))


class _Arrived(Exception):
    """The layer that was waited for has run."""


def _reached(
    quantized: StepNetwork, name: str, latents: Sequence[Latents], steps_per_row: int, rows: int
) -> _Means:
    """What a layer puts out in the quantized network as it is; the network runs no further than it."""
    layer = quantized.unet.get_submodule(name)
    means = _Means(layer, rows)
    present = 0

    def stop(module: nn.Module, inputs: object, output: Tensor) -> None:
        means.update(present, output)
        raise _Arrived

    with layer.register_forward_hook(stop):
        for index, x, seeds in latents:
            present = index // steps_per_row
            try:
                quantized.of(seeds)(x, index)
            except _Arrived:
                continue
    return means


class _PublishedMeans:
    """What the quantized layers put out for the inputs of the float ones."""

    def __init__(self, quantized: StepNetwork, layers: Sequence[UNetLayer], rows: int) -> None:
        self._quantized = quantized
        self._modules = {layer.name: quantized.unet.get_submodule(layer.name) for layer in layers}
        self._means = {name: _Means(module, rows) for name, module in self._modules.items()}

    def of(self, name: str) -> _Means:
        return self._means[name]

    def see(self, full: StepNetwork, x: Tensor, index: int, row: int) -> None:
        """Run the float network, and each quantized layer on what comes to the float one."""
        self._quantized.tell(index)
        hooks = [
            full.unet.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs, name=name: self._means[name].update(row, self._modules[name](*inputs))
            )
            for name in self._modules
        ]
        try:
            full(x, index)
        finally:
            for hook in hooks:
                hook.remove()
