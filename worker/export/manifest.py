"""manifest.json: what an artifact consists of, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quantry
from quantry.diffusion import SIDECAR
from quantry.reports import FileEntry, Loader, Manifest
from worker.export.files import file_entry, sync_folder, whole_or_nothing, write_bytes

MANIFEST = "manifest.json"


def write_manifest(
    folder: Path,
    *,
    format: str,
    job: str | None,
    known: Sequence[FileEntry] = (),
    write: bool = True,
) -> Manifest:
    """List every file of `folder` but the manifest itself, with its sha256, in `manifest.json`.

    Call it last. `known`: entries of files that were hashed as they were written (weights), taken over if the
    size still agrees. `write=False` only returns the manifest. Raises DiskFull; the folder is then emptied.
    """
    hashed = {entry.path: entry for entry in known}
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        name = path.relative_to(folder).as_posix()
        entry = hashed.get(name)
        unchanged = entry is not None and entry.bytes == path.stat().st_size
        files.append(entry if entry is not None and unchanged else file_entry(folder, path))
    sidecar = read_sidecar(folder)
    manifest = Manifest(
        job=job,
        format=format,
        loader=loader_of(folder, format),
        files=tuple(files),
        sampling=sidecar["sampling"] if sidecar else None,
    )
    if write:
        with whole_or_nothing(folder):
            write_bytes(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
            sync_folder(folder)
    return manifest


def loader_of(folder: Path, format: str) -> Loader:
    """The package and the lines that load this artifact."""
    name = "path/to/this/folder"  # the user chooses where it lies
    sidecar = read_sidecar(folder)
    if sidecar is not None:
        arguments = ", ".join(f"{key}={value!r}" for key, value in sidecar["call"].items())
        snippet = f'import quantry\npipeline = quantry.load("{name}")\nimages = pipeline({arguments}).images'
        return Loader(package="quantry[torch,diffusion]", version=f">={quantry.__version__}", snippet=snippet)
    auto = "AutoModelForImageClassification" if is_classifier(folder) else "AutoModelForCausalLM"
    stock = f'{auto}.from_pretrained("{name}")'
    imported = f"from transformers import {auto}\n"
    if format == "compressed-tensors":
        version = ">=0.18" if _bits(folder) - {2, 4, 8} else ">=0.9"
        return Loader(package="compressed-tensors", version=version, snippet=f"{imported}model = {stock}")
    if format == "gptq":
        return Loader(package="gptqmodel", version=">=7.7", snippet=f"{imported}model = {stock}")
    if format == "gguf":
        file = next(folder.glob("*.gguf")).name
        snippet = f'from llama_cpp import Llama\nmodel = Llama("{name}/{file}")'
        return Loader(package="llama-cpp-python", version=">=0.3", snippet=snippet)
    if format == "onnx":
        snippet = (
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{name}/model.onnx")\n'
            '(logits,) = session.run(["logits"], {"pixel_values": pixels})'
        )
        return Loader(package="onnxruntime", version=">=1.24", snippet=snippet)
    snippet = f"import quantry\n{imported}model = {stock}"
    return Loader(package="quantry[torch]", version=f">={quantry.__version__}", snippet=snippet)


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """What a quantized diffusion pipeline says of itself; None for a folder that is none."""
    path = folder / SIDECAR
    return json.loads(path.read_text()) if path.is_file() else None


def is_classifier(folder: Path) -> bool:
    """Whether the config of a checkpoint is of an image classifier."""
    if read_sidecar(folder) is not None:
        return False
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or ()
    return any(name.endswith("ForImageClassification") for name in architectures)


def _bits(folder: Path) -> set[int]:
    """The widths that a compressed-tensors config names."""
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    return {int(group["weights"]["num_bits"]) for group in groups}
