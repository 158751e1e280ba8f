"""The trained network as a checkpoint in the `quantry` format, and what its report says of the training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from quantry.quantizers.fixed_point import FixedPointQuantizer, nearest_codes
from quantry.reports import (
    KeptLayerReport,
    Manifest,
    SizeReport,
    TrainedLayerReport,
    TrainingReport,
)
from worker.export.verify import verify
from worker.export.vision import write_vision
from worker.training.layers import FixedPointLayer
from worker.training.network import dense_copy, quantized_parts
from worker.training.prepare import PreparedTraining
from worker.training.trainer import Trainer
from worker.workspace import Workspace

REFERENCE_IMAGES = 4


def write_artifact(job: PreparedTraining, trainer: Trainer, target: Path) -> Manifest:
    """Write the checkpoint into `target`, an empty folder."""
    layers = quantized_parts(trainer.network)
    quantizers: dict[str, ActivationQuantizer] = {
        f"{name}.input": input_quantizer(layer) for name, layer in layers.items()
    }
    return write_vision(
        job.folder,
        target,
        network=dense_copy(job.folder, trainer.network),
        layers=((name, quantized_layer(layer)) for name, layer in layers.items()),
        quantizers=quantizers,
        probability_bias={},
        recipe=job.spec.recipe,
        base_model=job.spec.model.id,
    )


@torch.no_grad()
def quantized_layer(layer: FixedPointLayer) -> QuantizedLayer:
    """Codes of the weight, counted from 0, with the layer's one scale for every row."""
    _, scale = layer.scales()
    codes = nearest_codes(layer.weight, scale, layer.bits, signed=True).flatten(1).cpu()
    middle, rows = 2 ** (layer.bits - 1), len(codes)
    weight = QuantizedWeight(
        codes=(codes + middle).to(torch.uint8),
        scale=scale.float().cpu().repeat(rows, 1),
        zero_point=torch.full((rows, 1), middle, dtype=torch.uint8),
        bits=layer.bits,
        group_size=None,
        symmetric=True,
    )
    return QuantizedLayer(weight, None if layer.bias is None else layer.bias.detach().float().cpu())


def input_quantizer(layer: FixedPointLayer) -> FixedPointQuantizer:
    """The grid of the layer's input, as a checkpoint holds it."""
    assert layer.signed is not None
    scale, _ = layer.scales()
    return FixedPointQuantizer(layer.input_bits, layer.signed).fill(scale=scale.cpu())


def verified(job: PreparedTraining, trainer: Trainer, workspace: Workspace) -> dict[str, float | str]:
    """Reload the artifact as a user would, in a clean process, and compare logits."""
    places = torch.arange(min(REFERENCE_IMAGES, len(job.images)))
    inputs = job.images.pixels(places) if job.evaluation is None else job.evaluation[:REFERENCE_IMAGES]
    trainer.device = torch.device("cpu")  # another device's rounding flips codes, as does another layout's
    trainer.network.to(trainer.device, memory_format=torch.contiguous_format)
    logits = trainer.logits(lambda part: inputs[part], len(inputs))
    with tempfile.TemporaryDirectory(dir=workspace.artifact) as folder:
        path = Path(folder) / "reference.safetensors"
        tensors = {"pixel_values": inputs.contiguous(), "logits": logits.contiguous()}
        safetensors.torch.save_file(tensors, path)
        return verify(workspace.artifact, "quantry", path, threads=workspace.threads)


def size_report(job: PreparedTraining, trainer: Trainer, artifact: Path) -> SizeReport:
    bits = weights = 0
    for layer in trainer.layers.values():
        bits += layer.weight.numel() * layer.bits + 32 * len(layer.weight)
        weights += layer.weight.numel()
    return SizeReport(
        fp_bytes=job.plan.fp_bytes,
        quantized_bytes=sum(file.stat().st_size for file in artifact.glob("*.safetensors")),
        effective_bits=bits / weights,
        quantized_weights=weights,
    )


def training_report(
    job: PreparedTraining, trainer: Trainer, baseline: Trainer | None, kept_epoch: int, stopped: str | None
) -> TrainingReport:
    grid = job.step.gradient
    return TrainingReport(
        init=job.step.init,
        images=len(job.images),
        validation_images=0 if job.held is None else len(job.held),
        batch_size=min(job.step.batch_size, len(job.images)),
        interval=None if grid is None else grid.interval,
        kept_epoch=kept_epoch,
        stopped=stopped,
        epochs=tuple(trainer.curve),
        fp_epochs=() if baseline is None else tuple(baseline.curve),
        layers=tuple(_layers(trainer)),
        kept=tuple(
            KeptLayerReport(name=layer.name, reason=layer.reason) for layer in job.plan.layers if layer.reason
        ),
    )


def _layers(trainer: Trainer) -> Iterator[TrainedLayerReport]:
    for name, layer in trainer.layers.items():
        grid = layer.gradient
        ruled = grid is not None and grid.interval == "large_gradient"
        yield TrainedLayerReport(
            name=name,
            gradients=0 if grid is None else grid.count,
            active=grid.active if grid is not None and ruled else None,
            weight_range=float(layer.weight_range.detach().abs()),
            input_range=float(layer.input_range.detach().abs()),
            signed=bool(layer.signed),
        )
