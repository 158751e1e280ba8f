"""export(): from layers and tensors, as they come, to a folder that loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import quantry
from quantry.families import Family
from quantry.quantizers.affine import QuantizedLayer
from quantry.recipe import Step
from quantry.reports import FileEntry, Manifest
from worker.errors import ExportError
from worker.export.compressed_tensors import CompressedTensors
from worker.export.files import copy_companions, sync_folder, whole_or_nothing, write_json
from worker.export.formats import Provenance, Stored, WeightFormat, stored_layer
from worker.export.gguf_file import export_gguf
from worker.export.gptq import Gptq
from worker.export.int_quantized import IntQuantized
from worker.export.manifest import write_manifest
from worker.export.model_card import write_model_card
from worker.export.quantry_format import Operands, QuantryFormat
from worker.export.shards import ShardWriter
from worker.export.slots import config_with_slots, linear_names, skeleton, zero_biases

Written = Literal["compressed-tensors", "gptq", "gguf", "quantry"]
FORMATS: dict[str, Callable[[], WeightFormat]] = {"compressed-tensors": CompressedTensors, "gptq": Gptq}
# The scales that a format holds exactly: float16 only, or also float32.
SCALE_DTYPES: dict[Written, tuple[torch.dtype, ...]] = {
    "compressed-tensors": (torch.float16, torch.float32),
    "gptq": (torch.float16,),
    "gguf": (torch.float16,),
    "quantry": (torch.float16, torch.float32),
}
SHARD_BYTES = 4_000_000_000


def export(
    source: Path,
    target: Path,
    *,
    format: Written,
    config: Mapping[str, Any],
    family: Family,
    layers: Iterable[tuple[str, QuantizedLayer]],
    kept: Iterable[tuple[str, Tensor]],
    operands: Operands | None = None,
    job: str | None = None,
    recipe: Sequence[Step] = (),
    base_model: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write a checkpoint into `target`, an empty folder; at most one shard of it is in memory.

    Args:
        source: the full-precision checkpoint: its tokenizer and generation config are copied.
        config: its config.json.
        layers: (canonical name, layer), such as "model.layers.0.self_attn.q_proj"; codes are (out, in), also
            where the family stores weights transposed.
        kept: (canonical name, tensor) of everything else, stored as it is.
        operands: activation quantizers and softmax biases, which format `quantry` alone can hold.
        recipe, base_model, job: where the checkpoint comes from, for its config and card.
    Returns: what was written so far, with sha256 digests; `write_manifest` puts it on the disk, last.
    Raises: ExportError if the format cannot hold the model exactly; DiskFull. `target` is then empty again.
    """
    steps = tuple(step.model_dump(mode="json") for step in recipe)
    provenance = Provenance(base_model or source.name, quantry.__version__, steps, job)
    if any(target.iterdir()):
        raise ExportError(f"{target} is not empty: a checkpoint is written into a fresh folder")
    integer = operands is not None and format == "compressed-tensors" and not operands.probability_bias
    if operands and format != "quantry" and not integer:
        raise ExportError(f"{format} has no place for what quantizes activations: use format `quantry`")
    with whole_or_nothing(target):
        if format == "gguf":
            files = export_gguf(source, target, config, family, layers, kept)
        else:
            encoder = _encoder(format, operands, family)
            files = _export_safetensors(
                target, encoder, config, family, layers, kept, provenance, shard_bytes
            )
        copy_companions(source, target)
        write_model_card(
            target, format=format, base_model=provenance.base_model, recipe=recipe, source=source
        )
        manifest = write_manifest(target, format=format, job=job, known=files, write=False)
        sync_folder(target)
    return manifest


def _encoder(format: Written, operands: Operands | None, family: Family) -> WeightFormat:
    if format == "quantry":
        return QuantryFormat(operands)
    return IntQuantized(operands.quantizers, family) if operands else FORMATS[format]()


def _export_safetensors(
    target: Path,
    encoder: WeightFormat,
    config: Mapping[str, Any],
    family: Family,
    layers: Iterable[tuple[str, QuantizedLayer]],
    kept: Iterable[tuple[str, Tensor]],
    provenance: Provenance,
    shard_bytes: int,
) -> list[FileEntry]:
    """config.json and the shards of a format that transformers reads; returns the entries of the shards."""
    if family.transposed and isinstance(encoder, CompressedTensors):
        raise ExportError(
            f"{family.model_type} stores its weights transposed (Conv1D), which compressed-tensors does not "
            "read; use format `quantry`"
        )
    shards = ShardWriter(target, shard_bytes)
    stored: list[Stored] = []
    for name, layer in layers:
        stored.append(_note(name, layer, family))
        _add(shards, encoder.encode(name, layer))
        if layer.bias is not None:
            shards.add(f"{name}.bias", layer.bias.float())
    if not stored:
        raise ExportError("no layer of the model was quantized")
    plain, dtype = _add_kept(shards, kept)
    _add(shards, encoder.finish())
    final = {key: value for key, value in config.items() if key != "quantization_config"}
    if not final.keys() & {"dtype", "torch_dtype"}:
        final["dtype"] = str(dtype).removeprefix(
            "torch."
        )  # else loaders take that of the first scale they meet
    biases = {f"{layer.name}.bias" for layer in stored if layer.bias}
    if not encoder.own_layers:
        biased = {local for name in biases | plain if (local := _biased_layer(name, family))}
        final = config_with_slots(final, family, biased)
    model = skeleton(final)
    replaced = {f"{layer.name}.weight" for layer in stored}
    if encoder.own_layers:
        replaced |= {f"{layer.name}.bias" for layer in stored} & set(model.state_dict())
    else:
        plain |= biases
    _add(shards, zero_biases(model, family, config, plain, replaced))
    files = shards.finish()
    names = {layer.name for layer in stored}
    dense = [name for name in linear_names(model) if name not in names]
    final["quantization_config"] = encoder.quantization_config(stored, dense, provenance)
    write_json(target / "config.json", final)
    if isinstance(encoder, Gptq):
        write_json(target / "quantize_config.json", final["quantization_config"])
    return files


def _note(name: str, layer: QuantizedLayer, family: Family) -> Stored:
    """Check a layer and note what will be said of it. Raises ExportError."""
    local = next((local for local in family.linears if name.endswith(f".{local}")), None)
    if local is None or not name.startswith(f"{family.blocks}."):
        raise ExportError(f"layer `{name}` is none of the linear layers of {family.model_type}")
    return stored_layer(name, local, layer)


def _add(shards: ShardWriter, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        shards.add(name, tensor)


def _add_kept(shards: ShardWriter, kept: Iterable[tuple[str, Tensor]]) -> tuple[set[str], torch.dtype]:
    """Write the tensors that stay; returns their names and the dtype of the first that is not an integer."""
    names: set[str] = set()
    dtypes: list[torch.dtype] = []
    for name, tensor in kept:
        shards.add(name, tensor)
        names.add(name)
        if tensor.is_floating_point() and not dtypes:
            dtypes.append(tensor.dtype)
    return names, (dtypes or [torch.float32])[0]


def _biased_layer(name: str, family: Family) -> str | None:
    """The linear layer inside a block that a bias belongs to, if it is one of a block's."""
    inside = name.startswith(f"{family.blocks}.")
    return next((local for local in family.linears if inside and name.endswith(f".{local}.bias")), None)
