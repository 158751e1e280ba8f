"""Write a quantized image classifier in the `quantry` format, as `AutoModelForImageClassification` reads it.

transformers 5 calls a classifier's modules otherwise in memory than in its files: tensors are written under the
names that `save_pretrained` gives them. `quantization_config` names modules, so it has the names in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

import quantry
from quantry.layers.operands import attached
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedLayer
from quantry.recipe import Step
from quantry.reports import Manifest
from worker.errors import ExportError
from worker.export.files import copy_companions, sync_folder, whole_or_nothing, write_json
from worker.export.formats import Provenance, Stored, stored_layer
from worker.export.manifest import write_manifest
from worker.export.model_card import write_model_card
from worker.export.quantry_format import Operands, QuantryFormat
from worker.export.shards import ShardWriter
from worker.export.writer import SHARD_BYTES


def write_vision(
    source: Path,
    target: Path,
    network: Any,
    layers: Iterable[tuple[str, QuantizedLayer]],
    quantizers: Mapping[str, ActivationQuantizer],
    probability_bias: Mapping[str, Tensor],
    recipe: Sequence[Step],
    base_model: str,
    *,
    job: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write a checkpoint into `target`, an empty folder. All names are those of modules in memory.

    Args:
        source: the full-precision checkpoint: its config, image processor and licence are taken over.
        network: the float classifier, without quantizers. What is not quantized (norms, embeddings) is stored
            as it is in here, in its dtype, whatever the source holds.
        layers: linear layers and convolutions; codes of a convolution are (out, in * kh * kw).
        quantizers: by operand, an entry for each place (q, k and v each have an `input`).
        probability_bias: (H, 1, 1) or (1, 1, 1) by attention module.
    Returns: what was written, with sha256 digests; `write_manifest` puts it on the disk, last.
    Raises: ExportError for what does not fit the network; DiskFull. `target` is then empty again.
    """
    if any(target.iterdir()):
        raise ExportError(f"{target} is not empty: a checkpoint is written into a fresh folder")
    if any(attached(network)):
        raise ExportError("the network carries quantizers already: detach them, they are given apart")
    steps = tuple(step.model_dump(mode="json") for step in recipe)
    provenance = Provenance(base_model, quantry.__version__, steps, job)
    operands = Operands(quantizers, probability_bias)
    _check_operands(network, operands)
    encoder = QuantryFormat(operands)
    with whole_or_nothing(target):
        state, stored = _state(network, encoder, layers)
        shards = ShardWriter(target, shard_bytes)
        for name, tensor in revert_weight_conversion(network, state).items():
            shards.add(name, tensor)
        files = shards.finish()
        config = json.loads((source / "config.json").read_text())
        config["architectures"] = [type(network).__name__]
        config["dtype"] = str(network.dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)  # the older name of the same
        config["quantization_config"] = encoder.quantization_config(stored, (), provenance)
        write_json(target / "config.json", config)
        copy_companions(source, target)
        write_model_card(target, format="quantry", base_model=base_model, recipe=recipe, source=source)
        manifest = write_manifest(target, format="quantry", job=job, known=files, write=False)
        sync_folder(target)
    return manifest


def _state(
    network: nn.Module, encoder: QuantryFormat, layers: Iterable[tuple[str, QuantizedLayer]]
) -> tuple[dict[str, Tensor], list[Stored]]:
    """Every tensor of the quantized network, under its name in memory."""
    state: dict[str, Tensor] = dict(network.state_dict())
    stored: list[Stored] = []
    for name, layer in layers:
        _check_shape(network, name, layer)
        stored.append(stored_layer(name, name, layer))
        del state[f"{name}.weight"]
        state.pop(f"{name}.bias", None)
        state |= encoder.encode(name, layer)
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.float()
    if not stored:
        raise ExportError("no layer of the model was quantized")
    return state | encoder.finish(), stored


def _check_shape(network: nn.Module, name: str, layer: QuantizedLayer) -> None:
    """That the codes are those of a layer of the network. Raises ExportError."""
    module = dict(network.named_modules()).get(name)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise ExportError(f"layer `{name}` is no linear layer or convolution of the network")
    expected = tuple(module.weight.flatten(1).shape)
    if tuple(layer.weight.codes.shape) != expected:
        raise ExportError(
            f"layer `{name}`: codes of shape {tuple(layer.weight.codes.shape)}, expected {expected}"
        )


def _check_operands(network: nn.Module, operands: Operands) -> None:
    """That every quantizer has its place in the network. Raises ExportError."""
    modules = dict(network.named_modules())
    places = [name.rpartition(".")[0] for name in operands.quantizers]
    for place in (*places, *operands.probability_bias):
        if place not in modules:
            raise ExportError(f"a quantizer is given for `{place}`, which the network does not have")
