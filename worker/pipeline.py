"""run(): from a job's spec to a folder that loads: resolve, sweep, export, verify, report."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import Tensor

import quantry
from quantry.contract import (
    CostReport,
    JobSpec,
    Manifest,
    QualityRow,
    Rejected,
    Report,
    SizeReport,
    State,
    Succeeded,
)
from quantry.costs import estimate
from quantry.quantizers.affine import QuantizedLayer
from worker.calibration.store import BlockStore
from worker.export import export, write_manifest, write_model_card
from worker.export.verify import verify
from worker.models.causal_lm import CausalLM
from worker.models.source import check_folder
from worker.prepare import Prepared, prepare
from worker.progress import Progress
from worker.report import write_report
from worker.sweep import BlockSweep, SweepResult
from worker.workspace import Workspace

REFERENCE = (2, 64)  # windows and tokens of the batch on which the written checkpoint must agree


def run(spec: JobSpec, workspace: Workspace, progress: Progress) -> Succeeded | Rejected:
    """Run one job. Raises QuantizationError and its kinds; what it wrote is then of no use to anybody."""
    began = time.perf_counter(), time.process_time()
    if workspace.threads is not None:
        torch.set_num_threads(workspace.threads)
    job = prepare(spec, workspace, progress)
    sweep = BlockSweep(
        job.model,
        job.spec,
        BlockStore(workspace.checkpoints, job.fingerprint),
        progress,
        job.calibration,
        job.evaluation,
    )
    result = sweep.run()
    with _whole_or_gone(workspace.artifact):
        report, manifest = _package(job, sweep, result, workspace, progress, began)
    missed = _gate(spec, report.quality)
    if missed:
        return Rejected(report=report, manifest=manifest, detail=missed)
    return Succeeded(report=report, manifest=manifest)


@contextmanager
def _whole_or_gone(folder: Path) -> Iterator[None]:
    """Leave no part of an artifact behind if anything goes wrong."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _package(
    job: Prepared,
    sweep: BlockSweep,
    result: SweepResult,
    workspace: Workspace,
    progress: Progress,
    began: tuple[float, float],
) -> tuple[Report, Manifest]:
    """Write the checkpoint, prove that it loads, and put the report beside it."""
    spec = job.spec
    progress.stage(State.PACKAGING, "writing the checkpoint", 0, 3)
    written = _export(job, sweep.store, workspace.artifact)
    progress.advance(1, 3, "reloading the checkpoint in a clean process")
    verification = _verify(job, sweep, workspace)
    progress.advance(2, 3, "writing the report")
    report = _report(job, sweep.store, result, workspace, verification, began)
    write_report(workspace.artifact, report)
    write_model_card(
        workspace.artifact,
        format=job.plan.format,
        base_model=spec.model.id,
        recipe=spec.recipe,
        source=job.folder,
        quality=report.quality,
        size=report.size,
        warnings=report.warnings,
    )
    manifest = write_manifest(
        workspace.artifact, format=job.plan.format, job=workspace.job, known=written.files
    )
    progress.advance(3, 3, "done")
    return report, manifest


def _export(job: Prepared, store: BlockStore, target: Path) -> Manifest:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return export(
        job.folder,
        target,
        format=job.plan.format,
        config=check_folder(job.folder),
        family=job.plan.family,
        layers=store.layers(job.plan.family.blocks, len(job.model.blocks)),
        kept=job.model.kept(),
        recipe=job.spec.recipe,
        base_model=job.spec.model.id,
    )


def _verify(job: Prepared, sweep: BlockSweep, workspace: Workspace) -> dict[str, float | str]:
    """Reload the artifact as a user would, in a clean process, and compare logits in float32."""
    tokens = _reference_tokens(job)
    exact = CausalLM(job.folder, device=torch.device("cpu"), dtype=torch.float32)
    reference = BlockSweep(exact, job.spec, sweep.store, sweep.progress, None, None).reference_logits(tokens)
    with tempfile.TemporaryDirectory(
        dir=workspace.artifact
    ) as folder:  # goes with the attempt, whatever happens
        path = Path(folder) / "reference.safetensors"
        safetensors.torch.save_file(
            {"input_ids": tokens.contiguous(), "logits": reference.contiguous()}, path
        )
        return verify(workspace.artifact, job.plan.format, path, threads=workspace.threads)


def _reference_tokens(job: Prepared) -> Tensor:
    """The batch that both sides compute: held-out windows where there are some, else whatever there is."""
    windows, length = REFERENCE
    tokens = job.calibration if job.evaluation is None else job.evaluation
    if tokens is None:
        size = job.model.model.get_input_embeddings().num_embeddings
        return torch.randint(size, REFERENCE, generator=torch.Generator().manual_seed(0))
    if job.spec.compensation and job.spec.compensation.granularity == "position_channel":
        return tokens[:windows]  # biases per position need the window they were fitted for
    return tokens[:windows, :length]


def _report(
    job: Prepared,
    store: BlockStore,
    result: SweepResult,
    workspace: Workspace,
    verification: dict[str, float | str],
    began: tuple[float, float],
) -> Report:
    blocks = job.plan.family.blocks
    ladder = [
        f"{layer.name}: damping raised to {layer.damping:g}"
        for layer in result.layers
        if _raised(job, layer.damping)
    ]
    return Report(
        job=workspace.job,
        spec=job.spec,
        quality=_quality(job, result),
        size=_size(job, store.layers(blocks, len(job.model.blocks)), workspace.artifact),
        layers=result.layers,
        blocks=result.blocks,
        cost=_cost(job, result, began),
        estimate=_estimate(job),
        environment=_environment(job),
        fingerprint=job.fingerprint,
        format=job.plan.format,
        warnings=(*job.warnings, *ladder),
        verification=verification,
    )


def _raised(job: Prepared, damping: float | None) -> bool:
    asked = getattr(job.spec.weight_step, "damping", None)
    return damping is not None and asked is not None and damping > asked * 1.0001


def _quality(job: Prepared, result: SweepResult) -> tuple[QualityRow, ...]:
    if job.evaluation is None:
        return ()
    values = result.perplexity
    row = QualityRow(
        metric="perplexity",
        dataset=job.evaluation_name,
        samples=len(job.evaluation),
        fp=values.get("fp"),
        rtn=values.get("rtn"),
        quantized=values["quantized"],
    )
    return (row,)


def _size(job: Prepared, layers: Iterable[tuple[str, QuantizedLayer]], artifact: Path) -> SizeReport:
    bits = weights = added = 0
    for _, layer in layers:
        bias = _added_bytes(layer)
        bits += layer.weight.storage_bits() + 8 * bias
        weights += layer.weight.codes.numel()
        added += bias
    stored = sum(f.stat().st_size for f in artifact.iterdir() if f.suffix in (".safetensors", ".gguf"))
    return SizeReport(
        fp_bytes=job.plan.fp_bytes,
        quantized_bytes=stored,
        effective_bits=bits / weights,
        quantized_weights=weights,
        added_bias_bytes=added,
    )


def _added_bytes(layer: QuantizedLayer) -> int:
    """Bytes of the biases that the full-precision layer did not have."""
    channel = layer.bias.numel() * 4 if layer.added_bias and layer.bias is not None else 0
    return channel + (0 if layer.position_bias is None else layer.position_bias.numel() * 4)


def _cost(job: Prepared, result: SweepResult, began: tuple[float, float]) -> CostReport:
    cuda = job.model.device.type == "cuda"
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return CostReport(
        wall_s=time.perf_counter() - began[0],
        cpu_s=time.process_time() - began[1],
        peak_rss_bytes=peak * (1 if sys.platform == "darwin" else 1024),
        peak_device_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        quantize_wall_s=result.cost.wall_s,
        quantize_cpu_s=result.cost.cpu_s,
    )


def _estimate(job: Prepared) -> dict[str, object]:
    found = estimate(
        job.plan,
        threads=torch.get_num_threads(),
        cuda=job.model.device.type == "cuda",
        evaluation_bytes=None if job.evaluation is None else 4 * job.evaluation.numel(),
    )
    names = {"quantized_bytes", "effective_bits", "peak_memory_bytes", "seconds_low", "seconds_high"}
    return found.model_dump(mode="json", include=names)


def _environment(job: Prepared) -> dict[str, str]:
    return {
        "quantry": quantry.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if job.model.device.type == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "compute_dtype": str(job.model.dtype).removeprefix("torch."),
    }


def _gate(spec: JobSpec, quality: tuple[QualityRow, ...]) -> str | None:
    """Why the result misses the quality gate of the job, or None."""
    limit = spec.accept.perplexity_increase_max
    if limit is None:
        return None
    for row in quality:
        if row.fp is not None and row.quantized is not None and row.quantized > row.fp * (1 + limit):
            return (
                f"{row.metric} on {row.dataset} rose by {row.quantized / row.fp - 1:.2%}, "
                f"{limit:.2%} is accepted (accept.perplexity_increase_max)"
            )
    return None
