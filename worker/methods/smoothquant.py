"""SmoothQuant: move the outliers of activations into the weights, so that 8 bits are enough for both.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022,
arXiv:2211.10438. Input channel j of the layers behind a norm is divided by s_j = max|x_j|^a / max|W_:j|^(1-a)
(eq. 4): the norm's weight and bias are divided by s, the layers' columns multiplied by it, and the float
function stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantry.base import SpecError
from quantry.families import Family, foldable_norms
from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.recipe import SmoothquantStep
from worker.errors import CalibrationError, NonFiniteError, RecipeError
from worker.models.calls import BlockCall, run_block

FLOOR = 1e-5  # of activation and weight maxima: dead channels keep a finite scale


@dataclass(frozen=True)
class Smoothed:
    """What was done to a block, by name inside it.

    scales: s, float32 (in,), of each layer whose columns were multiplied by it. norms: the rewritten weights and
    biases of norms, float32.
    """

    scales: dict[str, Tensor]
    norms: dict[str, Tensor]


@torch.no_grad()
def input_maxima(
    block: nn.Module, family: Family, batches: Iterable[tuple[Tensor, BlockCall]]
) -> dict[str, Tensor]:
    """max|x_j| over all tokens, float32 (in,), of each group of layers, under the name of its first layer.

    Raises: CalibrationError without any token, NonFiniteError.
    """
    maxima: dict[str, Tensor] = {}
    handles = []
    for name in (group[0] for group in family.groups):

        def see(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            top = inputs[0].abs().flatten(0, -2).amax(0).float()
            maxima[name] = torch.maximum(maxima[name], top) if name in maxima else top

        handles.append(block.get_submodule(name).register_forward_pre_hook(see))
    try:
        for hidden, call in batches:
            run_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    if not maxima:
        raise CalibrationError("smoothquant needs at least one calibration window")
    for name, top in maxima.items():
        if not torch.isfinite(top).all():
            raise NonFiniteError(f"the input of `{name}` holds NaN or infinity: the network overflows")
    return maxima


def smoothing_scale(maximum: Tensor, weights: Iterable[Tensor], alpha: float) -> Tensor:
    """s of eq. 4, float32 (in,). maximum: max|x_j|, (in,). weights: (out, in) of every layer that takes x."""
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    scale: Tensor = maximum.float().clamp(min=FLOOR).pow(alpha) / columns.clamp(min=FLOOR).pow(1 - alpha)
    return scale.clamp(min=FLOOR)


@torch.no_grad()
def smooth_block(
    block: nn.Module, family: Family, config: Mapping[str, object], maxima: Mapping[str, Tensor], alpha: float
) -> Smoothed:
    """Rewrite a block's norms and the layers behind them; what it computes in full precision stays the same.

    Args: config: of the model, as in config.json. maxima: from `input_maxima`.
    Raises: RecipeError where a norm feeds more than its layers (OPT with do_layer_norm_before false).
    """
    try:
        norms = foldable_norms(family, config)
    except SpecError as error:
        raise RecipeError(error.detail) from error
    smoothed = Smoothed({}, {})
    for norm, layers in norms.items():
        weights = {layer: _weight(block, layer, family) for layer in layers}
        scale = smoothing_scale(maxima[layers[0]], weights.values(), alpha)
        for layer, weight in weights.items():
            weight.copy_(weight.float() * scale)
            smoothed.scales[layer] = scale
        for name, tensor in _divide(block.get_submodule(norm), scale, family.unit_offset).items():
            smoothed.norms[f"{norm}.{name}"] = tensor
    return smoothed


def _weight(block: nn.Module, layer: str, family: Family) -> Tensor:
    """A layer's weight as (out, in), a view."""
    weight = block.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.T if family.transposed else weight


def _divide(norm: nn.Module, scale: Tensor, unit_offset: bool) -> dict[str, Tensor]:
    """Make a norm's output s times smaller; returns its new parameters in float32."""
    offset = 1.0 if unit_offset else 0.0  # Gemma's norms multiply by 1 + weight
    shifts = {"weight": offset, "bias": 0.0}
    changed = {}
    for name, parameter in norm.named_parameters(recurse=False):
        changed[name] = (parameter.float() + shifts[name]) / scale - shifts[name]
        parameter.copy_(changed[name])
    return changed


def input_quantizers(
    family: Family, maxima: Mapping[str, Tensor], smoothed: Smoothed, step: SmoothquantStep
) -> dict[str, ActivationQuantizer]:
    """The symmetric quantizer of every layer's input in a smoothed block, by place (`<layer>.input`).

    A grid for each token, or one that covers what calibration saw: its maximum, divided by s, is known.
    """
    found: dict[str, ActivationQuantizer] = {}
    for group in family.groups:
        scale = smoothed.scales.get(group[0])
        top = maxima[group[0]] if scale is None else maxima[group[0]] / scale
        for layer in group:
            found[f"{layer}.input"] = (
                TokenQuantizer(step.bits, symmetric=True)
                if step.granularity == "token"
                else symmetric_grid(top.max(), step.bits)
            )
    return found


def symmetric_grid(top: Tensor, bits: int) -> UniformQuantizer:
    """The grid of signed integers over [-top, top], per tensor: zero_point is the middle code, 2**(bits - 1)."""
    half = 2 ** (bits - 1)
    scale = (top.float() / (half - 1)).clamp(min=torch.finfo(torch.float32).tiny * 2**bits)
    return UniformQuantizer(bits, []).to(top.device).fill(scale=scale, zero_point=torch.tensor(float(half)))
