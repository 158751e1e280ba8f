"""A repository of the model hub: its revision pinned to a commit, its headers read by byte range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from app.intake.errors import DatasetNotFound, HubUnreachable, InputRefused, ModelNotFound, ModelRefused
from app.intake.folders import (
    INDEX,
    MAX_JSON_BYTES,
    WEIGHTS,
    Outside,
    check_listing,
    parse_json,
    read_folder,
    shard_names,
)
from quantry.diffusion import INDEX as PIPELINE_INDEX
from quantry.diffusion import read_components
from quantry.headers import HeaderError, TensorInfo, header_length, merge_shards, parse_header

TIMEOUT_S = 10.0
MAX_SHARDS = 1000
_GUESS_BYTES = 100_000  # most headers fit in the first request


@dataclass(frozen=True)
class Hub:
    """Where to ask. `url`: None for the public hub. Offline, only `cache` is looked at."""

    url: str | None
    cache: Path
    offline: bool

    def model(self, name: str, revision: str | None) -> tuple[str, Outside]:
        """The commit that the revision stands for, and the checkpoint's outside.

        Raises ModelNotFound, ModelRefused, HubUnreachable.
        """
        with _translated("model.id", _at(name, revision), ModelNotFound):
            if self.offline:
                folder = Path(
                    snapshot_download(
                        name, revision=revision, cache_dir=self.cache, local_files_only=True, token=False
                    )
                )
                return folder.name, read_folder(folder)
            info = self._api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
            sizes = {file.rfilename: file.size for file in info.siblings or ()}
            if PIPELINE_INDEX not in sizes:
                check_listing(sizes, where=name)
            if info.sha is None:
                raise HubUnreachable("model.id", f"the hub named no commit of {name}")
            return info.sha, _read_remote(self.url, name, info.sha, frozenset(sizes.items()))

    def dataset_file(
        self, name: str, file: str, revision: str | None, *, path: str
    ) -> tuple[str, int | None]:
        """The commit of the revision, and the size of one file. Raises DatasetNotFound, HubUnreachable."""
        with _translated(f"{path}.id", _at(name, revision), DatasetNotFound):
            if self.offline:
                found = try_to_load_from_cache(
                    name, file, cache_dir=self.cache, revision=revision, repo_type="dataset"
                )
                if not isinstance(found, str):
                    raise DatasetNotFound(
                        f"{path}.id",
                        f"{_at(name, revision)} {file} is not in the cache, and the server is offline",
                    )
                depth = len(Path(file).parts)
                return Path(found).parts[-depth - 1], Path(found).stat().st_size
            info = self._api.dataset_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
            sizes = {entry.rfilename: entry.size for entry in info.siblings or ()}
            if file not in sizes or info.sha is None:
                raise DatasetNotFound(f"{path}.file", f"{_at(name, revision)} has no file {file}")
            return info.sha, sizes[file]

    @property
    def _api(self) -> HfApi:
        return HfApi(endpoint=self.url, token=False)


@lru_cache(maxsize=64)
def _read_remote(
    url: str | None, name: str, commit: str, files: frozenset[tuple[str, int | None]]
) -> Outside:
    """A commit never changes, so it is read once."""
    sizes = dict(files)

    def address(file: str) -> str:
        return hf_hub_url(name, file, revision=commit, endpoint=url)

    if PIPELINE_INDEX in sizes:
        return _read_remote_pipeline(address, sizes)
    config = parse_json(_whole(address("config.json"), "config.json"), name="config.json")
    weight_map, shards = None, [WEIGHTS]
    if WEIGHTS not in sizes:
        weight_map, shards = shard_names(parse_json(_whole(address(INDEX), INDEX), name=INDEX))
    missing = [shard for shard in shards if shard not in sizes]
    if missing or len(shards) > MAX_SHARDS:
        fault = f"{missing[0]}, which is not in {name}" if missing else f"more than {MAX_SHARDS} files"
        raise ModelRefused("model.id", f"{INDEX} names {fault}")
    try:
        with ThreadPoolExecutor(min(8, len(shards))) as pool:
            headers = pool.map(lambda file: _remote_header(address(file), file, sizes[file]), shards)
            found: Mapping[str, Mapping[str, TensorInfo]] = dict(zip(shards, headers, strict=True))
        return Outside(config, merge_shards(weight_map, found))
    except HeaderError as error:
        raise ModelRefused("model.id", str(error)) from error


def _read_remote_pipeline(address: Callable[[str], str], sizes: Mapping[str, int | None]) -> Outside:
    """The components of a diffusion pipeline, file by file."""
    try:
        index = parse_json(_whole(address(PIPELINE_INDEX), PIPELINE_INDEX), name=PIPELINE_INDEX)
        components = read_components(
            index,
            sizes,
            lambda file: _whole(address(file), file),
            lambda file: _remote_header(address(file), file, sizes[file]),
        )
    except HeaderError as error:
        raise ModelRefused("model.id", str(error)) from error
    return Outside(index, {}, components)


def _remote_header(address: str, file: str, size: int | None) -> dict[str, TensorInfo]:
    first = _range(address, 0, _GUESS_BYTES)
    length = header_length(file, first)
    if 8 + length > len(first) == _GUESS_BYTES:
        first += _range(address, _GUESS_BYTES, 8 + length)
    return parse_header(file, first, first[8 : 8 + length], size)


def _whole(address: str, file: str) -> bytes:
    content = _range(address, 0, MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ModelRefused("model.id", f"{file} has more than {MAX_JSON_BYTES} bytes")
    return content


def _range(address: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a remote file, fewer at its end; also if the server ignores Range."""
    headers = {
        **build_hf_headers(token=False),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    with get_session().stream(
        "GET", address, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
    ) as response:
        if response.status_code == 416:  # the file ends before `start`
            return b""
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= skip + stop - start:
                break
    return bytes(content[skip : skip + stop - start])


@contextmanager
def _translated(path: str, name: str, missing: type[InputRefused]) -> Iterator[None]:
    """Turn the library's errors into ours: what does not exist, and what may work later."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise missing(
            path, f"{name} is not in the cache, and the server is offline (QUANTRY_OFFLINE)"
        ) from error
    except RevisionNotFoundError as error:
        raise missing(path.replace(".id", ".revision"), f"the hub has no revision {name}") from error
    except RepositoryNotFoundError as error:  # also one that is private or gated
        raise missing(path, f"the hub has no public repository {name}") from error
    except EntryNotFoundError as error:
        raise missing(path, f"{name}: {error}") from error
    except HFValidationError as error:
        raise missing(path, f"{name} is no name of a hub repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            raise HubUnreachable(
                path, f"the hub failed for {name} with status {status}; try again"
            ) from error
        raise missing(path, f"the hub refuses {name} with status {status}") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise HubUnreachable(path, f"the hub did not answer for {name}; try again") from error


def _at(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name
