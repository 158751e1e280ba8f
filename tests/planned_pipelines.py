"""Plans of jobs on the bundled pipeline, with configs changed at will."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantry.bundled import bundled_model
from quantry.diffusion import Component, read_components
from quantry.diffusion_planning import DiffusionPlan, plan_diffusion
from quantry.headers import read_header
from quantry.requests import JobRequest

FOLDER = bundled_model("bundled/ddpm-tiny")
SHORT = {"model": "bundled/ddpm-tiny", "bits": 4, "method": "accuquant"}
ROUND = [{"method": "rtn", "bits": 4}]
W4A8 = [*ROUND, {"method": "uniform", "bits": 8}]


def outside(folder: Path = FOLDER) -> tuple[dict[str, Any], dict[str, Component]]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    index = json.loads((folder / "model_index.json").read_text())
    return index, read_components(
        index, names, lambda n: (folder / n).read_bytes(), lambda n: read_header(folder / n)
    )


def planned(body: dict[str, Any], **configs: dict[str, Any]) -> DiffusionPlan:
    """The plan of a request. configs: changes of the components' configs."""
    index, components = outside()
    for name, changes in configs.items():
        part = components[name]
        components[name] = replace(part, config={**part.config, **changes})
    request = body if "bits" in body else {"model": "bundled/ddpm-tiny", **body}
    return plan_diffusion(JobRequest.model_validate(request).resolve(), index, components)
