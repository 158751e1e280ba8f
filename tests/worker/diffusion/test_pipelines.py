"""Pipelines beyond unconditional ones: what they do around their network, and whole jobs on them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DiTPipeline, StableDiffusionPipeline

from quantry.contract import JobRequest
from quantry.jobs import Succeeded
from quantry.reports import Report
from worker.diffusion.conditions import UNSEEN, GuidedLabels, GuidedPrompts
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import SeededNoise, sample
from worker.errors import RecipeError
from worker.pipeline import run
from worker.progress import Progress
from worker.workspace import Workspace

CPU = torch.device("cpu")
RECIPE = [
    {"method": "adaround", "bits": 4, "iterations": 2, "latents": 4},
    {"method": "uniform", "bits": 8, "range": "mse"},
    {"method": "accuquant", "group": 2, "iterations": 1, "batch": 2},
    {"method": "noise_correction"},
]


def quantize(tmp_path: Path, **changes: Any) -> Report:
    """A job on the pipeline in roots/model; what it leaves lies in tmp_path/artifact."""
    workspace = Workspace(
        job="job_test",
        artifact=tmp_path / "artifact",
        checkpoints=tmp_path / "checkpoints",
        cache=tmp_path / "cache",
        model_roots=(tmp_path / "roots",),
    )
    body = {
        "model": {"source": "local", "id": "model"},
        "recipe": RECIPE,
        "sampling": {"steps": 3},
        "calibration": {"samples": 3},
        "evaluation": {"samples": 2},
        **changes,
    }
    outcome = run(JobRequest.model_validate(body).resolve(), workspace, Progress(io.StringIO()))
    assert isinstance(outcome, Succeeded)
    assert float(outcome.report.verification["relative_difference"]) < 1e-4
    return outcome.report


def test_stable_diffusion_is_quantized_and_loads(tmp_path: Path) -> None:
    pipelines.write_stable_diffusion(tmp_path / "roots" / "model")
    for role in ("seen", "unseen"):
        (tmp_path / "roots" / f"{role}.txt").write_text("a cat\na dog\n\na house\n")
    datasets = {
        "calibration": {"samples": 3, "dataset": {"source": "local", "id": "seen.txt", "split": "all"}},
        "evaluation": {"samples": 2, "dataset": {"source": "local", "id": "unseen.txt", "split": "all"}},
    }
    report = quantize(tmp_path, **datasets)
    assert {row.metric for row in report.quality} == {"latent_mse", "psnr", "ssim"}
    for part in ("vae", "text_encoder", "tokenizer"):
        assert any((tmp_path / "artifact" / part).iterdir())
    layers = {layer.name for layer in report.layers}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in layers
    assert not any(name.startswith(("vae", "text_encoder")) for name in layers)


def test_a_dit_is_quantized_and_loads(tmp_path: Path) -> None:
    pipelines.write_dit(tmp_path / "roots" / "model")
    report = quantize(tmp_path)
    assert {"transformer_blocks.1.ff.net.2", "pos_embed.proj", "proj_out_2"} <= {
        m.name for m in report.layers
    }


def test_a_consistency_model_is_quantized_for_its_one_step(tmp_path: Path) -> None:
    pipelines.write_consistency(tmp_path / "roots" / "model", num_class_embeds=5)
    report = quantize(tmp_path, sampling=None, recipe=[*RECIPE[:2], RECIPE[3]])
    assert report.trajectory is not None
    assert len(report.trajectory.accumulated) == 1
    with pytest.raises(RecipeError, match=r"recipe.2: `accuquant` calibrates over several steps"):
        quantize(tmp_path, sampling=None)


def test_a_consistency_model_samples_as_diffusers_does(tmp_path: Path) -> None:
    folder = pipelines.write_consistency(tmp_path / "model")
    pipeline = pipelines.ConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = SeededNoise((0, 1), (1, 8, 8), CPU)
    steps = read_steps(CMStochasticIterativeScheduler(), 1)
    found = sample(StepNetwork(pipeline.unet.requires_grad_(False), steps), steps, z)
    start = z.start() * pipeline.scheduler.init_noise_sigma
    wanted = pipeline(batch_size=2, num_inference_steps=1, latents=start, output_type="np").images
    shown = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(shown, torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


def test_prompts_are_guided_as_diffusers_does(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipelines.write_stable_diffusion(tmp_path / "model"), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    text, nothing = pipeline.encode_prompt(["a cat", "a dog"], CPU, 1, True)
    predict = GuidedPrompts(text, text.flip(0), nothing[:1], 3.0)
    steps = read_steps(pipeline.scheduler, 3)
    network = StepNetwork(pipeline.unet.requires_grad_(False), steps, predict)
    for seeds, prompts in (((0, 1), ["a cat", "a dog"]), ((UNSEEN, UNSEEN + 1), ["a dog", "a cat"])):
        noise = SeededNoise(seeds, (4, 4, 4), CPU)
        wanted = pipeline(
            prompts, num_inference_steps=3, guidance_scale=3.0, latents=noise.start(), output_type="latent"
        ).images
        torch.testing.assert_close(sample(network, steps, noise), wanted, rtol=1e-3, atol=1e-4)
        one_by_one = torch.cat([sample(network, steps, part) for part in noise.batches(1)])
        torch.testing.assert_close(one_by_one, wanted, rtol=1e-3, atol=1e-4)


def test_labels_are_guided_as_diffusers_does(tmp_path: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(pipelines.write_dit(tmp_path / "model"))
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer.requires_grad_(False)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    steps = read_steps(pipeline.scheduler, 2)
    network = StepNetwork(transformer, steps, GuidedLabels(1000, 4.0)).of((3, 7))
    x = latents
    for index, step in enumerate(steps):
        x = step.advance(x, network(x, index))
    wanted = pipeline(
        [3, 7], num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt"
    ).images
    with torch.no_grad():
        found = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=1e-3, atol=1e-4)
