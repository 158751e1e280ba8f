"""SmoothQuant: the float function stays, the outliers move."""

from __future__ import annotations

import copy
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor, nn

from quantry.families import FAMILIES
from quantry.layers.operands import attach
from quantry.quantizers.activation import TokenQuantizer, UniformQuantizer
from quantry.recipe import SmoothquantStep
from worker.errors import CalibrationError, NonFiniteError, RecipeError
from worker.methods.smoothquant import (
    FLOOR,
    input_maxima,
    input_quantizers,
    smooth_block,
    smoothing_scale,
    symmetric_grid,
)
from worker.models.calls import BlockCall, run_block
from worker.models.causal_lm import CausalLM

FOLDABLE = [name for name in factories.ARCHITECTURES if name != "opt-post-ln"]


def model(
    name: str, folder: Path, **changes: object
) -> tuple[CausalLM, nn.Module, list[tuple[Tensor, BlockCall]]]:
    """A tiny model, its first block, and what enters it, with three outlier channels."""
    found = CausalLM(
        factories.write_checkpoint(folder, name, **changes), device=torch.device("cpu"), dtype=torch.float32
    )
    windows = torch.randint(4, 67, (3, 24), generator=torch.Generator().manual_seed(1))
    block = found.block(0)
    for norm in found.family.norms:
        weight = block.get_submodule(norm).get_parameter("weight").data
        weight[[3, 11, 17]] = torch.tensor([30.0, -50.0, 80.0])
    embedded = [found.embed(part) for part in (windows[:2], windows[2:])]
    return found, block, [(hidden, calls[0]) for hidden, calls in embedded]


def test_every_norm_feeds_one_group() -> None:
    for family in FAMILIES.values():
        assert set(family.norms.values()) <= set(family.groups)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", FOLDABLE)
def test_the_float_function_stays(name: str, alpha: float, tmp_path: Path) -> None:
    lm, block, batches = model(name, tmp_path)
    before = [run_block(block, *batch) for batch in batches]
    weights = {layer: copy.deepcopy(block.get_submodule(layer)) for layer in lm.family.linears}
    maxima = input_maxima(block, lm.family, batches)
    smoothed = smooth_block(block, lm.family, lm.config.to_dict(), maxima, alpha)
    for batch, wanted in zip(batches, before, strict=True):
        torch.testing.assert_close(run_block(block, *batch), wanted, atol=2e-4, rtol=2e-4)

    after = input_maxima(block, lm.family, batches)
    for layers in lm.family.norms.values():
        scale = smoothed.scales[layers[0]]
        torch.testing.assert_close(after[layers[0]], maxima[layers[0]] / scale, atol=1e-4, rtol=1e-4)
        for layer in layers:
            assert smoothed.scales[layer] is scale
            old, new = weights[layer].weight, block.get_submodule(layer).weight
            factor = scale.unsqueeze(1) if lm.family.transposed else scale
            torch.testing.assert_close(new, old * factor)
    untouched = set(lm.family.linears) - set(smoothed.scales)
    for layer in untouched:
        torch.testing.assert_close(block.get_submodule(layer).weight, weights[layer].weight, atol=0, rtol=0)
    for tensor, value in smoothed.norms.items():  # what is exported is what the block has
        torch.testing.assert_close(block.get_parameter(tensor).data, value, atol=0, rtol=0)
    assert len(smoothed.norms) == sum(len(list(block.get_submodule(n).parameters())) for n in lm.family.norms)


def test_half_way_both_sides_meet_at_the_geometric_mean() -> None:
    torch.manual_seed(0)
    maximum = torch.rand(8) * 100
    weights = [torch.randn(5, 8), torch.randn(3, 8)]
    columns = torch.cat(weights).abs().amax(0)
    scale = smoothing_scale(maximum, weights, 0.5)
    torch.testing.assert_close(maximum / scale, columns * scale)
    torch.testing.assert_close(maximum / scale, (maximum * columns).sqrt())
    torch.testing.assert_close(maximum / smoothing_scale(maximum, weights, 1.0), torch.ones(8))
    torch.testing.assert_close(columns * smoothing_scale(maximum, weights, 0.0), torch.ones(8))


def test_dead_channels_keep_a_finite_scale() -> None:
    scale = smoothing_scale(torch.tensor([0.0, 0.0, 3.0]), [torch.tensor([[0.0, 2.0, 0.0]])], 0.5)
    assert bool(torch.isfinite(scale).all())
    assert float(scale.min()) >= FLOOR


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("name", ["opt", "llama", "gemma", "gpt2"])
def test_every_layer_gets_a_quantizer_for_what_it_sees(name: str, granularity: str, tmp_path: Path) -> None:
    lm, block, batches = model(name, tmp_path)
    step = SmoothquantStep.model_validate({"granularity": granularity})
    maxima = input_maxima(block, lm.family, batches)
    smoothed = smooth_block(block, lm.family, lm.config.to_dict(), maxima, step.alpha)
    places = input_quantizers(lm.family, maxima, smoothed, step)
    assert set(places) == {f"{layer}.input" for layer in lm.family.linears}
    seen = input_maxima(block, lm.family, batches)
    for group in lm.family.groups:
        for quantizer in (places[f"{layer}.input"] for layer in group):
            if granularity == "token":
                assert isinstance(quantizer, TokenQuantizer)
                continue
            assert isinstance(quantizer, UniformQuantizer)
            torch.testing.assert_close(quantizer.scale * 127, seen[group[0]].max(), atol=0, rtol=1e-4)

    before = torch.cat([run_block(block, *batch) for batch in batches])
    for place, quantizer in places.items():
        attach(block, place, quantizer)
    error = torch.cat([run_block(block, *batch) for batch in batches]) - before
    assert 0 < float(error.square().mean() / before.square().mean()) < 1e-2


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_less_is_lost_once_outliers_are_moved(granularity: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 32), torch.randn(16, 32) * 0.1
    x[:, [3, 20]] *= 100
    x[:, 3] += 80
    errors = []
    for scale in (torch.ones(32), smoothing_scale(x.abs().amax(0), [weight], 0.5)):
        smooth = x / scale
        grid = (
            TokenQuantizer(8, symmetric=True)
            if granularity == "token"
            else symmetric_grid(smooth.abs().max(), 8)
        )
        errors.append(float((grid(smooth) @ (weight * scale).T - x @ weight.T).square().mean()))
    assert errors[1] < 0.3 * errors[0]


def test_a_symmetric_grid_holds_the_signed_integers() -> None:
    grid = symmetric_grid(torch.tensor(12.7), 8)
    x = torch.tensor([-100.0, -12.7, -0.1, 0.0, 0.1, 12.7, 100.0])
    torch.testing.assert_close(grid(x), torch.tensor([-12.8, -12.7, -0.1, 0.0, 0.1, 12.7, 12.7]))


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    lm, block, batches = model("opt-post-ln", tmp_path)
    maxima = input_maxima(block, lm.family, batches)
    with pytest.raises(RecipeError, match="do_layer_norm_before is false"):
        smooth_block(block, lm.family, lm.config.to_dict(), maxima, 0.5)


def test_norms_without_weights_are_refused(tmp_path: Path) -> None:
    lm, block, batches = model("opt", tmp_path)
    config = {**lm.config.to_dict(), "layer_norm_elementwise_affine": False}
    with pytest.raises(RecipeError, match="no weights"):
        smooth_block(block, lm.family, config, input_maxima(block, lm.family, batches), 0.5)


def test_calibration_without_values_is_refused(tmp_path: Path) -> None:
    lm, block, batches = model("llama", tmp_path)
    with pytest.raises(CalibrationError, match="at least one"):
        input_maxima(block, lm.family, [])
    block.get_parameter("input_layernorm.weight").data[0] = torch.inf
    with pytest.raises(NonFiniteError, match="q_proj"):
        input_maxima(block, lm.family, batches)
