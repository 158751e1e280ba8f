"""A whole job on a diffusion pipeline in one process: every step, resumed, refused, loaded and sampled from."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import factories
import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantry
from quantry.checkpoint import CheckpointError
from quantry.jobs import Succeeded
from quantry.requests import JobRequest
from worker.errors import ModelError, NonFiniteError, QuantizationError, RecipeError
from worker.pipeline import run
from worker.progress import Progress
from worker.workspace import Workspace

ADAROUND = {"method": "adaround", "bits": 4, "iterations": 4, "latents": 8}
UNIFORM = {"method": "uniform", "bits": 8, "range": "mse"}
ACCUQUANT = {"method": "accuquant", "group": 2, "iterations": 2, "batch": 2}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn", "bits": 4}],
    "accuquant": [ADAROUND, UNIFORM, ACCUQUANT],
    "everything": [
        {**ADAROUND, "symmetric": True, "edge_bits": 4},
        {**UNIFORM, "range": "min_max", "edge_bits": 6},
        {"method": "softmax_bias", "range": "max"},
        {**ACCUQUANT, "per_group": False, "gradient": "exact"},
        {"method": "bias_compensation", "targets": "published"},
        {"method": "noise_correction", "rule": "tac"},
    ],
    "progressive": [
        {"method": "rtn", "bits": 4},
        UNIFORM,
        {**ACCUQUANT, "group": 3, "start": "progressive"},
        {"method": "softmax_bias", "granularity": "tensor"},
        {"method": "bias_compensation"},
        {"method": "noise_correction"},
    ],
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return _workspace(tmp_path)


def _workspace(folder: Path) -> Workspace:
    (folder / "roots").mkdir()
    return Workspace(
        job="job_test",
        artifact=folder / "artifact",
        checkpoints=folder / "checkpoints",
        cache=folder / "cache",
        model_roots=(folder / "roots",),
    )


def body(recipe: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "model": {"source": "local", "id": "model"},
        "recipe": recipe,
        "sampling": {"steps": 4},
        "calibration": {"samples": 4},
        "evaluation": {"samples": 3},
        **changes,
    }


def quantize(workspace: Workspace, request: dict[str, Any], out: io.StringIO | None = None) -> Succeeded:
    outcome = run(JobRequest.model_validate(request).resolve(), workspace, Progress(out or io.StringIO()))
    assert isinstance(outcome, Succeeded)
    return outcome


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Succeeded]:
    """The job `accuquant`, run once for all tests that only look at what it leaves."""
    workspace = _workspace(tmp_path_factory.mktemp("finished"))
    pipelines.write_ddim(workspace.model_roots[0] / "model")
    return workspace, quantize(workspace, body(RECIPES["accuquant"]))


@pytest.mark.parametrize(("name", "scheduler"), [("everything", "ddim"), ("progressive", "ddpm")])
def test_every_step_runs_and_the_pipeline_predicts_the_same(
    name: str, scheduler: str, workspace: Workspace
) -> None:
    """On a checkpoint with a DDPM scheduler that clips, sampled without, by either scheduler with noise."""
    root = workspace.model_roots[0]
    pipelines.write_ddpm(root / "model", unet={"in_channels": 3, "out_channels": 3}, clip_sample=True)
    factories.write_classifier(root / "vit", "vit")
    eta = 0.5 if scheduler == "ddim" else 0.0
    sampling = {"steps": 4, "scheduler": scheduler, "eta": eta, "clip_sample": False}
    features = {"source": "local", "id": "vit"}
    evaluation = {"samples": 3, "features": features}
    report = quantize(workspace, body(RECIPES[name], sampling=sampling, evaluation=evaluation)).report
    assert any("without clipping" in text for text in report.warnings)
    index = json.loads((workspace.artifact / "model_index.json").read_text())
    assert index["_class_name"] == {"ddim": "DDIMPipeline", "ddpm": "DDPMPipeline"}[scheduler]
    assert float(report.verification["relative_difference"]) < 1e-5
    assert {row.metric for row in report.quality} == {"latent_mse", "psnr", "ssim", "frechet"}
    assert all(
        row.samples == 3 and row.quantized is not None and row.rtn is not None for row in report.quality
    )
    frechet = next(row for row in report.quality if row.metric == "frechet")
    assert frechet.dataset == "features of vit (last class token)"
    assert frechet.fp == 0
    assert frechet.quantized is not None
    assert frechet.quantized > 0
    assert [operand.kind for operand in report.operands] == ["probabilities"] * 4
    assert all(operand.row_sum_after == pytest.approx(1, abs=1e-5) for operand in report.operands)
    run = report.trajectory
    assert run is not None
    assert len(run.accumulated) == len(run.single) == len(run.accumulated_rtn or ()) == 4
    assert run.accumulated[0] == pytest.approx(run.single[0])
    assert run.accumulated[-1] == pytest.approx(next(r.quantized for r in report.quality), rel=1e-4)
    assert {layer.name for layer in report.layers} >= {"conv_in", "mid_block.attentions.0.to_q"}
    assert report.size.added_bias_bytes > 0
    cited = (workspace.artifact / "README.md").read_text()
    assert {"tac": "Yao et al. 2024", "ptqd": "He et al. 2023"}[
        RECIPES[name][-1].get("rule", "ptqd")
    ] in cited


def test_the_artifact_is_packed_whole_and_says_how_to_load_it(finished: tuple[Workspace, Succeeded]) -> None:
    workspace, outcome = finished
    listed = {entry.path for entry in outcome.manifest.files}
    found = {
        f.relative_to(workspace.artifact).as_posix() for f in workspace.artifact.rglob("*") if f.is_file()
    }
    assert listed == found - {"manifest.json"}
    assert {"unet/config.json", "scheduler/scheduler_config.json", "samples/quantized.png"} <= listed
    assert not any(name.startswith("unet/diffusion_pytorch_model") for name in listed)
    assert "quantization_config" not in json.loads((workspace.artifact / "unet" / "config.json").read_text())
    tensors = load_file(workspace.artifact / "quantization.safetensors")
    assert tensors["mid_block.resnets.0.conv1.weight_packed"].dtype == torch.int32
    snippet = outcome.manifest.loader.snippet.replace("path/to/this/folder", str(workspace.artifact))
    assert "num_inference_steps=4" in snippet
    assert outcome.manifest.sampling is not None
    assert outcome.manifest.sampling["scheduler"] == "DDIMScheduler"
    assert len(outcome.manifest.sampling["timesteps"]) == 4
    space: dict[str, Any] = {}
    exec(snippet, space)
    assert len(space["images"]) == 1
    page = (workspace.artifact / "report.html").read_text()
    assert len(re.findall(r"data:image/png;base64", page)) == 3
    assert "Along the trajectory" in page


def test_a_loaded_pipeline_takes_its_own_steps_and_no_others(finished: tuple[Workspace, Succeeded]) -> None:
    pipeline = quantry.load(finished[0].artifact)
    pipeline.set_progress_bar_config(disable=True)
    first = pipeline(
        num_inference_steps=4, generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    with pytest.raises(ValueError, match=r"2 steps were asked for.*num_inference_steps=4"):
        pipeline(num_inference_steps=2)  # its timesteps are among those of 4 steps
    again = pipeline(
        num_inference_steps=4, generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    assert (first == again).all()
    kept = pipeline.scheduler
    pipeline.scheduler = type(kept).from_config(kept.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="timestep_spacing"):
        pipeline(num_inference_steps=4)
    pipeline.scheduler = type(kept).from_config(kept.config, beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="beta_schedule 'scaled_linear'"):
        pipeline(num_inference_steps=4)  # its timesteps are the same
    pipeline.scheduler = kept
    with pytest.raises(ValueError, match=r"eta 0.3 was asked for: pass num_inference_steps=4"):
        pipeline(num_inference_steps=4, eta=0.3)


@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 1.0), ("ddpm", 0.0)])
def test_the_loaded_pipeline_adds_as_much_less_noise_as_the_worker(
    scheduler: str, eta: float, workspace: Workspace
) -> None:
    """A step of the loaded pipeline is a x + b output + kept (what its scheduler adds)."""
    pipelines.write_ddpm(workspace.model_roots[0] / "model")
    recipe = [{"method": "rtn", "bits": 3}, {"method": "noise_correction", "absorb": True}]
    sampling = {"steps": 4, "scheduler": scheduler, "eta": eta}
    report = quantize(workspace, body(recipe, sampling=sampling)).report
    assert report.trajectory is not None
    kept = report.trajectory.noise_kept
    assert kept is not None
    assert min(kept) < 0.999
    page = (workspace.artifact / "report.html").read_text()
    assert "takes the place of some of the sampler" in page
    noise = json.loads((workspace.artifact / "quantization.json").read_text())["sampling"]["noise"]
    assert noise["kept"] == list(kept)
    pipeline = quantry.load(workspace.artifact)
    scheduler_ = pipeline.scheduler
    stock = type(scheduler_).from_config(scheduler_.config)
    for each in (scheduler_, stock):
        each.set_timesteps(4)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"eta": eta} if scheduler == "ddim" else {}
    for index, time in enumerate(scheduler_.timesteps):
        output = pipeline.unet(x, time).sample
        mine, theirs = (
            each.step(
                output, time, x, **given, generator=torch.Generator().manual_seed(7), return_dict=False
            )[0]
            for each in (scheduler_, stock)
        )
        mean = noise["a"][index] * x + noise["b"][index] * output
        torch.testing.assert_close(mine - mean, kept[index] * (theirs - mean), rtol=1e-3, atol=1e-5)
        x = mine
    samples = pipeline(num_inference_steps=4, **given, output_type="np").images
    assert samples.shape == (1, 8, 8, 1)
    other = quantry.load(workspace.artifact)
    other.scheduler = scheduler_
    with pytest.raises(CheckpointError, match="`step` was replaced"):
        other(num_inference_steps=4, **given)


def test_latents_that_are_no_picture_are_quantized_and_sampled(workspace: Workspace) -> None:
    """Five channels, wider than high: samples are arrays then."""
    shape = {"in_channels": 5, "out_channels": 5, "sample_size": (8, 16)}
    pipelines.write_ddim(workspace.model_roots[0] / "model", unet=shape)
    quantize(workspace, body(RECIPES["rtn"]))
    call = json.loads((workspace.artifact / "quantization.json").read_text())["call"]
    assert quantry.load(workspace.artifact)(**call).images.shape == (1, 8, 16, 5)


def test_a_pipeline_loads_packed_or_not_at_all(finished: tuple[Workspace, Succeeded]) -> None:
    for asked in ({"dequantize": True}, {"dtype": torch.float16}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match="leave dtype, device_map and dequantize out"):
            quantry.load(finished[0].artifact, **asked)


def test_steps_use_the_grids_of_their_group(finished: tuple[Workspace, Succeeded]) -> None:
    pipeline = quantry.load(finished[0].artifact)
    pipeline.scheduler.set_timesteps(4)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = [pipeline.unet(x, time).sample for time in pipeline.scheduler.timesteps]
    table = pipeline.unet.get_submodule("mid_block.resnets.0.conv1.input_quantizer")
    assert table.scale.shape == (2, 1)
    query = pipeline.unet.get_submodule("mid_block.attentions.0.operands.query")
    assert query.scale.shape == (2, 1)
    table.scale[1] *= 2
    after = [pipeline.unet(x, time).sample for time in pipeline.scheduler.timesteps]
    changed = [not torch.equal(b, a) for b, a in zip(before, after, strict=True)]
    assert changed == [False, False, True, True]


class _Killed(Exception):
    """The process is gone."""


class _Dying(Progress):
    """Ends the job at its n-th finished piece, as a killed worker does."""

    def __init__(self, pieces: int) -> None:
        super().__init__(io.StringIO())
        self.left = pieces

    def event(self, kind: str, data: Any) -> None:
        super().event(kind, data)
        self.left -= kind == "block"
        if self.left == 0:
            raise _Killed


def test_a_job_that_died_goes_on_and_writes_the_same_bytes(
    finished: tuple[Workspace, Succeeded], workspace: Workspace
) -> None:
    pipelines.write_ddim(workspace.model_roots[0] / "model")
    spec = JobRequest.model_validate(body(RECIPES["accuquant"], evaluation=None)).resolve()
    for died in (3, 15):  # among the blocks; then, of those that were left, in the second group of steps
        with pytest.raises(_Killed):
            run(spec, workspace, _Dying(died))
    out = io.StringIO()
    run(spec, workspace, Progress(out))
    assert out.getvalue().count('"kind": "block"') == 1  # what was done is not done again
    name = "quantization.safetensors"
    assert (workspace.artifact / name).read_bytes() == (finished[0].artifact / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": [{"method": "gptq", "bits": 4}]}, "recipe.0: `gptq` needs the Hessian"),
        ({"sampling": {"steps": 4, "group": 9}}, "sampling.group"),
        ({"evaluation": {"metrics": ["psnr", "lpips"]}}, "lpips needs 32 pixels a side, and samples are 8x8"),
        ({"evaluation": {"metrics": ["frechet_inception"]}}, "frechet_inception needs"),
        ({"recipe": RECIPES["accuquant"], "sampling": {"steps": 1}}, r"recipe.2.group: 2 steps .* has 1"),
    ],
)
def test_what_cannot_work_is_refused_with_its_field(
    change: dict[str, Any], message: str, workspace: Workspace
) -> None:
    pipelines.write_ddim(workspace.model_roots[0] / "model")
    with pytest.raises(RecipeError, match=message):
        quantize(workspace, body(**{"recipe": RECIPES["rtn"], **change}))
    assert not workspace.artifact.exists()


def _spoil(folder: Path, how: str) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "nan":
        tensors = load_file(weights)
        tensors["conv_out.weight"][0] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    elif how == "huge":
        tensors = load_file(weights)
        tensors["conv_out.weight"] *= 1e38
        save_file(tensors, weights, {"format": "pt"})
    elif how == "missing":
        tensors = load_file(weights)
        del tensors["conv_out.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif how == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "code":
        (folder / "unet" / "modeling.py").write_text("")
    elif how == "component":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "extra": ["diffusers", "UNet2DModel"]}))


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("nan", NonFiniteError, "conv_out.weight holds NaN"),
        ("huge", NonFiniteError, r"step \d: full-precision latents hold NaN"),
        ("missing", ModelError, "conv_out.weight"),
        ("pickle", ModelError, "no safetensors weights"),
        ("truncated", ModelError, "truncated"),
        ("code", ModelError, "code of their own"),
        ("component", ModelError, "component `extra`"),
    ],
)
def test_damaged_folders_are_refused(
    how: str, kind: type[QuantizationError], message: str, workspace: Workspace
) -> None:
    _spoil(pipelines.write_ddim(workspace.model_roots[0] / "model"), how)
    with pytest.raises(kind, match=message):
        quantize(workspace, body(RECIPES["rtn"]))
    assert not workspace.artifact.exists()


def test_loading_refuses_a_folder_with_a_part_missing(
    finished: tuple[Workspace, Succeeded], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0].artifact, folder)
    (folder / "manifest.json").unlink()
    sidecar = folder / "quantization.safetensors"
    tensors = load_file(sidecar)
    less = {name: value for name, value in tensors.items() if name != "conv_in.input_quantizer.scale"}
    save_file(less, sidecar)
    with pytest.raises(ValueError, match=r"missing tensors, such as conv_in.input_quantizer.scale"):
        quantry.load(folder)
    save_file({**tensors, "more": torch.zeros(1)}, sidecar)
    with pytest.raises(ValueError, match="unexpected tensors, such as more"):
        quantry.load(folder)
