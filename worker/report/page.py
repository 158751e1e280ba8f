"""From a Report to one self-contained page: no script, nothing loaded, readable without colour."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantry.contract import LayerReport, QualityRow, Report
from quantry.wording import bytes_text, change_text, number_text, recipe_text, seconds_text
from worker.report.charts import Frame, Series, bar, dumbbell, line_chart
from worker.report.scales import log_bounds, positive

TEMPLATES = Path(__file__).parent / "templates"
LOWER_IS_BETTER = ("perplexity",)
MANY_LAYERS = 64  # from here on the worst come first and the rest is folded


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top. `tone`: good, bad or plain."""

    label: str
    value: str
    note: str
    tone: str = "plain"


@dataclass(frozen=True)
class QualityLine:
    """One of the three networks: its figure, the change against full precision, the loss as a bar."""

    name: str
    value: str
    change: str
    loss: Markup
    result: bool


@dataclass(frozen=True)
class LayerRow:
    """A layer with its drawings. `block` and `short` are the two parts of its name."""

    layer: LayerReport
    block: str
    short: str
    sqnr: Markup
    means: Markup
    against_rtn: str


def render(report: Report) -> str:
    """The page. Raises jinja2.TemplateError only for a fault of ours."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_text, "seconds": seconds_text, "number": number_text}
    environment.globals |= {"closed": closed_text, "small": small_text, "lines": quality_lines}
    style = _style()
    layers = layer_rows(report.layers)
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
        layers=layers,
        groups=[(block, list(rows)) for block, rows in groupby(layers, lambda row: row.block)],
        worst=sorted(layers, key=_sqnr)[:10] if len(layers) > MANY_LAYERS else [],
        dampings=list(dict.fromkeys(layer.damping for layer in report.layers)),
        grids=sorted({(layer.bits, layer.group_size or 0) for layer in report.layers}),
        means=means_text(report.layers),
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
    change = signed(row.quantized, row.fp)
    if not change:
        return Tile(row.metric, number_text(row.quantized), f"on {row.dataset}")
    tone = "good" if _no_worse(row, row.fp) else "plain" if _no_worse(row, row.rtn) else "bad"
    note = f"{number_text(row.quantized)} instead of {number_text(row.fp)}"
    return Tile(row.metric, change, note, tone)


def _no_worse(row: QualityRow, than: float | None) -> bool:
    """Whether the result is at least as good as another figure of the row; true where there is none."""
    if row.quantized is None or than is None:
        return True
    return row.quantized <= than if row.metric in LOWER_IS_BETTER else row.quantized >= than


def quality_lines(row: QualityRow) -> list[QualityLine]:
    """Full precision, rounded to nearest, and the result; what was not measured is left out."""
    figures = (("Full precision", row.fp), ("Round to nearest", row.rtn), ("Quantized", row.quantized))
    losses = [
        abs(v - row.fp) for _, v in figures if v is not None and row.fp is not None and math.isfinite(v)
    ]
    widest = max(losses, default=0.0)
    found = []
    for name, value in figures:
        if value is None:
            continue
        loss = abs(value - row.fp) if row.fp is not None and name != "Full precision" else None
        kind = "rtn" if name == "Round to nearest" else "ours"
        drawn = bar(loss, low=0, high=widest, width=260, kind=kind) if widest else Markup("")
        found.append(QualityLine(name, number_text(value), signed(value, row.fp), drawn, name == "Quantized"))
    return found


def signed(value: float | None, base: float | None) -> str:
    """The change in per cent, with a minus sign as print has it; nothing where it is zero by definition."""
    return "" if value == base else change_text(value, base).replace("-", "−")


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
    if row.fp is None or row.rtn is None or row.quantized is None:
        return ""
    lost, still = abs(row.rtn - row.fp), abs(row.quantized - row.fp)
    if not lost or not all(map(math.isfinite, (lost, still))):
        return ""
    share = 100 * (1 - still / lost)
    return f"{share:.0f} % of what rounding to nearest lost is won back" if share > 0.5 else ""


def block_charts(report: Report) -> list[tuple[str, Markup]]:
    """The error curve twice, for wide and for narrow screens: (class, drawing)."""
    blocks = report.blocks
    series = [
        Series("round to nearest", "rtn", tuple(b.relative_mse_rtn for b in blocks)),
        Series("quantized", "ours", tuple(b.relative_mse_evaluation for b in blocks)),
        Series("on calibration text", "seen", tuple(b.relative_mse for b in blocks)),
    ]
    if not any(positive(s.values) for s in series):
        return []
    about = _curve_words(series)
    made = []
    for kind, frame in (("wide", Frame(960, 340)), ("narrow", Frame(360, 300, left=52, right=6))):
        names = series if kind == "wide" else [Series(_short(s.name), s.kind, s.values) for s in series]
        chart = line_chart(
            names,
            frame=frame,
            name=f"blocks-{kind}",
            title="Relative error of the residual stream after each block, logarithmic",
            about=about,
            x_label="block",
        )
        made.append((kind, chart))
    return made


def _short(name: str) -> str:
    return {"round to nearest": "RTN", "on calibration text": "calibration"}.get(name, name)


def _curve_words(series: Sequence[Series]) -> str:
    said = []
    for line in series:
        values = positive(line.values)
        if values:
            said.append(
                f"{line.name}: from {small_text(values[0])} after the first block to {small_text(values[-1])}"
            )
    return "; ".join(said) + " after the last."


def layer_rows(layers: Sequence[LayerReport]) -> list[LayerRow]:
    """Every layer with its drawings, on axes that all rows share."""
    sqnr = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
    low, high = (min(0.0, *sqnr, 0.0), max(10.0, *sqnr, 10.0)) if sqnr else (0.0, 10.0)
    means = positive([m for layer in layers for m in (layer.mean_error_before, layer.mean_error_after)])
    least, most = log_bounds(means) if means else (0.1, 1.0)
    return [
        LayerRow(
            layer,
            *_split(layer.name),
            bar(layer.sqnr_db, low=low, high=high),
            dumbbell(layer.mean_error_before, layer.mean_error_after, low=least, high=most),
            _per_cent(layer.relative_mse, layer.relative_mse_rtn),
        )
        for layer in layers
    ]


def _split(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj` -> (`model.layers.3`, `mlp.up_proj`)."""
    found = re.match(r"(.*?\.\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _per_cent(value: float | None, base: float | None) -> str:
    return f"{100 * (value / base - 1):+.0f} %".replace("-", "−") if value is not None and base else ""


def _sqnr(row: LayerRow) -> float:
    return math.inf if row.layer.sqnr_db is None else row.layer.sqnr_db


def means_text(layers: Sequence[LayerReport]) -> str:
    """What compensation did to the mean output error, over all layers that it touched."""
    pairs = [
        (layer.mean_error_before, layer.mean_error_after)
        for layer in layers
        if positive([layer.mean_error_before]) and positive([layer.mean_error_after])
    ]
    ratios = [math.log(after / before) for before, after in pairs if before and after and before != after]
    if not ratios:
        return ""
    factor = math.exp(-sum(ratios) / len(ratios))
    fell = sum(ratio < 0 for ratio in ratios)
    direction = f"{factor:.2f} times smaller" if factor >= 1 else f"{1 / factor:.2f} times larger"
    return (
        f"Bias compensation makes the mean output error {direction} "
        f"(geometric mean over {len(ratios)} layers; it fell in {fell} of them)."
    )


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
