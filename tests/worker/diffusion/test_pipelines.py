"""Pipelines beyond unconditional ones: what they do around their network, and whole jobs on them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DiTPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import quantry
from quantry.diffusion import SIDECAR
from quantry.jobs import Succeeded
from quantry.layers.operands import attach
from quantry.quantizers.activation import TokenQuantizer
from quantry.recipe import RtnStep, SvdquantStep
from quantry.reports import Report
from quantry.requests import JobRequest
from worker.diffusion.conditions import UNSEEN, GuidedLabels, GuidedPrompts
from worker.diffusion.prepare import prepare
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.rounding import LATENTS, TRAJECTORIES, calibration_latents
from worker.diffusion.steps import read_steps
from worker.diffusion.svdquant import fit_low_rank
from worker.diffusion.trajectory import SeededNoise, sample
from worker.errors import DatasetError, ModelError, NonFiniteError, QuantizationError, RecipeError
from worker.methods.rtn import rtn
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


def prompts(**evaluation: Any) -> dict[str, Any]:
    """Datasets of a job: the files seen.txt and unseen.txt."""
    seen, unseen = ({"source": "local", "id": f"{role}.txt", "split": "all"} for role in ("seen", "unseen"))
    return {
        "calibration": {"samples": 3, "dataset": seen},
        "evaluation": {"samples": 2, "dataset": unseen, **evaluation},
    }


def test_a_pipeline_samples_with_the_scheduler_that_was_asked_for(tmp_path: Path) -> None:
    """A DDIMPipeline makes a DDIMScheduler of any that it is given. The network has no middle block."""
    pipelines.write_ddim(tmp_path / "roots" / "model", unet={"mid_block_type": None})
    sampling = {"steps": 3, "scheduler": "ddpm", "timestep_sampler": "density"}
    report = quantize(tmp_path, recipe=[{"method": "rtn", "bits": 4}], sampling=sampling)
    assert report.trajectory is not None
    assert report.trajectory.scheduler == "DDPMScheduler"
    index = json.loads((tmp_path / "artifact" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    sidecar = json.loads((tmp_path / "artifact" / SIDECAR).read_text())
    assert sidecar["sampling"]["scheduler"] == "DDPMScheduler"


def test_every_step_is_seen_by_many_trajectories(tmp_path: Path) -> None:
    pipelines.write_ddim(tmp_path / "roots" / "model")
    body = {
        "model": {"source": "local", "id": "model"},
        "recipe": [{"method": "rtn", "bits": 4}, {"method": "uniform", "bits": 8}],
        "sampling": {"steps": 20},
        "calibration": {"samples": 40},
    }
    workspace = Workspace(
        artifact=tmp_path / "a", checkpoints=tmp_path / "c", cache=tmp_path, model_roots=(tmp_path / "roots",)
    )
    job = prepare(JobRequest.model_validate(body).resolve(), workspace, Progress(io.StringIO()))
    found = calibration_latents(job)
    assert sum(len(at.x) for at in found) == LATENTS
    assert len({seed for at in found for seed in at.seeds}) == TRAJECTORIES


def test_stable_diffusion_is_quantized_and_loads(tmp_path: Path) -> None:
    pipelines.write_stable_diffusion(tmp_path / "roots" / "model")
    for role in ("seen", "unseen"):
        (tmp_path / "roots" / f"{role}.txt").write_text(f"a cat\na dog\n\n{role} things of all kinds\n")
    with pytest.raises(DatasetError, match=r"66.7% of the prompts also stand"):
        quantize(tmp_path, **prompts())
    report = quantize(tmp_path, **prompts(allow_overlap=True))
    assert "2 of 6 prompts are longer than 8 tokens, and their ends are not read" in report.warnings
    assert {row.metric for row in report.quality} == {"latent_mse", "psnr", "ssim"}
    for part in ("vae", "text_encoder", "tokenizer"):
        assert any((tmp_path / "artifact" / part).iterdir())
    layers = {layer.name for layer in report.layers}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in layers
    assert not any(name.startswith(("vae", "text_encoder")) for name in layers)


@pytest.mark.parametrize("kl", [False, True])
def test_latent_diffusion_is_quantized_and_samples_as_its_worker(kl: bool, tmp_path: Path) -> None:
    pipelines.write_ldm(tmp_path / "roots" / "model", kl=kl)
    report = quantize(tmp_path, sampling={"steps": 3, "eta": 0.5})
    assert {row.metric for row in report.quality} == {"latent_mse", "psnr", "ssim"}
    pipeline = quantry.load(tmp_path / "artifact")
    assert type(pipeline).__name__ == "LDMPipeline"
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "output_type": "np"}
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)  # an LDMPipeline hands its generator to the first latent alone
        drawn.append(pipeline(**given, eta=0.5).images)
    first, again = drawn
    assert first.shape == (1, 16, 16, 3)
    assert (first == again).all()
    with pytest.raises(ValueError, match=r"eta 0.0 was asked for: pass num_inference_steps=3, eta=0.5"):
        pipeline(**given)


def _change(folder: Path, **changes: Any) -> None:
    """Change settings of a component's config."""
    file = next(folder.glob("*config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change_tensor(file: Path, name: str, value: float | None) -> None:
    """Fill a tensor with a value, or take it away."""
    tensors = load_file(file)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("nan", NonFiniteError, "vqvae: decoder.conv_out.weight holds NaN"),
        ("missing", ModelError, "vqvae: missing keys, such as decoder.conv_out.weight"),
        ("channels", ModelError, r"vqvae does not decode latents of \(3, 8, 8\)"),
        ("scaling", NonFiniteError, "vqvae makes NaN or infinity of a latent of zeros"),
        ("class", ModelError, "vqvae"),
        ("schedule", ModelError, "scheduler/scheduler_config.json cannot be used: odd is not implemented"),
        ("betas", ModelError, "scheduler/scheduler_config.json cannot be used: index"),
        ("groups", ModelError, "unet does not load"),
    ],
)
def test_components_that_do_not_work_are_refused_before_the_work(
    how: str, kind: type[QuantizationError], message: str, tmp_path: Path
) -> None:
    folder = pipelines.write_ldm(tmp_path / "roots" / "model", channels=4 if how == "channels" else 3)
    weights = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
    if how in ("nan", "missing"):
        _change_tensor(weights, "decoder.conv_out.weight", torch.nan if how == "nan" else None)
    elif how == "scaling":
        _change(folder / "vqvae", scaling_factor=0)
    elif how == "class":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "vqvae": ["diffusers", "UNet2DModel"]}))
    elif how == "groups":
        _change(folder / "unet", norm_num_groups=0)
    else:
        change = {"schedule": {"beta_schedule": "odd"}, "betas": {"trained_betas": [0.1]}, "channels": {}}[
            how
        ]
        _change(folder / "scheduler", **change)
    with pytest.raises(kind, match=message):
        quantize(tmp_path, recipe=RECIPE[:1])


def test_a_text_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would draw them at random."""
    folder = pipelines.write_stable_diffusion(tmp_path / "roots" / "model")
    weights = folder / "text_encoder" / "model.safetensors"
    _change_tensor(weights, next(name for name in load_file(weights) if name.endswith("fc1.weight")), None)
    for role in ("seen", "unseen"):
        (tmp_path / "roots" / f"{role}.txt").write_text(role)
    with pytest.raises(ModelError, match=r"text_encoder: missing keys, such as .*fc1.weight"):
        quantize(tmp_path, **prompts())


def test_a_loaded_pipeline_keeps_to_its_guidance(tmp_path: Path) -> None:
    pipelines.write_dit(tmp_path / "roots" / "model")
    quantize(tmp_path, recipe=RECIPE[:1], sampling={"steps": 2, "guidance_scale": 3}, evaluation=None)
    pipeline = quantry.load(tmp_path / "artifact")
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"guidance_scale 4.0 was asked for: pass .*guidance_scale=3"):
        pipeline([1], num_inference_steps=2)
    assert len(pipeline([1], num_inference_steps=2, guidance_scale=3).images) == 1


def test_a_consistency_model_is_quantized_for_its_one_step(tmp_path: Path) -> None:
    pipelines.write_consistency(tmp_path / "roots" / "model", num_class_embeds=5)
    report = quantize(tmp_path, sampling=None, recipe=[*RECIPE[:2], RECIPE[3]])
    assert report.trajectory is not None
    assert len(report.trajectory.accumulated) == 1
    with pytest.raises(RecipeError, match=r"recipe.2: `accuquant` calibrates over several steps"):
        quantize(tmp_path, sampling=None)


def test_a_consistency_model_samples_as_diffusers_does(tmp_path: Path) -> None:
    folder = pipelines.write_consistency(tmp_path / "model", in_channels=3, out_channels=3)
    pipeline = pipelines.ConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = SeededNoise((0, 1), (3, 8, 8), CPU)
    steps = read_steps(CMStochasticIterativeScheduler(), 1)
    found = sample(StepNetwork(pipeline.unet.requires_grad_(False), steps), steps, z)
    wanted = pipeline(batch_size=2, num_inference_steps=1, latents=z.start(), output_type="np").images
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


@pytest.mark.parametrize("bits", [3, 4])
def test_the_low_rank_branch_takes_what_rounding_would_lose(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator) * 0.1
    weight += 3 * torch.randn(24, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    x = torch.randn(64, 32, generator=generator)
    x[:, 5] *= 40  # an outlier channel
    step = SvdquantStep(bits=bits, group_size=16, rank=4)  # type: ignore[arg-type]
    token = TokenQuantizer(bits)
    found = fit_low_rank(weight, x, step, token)
    layer = found.layer(torch.arange(24.0))
    attach(layer, "residual.input", token)
    wanted = x @ weight.T + torch.arange(24.0)
    plain = token(x) @ rtn(weight, RtnStep(bits=bits, group_size=16)).dequantize().T + torch.arange(24.0)  # type: ignore[arg-type]
    assert (layer(x) - wanted).square().mean() < 0.05 * (plain - wanted).square().mean()
    with_all = fit_low_rank(weight, x, SvdquantStep(bits=bits, group_size=16, rank=24), None)  # type: ignore[arg-type]
    torch.testing.assert_close(with_all.layer(None).weight, weight, rtol=0.01, atol=0.02)


def test_a_dit_goes_to_four_bits_with_svdquant(tmp_path: Path) -> None:
    pipelines.write_dit(tmp_path / "roots" / "model")
    recipe = [
        {"method": "svdquant", "bits": 4, "group_size": 16, "rank": 2},
        {"method": "uniform", "bits": 4, "granularity": "token"},
        {"method": "noise_correction", "rule": "tac"},
    ]
    sampling = {"steps": 3, "timestep_sampler": "density"}
    report = quantize(tmp_path, recipe=recipe, sampling=sampling, evaluation={"samples": 2})
    bits = {layer.name: layer.bits for layer in report.layers}
    assert {"proj_out_2", "transformer_blocks.1.attn1.to_q"} <= set(bits)
    assert bits["transformer_blocks.0.ff.net.2"] == 4
    assert bits["pos_embed.proj"] == bits["transformer_blocks.0.norm1.linear"] == 8
    with pytest.raises(RecipeError, match=r"recipe.0.group_size: 64 does not divide the 16 columns"):
        quantize(tmp_path, recipe=[{"method": "svdquant", "bits": 4}, *recipe[1:]])
    with pytest.raises(RecipeError, match=r"recipe.2: grids of tokens are found as they run"):
        quantize(tmp_path, recipe=[*recipe[:2], {"method": "accuquant", "group": 1}])
