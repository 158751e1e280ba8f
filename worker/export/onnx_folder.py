"""The artifact of `format: onnx`: a quantized classifier as one ONNX file, with what prepares its images beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedLayer
from quantry.recipe import Step
from quantry.reports import Manifest
from worker.errors import ExportError
from worker.export.files import copy_companions, sync_folder, whole_or_nothing, write_json
from worker.export.manifest import write_manifest
from worker.export.model_card import write_model_card
from worker.export.onnx_qdq import export_onnx

FILE = "model.onnx"


def write_onnx(
    source: Path,
    target: Path,
    network: Any,
    layers: Iterable[tuple[str, QuantizedLayer]],
    quantizers: Mapping[str, ActivationQuantizer],
    probability_bias: Mapping[str, Tensor],
    image_shape: Sequence[int],
    recipe: Sequence[Step],
    base_model: str,
) -> Manifest:
    """Write `model.onnx`, the network's config.json and the image processor's into `target`, an empty folder.

    Args: as of `worker.export.vision.write_vision`; image_shape: (C, H, W), which is fixed in the graph.
    Raises: ExportError for what ONNX has no nodes for; DiskFull. `target` is then empty again.
    """
    if any(target.iterdir()):
        raise ExportError(f"{target} is not empty: a checkpoint is written into a fresh folder")
    channels, height, width = image_shape
    with whole_or_nothing(target):
        export_onnx(target / FILE, network, layers, quantizers, probability_bias, (channels, height, width))
        write_json(target / "config.json", json.loads((source / "config.json").read_text()))
        copy_companions(source, target)
        write_model_card(target, format="onnx", base_model=base_model, recipe=recipe, source=source)
        manifest = write_manifest(target, format="onnx", job=None, write=False)
        sync_folder(target)
    return manifest
