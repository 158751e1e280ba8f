"""What every kind of job does at its end: a whole artifact or none, its papers, its cost, where it ran, the gate."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

import quantry
from quantry.contract import JobSpec
from quantry.reports import CostReport, Manifest, QualityRow, Report
from worker.export.manifest import write_manifest
from worker.export.model_card import write_model_card
from worker.report import write_report


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Leave no part of an artifact behind if anything goes wrong."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_papers(target: Path, report: Report, *, source: Path, written: Manifest | None = None) -> Manifest:
    """Put the report, the model card and the manifest beside the artifact in `target`.

    source: the full-precision checkpoint. written: the manifest of what export wrote, whose digests hold still.
    """
    assert report.spec is not None
    write_report(target, report)
    write_model_card(
        target,
        format=report.format,
        base_model=report.spec.model.id,
        recipe=report.spec.recipe,
        source=source,
        quality=report.quality,
        size=report.size,
        warnings=report.warnings,
    )
    known = written.files if written else ()
    return write_manifest(target, format=report.format, job=report.job, known=known)


def clock() -> tuple[float, float]:
    """Now, by the wall and by this process's processor time."""
    return time.perf_counter(), time.process_time()


def cost(
    began: tuple[float, float], device: torch.device, own: tuple[float, float] | None = None
) -> CostReport:
    """What was spent since `began`. own: wall and processor seconds of quantization alone."""
    cuda = device.type == "cuda"
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    wall, cpu = clock()
    return CostReport(
        wall_s=wall - began[0],
        cpu_s=cpu - began[1],
        peak_rss_bytes=peak * (1 if sys.platform == "darwin" else 1024),
        peak_device_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        quantize_wall_s=own[0] if own else None,
        quantize_cpu_s=own[1] if own else None,
    )


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Versions, device and threads."""
    return {
        "quantry": quantry.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "compute_dtype": str(dtype).removeprefix("torch."),
    }


def gate(spec: JobSpec, quality: tuple[QualityRow, ...]) -> str | None:
    """Why the result misses the quality gate of the job, or None."""
    limit, drop = spec.accept.perplexity_increase_max, spec.accept.accuracy_drop_max
    for row in quality:
        if row.fp is None or row.quantized is None:
            continue
        if drop is not None and row.metric == "top1" and row.quantized < row.fp - drop:
            return (
                f"top1 on {row.dataset} fell by {100 * (row.fp - row.quantized):.2f} points, "
                f"{100 * drop:.2f} are accepted (accept.accuracy_drop_max)"
            )
        if limit is None or row.metric != "perplexity":
            continue
        if row.quantized > row.fp * (1 + limit):
            return (
                f"{row.metric} on {row.dataset} rose by {row.quantized / row.fp - 1:.2%}, "
                f"{limit:.2%} is accepted (accept.perplexity_increase_max)"
            )
    return None
