"""Load what Quantry wrote, whatever its format, or say why not: never a model with a part of it missing."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)

import quantry.cifar_resnet
import quantry.hf  # noqa: F401  (both register what is theirs)
from quantry.checkpoint_errors import CheckpointError
from quantry.convnets import CONV_FAMILIES
from quantry.diffusion import SIDECAR
from quantry.pipelines import load_pipeline
from quantry.reports import Manifest
from quantry.unpack import gguf_state, gptq_state
from quantry.vision import VISION_FAMILIES


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    dequantize: bool = False,
) -> Any:
    """The model in `folder`, ready to run, with nothing missing and nothing left out.

    compressed-tensors and quantry checkpoints stay packed in memory; GPTQ and GGUF ones become dense weights,
    exact in float32, and need neither gptqmodel nor llama.cpp. A diffusion pipeline comes back as the pipeline of
    diffusers, packed, in float32 on the CPU; arguments that ask for more are refused.

    Args:
        dtype: of the activations and dense weights; "auto" is what config.json says.
        dequantize: dense weights for the other two formats as well.
    Raises: CheckpointError.
    """
    path = Path(folder)
    check_files(path)
    if (path / SIDECAR).is_file():
        if dtype != "auto" or device_map is not None or dequantize:
            raise CheckpointError(
                f"{path} holds a diffusion pipeline, which loads packed, in float32 and on the CPU: leave dtype, "
                "device_map and dequantize out, and move it with .to(device)"
            )
        return load_pipeline(path)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{path} has no config.json: it is not a checkpoint folder")
    config = json.loads(config_file.read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    ggufs = sorted(path.glob("*.gguf"))
    if method == "gptq" or (method is None and ggufs):
        state = gptq_state(path) if method == "gptq" else gguf_state(path, ggufs[0])
        return _from_state(path, state, dtype, device_map)
    if any(path.glob("*.onnx")):
        raise CheckpointError(f"{path} holds an ONNX file: open it with onnxruntime")
    if method == "compressed-tensors":
        _check_reader(path)
    model, info = _auto_class(config).from_pretrained(
        path, dtype=dtype, device_map=device_map, output_loading_info=True
    )
    _check_info(path, info)
    return model.dequantize() if dequantize and method is not None else model


def _auto_class(config: dict[str, Any]) -> Any:
    """The class of transformers that opens a folder with this config.json."""
    classifiers = {family.architecture for family in VISION_FAMILIES.values()}
    classifiers |= {family.architecture for family in CONV_FAMILIES.values()}
    wanted = set(config.get("architectures") or ())
    return AutoModelForImageClassification if wanted & classifiers else AutoModelForCausalLM


def _from_state(
    path: Path,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype | str,
    device_map: str | dict[str, Any] | None,
) -> nn.Module:
    """The stock model of config.json with these dense weights."""
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored = config.dtype if config.dtype is not None else torch.float32
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=stored if dtype == "auto" else dtype,
        device_map=device_map,
        output_loading_info=True,
    )
    _check_info(path, info)
    return model  # type: ignore[no-any-return]


def check_files(folder: Path, *, digests: bool = False) -> None:
    """Compare the folder with its manifest.json, if it has one: sizes, and with `digests` the sha256 too.

    Raises: CheckpointError naming the first file that is missing, cut short or different.
    """
    listing = folder / "manifest.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not listing.is_file():
        return
    for entry in Manifest.model_validate_json(listing.read_text()).files:
        file = folder / entry.path
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: download it again")
        size = file.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(
                f"{file} has {size} bytes, the manifest says {entry.bytes}: download it again"
            )
        if digests:
            with file.open("rb") as content:
                actual = hashlib.file_digest(content, "sha256").hexdigest()
            if actual != entry.sha256:
                raise CheckpointError(f"{file} has another sha256 than the manifest says: download it again")


def _check_reader(path: Path) -> None:
    """That compressed-tensors is there, and new enough for these widths."""
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    odd = {group["weights"]["num_bits"] for group in groups} - {2, 4, 8}
    wanted = ">=0.18" if odd else ">=0.9"
    try:
        found = version("compressed-tensors")
    except PackageNotFoundError as error:
        raise CheckpointError(f'{path} needs a package: pip install "compressed-tensors{wanted}"') from error
    if odd and tuple(int(part) for part in found.split(".")[:2]) < (0, 18):
        raise CheckpointError(
            f"compressed-tensors {found} packs {sorted(odd)} bits differently: "
            f'pip install "compressed-tensors{wanted}"'
        )


def _check_info(path: Path, info: dict[str, Any]) -> None:
    """That every tensor of the model was in the files and every tensor in the files has its place."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise CheckpointError(f"{path}: {len(names)} {kind.replace('_', ' ')}, such as {names[0]}")
