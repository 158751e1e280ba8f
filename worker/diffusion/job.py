"""run(): a job on a diffusion pipeline, from its spec to a folder that samples."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantry.contract import JobSpec
from quantry.diffusion_costs import estimate_diffusion
from quantry.jobs import State, Succeeded
from quantry.pipelines import TENSORS
from quantry.quantizers.steps import StepBias
from quantry.reports import Manifest, Report, SizeReport
from worker.diffusion.evaluate import SHOWN, TITLES, Evaluated, evaluate, trajectory_report
from worker.diffusion.prepare import DiffusionJob, prepare
from worker.diffusion.quantize import QuantizedDenoiser, quantize, round_to_nearest
from worker.diffusion.rounding import calibration_latents
from worker.diffusion.svdquant import LowRank
from worker.diffusion.trajectory import trajectory
from worker.diffusion.weights import UNetWeight
from worker.export.files import whole_or_nothing
from worker.export.pipeline import Artifact, padded_corrections, write_pipeline
from worker.export.verify import verify
from worker.metrics.images import to_bytes
from worker.outcome import clock, cost, environment, whole_or_gone, write_papers
from worker.progress import Progress
from worker.report.grids import write_grid
from worker.workspace import Workspace

REFERENCE = 2  # samples on which the written pipeline must agree
COLUMNS = 4  # of a picture of samples
PICTURE = 4  # channels at most that a picture can have


def run(spec: JobSpec, workspace: Workspace, progress: Progress) -> Succeeded:
    """Run one job. Raises QuantizationError and its kinds; nothing is left in the artifact then."""
    began = clock()
    job = prepare(spec, workspace, progress)
    latents = calibration_latents(job)
    before = clock()
    made = quantize(job, latents)
    spent = (clock()[0] - before[0], clock()[1] - before[1])
    found = None
    if job.spec.evaluation is not None:
        baseline = "rtn" in job.spec.evaluation.baselines
        found = evaluate(job, made, round_to_nearest(job, latents) if baseline else None)
    shutil.rmtree(workspace.artifact, ignore_errors=True)
    workspace.artifact.mkdir(parents=True)
    with whole_or_gone(workspace.artifact), whole_or_nothing(workspace.artifact):
        report, manifest = _package(job, made, found, workspace, began, spent)
    return Succeeded(report=report, manifest=manifest)


def _package(
    job: DiffusionJob,
    made: QuantizedDenoiser,
    found: Evaluated | None,
    workspace: Workspace,
    began: tuple[float, float],
    spent: tuple[float, float],
) -> tuple[Report, Manifest]:
    """Write the pipeline, prove that it loads and samples, and put the report beside it."""
    target = workspace.artifact
    job.progress.stage(State.PACKAGING, "writing the pipeline", 0, 3)
    write_pipeline(job.folder, target, _artifact(job, made))
    job.progress.advance(1, 3, "sampling from the written pipeline in a clean process")
    verification = _verify(job, made, workspace)
    job.progress.advance(2, 3, "writing the report")
    report = _report(job, made, found, workspace, verification, began, spent)
    manifest = write_papers(target, report, source=job.folder)
    job.progress.advance(3, 3, "done")
    return report, manifest


def _artifact(job: DiffusionJob, made: QuantizedDenoiser) -> Artifact:
    return Artifact(
        component=job.plan.family.denoiser,
        network=made.network.unet,
        weights=made.weights,
        low_rank=made.low_rank,
        splits={layer.name: layer.split for layer in job.layers},
        scheduler=job.loaded.scheduler,
        steps=job.loaded.steps,
        noise_kept=made.noise_kept,
        eta=job.plan.sampling.eta,
        call=_call(job),
        corrections=made.corrections,
        recipe=job.spec.recipe,
        base_model=job.spec.model.id,
    )


def _verify(job: DiffusionJob, made: QuantizedDenoiser, workspace: Workspace) -> dict[str, float | str]:
    """Reload the artifact as a user would, in a clean process, and compare every step's prediction, and samples."""
    with tempfile.TemporaryDirectory(dir=workspace.artifact) as folder:
        path = Path(folder) / "reference.safetensors"
        save_file(_reference(job, made), path, {"call": json.dumps(_call(job))})
        return verify(workspace.artifact, job.plan.format, path, threads=workspace.threads)


@torch.no_grad()
def _reference(job: DiffusionJob, made: QuantizedDenoiser) -> dict[str, Tensor]:
    """Latents and predictions along the quantized trajectory, computed on the CPU where they are reloaded.

    latents: (steps, samples, C, H, W), as the network is fed them. logits: what it puts out, without guidance.
    given.*: what it is fed beside latents.
    """
    made.cpu()
    network = made.network.unet
    noise, steps = job.reference(REFERENCE), job.loaded.steps
    inputs = {name: value.cpu() for name, value in job.loaded.predict.inputs(noise.seeds).items()}
    corrections = padded_corrections(network, made.corrections)
    latents, outputs = [], []
    for index, x, _ in trajectory(made.denoiser, made.steps, noise):
        if index == len(steps):
            break
        made.network.tell(index)
        latents.append(steps[index].scale * x)
        times = torch.full((len(x),), steps[index].timestep)
        output = network(latents[-1], timestep=times, **inputs, return_dict=False)[0]
        gain, shift = corrections[index] if corrections else (torch.ones(1), torch.zeros(1))
        outputs.append(output * gain[:, None, None] + shift[:, None, None])
    given = {f"given.{name}": value.contiguous() for name, value in inputs.items()}
    return {"latents": torch.stack(latents), "logits": torch.stack(outputs), **given}


def _call(job: DiffusionJob) -> dict[str, Any]:
    """How the whole pipeline is called for one sample, with the settings that it is quantized for."""
    sampling, family = job.plan.sampling, job.plan.family
    asked: dict[str, Any] = {"batch_size": 1}
    if family.conditions is not None:
        asked = {"class_labels": [0]} if family.conditions == "class" else {"prompt": "a picture"}
    asked["num_inference_steps"] = job.plan.steps
    if sampling.eta:
        asked["eta"] = sampling.eta
    if sampling.guidance_scale is not None:
        asked["guidance_scale"] = sampling.guidance_scale
    if family.decoder is None and job.plan.latent[0] > PICTURE:
        asked["output_type"] = "np"
    return asked


def _report(
    job: DiffusionJob,
    made: QuantizedDenoiser,
    found: Evaluated | None,
    workspace: Workspace,
    verification: dict[str, float | str],
    began: tuple[float, float],
    spent: tuple[float, float],
) -> Report:
    pictures = _pictures(found, workspace.artifact) if found else {}
    names = {"quantized_bytes", "effective_bits", "peak_memory_bytes", "seconds_low", "seconds_high"}
    guess = estimate_diffusion(job.plan, threads=torch.get_num_threads(), cuda=job.device.type == "cuda")
    return Report(
        job=workspace.job,
        spec=job.spec,
        quality=found.quality if found else (),
        size=_size(job, made, workspace.artifact),
        layers=found.layers if found else (),
        blocks=(),
        operands=tuple(made.operands),
        trajectory=trajectory_report(job, made, found, pictures) if found else None,
        cost=cost(began, job.device, spent),
        estimate=guess.model_dump(mode="json", include=names),
        environment={"diffusers": diffusers.__version__, **environment(job.device, torch.float32)},
        fingerprint=job.fingerprint,
        format=job.plan.format,
        warnings=tuple(job.warnings),
        verification=verification,
    )


def _pictures(found: Evaluated, target: Path) -> dict[str, str]:
    """Write the first samples of every network as PNG; returns their paths in the artifact, by network."""
    paths = {}
    for name, title in TITLES.items():
        if name in found.images:
            paths[title] = f"samples/{name}.png"
            write_grid(to_bytes(found.images[name][:SHOWN]), target / paths[title], columns=COLUMNS)
    return paths


def _size(job: DiffusionJob, made: QuantizedDenoiser, artifact: Path) -> SizeReport:
    """Of the denoiser; what is copied is not counted."""
    stored: list[UNetWeight | LowRank] = [*made.weights.values(), *made.low_rank.values()]
    parts = [part for weight in made.weights.values() for part in weight.parts]
    weights = sum(part.codes.numel() for part in (*parts, *(low.weight for low in made.low_rank.values())))
    tables = [module for module in made.network.unet.modules() if isinstance(module, StepBias)]
    added = sum(table.bias.nbytes for table in tables)
    return SizeReport(
        fp_bytes=job.plan.fp_bytes,
        quantized_bytes=(artifact / TENSORS).stat().st_size,
        effective_bits=(sum(weight.storage_bits() for weight in stored) + 8 * added) / weights,
        quantized_weights=weights,
        added_bias_bytes=added,
    )
