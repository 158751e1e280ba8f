"""What the clean process lets pass in a pipeline: a rounding that fell the other way, and no wrong step."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pipelines
import pytest
import torch
from safetensors.torch import save_file

import quantry
from quantry.requests import JobRequest
from worker.errors import VerificationError
from worker.export.verify import verify
from worker.pipeline import run
from worker.progress import Progress
from worker.workspace import Workspace

STEPS, SAMPLES = 3, 2


@torch.no_grad()
def predictions(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and what the pipeline in `folder` predicts of them at every step, (steps, samples, C, H, W)."""
    pipeline = quantry.load(folder)
    pipeline.scheduler.set_timesteps(STEPS)
    config = pipeline.unet.config
    shape = (STEPS, SAMPLES, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    steps = zip(latents, pipeline.scheduler.timesteps, strict=True)
    found = [pipeline.unet(x, timestep=time.expand(SAMPLES), return_dict=False)[0] for x, time in steps]
    return latents, torch.stack(found)


def test_one_sample_of_a_step_may_be_off_by_a_code(tmp_path: Path) -> None:
    pipelines.write_ddim(tmp_path / "model")
    workspace = Workspace(
        job="job_test",
        artifact=tmp_path / "artifact",
        checkpoints=tmp_path / "checkpoints",
        cache=tmp_path / "cache",
        model_roots=(tmp_path,),
    )
    body = {
        "model": {"source": "local", "id": "model"},
        "recipe": [{"method": "rtn", "bits": 8}, {"method": "uniform", "bits": 8}],
        "sampling": {"steps": STEPS},
        "calibration": {"samples": 2},
        "evaluation": None,
    }
    run(JobRequest.model_validate(body).resolve(), workspace, Progress(io.StringIO()))
    latents, logits = predictions(workspace.artifact)
    file = tmp_path / "reference.safetensors"

    def verified(samples: slice, off: float) -> dict[str, float | str]:
        """One value of these samples of the second step off by so much of the rms."""
        wanted = logits.clone()
        wanted[1, samples, 0, 3, 5] += off * logits.square().mean().sqrt()
        call = json.dumps({"batch_size": 1, "num_inference_steps": STEPS})
        save_file({"latents": latents, "logits": wanted}, file, {"call": call})
        return verify(workspace.artifact, "quantry", file)

    found = verified(slice(1), 0.05)
    assert found["relative_difference"] == pytest.approx(0.05, rel=0.02)
    assert float(found["relative_difference_of_steps"]) < 1e-3
    for samples, off in ((slice(2), 0.05), (slice(1), 0.2)):
        with pytest.raises(VerificationError, match="computes logits that differ"):
            verified(samples, off)
