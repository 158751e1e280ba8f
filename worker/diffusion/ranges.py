"""Grids of activations from what is observed along trajectories: whole ranges, or searched ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from quantry.layers.denoiser_attention import attentions, use_operand_attention
from quantry.layers.operands import ROLES, attach, attention_operands
from quantry.quantizers.activation import UniformQuantizer
from quantry.quantizers.steps import channel_halves
from worker.diffusion.quantizers import StepNetwork, StepQuantizer
from worker.diffusion.trajectory import Latents
from worker.diffusion.unet import UNetLayer
from worker.errors import NonFiniteError
from worker.methods.uniform import BINS, mse_range

Source = Callable[[], Iterable[Latents]]  # full-precision latents of every step; called twice
Clip = Literal["none", "mse"]


@torch.no_grad()
def fit_quantizers(
    network: StepNetwork,
    layers: Sequence[UNetLayer],
    latents: Source,
    *,
    bits: Mapping[str, int],
    steps_per_row: int,
    clip: Clip = "mse",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, StepQuantizer]:
    """A quantizer for the input of each layer, from what the network computes on `latents`.

    Args:
        network: without quantizers; its weights may be quantized already.
        bits: by layer name.
        steps_per_row: consecutive steps that share a grid; time layers have one a step, the first one for all.
        clip: cover all that was seen (`none`), or search the range of least squared error. Time layers and the
            first cover all and are not trained: a latent that is clipped drifts further at every step.
        tell: hears (done, total) steps.
    Raises: NonFiniteError, naming the layer.
    """
    sites = [_Site(layer, len(network.steps), steps_per_row) for layer in layers]
    passes = 2 if clip == "mse" else 1
    total = passes * len(network.steps)
    _observe(network, sites, latents, _Site.see_range, lambda done: tell(done, total))
    for site in sites:
        site.check()
    searched = [site for site in sites if clip == "mse" and site.learned]
    if searched:
        _observe(
            network, searched, latents, _Site.see_counts, lambda done: tell(len(network.steps) + done, total)
        )
    return {site.layer.name: site.quantizer(bits[site.layer.name]) for site in sites}


class _Site:
    """What is known of one layer's input: (rows, halves) ranges, and histograms over them."""

    def __init__(self, layer: UNetLayer, steps: int, steps_per_row: int) -> None:
        self.layer = layer
        self.learned = layer.role not in ("time", "first")
        self.steps_per_row = {"time": 1, "first": steps}.get(layer.role, steps_per_row)
        shape = (-(-steps // self.steps_per_row), 2 if layer.split else 1)
        self.low, self.high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        self.counts: Tensor | None = None

    def see_range(self, index: int, x: Tensor) -> None:
        row = index // self.steps_per_row
        for half, part in enumerate(channel_halves(x, self.layer.split)):
            low, high = part.float().aminmax()
            self.low[row, half] = torch.minimum(self.low[row, half], low.cpu())
            self.high[row, half] = torch.maximum(self.high[row, half], high.cpu())

    def see_counts(self, index: int, x: Tensor) -> None:
        if self.counts is None:
            self.counts = torch.zeros(*self.low.shape, BINS, dtype=torch.float64)
        row = index // self.steps_per_row
        for half, part in enumerate(channel_halves(x, self.layer.split)):
            low, high = self.low[row, half].item(), self.high[row, half].item()
            self.counts[row, half] += torch.histc(part.float(), BINS, low, high).cpu()

    def check(self) -> None:
        if not (torch.isfinite(self.low).all() and torch.isfinite(self.high).all()):
            raise NonFiniteError(
                f"{self.layer.name}: its input holds NaN or infinity on the calibration samples"
            )

    def quantizer(self, bits: int) -> StepQuantizer:
        low, high = self.low.clone(), self.high.clone()
        if self.counts is not None:
            for at in torch.cartesian_prod(*map(torch.arange, low.shape)).tolist():
                key = tuple(at)
                low[key], high[key] = mse_range(self.counts[key], low[key], high[key], bits=bits)
        grid = UniformQuantizer.covering(low, high, bits)
        return StepQuantizer(
            bits,
            grid.scale,
            grid.zero_point,
            steps_per_row=self.steps_per_row,
            split=self.layer.split,
            learned=self.learned,
        )


@contextmanager
def _watching(unet: nn.Module, name: str, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show every input of a layer, or every value of an operand of attention."""
    path, _, role = name.rpartition(".")
    if role not in ROLES:
        hook = unet.get_submodule(name).register_forward_pre_hook(lambda module, inputs: see(inputs[0]))
        with hook:
            yield
        return
    attach(unet, name, _Watcher(see))
    try:
        yield
    finally:
        attention_operands(unet.get_submodule(path)).register_module(role, None)


class _Watcher(nn.Module):
    """Stands where a quantizer will, and lets everything pass."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def forward(self, x: Tensor) -> Tensor:
        self.see(x)
        return x


def attention_sites(unet: nn.Module) -> tuple[UNetLayer, ...]:
    """Queries, keys and values of every attention module, to be quantized like inputs of layers.

    Attention computes where they can be reached from here on. Raises ValueError where it cannot.
    """
    use_operand_attention(unet)
    roles = ("query", "key", "value")
    return tuple(
        UNetLayer(f"{name}.{role}", "inner", name, None) for name in attentions(unet) for role in roles
    )


def _observe(
    network: StepNetwork,
    sites: Sequence[_Site],
    latents: Source,
    see: Callable[[_Site, int, Tensor], None],
    tell: Callable[[int], None],
) -> None:
    """Run the network on all latents and show each site its layer's input. tell: hears the steps that are done."""
    present = 0

    def show(site: _Site, x: Tensor) -> None:
        see(site, present, x)

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(_watching(network.unet, site.layer.name, partial(show, site)))
        for present, x, seeds in latents():
            if present < len(network.steps):
                network.of(seeds)(x, present)
                tell(present + 1)
