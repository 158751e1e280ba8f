"""The tables of layers and of activations: every row with its drawings, and a sentence about all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantry.reports import LayerReport, OperandReport
from worker.report.charts import bar, dumbbell
from worker.report.scales import log_bounds, positive

MANY_ROWS = 64  # from here on the worst come first and the rest is folded
WORST = 10


@dataclass(frozen=True)
class LayerRow:
    """A layer with its drawings. `block` and `short` are the two parts of its name."""

    layer: LayerReport
    block: str
    short: str
    sqnr: Markup
    means: Markup
    against_rtn: str


@dataclass(frozen=True)
class OperandRow:
    """A quantized activation with its SQNR as a bar. `block` and `short` are the two parts of its name."""

    operand: OperandReport
    block: str
    short: str
    sqnr: Markup


def layer_rows(layers: Sequence[LayerReport]) -> list[LayerRow]:
    """Every layer with its drawings, on axes that all rows share."""
    low, high = _sqnr_bounds(layers)
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


def operand_rows(operands: Sequence[OperandReport]) -> list[OperandRow]:
    """Every quantized activation, on one axis."""
    low, high = _sqnr_bounds(operands)
    return [
        OperandRow(operand, *_split(operand.name), bar(operand.sqnr_db, low=low, high=high))
        for operand in operands
    ]


def by_block(rows: Sequence[OperandRow]) -> list[tuple[str, list[OperandRow]]]:
    """The rows under their blocks; a method may list inputs of layers apart from operands of attention."""
    found: dict[str, list[OperandRow]] = {}
    for row in rows:
        found.setdefault(row.block, []).append(row)
    return list(found.items())


def worst_layers(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """The rows of least SQNR, where there are too many to see them."""
    return sorted(rows, key=lambda row: _sqnr(row.layer))[:WORST] if len(rows) > MANY_ROWS else []


def worst_operands(rows: Sequence[OperandRow]) -> list[OperandRow]:
    """The rows of least SQNR, where there are too many to see them."""
    return sorted(rows, key=lambda row: _sqnr(row.operand))[:WORST] if len(rows) > MANY_ROWS else []


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


def row_sums_text(operands: Sequence[OperandReport]) -> str:
    """What the softmax correction did to the sums of the rows, which are 1 before they are quantized."""
    pairs = [
        (operand.row_sum_before, operand.row_sum_after)
        for operand in operands
        if operand.row_sum_before is not None and operand.row_sum_after is not None
    ]
    if not pairs:
        return ""
    before, after = (sum(abs(1 - pair[side]) for pair in pairs) / len(pairs) for side in (0, 1))
    return (
        f"A row of attention probabilities misses its sum of 1 by {before:.3g} as quantized and by {after:.3g} "
        f"after the softmax correction (mean over {len(pairs)} attention modules)."
    )


def _sqnr_bounds(measured: Sequence[LayerReport] | Sequence[OperandReport]) -> tuple[float, float]:
    """The axis of all bars: from 0 dB, or less where one is worse than nothing, to at least 10."""
    found = [one.sqnr_db for one in measured if one.sqnr_db is not None]
    return min(0.0, *found, 0.0), max(10.0, *found, 10.0)


def _sqnr(measured: LayerReport | OperandReport) -> float:
    return math.inf if measured.sqnr_db is None else measured.sqnr_db


def _split(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj` -> (`model.layers.3`, `mlp.up_proj`)."""
    found = re.match(r"(.*\.\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _per_cent(value: float | None, base: float | None) -> str:
    return f"{100 * (value / base - 1):+.0f} %".replace("-", "−") if value is not None and base else ""
