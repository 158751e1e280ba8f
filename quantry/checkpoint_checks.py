"""What the plans of every kind of model check of a checkpoint: sizes in config.json, blocks, floating-point tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantry.base import SpecError
from quantry.contract import JobSpec
from quantry.headers import TensorInfo

MAX_SIZE = 2**31 - 1  # of anything that config.json counts
_FLOATS = ("F64", "F32", "F16", "BF16")


def size_of(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of several spellings of a size. Raises SpecError if it is not a positive whole number."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise SpecError(
                    "model",
                    f"config.json: {key} is {value!r}, not a positive whole number of at most {MAX_SIZE}",
                )
            return value
    return None


def leaving_link(folder: Path, roots: Iterable[Path]) -> str | None:
    """The path, in the folder, of a file or folder that is a link to outside of all roots, if there is one."""
    within = [root.resolve() for root in roots]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in within):
            return path.relative_to(folder).as_posix()
    return None


def architectures(config: Mapping[str, Any]) -> list[Any]:
    """The classes that config.json names, if any. Raises SpecError if that is no list."""
    found = config.get("architectures") or []
    if not isinstance(found, list):
        raise SpecError("model", f"config.json: architectures is {found!r}, not a list of names")
    return found


def refuse_diffusion(spec: JobSpec) -> None:
    """That nothing is asked of a single network that only sampling has. Raises SpecError."""
    if spec.sampling is not None:
        raise SpecError("sampling", "only diffusion pipelines sample: leave it out")
    if spec.evaluation is not None and spec.evaluation.features is not None:
        raise SpecError("evaluation.features", "only samples of diffusion pipelines are compared by features")
    for index, step in enumerate(spec.recipe):
        if getattr(step, "edge_bits", None) is not None:
            raise SpecError(f"recipe.{index}.edge_bits", "only denoisers have such layers: leave it out")


def check_blocks(count: int | None, found: set[int]) -> None:
    """That the checkpoint holds blocks 0 to `count` - 1 and no other. Raises SpecError."""
    if count != len(found) or found != set(range(len(found))):
        raise SpecError(
            "model", f"config.json says {count} blocks, the checkpoint holds {len(found)} ({_ranges(found)})"
        )


def check_float(name: str, info: TensorInfo) -> None:
    """That a tensor holds floating-point numbers. Raises SpecError."""
    if info.dtype not in _FLOATS:
        raise SpecError("model", f"{name} is {info.dtype}; Quantry quantizes floating-point weights")


def _ranges(found: set[int]) -> str:
    """Indices for a message: `0-3, 5`."""
    parts: list[list[int]] = []
    for index in sorted(found):
        if parts and index == parts[-1][-1] + 1:
            parts[-1][1:] = [index]
        else:
            parts.append([index])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"
