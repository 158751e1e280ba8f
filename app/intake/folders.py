"""A checkpoint folder of this machine: below a root, with a config, sound safetensors and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.intake.errors import InputRefused, ModelRefused
from quantry.checkpoint_checks import leaving_link
from quantry.diffusion import INDEX as PIPELINE_INDEX
from quantry.diffusion import Component, read_components
from quantry.headers import HeaderError, TensorInfo, merge_shards, read_header

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
MAX_JSON_BYTES = 32 << 20  # the index of a model with a hundred thousand tensors


@dataclass(frozen=True)
class Outside:
    """What a checkpoint says of itself without being loaded.

    components: of a diffusion pipeline, whose config is its model_index.json.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    components: Mapping[str, Component] = field(default_factory=dict)


def below_roots(name: str, roots: tuple[Path, ...], *, path: str, missing: type[InputRefused]) -> Path:
    """The file or folder `name` below one of the roots, links followed. Raises `missing`.

    What lies outside the roots and what does not exist are told apart to nobody.
    """
    if not roots:
        raise ModelRefused(path, "the local source is off on this server: QUANTRY_MODEL_ROOTS is not set")
    for root in (root.resolve() for root in roots):
        try:
            found = (root / name).resolve()
            if found.is_relative_to(root) and found.exists():
                return found
        except (OSError, ValueError):  # a name too long, or with a loop of links
            continue
    raise missing(path, f"{name} is not below any of the server's model roots")


def check_listing(names: Iterable[str], *, where: str, weights: bool = True) -> None:
    """Refuse a checkpoint by the names of its files; without weights only if those are wanted. Raises ModelRefused."""
    names = set(names)
    if "config.json" not in names:
        raise ModelRefused("model.id", f"{where} has no config.json: it is not a transformers checkpoint")
    if weights and not names & {WEIGHTS, INDEX}:
        pickled = sorted(name for name in names if name.endswith(PICKLES))
        hint = (
            f"; {pickled[0]} is a pickle, which is never loaded: convert it to safetensors" if pickled else ""
        )
        raise ModelRefused("model.id", f"{where} has no safetensors weights ({WEIGHTS}){hint}")
    if not names & {*TOKENIZERS, PROCESSOR}:
        raise ModelRefused(
            "model.id",
            f"{where} has no tokenizer (one of {', '.join(TOKENIZERS)}), and for an image classifier no "
            f"{PROCESSOR}",
        )


def parse_json(content: bytes, *, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises ModelRefused."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelRefused("model.id", f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelRefused("model.id", f"{name} is not a JSON object")
    return value


def shard_names(index: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The weight map of an index, and the files it names. Raises ModelRefused, also for names with a path."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelRefused("model.id", f"{INDEX} has no weight_map from tensors to files")
    files = sorted(set(weight_map.values()))
    for name in files:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelRefused("model.id", f"{INDEX} names {name!r}, which is no safetensors file beside it")
    return weight_map, files


def read_folder(folder: Path, roots: tuple[Path, ...] | None = None, *, weights: bool = True) -> Outside:
    """Config and tensors of a folder; no tensors if weights are not wanted.

    Raises ModelRefused, also for links that lead out of the roots.
    """
    if not folder.is_dir():
        raise ModelRefused("model.id", f"{folder.name} is not a folder")
    try:
        if roots is not None and (name := leaving_link(folder, roots)):
            raise ModelRefused("model.id", f"{name} is a link that leads out of the server's model roots")
        if (folder / PIPELINE_INDEX).is_file():
            return _read_pipeline(folder)
        files = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise ModelRefused("model.id", f"{folder.name} cannot be read: {error.strerror}") from error
    check_listing(files, where=folder.name, weights=weights)
    seen = tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items()))
    return _read(folder, seen, weights)


def _read_pipeline(folder: Path) -> Outside:
    """A folder of diffusers."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def read(name: str) -> bytes:
        size = (folder / name).stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelRefused("model.id", f"{name} has {size} bytes; the limit is {MAX_JSON_BYTES}")
        return (folder / name).read_bytes()

    try:
        index = parse_json(read(PIPELINE_INDEX), name=PIPELINE_INDEX)
        return Outside(
            index, {}, read_components(index, names, read, lambda name: read_header(folder / name))
        )
    except HeaderError as error:
        raise ModelRefused("model.id", str(error)) from error
    except OSError as error:
        raise ModelRefused("model.id", f"{folder.name} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=64)
def _read(folder: Path, seen: tuple[tuple[str, int, int], ...], weights: bool) -> Outside:
    """Read once for each state of the folder."""
    sizes = {name: size for name, size, _ in seen}
    for name in {"config.json", INDEX} & set(sizes):
        if sizes[name] > MAX_JSON_BYTES:
            raise ModelRefused("model.id", f"{name} has {sizes[name]} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        config = parse_json((folder / "config.json").read_bytes(), name="config.json")
        if not weights:
            return Outside(config, {})
        weight_map, shards = None, [WEIGHTS]
        if WEIGHTS not in sizes:
            weight_map, shards = shard_names(parse_json((folder / INDEX).read_bytes(), name=INDEX))
        missing = [name for name in shards if name not in sizes]
        if missing:
            raise ModelRefused("model.id", f"{INDEX} names {missing[0]}, which is not in {folder.name}")
        tensors = merge_shards(weight_map, {name: read_header(folder / name) for name in shards})
    except HeaderError as error:
        raise ModelRefused("model.id", str(error)) from error
    except OSError as error:
        raise ModelRefused("model.id", f"{folder.name} cannot be read: {error.strerror}") from error
    return Outside(config, tensors)
