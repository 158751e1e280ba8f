"""Blocks and groups of a diffusion job that are done, on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedWeight
from worker.calibration.pieces import PieceStore
from worker.diffusion.accuquant import GroupResult
from worker.diffusion.adaround import BlockResult
from worker.diffusion.weights import UNetWeight


@dataclass(frozen=True)
class BlockPieces:
    """Blocks whose rounding is learned. done: hears of each that is new."""

    store: PieceStore
    device: torch.device
    done: Callable[[BlockResult], None]

    def load(self, number: int) -> tuple[dict[str, UNetWeight], BlockResult] | None:
        name = f"block-{number:05d}"
        if name not in self.store:
            return None
        tensors, facts = self.store.load(name, self.device)
        layers = json.loads(facts["layers"])
        weights = {layer: _weight(tensors, layer, found) for layer, found in layers.items()}
        return weights, BlockResult(**json.loads(facts["result"]))

    def save(self, number: int, weights: dict[str, UNetWeight], result: BlockResult) -> None:
        tensors: dict[str, Tensor] = {}
        layers = {}
        for layer, weight in weights.items():
            for place, part in enumerate(weight.parts):
                tensors[f"{layer}.{place}.codes"] = part.codes
                tensors[f"{layer}.{place}.scale"] = part.scale
                tensors[f"{layer}.{place}.zero"] = part.zero_point
            first = weight.parts[0]
            layers[layer] = {
                "bits": first.bits,
                "symmetric": first.symmetric,
                "parts": len(weight.parts),
                "shape": list(weight.shape),
            }
        facts = {"layers": json.dumps(layers), "result": json.dumps(asdict(result))}
        self.store.save(f"block-{number:05d}", tensors, facts)
        self.done(result)


def _weight(tensors: dict[str, Tensor], layer: str, facts: dict[str, Any]) -> UNetWeight:
    parts = []
    for place in range(facts["parts"]):
        codes, scale, zero = (tensors[f"{layer}.{place}.{key}"] for key in ("codes", "scale", "zero"))
        parts.append(QuantizedWeight(codes, scale, zero, facts["bits"], None, facts["symmetric"]))
    return UNetWeight(tuple(parts), torch.Size(facts["shape"]))


@dataclass(frozen=True)
class GroupPieces:
    """Groups of steps whose step sizes are trained. done: hears of each that is new."""

    store: PieceStore
    device: torch.device
    done: Callable[[GroupResult], None]

    def load(self, number: int) -> tuple[dict[str, Tensor], list[GroupResult]] | None:
        name = f"group-{number:05d}"
        if name not in self.store:
            return None
        tables, facts = self.store.load(name, self.device)
        return tables, [GroupResult(**result) for result in json.loads(facts["results"])]

    def save(self, number: int, tables: dict[str, Tensor], results: list[GroupResult]) -> None:
        facts = {"results": json.dumps([asdict(result) for result in results])}
        self.store.save(f"group-{number:05d}", tables, facts)
        for result in results:
            self.done(result)
