"""What people see: tables, and the live line of a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from quantry.contract import DatasetRead, MethodInfo
from quantry.jobs import FINISHED, JobRead, State
from quantry.reports import Estimate, LayerReport, Manifest, OperandReport, QualityRow, Report
from quantry.wording import (
    bytes_text,
    change_text,
    contents_text,
    figure_change_text,
    figure_text,
    metric_text,
    operations_text,
    overhead_text,
    recipe_text,
    samples_text,
    seconds_text,
    spec_text,
)

STYLES = {
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.REJECTED: "red",
    State.EXPIRED: "red",
    State.CANCELLED: "yellow",
    State.CANCELLING: "yellow",
    State.QUEUED: "dim",
}


class LiveJob:
    """The progress of a job on stderr: a bar in a terminal, a line for each new stage in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = ""
        self._task: TaskID | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[state]}"),
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[eta]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> LiveJob:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, job: JobRead) -> None:
        progress = job.progress
        running = job.state not in FINISHED
        eta = f"about {seconds_text(progress.eta_s)} left" if running and progress.eta_s else ""
        stage = job.stage if running and job.stage and job.stage != job.state.value else ""
        count = f"{progress.done}/{progress.total}" if running and progress.total else ""
        if self._console.is_terminal:
            fields: dict[str, Any] = {"state": job.state.value, "stage": stage, "count": count, "eta": eta}
            total = progress.total or None
            if self._task is None:
                self._task = self._bar.add_task("job", total=total, completed=progress.done, **fields)
            else:
                self._bar.update(self._task, total=total, completed=progress.done, **fields)
            return
        line = " ".join(part for part in (job.state.value, stage and f"({stage})") if part)
        if line != self._line:
            self._line = line
            now = datetime.now(UTC).strftime("%H:%M:%S")
            self._console.print(" ".join(p for p in (now, line, count, eta) if p), markup=False)


def show_job(console: Console, job: JobRead) -> None:
    """One job, its end or how far it is, and its quality."""
    console.print(f"[bold]{job.id}[/]  {_state(job.state)}  {spec_text(job.spec)}")
    if job.error:
        console.print(f"{job.error.title} ({job.error.type}): {job.error.detail}", style="red", markup=False)
        if job.error.retryable:
            console.print(f"It can be tried again: quantry retry {job.id}", markup=False)
    if job.state not in FINISHED and job.stage:
        progress = f" {job.progress.done}/{job.progress.total}" if job.progress.total else ""
        console.print(f"{job.stage}{progress}", style="dim", markup=False)
    if job.quality:
        console.print(quality_table(job.quality))


def quality_table(rows: Sequence[QualityRow]) -> Table:
    """Full precision, round-to-nearest and the result, with the changes against full precision."""
    table = Table(title="Quality", title_justify="left", title_style="bold")
    table.add_column("metric")
    table.add_column("data")
    for name in ("FP", "RTN", "quantized"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            metric_text(row.metric),
            f"{row.dataset} ({samples_text(row.metric, row.samples)})",
            figure_text(row.metric, row.fp),
            _with_change(row, row.rtn),
            f"[bold]{_with_change(row, row.quantized)}[/]",
        )
    return table


def show_report(console: Console, report: Report) -> None:
    """The figures that decide whether a checkpoint is good enough; the page has the rest."""
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print(quality_table(report.quality))
    size = report.size
    ratio = size.fp_bytes / size.quantized_bytes if size.quantized_bytes else 0
    console.print(
        f"size {bytes_text(size.quantized_bytes)} of {bytes_text(size.fp_bytes)} ({ratio:.2f}× smaller), "
        f"{size.effective_bits:.3f} bits a weight, format {report.format}"
    )
    cost = report.cost
    console.print(
        f"took {seconds_text(cost.wall_s)} ({seconds_text(cost.cpu_s)} of CPU), "
        f"at most {bytes_text(cost.peak_rss_bytes)} of memory"
    )
    operations = report.bit_operations
    if operations:
        console.print(
            f"{operations_text(operations.base)} bit operations a forward, "
            f"{overhead_text(operations)} more for grids that are found as it runs"
        )
    worst = sorted(report.layers, key=_sqnr)[:5]
    if worst and worst[0].sqnr_db is not None:
        table = Table(title="Layers with the largest output error", title_justify="left", title_style="bold")
        table.add_column("layer", overflow="fold")
        for name in ("bits", "SQNR (dB)", "relative MSE", "of RTN"):
            table.add_column(name, justify="right")
        for layer in worst:
            mse, rtn = layer.relative_mse or 0, layer.relative_mse_rtn
            table.add_row(
                layer.name, str(layer.bits), f"{_sqnr(layer):.1f}", f"{mse:.3g}", change_text(mse, rtn)
            )
        console.print(table)
    if report.operands:
        console.print(operands_table(sorted(report.operands, key=_sqnr)[:5]))


def operands_table(operands: Iterable[OperandReport]) -> Table:
    """Quantized activations: what each is, its grid and its error."""
    table = Table(title="Activations with the lowest SQNR", title_justify="left", title_style="bold")
    for name in ("activation", "kind", "quantizer"):
        table.add_column(name, overflow="fold")
    for name in ("bits", "SQNR (dB)"):
        table.add_column(name, justify="right")
    for operand in operands:
        noise = "–" if operand.sqnr_db is None else f"{operand.sqnr_db:.1f}"
        kind = operand.kind.replace("_", " ")
        table.add_row(operand.name, kind, operand.quantizer, str(operand.bits), noise)
    return table


def show_estimate(console: Console, estimate: Estimate) -> None:
    """What a job would do, before it is submitted."""
    kept = [layer for layer in estimate.layers if not layer.quantized]
    spec = estimate.spec
    console.print(f"[bold]{spec.model.id}[/] ({estimate.architecture}, {estimate.parameters:,} parameters)")
    console.print(f"recipe   {recipe_text(spec.recipe)}")
    console.print(f"layers   {len(estimate.layers) - len(kept)} quantized, {len(kept)} kept")
    console.print(
        f"size     {bytes_text(estimate.quantized_bytes)} of {bytes_text(estimate.fp_bytes)}, "
        f"{estimate.effective_bits:.3f} bits a weight, format {estimate.format}"
    )
    console.print(f"memory   at most {bytes_text(estimate.peak_memory_bytes)}")
    console.print(f"time     {seconds_text(estimate.seconds_low)} to {seconds_text(estimate.seconds_high)}")
    for layer in kept:
        console.print(f"kept     {layer.name}: {layer.reason}", style="dim", markup=False)
    for warning in estimate.warnings:
        console.print(f"warning  {warning}", style="yellow", markup=False)


def jobs_table(jobs: Iterable[JobRead]) -> Table:
    table = _listing("id", "state", "model", "recipe", "quality", "created")
    for job in jobs:
        quality = job.quality[0] if job.quality else None
        figure = (
            f"{metric_text(quality.metric)} {_with_change(quality, quality.quantized)}" if quality else ""
        )
        created = job.created_at.astimezone().strftime("%Y-%m-%d %H:%M")
        recipe = recipe_text(job.spec.recipe)
        table.add_row(job.id, _state(job.state), job.spec.model.id, recipe, figure, created)
    return table


def models_table(models: Iterable[Mapping[str, Any]]) -> Table:
    table = _listing("model", "architecture", "size")
    for model in models:
        table.add_row(model["id"], model["architecture"], bytes_text(model["bytes"]))
    return table


def methods_table(methods: Iterable[MethodInfo]) -> Table:
    table = _listing("method", "role", "what", "cost", "families", "formats", "paper")
    for method in methods:
        families, formats = ", ".join(method.families), ", ".join(method.formats)
        table.add_row(
            method.method, method.role, method.title, method.cost, families, formats, method.paper or ""
        )
    return table


def datasets_table(datasets: Iterable[DatasetRead]) -> Table:
    table = _listing("id", "name", "size", "contents", "sha256")
    for d in datasets:
        table.add_row(d.id, d.name, bytes_text(d.bytes), contents_text(d), d.sha256[:12])
    return table


def _listing(first: str, *others: str) -> Table:
    """A table whose first column is what other commands take: it is never cut or broken; the others wrap."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, overflow="fold", justify="right" if name == "size" else "left")
    return table


def show_manifest(console: Console, manifest: Manifest, folder: str) -> None:
    total = sum(entry.bytes for entry in manifest.files)
    console.print(
        f"{len(manifest.files)} files, {bytes_text(total)}, checked by sha256, in {folder}", markup=False
    )
    console.print(f"\nTo load it ({manifest.loader.package} {manifest.loader.version}):\n", markup=False)
    console.print(manifest.loader.snippet, markup=False)


def _sqnr(measured: LayerReport | OperandReport) -> float:
    return float("inf") if measured.sqnr_db is None else measured.sqnr_db


def _state(state: State) -> str:
    style = STYLES.get(state, "cyan")
    return f"[{style}]{state.value}[/]"


def _with_change(row: QualityRow, value: float | None) -> str:
    """A figure of the row, and its change against full precision."""
    change = figure_change_text(row.metric, value, row.fp)
    return figure_text(row.metric, value) + (f" ({change})" if change else "")
