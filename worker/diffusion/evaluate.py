"""How far quantized networks are from full precision: along the trajectory, in their samples, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantry.jobs import State
from quantry.reports import LayerReport, QualityRow, StepGroup, TrajectoryReport
from worker.calibration.hooks import outputs_of
from worker.diffusion.memory import halving
from worker.diffusion.prepare import DiffusionJob
from worker.diffusion.quantize import QuantizedDenoiser
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.rounding import BATCH
from worker.diffusion.steps import Denoiser, Step
from worker.diffusion.trajectory import Curves, Latents, error_curves, trajectory
from worker.errors import NonFiniteError
from worker.metrics.images import class_tokens, frechet_distance, psnr, ssim
from worker.metrics.layer_error import ErrorSum
from worker.models.network import channels_last

SHOWN = 16  # samples of a picture
TITLES = {"fp": "full precision", "rtn": "round to nearest", "quantized": "quantized"}  # of networks
PROBED = 8  # samples that the errors of layers are measured on, at the first, middle and last step


@dataclass(frozen=True)
class Evaluated:
    """By network: `quantized`, `rtn`, and `fp`, which has no curves. images: (samples, C, H, W) in [-1, 1]."""

    curves: dict[str, Curves]
    images: dict[str, Tensor]
    quality: tuple[QualityRow, ...]
    layers: tuple[LayerReport, ...]


def evaluate(job: DiffusionJob, made: QuantizedDenoiser, nearest: StepNetwork | None) -> Evaluated:
    """Sample from seeds that calibration has not seen. Raises NonFiniteError."""
    networks: dict[str, tuple[Denoiser, Sequence[Step]]] = {"quantized": (made.denoiser, made.quieter)}
    if nearest is not None:
        networks["rtn"] = (nearest, ())
    curves: dict[str, Curves] = {}
    samples: dict[str, Tensor] = {}
    for name, (denoiser, quieter) in networks.items():
        job.progress.stage(State.EVALUATING, f"sampling: {TITLES[name]}")
        curves[name] = halving(
            lambda batch, run=denoiser, quieter=quieter: error_curves(  # type: ignore[misc]
                job.full, run, job.loaded.steps, job.evaluation(), quieter=quieter, batch=batch, tell=job.tell
            ),
            BATCH,
            "evaluation",
            job.warn,
        )
        if not torch.isfinite(curves[name].final).all():
            raise NonFiniteError(f"the samples of the {name} network hold NaN or infinity")
        samples[name], samples["fp"] = curves[name].final, curves[name].reference
    job.progress.stage(State.EVALUATING, "comparing samples")
    images = {name: job.loaded.images(values) for name, values in samples.items()}
    return Evaluated(curves, images, _quality(job, samples, images), layer_reports(job, made, nearest))


def _quality(
    job: DiffusionJob, samples: Mapping[str, Tensor], images: Mapping[str, Tensor]
) -> tuple[QualityRow, ...]:
    evaluation = job.spec.evaluation
    assert evaluation is not None
    reference = images["fp"]
    figures: dict[str, dict[str, float]] = {}
    others = [name for name in images if name != "fp"]
    for metric in evaluation.metrics or ():
        if metric == "latent_mse":
            values = {n: float((samples[n] - samples["fp"]).double().square().mean()) for n in others}
            figures[metric] = {"fp": 0.0, **values}
        elif metric == "psnr":
            figures[metric] = {n: _finite_mean(psnr(images[n], reference)) for n in others}
        elif metric == "ssim":
            figures[metric] = {"fp": 1.0} | {n: float(ssim(images[n], reference).mean()) for n in others}
        elif metric == "frechet":
            assert job.features is not None
            found = class_tokens(torch.cat(list(images.values())), job.features).chunk(len(images))
            tokens = dict(zip(images, found, strict=True))
            figures[metric] = {"fp": 0.0} | {n: frechet_distance(tokens[n], tokens["fp"]) for n in others}
        else:
            measure, _ = job.installed[metric]
            figures[metric] = {"fp": 0.0} | {n: measure(images[n], reference) for n in others}
    where = {
        "frechet": f"features of {evaluation.features.id} (last class token)" if evaluation.features else "",
        **{metric: title for metric, (_, title) in job.installed.items()},
    }
    return tuple(
        QualityRow(
            metric=metric,
            dataset=where.get(metric, "the same seeds"),
            samples=len(reference),
            fp=values.get("fp"),
            rtn=values.get("rtn"),
            quantized=values["quantized"],
        )
        for metric, values in figures.items()
    )


def _finite_mean(values: Tensor) -> float:
    """The mean; samples that are equal to the last bit count as 100 dB."""
    return float(values.clamp(max=100).mean())


def trajectory_report(
    job: DiffusionJob, made: QuantizedDenoiser, found: Evaluated, pictures: dict[str, str]
) -> TrajectoryReport:
    """The curves of the report: means over samples."""
    ours, nearest = found.curves["quantized"], found.curves.get("rtn")
    groups = (
        StepGroup(first=g.first, last=g.last, before=g.loss_before, after=g.loss_after, seconds=g.seconds)
        for g in made.groups
    )
    return TrajectoryReport(
        scheduler=job.plan.scheduler,
        eta=job.plan.sampling.eta,
        timesteps=tuple(step.timestep for step in job.loaded.steps),
        samples=ours.single.shape[1],
        single=_means(ours.single),
        accumulated=_means(ours.accumulated),
        single_rtn=_means(nearest.single) if nearest else None,
        accumulated_rtn=_means(nearest.accumulated) if nearest else None,
        noise_kept=made.noise_kept,
        groups=tuple(groups),
        pictures=pictures,
    )


def _means(errors: Tensor) -> tuple[float, ...]:
    return tuple(errors.double().mean(1).tolist())


@torch.no_grad()
def layer_reports(
    job: DiffusionJob, made: QuantizedDenoiser, nearest: StepNetwork | None
) -> tuple[LayerReport, ...]:
    """Output errors of every layer in the running networks, from the same full-precision latents."""
    noise = job.evaluation()
    few = noise.of(range(min(PROBED, len(noise.seeds))))
    last = len(job.loaded.steps) - 1
    wanted = {0, last // 2, last}
    latents = [at for at in trajectory(job.full, job.loaded.steps, few) if at.step in wanted]
    ours = _errors(job, made.network, latents)
    rounded = _errors(job, nearest, latents) if nearest is not None else {}
    return tuple(
        LayerReport(
            name=layer.name,
            bits=made.bits(layer.name),
            group_size=None,
            relative_mse=ours[layer.name].relative,
            relative_mse_rtn=rounded[layer.name].relative if rounded else None,
            sqnr_db=ours[layer.name].sqnr_db,
        )
        for layer in job.layers
    )


def _errors(job: DiffusionJob, network: StepNetwork, latents: list[Latents]) -> dict[str, ErrorSum]:
    sums: dict[str, ErrorSum] = {}
    reference: dict[str, Tensor] = {}
    modules = {layer.name: job.loaded.network.get_submodule(layer.name) for layer in job.layers}

    def keep(name: str, output: Tensor) -> None:
        reference[name] = channels_last(modules[name], output)

    def see(name: str, output: Tensor) -> None:
        sums.setdefault(name, ErrorSum()).update(channels_last(modules[name], output), reference[name])

    for index, x, seeds in latents:
        with outputs_of(modules, keep):
            job.full.of(seeds)(x, index)
        with outputs_of({name: network.unet.get_submodule(name) for name in modules}, see):
            network.of(seeds)(x, index)
    return sums
