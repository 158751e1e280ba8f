"""The levels of bias compensation: each takes away the mean error of its own outputs, on its own inputs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from torch import Tensor

from quantry.contract import JobSpec
from quantry.recipe import BiasCompensationStep, RtnStep
from worker.block import BlockQuantizer, QuantizedBlock, install
from worker.calibration.store import BlockStore
from worker.calibration.streams import Stream
from worker.models.calls import run_block
from worker.models.vision import VisionModel
from worker.progress import Progress
from worker.sweep import BlockSweep

CPU = torch.device("cpu")


def pixels(model: VisionModel, count: int = 12) -> Tensor:
    return torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(1))


def model_of(tmp_path: Path, name: str = "vit") -> VisionModel:
    return VisionModel(factories.write_classifier(tmp_path, name), device=CPU)


def quantized(model: VisionModel, step: BiasCompensationStep) -> tuple[list[QuantizedBlock], Stream, Stream]:
    """Every block at 3 bits, and both calibration streams at the end."""
    quantizer = BlockQuantizer(model, RtnStep(bits=3), step, None)
    given, floating = (Stream.embed(model, pixels(model)) for _ in range(2))
    blocks = [quantizer.quantize(index, model.block(index), given, floating) for index in range(model.count)]
    return blocks, given, floating


def unit_error(
    model: VisionModel, block: QuantizedBlock, index: int, unit: str, axes: tuple[int, ...]
) -> Tensor:
    """The mean error of a module of a block, both fed what the float network feeds it."""
    stream, errors = Stream.embed(model, pixels(model)), []
    for before in range(index):
        stream.advance(model.block(before), before)
    original = model.block(index)

    def compare(_: object, args: Any, kwargs: Any, out: Any) -> None:
        other = block.module.get_submodule(unit)(*args, **kwargs)
        first, second = (x[0] if isinstance(x, tuple) else x for x in (out, other))
        errors.append(first - second)

    original.get_submodule(unit).register_forward_hook(compare, with_kwargs=True)
    for _, states, call in stream.batches(index):
        run_block(original, states, call)
    return torch.cat(errors).mean(axes)


@pytest.mark.parametrize("granularity", ["channel", "position_channel"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_as_published_units_are_fitted_on_their_float_inputs(
    name: str, granularity: Any, tmp_path: Path
) -> None:
    model, axes = model_of(tmp_path, name), (0, 1) if granularity == "channel" else (0,)
    step = BiasCompensationStep(
        granularity=granularity, targets="published", levels=("module", "attention", "mlp")
    )
    blocks, _, _ = quantized(model, step)
    index = next(i for i in range(model.count) if model.attention(i))
    for unit in ("attention", "mlp"):
        error = unit_error(model, blocks[index], index, unit, axes)
        torch.testing.assert_close(error, torch.zeros_like(error), atol=2e-5, rtol=0)
    plain, _, _ = quantized(model, step.model_copy(update={"levels": ("module",)}))
    assert unit_error(model, plain[index], index, "attention", axes).abs().max() > 1e-4


def test_levels_that_are_not_chosen_leave_their_layers_alone(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    for targets in ("sequential", "published"):
        step = BiasCompensationStep.model_validate({"targets": targets, "levels": ["attention", "model"]})
        blocks, _, _ = quantized(model, step)
        index = next(i for i in range(model.count) if model.attention(i))
        assert set(blocks[index].added) == {"attention.o_proj"}


@pytest.mark.parametrize("granularity", ["channel", "position_channel"])
def test_blocks_and_the_model_end_where_the_float_network_does(granularity: Any, tmp_path: Path) -> None:
    model = model_of(tmp_path)
    step = BiasCompensationStep(granularity=granularity, levels=("block", "model"))
    blocks, given, floating = quantized(model, step)
    error = (floating.hidden - given.hidden).mean(0)
    torch.testing.assert_close(error, torch.zeros_like(error), atol=1e-5, rtol=0)
    again = Stream.embed(model, pixels(model))  # through the blocks as they were left
    for index, block in enumerate(blocks):
        again.advance(block.module, index)
    torch.testing.assert_close(again.hidden, given.hidden, atol=1e-5, rtol=1e-4)
    touched = {name for block in blocks for name in block.added}
    assert touched == {"mlp.fc2", "classifier"}


def sweep(model: VisionModel, folder: Path, targets: str, levels: list[str]) -> BlockSweep:
    body = {
        "model": {"source": "local", "id": "model"},
        "recipe": [
            {"method": "gptq", "bits": 3},
            {"method": "bias_compensation", "targets": targets, "levels": levels},
        ],
        "evaluation": None,
    }
    spec = JobSpec.model_validate(body)
    store = BlockStore(folder, "test")
    return BlockSweep(
        model, spec, store, Progress(io.StringIO()), pixels(model), None, lambda streams, progress: {}
    )


@pytest.mark.parametrize("targets", ["sequential", "published"])
def test_the_model_level_sees_every_bias_below_it_also_when_resumed(targets: str, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model")
    levels = ["module", "attention", "mlp", "block", "model"]
    swept = sweep(model, tmp_path / "blocks", targets, levels)
    swept.run()
    logits = model.logits(pixels(model))
    error = (logits - swept.reference(pixels(model))).mean(0)
    torch.testing.assert_close(error, torch.zeros_like(error), atol=1e-5, rtol=0)
    last = range(model.count - 2, model.count)
    whole = [swept.store.load(index, CPU).layers for index in last]
    for block in sorted((tmp_path / "blocks").glob("block-*"))[2:]:
        block.unlink()
    again = sweep(model, tmp_path / "blocks", targets, levels)
    again.run()
    for index, layers in zip(last, whole, strict=True):
        for name, layer in again.store.load(index, CPU).layers.items():
            assert torch.equal(layer.weight.codes, layers[name].weight.codes)
            assert layer.bias is not None
            assert layers[name].bias is not None
            assert torch.equal(layer.bias, layers[name].bias)


def test_a_merged_bias_is_what_the_layer_computes(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    blocks, _, _ = quantized(model, BiasCompensationStep(levels=("mlp",)))
    index = next(i for i in range(model.count) if model.attention(i))
    fresh = model.block(index)
    for name, layer in blocks[index].layers.items():
        install(fresh, name, layer)
    states = torch.randn(2, 5, 32)
    torch.testing.assert_close(
        fresh.get_submodule("mlp")(states), blocks[index].module.get_submodule("mlp")(states)
    )
