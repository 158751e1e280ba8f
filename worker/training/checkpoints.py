"""A checkpoint at each epoch: everything that the next one depends on, in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from quantry.reports import EpochReport
from worker.calibration.pieces import PieceStore
from worker.training.trainer import Trainer

_KINDS = {"weights": ("momentum_buffer",), "ranges": ("exp_avg", "exp_avg_sq", "step")}


class Checkpoints:
    """The last finished epoch of a training, and its best one where it may stop early."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._pieces = folder, PieceStore(folder, fingerprint)

    def save(self, trainer: Trainer) -> None:
        """Write the epoch that is done, then remove the one before."""
        tensors = {f"network.{name}": value for name, value in trainer.network.state_dict().items()}
        for kind, keys in _KINDS.items():
            tensors |= _optimiser_state(kind, getattr(trainer, kind), keys)
        name = f"epoch-{len(trainer.curve):05d}"
        self._pieces.save(name, tensors, _metadata(trainer))
        for older in self._folder.glob("epoch-*.safetensors"):
            if older.stem != name:
                older.unlink()

    def resume(self, trainer: Trainer) -> bool:
        """Put a trainer where the last finished epoch left it; False if there is none."""
        files = sorted(self._folder.glob("epoch-*.safetensors"))
        if not files:
            return False
        tensors, metadata = self._pieces.load(files[-1].stem, torch.device("cpu"))
        trainer.network.load_state_dict(
            {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
        )
        for name, signed in json.loads(metadata["signed"]).items():
            trainer.layers[name].signed = signed
        for name, count in json.loads(metadata.get("gradients", "{}")).items():
            trainer.gradients[name].count = count
        for kind in _KINDS:
            _restore(getattr(trainer, kind), kind, tensors)
        trainer.curve = [EpochReport.model_validate(epoch) for epoch in json.loads(metadata["curve"])]
        return True

    def keep_best(self, trainer: Trainer) -> None:
        """Keep the network of the epoch that is done, apart."""
        self._pieces.save("best", trainer.network.state_dict(), {"epoch": str(len(trainer.curve))})

    def take_best(self, trainer: Trainer) -> None:
        """Go back to the network that was kept last."""
        trainer.network.load_state_dict(self._pieces.load("best", torch.device("cpu"))[0])


def _metadata(trainer: Trainer) -> dict[str, str]:
    signed = {name: layer.signed for name, layer in trainer.layers.items()}
    curve = [epoch.model_dump(mode="json") for epoch in trainer.curve]
    counts = {name: gradient.count for name, gradient in trainer.gradients.items()}
    return {"signed": json.dumps(signed), "gradients": json.dumps(counts), "curve": json.dumps(curve)}


def _optimiser_state(
    kind: str, optimiser: torch.optim.Optimizer | None, keys: tuple[str, ...]
) -> dict[str, Tensor]:
    """The state of each parameter, by its number; nothing of parameters that no gradient has reached."""
    if optimiser is None:
        return {}
    state = optimiser.state_dict()["state"]
    return {
        f"{kind}.{index}.{key}": values[key]
        for index, values in state.items()
        for key in keys
        if isinstance(values.get(key), Tensor)
    }


def _restore(optimiser: torch.optim.Optimizer | None, kind: str, tensors: dict[str, Tensor]) -> None:
    if optimiser is None:
        return
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{kind}."):
            _, index, key = name.split(".")
            found.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": found})
