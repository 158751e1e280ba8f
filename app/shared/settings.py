"""The settings, read from the environment (`QUANTRY_...`) once per process."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

WEEK_S = 7 * 86400


class Settings(BaseSettings):
    """Every setting of the service; the name of its variable is `QUANTRY_` + the field in capitals.

    Durations are seconds, sizes bytes. Raises pydantic.ValidationError, which names the field.
    """

    model_config = SettingsConfigDict(
        env_prefix="QUANTRY_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    data: Path = Field(
        Path("quantry-data"), description="folder of everything that has no address of its own"
    )
    database_url: str = Field("", description="SQLAlchemy URL; default: SQLite in `data`")
    redis_url: str | None = Field(None, description="broker: redis://, rediss:// or redis+socket://")
    storage_url: str = Field("", description="a folder, as a path or file:// URL; default: `data`/storage")
    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="folders that the `local` source may read, with colons between them"
    )
    hub_url: str | None = Field(None, description="address of the model hub; default: the public one")
    offline: bool = Field(False, description="never ask the hub: only what is in the cache exists")

    host: str = Field("127.0.0.1", description="address that the API listens on")
    port: int = Field(8000, ge=0, le=65535, description="port that the API listens on; 0: any that is free")
    max_upload_bytes: int = Field(1 << 30, ge=1, description="of one text or one set of images")
    max_unfinished_jobs: int = Field(10_000, ge=1, description="of one owner: queued and running")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="what the worker computes on")
    threads: int | None = Field(None, ge=1, description="CPU threads of a job; null: what torch chooses")
    warm: bool = Field(True, description="keep one job process imported and waiting")
    worker_name: str | None = Field(
        None, description="unique among the workers; default: host and process id"
    )
    job_module: str = Field("worker.process", description="the module that a job process runs")

    inception_weights: Path | None = Field(
        None, description="safetensors file of Inception v3, for the metric `frechet_inception`"
    )

    lease_s: float = Field(60, gt=0, description="a worker that is silent for so long has lost its job")
    heartbeat_s: float = Field(
        10, gt=0, description="how often a worker renews its lease and stores progress"
    )
    poll_s: float = Field(0.5, gt=0, description="how often a running job looks whether it was cancelled")
    max_attempts: int = Field(3, ge=1, description="runs of a job before it fails as worker-lost")
    tick_s: float = Field(1, gt=0, description="period of the dispatcher")
    ring_again_s: float = Field(30, gt=0, description="a queued job that nobody took is announced again")
    sweep_s: float = Field(60, gt=0, description="period of the removal of leftovers")

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _known_broker(cls, value: str | None) -> str | None:
        schemes = ("redis", "rediss", "redis+socket", "unix")
        if value is not None and urlsplit(value).scheme not in schemes:
            raise ValueError(
                f"the broker must be Redis or Valkey: one of {', '.join(s + '://' for s in schemes)}"
            )
        return value

    @field_validator("storage_url")
    @classmethod
    def _folder_storage(cls, value: str) -> str:
        if "://" in value and not value.startswith("file:///"):
            raise ValueError("storage is a folder: give a path or a file:/// URL")
        return value

    @model_validator(mode="after")
    def _lease_outlives_heartbeat(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                "lease_s must be at least twice heartbeat_s, or one late heartbeat loses the job"
            )
        return self

    @property
    def database(self) -> str:
        """The SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{self.data.absolute() / 'quantry.db'}"

    @property
    def storage(self) -> Path:
        """The root folder of artifacts, checkpoints and uploads."""
        if not self.storage_url:
            return self.data.absolute() / "storage"
        return Path(self.storage_url.removeprefix("file://")).absolute()

    @property
    def cache(self) -> Path:
        """Content-addressed downloads, shared by all jobs of this machine."""
        return self.data.absolute() / "cache"

    def as_environment(self) -> dict[str, str]:
        """The variables that make a child process read the same settings."""
        environment = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None or value in ("", ()):
                continue
            text = ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
            environment[f"QUANTRY_{name.upper()}"] = text
        return environment


@lru_cache
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings()


def without_settings(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment without any setting of Quantry: addresses and passwords do not pass to jobs."""
    source = os.environ if environment is None else environment
    return {name: value for name, value in source.items() if not name.startswith("QUANTRY_")}
