"""What a job process is given: where to read, where to write, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from quantry.base import Model
from quantry.contract import JobSpec


class Workspace(Model):
    """Folders and limits of one attempt.

    job: the id that the manifest names. artifact: an empty folder for this attempt's files.
    checkpoints: kept between the attempts of a job, so that a later attempt resumes. cache:
    content-addressed downloads, shared by all jobs. model_roots: the only folders that the `local` source
    may read. uploads: dataset id -> file. start: the artifact that training starts from. hub_url: the model hub
    to ask, None for the public one. inception_weights: a safetensors file that the operator has installed.
    """

    job: str | None = None
    artifact: Path
    checkpoints: Path
    cache: Path
    model_roots: tuple[Path, ...] = ()
    uploads: dict[str, Path] = Field({})
    start: Path | None = None
    hub_url: str | None = None
    offline: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    inception_weights: Path | None = None


class JobInput(Model):
    """The first line of the job process's standard input."""

    job: str
    attempt: int
    spec: JobSpec
    workspace: Workspace
