"""From a model reference to a folder that is safe to load: bundled, local below a root, or the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantry.base import SpecError
from quantry.bundled import bundled_model
from quantry.checkpoint_checks import leaving_link
from quantry.contract import DatasetRef, ModelRef
from quantry.diffusion import INDEX, Component, pipeline_family_of, read_components
from quantry.families import family_of
from quantry.headers import HeaderError, read_header
from quantry.training_planning import classifier_family_of, is_trainable
from worker.errors import DatasetError, HubUnreachable, ModelError, ModelNotFound
from worker.models.tensors import shard_files
from worker.workspace import Workspace

Role = Literal["calibration", "evaluation"]
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
VARIANTS = ("*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors")  # copies that nobody reads
REFUSED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".py")


@contextmanager
def refusing(folder: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises for a file of the checkpoint, as a ModelError that names it."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"{folder.name}: transformers cannot use {what}: {reason_of(error, folder)}"
        ) from error


def reason_of(error: Exception, folder: Path) -> str:
    """What an error says, in one line of no more than 400 characters, without the place of `folder`."""
    said = " ".join(str(error).replace(str(folder), folder.name).split())
    return (said if len(said) <= 400 else said[:400] + " ...") or type(error).__name__


def resolve(ref: ModelRef, workspace: Workspace, *, weights: bool = True) -> Path:
    """The folder of the checkpoint, checked; its weights only if they are wanted. Raises ModelError and its kinds."""
    if ref.source == "bundled":
        try:
            folder = bundled_model(ref.id)
        except (KeyError, ValueError) as error:
            raise ModelNotFound(f"model.id: {error}") from error
    elif ref.source == "local":
        folder = local_path(ref.id, workspace.model_roots, field="model.id")
        if not folder.is_dir():
            raise ModelNotFound(f"model.id: {ref.id} is not a folder")
        if name := leaving_link(folder, workspace.model_roots):
            raise ModelError(f"model.id: {name} is a link that leads out of the server's model roots")
    else:
        folder = _download(ref, workspace)
    check_folder(folder, weights=weights)
    return folder


def local_path(name: str, roots: tuple[Path, ...], *, field: str) -> Path:
    """`name` below one of the roots. Raises ModelNotFound; never follows a link out of the roots."""
    if not roots:
        raise ModelError(f"{field}: the local source is off on this server (QUANTRY_MODEL_ROOTS is not set)")
    for root in (r.resolve() for r in roots):
        path = (root / name).resolve()
        if path.is_relative_to(root) and path.exists():
            return path
    raise ModelNotFound(f"{field}: {name} is not below any of the server's model roots")


def check_folder(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """The checkpoint's config, after the cheap refusals: pickles, remote code, unknown kinds, no tokenizer."""
    if (folder / INDEX).exists():
        return read_pipeline(folder)[0]
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder.name} has no config.json: it is not a transformers checkpoint")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        classifier = is_trainable(config)
        classifier_family_of(config) if classifier else family_of(config)
    except SpecError as error:
        raise ModelError(f"{error.path}: {error.detail}") from error
    except ValueError as error:
        raise ModelError(f"{folder.name}/config.json is not valid JSON: {error}") from error
    if config.get("quantization_config"):
        raise ModelError(f"{folder.name} is already quantized; name the full-precision checkpoint")
    if (
        weights
        and not (folder / "model.safetensors").exists()
        and not (folder / "model.safetensors.index.json").exists()
    ):
        pickles = [f.name for f in folder.iterdir() if f.suffix in REFUSED]
        hint = f"; {pickles[0]} is a pickle or code and is refused" if pickles else ""
        raise ModelError(f"{folder.name} has no safetensors weights{hint}")
    if classifier:
        if not (folder / "preprocessor_config.json").exists():
            raise ModelError(f"{folder.name} has no preprocessor_config.json: images cannot be prepared")
    elif not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{folder.name} has no tokenizer (tokenizer.json): perplexity and calibration need it"
        )
    if weights:
        shard_files(folder)
    return config


def read_pipeline(folder: Path) -> tuple[dict[str, Any], dict[str, Component]]:
    """model_index.json and the components of a diffusion pipeline. Raises ModelError."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = next((name for name in sorted(names) if name.endswith(".py")), None)
    if code is not None:
        raise ModelError(f"{folder.name} holds {code}: pipelines with code of their own are refused")
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
        pipeline_family_of(index)
        components = read_components(
            index, names, lambda name: (folder / name).read_bytes(), lambda name: read_header(folder / name)
        )
    except SpecError as error:
        raise ModelError(f"{error.path}: {error.detail}") from error
    except (HeaderError, OSError) as error:
        raise ModelError(f"{folder.name}: {error}") from error
    except ValueError as error:
        raise ModelError(f"{folder.name}/{INDEX} is not valid JSON: {error}") from error
    return index, components


def _download(ref: ModelRef, workspace: Workspace) -> Path:
    """The hub's snapshot of the pinned commit, in the content-addressed cache."""
    try:
        return Path(
            snapshot_download(
                ref.id,
                revision=ref.revision,
                endpoint=workspace.hub_url,
                cache_dir=workspace.cache,
                local_files_only=workspace.offline,
                allow_patterns=list(WANTED),
                ignore_patterns=list(VARIANTS),
                token=False,
            )
        )
    except Exception as error:
        raise _hub_error(error, ref.id, ref.revision, workspace.offline) from error


def dataset_path(ref: DatasetRef, role: Role, workspace: Workspace) -> Path:
    """Where an uploaded, local or hub dataset lies. Raises DatasetError and the kinds of ModelError."""
    if ref.source == "upload":
        if ref.id not in workspace.uploads:
            raise DatasetError(f"{role}.dataset.id: there is no upload {ref.id}")
        return workspace.uploads[ref.id]
    if ref.source == "local":
        return local_path(ref.id, workspace.model_roots, field=f"{role}.dataset.id")
    if ref.file is None:
        raise DatasetError(f"{role}.dataset.file: name the file inside the dataset repository {ref.id}")
    return hub_file(ref.id, ref.file, ref.revision, workspace, repo_type="dataset")


def shown_name(ref: DatasetRef, path: Path) -> str:
    """What messages and reports call a dataset: as the request names it, or its file."""
    return ref.id if ref.source in ("bundled", "upload") else path.name


def hub_file(
    repo: str,
    file: str,
    revision: str | None,
    workspace: Workspace,
    *,
    repo_type: Literal["dataset", "model"],
) -> Path:
    """One file of a hub repository, in the cache."""
    try:
        return Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                repo_type=repo_type,
                endpoint=workspace.hub_url,
                cache_dir=workspace.cache,
                local_files_only=workspace.offline,
                token=False,
            )
        )
    except Exception as error:
        found = _hub_error(error, f"{repo}/{file}", revision, workspace.offline)
        raise (DatasetError(str(found)) if isinstance(found, ModelNotFound) else found) from error


def _hub_error(error: Exception, name: str, revision: str | None, offline: bool) -> Exception:
    at = f"{name}@{revision}" if revision else name
    if isinstance(error, LocalEntryNotFoundError):
        if offline:
            return ModelNotFound(f"{at} is not in the cache, and the server is offline (QUANTRY_OFFLINE)")
        return HubUnreachable(f"the model hub did not answer for {at}, and it is not in the cache")
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        return ModelNotFound(f"the model hub has no public repository {name}")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{name} has no revision {revision}")
    if isinstance(error, EntryNotFoundError):
        return ModelNotFound(f"{at}: no such file")
    if isinstance(error, HfHubHTTPError | httpx2.HTTPError | ConnectionError | TimeoutError):
        return HubUnreachable(f"the model hub failed for {at}: {error}")
    return error
