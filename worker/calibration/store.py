"""Finished blocks on disk, so that a job that dies at block k goes on at block k."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from quantry.reports import BlockReport, LayerReport
from worker.calibration.pieces import PieceStore
from worker.models.network import Network, join


@dataclass(frozen=True)
class FinishedBlock:
    """A quantized block: its layers by name inside the block, what is reported of it, and the seconds it took.

    wall_s, cpu_s: of the quantization alone, without the evaluation's streams.
    """

    layers: dict[str, QuantizedLayer]
    reports: tuple[LayerReport, ...]
    report: BlockReport
    wall_s: float = 0.0
    cpu_s: float = 0.0


class BlockStore:
    """One piece a block; see PieceStore."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._pieces = PieceStore(folder, fingerprint)

    def finished(self) -> int:
        """How many blocks, from the first, are done."""
        index = 0
        while _name(index) in self._pieces:
            index += 1
        return index

    def save(self, index: int, block: FinishedBlock) -> None:
        tensors: dict[str, Tensor] = {}
        facts: dict[str, dict[str, int | bool | None]] = {}
        for name, layer in block.layers.items():
            weight = layer.weight
            tensors |= {
                f"{name}.codes": weight.codes,
                f"{name}.scale": weight.scale,
                f"{name}.zero": weight.zero_point,
            }
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias
            if layer.position_bias is not None:
                tensors[f"{name}.position_bias"] = layer.position_bias
            facts[name] = {
                "bits": weight.bits,
                "group_size": weight.group_size,
                "symmetric": weight.symmetric,
                "added_bias": layer.added_bias,
            }
        metadata = {
            "layers": json.dumps(facts),
            "reports": json.dumps([r.model_dump(mode="json") for r in block.reports]),
            "report": block.report.model_dump_json(),
            "seconds": json.dumps([block.wall_s, block.cpu_s]),
        }
        self._pieces.save(_name(index), tensors, metadata)

    def load(self, index: int, device: torch.device) -> FinishedBlock:
        tensors, metadata = self._pieces.load(_name(index), device)
        layers = {
            name: _layer(tensors, name, facts) for name, facts in json.loads(metadata["layers"]).items()
        }
        reports = tuple(LayerReport.model_validate(r) for r in json.loads(metadata["reports"]))
        report = BlockReport.model_validate_json(metadata["report"])
        return FinishedBlock(layers, reports, report, *json.loads(metadata.get("seconds", "[]")))

    def layers(self, network: Network) -> Iterator[tuple[str, QuantizedLayer]]:
        """Every layer under its full name, block by block."""
        for index in range(network.count):
            for name, layer in self.load(index, torch.device("cpu")).layers.items():
                yield join(network.prefix(index), name), layer


def _name(index: int) -> str:
    return f"block-{index:05d}"


def _layer(tensors: Mapping[str, Tensor], name: str, facts: dict[str, int]) -> QuantizedLayer:
    read = {
        k: tensors[f"{name}.{k}"]
        for k in ("codes", "scale", "zero", "bias", "position_bias")
        if f"{name}.{k}" in tensors
    }
    weight = QuantizedWeight(
        read["codes"],
        read["scale"],
        read["zero"],
        facts["bits"],
        facts["group_size"],
        bool(facts["symmetric"]),
    )
    return QuantizedLayer(weight, read.get("bias"), bool(facts["added_bias"]), read.get("position_bias"))
