"""From a Report to one self-contained page: no script, nothing loaded, readable without colour."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantry.reports import QualityRow, Report
from quantry.wording import (
    bytes_text,
    figure_change_text,
    figure_text,
    higher_is_better,
    metric_text,
    operations_text,
    overhead_text,
    recipe_text,
    samples_text,
    seconds_text,
)
from worker.report.charts import FRAMES, Series, bar, line_chart
from worker.report.curves import trained_rows, training_curves
from worker.report.rows import (
    by_block,
    layer_rows,
    means_text,
    operand_rows,
    row_sums_text,
    worst_layers,
    worst_operands,
)
from worker.report.scales import positive

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top. `tone`: good, bad or plain."""

    label: str
    value: str
    note: str
    tone: str = "plain"


@dataclass(frozen=True)
class Picture:
    """Samples of one network: its name, and a PNG in base64."""

    name: str
    content: str


@dataclass(frozen=True)
class QualityLine:
    """One of the three networks: its figure, the change against full precision, the loss as a bar."""

    name: str
    value: str
    change: str
    loss: Markup
    result: bool


def render(report: Report, pictures: Mapping[str, bytes] | None = None) -> str:
    """The page. pictures: PNG files of samples by network. Raises jinja2.TemplateError only for a fault of ours."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": bytes_text,
        "heading": heading_text,
        "metric": metric_text,
        "operations": operations_text,
        "seconds": seconds_text,
    }
    environment.globals |= {
        "closed": closed_text,
        "lines": quality_lines,
        "overhead": overhead_text,
        "samples": samples_text,
        "small": small_text,
    }
    style = _style()
    layers = layer_rows(report.layers)
    operands = operand_rows(report.operands)
    return environment.get_template("report.html").render(
        report=report,
        spec_json=report.spec.model_dump_json(indent=2) if report.spec else None,
        title=report.spec.model.id if report.spec else "Quantized checkpoint",
        recipe=recipe_text(report.spec.recipe) if report.spec else None,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        tiles=tiles(report),
        warnings=warnings_of(report),
        charts=block_charts(report),
        trajectory=trajectory_charts(report),
        pictures=[
            Picture(name, base64.b64encode(content).decode()) for name, content in (pictures or {}).items()
        ],
        layers=layers,
        groups=[(block, list(rows)) for block, rows in groupby(layers, lambda row: row.block)],
        worst=worst_layers(layers),
        dampings=list(dict.fromkeys(layer.damping for layer in report.layers)),
        grids=sorted({(layer.bits, layer.group_size or 0) for layer in report.layers}),
        means=means_text(report.layers),
        operands=operands,
        operand_groups=by_block(operands),
        worst_operands=worst_operands(operands),
        row_sums=row_sums_text(report.operands),
        curves=training_curves(report.training),
        trained=trained_rows(report.training),
        estimate=estimate_rows(report),
    )


def tiles(report: Report) -> list[Tile]:
    """What decides at a glance: quality, size, bits, time."""
    size, cost = report.size, report.cost
    ratio = f"{size.fp_bytes / size.quantized_bytes:.2f}×" if size.quantized_bytes else "–"
    found = [
        Tile("smaller", ratio, f"{bytes_text(size.quantized_bytes)} of {bytes_text(size.fp_bytes)}"),
        Tile("bits a weight", f"{size.effective_bits:.3f}", "scales, zero points and biases counted"),
        Tile("to make", seconds_text(cost.wall_s), f"{bytes_text(cost.peak_rss_bytes)} of memory at most"),
    ]
    if report.quality:
        found.insert(0, _quality_tile(report.quality[0]))
    return found


def _quality_tile(row: QualityRow) -> Tile:
    name, value = metric_text(row.metric), figure_text(row.metric, row.quantized)
    change = change_of(row, row.quantized)
    if not change:
        return Tile(name, value, f"on {row.dataset}")
    tone = "good" if _no_worse(row, row.fp) else "plain" if _no_worse(row, row.rtn) else "bad"
    return Tile(name, change, f"{value} instead of {figure_text(row.metric, row.fp)}", tone)


def _no_worse(row: QualityRow, than: float | None) -> bool:
    """Whether the result is at least as good as another figure of the row; true where there is none."""
    if row.quantized is None or than is None:
        return True
    return row.quantized >= than if higher_is_better(row.metric) else row.quantized <= than


def quality_lines(row: QualityRow) -> list[QualityLine]:
    """Full precision, rounded to nearest, and the result; what was not measured is left out."""
    figures = (("Full precision", row.fp), ("Round to nearest", row.rtn), ("Quantized", row.quantized))
    losses = {name: loss_of(row, value) for name, value in figures if name != "Full precision"}
    widest = max((loss for loss in losses.values() if loss is not None and math.isfinite(loss)), default=0.0)
    found = []
    for name, value in figures:
        if value is None:
            continue
        kind = "rtn" if name == "Round to nearest" else "ours"
        drawn = bar(losses.get(name), low=0, high=widest, width=260, kind=kind) if widest else Markup("")
        text = figure_text(row.metric, value)
        found.append(QualityLine(name, text, change_of(row, value), drawn, name == "Quantized"))
    return found


def loss_of(row: QualityRow, value: float | None) -> float | None:
    """How much worse than full precision a figure is; 0 where it is as good or better."""
    if value is None or row.fp is None:
        return None
    return max(0.0, row.fp - value if higher_is_better(row.metric) else value - row.fp)


def change_of(row: QualityRow, value: float | None) -> str:
    """The change against full precision; nothing where it is zero by definition."""
    return "" if value == row.fp else figure_change_text(row.metric, value, row.fp)


def warnings_of(report: Report) -> list[str]:
    """The report's warnings, then each warning of layers once, with the layers it is about."""
    where: dict[str, list[str]] = {}
    for layer in report.layers:
        for text in layer.warnings:
            where.setdefault(text, []).append(layer.name)
    found = list(report.warnings)
    for text, names in where.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        found.append(f"{text} ({', '.join(names[:4])}{more})")
    return found


def closed_text(row: QualityRow) -> str:
    """How much of what rounding to nearest lost the job has won back, where rounding lost something."""
    lost, still = loss_of(row, row.rtn), loss_of(row, row.quantized)
    if not lost or still is None or not all(map(math.isfinite, (lost, still))):
        return ""
    share = 100 * (1 - still / lost)
    return f"{share:.0f} % of what rounding to nearest lost is won back" if share > 0.5 else ""


def block_charts(report: Report) -> list[tuple[str, Markup]]:
    """The error curve over blocks."""
    blocks = report.blocks
    series = [
        Series("round to nearest", "rtn", tuple(b.relative_mse_rtn for b in blocks)),
        Series("quantized", "ours", tuple(b.relative_mse_evaluation for b in blocks)),
        Series("on calibration data", "seen", tuple(b.relative_mse for b in blocks)),
    ]
    if not any(positive(s.values) for s in series):
        return []
    title = "Relative error of the residual stream after each block, logarithmic"
    return _drawn(series, "block", title, _curve_words(series))


def trajectory_charts(report: Report) -> list[tuple[str, Markup]]:
    """The errors along the sampling trajectory."""
    found = report.trajectory
    if found is None:
        return []
    series = [
        Series("round to nearest", "rtn", found.accumulated_rtn or ()),
        Series("quantized", "ours", found.accumulated),
        Series("quantized, one step alone", "seen", found.single),
    ]
    about = "; ".join(
        f"{line.name}: {small_text(positive(line.values)[0])} after the first step, {small_text(line.values[-1])} "
        "after the last"
        for line in series
        if positive(line.values)
    )
    return _drawn(series, "step", "Squared error of the latent after each step, logarithmic", f"{about}.")


def _drawn(series: Sequence[Series], unit: str, title: str, about: str) -> list[tuple[str, Markup]]:
    """Curves over blocks or steps, for wide and for narrow screens: (class, drawing)."""
    made = []
    for kind, frame in FRAMES:
        names = series if kind == "wide" else [Series(_short(s.name), s.kind, s.values) for s in series]
        chart = line_chart(names, frame=frame, name=f"{unit}s-{kind}", title=title, about=about, x_label=unit)
        made.append((kind, chart))
    return made


def _short(name: str) -> str:
    return {
        "round to nearest": "RTN",
        "on calibration data": "calibration",
        "quantized, one step alone": "one step",
    }.get(name, name)


def _curve_words(series: Sequence[Series]) -> str:
    said = []
    for line in series:
        values = positive(line.values)
        if values:
            said.append(
                f"{line.name}: from {small_text(values[0])} after the first block to {small_text(values[-1])}"
            )
    return "; ".join(said) + " after the last."


def estimate_rows(report: Report) -> list[tuple[str, str, str]]:
    """(what, estimated, measured), for what the dry run had said."""
    said, size, cost = report.estimate, report.size, report.cost
    rows = []
    if _is_number(said.get("seconds_low")) and _is_number(said.get("seconds_high")):
        span = f"{seconds_text(said['seconds_low'])} to {seconds_text(said['seconds_high'])}"
        rows.append(("time", span, seconds_text(cost.wall_s)))
    if _is_number(said.get("peak_memory_bytes")):
        rows.append(("memory", bytes_text(said["peak_memory_bytes"]), bytes_text(cost.peak_rss_bytes)))
    if _is_number(said.get("quantized_bytes")):
        rows.append(("size", bytes_text(said["quantized_bytes"]), bytes_text(size.quantized_bytes)))
    if _is_number(said.get("effective_bits")):
        rows.append(("bits a weight", f"{said['effective_bits']:.3f}", f"{size.effective_bits:.3f}"))
    return rows


def heading_text(text: str) -> str:
    """With a capital letter in front; the others stay as they are."""
    return text[:1].upper() + text[1:]


def small_text(value: float | None) -> str:
    """An error or a ratio, to three digits: 0.0110, 1.30, 2.45e-07."""
    if value is None:
        return "–"
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache
def _style() -> str:
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")
