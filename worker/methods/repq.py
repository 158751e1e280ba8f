"""RepQ-ViT: a grid for each channel after LayerNorm, folded into one; powers of sqrt(2) after softmax.

Li, Xiao, Yang, Gu, "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision
Transformers", ICCV 2023, arXiv:2212.08254. Every range is a percentile, chosen by squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.logarithmic import LogQuantizer
from quantry.recipe import RepqStep
from worker.errors import NonFiniteError
from worker.methods.activations import Calibrated, Images, observe
from worker.methods.repq_softmax import Grids, of_least_error
from worker.models.vision import Operand, VisionModel

PERCENTILES = (0.999, 0.9999, 0.99999)
SAMPLE = 1 << 20  # values kept of an operand
PASS = 16  # operands kept at a time
PER_HEAD = ("query", "key", "value")
FLOOR = 1e-4  # least scale of a channel, as a share of the mean: what a constant channel gets

Range = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def calibrate(model: VisionModel, images: Images, step: RepqStep) -> Calibrated:
    """Static quantizers of every operand but the image.

    Rewrites `model.network`: the LayerNorms inside blocks and the layers after them, by `rewrite`; its float
    function stays the same up to rounding.
    """
    quantizers: dict[str, ActivationQuantizer] = dict(reparameterize_norms(model, images, step.bits))
    done, total = len(quantizers), len(model.operands) - 1
    softmax: dict[str, Grids] = {}
    others = [o for o in model.operands if o.kind != "image" and o.name not in quantizers]
    for operand, sample in sampled(model, images, others):
        if operand.kind == "probabilities":
            bits = step.softmax_bits or step.bits
            softmax[operand.name] = sqrt2_quantizer(sample, bits), uniform_quantizer(operand, sample, bits)
        else:
            quantizers[operand.name] = uniform_quantizer(operand, sample, step.bits)
        done += 1
        images.tell(done, total)
    if step.softmax == "log":
        return Calibrated(quantizers | {name: grids[0] for name, grids in softmax.items()})
    images.begin("softmax grids")
    return Calibrated(quantizers | of_least_error(model, images, softmax))


# Percentile search.


def percentile_search(x: Tensor, bits: int, grid: Range) -> tuple[Tensor, Tensor]:
    """The scale and zero-point (groups,) of least squared error, among the ranges between percentiles.

    x: (values, groups) float32; each group has a grid of its own. grid: makes one of a range.
    """
    lows, highs = (
        torch.quantile(x, torch.tensor(shares, device=x.device), dim=0)
        for shares in ([1 - share for share in PERCENTILES], PERCENTILES)
    )
    scale, zero = grid(lows[0], highs[0], bits)
    lowest = _uniform_error(x, scale, zero, bits)
    for low, high in zip(lows[1:], highs[1:], strict=True):
        other_scale, other_zero = grid(low, high, bits)
        error = _uniform_error(x, other_scale, other_zero, bits)
        better = error < lowest
        scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
        lowest = torch.minimum(lowest, error)
    return scale, zero


def _uniform_error(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    q = (x / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return q.sub_(zero).mul_(scale).sub_(x).square_().sum(0)


def with_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[low, high] widened to hold 0, which stays exact."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_tiny(bits))
    return scale, (-low / scale).round_().clamp_(0, 2**bits - 1)


def spanning(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[low, high] as it is, its ends exact: the zero-point may be any real number."""
    scale = _floored((high - low) / (2**bits - 1), bits)
    return scale, -low / scale


def centred(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The least range around [low, high] whose zero-point is in the middle, 2**(bits - 1)."""
    zero = 2 ** (bits - 1)
    scale = _floored(torch.maximum(high / (2**bits - 1 - zero), -low / zero), bits)
    return scale, torch.full_like(scale, zero)


def _floored(scale: Tensor, bits: int) -> Tensor:
    return torch.maximum(scale, FLOOR * scale.mean()).clamp(min=_tiny(bits))


def _tiny(bits: int) -> float:
    return float(torch.finfo(torch.float32).tiny * 2**bits)


def uniform_quantizer(operand: Operand, sample: Tensor, bits: int) -> UniformQuantizer:
    """One grid for the tensor, or for each head of Q, K and V. sample: as `sampled` gives it."""
    heads = sample.shape[1] if operand.kind in PER_HEAD else 1
    values = sample.movedim(1, -1).reshape(-1, heads) if heads > 1 else sample.reshape(-1, 1)
    shape = [heads, 1, 1] if operand.kind in PER_HEAD else []
    scale, zero = percentile_search(values, bits, with_zero)
    quantizer = UniformQuantizer(bits, shape).to(sample.device)
    return quantizer.fill(scale=scale.view(shape), zero_point=zero.view(shape))


def sqrt2_quantizer(p: Tensor, bits: int) -> LogQuantizer:
    """Base sqrt(2) over probabilities p of any shape; its scale is the percentile of least squared error."""
    flat = p.flatten()
    scales = torch.quantile(flat, torch.tensor(PERCENTILES, device=p.device)).clamp_(min=_tiny(bits))
    quantizers = [LogQuantizer(bits, []).to(p.device).fill(scale=scale) for scale in scales]
    return min(quantizers, key=lambda quantizer: float((quantizer(flat) - flat).square_().sum()))


# Scale reparameterization.


@dataclass(frozen=True)
class Fold:
    """A LayerNorm and the layers that take its output. shifts: whether they can take back a shift."""

    norm: nn.LayerNorm
    layers: tuple[nn.Linear, ...]
    shifts: bool


@dataclass(frozen=True)
class ChannelGrid:
    """A grid for each channel: scale and zero_point (C,), zero_point real."""

    scale: Tensor
    zero_point: Tensor


def reparameterize_norms(model: VisionModel, images: Images, bits: int) -> dict[str, UniformQuantizer]:
    """Fold the grids of the channels after every LayerNorm inside a block; the quantizers that are left, by operand."""
    plan = fold_plan(model, images.pixels)
    operands = [operand for operand in model.operands if operand.name in plan]
    grids = {
        operand.name: channel_grid(sample, bits, shifts=plan[operand.name].shifts)
        for operand, sample in sampled(model, images, operands)
    }
    return {name: reparameterize(plan[name], grid, bits) for name, grid in grids.items()}


def fold_plan(model: VisionModel, pixels: Tensor) -> dict[str, Fold]:
    """The operands after the LayerNorms of blocks, by name, and what `rewrite` changes for each.

    A shift needs a bias that takes it back, and every token to come from the LayerNorm. Swin pads windows with
    zeros after `layernorm_before` where the resolution is no multiple of the window: there, as before a
    reduction without bias, only scales are folded, which leave zeros as they are.
    """
    norms = dict(model.family.norms)
    if model.family.hierarchical:
        norms["norm"] = ("reduction",)  # of the downsampling between stages
    plan: dict[str, Fold] = {}
    for operand in model.operands:
        if operand.kind != "post_norm":
            continue
        first = operand.layers[0]
        norm, relative = next((n, ls[0]) for n, ls in norms.items() if first.endswith(f".{ls[0]}"))
        module = model.network.get_submodule(f"{first.removesuffix(relative)}{norm}")
        layers = tuple(model.network.get_submodule(name) for name in operand.layers)
        plan[operand.name] = Fold(module, layers, all(layer.bias is not None for layer in layers))
    padded = _padded(model, pixels[:1], plan)
    return {name: replace(fold, shifts=fold.shifts and name not in padded) for name, fold in plan.items()}


@torch.no_grad()
def _padded(model: VisionModel, pixels: Tensor, plan: Mapping[str, Fold]) -> set[str]:
    """Operands that hold more values than their LayerNorm gave: something was added on the way."""
    given: dict[str, int] = {}
    taken: dict[str, int] = {}

    def after(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        given[name] = output.numel()

    def before(name: str, x: Tensor) -> None:
        taken[name] = x.numel()

    with ExitStack() as hooks:
        for name, fold in plan.items():
            hooks.callback(fold.norm.register_forward_hook(partial(after, name)).remove)
        observe(model, pixels, {name: partial(before, name) for name in plan})
    return {name for name in plan if taken[name] > given[name]}


def channel_grid(x: Tensor, bits: int, *, shifts: bool) -> ChannelGrid:
    """The percentile search for each channel of x (rows, C); without shifts, one zero-point for all channels."""
    scale, zero_point = percentile_search(x, bits, spanning if shifts else centred)
    return ChannelGrid(scale, zero_point)


@torch.no_grad()
def reparameterize(fold: Fold, grid: ChannelGrid, bits: int) -> UniformQuantizer:
    """Fold the channels' grids into LayerNorm and layers; the one grid that is left (equations 8 to 11).

    With s the scales and z the zero-points of the channels, s~ their mean and z~ any integer:
    r = s / s~, c = s~ (z~ - z), and x / r - c on the grid of (s~, z~) has the codes of x on that of (s, z).
    """
    scale = grid.scale.mean()
    zero = grid.zero_point.mean().round().clamp(0, 2**bits - 1)
    rewrite(fold, grid.scale / scale, scale * (zero - grid.zero_point))
    return UniformQuantizer(bits, []).to(scale.device).fill(scale=scale, zero_point=zero)


@torch.no_grad()
def rewrite(fold: Fold, ratio: Tensor, shift: Tensor) -> None:
    """Let the LayerNorm give x / ratio - shift in place of x, and its layers take the same back; both (C,)."""
    ratio, shift = ratio.double(), shift.double()
    fold.norm.weight.copy_(fold.norm.weight / ratio)
    fold.norm.bias.copy_(fold.norm.bias / ratio - shift)
    for layer in fold.layers:
        weight = layer.weight * ratio
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias + weight @ shift)


# Samples of operands.


def sampled(
    model: VisionModel, images: Images, operands: Sequence[Operand], most: int = SAMPLE
) -> Iterator[tuple[Operand, Tensor]]:
    """Each operand with float32 rows of it, (rows, width), or (rows, heads, width) of Q, K and V.

    Of each about SAMPLE values are kept, and `most` rows; random rows of every batch alike, PASS operands at a time.
    Raises: NonFiniteError for NaN or infinity.
    """
    batches = math.ceil(len(images.pixels) / model.images_at_once)
    for start in range(0, len(operands), PASS):
        part = operands[start : start + PASS]
        chance = torch.Generator().manual_seed(images.seed)
        kept: dict[str, list[Tensor]] = {operand.name: [] for operand in part}

        def keep(operand: Operand, x: Tensor, kept: dict[str, list[Tensor]], chance: torch.Generator) -> None:
            rows = x.transpose(1, 2).flatten(0, 1) if operand.kind in PER_HEAD else x.flatten(0, -2)
            quota = math.ceil(min(SAMPLE // rows[0].numel(), most) / batches)
            kept[operand.name].append(some_rows(rows, quota, chance).float())

        see = {operand.name: partial(keep, operand, kept=kept, chance=chance) for operand in part}
        observe(model, images.pixels, see)
        for operand in part:
            sample = torch.cat(kept.pop(operand.name))
            if not torch.isfinite(sample).all():
                raise NonFiniteError(f"{operand.name} met NaN or infinity: check the model and the images")
            yield operand, sample


def some_rows(x: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """`count` random rows of x, or all of it if it has no more."""
    if len(x) <= count:
        return x.clone()
    return x[torch.randint(len(x), (count,), generator=chance).to(x.device)]
